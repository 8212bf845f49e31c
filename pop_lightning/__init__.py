"""POP Lightning: Prefill-Only Pruning (arXiv 2602.03295) for Hugging Face decoders.

Data flows one way: base model and calibration data, score, fit projections, pick a depth, export, generate, evaluate.
"""

from pop_lightning.errors import InputError
from pop_lightning.generator import StageAwareGenerator
from pop_lightning.plan import PruningPlan

__all__ = ["InputError", "PruningPlan", "StageAwareGenerator"]
