"""Atomic file writes: a file appears whole or not at all. All output and all resumable state goes through here."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pop_lightning.core.errors import InputError

# Errors of the disk itself. Any other errno counts as a write error only if it names a file in the output folder.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
_CHECKSUM = "sha256"
# torch.save and safetensors report disk errors only as text, without an errno.
_TORCH = re.compile(r"PytorchStreamWriter|inline_container|Parent directory .* does not exist|cannot be opened")
_SAFETENSORS = re.compile(r"I/O error|os error")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file under a temporary name next to ``path``, then rename it.

    The file is synced before it is renamed, so that a power cut leaves no damaged file, and gets the mode of the umask,
    whatever mode its writer set. The temporary name keeps the suffix of ``path``, because plots are saved by suffix.

    Raises:
        OSError: the file cannot be written; no temporary file remains, and an older file at ``path`` is kept.
    """
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the folder may be gone, which the error being raised already says
            temporary.unlink(missing_ok=True)


def write_problem(error: BaseException, folder: Path) -> str | None:
    """The reason in words where ``error`` comes from a disk, or from a file in ``folder``; None for other errors."""
    for each in _chain(error):
        text = str(each)
        if isinstance(each, OSError) and (each.errno in _DISK or _inside(each.filename, folder)):
            return f"{each.strerror or text}{f': {each.filename2}' if each.filename2 else ''}"
        if isinstance(each, SafetensorError) and _SAFETENSORS.search(text):
            return text.rpartition("error: ")[2]
        if isinstance(each, RuntimeError) and _TORCH.search(text):
            return "the file could not be written in full"  # torch.save does not say why
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _inside(name: Any, folder: Path) -> bool:
    return isinstance(name, (str, os.PathLike)) and Path(os.path.abspath(name)).is_relative_to(os.path.abspath(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot sync folders
        _sync(folder)


def check_writable(path: Path) -> None:
    """Make the folder of ``path`` and try :func:`write_whole`'s temporary file there; a file at ``path`` is kept.

    Raises:
        OSError: the file could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.touch()
    temporary.unlink()


def check_output_folder(output: str | Path | None) -> None:
    """Raise :class:`InputError` if ``--output`` names a folder that cannot be made or written."""
    try:
        if output is not None:
            check_writable(Path(output) / "results")
    except OSError as error:
        raise InputError(f"--output {str(output)!r} cannot be written: {error.strerror}.") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}.{path.name}")


def is_unfinished(path: Path) -> bool:
    """Whether ``path`` has the name that :func:`write_whole` gives a file until it is complete."""
    return re.match(r"\.\d+\..", path.name) is not None


def remove_unfinished(folder: Path) -> None:
    """Remove temporary files of processes killed inside :func:`write_whole`, anywhere under ``folder``."""
    for path in [*folder.rglob(".*")]:
        if is_unfinished(path) and path.is_file():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1))


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` with a checksum of it and the file's name, for :func:`read_checked_json`."""
    content = json.loads(json.dumps(content))  # as it will be read: keys become text, tuples lists
    write_json(path, content | {_CHECKSUM: _checksum(path, content)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """What :func:`write_checked_json` wrote there; empty if it is missing, unreadable or was changed since."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content.pop(_CHECKSUM)
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return {}
    return content if stated == _checksum(path, content) else {}


def _checksum(path: Path, content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([path.name, content], sort_keys=True).encode()).hexdigest()


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename the complete ``partial`` to ``folder``; an older folder is set aside, and restored on failure.

    As with :func:`write_whole`, everything is synced first, and the files get the mode of the umask. A process
    killed between the two renames leaves the older folder aside; :func:`restore_folder` restores it.
    """
    mode = partial.stat().st_mode & 0o666
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            _sync(path)
    _sync_folder(partial)
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
    _sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Undo a :func:`replace_folder` that was interrupted between its renames."""
    if not folder.exists() and _aside(folder).is_dir():
        os.rename(_aside(folder), folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")
