"""Lightning trainers for the stages of ``pop-fit``, made from the recipe's ``trainer`` section.

The pipeline asks here for everything that depends on where it runs: the processes, the base on its device or in shards,
a trainer for a pass over rows, and one whole training with its checkpoints.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError, first_sentence
from pop_lightning.core.files import restore_folder
from pop_lightning.models.loading import stored_dtype
from pop_lightning.run import launch, strategies
from pop_lightning.run.loggers import StageLogger, figures, loggers_of
from pop_lightning.run.progress import Progress, StageBar
from pop_lightning.run.recipe import Recipe

# They would cut the rows or steps of every stage alike.
_CUTTING = (
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "fast_dev_run",
    "max_steps",
    "max_epochs",
    "max_time",
)


def check_keys(given: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` for keys of ``trainer`` that no machine would make right."""
    for key in _CUTTING:
        if given.get(key) not in (None, False, -1):
            raise InputError(
                f"trainer.{key} is {given[key]!r}, which would cut the rows or steps of every stage: leave it out; "
                "data.limit and projection.steps are the keys for that."
            )
    strategies.check_name(given.get("strategy") or "auto")


def check_placement(recipe: Recipe) -> None:
    """Raise :class:`InputError` where a run of several processes has a base that ``model.device_map`` places."""
    if recipe.model.device_map is not None:
        raise InputError(
            f"model.device_map {recipe.model.device_map!r} cannot be combined with trainer.strategy "
            f"{recipe.trainer.get('strategy') or 'auto'}, which places the base itself: leave model.device_map out."
        )


class Trainers:
    """A trainer per stage, all from one recipe.

    Args:
        progress: of the run, which names its stages.

    Attributes:
        device: where this process's stages run.
        loggers: of the whole run; every stage logs to them under its own name.

    Raises:
        InputError: there is no such device or strategy, or a key would cut the rows of a stage.
    """

    def __init__(self, recipe: Recipe, progress: Progress | None = None):
        self.recipe, self.progress = recipe, progress or Progress()
        self.loggers: list[Logger] | None = None  # made with the first trainer
        given = recipe.trainer
        check_keys(given)
        self.strategy = given.get("strategy") or "auto"
        strategies.check(self.strategy, given.get("accelerator"))
        self._plain = "ddp" if self.strategy in strategies.DEEPSPEED else self.strategy
        # Made as the stages' own are: what does not fit is refused before the base is loaded.
        probe = self._lightning_trainer([], strategy=self._plain)
        self.device: torch.device = probe.strategy.root_device
        self._ranked = probe.strategy if isinstance(probe.strategy, DDPStrategy) else None
        launch.check_number(probe.strategy)
        if self._ranked:
            check_placement(recipe)
        self._sharded = strategies.ShardedBase(self.strategy) if strategies.shards_base(self.strategy) else None

    @property
    def starts_processes(self) -> bool:
        """Whether the run needs processes that nobody has started: :meth:`start` then runs all of it in them."""
        return launch.starts_processes(self._ranked)

    def start(self, *flags: str) -> int:
        """See :func:`pop_lightning.run.launch.start`."""
        return launch.start(self._ranked, self.recipe, *flags)

    def log_recipe(self) -> None:
        """Log the recipe as the run's hyperparameters."""
        for logger in self.loggers:
            logger.log_hyperparams(self.recipe.to_dict())

    def log_results(self, metrics: Mapping[str, Any], importance: Mapping[str, Any]) -> None:
        """Log the figures of a run that has ended."""
        for logger in self.loggers:
            for step, named in figures(metrics, importance):
                logger.log_metrics(named, step)

    @contextlib.contextmanager
    def logs(self):
        """Inside, stages log; at the end the loggers write what they hold and close."""
        status = "failed"
        try:
            yield
            status = "success"
        finally:
            for logger in self.loggers:
                # Of a run that failed, its own error is what the user needs to see.
                with contextlib.suppress(*[Exception] if status == "failed" else []):
                    logger.finalize(status)

    @contextlib.contextmanager
    def processes(self):
        """Inside, every process of the run is there; see :func:`pop_lightning.run.launch.joined`."""
        if self._ranked is None:
            yield
            return
        with launch.joined(self._ranked):
            try:
                yield
            finally:
                if self._sharded is not None:
                    self._sharded.close()

    def load(self, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The base where the stages run: on this process's device, as ``model.device_map`` says, or in shards."""
        if self._sharded is not None:
            model = self.recipe.model
            dtype = distributed.first_then_others(
                lambda: stored_dtype(model.base, model.dtype, model.revision, model.trust_remote_code)
            )
            return self._sharded.load(load, dtype)
        model = distributed.first_then_others(load)
        return model if self.recipe.model.device_map is not None else model.to(self.device)

    @property
    def shards_base(self) -> bool:
        return self._sharded is not None

    def make(self, what: str, *callbacks: lightning.Callback) -> "Trainer":
        """A trainer for a pass over rows; ``what`` names it to the user."""
        # Settings of optimizer steps would be refused or warned about; the precision is training's too: sums
        # and measurements are made in the base's own dtype and float32.
        return self._make(
            what,
            callbacks,
            strategy=self._plain,
            accumulate_grad_batches=1,
            gradient_clip_val=None,
            precision="32-true",
        )

    def train(
        self,
        what: str,
        module: lightning.LightningModule,
        loader: Callable[[int], DataLoader],
        *,
        steps: int,
        rounds: int,
        checkpoints: Path,
        every: int,
    ) -> None:
        """Train ``module`` for ``steps`` optimizer steps, from the last checkpoint where there is one.

        Args:
            loader: endless batches from the one with the given number on.
            rounds: how often the training was or will be stopped and resumed, this time included.
            checkpoints: a folder that only this training uses.
            every: steps between checkpoints.
        """
        last = checkpoints / "last.ckpt"
        if distributed.is_first():
            restore_folder(last)
        start = distributed.from_first(lambda: _step_of(last))
        keep = _Checkpoints(checkpoints, every)
        own = self.recipe.trainer_arguments(without=("logger", "callbacks"))
        trainer = self._make(
            what + (f", from step {start}" if start else ""),
            [keep],
            strategy=strategies.for_training(self.strategy),
            max_steps=steps,
            max_epochs=rounds,  # the rows have no end, so a fit is one epoch: one per round
            enable_checkpointing=True,
            plugins=strategies.whole_checkpoints(self.strategy, own.get("plugins")),
            logged_as=f"training/{checkpoints.name}",
        )
        batches = start * (self.recipe.trainer.get("accumulate_grad_batches") or 1)  # a step reads several
        trainer.fit(module, loader(batches), ckpt_path=last if start else None, weights_only=True)

    def _make(self, what: str, callbacks, **overrides) -> "Trainer":
        own = [*callbacks, self._sharded] if self._sharded is not None else callbacks
        trainer = self._lightning_trainer(own, what, **overrides)
        self.progress.say(what, bar=trainer.progress_bar_callback is not None)
        return Trainer(trainer)

    def _lightning_trainer(
        self, own: Sequence[lightning.Callback], what: str = "", logged_as: str | None = None, **overrides
    ) -> lightning.Trainer:
        try:
            # This makes what the recipe names by class: callbacks for every trainer anew, loggers once.
            arguments = self.recipe.trainer_arguments(without=() if self.loggers is None else ("logger",))
            if self.loggers is None:
                self.loggers = loggers_of(arguments["logger"], self.recipe.output)
            stage = logged_as or self.progress.current
            arguments["logger"] = [StageLogger(logger, stage) for logger in self.loggers] or False
            given = arguments.get("callbacks") or []
            given = given if isinstance(given, list) else [given]  # as Lightning accepts them
            if not any(isinstance(each, ProgressBar) for each in given):
                shown = self.progress.interactive and arguments.get("enable_progress_bar") is not False
                arguments["enable_progress_bar"] = shown
                own = [*own, StageBar(self.progress.name(what))] if shown else own
            arguments["callbacks"] = [_SameSigterm(), *own, *given]
            arguments |= {
                "enable_checkpointing": False,
                "enable_model_summary": False,
                "default_root_dir": Path(self.recipe.output),
                "use_distributed_sampler": False,  # the loaders give each process its share, and no row twice
                "inference_mode": False,  # what is made in one stage is trained or differentiated in another
            } | overrides
            return lightning.Trainer(**{key: value for key, value in arguments.items() if value is not None})
        except (MisconfigurationException, ImportError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the trainer section does not fit this machine: {first_sentence(error)}") from error


class _Checkpoints(ModelCheckpoint):
    """``last.ckpt``, anew every so many steps and at the end of a training, from which a further round continues."""

    def __init__(self, folder: Path, every: int):
        super().__init__(folder, save_last=True, every_n_train_steps=every, save_top_k=0, enable_version_counter=False)

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")


class _SameSigterm(lightning.Callback):
    """SIGTERM does inside a trainer what it does outside.

    Lightning's own handler only sets a flag, which evaluation never reads, and of several processes it first broadcasts
    it, which a process in another collective at that moment never joins.
    """

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        self._outside = signal.getsignal(signal.SIGTERM)

    def _restore(self, *_) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._outside)

    on_train_start = on_validation_start = on_test_start = _restore


class Trainer:
    """A Lightning trainer whose interrupts stay interrupts: Lightning itself makes ``SystemExit(1)`` of them."""

    def __init__(self, trainer: lightning.Trainer):
        self._trainer = trainer

    def fit(self, *args, **kwargs):
        return self._call(self._trainer.fit, *args, **kwargs)

    def validate(self, *args, **kwargs):
        return self._call(self._trainer.validate, *args, **kwargs)

    def test(self, *args, **kwargs):
        return self._call(self._trainer.test, *args, **kwargs)

    def _call(self, method, *args, **kwargs):
        try:
            return method(*args, **kwargs)
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):
                raise stop.__context__ from None
            raise


def _step_of(checkpoint: Path) -> int:
    """The step from which a training continues: 0 where there is no checkpoint, or none that can be read."""
    try:
        return strategies.training_step_of(checkpoint) if checkpoint.exists() else 0
    except Exception:  # reading damaged bytes can raise anything
        return 0
