"""What every Lightning module of the library has in common: a base model that it runs and leaves as it was.

An ordinary ``lightning.Trainer`` is all that these modules need. The base is not one of their submodules, so
checkpoints, optimizers and DDP see only what is trained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning
import torch
from torch import nn
from transformers import PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import as_decoder


class DecoderModule(lightning.LightningModule):
    """A module over a base model, which a trainer finds in eval mode, frozen and on the trainer's device.

    After the run, and after an exception in it, the base has its own modes and ``requires_grad`` flags again.

    Args:
        model: a hub id or folder, a Transformers model, or a decoder.

    Attributes:
        split: the split of :class:`~pop_lightning.data.module.CalibrationData` that ``Trainer.validate`` runs on.
    """

    split = "search"

    def __init__(self, model: str | Path | PreTrainedModel | Decoder):
        super().__init__()
        self.decoder = as_decoder(model)
        self._restore: Callable[[], None] | None = None

    def setup(self, stage: str) -> None:
        self._release()
        model = self.decoder.model
        if _can_move(model) and model.device != self.trainer.strategy.root_device:
            model.to(self.trainer.strategy.root_device)
        self._restore = _rest(model)

    def teardown(self, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        """Give the base back as it was, once."""
        if self._restore is not None:
            self._restore()
        self._restore = None

    def configure_callbacks(self) -> list[lightning.Callback]:
        return [_RestoreOnException()]


class _RestoreOnException(lightning.Callback):
    """Lightning calls no ``teardown`` of the module after an exception."""

    def on_exception(self, trainer: lightning.Trainer, module: DecoderModule, exception: BaseException) -> None:
        module._release()


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode and its weights ask for no gradient; afterwards both are as they were."""
    restore = _rest(model)
    try:
        yield
    finally:
        restore()


def _rest(model: nn.Module) -> Callable[[], None]:
    """Put ``model`` at rest; returns what undoes it."""
    training = [module for module in model.modules() if module.training]
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def restore() -> None:
        for module in training:
            module.training = True
        for parameter in asking:
            parameter.requires_grad_(True)

    for module in training:
        module.training = False
    for parameter in asking:
        parameter.requires_grad_(False)
    return restore


def _can_move(model: nn.Module) -> bool:
    """Whether the model lies in one place of its own: not spread by ``device_map``, in shards, or without values."""
    placed = getattr(model, "hf_device_map", None) is not None
    return not placed and not any(each.is_meta or distributed.is_sharded(each) for each in model.parameters())


def outside_inference(batch):
    """``batch`` with tensors that autograd can save: those of ``torch.inference_mode`` are copied.

    To be called inside ``torch.inference_mode(False)``.
    """
    if isinstance(batch, torch.Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, dict):
        return {name: outside_inference(each) for name, each in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(outside_inference(each) for each in batch)
    return batch
