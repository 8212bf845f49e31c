"""ExportArtifact: writes the artifact once a verification has chosen a depth; nothing where none was chosen."""

from pathlib import Path

import lightning

from pop_lightning.artifact import write_artifact
from pop_lightning.callbacks.accuracy_budget import AccuracyBudget


class ExportArtifact(lightning.Callback):
    """Write ``folder`` at the end of the run in which ``budget`` chose a depth.

    Args:
        folder: of the artifact; written whole or not at all.
        budget: whose choice is exported.
        base: identity of the base model (:func:`pop_lightning.artifact.base_identity`).
        recipe: the resolved recipe.
        measured: a mutable dict of figures that goes into the artifact and its card; ``verified`` is added here.
    """

    def __init__(self, folder: Path, budget: AccuracyBudget, base: dict, recipe: dict, measured: dict):
        self.folder, self.budget, self.base, self.recipe, self.measured = folder, budget, base, recipe, measured

    def on_validation_end(self, trainer, module) -> None:
        if self.budget.depth is None or not trainer.is_global_zero:
            return
        verdict = next(v for v in self.budget.verdicts if v.depth == self.budget.depth)
        self.measured["verified"] = {
            "metric": self.budget.metric,
            "value": verdict.value,
            "bound": verdict.bound,
            "rows": verdict.rows,
            "confidence": self.budget.confidence,
            "max_drop": self.budget.max_drop,
        }
        variant = module.variants[str(self.budget.depth)]
        write_artifact(
            self.folder,
            plan=variant.plan,
            kind=variant.projections.kind,
            state=variant.projections.fitted_state(),
            base=self.base,
            recipe=self.recipe,
            measured=self.measured,
        )
