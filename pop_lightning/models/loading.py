"""Loading a base model and its tokenizer from the hub, a folder, or the bundled checkpoints."""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
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
from pop_lightning.core.errors import InputError, Key, first_sentence
from pop_lightning.models.decoder import Decoder

DTYPES = ("float32", "bfloat16", "float16")

# What safetensors and torch.load raise for damaged weights, and what Transformers raises if it cannot load a model.
_DAMAGED = (EOFError, SafetensorError, UnpicklingError)
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, *_DAMAGED)


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
        others: further arguments of ``from_pretrained``, such as ``quantization_config``.

    Raises:
        InputError: no loadable model with that name, one that lacks tensors, or an adapter; or ``from_pretrained`` has
            no such argument.
    """
    path = resolve_bundled(name)
    _refuse_adapter(name, path)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        model, report = auto_class(config).from_pretrained(
            path,
            output_loading_info=True,
            revision=revision,
            dtype=dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            **others | {"ignore_mismatched_sizes": True},  # they are refused below, by name
        )
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        if isinstance(error, TypeError) and others:
            problem = f"{name!r} cannot be loaded like this: {first_sentence(error)}"
            raise InputError(problem, key="model.base") from error
        check_attention(f"model.base {name!r}", attn_implementation, error)
        expected = "config.json and weights that load (safetensors, or pytorch_model.bin)"
        raise _not_loaded(name, path, "is not a model that loads", expected, error) from error
    _check_complete(name, report)
    return model.eval().requires_grad_(False)


def plain_generate(model: PreTrainedModel) -> Callable:
    """``model.generate``, without an artifact's ``custom_generate`` that Transformers found next to the weights."""
    found = model.generate
    pruned = isinstance(found, partial) and "POP_LIGHTNING" in getattr(found.func, "__globals__", {})
    return partial(type(model).generate, model) if pruned else found


def _check_complete(name: str, report: dict) -> None:
    """Raise if Transformers initialized missing or mismatched tensors with random numbers."""
    random = sorted(report["missing_keys"])
    random += [
        f"{key} of {list(there)} instead of {list(here)}" for key, there, here in sorted(report["mismatched_keys"])
    ]
    if random:
        count = "1 tensor" if len(random) == 1 else f"{len(random)} tensors"
        raise InputError(
            f"{name!r} lacks {count} of the model that its config.json describes ({', '.join(random[:3])}"
            f"{', ...' if len(random) > 3 else ''}), which would be random numbers",
            key="model.base",
            advice="download it again, or correct its config.json (for a missing lm_head: tie_word_embeddings)",
        )


def _refuse_adapter(name: str, path: str) -> None:
    """Raise if a folder holds a PEFT adapter, which is not a model by itself."""
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise InputError(
        f"{name!r} is an adapter{f' of {base}' if base else ''}, not a model",
        key="model.base",
        advice="merge it into its base (peft's merge_and_unload) and give the saved result, or name the base itself",
    )


def _not_loaded(name: str, path: str, problem: str, expected: str, error: Exception) -> InputError:
    """The error for a failed load: damaged weights, no access, no such name, or else ``problem``."""
    causes = list(_causes(error))
    # torch.load suggests weights_only=False here, which would run code from the file; downloading it again is the fix.
    no_opcode = isinstance(error, KeyError) and isinstance(error.args[0], int)  # an unknown pickle opcode
    if isinstance(error, _DAMAGED) or no_opcode or "PytorchStreamReader" in str(error):
        return InputError(
            f"{name!r} has weights that cannot be read: the file is damaged, truncated, or not a weights file",
            key="model.base",
            advice="download it again",
        )
    if Path(path).exists():
        return InputError(f"{name!r} {problem} (expected {expected}): {first_sentence(error)}", key="model.base")
    if any(isinstance(each, GatedRepoError) for each in causes):
        advice = "accept its terms on huggingface.co and log in (hf auth login)"
        return InputError(f"{name!r} is gated on the hub", key="model.base", advice=advice)
    if hub_unreached(error):
        return InputError(
            f"{name!r} is not on this machine, and huggingface.co could not be reached",
            key="model.base",
            advice="check the connection, or give a folder that holds the model",
        )
    unknown = any(isinstance(each, RepositoryNotFoundError) for each in causes)
    if unknown or path.startswith((os.sep, ".", "~")) or path.count("/") > 1:
        return InputError(
            f"{name!r} does not exist",
            key="model.base",
            expected="a folder with config.json and weights, or the id of a model on the hub",
            advice=("if it was moved, give its new location with ", Key("model.base")),
        )
    return InputError(f"{name!r} {problem} (expected {expected}): {first_sentence(error)}", key="model.base")


def hub_unreached(error: BaseException | None) -> bool:
    """Whether ``error`` comes from a hub that does not answer, or that is not asked (``HF_HUB_OFFLINE``)."""
    return any(
        isinstance(each, (LocalEntryNotFoundError, ConnectionError, TimeoutError))
        # The hub's HTTP client is another package in every other version: its errors are known by their base's name.
        or any(kind.__name__ == "TransportError" for kind in type(each).__mro__)
        or (isinstance(each, HfHubHTTPError) and each.response.status_code >= 500)
        for each in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, followed by its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def as_decoder(model: "str | Path | PreTrainedModel | Decoder", **options) -> Decoder:
    """The base model as a :class:`Decoder`, the form that every module works on.

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
    """Raise :class:`InputError` if Transformers' ``error`` rejects the attention implementation that the user chose."""
    if attn_implementation is not None and "attn_implementation" in str(error):
        raise InputError(
            f"{what} does not run with model.attn_implementation {attn_implementation!r}: leave it out, or set it to "
            f"'eager' ({first_sentence(error)})"
        ) from error


def auto_class(config: PreTrainedConfig) -> type:
    """Which of Transformers' auto classes builds the model of a config: models that read images have their own."""
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM


def stored_dtype(name: str, dtype: str, revision: str | None = None, trust_remote_code: bool = False) -> torch.dtype:
    """The dtype in which :func:`load_model` would load ``name``; ``auto`` is that of the checkpoint.

    Raises:
        InputError: no config with that name.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    config = load_config(name, revision, trust_remote_code)
    return getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.float32


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a base.

    Raises:
        InputError: there is none, or it does not load.
    """
    path = resolve_bundled(name)
    _refuse_adapter(name, path)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(name, path, "has no config.json that loads", "a model's folder", error) from error


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The local folder of a base, which may be in the hub's cache; None if there is none. The hub is not asked.

    Raises:
        InputError: ``bundled:NAME`` of something that is not bundled.
    """
    path = Path(resolve_bundled(name))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not a hub id
        return None


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, required: bool = True
) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer, padding on the left; None if there is none and ``required`` is False.

    Padding is masked, so any token will do: without a pad token, or with one that was added to the tokenizer but has no
    row in the embeddings, the end token is used.
    """
    path = resolve_bundled(name)
    _refuse_adapter(name, path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not required and not hub_unreached(error):
            return None
        expected = "tokenizer.json next to its config.json"
        raise _not_loaded(name, path, "has no tokenizer that loads", expected, error) from error
    tokenizer.padding_side = "left"
    embedded = _vocab_size(path, revision, trust_remote_code)
    if tokenizer.pad_token_id is None or (embedded is not None and tokenizer.pad_token_id >= embedded):
        tokenizer.pad_token = (
            tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.convert_ids_to_tokens(0)
        )
    return tokenizer


def _vocab_size(path: str, revision: str | None, trust_remote_code: bool) -> int | None:
    """How many tokens the base has embeddings for, or None if it has no config."""
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return None
    return getattr(config.get_text_config(), "vocab_size", None)


def choose_device(name: str | None) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N`` as a device; None uses a GPU if there is one.

    Raises:
        InputError: no such device, or one that this PyTorch does not see.
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
        raise InputError(f"--device {name} was requested, but this PyTorch sees {found}; use --device cpu.")
    return torch.device("cuda", int(index or 0))


def check_dtype(name: str | None) -> None:
    """Raise :class:`InputError` unless ``--dtype`` is one of :data:`DTYPES`."""
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, found {name!r}.")


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end a generated response."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was made for, in tokens, or None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
