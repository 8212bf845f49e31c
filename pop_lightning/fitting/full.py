"""Kind ``full``: W' and b' of every fitted layer are trained."""

from pathlib import Path

from torch import nn

from pop_lightning.fitting.kinds import TrainedKind
from pop_lightning.pruning.projections import KVProjections


class Full(TrainedKind):
    replaces_start = True

    def prepare(self, projections: KVProjections) -> None:
        make_trainable(projections)

    def finish(self, projections: KVProjections, prepared: nn.Module | None, folder: Path | None) -> KVProjections:
        return projections


KIND = Full("full")


def make_trainable(projections: KVProjections) -> KVProjections:
    """Replace every fitted layer's W', b' by trainable float32 masters (kind ``full``)."""
    masters(projections, "full")
    for layer in projections.fitted_layers:
        projections.maps[str(layer)].requires_grad_(True)
    return projections


def masters(projections: KVProjections, kind: str) -> KVProjections:
    """Replace every fitted layer's map by its own float32 copy, with a bias, so that training changes nothing else."""

    projections.replace({layer: projections.affine(layer) for layer in projections.fitted_layers}, kind)
    for layer in projections.fitted_layers:
        projections.maps[str(layer)].float()
    return projections
