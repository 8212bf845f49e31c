"""What selectors are given and what they give: scores of context tokens, of which the highest are chosen."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What is known of the context when salient tokens are chosen.

    Attributes:
        hidden: h_d, ``[batch, context, hidden]``.
        attention: the largest weight that the probing tokens (the prompt's last ones) give each context token in any
            pruned layer that sees the whole context, over projected keys, ``[batch, context]``.
    """

    hidden: Tensor
    attention: Tensor


class Selector(Protocol):
    """Scores context tokens; the highest run in full."""

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
