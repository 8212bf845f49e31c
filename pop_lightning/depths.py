"""Which depths are fitted and measured: between importance scoring and the search in the flow."""

from collections.abc import Sequence

import torch

from pop_lightning.decoder import Decoder
from pop_lightning.errors import InputError
from pop_lightning.flops import speedup
from pop_lightning.plan import PruningPlan
from pop_lightning.recipe import Budget


def candidates(budget: Budget, prefill_importance: Sequence[float], decoder: Decoder) -> list[int]:
    """Depths to measure, shallowest pruning first.

    A number picks depths at even steps of the logarithm of what is removed, the summed prefill importance of the
    layers above: where importance rises fast, candidates are dense.

    Args:
        prefill_importance: one value per layer.

    Raises:
        InputError: ``budget.candidates`` or ``budget.min_pruned`` does not fit this model.
    """
    wanted, layers, smallest = budget.candidates, decoder.num_layers, decoder.smallest_depth
    every = list(range(layers - 1, smallest - 1, -1))
    if wanted == "all":
        return every
    if isinstance(wanted, list):
        odd = [depth for depth in wanted if not 1 <= depth <= layers]
        if odd:
            raise InputError(f"budget.candidates must lie in {smallest}..{layers} for this model, found {odd[0]}.")
        if min(wanted) == layers:
            raise InputError(f"budget.candidates holds depth {layers} alone, which prunes nothing; name a smaller one.")
        try:
            decoder.check_depth(min(wanted))
        except InputError as error:
            raise InputError(f"budget.candidates holds depth {min(wanted)}: {error}") from error
        return sorted({depth for depth in wanted if depth < layers}, reverse=True)
    every = [depth for depth in every if layers - depth >= budget.min_pruned]
    if not every:
        raise InputError(
            f"budget.min_pruned {budget.min_pruned} leaves no depth of a model of {layers} layers whose smallest is "
            f"{smallest}."
        )
    if wanted >= len(every):
        return every
    removed = torch.tensor([sum(prefill_importance[depth:]) for depth in every], dtype=torch.float64)
    # Half of the step goes by depth, so that a jump of importance at one layer cannot swallow all candidates.
    level = removed.clamp(min=1e-30).log()
    level = (level - level[0]).clamp(min=0) / (level[-1] - level[0]).clamp(min=1e-12)
    level = level + torch.linspace(0, 1, len(every), dtype=torch.float64)
    chosen = {int((level - share * level[-1]).abs().argmin()) for share in torch.linspace(0, 1, wanted).tolist()}
    return [every[index] for index in sorted(chosen)]


def reaching(budget: Budget, decoder: Decoder, boundaries: Sequence[int], tokens: int) -> dict[int, int]:
    """By boundary k, the largest depth whose counted prefill speedup of ``tokens`` prompt tokens is what is wanted.

    All depths are looked at, or those that ``budget.candidates`` lists. A k at which no depth reaches it is left out.

    Raises:
        InputError: no depth reaches ``budget.speedup`` at any k; the sentence names the largest speedup there is.
    """
    layers = decoder.num_layers
    depths = range(layers - 1, decoder.smallest_depth - 1, -1)
    if isinstance(budget.candidates, list):
        depths = candidates(budget, [0.0] * layers, decoder)
    counted = {(k, depth): speedup(decoder, PruningPlan(depth, k), tokens) for k in boundaries for depth in depths}
    found = {}
    for (k, depth), ratio in counted.items():
        if ratio >= budget.speedup:
            found[k] = max(depth, found.get(k, 0))
    if not found:
        k, depth = max(counted, key=counted.__getitem__)
        raise InputError(
            f"budget.speedup {budget.speedup:g} is more than any depth reaches: the largest counted prefill speedup at "
            f"{tokens} prompt tokens (the rows' median) is {counted[k, depth]:.2f}, at depth {depth} and boundary {k}; "
            "lower budget.speedup or give longer prompts."
        )
    return found
