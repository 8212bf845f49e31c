import os
import warnings

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # wherever DeepSpeed is imported, it would look for other devices

torch.set_num_threads(1)  # tiny models: a second thread only waits, and much longer on a busy machine
warnings.filterwarnings("ignore", category=FutureWarning)
