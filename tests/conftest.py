import warnings

import torch

torch.set_num_threads(1)  # tiny models: a second thread only waits, and much longer on a busy machine
warnings.filterwarnings("ignore", category=FutureWarning)
