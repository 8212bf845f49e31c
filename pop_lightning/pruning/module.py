"""The base class of the library's Lightning modules: it runs a base model and restores its state afterwards.

These modules work with an ordinary ``lightning.Trainer``. The base is not one of their submodules, so checkpoints,
optimizers and DDP see only what is trained.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.utils.data import DistributedSampler
from transformers import PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import as_decoder


class DecoderModule(lightning.LightningModule):
    """A module over a base model, which is in eval mode, frozen and on the trainer's device during a run.

    After the run, or an exception in it, the base's modes and ``requires_grad`` flags are restored.

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
        """Restore the base, once."""
        if self._restore is not None:
            self._restore()
        self._restore = None

    def configure_callbacks(self) -> list[lightning.Callback]:
        # A trainer keeps the callback of its first run, and warns about a second one.
        kept = any(isinstance(callback, _RestoreOnException) for callback in self.trainer.callbacks)
        return [] if kept else [_RestoreOnException()]

    def refuse_repeated_rows(self) -> None:
        """Raise :class:`InputError` if the loaders of this pass do not read every row once, over all processes.

        The sampler that Lightning gives a loader of the user's own repeats rows until all processes have equally many.
        """
        loaders = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            sampler = getattr(loader, "sampler", None)
            if not isinstance(sampler, DistributedSampler):
                continue
            rows, processes = len(sampler.dataset), sampler.num_replicas
            if len(sampler) * processes != rows:
                raise InputError(
                    f"Lightning's sampler divides {rows} rows among {processes} processes by repeating some, which "
                    "would count twice: pass datamodule=data or data.loader(split)."
                )


class _RestoreOnException(lightning.Callback):
    """Lightning calls no ``teardown`` of the module after an exception."""

    def on_exception(self, trainer: lightning.Trainer, module: DecoderModule, exception: BaseException) -> None:
        module._release()


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in eval mode and its weights require no gradient; afterwards both are restored."""
    restore = _rest(model)
    try:
        yield
    finally:
        restore()


def _rest(model: nn.Module) -> Callable[[], None]:
    """Freeze ``model`` in eval mode; returns a function that undoes it."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def restore() -> None:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)

    for module in training:
        module.training = False
    for parameter in trainable:
        parameter.requires_grad_(False)
    return restore


def _can_move(model: nn.Module) -> bool:
    """Whether the model can be moved as a whole: not placed by ``device_map``, in shards, or on the meta device."""
    placed = getattr(model, "hf_device_map", None) is not None
    return not placed and not any(each.is_meta or distributed.is_sharded(each) for each in model.parameters())


def outside_inference(batch):
    """``batch`` with tensors that autograd can save: inference tensors are copied.

    Call it inside ``torch.inference_mode(False)``.
    """
    if isinstance(batch, torch.Tensor):
        return batch.clone() if batch.is_inference() else batch
    if isinstance(batch, dict):
        return {name: outside_inference(each) for name, each in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(outside_inference(each) for each in batch)
    return batch
