"""Identifies the base model of an artifact, and checks a given model against it: config and sampled weights."""

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError

# With 7 matrices and 2 vectors a layer (Llama), 32 layers stay below 100 kB of JSON.
SAMPLES, VECTOR_SAMPLES = 8, 4
MATRICES, VECTORS = 7, 8  # at most, per layer; the other experts of a mixture are left out

# How a model is loaded and run, and the special tokens: none of it changes what the weights compute.
_VOLATILE = re.compile(
    r"_.*|transformers_version|name_or_path|(torch_)?dtype|architectures|use_cache|.*attn_implementation.*|"
    r"(pad|bos|eos|sep|cls|mask)_token_id|output_attentions|output_hidden_states|return_dict|quantization_config|"
    r"id2label|label2id|problem_type|tokenizer_class|finetuning_task|chunk_size_feed_forward"
)
_PLAIN = {f"{dtype}".removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32)} | {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
COMPILED = "_orig_mod."  # what torch.compile puts into the names of a module's parts
_BOTH_HALF = {"bfloat16", "float16"}


def base_identity(model: PreTrainedModel, name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """What identifies this base, as plain data; reads a few hundred numbers of the weights, never all.

    A hub model is named by the commit that was loaded, because a branch or tag moves; a folder by its full path.

    The fingerprint holds ``SAMPLES`` elements of each layer's matrices and ``VECTOR_SAMPLES`` of its vectors (norms,
    biases), at positions drawn from a hash of the tensor's name. It survives a load in another dtype and detects a
    merged fine-tune, which moves nearly every element it touches.

    Raises:
        InputError: the model has a PEFT adapter that is not merged: its own weights do not determine its output.
    """
    adapter = find_adapter(model)
    if adapter is not None:
        raise InputError(f"the base {name_or_path} has an adapter on {adapter} that is not merged{_MERGE}.")
    config = _stable_config(model.config)
    return {
        "id": str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else str(name_or_path),
        "revision": getattr(model.config, "_commit_hash", None) or revision,
        "class": _class(model),
        "model_type": model.config.model_type,
        "layers": config.get("num_hidden_layers"),
        "config": config,
        "config_hash": _hash(config),
        "fingerprint": _fingerprint(model),
    }


_MERGE = ": merge it (merge_and_unload) and fit on the result, or remove it"


def find_adapter(model: nn.Module) -> str | None:
    """The name of the first module that a PEFT adapter wraps, or None. An inactive adapter counts as well."""
    if "peft" not in sys.modules:  # then nothing can have been injected, and importing it costs seconds
        return None
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(model, PeftModel):
        return type(model).__name__
    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    return next((name for name, module in model.named_modules() if isinstance(module, kinds)), None)


def check_base(base: Mapping[str, Any], model: PreTrainedModel, folder: Path) -> None:
    """Reject a base that an artifact was not made for.

    Weights that are not plain tensors (quantized, offloaded) cannot be compared; all others are.

    Args:
        base: the artifact's :func:`base_identity`.
        folder: of the artifact, for the error message.

    Raises:
        InputError: class, config or sampled weights differ, or an adapter is not merged; names the first difference.
    """
    name = getattr(model, "name_or_path", "") or "the loaded model"
    adapter = find_adapter(model)
    if adapter is not None:
        raise InputError(f"{_intro(base, folder, name)}has an adapter on {adapter} that is not merged{_MERGE}.")
    check_config(base, model.config, _class(model), folder, name)
    samples = _samples(base)
    if not samples:
        return
    names = {name for name, _ in _tensors(model)}
    missing = [name for name in samples if name not in names]
    # A quantization may store a weight under other names (packed values, scales).
    if missing and getattr(model.config, "quantization_config", None) is None:
        raise InputError(f"{_intro(base, folder, name)}names its weights differently: {missing[0]} was expected{_GIVE}")
    mine = _fingerprint(model, samples)["samples"]
    for tensor, there in samples.items():
        here = mine.get(tensor)
        if here is not None and not _same(there, here):
            raise InputError(f"{_intro(base, folder, name)}has other weights in {tensor}{_TUNED}{_GIVE}")


_GIVE = "; give the base it was made for (--base)."
_TUNED = ", as after a merged fine-tune"


def _intro(base: Mapping[str, Any], folder: Path, name: str) -> str:
    return (
        f"the artifact {folder} was made for {base.get('id')} ({base.get('class')}, {base.get('layers')} layers), the "
        f"given base {name} "
    )


def check_config(base: Mapping[str, Any], config: PreTrainedConfig, kind: str, folder: Path, name: str) -> None:
    """Reject a base whose class ``kind`` or config is not the one that an artifact was made for.

    Raises:
        InputError: naming the first difference.
    """
    given = _stable_config(config)
    intro = _intro(base, folder, f"{name} ({kind}, {given.get('num_hidden_layers')} layers)")
    if kind != base.get("class"):
        raise InputError(f"{intro}is of another class{_GIVE}")
    if _hash(given) != base.get("config_hash"):
        stored = base.get("config")
        difference = _difference(stored, given) if isinstance(stored, dict) else "their hashes differ"
        # Keys on one side only come and go with Transformers versions; what both know has to agree.
        if difference:
            raise InputError(f"{intro}has another config: {difference}{_GIVE}")


class CheckpointCheck:
    """Compares the tensors of a checkpoint, as an engine reads them, with those that an artifact was made for.

    Args:
        base: the artifact's :func:`base_identity`.
        folder: of the artifact, and ``name`` of the given base, for the error message.
    """

    def __init__(self, base: Mapping[str, Any], folder: Path, name: str):
        self.samples, self.intro = _samples(base), _intro(base, folder, name)
        self.missing = set(self.samples)

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass on names and tensors.

        Raises:
            InputError: at the first tensor whose sampled elements differ.
        """
        for name, tensor in tensors:
            if name in self.missing:
                self.missing.discard(name)
                if _is_readable(tensor) and not _same(self.samples[name], _sample(name, tensor)):
                    raise InputError(f"{self.intro}has other weights in {name}{_TUNED}{_GIVE}")
            yield name, tensor

    def finish(self, *, quantized: bool) -> None:
        """Raise :class:`InputError` where an expected tensor was not in the checkpoint.

        Experts have other names on disk than in a loaded model, and so may the tensors of a quantized base.
        """
        missing = sorted(name for name in self.missing if "expert" not in name)
        if missing and not quantized:
            raise InputError(f"{self.intro}names its weights differently: {missing[0]} was expected{_GIVE}")


def _samples(base: Mapping[str, Any]) -> dict[str, Any]:
    stored = base.get("fingerprint")
    samples = stored.get("samples") if isinstance(stored, dict) else None
    return samples if isinstance(samples, dict) else {}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and the buffers that a checkpoint holds."""
    for name, parameter in model.named_parameters():
        yield name.replace(COMPILED, ""), parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name).replace(COMPILED, ""), buffer


def _class(model: nn.Module) -> str:
    return type(getattr(model, "_orig_mod", model)).__name__


def _stable_config(config: PreTrainedConfig) -> dict[str, Any]:
    plain = json.loads(json.dumps(config.get_text_config().to_dict(), default=str, sort_keys=True))
    return {key: value for key, value in plain.items() if not _VOLATILE.fullmatch(key)}


def _hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _difference(there: Any, here: Any, key: str = "") -> str | None:
    """A description of the first key that both sides have and that differs, or None."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() & here.keys()):
            found = _difference(there[name], here[name], f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if there == here else f"{key} is {here!r} there and {there!r} in the artifact"


def _fingerprint(model: PreTrainedModel, wanted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``{"samples": {tensor: {"shape", "dtype", "values"}}}``; tensors without plain numbers are left out."""
    readable = {name: tensor for name, tensor in _tensors(model) if _is_readable(tensor)}
    samples = {}
    for name in _chosen(readable) if wanted is None else [name for name in wanted if name in readable]:
        with distributed.gathered([readable[name]]):
            samples[name] = _sample(name, readable[name])
    return {"samples": samples}


def _sample(name: str, tensor: Tensor) -> dict[str, Any]:
    """Some elements of a tensor, at positions drawn from a hash of its name."""
    tensor = tensor.detach()
    count = SAMPLES if tensor.dim() > 1 else VECTOR_SAMPLES
    places = [_place(name, index, tensor.numel()) for index in range(count)]
    where = torch.unravel_index(torch.tensor(places, device=tensor.device), tensor.shape)
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "values": [float(f"{value:.9g}") for value in tensor[where].float().tolist()],  # 9 digits: all of float32
    }


def _is_readable(tensor: Tensor) -> bool:
    """Whether the elements can be read; a quantized weight may report a dtype in which it only computes."""
    return (
        len(distributed.whole_shape(tensor)) >= 1
        and (tensor.numel() > 0 or distributed.is_sharded(tensor))
        and type(tensor) in (nn.Parameter, nn.Buffer, Tensor)
        and tensor.device.type != "meta"
        and tensor.dtype in _PLAIN.values()
    )


def _chosen(tensors: Mapping[str, Tensor]) -> list[str]:
    """Everything outside the layers, and at most ``MATRICES`` and ``VECTORS`` of each layer, experts last."""
    groups: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        layer = re.match(r".*?\.\d+\.", name)
        vector = len(distributed.whole_shape(tensor)) == 1
        groups.setdefault((layer[0] if layer else "", vector), []).append(name)
    for (layer, vector), members in groups.items():
        most = VECTORS if vector else MATRICES
        if layer and len(members) > most:
            members.sort(key=lambda name: ("expert" in name, hashlib.sha256(name.encode()).digest()))
            del members[most:]
    return [name for members in groups.values() for name in members]


def _place(name: str, index: int, elements: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{name}:{index}".encode()).digest()[:8], "big") % elements


def _same(there: Any, here: dict[str, Any]) -> bool:
    """Whether two samples come from one tensor, each side rounded to what the other one could hold."""
    try:
        if list(there["shape"]) != here["shape"]:
            return False
        dtypes = {there["dtype"], here["dtype"]}
        first, second = (torch.tensor(each["values"], dtype=torch.float32) for each in (there, here))
        for dtype in dtypes:
            first, second = (each.to(_PLAIN[dtype]).float() for each in (first, second))
        if first.shape != second.shape:
            return False
    except (KeyError, TypeError, ValueError, RuntimeError):  # not a fingerprint written by this version
        return False
    # Rounding is exact, so equal dtypes agree to the bit. The two halves round differently: bfloat16 in its eighth
    # bit, float16 below 6e-8.
    if dtypes == _BOTH_HALF:
        return torch.allclose(first, second, rtol=2**-7, atol=1e-7, equal_nan=True)
    return torch.allclose(first, second, rtol=1e-6, atol=1e-7 if "float16" in dtypes else 0.0, equal_nan=True)
