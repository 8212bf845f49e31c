"""Kind ``closed_form``: regressions whose objective and ridge are chosen on held-out rows.

:func:`closed_form` is for notebooks; the pipeline and the study call :func:`fit_depths`, which plans the passes, with
their own rows.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.data.module import CalibrationData
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.fitting.kinds import Fitted, Kind, Validate
from pop_lightning.fitting.regressions import (
    ClosedFormFit,
    Shape,
    ValueRefit,
    bytes_needed,
    nothing_fitted,
    objectives,
    passes,
)
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import as_decoder
from pop_lightning.pruning.projections import KVProjections

RIDGES = (0.0001, 0.001, 0.01, 0.1, 1.0)
Option = tuple[str, float | None]  # objective and ridge; ("reuse", None) fits nothing


@dataclass
class FittedDepth:
    """The fitted options of one depth: the best of each objective, and every option's KL on the tuning rows."""

    depth: int
    options: dict[Option, KVProjections]
    kl: dict[Option, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(projections.nbytes for projections in self.options.values())

    def add(self, option: Option, projections: KVProjections, kl: float) -> None:
        """Record the KL of an option, and keep its projections if it is the best of its objective so far."""
        self.kl[option] = kl
        if self.best(option[0]) == option:
            self.options = {other: kept for other, kept in self.options.items() if other[0] != option[0]}
            self.options[option] = projections

    def fits(self, objective: str) -> bool:
        """Whether some option has that objective."""
        return any(name == objective for name, _ in self.kl)

    def best(self, *objectives: str) -> Option:
        """The option with the smallest held-out KL, of the given objectives only if there are any."""
        return min((o for o in self.kl if not objectives or o[0] in objectives), key=self.kl.__getitem__)

    def summary(self) -> dict[str, Any]:
        """The chosen option and the KL of every option, as JSON."""
        objective, ridge = self.best()
        kl = {name if strength is None else f"{name} {strength:g}": loss for (name, strength), loss in self.kl.items()}
        return {"objective": objective, "ridge": ridge, "kl": kl}


class ClosedForm(Kind):
    chosen = ("objective", "ridge")

    def passes(self, decoder: Decoder, depths: Sequence[int], settings: Any) -> list[list[int]]:
        return passes(Shape.of(decoder), depths, settings.grouping, settings.memory_bytes)[1]

    def fit(self, decoder: Decoder, depths: Sequence[int], settings: Any, **rows) -> Iterator[Fitted]:
        for fitted in fit_depths(
            decoder,
            depths,
            ridges=settings.ridge,
            grouping=settings.grouping,
            queries=settings.queries,
            refit=settings.refit,
            memory=settings.memory_bytes,
            **rows,
        ):
            yield Fitted(fitted.depth, fitted.options[fitted.best()], fitted.summary())
            del fitted  # frees its memory before the next pass


KIND = ClosedForm("closed_form")


def closed_form(
    model: str | Path | PreTrainedModel | Decoder,
    depths: Sequence[int],
    data: CalibrationData,
    *,
    boundary: int = 1,
    ridges: Sequence[float] = RIDGES,
    trainer: Callable[..., lightning.Trainer] = lightning.Trainer,
    **options,
) -> dict[int, KVProjections]:
    """The best closed form of every depth: fitted on the ``fit`` split and chosen on ``tune``, with reuse as an option.

    Args:
        model: the base: a hub id or folder, a Transformers model, or a decoder.
        trainer: makes the trainers of the passes from Lightning's arguments, such as ``logger``.
        options: of :func:`fit_depths`, such as ``memory`` and ``grouping``.

    Raises:
        InputError: no depth is given, or the model cannot be pruned at one.
    """
    decoder = as_decoder(model)
    if not depths:
        raise InputError("closed_form needs at least one depth to prune at.")
    for depth in depths:
        PruningPlan(depth, boundary).check(decoder.num_layers)

    def validate(title: str, module: lightning.LightningModule, rows: DataLoader) -> None:
        trainer(logger=False, enable_checkpointing=False, enable_model_summary=False).validate(
            module, rows, verbose=False
        )

    data.setup()
    fitted = fit_depths(
        decoder,
        depths,
        boundary=boundary,
        ridges=ridges,
        fit_rows=data.loader("fit"),
        tune_rows=data.loader("tune"),
        validate=validate,
        **options,
    )
    return {at.depth: at.options[at.best()] for at in fitted}


def fit_depths(
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
    refit: bool = True,
    memory: int = 8 * 2**30,
) -> Iterator[FittedDepth]:
    """Fit all depths, in as few passes over ``fit_rows`` as ``memory`` bytes of running sums and options allow.

    Reuse is always an option, so the best option is never worse than reuse on the tuning rows.

    Args:
        grouping: of :class:`ClosedFormFit`; ``auto`` is the finest that needs a single pass.
        refit: also fit the best ``attention`` option of each depth again in a second pass (:class:`ValueRefit`).
        validate: runs a module over rows, as ``Trainer.validate`` does; its first argument is a title for progress.

    Raises:
        InputError: one depth does not fit in ``memory``.
    """
    shape = Shape.of(decoder)
    grouping, groups = passes(shape, depths, grouping, memory)

    def selection(regressions: ClosedFormFit | ValueRefit, fitted: list[FittedDepth]) -> _Selection:
        def room() -> int:
            return memory - regressions.nbytes - sum(at.nbytes for at in fitted)

        return _Selection(decoder, shape, boundary, tune_rows, validate, room)

    def first_pass(number: int, group: list[int]) -> list[FittedDepth]:
        fit = ClosedFormFit(decoder, group, boundary, grouping=grouping, queries=queries)
        needed = sum(bytes_needed(shape, depth, grouping) for depth in group)
        title = f"closed form, pass {number} of {len(groups)}: depths {', '.join(map(str, group))}, grouping {grouping}"
        validate(f"{title}, {needed / 2**20:.0f} MiB of running sums", fit, fit_rows)
        fitted = [FittedDepth(depth, {}) for depth in group]
        options = selection(fit, fitted)
        for at in fitted:
            options.add(at, ("reuse", None), partial(nothing_fitted, decoder, at.depth))
            if at.depth < decoder.num_layers - 1:
                for name, ridge in itertools.product(objectives(grouping), ridges):
                    options.add(at, (name, ridge), partial(fit.solve, at.depth, ridge, name))
            fit.drop(at.depth)
        options.measure()
        return fitted

    def second_pass(fitted: list[FittedDepth]) -> None:
        starts = {at.depth: at.options[at.best("attention")] for at in fitted if at.fits("attention")}
        if not starts:
            return
        second = ValueRefit(starts, boundary, grouping=grouping, queries=queries)
        validate("closed form, second pass", second, fit_rows)
        options = selection(second, fitted)
        for at in fitted:
            if at.depth in starts:
                for ridge in ridges:
                    options.add(at, ("refit", ridge), partial(second.solve, at.depth, ridge))
                second.drop(at.depth)
        options.measure()

    for number, group in enumerate(groups, 1):
        fitted = first_pass(number, group)
        if refit:
            second_pass(fitted)
        while fitted:  # popped, so that no reference here keeps them in memory during the next pass
            yield fitted.pop(0)


class _Selection:
    """Measures options on held-out rows, many per pass, and keeps the best of each objective.

    Args:
        room: bytes available to options that wait to be measured; those waiting are measured before one that exceeds it
            is made.
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

    def add(self, fitted: FittedDepth, option: Option, make: Callable[[], KVProjections]) -> None:
        held = sum(projections.nbytes for *_, projections in self.waiting)
        if held + self.shape.map_bytes * (self.shape.layers - fitted.depth) > self.room():
            self.measure()
        self.waiting.append((fitted, option, make()))

    def measure(self) -> None:
        if not self.waiting:
            return
        variants = {
            f"{fitted.depth} {option}": Variant(PruningPlan(fitted.depth, self.boundary), projections)
            for fitted, option, projections in self.waiting
        }
        evaluation = Evaluation(self.decoder, variants)
        depths = ", ".join(dict.fromkeys(str(fitted.depth) for fitted, *_ in self.waiting))
        self.validate(f"choosing among {len(variants)} closed forms at depth {depths}", evaluation, self.rows)
        for name, (fitted, option, projections) in zip(variants, self.waiting, strict=True):
            fitted.add(option, projections, evaluation.rows(name)["kl"].double().mean().item())
        self.waiting = []
