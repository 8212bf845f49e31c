"""Teacher-forced evaluation of many pruned variants of one model at the cost of one full pass and a small part each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import lightning
import torch
from torch import Tensor

from pop_lightning.core.plan import Choice, PruningPlan
from pop_lightning.data.module import real_rows
from pop_lightning.evaluation.metrics import ROW_METRICS, RowMetrics, response_metrics
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.passes import student_logits, teacher_pass
from pop_lightning.pruning.projections import KVProjections


@dataclass(frozen=True)
class Variant:
    """One way to prune: a plan with projections, or one of the report's ablations.

    Attributes:
        context_visible: False is "no KV projection": the pruned layers see no context.
        remove_layers: True drops the pruned layers in both stages, as older pruning does.
    """

    plan: PruningPlan
    projections: KVProjections
    context_visible: bool = True
    remove_layers: bool = False


def groups(decoder: Decoder, choices: Sequence[Choice], memory: int) -> Iterator[list[Choice]]:
    """``choices`` in order, as many at a time as ``memory`` bytes hold the projections of: one pass over rows each."""
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


class Evaluation(lightning.LightningModule):
    """Measure variants over a loader with ``Trainer.validate``; then :meth:`rows` holds every row's metrics.

    Args:
        variants: by a name of the caller's choice.
    """

    def __init__(self, decoder: Decoder, variants: Mapping[str, Variant]):
        super().__init__()
        self.decoder, self.variants = decoder, dict(variants)
        self._names = list(self.variants)
        self.meters = torch.nn.ModuleList(RowMetrics(ROW_METRICS) for _ in self._names)

    def on_validation_start(self) -> None:
        for meter in self.meters:
            meter.reset()

    def validation_step(self, batch: dict, batch_index: int) -> None:
        mask, prompt = batch["attention_mask"], batch["prompt_length"]
        first = min(variant.plan.depth for variant in self.variants.values())
        trace, teacher = teacher_pass(self.decoder, batch, first)
        rows = slice(real_rows(batch))
        targets, real = batch["input_ids"][rows, prompt:], mask[rows, prompt:]
        seeds = batch["row_seed"][rows], batch["prompt_seed"][rows]
        for variant, meter in zip(self.variants.values(), self.meters, strict=True):
            logits = self._logits(variant, trace, mask, prompt)
            meter.update(response_metrics(logits[rows], teacher[rows], targets, real), *seeds)

    def on_validation_epoch_end(self) -> None:
        for meter in self.meters:
            meter.compute()  # gathers the processes' rows while their tensors lie where the process group reaches them

    def _logits(self, variant: Variant, trace, mask: Tensor, prompt: int) -> Tensor:
        if variant.remove_layers:
            return self.decoder.logits(trace.hidden[variant.plan.depth][:, prompt - 1 : -1])
        return student_logits(
            variant.projections, variant.plan, trace, mask, prompt, context_visible=variant.context_visible
        )

    def rows(self, name: str) -> dict[str, Tensor]:
        """Per-row metrics of one variant and each row's ``prompt``, ``[rows]`` each (:meth:`RowMetrics.compute`)."""
        return self.meters[self._names.index(name)].compute()
