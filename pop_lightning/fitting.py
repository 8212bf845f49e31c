"""From rows to projections: closed form with everything about it chosen on held-out rows, and training from there.

The pipeline and the study both fit through this file; it decides what is fitted in which pass, they decide where rows
come from and what becomes of the result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader

from pop_lightning import lora
from pop_lightning.closed_form import DEFAULT, ClosedFormFit, Shape, ValueRefit, bytes_needed, choose_grouping, passes
from pop_lightning.decoder import Decoder
from pop_lightning.evaluate import Evaluation, Variant
from pop_lightning.plan import PruningPlan
from pop_lightning.projection_training import KVProjectionTraining, make_trainable
from pop_lightning.projections import KVProjections

Validate = Callable[[str, lightning.LightningModule, DataLoader], Any]
Option = tuple[str, float | None]  # objective and ridge; ("reuse", None) fits nothing


@dataclass(eq=False)
class FittedDepth:
    """What was fitted for one depth, and the KL to the full model that each option left on the tuning rows.

    ``options`` ends with the best of each objective, ``kl`` with every option that was tried.
    """

    depth: int
    options: dict[Option, KVProjections] = field(default_factory=dict)
    kl: dict[Option, float] = field(default_factory=dict)

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
    """Fit all depths, in as few passes over ``fit_rows`` as ``memory`` bytes of running sums allow.

    Reuse is always one of the options, so the best of them is never worse than reuse on the tuning rows.

    Args:
        grouping: of :class:`~pop_lightning.closed_form.ClosedFormFit`; ``auto`` takes the finest that needs one pass.
        objectives: to be tried, of :data:`~pop_lightning.closed_form.OBJECTIVES`.
        refit: give the best ``attention`` option of each depth a second pass (:class:`ValueRefit`).
        validate: runs a module over rows, as ``Trainer.validate`` does; the text says what for.

    Memory: ``memory`` bytes of running sums, and as much again of fitted maps that are compared.

    Raises:
        InputError: one depth's sums do not fit in ``memory``.
    """
    shape, depths = Shape.of(decoder), list(depths)
    if grouping == "auto":
        grouping = choose_grouping(shape, depths, memory, objectives)
    for number, group in enumerate(groups := passes(shape, depths, grouping, memory, objectives), 1):
        needed = sum(bytes_needed(shape, depth, grouping, objectives) for depth in group)
        what = f"closed form, pass {number} of {len(groups)}: depths {', '.join(map(str, group))}, grouping {grouping}"
        fit = ClosedFormFit(decoder, group, boundary, grouping=grouping, queries=queries, objectives=objectives)
        validate(f"{what}, {needed / 2**20:.0f} MiB of running sums", fit, fit_rows)
        fitted = [FittedDepth(depth) for depth in group]
        choices = [(objective, ridge) for objective in fit.objectives for ridge in ridges]
        for some in _affordable(shape, fitted, len(choices) + 1, memory):
            for each in some:
                each.options["reuse", None] = KVProjections(decoder, each.depth).replace({}, "closed_form")
                if each.depth < decoder.num_layers - 1:
                    each.options |= {(o, ridge): fit.solve(each.depth, ridge, o) for o, ridge in choices}
            _measure(decoder, some, boundary, tune_rows, validate)
        weighted = "attention" in fit.objectives
        del fit  # its sums make room for those of the second pass
        again = [each for each in fitted if each.depth < decoder.num_layers - 1]
        if refit and weighted and again:
            best = {each.depth: each.options[each.best("attention")] for each in again}
            second = ValueRefit(best, boundary, grouping=grouping, queries=queries)
            validate("closed form, second pass", second, fit_rows)
            for some in _affordable(shape, again, len(ridges), memory):
                for each in some:
                    each.options |= {("refit", ridge): second.solve(each.depth, ridge) for ridge in ridges}
                _measure(decoder, some, boundary, tune_rows, validate)
        yield from fitted


def _affordable(shape: Shape, fitted: list[FittedDepth], options: int, memory: int) -> Iterator[list[FittedDepth]]:
    """Depths whose options, float32, fit into ``memory`` bytes together; one depth at least."""
    some, taken = [], 0
    for each in fitted:
        needed = 4 * options * (shape.layers - each.depth) * 2 * shape.kv_dim * (shape.hidden + 1)
        if some and taken + needed > memory:
            yield some
            some, taken = [], 0
        some.append(each)
        taken += needed
    if some:
        yield some


def _measure(decoder: Decoder, fitted: list[FittedDepth], boundary: int, rows: DataLoader, validate: Validate) -> None:
    """Fill in every ``kl`` that is missing, all depths in one pass; of each objective the best option alone is kept."""
    variants = {
        (each, option): Variant(PruningPlan(each.depth, boundary), projections)
        for each in fitted
        for option, projections in each.options.items()
        if option not in each.kl
    }
    evaluation = Evaluation(
        decoder, {f"{each.depth} {option}": variant for (each, option), variant in variants.items()}
    )
    depths = ", ".join(str(each.depth) for each in fitted)
    validate(f"choosing among {len(variants)} closed forms at depths {depths}", evaluation, rows)
    for each, option in variants:
        each.kl[option] = evaluation.rows(f"{each.depth} {option}")["kl"].double().mean().item()
    for each in fitted:
        kept = {each.best(objective) for objective, _ in each.kl}
        each.options = {option: projections for option, projections in each.options.items() if option in kept}


class Distillation:
    """One training from ``start``, which is left as it is: of low-rank adapters, or of all of W', b'.

    Args:
        lora_arguments: of :func:`pop_lightning.lora.inject`; None trains everything (kind ``full``).
        seed: of the adapters' first values.
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
        self.module = KVProjectionTraining(self._projections, plan, **training)

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
