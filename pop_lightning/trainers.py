"""Lightning trainers for the stages of ``pop-fit``, made from the recipe's ``trainer`` section."""

from pathlib import Path

import lightning
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pop_lightning.errors import InputError
from pop_lightning.recipe import Recipe

# They would cut the rows or steps of every stage alike.
_CUTTING = ("limit_train_batches", "limit_val_batches", "fast_dev_run", "max_steps", "max_epochs", "max_time")


class Trainers:
    """A trainer per stage, all from one recipe.

    Attributes:
        device: where they run; the base is loaded there.

    Raises:
        InputError: there is no such device, more than one, or a key that would cut the rows of a stage.
    """

    def __init__(self, recipe: Recipe, output: Path):
        self.recipe, self.output = recipe, output
        given = recipe.trainer
        for key in _CUTTING:
            if given.get(key) not in (None, False, -1):
                raise InputError(
                    f"trainer.{key} is {given[key]!r}, which would cut the rows or steps of every stage: leave it out; "
                    "data.limit and projection.steps are the keys for that."
                )
        trainer = _lightning_trainer(recipe.trainer_arguments())
        if trainer.world_size != 1:
            raise InputError(
                f"trainer.devices {given.get('devices')!r} asks for {trainer.world_size} processes, and pop-fit runs "
                "in one: set trainer.devices to 1."
            )
        self.device: torch.device = trainer.strategy.root_device

    def make(self, what: str, *callbacks: lightning.Callback, **overrides) -> "Trainer":
        """A trainer for the stage ``what``, which is printed; ``overrides`` are arguments of ``lightning.Trainer``."""
        arguments = self.recipe.trainer_arguments()
        arguments["callbacks"] = [*callbacks, *(arguments.get("callbacks") or [])]
        arguments |= {
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "default_root_dir": str(self.output),
        } | overrides
        print(f"{what} ...", flush=True)
        return Trainer(_lightning_trainer(arguments))


class Trainer:
    """A Lightning trainer whose interrupts stay interrupts: Lightning itself turns Ctrl-C into exit code 1."""

    def __init__(self, trainer: lightning.Trainer):
        self._trainer = trainer

    def fit(self, *args, **kwargs):
        return self._call(self._trainer.fit, *args, **kwargs)

    def validate(self, *args, **kwargs):
        return self._call(self._trainer.validate, *args, **kwargs)

    def save_checkpoint(self, path: Path) -> None:
        self._trainer.save_checkpoint(path)

    def _call(self, method, *args, **kwargs):
        try:
            result = method(*args, **kwargs)
        except SystemExit as stop:
            if self._trainer.interrupted:
                raise KeyboardInterrupt from stop
            raise
        if self._trainer.interrupted:
            raise KeyboardInterrupt
        return result


def _lightning_trainer(arguments: dict) -> lightning.Trainer:
    try:
        return lightning.Trainer(**{key: value for key, value in arguments.items() if value is not None})
    except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"the trainer section does not fit this machine: {first}") from error
