"""From rows to projections: closed form with everything about it chosen on held-out rows, and training from there.

The pipeline and the study both fit through this file; it decides what is fitted in which pass, they decide where rows
come from and what becomes of the result.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from pop_lightning.core.plan import PruningPlan
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.fitting import lora
from pop_lightning.fitting.closed_form import (
    DEFAULT,
    ClosedFormFit,
    Shape,
    ValueRefit,
    bytes_needed,
    nothing_fitted,
    passes,
)
from pop_lightning.fitting.training import KVProjectionTraining, make_trainable
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.projections import KVProjections

Validate = Callable[[str, lightning.LightningModule, DataLoader], Any]
Option = tuple[str, float | None]  # objective and ridge; ("reuse", None) fits nothing


@dataclass
class FittedDepth:
    """What was fitted for one depth, and the KL to the full model that each option left on the tuning rows.

    ``options`` keeps the best of each objective, ``kl`` every figure.
    """

    depth: int
    options: dict[Option, KVProjections]
    kl: dict[Option, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.options.values())

    def keep(self, option: Option, projections: KVProjections, kl: float) -> None:
        """Take down the figure of an option, and the option where it is the best of its objective so far."""
        self.kl[option] = kl
        if self.best(option[0]) == option:
            self.options = {each: kept for each, kept in self.options.items() if each[0] != option[0]}
            self.options[option] = projections

    def fits(self, objective: str) -> bool:
        """Whether ``objective`` is among the options."""
        return any(name == objective for name, _ in self.kl)

    def best(self, *objectives: str) -> Option:
        """The option of least held-out KL, among ``objectives`` where some are named."""
        return min((o for o in self.kl if not objectives or o[0] in objectives), key=self.kl.__getitem__)

    def summary(self) -> dict[str, Any]:
        """As JSON: what was chosen and every figure that it was chosen by."""
        objective, ridge = self.best()
        kl = {name if strength is None else f"{name} {strength:g}": loss for (name, strength), loss in self.kl.items()}
        return {"objective": objective, "ridge": ridge, "kl": kl}


def closed_form(
    decoder: Decoder,
    depths: Sequence[int],
    *,
    boundary: int,
    ridges: Sequence[float],
    fit_rows: DataLoader,
    tune_rows: DataLoader,
    validate: Validate,
    grouping: str = "auto",
    queries: int = 24,
    objectives: Sequence[str] = DEFAULT,
    refit: bool = True,
    memory: int = 8 * 2**30,
) -> Iterator[FittedDepth]:
    """Fit all depths, in as few passes over ``fit_rows`` as ``memory`` bytes of running sums and options allow.

    Reuse is always one of the options, so the best of them is never worse than reuse on the tuning rows.

    Args:
        grouping: of :class:`ClosedFormFit`; ``auto`` takes the finest that needs one pass.
        objectives: to be tried, of :data:`~pop_lightning.fitting.closed_form.OBJECTIVES`.
        refit: give the best ``attention`` option of each depth a second pass (:class:`ValueRefit`).
        validate: runs a module over rows, as ``Trainer.validate`` does; the text says what for.

    Raises:
        InputError: one depth does not fit in ``memory``.
    """
    shape = Shape.of(decoder)
    grouping, groups = passes(shape, depths, grouping, memory, objectives)

    def chooser(regressions: ClosedFormFit | ValueRefit, found: list[FittedDepth]) -> _Chooser:
        def room() -> int:
            return memory - regressions.nbytes - sum(each.nbytes for each in found)

        return _Chooser(decoder, shape, boundary, tune_rows, validate, room)

    def first_pass(number: int, group: list[int]) -> list[FittedDepth]:
        fit = ClosedFormFit(decoder, group, boundary, grouping=grouping, queries=queries, objectives=objectives)
        needed = sum(bytes_needed(shape, depth, grouping, objectives) for depth in group)
        what = f"closed form, pass {number} of {len(groups)}: depths {', '.join(map(str, group))}, grouping {grouping}"
        validate(f"{what}, {needed / 2**20:.0f} MiB of running sums", fit, fit_rows)
        found = [FittedDepth(depth, {}) for depth in group]
        choice = chooser(fit, found)
        for fitted in found:
            depth = fitted.depth
            choice.offer(fitted, ("reuse", None), partial(nothing_fitted, decoder, depth))
            if depth < decoder.num_layers - 1:
                for name, ridge in itertools.product(fit.objectives, ridges):
                    choice.offer(fitted, (name, ridge), partial(fit.solve, depth, ridge, name))
            fit.drop(depth)
        choice.measure()
        return found

    def second_pass(found: list[FittedDepth]) -> None:
        starts = {each.depth: each.options[each.best("attention")] for each in found if each.fits("attention")}
        if not starts:
            return
        second = ValueRefit(starts, boundary, grouping=grouping, queries=queries)
        validate("closed form, second pass", second, fit_rows)
        choice = chooser(second, found)
        for fitted in found:
            if fitted.depth in starts:
                for ridge in ridges:
                    choice.offer(fitted, ("refit", ridge), partial(second.solve, fitted.depth, ridge))
                second.drop(fitted.depth)
        choice.measure()

    for number, group in enumerate(groups, 1):
        found = first_pass(number, group)
        if refit:
            second_pass(found)
        while found:  # what was taken is not held here through the next pass
            yield found.pop(0)


class _Chooser:
    """Measures options on held-out rows, many at a time over one full pass each, and keeps the best of each objective.

    Args:
        room: bytes that options which wait for their measurement may take; the next one is made where it fits, and
            after a measurement where it does not.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: Shape,
        boundary: int,
        rows: DataLoader,
        validate: Validate,
        room: Callable[[], int],
    ):
        self.decoder, self.shape, self.boundary = decoder, shape, boundary
        self.rows, self.validate, self.room = rows, validate, room
        self.waiting: list[tuple[FittedDepth, Option, KVProjections]] = []

    def offer(self, fitted: FittedDepth, option: Option, make: Callable[[], KVProjections]) -> None:
        held = sum(each.nbytes for *_, each in self.waiting)
        if held + self.shape.map_bytes * (self.shape.layers - fitted.depth) > self.room():
            self.measure()
        self.waiting.append((fitted, option, make()))

    def measure(self) -> None:
        if not self.waiting:
            return
        named = {f"{fitted.depth} {option}": (fitted, option, each) for fitted, option, each in self.waiting}
        plans = {name: PruningPlan(fitted.depth, self.boundary) for name, (fitted, *_) in named.items()}
        evaluation = Evaluation(self.decoder, {name: Variant(plans[name], each) for name, (*_, each) in named.items()})
        depths = ", ".join(dict.fromkeys(str(fitted.depth) for fitted, *_ in self.waiting))
        self.validate(f"choosing among {len(named)} closed forms at depth {depths}", evaluation, self.rows)
        for name, (fitted, option, each) in named.items():
            fitted.keep(option, each, evaluation.rows(name)["kl"].double().mean().item())
        self.waiting = []


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


class Distillation:
    """One training from ``start``, which is left as it is: of low-rank adapters, or of all of W', b'.

    Args:
        lora_arguments: of :func:`pop_lightning.fitting.lora.inject`; None trains everything (kind ``full``).
        seed: of the adapters' first values and dropout.
        training: arguments of :class:`KVProjectionTraining`.

    Attributes:
        module: to be fitted by a ``Trainer``; None at depth L-1, which is lossless: there is nothing to train.
    """

    def __init__(
        self,
        start: KVProjections,
        plan: PruningPlan,
        *,
        lora_arguments: Mapping[str, Any] | None = None,
        seed: int = 0,
        **training,
    ):
        self.kind = "full" if lora_arguments is None else "lora"
        self._projections = KVProjections.from_state(start.decoder, start.depth, start.kind, start.fitted_state())
        self._adapters, self.module = None, None
        if not len(start.fitted_layers):
            return
        if lora_arguments is None:
            make_trainable(self._projections)
        else:
            torch.manual_seed(seed)
            self._adapters = lora.inject(self._projections, **lora_arguments)
        self.module = KVProjectionTraining(self._projections, plan, seed=seed, **training)

    def finish(self, adapters: Path | None = None) -> KVProjections:
        """The trained projections as an artifact will hold them: adapters merged, in the base's dtype.

        Args:
            adapters: a folder that the adapters are written to first, in peft's format.
        """
        if self.module is None:
            return self._projections.replace({}, self.kind)
        trained = self._projections
        if self._adapters is not None:
            if adapters is not None:
                self._adapters.save_pretrained(str(adapters))
            trained = lora.merge(self._adapters)
        return KVProjections.from_state(trained.decoder, trained.depth, self.kind, trained.fitted_state())
