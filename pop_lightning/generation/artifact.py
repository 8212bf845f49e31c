"""The artifact: what ``pop-fit`` exports, how it is checked on the way back in, and which base it belongs to.

An ``artifact/`` folder holds ``pop_config.json``, ``kv_projections.safetensors`` and a model card; base weights are
never copied. The export callback writes it, :meth:`StageAwareGenerator.from_artifact` reads it. Only JSON and
safetensors are read, so that an artifact from elsewhere can hold wrong figures but no code.
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
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.core.errors import InputError
from pop_lightning.core.files import replace_folder
from pop_lightning.core.kinds import KINDS
from pop_lightning.core.plan import PruningPlan
from pop_lightning.generation.base_identity import check_base
from pop_lightning.generation.model_card import model_card

FORMAT = 1
CONFIG, TENSORS, CARD = "pop_config.json", "kv_projections.safetensors", "README.md"


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

    def check_base(self, model: PreTrainedModel) -> None:
        """Refuse a base that this artifact was not made for, as :func:`base_identity.check_base` does."""
        check_base(self.config["base"], model, self.folder)


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
    partial = folder.with_name(f".{folder.name}.partial")
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
        replace_folder(partial, folder)
    except OSError as error:
        raise InputError(f"the artifact cannot be written to {folder}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
