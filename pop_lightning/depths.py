"""Which depths are fitted and measured: between importance scoring and the search in the flow."""

from collections.abc import Sequence

import torch

from pop_lightning.decoder import Decoder
from pop_lightning.errors import InputError
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
            raise InputError(f"budget.candidates must lie in 1..{layers} for this model, found {odd[0]}.")
        if min(wanted) == layers:
            raise InputError(f"budget.candidates holds depth {layers} alone, which prunes nothing; name a smaller one.")
        decoder.check_depth(min(wanted))
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
