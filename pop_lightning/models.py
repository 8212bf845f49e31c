"""Loading a base model and its tokenizer: from the hub, a folder, or the bundled checkpoints."""

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pop_lightning.data import resolve_bundled
from pop_lightning.errors import InputError


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    device_map=None,
) -> PreTrainedModel:
    """A causal language model in eval mode; ``name`` is a hub id, a folder, or ``bundled:NAME``.

    Raises:
        InputError: nothing loadable stands under that name.
    """
    path = resolve_bundled(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise InputError(
            f"no model could be loaded from model.base {name!r} (a hub id or a folder with config.json and safetensors "
            f"was expected): {_first_sentence(error)}"
        ) from error
    return model.eval().requires_grad_(False)


def stored_dtype(name: str, dtype: str, revision: str | None = None, trust_remote_code: bool = False) -> torch.dtype:
    """What :func:`load_model` would load ``name`` in; ``auto`` is the checkpoint's own.

    Raises:
        InputError: nothing loadable stands under that name.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    try:
        config = AutoConfig.from_pretrained(
            resolve_bundled(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.base {name!r} has no config.json that loads: {_first_sentence(error)}") from error
    return getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, required: bool = True
) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer, padding on the left; None where there is none and ``required`` is False."""
    path = resolve_bundled(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not required:
            return None
        raise InputError(
            f"model.base {name!r} has no tokenizer that loads (tokenizer.json was expected beside its config): "
            f"{_first_sentence(error)}"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = (
            tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.convert_ids_to_tokens(0)
        )
    return tokenizer


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end a generated response."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was made for, in tokens, or None where its config names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."
