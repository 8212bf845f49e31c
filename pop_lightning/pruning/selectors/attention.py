"""Selects what the prompt's last token attends to in the pruned layers, over the projected keys of the context."""

from torch import Tensor

from pop_lightning.pruning.selectors.base import Seen


class AttentionSelector:
    """The default: the largest attention weight over layers and heads.

    The largest weight is better than the mean, because one head that looks a fact up is enough; and one probing token
    is better than several, because only the last one has read the whole question.
    """

    fitted = False

    def score(self, seen: Seen) -> Tensor:
        return seen.attention


SELECTOR = AttentionSelector()
