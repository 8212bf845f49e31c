"""Lightning callbacks: they measure and decide, the pipeline acts on what they decided."""

from pop_lightning.callbacks.accuracy_budget import AccuracyBudget
from pop_lightning.callbacks.export_artifact import ExportArtifact

__all__ = ["AccuracyBudget", "ExportArtifact"]
