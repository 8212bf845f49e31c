"""Kind ``closed_form``: regressions with everything about them chosen on held-out rows.

:func:`closed_form` is the one call for a notebook; the pipeline and the study go through :func:`fit_depths`, which
decides what is fitted in which pass and leaves to them where rows come from and what becomes of the result.
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
            del fitted  # not held through the next pass


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
    """

    def validate(what: str, module: lightning.LightningModule, rows: DataLoader) -> None:
        trainer(logger=False, enable_checkpointing=False, enable_model_summary=False).validate(
            module, rows, verbose=False
        )

    data.setup()
    fitted = fit_depths(
        as_decoder(model),
        depths,
        boundary=boundary,
        ridges=ridges,
        fit_rows=data.loader("fit"),
        tune_rows=data.loader("tune"),
        validate=validate,
        **options,
    )
    return {each.depth: each.options[each.best()] for each in fitted}


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

    Reuse is always one of the options, so the best of them is never worse than reuse on the tuning rows.

    Args:
        grouping: of :class:`ClosedFormFit`; ``auto`` takes the finest that needs one pass.
        refit: give the best ``attention`` option of each depth a second pass (:class:`ValueRefit`).
        validate: runs a module over rows, as ``Trainer.validate`` does; the text says what for.

    Raises:
        InputError: one depth does not fit in ``memory``.
    """
    shape = Shape.of(decoder)
    grouping, groups = passes(shape, depths, grouping, memory)

    def chooser(regressions: ClosedFormFit | ValueRefit, found: list[FittedDepth]) -> _Chooser:
        def room() -> int:
            return memory - regressions.nbytes - sum(each.nbytes for each in found)

        return _Chooser(decoder, shape, boundary, tune_rows, validate, room)

    def first_pass(number: int, group: list[int]) -> list[FittedDepth]:
        fit = ClosedFormFit(decoder, group, boundary, grouping=grouping, queries=queries)
        needed = sum(bytes_needed(shape, depth, grouping) for depth in group)
        what = f"closed form, pass {number} of {len(groups)}: depths {', '.join(map(str, group))}, grouping {grouping}"
        validate(f"{what}, {needed / 2**20:.0f} MiB of running sums", fit, fit_rows)
        found = [FittedDepth(depth, {}) for depth in group]
        choice = chooser(fit, found)
        for fitted in found:
            depth = fitted.depth
            choice.offer(fitted, ("reuse", None), partial(nothing_fitted, decoder, depth))
            if depth < decoder.num_layers - 1:
                for name, ridge in itertools.product(objectives(grouping), ridges):
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
