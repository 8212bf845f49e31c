"""The output folder of one ``pop-fit`` run: opening it, and the state that a resumed run finds in it.

The pipeline asks here for whatever a stage left behind. Each stage leaves one complete file (``state/`` for what only a
resumed run reads), so that a run can be killed anywhere and resumed. Of several processes the first one alone writes,
and what it finds goes for all; the others read large files themselves, so the folder must be one that all of them see.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.core.files import is_unfinished, remove_unfinished, write_json, write_whole
from pop_lightning.core.plan import Choice
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.run.recipe import Recipe


class RunFolder:
    """Open ``recipe.output``: new, resumed or replaced. What ``overwrite`` replaces waits aside for :meth:`settle`.

    Raises:
        InputError: the folder holds something else, another run, or cannot be written.
    """

    def __init__(self, recipe: Recipe, *, resume: bool = False, overwrite: bool = False):
        self.root = Path(recipe.output)
        self.state = self.root / "state"
        distributed.from_first(lambda: self._open(recipe, resume, overwrite))
        with self.undone_on_bad_input():
            problem = None
            if not (self.root / "recipe.yaml").is_file():
                problem = (
                    f"output {self.root} does not show what the first process wrote there: it must lie on a file "
                    "system that every node mounts; choose another with --output"
                )
            distributed.stop_together(problem)

    def _open(self, recipe: Recipe, resume: bool, overwrite: bool) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"output {self.root} is a file; name a folder.")
        stored = self.root / "recipe.yaml"
        if self.root.is_dir() and not self._blank():
            if overwrite:
                self._set_aside()
            elif not resume:
                raise InputError(f"output {self.root} exists already; give --resume, --overwrite or another --output.")
            elif not stored.is_file() or stored.read_text(encoding="utf-8") != recipe.to_yaml():
                raise InputError(
                    f"output {self.root} was started with another recipe; resume it with its own or --overwrite it."
                )
        try:
            self.state.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.root)
            write_whole(stored, recipe.save)
        except OSError as error:
            raise InputError(
                f"output {self.root} cannot be written ({error.strerror}); choose another with --output."
            ) from error

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def __str__(self) -> str:
        return str(self.root)

    # --- opening --------------------------------------------------------------------------------------------------

    def _blank(self) -> bool:
        """Whether nothing stands here but what a run that was killed while opening the folder left."""
        return all(
            path == self.state or (is_unfinished(path) and path.name.endswith(".recipe.yaml"))
            for path in self.root.rglob("*")
        )

    @property
    def _aside(self) -> Path:
        """Where a run that ``--overwrite`` replaces waits until the new one's input was found good."""
        return self.root.absolute().with_name(f".{self.root.absolute().name}.replaced")

    def _set_aside(self) -> None:
        if not ((self.root / "recipe.yaml").is_file() and self.state.is_dir()):
            raise InputError(f"output {self.root} holds files that are no pop-fit run; --overwrite would delete them.")
        try:
            if self._aside.is_dir() and not (self.root / "importance.json").is_file():
                shutil.rmtree(self.root)  # it replaced the run that stands aside and measured nothing: that one stays
                return
            shutil.rmtree(self._aside, ignore_errors=True)
            os.rename(self.root, self._aside)
        except OSError as error:
            raise InputError(f"output {self.root} cannot be replaced ({error.strerror}).") from error

    def settle(self) -> None:
        """The input was found good: what this run replaces can go."""
        if distributed.is_first():
            shutil.rmtree(self._aside, ignore_errors=True)

    @contextmanager
    def undone_on_bad_input(self):
        """Where nothing was measured, a failure leaves no folder in the way of the corrected command.

        The run that this one was to replace comes back.
        """
        try:
            yield
        except (InputError, KeyboardInterrupt):
            if not distributed.is_first():
                raise
            found = {path.relative_to(self.root).as_posix() for path in self.root.rglob("*")}
            if found <= {"recipe.yaml", "state", "state/data.json"}:
                shutil.rmtree(self.root)
                if self._aside.is_dir():
                    os.rename(self._aside, self.root)
            raise

    # --- what stages leave behind -----------------------------------------------------------------------------------

    def once(self, name: str, compute: Callable[[], dict]) -> dict:
        """What the JSON file ``name`` holds; where the stage has not ended yet, every process runs ``compute``."""
        if not distributed.from_first((self.root / name).is_file):
            self.write(name, compute())
        return self.read(name)

    def read(self, name: str) -> dict:
        """What the JSON file ``name`` holds; empty where there is none."""
        path = self.root / name
        return distributed.from_first(lambda: json.loads(path.read_text()) if path.is_file() else {})

    def write(self, name: str, content: dict) -> None:
        if distributed.is_first():
            write_json(self.root / name, content)

    def has_projections(self, choice: Choice) -> bool:
        return distributed.from_first(self._projections(choice).is_file)

    def write_projections(self, choice: Choice, projections: KVProjections) -> None:
        if distributed.is_first():
            state = projections.fitted_state()
            write_whole(self._projections(choice), lambda temporary: safetensors.torch.save_file(state, temporary))
        distributed.barrier()  # the others may read it next

    def read_projections(self, decoder: Decoder, choice: Choice) -> KVProjections:
        """What was fitted under ``choice``; reuse is made from the base's own weights."""
        if choice.projection == "reuse":
            return KVProjections(decoder, choice.depth)
        state = safetensors.torch.load_file(self._projections(choice))
        return KVProjections.from_state(decoder, choice.depth, choice.projection, state)

    def _projections(self, choice: Choice) -> Path:
        return self.state / f"{file_name(choice)}.safetensors"


def file_name(choice: Choice) -> str:
    """The name, without its ending, that files about a choice have."""
    steps = f"-steps{choice.steps}" if choice.steps else ""
    return f"{choice.projection}-depth{choice.depth}{steps}"
