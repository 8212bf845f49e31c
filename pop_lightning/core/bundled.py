"""Resolves names of models and data: ``bundled:facts-gemma3`` to a file of the library, ``~`` to the home folder."""

import importlib.resources
import os
from pathlib import Path

from pop_lightning.core.errors import InputError, Key

_BUNDLED = "bundled:"


def resolve_bundled(name: str) -> str:
    """The path of ``bundled:NAME``, a file or folder installed with the library; other names with ``~`` expanded.

    Raises:
        InputError: nothing is bundled under that name; the message lists what is.
    """
    if not name.startswith(_BUNDLED):
        return os.path.expanduser(name)
    root = Path(str(importlib.resources.files("pop_lightning.checkpoints"))).resolve()
    inside = name.removeprefix(_BUNDLED)
    path = (root / inside).resolve()
    if inside and path.exists() and path.is_relative_to(root) and path != root:
        return str(path)
    entries = sorted(
        entry.relative_to(root).as_posix()
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(("_", "."))
        for entry in (folder, *folder.glob("*.jsonl"))
    )
    raise InputError(
        f"{name!r} is not bundled with pop_lightning",
        expected=f"one of {', '.join(_BUNDLED + entry for entry in entries) or 'nothing'}",
        advice=("change ", Key("model.base"), " or ", Key("data.calibration")),
    )
