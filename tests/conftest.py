import warnings

import torch

torch.set_num_threads(2)
warnings.filterwarnings("ignore", category=FutureWarning)
