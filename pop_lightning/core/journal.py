"""What a long task has finished so far, as JSON Lines that survive an interruption at any moment."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any


class Busy(Exception):
    """Another process writes to the journal."""


class Journal:
    """A file whose first line holds the settings of the task and every other line one finished record.

    Used as a context manager, inside which the file is locked. A line that was cut by the end of a process is dropped.

    Args:
        path: continued if it exists.

    Attributes:
        settings: those in the file, None for a new one.
        records: those in the file, in the order in which they were added.

    Raises:
        Busy: on entering.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.settings: dict[str, Any] | None = None
        self.records: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise Busy from None
        self._file.seek(0)
        lines, whole = [], 0
        for line in self._file:
            try:
                lines.append(json.loads(line) if line.endswith(b"\n") else None)
            except ValueError:
                lines.append(None)
            if not isinstance(lines[-1], dict):
                lines.pop()
                break
            whole += len(line)
        self._file.truncate(whole)
        if lines:
            self.settings, *self.records = lines
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Empty the file and write the settings."""
        self._file.truncate(0)
        self.settings, self.records = None, []
        self._write([settings])
        self.settings = dict(settings)

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records; they are on the disk when this returns."""
        self._write(records)
        self.records += map(dict, records)

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
