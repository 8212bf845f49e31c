"""The loggers of a run: made once, and shared by the trainers of all stages.

A trainer per stage would otherwise begin a new version of the log for each. Every stage logs under its own name, and at
the end of the run its curves are logged over depth and layer.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger

from pop_lightning.core.errors import InputError, first_sentence

_COMPARED = ("loss", "bound", "kl", "agreement", "nll_increase", "exact_match")


def loggers_of(given: Logger | list[Logger] | bool | None, output: str | Path) -> list[Logger]:
    """The loggers that ``trainer.logger`` names; ``true`` is TensorBoard, in ``tensorboard/`` of the run."""
    if isinstance(given, bool) or given is None:
        return [TensorBoardLogger(output, name="", version="tensorboard")] if given else []
    return given if isinstance(given, list) else [given]


class StageLogger(Logger):
    """A run's logger as the trainer of one stage sees it: figures get the stage's name in front.

    Hyperparameters are the recipe's, which the run itself logs; the log ends with the run, not with the stage.
    """

    def __init__(self, logger: Logger, stage: str):
        super().__init__()
        self.logger, self.stage = logger, stage

    def __getattr__(self, name: str) -> Any:
        if name == "logger":  # while a copy is made, before there is one
            raise AttributeError(name)
        return getattr(self.logger, name)

    @property
    def experiment(self) -> Any:
        """The logger's own, which the first access begins.

        Raises:
            InputError: it cannot begin, for example because a service needs an account.
        """
        try:
            return self.logger.experiment
        except AttributeError:
            raise  # a logger without one
        except Exception as error:
            name, advice = type(self.logger).__name__, "change trainer.logger, or leave it out"
            raise InputError(
                f"{name} cannot begin a log: {first_sentence(error).removesuffix('.')}; {advice}."
            ) from error

    @property
    def name(self) -> str | None:
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        return self.logger.save_dir

    @property
    def root_dir(self) -> str | None:
        return self.logger.root_dir

    @property
    def log_dir(self) -> str | None:
        return self.logger.log_dir

    @property
    def group_separator(self) -> str:
        return self.logger.group_separator

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        named = {f"{self.stage}/{name}": value for name, value in metrics.items() if name != "epoch"}
        self.logger.log_metrics(named, step)

    def log_hyperparams(self, *_, **__) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass


def figures(metrics: Mapping[str, Any], importance: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """Every figure of a run with the step it is logged at: a layer for importance, a depth for all others.

    Args:
        metrics, importance: the contents of ``metrics.json`` and ``importance.json``.
    """
    for layer, (prefill, decode) in enumerate(zip(importance["prefill"], importance["decode"], strict=True)):
        yield layer, {"layers/prefill_importance": prefill, "layers/decode_importance": decode}
    for entry in metrics["curve"]:
        yield entry["depth"], _numbers(f"curve/{entry['projection']}", entry)
    for entry in metrics["comparison"]:
        yield entry["depth"], _numbers(f"comparison/{entry['name']}", entry)
    for verdict in metrics["verification"]:
        yield verdict["depth"], {"verified/loss": verdict["value"], "verified/bound": verdict["bound"]}
    counted, ttft = metrics["arithmetic"], metrics["ttft"] or {}
    found = {"speedup/counted": counted["ratio"], "speedup/measured": ttft.get("ratio")}
    found |= {f"ttft/{name}": ttft.get(name) for name in ("full_ms", "pruned_ms")}
    yield counted["depth"], {name: value for name, value in found.items() if value is not None}


def _numbers(prefix: str, entry: Mapping[str, Any]) -> dict[str, float]:
    return {f"{prefix}/{name}": entry[name] for name in _COMPARED if entry.get(name) is not None}
