"""The artifact: what ``pop-fit`` exports, how it is checked on the way back in, and which base it belongs to.

An ``artifact/`` folder holds ``pop_config.json``, ``kv_projections.safetensors`` and a model card; base weights are
never copied. The export callback writes it, :meth:`StageAwareGenerator.from_artifact` reads it. Only JSON and
safetensors are read, so that an artifact from elsewhere can hold wrong figures but no code.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.errors import InputError
from pop_lightning.plan import PruningPlan
from pop_lightning.projections import KINDS

FORMAT = 1
CONFIG, TENSORS, CARD = "pop_config.json", "kv_projections.safetensors", "README.md"

SAMPLES = 8  # per matrix; with 7 matrices a layer, 32 layers stay below 100 kB of JSON
MATRICES = 7  # per layer: what a Llama layer has; of a mixture of experts the rest is left out

# How a model is loaded and run, or which words the tokenizer reserves: none of it changes what the weights compute.
_VOLATILE = re.compile(
    r"_.*|transformers_version|name_or_path|(torch_)?dtype|architectures|use_cache|.*attn_implementation.*|"
    r"(pad|bos|eos|sep|cls|mask)_token_id|output_attentions|output_hidden_states|return_dict|quantization_config|"
    r"id2label|label2id|problem_type|tokenizer_class|finetuning_task|chunk_size_feed_forward"
)
_PLAIN = {f"{dtype}".removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32)} | {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_BOTH_HALF = {"bfloat16", "float16"}


@dataclass(frozen=True)
class Artifact:
    """An artifact in memory.

    Attributes:
        plan: depth and boundary.
        kind: of the projections.
        state: tensors of ``KVProjections.fitted_state``, on the CPU; empty for reuse.
        config: all of ``pop_config.json``, unknown newer keys included.
        folder: where it was read from.
    """

    plan: PruningPlan
    kind: str
    state: dict[str, Tensor]
    config: dict[str, Any]
    folder: Path


# --- the base -------------------------------------------------------------------------------------------------------


def base_identity(model: PreTrainedModel, name_or_path: str, revision: str | None = None) -> dict[str, Any]:
    """What tells this base from others, as plain data; reads a few hundred numbers of the weights, never all.

    A hub model is named by the commit that was loaded, which a branch or tag would not stay at; a folder by its full
    path.

    The fingerprint holds ``SAMPLES`` elements of each layer's matrices at places drawn from the matrix's name. It
    survives a load in another dtype and notices a merged fine-tune, which moves nearly every element it touches.
    """
    config = _stable_config(model)
    return {
        "id": str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else str(name_or_path),
        "revision": getattr(model.config, "_commit_hash", None) or revision,
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "layers": config.get("num_hidden_layers"),
        "config": config,
        "config_hash": _hash(config),
        "fingerprint": _fingerprint(model),
    }


def check_base(artifact: Artifact, model: PreTrainedModel) -> None:
    """Refuse a base that the artifact was not made for.

    Raises:
        InputError: class, config or sampled weights differ; the sentence names the first thing that does.
    """
    base = artifact.config["base"]
    given = _stable_config(model)
    name = getattr(model, "name_or_path", "") or "the loaded model"
    intro = (
        f"the artifact {artifact.folder} was made for {base.get('id')} ({base.get('class')}, {base.get('layers')} "
        f"layers), the given base {name} ({type(model).__name__}, {given.get('num_hidden_layers')} layers) "
    )
    advice = "; give the base it was made for (--base)."
    if type(model).__name__ != base.get("class"):
        raise InputError(f"{intro}is of another class{advice}")
    if _hash(given) != base.get("config_hash"):
        stored = base.get("config")
        difference = _difference(stored, given) if isinstance(stored, dict) else "their hashes differ"
        # Keys on one side only come and go with Transformers versions; what both know has to agree.
        if difference:
            raise InputError(f"{intro}has another config: {difference}{advice}")
    stored = base.get("fingerprint")
    samples = stored.get("samples") if isinstance(stored, dict) else None
    if not isinstance(samples, dict) or not samples:
        return
    names = {key for key, _ in model.named_parameters()}
    if not names & set(samples):
        raise InputError(f"{intro}names its weights otherwise: {next(iter(samples))} was expected{advice}")
    mine = _fingerprint(model, samples)["samples"]
    for tensor, there in samples.items():
        here = mine.get(tensor)
        if here is not None and not _same(there, here):
            raise InputError(f"{intro}has other weights in {tensor}, as after a merged fine-tune{advice}")


def _stable_config(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config().to_dict()
    plain = json.loads(json.dumps(config, default=str, sort_keys=True))
    return {key: value for key, value in plain.items() if not _VOLATILE.fullmatch(key)}


def _hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _difference(there: Any, here: Any, key: str = "") -> str | None:
    """The first key that both sides know and that differs, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in sorted(there.keys() & here.keys()):
            found = _difference(there[name], here[name], f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if there == here else f"{key} is {here!r} there and {there!r} in the artifact"


def _fingerprint(model: PreTrainedModel, wanted: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``{"samples": {tensor: {"shape", "dtype", "values"}}}``; tensors that hold no plain numbers are left out."""
    parameters = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()  # names tied weights once
        if parameter.dim() >= 2
        and parameter.numel()  # a shard of another rank
        and parameter.device.type != "meta"
        and parameter.dtype in _PLAIN.values()
    }
    samples = {}
    for name in _chosen(parameters) if wanted is None else [name for name in wanted if name in parameters]:
        tensor = parameters[name]
        places = [_place(name, index, tensor.numel()) for index in range(SAMPLES)]
        where = torch.unravel_index(torch.tensor(places, device=tensor.device), tensor.shape)
        samples[name] = {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "values": [float(f"{value:.9g}") for value in tensor[where].float().tolist()],  # 9 digits: all of float32
        }
    return {"samples": samples}


def _chosen(names: Mapping[str, Tensor]) -> list[str]:
    """All matrices outside the layers, and at most ``MATRICES`` of each layer, experts last."""
    groups: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r".*?\.\d+\.", name)
        groups.setdefault(layer[0] if layer else "", []).append(name)
    for layer, members in groups.items():
        if layer and len(members) > MATRICES:
            members.sort(key=lambda name: ("expert" in name, hashlib.sha256(name.encode()).digest()))
            del members[MATRICES:]
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
    except (KeyError, TypeError, ValueError, RuntimeError):  # no fingerprint that this version wrote
        return False
    # Rounding is exact, so equal dtypes agree to the bit. The two halves round differently: bfloat16 in its eighth
    # bit, float16 below 6e-8.
    if dtypes == _BOTH_HALF:
        return torch.allclose(first, second, rtol=2**-7, atol=1e-7, equal_nan=True)
    return torch.allclose(first, second, rtol=1e-6, atol=1e-7 if "float16" in dtypes else 0.0, equal_nan=True)


# --- writing --------------------------------------------------------------------------------------------------------


def write_artifact(
    folder: str | Path,
    *,
    plan: PruningPlan,
    kind: str,
    state: Mapping[str, Tensor],
    base: dict[str, Any],
    recipe: dict[str, Any],
    measured: dict[str, Any],
    card: str | None = None,
) -> None:
    """Write an artifact, whole or not at all; one that stands there already stays until the new one is complete.

    Args:
        folder: becomes the artifact.
        state: the fitted tensors (``KVProjections.fitted_state``); empty for reuse.
        base: :func:`base_identity` of the model it was fitted on.
        recipe: the resolved recipe, as plain data.
        measured: figures for the config and the card, as plain data.
        card: text of the model card; :func:`model_card` unless given.

    Raises:
        InputError: ``folder`` holds something that is no artifact, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name to put a sibling beside
    if folder.exists() and not (folder / CONFIG).is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} holds something that is no artifact; name another folder.")
    partial, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "replaced"))
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        safetensors.torch.save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        config = {
            "format": FORMAT,
            "pop_lightning": version("pop-lightning"),
            "plan": {"depth": plan.depth, "boundary": plan.boundary},
            "projection": {
                "kind": kind,
                "tensors": {name: _stated(tensor) for name, tensor in tensors.items()},
                "sha256": _digest(partial / TENSORS),
            },
            "base": base,
            "recipe": recipe,
            "measured": measured,
        }
        (partial / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False), encoding="utf-8")
        (partial / CARD).write_text(
            model_card(plan, kind, base, measured, recipe) if card is None else card, encoding="utf-8"
        )
        _put(partial, folder, replaced)
    except OSError as error:
        raise InputError(f"the artifact cannot be written to {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, folder: Path, replaced: Path) -> None:
    """Rename the complete artifact into place; a folder cannot be replaced in one step, so the old one steps aside."""
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    try:
        os.rename(partial, folder)
    except BaseException:
        with suppress(OSError):
            os.rename(replaced, folder)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _stated(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


def read_artifact(folder: str | Path) -> Artifact:
    """Read an artifact and check all of it; keys that this version does not know are kept.

    Raises:
        InputError: a file is missing, damaged or does not hold what ``pop_config.json`` states.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: expected the artifact/ folder that pop-fit wrote (--artifact).")
    path = folder / CONFIG
    config = _read_config(path)
    try:
        plan = PruningPlan(_need(config, "plan.depth", int, path), _need(config, "plan.boundary", int, path))
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path} holds no valid plan: {error}") from error
    kind = _need(config, "projection.kind", str, path)
    if kind not in KINDS:
        raise InputError(f"{path} has projection.kind {kind!r}: expected one of {', '.join(KINDS)}.")
    _need(config, "base.id", str, path)
    _need(config, "base.class", str, path)
    _need(config, "base.config_hash", str, path)
    stated = _need(config, "projection.tensors", dict, path)
    digest = _need(config, "projection.sha256", str, path)
    return Artifact(plan, kind, _read_tensors(folder / TENSORS, stated, digest), config, folder)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: expected the artifact/ folder that pop-fit wrote.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, so the artifact is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(config).__name__}.")
    number = _need(config, "format", int, path)
    if number > FORMAT:
        raise InputError(
            f"{path} has format {number}, this pop-lightning reads up to {FORMAT}: a newer version is needed."
        )
    if number < 1:
        raise InputError(f"{path} has format {number}: expected {FORMAT}.")
    return config


def _read_tensors(path: Path, stated: dict[str, Any], digest: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} is missing: the artifact is incomplete.")
    try:
        state = safetensors.torch.load_file(path)
        found = _digest(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short: {str(error).rstrip('.')}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    # What is stated comes first: its message says which tensor.
    for name in sorted(stated.keys() | state.keys()):
        if name not in state:
            raise InputError(f"{path} lacks the tensor {name} that {CONFIG} states.")
        if name not in stated:
            raise InputError(f"{path} holds the tensor {name} that {CONFIG} does not state.")
        there, here = stated[name], _stated(state[name])
        if not isinstance(there, dict) or any(there.get(key) != value for key, value in here.items()):
            raise InputError(f"{path} has {name} as {here}, {CONFIG} states {there}.")
    if found != digest:
        raise InputError(
            f"{path} has another SHA-256 than {CONFIG} states ({found[:12]}, expected {digest[:12]}): it was changed "
            "or damaged after the export."
        )
    return state


def _need(config: dict[str, Any], key: str, kind: type, path: Path) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"{path} lacks the key {key}.")
        value = value[part]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{path} has {key} as {value!r}: expected {kind.__name__}.")
    return value


# --- the card -------------------------------------------------------------------------------------------------------


def model_card(
    plan: PruningPlan, kind: str, base: dict[str, Any], measured: dict[str, Any], recipe: dict[str, Any]
) -> str:
    """The model card: what is pruned, what it was measured to cost, and how to load it. Markdown."""
    layers = base.get("layers")
    of = f" of {layers}" if layers else ""
    revision = f" at revision `{base['revision']}`" if base.get("revision") else ""
    head = [
        "---",
        "library_name: pop-lightning",
        f"base_model: {json.dumps(base['id'], ensure_ascii=False)}",
        "tags: [prefill-only-pruning]",
        "---",
        f"# Prefill-Only Pruning of {base['id']}",
        "",
        f"Context tokens run through the first **{plan.depth}{of} layers** only; decoding runs all of them "
        "([POP, arXiv 2602.03295](https://arxiv.org/abs/2602.03295)). The pruned layers' keys and values of the "
        f"context come from `{kind}` projections, and the last {plan.boundary} prompt token(s) run in full.",
        "",
        f"- Base: `{base['id']}`{revision} (`{base['class']}`). **Its weights are not in here**: they are loaded from "
        "where the base is, and a base with other weights is refused.",
    ]
    data = recipe.get("data", {}).get("calibration") if isinstance(recipe.get("data"), dict) else None
    if data:
        head.append(f"- Calibration data: `{data}`")
    load = [
        "",
        "## Load",
        "```python",
        "from pop_lightning import StageAwareGenerator",
        "generator = StageAwareGenerator.from_artifact(path)  # this folder; base=... for a base that lies elsewhere",
        "output = generator.generate(**inputs, max_new_tokens=64)",
        "```",
        "",
    ]
    return "\n".join([*head, *_verified(measured.get("verified")), *_curve(measured.get("curve"), plan, kind), *load])


def _verified(verified: dict[str, Any] | None) -> list[str]:
    if not verified:
        return []
    text = f"`{verified.get('metric')}`: measured {_figure(verified.get('value'))}"
    if verified.get("bound") is not None:
        text += f", loss at most {_figure(verified['bound'])} with {_figure(verified.get('confidence'))} confidence"
    text += f" on {verified.get('rows')} rows that nothing was fitted or chosen on"
    if verified.get("max_drop") is not None:
        text += f" (budget: {_figure(verified['max_drop'])})"
    return ["", "## Verified", "", f"{text}."]


def _curve(curve: list[dict[str, Any]] | None, plan: PruningPlan, kind: str) -> list[str]:
    if not curve:
        return []
    columns = [
        key
        for key in ("depth", "projection", "kl", "agreement", "nll_increase", "exact_match")
        if any(key in row for row in curve)
    ]
    lines = ["", "## Measured depths", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in curve:
        mark = "**" if row.get("depth") == plan.depth and row.get("projection") == kind else ""
        cells = " | ".join(f"{mark}{_figure(row.get(key, ''))}{mark}" for key in columns)
        lines.append(f"| {cells} |")
    return lines


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
