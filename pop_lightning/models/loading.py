"""Loading a base model, its tokenizer and its processor: from the hub, a folder, or the bundled checkpoints."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.core.errors import InputError, first_sentence
from pop_lightning.models.decoder import Decoder

DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map=None,
    **others,
) -> PreTrainedModel:
    """A causal language model, one that reads images or not, in eval mode.

    ``name`` is a hub id, a folder, or ``bundled:NAME``.

    Args:
        attn_implementation: Transformers' own choice unless given (sdpa where the family has it).
        others: what else ``from_pretrained`` takes, such as ``quantization_config``.

    Raises:
        InputError: nothing loadable stands under that name, or ``from_pretrained`` takes no such argument.
    """
    path = resolve_bundled(name)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        model = auto_class(config).from_pretrained(
            path,
            revision=revision,
            dtype=dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            **others,
        )
    except TypeError as error:
        if not others:
            raise
        raise InputError(f"model.base {name!r} cannot be loaded like this: {first_sentence(error)}") from error
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        check_attention(f"model.base {name!r}", attn_implementation, error)
        raise InputError(
            f"no model could be loaded from model.base {name!r} (a hub id or a folder with config.json and safetensors "
            f"was expected): {first_sentence(error)}"
        ) from error
    return model.eval().requires_grad_(False)


def as_decoder(model: "str | Path | PreTrainedModel | Decoder", **options) -> Decoder:
    """The base model in the form that every module works on.

    Args:
        model: a hub id, a folder or ``bundled:NAME``, which is loaded; a Transformers model; or a :class:`Decoder`,
            which is returned as it is.
        options: of :func:`load_model`, for a model that is loaded.

    Raises:
        InputError: it cannot be loaded, is something else, or has no decoder of a supported shape.
    """
    if isinstance(model, Decoder):
        return model
    if isinstance(model, (str, Path)):
        model = load_model(str(model), **options)
    if not hasattr(model, "get_decoder"):
        raise InputError(
            f"a base model must be a hub id, a folder, a Transformers model or a Decoder, found {type(model).__name__}."
        )
    return Decoder(model)


def check_attention(what: str, attn_implementation: str | None, error: Exception) -> None:
    """Raise :class:`InputError` where Transformers' ``error`` refuses an attention that the user named."""
    if attn_implementation is not None and "attn_implementation" in str(error):
        raise InputError(
            f"{what} does not run with model.attn_implementation {attn_implementation!r}: leave it out, or set it to "
            f"'eager' ({first_sentence(error)})"
        ) from error


def auto_class(config: PreTrainedConfig) -> type:
    """Which of Transformers' auto classes makes the model of a config: one that reads images has a class of its own."""
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


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
        raise InputError(f"model.base {name!r} has no config.json that loads: {first_sentence(error)}") from error
    return getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """Where a base lies on this machine: its folder, or the hub's cache. None where it does not; the hub is not asked.

    Raises:
        InputError: ``bundled:NAME`` of something that is not.
    """
    path = Path(resolve_bundled(name))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no hub id
        return None


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
            f"{first_sentence(error)}"
        ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = (
            tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.convert_ids_to_tokens(0)
        )
    return tokenizer


def choose_device(name: str | None) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N`` as a device; None takes a GPU where there is one.

    Raises:
        InputError: no such device, or none that this PyTorch sees.
    """
    if name is None:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise InputError(f"--device must be cpu, cuda or cuda:N, found {name!r}.")
    if kind == "cpu":
        return torch.device("cpu")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= there:
        found = f"{there} GPU(s), counted from cuda:0" if there else "no GPU"
        raise InputError(f"--device {name} was asked for, this PyTorch sees {found}; take --device cpu.")
    return torch.device("cuda", int(index or 0))


def check_dtype(name: str | None) -> None:
    """Raise :class:`InputError` where ``--dtype`` names none of :data:`DTYPES`."""
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, found {name!r}.")


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end a generated response."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was made for, in tokens, or None where its config names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
