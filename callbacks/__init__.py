"""Lightning callbacks that choose a depth within a budget and export its artifact."""

from pop_lightning.callbacks.accuracy_budget import AccuracyBudget
from pop_lightning.callbacks.export_artifact import ExportArtifact

__all__ = ["AccuracyBudget", "ExportArtifact"]
