"""Kind ``lora``: low-rank adapters on the projections, by peft, saved in its format and merged for export.

They go into the projections' own Linears, never into the model's k_proj or v_proj, which decode runs through. A saved
folder is loaded onto the projections that training started from: ``PeftModel.from_pretrained(projections, folder)``;
loading it onto the language model would find nothing there and say nothing.
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
    """Adapters on every fitted layer's map, which stays frozen; names and meaning of the arguments are peft's.

    Args:
        projections: closed form or reuse, as a rule; changed in place: its maps become peft's layers in float32.

    Returns:
        The peft model around ``projections``: ``save_pretrained(folder)`` writes the adapters alone.
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
    """The projections with the adapters folded into W', plain Linears again (kind ``lora``)."""
    projections = adapters.merge_and_unload()
    projections.requires_grad_(False)
    projections.kind = "lora"
    return projections
