"""Selects by a linear score that was fitted in closed form (``fitting/selectors.py``).

Its features join what a query-dependent and a query-free selector know: every head's attention from the last prompt
token, the token's normalized hidden state, and where the token is in the prompt.
"""

import torch
from torch import Tensor

from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.selectors.base import Seen

RANGES = (8, 32)  # tokens over which features of the position fall off


class LearnedSelector:
    """The product of :func:`features` and the fitted weight."""

    fitted = True

    def score(self, seen: Seen) -> Tensor:
        return features(seen) @ seen.weight.to(seen.hidden.device)


def features(seen: Seen) -> Tensor:
    """``[batch, context, features]``, float32: attention and its root, n(h_d), position, one."""
    heads, back = seen.heads.transpose(1, 2).float(), seen.back.float()
    share = back / seen.lengths[:, None]  # [batch, context]
    near = [1 / back, *(torch.exp(-back / tokens) for tokens in RANGES)]
    position = [share, share == 1, *(each.expand_as(share) for each in near), torch.ones_like(share)]
    position = torch.stack([each.float() for each in position], -1)
    return torch.cat([heads, heads.sqrt(), seen.normed.float(), position], -1)


def width(decoder: Decoder, layers: frozenset[int]) -> int:
    """The number of features where the attention of ``layers`` is watched."""
    heads = sum(decoder.parts[layer].heads for layer in layers)
    return 2 * heads + decoder.config.hidden_size + len(RANGES) + 4


SELECTOR = LearnedSelector()
