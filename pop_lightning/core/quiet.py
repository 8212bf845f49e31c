"""Silences messages and progress bars of other libraries that mean nothing to the user here."""

import logging
import os
import sys
import warnings


def quiet_lightning() -> None:
    """Lightning's advice that does not apply: the base is in eval mode on purpose, loaders need no workers."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",
        ".*returned `None`, this fit will run with no optimizer.*",
        ".*no `val_dataloader`.*",
        ".*isinstance.treespec.*",
        ".*it is recommended to use `Trainer.*devices=1.*",
        ".*tensorboardX.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def quiet_bars() -> None:
    """Progress bars of Transformers, the hub and ``datasets`` where standard error is a log: they are one long line."""
    if sys.stderr.isatty():
        return
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported, which is slow
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
