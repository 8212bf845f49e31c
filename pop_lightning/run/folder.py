"""The output folder of one ``pop-fit`` run: opening it, its lock, and the state that a resumed run finds in it.

The pipeline asks here for the results of earlier stages. Each stage leaves one complete file (``state/`` for what only
a resumed run reads), so that a run can be killed anywhere and resumed; a file that cannot be read counts as not
written. Of several processes only the first one writes, and what it reads counts for all; the others read large files
themselves, so the folder must be one that all of them see.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError, safe_open

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.core.files import (
    is_unfinished,
    read_checked_json,
    remove_unfinished,
    write_checked_json,
    write_problem,
    write_whole,
)
from pop_lightning.core.plan import Choice
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.projections import SELECTOR, KVProjections
from pop_lightning.run.recipe import Recipe
from pop_lightning.run.resume import refused_changes


class RunFolder:
    """Open ``recipe.output``: new, resumed or replaced. What ``overwrite`` replaces waits aside for :meth:`settle`.

    A lock on the folder is held until :meth:`at_work` ends, or the process does, however it ends.

    Raises:
        InputError: the folder holds something else, another run or one at work, or cannot be written.
    """

    def __init__(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False):
        self.root = Path(recipe.output)
        self.state = self.root / "state"
        self._held: IO[str] | None = None
        try:
            distributed.from_first(lambda: self._open(recipe, resume, overwrite))
        except BaseException:
            self._let_go()
            raise
        with self.at_work(to_the_end=False):
            problem = None
            if not (self.root / "recipe.yaml").is_file():
                problem = (
                    f"output {self.root} does not show what the first process wrote there: it must be on a file "
                    "system that every node mounts; choose another with --output"
                )
            distributed.stop_together(problem)

    def _open(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        try:
            self._enter(recipe, resume, overwrite)
        except OSError as error:
            raise InputError(
                f"output {self.root} cannot be written ({error.strerror}); choose another with --output."
            ) from error

    def _enter(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"output {self.root} is a file; name a folder.")
        stored = self.root / "recipe.yaml"
        if self.root.is_dir() and not self._blank():
            if overwrite:
                self._set_aside()
            elif not resume:
                raise InputError(f"output {self.root} exists already; give --resume, --overwrite or another --output.")
            else:
                self._hold()
                self._check_recipe(stored, recipe)
        self.state.mkdir(parents=True, exist_ok=True)
        if self._held is None:
            self._hold()
        remove_unfinished(self.root)
        write_whole(stored, recipe.save)

    def _check_recipe(self, stored: Path, recipe: Recipe) -> None:
        try:
            before = yaml.safe_load(stored.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            before = None
        if not isinstance(before, dict):
            raise InputError(f"output {self.root} has no recipe.yaml that can be read: --overwrite it.")
        now = json.loads(json.dumps(recipe.to_dict(), default=str))
        refused = refused_changes(before, now, lambda pattern: any(self.root.glob(pattern)))
        if refused:
            raise InputError(
                f"output {self.root} was started with another recipe: {'; '.join(refused)}. Resume it with the "
                "value it was started with, or --overwrite it."
            )

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def __str__(self) -> str:
        return str(self.root)

    # --- the lock -------------------------------------------------------------------------------------------------

    @property
    def _lock(self) -> Path:
        return self.state / ".lock"

    def _hold(self) -> None:
        """Lock the folder; the kernel lets go where the process ends, however it ends.

        Raises:
            InputError: another run holds it.
        """
        self.state.mkdir(exist_ok=True)
        file = self._lock.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise InputError(
                f"output {self.root} belongs to a run at work ({holder}): wait for it, stop it, or choose another with "
                "--output."
            ) from error
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._held = file

    def _let_go(self) -> None:
        if self._held is not None:
            if self._is_ours():
                self._lock.unlink()
            self._held.close()
            self._held = None

    def _is_ours(self) -> bool:
        """Whether the folder is still the one that was opened: it may be removed, and even made anew, meanwhile."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._held.fileno()), self._lock.stat())
        return False

    @contextmanager
    def at_work(self, *, to_the_end: bool = True):
        """Inside, the run is at work: errors of the disk become a sentence, and at the end the lock is let go.

        Where nothing was measured, a failure leaves no folder in the way of the corrected command, and the run
        that this one was to replace comes back.
        """
        failed = True
        try:
            yield
            failed = False
        except (Exception, KeyboardInterrupt) as error:
            problem = None if isinstance(error, (InputError, KeyboardInterrupt)) else write_problem(error, self.root)
            if problem is None and not isinstance(error, (InputError, KeyboardInterrupt)):
                raise
            self._undo()
            if problem is None:
                raise
            raise InputError(
                f"output {self.root} cannot be written any more ({problem}): make it writable or make room, then give "
                "--resume."
            ) from error
        finally:
            if failed or to_the_end:
                self._let_go()

    def _undo(self) -> None:
        if not distributed.is_first() or (self._held is not None and not self._is_ours()):
            return
        found = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*")}
        if found <= {"recipe.yaml", "state", "state/data.json", "state/.lock"}:
            shutil.rmtree(self.root, ignore_errors=True)
            if self._aside.is_dir():
                os.rename(self._aside, self.root)

    # --- opening --------------------------------------------------------------------------------------------------

    def _blank(self) -> bool:
        """Whether there is nothing but what a run that was killed while opening the folder left."""
        return all(
            path in (self.state, self._lock) or (is_unfinished(path) and path.name.endswith(".recipe.yaml"))
            for path in self.root.rglob("*")
        )

    @property
    def _aside(self) -> Path:
        """Where a run that ``--overwrite`` replaces waits until the new one's input was found good."""
        return self.root.absolute().with_name(f".{self.root.absolute().name}.replaced")

    def _set_aside(self) -> None:
        if not ((self.root / "recipe.yaml").is_file() and self.state.is_dir()):
            raise InputError(f"output {self.root} holds files that --overwrite would delete, and is not a pop-fit run.")
        self._hold()  # not under a run at work
        try:
            self._lock.unlink()
            if self._aside.is_dir() and not (self.root / "importance.json").is_file():
                shutil.rmtree(self.root)  # it replaced the run that waits aside and measured nothing: that one stays
            else:
                shutil.rmtree(self._aside, ignore_errors=True)
                os.rename(self.root, self._aside)
        except OSError as error:
            raise InputError(f"output {self.root} cannot be replaced ({error.strerror}).") from error
        finally:
            self._let_go()

    def settle(self) -> None:
        """The input was found good: what this run replaces can go."""
        if distributed.is_first():
            shutil.rmtree(self._aside, ignore_errors=True)

    # --- what stages leave ---------------------------------------------------------------------------------------

    def once(self, name: str, compute: Callable[[], dict], asked: Any = None) -> dict:
        """What the JSON file ``name`` holds; where the stage has not ended yet, every process runs ``compute``.

        Args:
            asked: what the answer depends on, as plain data; a file that answers something else is made anew.
        """
        asked = json.loads(json.dumps(asked))
        found = self.read(name)
        if not found or found.get("asked") != asked:
            found = compute()
            self.write(name, found if asked is None else found | {"asked": asked})
            found = self.read(name)
        return found

    def read(self, name: str) -> dict:
        """What the JSON file ``name`` holds; empty where there is none, or none that can be read."""
        return distributed.from_first(lambda: read_checked_json(self.root / name))

    def write(self, name: str, content: dict) -> None:
        if distributed.is_first():
            self._check_place()
            write_checked_json(self.root / name, content)

    def _check_place(self) -> None:
        if self._held is not None and not self._is_ours():
            raise InputError(
                f"output {self.root} was removed or replaced while the run was at work, so nothing more is written; "
                "start it anew."
            )

    def has_results(self) -> bool:
        """Whether a stage has left something that depends on the base and the rows."""
        own = {"data.json", self._lock.name}
        return distributed.from_first(
            lambda: (
                any((self.root / name).exists() for name in ("importance.json", "metrics.json"))
                or any(path.name not in own for path in self.state.iterdir())
            )
        )

    def has_projections(self, choice: Choice) -> bool:
        """Whether what was fitted under ``choice`` is there and whole."""
        return choice.projection == "reuse" or distributed.from_first(lambda: _is_whole(self._projections(choice)))

    def write_projections(self, choice: Choice, projections: KVProjections) -> None:
        self._write_tensors(self._projections(choice), projections.fitted_state())

    def _write_tensors(self, path: Path, state: dict[str, torch.Tensor]) -> None:
        if distributed.is_first():
            self._check_place()
            metadata = {"sha256": _digest(path.name, state)}  # one entry: their order is not fixed
            write_whole(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata=metadata))
        distributed.barrier()  # the others may read it next

    def read_projections(self, decoder: Decoder, choice: Choice) -> KVProjections:
        """What was fitted under ``choice``; reuse is made from the base's own weights."""
        if choice.projection == "reuse":
            return KVProjections(decoder, choice.depth)
        state = safetensors.torch.load_file(self._projections(choice))
        return KVProjections.from_state(decoder, choice.depth, choice.projection, state)

    def has_selector(self, depth: int) -> bool:
        """Whether the selector that was fitted for a depth is there and whole."""
        return distributed.from_first(lambda: _is_whole(self._selector(depth)))

    def write_selector(self, depth: int, weight: torch.Tensor) -> None:
        self._write_tensors(self._selector(depth), {SELECTOR: weight})

    def read_selector(self, depth: int) -> torch.Tensor:
        return safetensors.torch.load_file(self._selector(depth))[SELECTOR]

    def _selector(self, depth: int) -> Path:
        return self.state / f"selector-depth{depth}.safetensors"

    def _projections(self, choice: Choice) -> Path:
        return self.state / f"{file_name(choice)}.safetensors"


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get("sha256")
        return stated == _digest(path.name, safetensors.torch.load_file(path))
    except (OSError, SafetensorError):
        return False


def _digest(file: str, state: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256(file.encode())
    for name in sorted(state):
        found.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}".encode())
        found.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def file_name(choice: Choice) -> str:
    """The name, without its ending, that files about a choice have."""
    steps = f"-steps{choice.steps}" if choice.steps else ""
    return f"{choice.projection}-depth{choice.depth}{steps}"
