"""The kinds of projections: what the pipeline asks of each, and where a kind is found by its name.

A kind is a file of this folder with the kind's name, in which ``KIND`` is an instance of :class:`Kind`. Its name in
``core/kinds.py`` registers it; recipes, artifacts and training know it from then on.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
from torch import nn
from torch.utils.data import DataLoader

from pop_lightning.core.errors import InputError
from pop_lightning.core.kinds import KINDS
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.projections import KVProjections

Validate = Callable[[str, lightning.LightningModule, DataLoader], Any]


@dataclass
class Fitted:
    """Projections of one depth.

    Attributes:
        how: what was chosen in fitting them, as JSON; ``chosen`` of it goes into the curve of ``metrics.json``.
    """

    depth: int
    projections: KVProjections
    how: dict[str, Any] = field(default_factory=dict)


class Kind:
    """A kind that is made without training: ``reuse`` as it is, ``closed_form`` in passes over rows.

    Args:
        name: as in recipes and artifacts.

    Attributes:
        trains: whether its projections are trained, from those of another kind.
        chosen: keys of :attr:`Fitted.how` that the curve shows.
    """

    trains = False
    chosen: tuple[str, ...] = ()

    def __init__(self, name: str):
        self.name = name

    def starts_from(self, settings: Any) -> str:
        """The untrained kind that is measured at every depth, and that training starts from.

        Args:
            settings: the recipe's ``projection`` section.
        """
        return self.name

    def passes(self, decoder: Decoder, depths: Sequence[int], settings: Any) -> list[list[int]]:
        """Which depths each pass over the rows fits; none where nothing is fitted.

        Raises:
            InputError: what one depth needs does not fit in the memory of ``settings``.
        """
        return []

    def fit(
        self,
        decoder: Decoder,
        depths: Sequence[int],
        settings: Any,
        *,
        boundary: int,
        fit_rows: DataLoader,
        tune_rows: DataLoader,
        validate: Validate,
    ) -> Iterator[Fitted]:
        """Fit every depth, one after the other; nothing comes where nothing is fitted.

        Args:
            validate: runs a module over rows, as ``Trainer.validate`` does; the text says what for.
        """
        return iter(())


class TrainedKind(Kind, ABC):
    """A kind that :class:`~pop_lightning.fitting.training.KVProjectionTraining` trains.

    Attributes:
        replaces_start: whether what is trained is all of the fitted maps, so that a checkpoint needs no start.
    """

    trains = True
    replaces_start = False

    def starts_from(self, settings: Any) -> str:
        return settings.start

    def arguments(self, settings: Any) -> dict[str, Any]:
        """What :meth:`prepare` is given of the recipe's ``projection`` section."""
        return {}

    @abstractmethod
    def prepare(self, projections: KVProjections, **arguments) -> nn.Module | None:
        """Make ``projections`` trainable, in place; returns what :meth:`finish` needs besides them."""

    @abstractmethod
    def finish(self, projections: KVProjections, prepared: nn.Module | None, folder: Path | None) -> KVProjections:
        """Trained projections with plain maps of this kind.

        Args:
            folder: for what the kind stores besides the maps, such as adapters in peft's format; None stores nothing.
        """


def kind(name: str) -> Kind:
    """The kind with that name.

    Raises:
        InputError: there is none.
    """
    if name not in KINDS:
        raise InputError("is unknown", key="projection.kind", expected=f"one of {', '.join(KINDS)}", found=name)
    return importlib.import_module(f"pop_lightning.fitting.{name}").KIND


def trained_kind(name: str) -> TrainedKind:
    """The kind with that name, which trains.

    Raises:
        InputError: there is none, or it does not train.
    """
    found = kind(name)
    if not isinstance(found, TrainedKind):
        names = ", ".join(each for each in KINDS if kind(each).trains)
        raise InputError(f"projections of kind {name} are not trained: expected one of {names}.")
    return found
