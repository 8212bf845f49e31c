"""Low-rank adapters on the projections, by peft: put in, saved in peft's format, merged for inference and export.

They go into the projections' own Linears, never into the model's k_proj or v_proj, which decode runs through. A saved
folder is loaded onto the projections that training started from: ``PeftModel.from_pretrained(projections, folder)``;
loading it onto the language model would find nothing there and say nothing.
"""

from peft import LoraConfig, PeftModel, get_peft_model

from pop_lightning.fitting.training import masters
from pop_lightning.pruning.projections import KVProjections


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
