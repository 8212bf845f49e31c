"""What a person sees of a run at work: the stage, its number, its speed, and the time left.

On a terminal and in a notebook every pass over rows has a bar. Elsewhere (logs, pipes) nothing is printed about stages
unless ``--verbose`` asks for it: a line when each begins.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm  # in a notebook a widget, where ipywidgets is installed; elsewhere the plain bar

from pop_lightning.core.notebook import in_notebook

_WIDEST = 60  # characters of a bar's name


class Progress:
    """The stages of a run, the one at work, and the seconds that each needed.

    Args:
        stages: names of all stages, in order; empty for work that has no stages.
        verbose: print a line when a part of a stage begins, on a terminal or not.
    """

    def __init__(self, stages: Sequence[str] = (), verbose: bool = False):
        self.stages, self.verbose = list(stages), verbose
        self.seconds: dict[str, float] = {}
        self._number = 0

    @property
    def interactive(self) -> bool:
        """Whether standard output is a terminal or a notebook's cell, which can show bars."""
        return sys.stdout.isatty() or in_notebook()

    @property
    def current(self) -> str:
        """The stage at work; ``run`` outside of all."""
        return self.stages[self._number - 1] if self._number else "run"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, ``name`` is the stage at work."""
        self._number, start = self.stages.index(name) + 1, time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def name(self, what: str) -> str:
        """``what`` with the number of the stage: ``stage 2 of 6: scoring layers``."""
        return f"stage {self._number} of {len(self.stages)}: {what}" if self._number else what

    def say(self, what: str, bar: bool = False) -> None:
        """Print that ``what`` begins.

        Args:
            bar: whether a bar with the same name follows, which makes the line superfluous.
        """
        if self.verbose or (self.interactive and not bar):
            print(f"{self.name(what)} ...", flush=True)

    def total(self) -> str:
        """The time of all stages so far, and of each that needed a second: ``2 min 10 s (search 1 min 20 s, ...)``."""
        parts = ", ".join(f"{name} {duration(spent)}" for name, spent in self.seconds.items() if spent >= 1)
        return f"{duration(sum(self.seconds.values()))}{f' ({parts})' if parts else ''}"


def duration(seconds: float) -> str:
    """``8 s``, ``2 min 05 s``, ``3 h 20 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


class StageBar(ProgressBar):
    """One bar with the stage's name, the time left and tokens per second; a training counts its steps.

    Args:
        name: from :meth:`Progress.name`; details after a colon are left out where it is long.
    """

    def __init__(self, name: str):
        super().__init__()
        head, _, details = name.partition(": ")
        self.name = f"{head}: {details.partition(':')[0]}" if len(name) > _WIDEST else name
        self._shown, self._tokens = True, 0
        self._bar: tqdm | None = None

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def _open(self, total: int, first: int = 0) -> None:
        self._tokens = 0
        self._bar = tqdm(
            desc=self.name,
            total=total,
            initial=first,
            disable=not self._shown,
            file=sys.stdout,
            dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def _advance(self, number: int, batch: dict, metrics: Mapping[str, Any]) -> None:
        if not self._shown:
            return
        self._tokens += int(batch["attention_mask"].sum())
        rate = self._tokens / max(self._bar.format_dict["elapsed"], 1e-3)
        figures = [f"{name} {float(value):.4g}" for name, value in metrics.items()]
        self._bar.set_postfix_str(", ".join([f"{rate:,.0f} tokens/s", *figures]), refresh=False)
        self._bar.update(number - self._bar.n)

    def _close(self, *_) -> None:
        self._bar.close()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._open(trainer.max_steps, trainer.global_step)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._advance(trainer.global_step, batch, trainer.progress_bar_metrics)

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._open(sum(trainer.num_val_batches))

    def on_test_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._open(sum(trainer.num_test_batches))

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._advance(batch_idx + 1, batch, {})

    on_test_batch_end = on_validation_batch_end
    on_train_end = on_validation_end = on_test_end = _close
