"""Kind ``lora``: low-rank adapters on the projections with peft, saved in its format and merged for export.

They are added to the projections' own Linears, never to the model's k_proj or v_proj, which decode uses. To load a
saved folder onto the projections that training started from: ``PeftModel.from_pretrained(projections, folder)``.
Loading it onto the language model silently loads nothing.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model

from pop_lightning.fitting.full import masters
from pop_lightning.fitting.kinds import TrainedKind
from pop_lightning.pruning.projections import KVProjections


class Lora(TrainedKind):
    def arguments(self, settings: Any) -> dict[str, Any]:
        return asdict(settings.lora)

    def parameters(self, settings: Any, inputs: int, outputs: int) -> int:
        return settings.lora.r * (inputs + outputs)

    def prepare(self, projections: KVProjections, **arguments) -> PeftModel:
        return inject(projections, **arguments)

    def finish(self, projections: KVProjections, prepared: PeftModel, folder: Path | None) -> KVProjections:
        if folder is not None:
            prepared.save_pretrained(str(folder))
        return merge(prepared)


KIND = Lora("lora")


def inject(
    projections: KVProjections,
    *,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
) -> PeftModel:
    """Add adapters to every fitted layer's map, which stays frozen; the arguments are those of peft's LoraConfig.

    Args:
        projections: usually closed form or reuse; changed in place: its maps become peft's layers in float32.

    Returns:
        The peft model around ``projections``: ``save_pretrained(folder)`` writes only the adapters.
    """
    masters(projections, projections.kind)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        target_modules=[f"maps.{layer}" for layer in projections.fitted_layers],
    )
    return get_peft_model(projections, config)


def merge(adapters: PeftModel) -> KVProjections:
    """The projections with the adapters merged into W' (kind ``lora``); their maps are plain Linears again."""

    projections = adapters.merge_and_unload()
    projections.requires_grad_(False)
    projections.kind = "lora"
    return projections
