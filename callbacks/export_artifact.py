"""ExportArtifact: write the artifact once the verification has chosen a depth; nothing is written if it chose none."""

from pathlib import Path
from typing import Any

import lightning

from pop_lightning.callbacks.accuracy_budget import AccuracyBudget
from pop_lightning.core.errors import InputError
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.generation.artifact import write_artifact
from pop_lightning.generation.base_identity import base_identity


class ExportArtifact(lightning.Callback):
    """Write ``folder`` at the end of a ``test`` run that includes the depth that the budget chose.

    If a sequence is verified in several runs, a later choice replaces an earlier artifact.

    Args:
        folder: of the artifact; written whole or not at all.
        budget: whose choice is exported; the trainer's own :class:`AccuracyBudget` unless given.
        base: identity of the base (:func:`pop_lightning.generation.base_identity.base_identity`); of the evaluated
            model unless given.
        recipe: the resolved recipe, as plain data; the calibration data of the trainer's data module unless given.
        measured: figures for the artifact and its card, as plain data; the budget's measurements unless given, and the
            median prompt length of the trainer's data module. ``verified`` is added here.
    """

    def __init__(
        self,
        folder: str | Path,
        budget: AccuracyBudget | None = None,
        *,
        base: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        measured: dict[str, Any] | None = None,
    ):
        self.folder, self.budget = Path(folder).expanduser(), budget
        self.base, self.recipe, self.measured = base, recipe, measured

    def on_test_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self.budget is None and _budget_of(trainer) is None:
            raise InputError(
                "ExportArtifact has no AccuracyBudget to choose a depth: add one to the trainer's callbacks, as in "
                "Trainer(callbacks=[AccuracyBudget(), ExportArtifact(folder)])."
            )

    def on_test_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        budget = self.budget or _budget_of(trainer)
        if not isinstance(module, Evaluation) or budget.chosen not in module.variants:
            return
        model = module.decoder.model
        # Reading sharded weights is a collective operation, so every process takes part.
        base = self.base or base_identity(model, model.name_or_path)
        measured = self.measured
        if measured is None:
            measured = {"curve": list(budget.measured.values())} | _prompts_of(trainer.datamodule)
        recipe = _recipe_of(trainer.datamodule) if self.recipe is None else self.recipe
        if trainer.is_global_zero:
            export(
                self.folder,
                module.variants[budget.chosen],
                base=base,
                recipe=recipe,
                measured=measured | {"verified": budget.promise()},
            )


def export(
    folder: Path, variant: Variant, *, base: dict[str, Any], recipe: dict[str, Any], measured: dict[str, Any]
) -> None:
    """Write ``variant`` as an artifact, whole or not at all.

    Raises:
        InputError: ``folder`` exists and is not an artifact, or cannot be written.
    """
    write_artifact(
        folder,
        plan=variant.plan,
        kind=variant.projections.kind,
        state=variant.projections.fitted_state(),
        base=base,
        recipe=recipe,
        measured=measured,
    )


def _budget_of(trainer: lightning.Trainer) -> AccuracyBudget | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, AccuracyBudget)), None)


def _prompts_of(data: object) -> dict[str, Any]:
    """The median prompt length in tokens; a data module of another class may have none."""
    tokens = getattr(getattr(data, "report", None), "prompt_tokens", None)
    return {"prompt_tokens": int(tokens["median"])} if tokens else {}


def _recipe_of(data: object) -> dict[str, Any]:
    """The source of the rows, which the artifact's card names; a data module of another class may have none."""
    calibration = getattr(data, "calibration", None)
    return {"data": {"calibration": calibration}} if isinstance(calibration, str) else {}
