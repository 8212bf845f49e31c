"""ExportArtifact: writes the artifact once a verification has chosen a depth; nothing where none was chosen."""

from pathlib import Path

import lightning

from pop_lightning.callbacks.accuracy_budget import AccuracyBudget
from pop_lightning.generation.artifact import write_artifact


class ExportArtifact(lightning.Callback):
    """Write ``folder`` at the end of a run that holds the depth that ``budget`` chose.

    A sequence that is verified in several runs may write it several times: the last one stands.

    Args:
        folder: of the artifact; written whole or not at all.
        budget: whose choice is exported.
        base: identity of the base model (:func:`pop_lightning.generation.base_identity.base_identity`).
        recipe: the resolved recipe.
        measured: figures for the artifact and its card; ``verified`` is added here.
    """

    def __init__(self, folder: Path, budget: AccuracyBudget, base: dict, recipe: dict, measured: dict):
        self.folder, self.budget, self.base, self.recipe, self.measured = folder, budget, base, recipe, dict(measured)

    def on_validation_end(self, trainer, module) -> None:
        variant = module.variants.get(str(self.budget.depth))
        if variant is None or not trainer.is_global_zero:
            return
        self.measured["verified"] = self.budget.promise()
        write_artifact(
            self.folder,
            plan=variant.plan,
            kind=variant.projections.kind,
            state=variant.projections.fitted_state(),
            base=self.base,
            recipe=self.recipe,
            measured=self.measured,
        )
