"""The features of ``generate`` that a pruned prefill refuses by name, each with what to use instead."""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.names import CACHE


def refuse_unsupported(
    model: PreTrainedModel,
    decoder: Decoder,
    plan: PruningPlan,
    setting: Callable[[str], object],
    padding: Tensor | None,
) -> None:
    """Raise :class:`InputError` for a feature that cannot work with a pruned prefill, before anything runs.

    Args:
        setting: returns a generation setting by its name, as ``generate`` will see it.
        padding: padding tokens in front of each row, ``[batch]``, if they matter to the plan.
    """
    by_row = bool(plan.salient) or (padding is not None and isinstance(plan.boundary, float))
    cache, implementation = setting(CACHE), setting("cache_implementation")
    assisted = setting("assistant_model") is not None or setting("prompt_lookup_num_tokens") is not None
    if assisted and cache is not None and int(cache.get_seq_length()):
        raise InputError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens) reads the whole prompt again and needs "
            "an empty cache; found past_key_values that hold tokens."
        )
    if setting("use_cache") is False and setting("inputs_embeds") is None:
        raise InputError("pruned generation keeps the context in a cache; found use_cache=False.")
    if getattr(cache, "offloading", False) or str(implementation).startswith("offloaded"):
        raise InputError(
            "an offloaded cache is not supported by the pruned prefill; use cache_implementation 'dynamic', "
            "'static' or 'quantized'."
        )
    if implementation == "paged":
        raise InputError("cache_implementation 'paged' (continuous batching) has no prefill that can be pruned.")
    if setting("token_healing"):
        raise InputError("token_healing changes the prompt inside generate; heal it first, then generate.")
    if setting("assistant_model") is model or setting("assistant_early_exit") is not None:
        raise InputError(
            "the pruned model cannot be its own assistant (assistant_model, assistant_early_exit); give another "
            "assistant_model or prompt_lookup_num_tokens."
        )
    if setting("use_mtp") or setting("speculation_type") == "dflash":
        raise InputError(
            "use_mtp and speculation_type='dflash' draft from hidden states of every prompt token, which a pruned "
            "prefill does not compute; use assistant_model or prompt_lookup_num_tokens."
        )
    for name in ("output_hidden_states", "output_attentions"):
        if setting(name) and (assisted or plan.boundary == 0 or by_row):
            raise InputError(
                f"{name} needs boundary >= 1, salient 0 and no assistant, and for rows of different lengths a "
                f"boundary that is not a share: above the depth only boundary tokens have rows, and otherwise the "
                f"layers run twice; change the plan, drop the assistant, or use full_model()."
            )
    if decoder.config._attn_implementation == "flex_attention" and (
        decoder.compiled or setting("prefill_chunk_size") is not None
    ):
        raise InputError(
            "flex_attention needs torch.compile, which the pruned prefill turns off if the model is compiled "
            "or prefill_chunk_size is given; use attn_implementation='sdpa'."
        )
