"""The artifact: what ``pop-fit`` exports, and how it is verified when it is read.

An ``artifact/`` folder holds ``pop_config.json``, ``kv_projections.safetensors`` and a model card; base weights are
never copied. The export callback and :meth:`StageAwareGenerator.save_pretrained` write it,
:meth:`StageAwareGenerator.from_artifact` reads it. Only JSON and safetensors are read, so that an untrusted
artifact can hold wrong figures but no code. The folder's ``custom_generate/generate.py`` is for Transformers, which
runs it where a call of ``generate`` names the folder and sets ``trust_remote_code``.

Format 2 binds both files to each other: a SHA-256 over the whole content of ``pop_config.json`` (plan, kind, stored
layers and tensors, base, recipe, measured figures) is in that file and in the metadata of the tensor file, whose own
SHA-256 ``pop_config.json`` states. A change to either file, or a file of another artifact, is rejected. The model card
is not bound and may be edited. Format 1 had no such checksum and is rejected.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pop_lightning.core.errors import InputError
from pop_lightning.core.files import replace_folder, write_problem
from pop_lightning.core.kinds import KINDS
from pop_lightning.core.plan import Kept, PruningPlan
from pop_lightning.generation.base_identity import CheckpointCheck, check_base, check_config
from pop_lightning.generation.model_card import model_card
from pop_lightning.pruning.projections import SELECTOR
from pop_lightning.pruning.selectors import selector_named

FORMAT = 2
CONFIG, TENSORS, CARD = "pop_config.json", "kv_projections.safetensors", "README.md"
CUSTOM_GENERATE = Path("custom_generate", "generate.py")  # where Transformers looks for it
_BOUND = "pop_config"  # key of the config's digest in the tensor file's metadata
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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

    @property
    def prompt_tokens(self) -> int | None:
        """Median prompt length, in tokens, of the rows that it was made with; None where the config does not say it."""
        measured: Any = self.config.get("measured")
        for keys in (("prompt_tokens",), ("speedup", "prompt_tokens")):
            found = measured
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if type(found) is int and found > 0:
                return found
        return None

    def check_base(self, model: PreTrainedModel) -> None:
        """Reject a base that this artifact was not made for, as :func:`base_identity.check_base` does."""
        check_base(self.config["base"], model, self.folder)

    def check_config(self, config: PreTrainedConfig, kind: str, name: str) -> None:
        """Reject the config of another base than this artifact's; ``kind`` is the class that ``name`` is loaded as."""
        check_config(self.config["base"], config, kind, self.folder, name)

    def checkpoint_check(self, name: str) -> CheckpointCheck:
        """What compares the tensors of the checkpoint ``name`` with this artifact's base while they are read."""
        return CheckpointCheck(self.config["base"], self.folder, name)


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a config's canonical JSON: everything except the two checksums themselves."""
    content = {key: value for key, value in config.items() if key != "integrity"}
    if isinstance(content.get("projection"), dict):
        content["projection"] = {key: value for key, value in content["projection"].items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# --- writing --------------------------------------------------------------------------------------------------------


def write_artifact(
    folder: str | Path,
    *,
    plan: PruningPlan,
    kind: str,
    state: Mapping[str, Tensor],
    base: dict[str, Any],
    recipe: dict[str, Any] | None = None,
    measured: dict[str, Any] | None = None,
) -> None:
    """Write an artifact, whole or not at all; an artifact that is already there stays until the new one is complete.

    Args:
        folder: becomes the artifact.
        state: the fitted tensors (``KVProjections.fitted_state``); empty for reuse without a fitted selector.
        base: :func:`base_identity` of the model it was fitted on.
        recipe: the resolved recipe, as plain data.
        measured: figures for the config and the card, as plain data.

    Raises:
        InputError: ``folder`` holds something other than an artifact, or cannot be written; or a tensor has values
            that are not finite.
    """
    folder = Path(
        os.path.abspath(Path(folder).expanduser())
    )  # "." has no name for the temporary folder to be derived from
    recipe, measured = recipe or {}, measured or {}
    if folder.exists() and not (folder / CONFIG).is_file() and not _holds_only_own_files(folder):
        raise InputError(f"{folder} holds something other than an artifact; name another folder.")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    if not _has_selector(plan):
        tensors.pop(SELECTOR, None)
    for name, tensor in tensors.items():
        if problem := _senseless(tensor):
            raise InputError(f"the projections cannot be exported to {folder}: {name} {problem}.")
    config = {
        "format": FORMAT,
        "pop_lightning": version("pop-lightning"),
        "plan": {"depth": plan.depth} | plan.kept.to_dict(),
        "projection": {
            "kind": kind,
            "layers": sorted({int(name.split(".")[1]) for name in tensors if name != SELECTOR}),
            "tensors": {name: _stated(tensor) for name, tensor in tensors.items()},
        },
        "base": base,
        "recipe": recipe,
        "measured": measured,
    }
    config = json.loads(json.dumps(config))  # as it will be read back: the digest is computed over that
    digest = config_digest(config)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
        partial.mkdir(parents=True)
        card = model_card(plan, kind, config["base"], config["measured"], config["recipe"])
        (partial / CARD).write_text(card, encoding="utf-8", errors="replace")
        safetensors.torch.save_file(tensors, partial / TENSORS, metadata={"format": "pt", _BOUND: digest})
        (partial / CUSTOM_GENERATE).parent.mkdir()
        shutil.copyfile(Path(__file__).with_name("custom_generate.py"), partial / CUSTOM_GENERATE)
        config["projection"]["sha256"] = _digest(partial / TENSORS)
        config["integrity"] = {"sha256": digest}
        (partial / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = write_problem(error, folder.parent) or str(error)
        raise InputError(f"the artifact cannot be written to {folder}: {reason.rstrip('.')}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _holds_only_own_files(folder: Path) -> bool:
    """Whether ``folder`` is empty or a damaged artifact: nothing in it has another name than an artifact's files."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {
        CONFIG,
        TENSORS,
        CARD,
        CUSTOM_GENERATE.parts[0],
    }


def _stated(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _senseless(tensor: Tensor) -> str | None:
    """What makes a tensor unusable as a weight or bias, as the rest of a sentence; None for a usable one."""
    if tensor.dtype not in _DTYPES:
        return f"has the dtype {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}"
    if not tensor.isfinite().all():
        return "has values that are not finite (NaN or infinity)"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading --------------------------------------------------------------------------------------------------------


def read_artifact(folder: str | Path) -> Artifact:
    """Read an artifact and check all of it.

    Keys that this version does not know are kept; the checksum covers them.

    Raises:
        InputError: a file is missing, damaged, changed after the export, of another format, or does not hold what
            ``pop_config.json`` states.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: expected the artifact/ folder that pop-fit wrote (--artifact).")
    path = folder / CONFIG
    config = _read_config(path)
    try:
        depth, stored = _need(config, "plan.depth", int, path), _need(config, "plan", dict, path)
        _need(config, "plan.boundary", (int, float), path)
        plan = Kept.of(stored).at(depth)
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path} has no valid plan: {error}") from error
    kind = _need(config, "projection.kind", str, path)
    if kind not in KINDS:
        raise InputError(f"{path} has projection.kind {kind!r}: expected one of {', '.join(KINDS)}.")
    for key in ("base.id", "base.class", "base.config_hash"):
        _need(config, key, str, path)
    layers = _need(config, "projection.layers", list, path)
    stated = _need(config, "projection.tensors", dict, path)
    expected = {f"layers.{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if _has_selector(plan):
        expected.add(SELECTOR)
    if set(stated) != expected:
        odd = sorted(set(stated) ^ expected)[0]
        raise InputError(f"{path} lists projections of the layers {layers}, and {odd} is missing or unexpected.")
    if layers and kind == "reuse":
        raise InputError(f"{path} has projection.kind 'reuse' and stores the layers {layers}: expected none.")
    return Artifact(plan, kind, _read_tensors(folder / TENSORS, config, stated), config, folder)


def _has_selector(plan: PruningPlan) -> bool:
    """Whether the tensor file holds the weight of a fitted selector."""
    return bool(plan.salient) and selector_named(plan.selector).fitted


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = config_digest(config) if isinstance(config, dict) else None
    except FileNotFoundError as error:
        inside = path.parent / "artifact"
        hint = f"; did you mean {inside}?" if (inside / CONFIG).is_file() else "."
        raise InputError(f"{path} is missing: expected the artifact/ folder that pop-fit wrote{hint}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON, so the artifact is damaged: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a JSON object, found {type(config).__name__}.")
    number = _need(config, "format", int, path)
    if number > FORMAT:
        raise InputError(
            f"{path} has format {number}, this pop-lightning reads format {FORMAT}: a newer version is needed."
        )
    if number == 1:
        raise InputError(f"{path} has format 1, which has no checksum: export it again with this version of pop-fit.")
    if number < FORMAT:
        raise InputError(f"{path} has format {number}: expected {FORMAT}.")
    stated = _need(config, "integrity.sha256", str, path)
    if stated != found:
        raise InputError(
            f"{path} does not match its own checksum (integrity.sha256 is {stated[:12]!r}, its content gives "
            f"{found[:12]!r}): it was changed or damaged after the export; export it again."
        )
    return config


def _read_tensors(path: Path, config: dict[str, Any], stated: dict[str, Any]) -> dict[str, Tensor]:
    digest = _need(config, "projection.sha256", str, path.parent / CONFIG)
    if not path.is_file():
        raise InputError(f"{path} is missing: the artifact is incomplete.")
    try:
        state = safetensors.torch.load_file(path)
        with safe_open(path, "pt") as file:
            bound = (file.metadata() or {}).get(_BOUND)
        found = _digest(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or cut short: {str(error).rstrip('.')}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    # The tensors are compared before the file's checksum, because that message names the tensor.
    for name in sorted(stated.keys() | state.keys()):
        if name not in state:
            raise InputError(f"{path} lacks the tensor {name} that {CONFIG} states.")
        if name not in stated:
            raise InputError(f"{path} holds the tensor {name} that {CONFIG} does not state.")
        there, here = stated[name], _stated(state[name])
        if not isinstance(there, dict) or any(there.get(key) != value for key, value in here.items()):
            raise InputError(f"{path} has {name} as {here}, {CONFIG} states {there}.")
        if problem := _senseless(state[name]):
            raise InputError(f"{path} is unusable: {name} {problem}.")
    if found != digest:
        raise InputError(
            f"{path} has a different SHA-256 than {CONFIG} states ({found[:12]}, expected {digest[:12]}): it was "
            "changed or damaged after the export."
        )
    if bound != config["integrity"]["sha256"]:
        raise InputError(f"{path} was not exported together with {CONFIG}: the files of two artifacts were mixed.")
    return state


def _need(config: dict[str, Any], key: str, kind: type | tuple[type, ...], path: Path) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise InputError(f"{path} lacks the key {key}.")
        value = value[part]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{path} has {key} as {value!r}: expected {getattr(kind, '__name__', 'number')}.")
    return value
