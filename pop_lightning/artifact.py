"""The artifact: what ``pop-fit`` exports, a folder of three files that holds no weight of the base.

``pop_config.json`` says what is pruned, for which base and how well it measured, ``kv_projections.safetensors`` holds
the fitted projections, ``README.md`` is the model card. Writing is atomic; reading trusts nothing it has not checked.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.errors import InputError
from pop_lightning.plan import PruningPlan
from pop_lightning.projections import KINDS

FORMAT = 1
CONFIG, WEIGHTS, CARD = "pop_config.json", "kv_projections.safetensors", "README.md"
SAMPLES = 8  # elements of a tensor that the fingerprint holds
PER_LAYER = 7  # tensors of a layer that it samples
RELATIVE, ABSOLUTE = 2.0**-6, 1e-6  # wider than two roundings to bfloat16, narrower than a merged update
# What differs between two loads of one base without changing what it computes.
_VOLATILE = {
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}
_REQUIRED = {
    "plan": {"depth": int, "boundary": int},
    "projection": {"kind": str, "tensors": dict, "sha256": str},
    "base": {"id": str, "class": str, "layers": int, "config_hash": str, "fingerprint": dict},
}


@dataclass(frozen=True)
class Artifact:
    """A read artifact: the plan, the projections' kind and tensors, and all of ``pop_config.json``."""

    plan: PruningPlan
    kind: str
    state: dict[str, Tensor]
    config: dict[str, Any]


def base_identity(model: PreTrainedModel, name: str, revision: str | None = None) -> dict[str, Any]:
    """What tells this base from others, whatever dtype or device it is loaded in."""
    return {
        "id": name,
        "revision": revision,
        "class": type(model).__name__,
        "model_type": model.config.get_text_config().model_type,
        "layers": model.config.get_text_config().num_hidden_layers,
        "config_hash": _config_hash(model),
        "fingerprint": {key: values for key, values in _fingerprint(model) if values is not None},
    }


def write_artifact(
    folder: str | Path,
    *,
    plan: PruningPlan,
    kind: str,
    state: Mapping[str, Tensor],
    base: Mapping[str, Any],
    recipe: Mapping[str, Any],
    measured: Mapping[str, Any],
) -> Path:
    """Write the folder, all of it or nothing; one that stands there already is replaced at the end.

    Args:
        state: :meth:`KVProjections.fitted_state`.
        base: :func:`base_identity`.
        recipe: ``Recipe.to_dict()``.
        measured: the figures, as plain nested data.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = Path(folder)
    mark = uuid.uuid4().hex[:8]
    new, old = (folder.parent / f".{folder.name}.{mark}.{end}" for end in ("new", "old"))
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    try:
        new.mkdir(parents=True)
        save_file(state, new / WEIGHTS, metadata={"format": "pt"})
        config = {
            "format": FORMAT,
            "version": _version(),
            "plan": {"depth": plan.depth, "boundary": plan.boundary},
            "projection": {"kind": kind, "tensors": _shapes(state), "sha256": _sha256(new / WEIGHTS)},
            "base": _plain(base),
            "recipe": _plain(recipe),
            "measured": _plain(measured),
        }
        (new / CONFIG).write_text(json.dumps(config, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (new / CARD).write_text(_card(config), encoding="utf-8")
        replaced = folder.exists()
        if replaced:
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except BaseException:
            if replaced:
                os.rename(old, folder)
            raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the artifact folder {folder} (under output) cannot be written: {reason}.") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    return folder


def read_artifact(folder: str | Path) -> Artifact:
    """Read and check an artifact; keys it does not know are kept and ignored.

    Raises:
        InputError: something is missing, damaged, newer than this version, or not as stated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no artifact stands at {folder}: expected the artifact folder that pop-fit wrote.")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"artifact {folder} is incomplete: {name} is missing.")
    config = _read_config(folder)
    plan = PruningPlan(config["plan"]["depth"], config["plan"]["boundary"])
    projection = config["projection"]
    if projection["kind"] not in KINDS:
        raise InputError(
            f"projection.kind in {folder / CONFIG} must be one of {', '.join(KINDS)}, found {projection['kind']!r}."
        )
    try:
        intact = _sha256(folder / WEIGHTS) == projection["sha256"]
        state = load_file(folder / WEIGHTS) if intact else {}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"artifact {folder} is damaged: {WEIGHTS} cannot be read; export or copy it again.") from error
    if not intact:
        raise InputError(
            f"artifact {folder} is damaged: {WEIGHTS} is not the file whose sha256 {CONFIG} states; export or copy it "
            "again."
        )
    found, stated = _shapes(state), projection["tensors"]
    for name in sorted(found.keys() | stated.keys()):
        about = stated.get(name)
        known = {key: about.get(key) for key in ("shape", "dtype")} if isinstance(about, dict) else about
        if found.get(name) != known:
            raise InputError(
                f"artifact {folder} is inconsistent: tensor {name} is {_say(found.get(name))} in {WEIGHTS} and "
                f"{_say(known)} in {CONFIG}."
            )
    return Artifact(plan, projection["kind"], state, config)


def check_base(artifact: Artifact, model: PreTrainedModel) -> None:
    """Raise :class:`InputError`, saying what differs, where ``model`` is not the base the artifact was made for."""
    base = artifact.config["base"]
    start = f"the artifact was made for base {base['id']}, and the given model is another"
    text = model.config.get_text_config()
    for what, found, expected in (
        ("class", type(model).__name__, base["class"]),
        ("number of layers", text.num_hidden_layers, base["layers"]),
    ):
        if found != expected:
            raise InputError(f"{start}: its {what} is {found}, expected {expected}.")
    found = _config_hash(model)
    if found != base["config_hash"]:
        raise InputError(f"{start}: its config hashes to {found[:12]}, expected {base['config_hash'][:12]}.")
    fingerprint = dict(_fingerprint(model))
    for name, expected in base["fingerprint"].items():
        if name not in fingerprint:
            raise InputError(f"{start}: it has no weight {name} in floating point.")
        values = fingerprint[name]
        if values is not None and not _close(values, expected):  # None: offloaded, its values are elsewhere
            raise InputError(
                f"{start}: the values of {name} differ (fine-tuned, or an adapter was merged); load the base as it was."
            )


def _read_config(folder: Path) -> dict[str, Any]:
    where = folder / CONFIG
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON; export or copy the artifact again.") from error
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{where} must hold a JSON object, found a {type(config).__name__}.")
    version = config.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise InputError(f"format in {where} must be a whole number from 1, found {version!r}.")
    if version > FORMAT:
        raise InputError(
            f"artifact {folder} has format {version}, this version of pop-lightning reads up to {FORMAT}: upgrade it."
        )
    for section, keys in _REQUIRED.items():
        if not isinstance(config.get(section), dict):
            raise InputError(f"{where} has no section {section}; export or copy the artifact again.")
        for key, kind in keys.items():
            value = config[section].get(key)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{section}.{key} in {where} is missing or no {kind.__name__}, found {value!r:.60}.")
    for name, values in config["base"]["fingerprint"].items():
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise InputError(f"base.fingerprint.{name} in {where} must be a list of numbers.")
    return config


def _config_hash(model: PreTrainedModel) -> str:
    # Only what is not the class's default, so that a key that a later Transformers adds changes nothing.
    config = {
        key: value
        for key, value in model.config.get_text_config().to_diff_dict().items()
        if key not in _VOLATILE and not key.startswith("_") and "attn_implementation" not in key
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def _fingerprint(model: PreTrainedModel) -> Iterator[tuple[str, list[float] | None]]:
    """Names and samples of the base's matrices; None for one whose values are not in memory."""
    seen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() != 2 or not parameter.is_floating_point() or re.search(r"vision|audio", name):
            continue
        layer = re.search(r"\blayers\.(\d+)\.", name)
        if layer:
            seen[layer[1]] = seen.get(layer[1], 0) + 1
            if seen[layer[1]] > PER_LAYER:
                continue
        if parameter.is_meta:
            yield name, None
            continue
        rows, columns = parameter.shape
        places = [
            int.from_bytes(hashlib.sha256(f"{name} {rows}x{columns} {sample}".encode()).digest()[:8], "big")
            % (rows * columns)
            for sample in range(SAMPLES)
        ]
        row = torch.tensor([place // columns for place in places], device=parameter.device)
        column = torch.tensor([place % columns for place in places], device=parameter.device)
        yield name, parameter.detach()[row, column].float().bfloat16().float().tolist()


def _close(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(
        abs(one - other) <= RELATIVE * max(abs(one), abs(other)) + ABSOLUTE
        for one, other in zip(found, expected, strict=True)
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in sorted(state.items())
    }


def _say(about: Any) -> str:
    return f"{about['dtype']} {about['shape']}" if isinstance(about, dict) else "missing"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("pop-lightning")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _plain(value: Any) -> Any:
    """JSON's own types; a figure that is no number (nan, inf) becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | range):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _figures(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The single figures of nested data, as card rows; lists stay in pop_config.json."""
    for key, entry in value.items():
        if isinstance(entry, dict):
            yield from _figures(entry, f"{prefix}{key}.")
        elif not isinstance(entry, list):
            shown = f"{entry:.4g}" if isinstance(entry, float) else "none" if entry is None else str(entry)
            yield f"{prefix}{key}", shown.replace("|", "\\|").replace("\n", " ")


def _card(config: dict[str, Any]) -> str:
    base, plan = config["base"], config["plan"]
    hub = re.fullmatch(r"[\w][\w.-]*/[\w.-]+", base["id"]) and not Path(base["id"]).exists()
    head = ["---", "library_name: pop-lightning", "tags: [prefill-only-pruning, pop]"]
    head += [f"base_model: {base['id']}"] if hub else []
    revision = f" at revision `{base['revision']}`" if base.get("revision") else ""
    depth, layers = plan["depth"], base["layers"]
    rows = "\n".join(f"| {key} | {shown} |" for key, shown in _figures(config["measured"])) or "| none | none |"
    return (
        "\n".join(head)
        + f"""
---

# Prefill-Only Pruning of {base["id"]}

Context tokens of the prompt run through the first {depth} of {layers} layers ({layers - depth} pruned); the last
{plan["boundary"]} prompt token(s) and every generated token run through all of them (arXiv 2602.03295). Keys and values
of the pruned layers come from projections of kind `{config["projection"]["kind"]}`.

The base's weights are not inside: they load from `{base["id"]}`{revision} and are checked against this artifact.

## Load

```python
from pop_lightning import StageAwareGenerator

generator = StageAwareGenerator.from_artifact("path/to/this/folder")
```

```python
prompt = generator.tokenizer("Once upon a time", return_tensors="pt")
output = generator.generate(**prompt, max_new_tokens=32)
print(generator.tokenizer.decode(output[0]))
```

## Measured

| figure | value |
| --- | --- |
{rows}

The recipe, the base's identity and all figures are in `{CONFIG}`; made with pop-lightning {config["version"]}.
"""
    )
