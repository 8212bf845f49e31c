"""POP Lightning: Prefill-Only Pruning (arXiv 2602.03295) for Hugging Face decoders.

Data flows one way: base model and calibration data, score, fit projections, pick a depth, export, generate, evaluate.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pop_lightning.core.errors import InputError
    from pop_lightning.core.plan import PruningPlan
    from pop_lightning.generation.generator import StageAwareGenerator

__all__ = ["InputError", "PruningPlan", "StageAwareGenerator"]

_HOMES = {"InputError": "core.errors", "PruningPlan": "core.plan", "StageAwareGenerator": "generation.generator"}


def __getattr__(name: str):
    # On first use: the command line answers Ctrl-C and bad flags before the seconds that torch takes to load.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
