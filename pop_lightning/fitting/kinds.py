"""The kinds of projections: their common interface, and the lookup by name.

A kind is a file of this folder with the kind's name, in which ``KIND`` is an instance of :class:`Kind`. Adding its name
to ``core/kinds.py`` makes it available to recipes, artifacts and training.
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
        how: the choices made in fitting, as JSON; :attr:`Kind.chosen` of them are added to the curve of
            ``metrics.json``.
    """

    depth: int
    projections: KVProjections
    how: dict[str, Any] = field(default_factory=dict)


class Kind:
    """A kind without training: ``reuse`` needs nothing, ``closed_form`` is fitted in passes over rows.

    Args:
        name: as in recipes and artifacts.

    Attributes:
        trains: whether its projections are trained, starting from those of another kind.
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
        """The depths that every pass over the rows fits; no passes if nothing is fitted.

        Raises:
            InputError: a single depth does not fit in the memory of ``settings``.
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
        """Fit every depth, one after the other; yields nothing if the kind is not fitted.

        Args:
            validate: runs a module over rows, as ``Trainer.validate`` does; its first argument is a title for progress.
        """
        return iter(())


class TrainedKind(Kind, ABC):
    """A kind that :class:`~pop_lightning.fitting.training.KVProjectionTraining` trains.

    Attributes:
        replaces_start: whether the trained parameters replace the fitted maps, so that a checkpoint needs no start.
    """

    trains = True
    replaces_start = False

    def starts_from(self, settings: Any) -> str:
        return settings.start

    def arguments(self, settings: Any) -> dict[str, Any]:
        """The arguments of :meth:`prepare`, from the recipe's ``projection`` section."""
        return {}

    def parameters(self, settings: Any, inputs: int, outputs: int) -> int:
        """Number of parameters trained per layer, for a map of that many inputs and outputs with a bias."""
        return outputs * (inputs + 1)

    @abstractmethod
    def prepare(self, projections: KVProjections, **arguments) -> nn.Module | None:
        """Make ``projections`` trainable, in place; returns a module for :meth:`finish` if it needs one."""

    @abstractmethod
    def finish(self, projections: KVProjections, prepared: nn.Module | None, folder: Path | None) -> KVProjections:
        """Trained projections with plain maps of this kind.

        Args:
            folder: for files of the kind, such as adapters in peft's format; None stores nothing.
        """


def kind(name: str) -> Kind:
    """The kind with that name.

    Raises:
        InputError: there is none.
    """
    if name not in KINDS:
        raise InputError(key="projection.kind", expected=f"one of {', '.join(KINDS)}", found=name)
    return importlib.import_module(f"pop_lightning.fitting.{name}").KIND


def trained_kind(name: str) -> TrainedKind:
    """The trained kind with that name.

    Raises:
        InputError: there is none, or it is not trained.
    """
    if not isinstance(trained := kind(name), TrainedKind):
        names = ", ".join(other for other in KINDS if kind(other).trains)
        raise InputError(f"projections of kind {name} are not trained: expected one of {names}.")
    return trained
