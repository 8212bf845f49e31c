"""What selectors are given and what they give: scores of context tokens, of which the highest are chosen."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What is known of the context when salient tokens are chosen.

    The attention is what the probing tokens (the prompt's last ones) pay over projected keys, in the pruned layers that
    see the whole context.

    Attributes:
        hidden: h_d, ``[batch, context, hidden]``.
        attention: the largest weight that any head gives each context token, ``[batch, context]``.
        heads: the weight of each head, ``[batch, layers * heads, context]``, for fitted selectors.
        normed: n(h_d), for fitted selectors.
        back: how far each token is from the end of the prompt, ``[context]``; 1 is its last token.
        lengths: tokens of each row, padding left out, ``[batch]``.
        weight: of a fitted selector, ``[features]``.
    """

    hidden: Tensor
    attention: Tensor
    heads: Tensor | None = None
    normed: Tensor | None = None
    back: Tensor | None = None
    lengths: Tensor | None = None
    weight: Tensor | None = None


class Selector(Protocol):
    """Scores context tokens; the highest run in full.

    Attributes:
        fitted: whether it has a weight, and reads every field of :class:`Seen`.
    """

    fitted: bool

    def score(self, seen: Seen) -> Tensor:
        """``[batch, context]``, higher for tokens that matter more; what it says of padding is ignored."""


def choose(scores: Tensor, allowed: Tensor, count: Tensor) -> Tensor:
    """The context tokens with the highest scores, in the order of the prompt.

    Args:
        scores, allowed: ``[batch, context]``; tokens that are not allowed (padding) are never chosen.
        count: how many each row selects, ``[batch]``.

    Returns:
        Columns ``[batch, largest count]``. A row with fewer tokens to choose repeats its first one, which then runs
        twice and changes nothing.
    """
    count = count.minimum(allowed.sum(-1))
    ranked = scores.float().masked_fill(~allowed, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    taken = ranked[:, : int(count.max())]
    own = torch.arange(taken.shape[1], device=scores.device) < count[:, None]
    return torch.where(own, taken, taken[:, :1]).sort(-1).values
