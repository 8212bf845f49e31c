"""The closed form of selector ``learned``: what a context token's true keys and values would gain.

The target of token t is the first-order change of the pruned model's KL if its projected keys and values were the full
model's: ``g_t = sum_l |dKL/d[k|v]_lt . ([k|v]_lt - W' n_t)|``. It joins what the response reads, the error that
projecting leaves, and whether that error matters. A ridge regression fits it in units of its row's largest, so that
every row counts alike.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.data.batches import real_rows
from pop_lightning.fitting.training import chunked_kl
from pop_lightning.models.decoder import Decoder, Trace
from pop_lightning.pruning.module import DecoderModule, outside_inference, resting
from pop_lightning.pruning.passes import probe, student_hidden, teacher_trace
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.pruning.salient import check_salient
from pop_lightning.pruning.selectors.learned import features

RIDGE = 1e-3  # of each feature's own mean square


class SelectorFit(DecoderModule):
    """Collect the sums of the regressions in one ``validate`` pass over the ``fit`` rows; :meth:`solve` installs one.

    Args:
        projections: by depth.
        boundary: number of last prompt tokens that run in full.
    """

    split = "fit"

    def __init__(self, projections: Mapping[int, KVProjections], boundary: int = 1):
        super().__init__(next(iter(projections.values())).decoder)
        self.projections = dict(projections)
        self.plans = {depth: PruningPlan(depth, max(1, boundary), 1, "learned") for depth in projections}
        for plan in self.plans.values():
            check_salient(self.decoder, plan)
        self.sums: dict[int, Tensor] = {}  # by depth, the Gram matrix of features and target, float64

    def validation_step(self, batch: dict, batch_index: int) -> None:
        # Trainer.validate runs in inference mode by default, and autograd cannot save tensors from it.
        with torch.inference_mode(False), resting(self.decoder.model):
            batch = outside_inference(batch)
            mask, prompt, rows = batch["attention_mask"], batch["prompt_length"], slice(real_rows(batch))
            context = next(iter(self.plans.values())).context_of(prompt)
            if context <= 0:  # of the widest prompt of all processes, so all of them return
                return
            trace = teacher_trace(self.decoder, batch, min(self.plans))
            real = mask[:, :context].bool()
            if trace.selectable is not None:
                real = real & trace.selectable[:, :context]
            for depth in self.plans:
                each = self._regression(depth, trace, mask, prompt, real)[rows][real[rows]].double()
                gram = each.T @ each
                del each  # not held through the next depth's backward pass
                self.sums[depth] = gram.add_(self.sums[depth]) if depth in self.sums else gram

    def _regression(self, depth: int, trace: Trace, mask: Tensor, prompt: int, real: Tensor) -> Tensor:
        """Features and target of every context token, ``[batch, context, features + 1]``."""
        projections, plan = self.projections[depth], self.plans[depth]
        gain = gains(projections, plan, trace, mask, prompt) * real
        gain = gain / gain.amax(1, keepdim=True).clamp(min=1e-30)
        with torch.no_grad():
            inputs = features(probe(projections, plan, trace, mask, prompt).seen())
        return torch.cat([inputs, gain[..., None]], -1)

    def on_validation_epoch_end(self) -> None:
        for gram in self.sums.values():
            distributed.add_up(gram)

    def solve(self, depth: int) -> KVProjections:
        """The projections of a depth, with the fitted selector.

        Raises:
            InputError: no row has a context, or a sum is not finite.
        """
        if depth not in self.sums or not self.sums[depth].isfinite().all():
            raise InputError(
                f"the selector of depth {depth} cannot be fitted, its sums are empty or not finite: choose selector "
                "'attention'."
            )
        gram, cross = self.sums[depth][:-1, :-1], self.sums[depth][:-1, -1]
        ridge = RIDGE * gram.diagonal().clamp(min=1e-12)
        return self.projections[depth].use_selector(torch.linalg.solve(gram + ridge.diag(), cross))


class _Leaves:
    """Projections whose outputs are leaves of the graph, made once although checkpointing runs a layer twice."""

    def __init__(self, projections: KVProjections):
        self.decoder: Decoder = projections.decoder
        self.projections, self.made = projections, {}

    def __call__(self, layer: int, hidden: Tensor, normed: Tensor | None = None) -> Tensor:
        if layer not in self.made:
            self.made[layer] = self.projections(layer, hidden, normed).detach().requires_grad_()
        return self.made[layer]


def gains(projections: KVProjections, plan: PruningPlan, trace: Trace, mask: Tensor, prompt: int) -> Tensor:
    """g_t of every context token, ``[batch, context]``; a row's are in a unit of their own.

    Call it outside of inference mode, on a base that requires no gradient.

    Args:
        plan: whose salient tokens are left out.
        trace: of a full pass, with the layers ``plan.depth`` and up.
        mask: ``[batch, tokens]``.
        prompt: the padded prompts' width.
    """
    decoder, context = projections.decoder, plan.context_of(prompt)
    leaves, real = _Leaves(projections), mask[:, prompt:].bool()
    with torch.enable_grad():
        plain = PruningPlan(plan.depth, plan.boundary)
        student = student_hidden(leaves, plain, trace, mask, prompt, checkpoint=True)
        teacher = trace.hidden[decoder.num_layers][:, prompt - 1 : -1]
        chunked_kl(decoder, student[real], teacher[real], 1.0).backward()
    scores = torch.zeros(len(mask), context, device=mask.device)
    for layer, projected in leaves.made.items():
        first = context - projected.shape[1]  # a sliding layer projects what its window leaves
        true = decoder.own_kv(layer, trace.hidden[layer][:, first:context])
        change = projected.grad * (true - projected.detach())
        scores[:, first:] += change.float().sum(-1).abs().to(scores)
    return scores
