"""What chooses the salient context tokens: one file for each way, and this registry.

A selector scores context tokens from tensors alone, so that whoever runs a prefill can use it: Transformers' generate,
the teacher-forced passes, a serving engine.
"""

from pop_lightning.core.errors import InputError
from pop_lightning.core.kinds import SELECTORS
from pop_lightning.pruning.selectors.attention import AttentionSelector
from pop_lightning.pruning.selectors.base import Selector
from pop_lightning.pruning.selectors.recency import RecencySelector

_SELECTORS: dict[str, type[Selector]] = {"attention": AttentionSelector, "recency": RecencySelector}


def selector_named(name: str) -> Selector:
    """The selector that a plan names.

    Raises:
        InputError: there is none of that name.
    """
    if name not in _SELECTORS:
        raise InputError(f"unknown selector: {name!r}; expected one of {', '.join(SELECTORS)}.")
    return _SELECTORS[name]()
