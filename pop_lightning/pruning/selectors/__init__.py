"""What chooses the salient context tokens: one file for each way.

A selector scores context tokens from tensors only, so that whoever runs a prefill can use it: Transformers' generate,
the teacher-forced passes, a serving engine.
"""

import importlib

from pop_lightning.pruning.selectors.base import Selector


def selector_named(name: str) -> Selector:
    """The selector with that name, one of ``SELECTORS``, which every plan was checked for."""
    return importlib.import_module(f"{__name__}.{name}").SELECTOR
