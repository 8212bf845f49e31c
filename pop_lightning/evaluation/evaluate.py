"""Teacher-forced evaluation of many pruned variants of one model: one full pass, plus a small part per variant."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import Choice, PruningPlan
from pop_lightning.data.batches import real_rows
from pop_lightning.evaluation.losses import BudgetMetric
from pop_lightning.evaluation.metrics import ROW_METRICS, SHOWN, RowMetrics, prompt_means, response_metrics, summary
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.module import DecoderModule
from pop_lightning.pruning.passes import hidden_without_layers, student_logits, teacher_pass
from pop_lightning.pruning.projections import KVProjections


@dataclass(frozen=True)
class Variant:
    """One way to prune: a plan with projections, or an ablation (``ablations.py``).

    Attributes:
        context_visible: False is "no KV projection": the pruned layers see no context.
        removed: layers that are left out in both stages, instead of what the plan prunes.
        skipped: layers that are left out for context tokens, instead of the plan's.
        steps: number of steps that the projections were trained for.

    Raises:
        InputError: plan and projections have different depths.
    """

    plan: PruningPlan
    projections: KVProjections
    context_visible: bool = True
    removed: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    steps: int = 0

    @property
    def is_ablation(self) -> bool:
        """Whether the variant is measured only for comparison and cannot be exported."""
        return bool(self.removed or self.skipped) or not self.context_visible

    @property
    def first(self) -> int:
        """The first layer that some token does not run through, from which a pass is rerun."""
        return min(self.removed + self.skipped, default=self.plan.depth)

    def __post_init__(self):
        # At depth L nothing is pruned, so the depth of the projections does not matter.
        if self.plan.depth not in (self.projections.depth, self.projections.decoder.num_layers):
            raise InputError(
                f"the plan prunes at depth {self.plan.depth}, but its projections were made for depth "
                f"{self.projections.depth}: give projections for the plan's depth."
            )


def groups(decoder: Decoder, choices: Sequence[Choice], memory: int) -> Iterator[list[Choice]]:
    """``choices`` in order, in groups whose projections fit in ``memory`` bytes: one pass over the rows per group."""
    group, room = [], memory
    layer = 2 * decoder.kv_dim * decoder.config.hidden_size * decoder.model.dtype.itemsize
    for choice in choices:
        needed = layer * (decoder.num_layers - choice.depth)
        if group and needed > room:
            yield group
            group, room = [], memory
        group.append(choice)
        room -= needed
    if group:
        yield group


class Evaluation(DecoderModule):
    """Measure variants with ``Trainer.validate`` (the search split) or ``Trainer.test`` (the verify split).

    Afterwards :meth:`rows` holds every row's metrics. The means over prompts are logged as ``kl/NAME``,
    ``agreement/NAME``, ``nll_increase/NAME`` and ``exact_match/NAME``. Plans and kinds are among the hyperparameters,
    as ``measured``; checkpoints hold no projections, so ``load_from_checkpoint`` needs ``variants=`` again.

    Args:
        model: the base: a hub id or folder, a Transformers model, or a decoder.
        variants: by a name of the caller's choice; or projections by their depth, which becomes the name.
        boundary: of the plans, where projections are given by depth.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | Decoder,
        variants: Mapping[str, Variant] | Mapping[int, KVProjections],
        boundary: int = 1,
    ):
        model = str(model) if isinstance(model, Path) else model  # a name, which checkpoints can hold
        super().__init__(model)
        self.variants = {
            str(name): given if isinstance(given, Variant) else Variant(PruningPlan(int(name), boundary), given)
            for name, given in variants.items()
        }
        if not self.variants:
            raise InputError("an evaluation needs at least one variant, or the projections of at least one depth.")
        self.save_hyperparameters("boundary", *["model"] * isinstance(model, str))
        measured = {name: asdict(each.plan) | {"kind": each.projections.kind} for name, each in self.variants.items()}
        self.save_hyperparameters({"measured": measured})
        self._names = list(self.variants)
        self.meters = torch.nn.ModuleList(RowMetrics(ROW_METRICS) for _ in self._names)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for variant in self.variants.values():
            variant.projections.place()

    def on_validation_start(self) -> None:
        self.refuse_repeated_rows()
        for meter in self.meters:
            meter.reset()

    on_test_start = on_validation_start

    def validation_step(self, batch: dict, batch_index: int) -> None:
        mask, prompt = batch["attention_mask"], batch["prompt_length"]
        first = min(variant.first for variant in self.variants.values())
        trace, teacher = teacher_pass(self.decoder, batch, first)
        rows = slice(real_rows(batch))
        targets, real = batch["input_ids"][rows, prompt:], mask[rows, prompt:]
        seeds = batch["row_seed"][rows], batch["prompt_seed"][rows]
        for variant, meter in zip(self.variants.values(), self.meters, strict=True):
            logits = self._logits(variant, trace, mask, prompt)
            meter.update(response_metrics(logits[rows], teacher[rows], targets, real), *seeds)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        for name in self._names:
            rows = self.rows(name)  # gathered now, while the tensors are on a device that the process group can use
            for metric in SHOWN:
                mean = prompt_means(rows[metric], rows["prompt"]).mean().float()
                self.log(f"{metric}/{name}", mean, sync_dist=True)

    on_test_epoch_end = on_validation_epoch_end

    def _logits(self, variant: Variant, trace, mask: Tensor, prompt: int) -> Tensor:
        if variant.removed or variant.skipped:
            left_out = {"removed": variant.removed, "skipped": variant.skipped}
            return self.decoder.logits(
                hidden_without_layers(self.decoder, variant.plan, trace, mask, prompt, **left_out)
            )
        return student_logits(
            variant.projections, variant.plan, trace, mask, prompt, context_visible=variant.context_visible
        )

    def rows(self, name: str) -> dict[str, Tensor]:
        """Per-row metrics of one variant and each row's ``prompt``, ``[rows]`` each (:meth:`RowMetrics.compute`)."""
        # torchmetrics turns the tensor of a single row into a scalar.
        return {key: values.reshape(-1) for key, values in self.meters[self._names.index(name)].compute().items()}

    def entries(
        self, metric: str | BudgetMetric, confidence: float, prompts: int | None = None
    ) -> dict[str, dict[str, Any]]:
        """The results of the last pass by variant: plan, projections and :func:`~.metrics.summary`, as plain data.

        Args:
            prompts: number of prompts in the verify split, for the expected bound; as many as here unless given.
        """

        entries = {}
        for name, variant in self.variants.items():
            rows, plan = self.rows(name), variant.plan
            entry = {"depth": plan.depth, "projection": variant.projections.kind} | plan.kept.to_dict()
            if variant.steps:
                entry["steps"] = variant.steps
            entries[name] = entry | summary(rows, metric, confidence, prompts or len(rows["prompt"].unique()))
        return entries
