"""Silences messages of Lightning that do not apply to this library."""

import logging
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
