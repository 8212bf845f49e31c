"""POP Lightning: Prefill-Only Pruning (arXiv 2602.03295) for Hugging Face decoders.

Data flows one way: base model and calibration data, score, fit projections, pick a depth, export, generate, evaluate.
The names below are what a notebook needs; each is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pop_lightning.callbacks import AccuracyBudget, ExportArtifact
    from pop_lightning.core.errors import InputError
    from pop_lightning.core.plan import PruningPlan
    from pop_lightning.data.module import CalibrationData
    from pop_lightning.evaluation.evaluate import Evaluation
    from pop_lightning.fitting.closed_form import closed_form
    from pop_lightning.fitting.importance import ImportanceScoring
    from pop_lightning.fitting.training import KVProjectionTraining
    from pop_lightning.generation.generator import StageAwareGenerator
    from pop_lightning.pruning.projections import KVProjections

_HOMES = {
    "AccuracyBudget": "callbacks",
    "CalibrationData": "data.module",
    "Evaluation": "evaluation.evaluate",
    "ExportArtifact": "callbacks",
    "ImportanceScoring": "fitting.importance",
    "InputError": "core.errors",
    "KVProjectionTraining": "fitting.training",
    "KVProjections": "pruning.projections",
    "PruningPlan": "core.plan",
    "StageAwareGenerator": "generation.generator",
    "closed_form": "fitting.closed_form",
}

__all__ = [
    "AccuracyBudget",
    "CalibrationData",
    "Evaluation",
    "ExportArtifact",
    "ImportanceScoring",
    "InputError",
    "KVProjectionTraining",
    "KVProjections",
    "PruningPlan",
    "StageAwareGenerator",
    "__version__",
    "closed_form",
]


def __getattr__(name: str):
    # On first use: the command line answers Ctrl-C and bad flags before the seconds that torch takes to load.
    if name == "__version__":
        from importlib.metadata import version

        return version("pop-lightning")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
