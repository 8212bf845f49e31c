"""Files that appear whole or not at all; everything that writes for the user or for a resumed run goes through here."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, then rename it.

    The temporary name ends as ``path`` does, because writers of plots look at the ending.

    Raises:
        OSError: the file cannot be written; nothing is left behind, and what stood at ``path`` stays.
    """
    temporary = _temporary(path)
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make the folder of ``path`` and try :func:`write_whole`'s temporary file there; what stands at ``path`` stays.

    Raises:
        OSError: the file could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.touch()
    temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")


def is_unfinished(path: Path) -> bool:
    """Whether ``path`` has the name that :func:`write_whole` gives a file until it is complete."""
    return re.match(r"\.\d+\..", path.name) is not None


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed inside :func:`write_whole` left in ``folder``, however deep."""
    for path in [*folder.rglob(".*")]:
        if is_unfinished(path) and path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1))


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename the complete ``partial`` to ``folder``; what stands there steps aside, and comes back on failure.

    A process killed between the two renames leaves it aside: :func:`restore_folder` brings it back.
    """
    replaced = _aside(folder)
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


def restore_folder(folder: Path) -> None:
    """Undo a :func:`replace_folder` that was cut between its renames."""
    if not folder.exists() and _aside(folder).is_dir():
        os.rename(_aside(folder), folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
