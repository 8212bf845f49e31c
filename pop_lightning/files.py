"""Files that appear whole or not at all; everything that writes for the user or for a resumed run goes through here."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file under a temporary name beside ``path``, then rename it.

    The temporary name ends as ``path`` does, because writers of plots look at the ending.

    Raises:
        OSError: the file cannot be written; nothing is left behind, and what stood at ``path`` stays.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1))
