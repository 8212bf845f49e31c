"""Checks that what a stage of fitting made is finite, so that NaN and infinity are never measured or exported."""

from pop_lightning.core.errors import InputError, Text
from pop_lightning.pruning.projections import KVProjections


def check_maps(projections: KVProjections, stage: str, advice: Text) -> None:
    """Reject projections with values that are not finite; those that ZeRO-3 or a device map keeps away are empty.

    Args:
        stage: what made them, for the message.
        advice: what to change, for the message.

    Raises:
        InputError: naming the stage, the first such layer, the depth and the dtype.
    """
    for layer, module in projections.maps.items():
        for parameter in module.parameters():
            if not parameter.is_meta and not parameter.isfinite().all():
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise InputError(
                    f"{stage}: the projection of layer {layer} at depth {projections.depth} has values that are not "
                    f"finite in {dtype}",
                    advice=advice,
                )
