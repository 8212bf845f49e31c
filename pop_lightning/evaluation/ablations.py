"""What a pruned model is compared with: the full model, parts of the method left out, and other layers left out.

The report of ``pop-fit`` compares :func:`comparison`; ``pop-generate ablate`` adds :func:`other_layers`, which makes it
Table 3 of arXiv 2602.03295 and a baseline, ShortGPT (arXiv 2403.03853).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pop_lightning.core.plan import PruningPlan
from pop_lightning.evaluation.evaluate import Variant

_SKIPPED = (
    "context tokens skip these layers instead; the boundary and the response run in full, and the keys and values of a "
    "skipped layer come from its own weights and what would have entered it"
)


class Compared(NamedTuple):
    """One row of a comparison."""

    what: str
    variant: Variant


# Where the keys and values of the context in pruned layers come from, by kind.
_FROM = {
    "reuse": "keys and values from the pruned layers' own weights",
    "closed_form": "projections fitted by ridge regression",
    "lora": "projections with trained corrections of low rank",
    "full": "trained projections",
}


def comparison(fitted: Mapping[str, Variant], best: Variant) -> dict[str, Compared]:
    """One plan with all kinds of projections, and with parts of the method left out.

    Args:
        fitted: by kind of projections, with ``reuse``.
        best: one of them.
    """
    reuse, layers = fitted["reuse"], best.projections.decoder.num_layers
    pruned = tuple(best.plan.pruned(layers))
    return {
        "full model": Compared("no pruning", replace(reuse, plan=PruningPlan(layers))),
        **{
            f"POP, {name}": Compared(f"prefill pruned, {_FROM.get(name, f'projections {name}')}", each)
            for name, each in fitted.items()
        },
        "layers removed": Compared(
            "the same layers removed in both stages, as older pruning does", replace(reuse, removed=pruned)
        ),
        "no boundary handling": Compared(
            "the last prompt token is pruned like the context",
            replace(best, plan=replace(best.plan, boundary=0, salient=0)),
        ),
        "no KV projection": Compared("the pruned layers do not see the context", replace(reuse, context_visible=False)),
    }


def other_layers(reuse: Variant, influence: Sequence[float]) -> dict[str, Compared]:
    """As many other layers left out as the plan of ``reuse`` prunes.

    The keys and values of skipped layers are those of POP with reused projections.

    Args:
        influence: one value for each layer (:class:`~pop_lightning.fitting.influence.BlockInfluence`).
    """
    layers, plan = len(influence), reuse.plan
    count = len(plan.pruned(layers))
    least = tuple(sorted(sorted(range(layers), key=lambda layer: influence[layer])[:count]))
    spaced = evenly_spaced(layers, count)
    spacing = "every third layer" if layers // 3 == count else "evenly spaced layers"
    first = "first third" if layers // 3 == count else "first layers"
    return {
        "ShortGPT": Compared(
            "as many layers, those of least block influence on the fit rows, removed in both stages",
            replace(reuse, removed=least),
        ),
        first: Compared(_SKIPPED, replace(reuse, skipped=tuple(range(count)))),
        spacing: Compared(_SKIPPED, replace(reuse, skipped=spaced)),
    }


def evenly_spaced(layers: int, count: int) -> tuple[int, ...]:
    """``count`` of ``layers`` layers at even distances, the last one included: 2, 5, 8 and 11 for 4 of 12."""
    return tuple((place + 1) * layers // count - 1 for place in range(count))


def listed(layers: Sequence[int]) -> str:
    """``2, 5, 8``; three and more neighbors as in ``8 to 11``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
