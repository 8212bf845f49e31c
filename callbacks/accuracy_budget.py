"""AccuracyBudget: select variants on the search split, and test them once on the verify split.

``trainer.validate(evaluation)`` measures an :class:`~pop_lightning.evaluation.evaluate.Evaluation` and decides what to
verify; ``trainer.test(evaluation)`` verifies it in a fixed sequence and chooses the depth. ``pop-fit`` does its own
search, because it trains in between, and passes the sequence to this callback.
"""

import sys
from collections.abc import Sequence
from typing import Any

import lightning
from tqdm.auto import tqdm

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import USUAL, Kept
from pop_lightning.evaluation import search
from pop_lightning.evaluation.evaluate import Evaluation
from pop_lightning.evaluation.losses import BudgetMetric, metric_named
from pop_lightning.evaluation.metrics import prompt_losses
from pop_lightning.evaluation.search import Measured
from pop_lightning.evaluation.verdicts import Verdict, fixed_sequence, judge

_USED = (
    "the verify split was already used, or the variants are not those that the search selected: testing again would "
    "invalidate the bound. Start again with a new AccuracyBudget and a new verify split."
)


class AccuracyBudget(lightning.Callback):
    """Pick the deepest pruning that loses at most ``max_drop`` at ``confidence``.

    With ``Trainer(callbacks=[AccuracyBudget(), ExportArtifact("artifact")])``, run ``validate`` on the search split
    first (several calls add up; variants are identified by name), then ``test`` on the verify split once. All
    processes make the same decisions.

    Args:
        metric: ``agreement``, ``nll_increase`` or ``exact_match``; ``metric_named("nll_increase", cap=0.2)`` clips at
            0.2 nats instead of 1.
        max_drop: absolute fraction for rates, nats per response token for NLL. None sets no limit: the variant with
            the smallest loss is chosen, and verified for its loss and bound.
        confidence: of the bound on the verify split.
        min_pruned: the fewest pruned layers that may be exported; usually at least 2, because pruning the last layer
            loses nothing.
        verify_prompts: number of prompts in the verify split; the data module's unless given.
        sequence: names of the variants to verify, shallowest pruning first, if the search was done elsewhere.

    Attributes:
        measured: the losses of every validated variant by name (:meth:`Evaluation.entries`).
        sequence: names of the variants to verify; None until something was validated.
        verdicts: of the verification so far, in the order of the sequence.
        decisions: one readable line per decision, also printed.

    Raises:
        InputError: there is no such metric, or ``confidence`` is not between 0 and 1.
    """

    def __init__(
        self,
        metric: str | BudgetMetric = "agreement",
        max_drop: float | None = 0.01,
        confidence: float = 0.95,
        min_pruned: int = 2,
        *,
        verify_prompts: int | None = None,
        sequence: Sequence[str] | None = None,
    ):
        self.metric = metric_named(metric)
        if not 0 < confidence < 1:
            raise InputError(f"confidence must be between 0 and 1, such as 0.95; found {confidence:g}.")
        self.max_drop, self.confidence, self.min_pruned = max_drop, confidence, min_pruned
        self.verify_prompts = verify_prompts
        self.measured: dict[str, dict[str, Any]] = {}
        self.sequence = None if sequence is None else list(sequence)
        self.verdicts: list[Verdict] = []
        self.decisions: list[str] = []
        self._searches = sequence is None
        self._testing: list[str] = []  # names of the variants of this test run
        self._budget = search.Budget(max_drop, self.metric, self._say)

    def _say(self, line: str) -> None:
        self.decisions.append(line)
        if distributed.is_first():
            tqdm.write(line)  # above a bar, which is still open at the end of an epoch
            sys.stdout.flush()

    # --- the search split -------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not isinstance(module, Evaluation) or not self._searches or self.verdicts:
            return
        entries = module.entries(self.metric, self.confidence, self._prompts(trainer))
        self.measured |= {name: entry for name, entry in entries.items() if not module.variants[name].is_ablation}
        layers = module.decoder.num_layers
        found: dict[int, list[str]] = {}
        for name, entry in self.measured.items():
            depth = entry["depth"]
            if layers - depth >= (1 if self.max_drop is None else self.min_pruned):
                found.setdefault(depth, []).append(name)
        if not found:
            raise InputError(
                f"no validated variant prunes at least {self.min_pruned} of {layers} layers: give the Evaluation a "
                "smaller depth, or the AccuracyBudget a smaller min_pruned."
            )
        best = {depth: self._best(found[depth]) for depth in sorted(found)}  # of equal losses the deepest pruning
        choices = search.finish(
            search.settle([Measured.of(self.measured[name]) for name in best.values()], self._budget)
        )
        self.sequence = [best[choice.depth] for choice in choices]

    def _best(self, names: list[str]) -> str:
        """Of one depth: the fewest tokens in full of those that keep the budget, or else the smallest loss."""
        measured = {name: Measured.of(self.measured[name]) for name in names}

        def tokens(name: str) -> int:
            plan = Kept.of(self.measured[name]).at(measured[name].choice.depth)
            return plan.boundary_of(USUAL) + plan.salient_of(USUAL)

        clearing = [name for name in names if self._budget.clears(measured[name])]
        fewest = min(map(tokens, clearing), default=None)
        considered = [name for name in clearing if tokens(name) == fewest] or names
        winner = self._budget.best(measured[name] for name in considered)
        return next(name for name in considered if measured[name] is winner)

    def _prompts(self, trainer: lightning.Trainer) -> int | None:
        if self.verify_prompts is None and hasattr(trainer.datamodule, "prompts_of"):
            return trainer.datamodule.prompts_of("verify")
        return self.verify_prompts

    # --- the verify split -------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Raise :class:`InputError` unless the module has the next variants of the sequence."""
        if not isinstance(module, Evaluation):
            return
        if self.sequence is None:
            raise InputError(
                "AccuracyBudget has nothing to verify: run trainer.validate(evaluation, ...) on the search split "
                "before trainer.test(evaluation, ...)."
            )
        if not self.sequence:
            raise InputError(
                f"no depth keeps the budget of {self.max_drop:g} on the search split, so there is nothing to verify: "
                "raise max_drop, or give the Evaluation larger depths."
            )
        waiting = self.sequence[len(self.verdicts) :]
        self._testing = [name for name in self.sequence if name in module.variants]
        if self.verified or not self._testing or self._testing != waiting[: len(self._testing)]:
            raise InputError(_USED)

    def on_test_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not isinstance(module, Evaluation):
            return
        losses = {
            module.variants[name].plan.depth: prompt_losses(module.rows(name), self.metric) for name in self._testing
        }
        if self.max_drop is None:
            self.verdicts += [judge(depth, losses[depth], self.metric, self.confidence, None) for depth in losses]
        else:
            self.verdicts += fixed_sequence(list(losses), losses, self.metric, self.max_drop, self.confidence)
        if self.verified:
            self.conclude()
        last = self.verdict or self.verdicts[-1]
        figures = {"depth": float(self.depth or 0), "loss": last.value, "bound": last.bound}
        self.log_dict({f"budget/{name}": value for name, value in figures.items()}, sync_dist=distributed.size() > 1)

    @property
    def verified(self) -> bool:
        """Whether the verification is complete: the whole sequence was tested, or a depth failed."""
        failed = any(verdict.passed is False for verdict in self.verdicts)
        return failed or len(self.verdicts) == len(self.sequence or ()) > 0

    @property
    def chosen(self) -> str | None:
        """The name of the deepest pruning that passed so far; None if none did."""
        passed = [verdict.passed is not False for verdict in self.verdicts]
        return self.sequence[sum(passed) - 1] if any(passed) else None

    @property
    def verdict(self) -> Verdict | None:
        """Of the deepest pruning that passed so far; None if none did."""
        return next((verdict for verdict in reversed(self.verdicts) if verdict.passed is not False), None)

    @property
    def depth(self) -> int | None:
        """The chosen depth."""
        return None if self.verdict is None else self.verdict.depth

    def promise(self) -> dict[str, Any] | None:
        """The verified loss and bound of the chosen depth, as plain data; None if none was chosen."""
        if self.verdict is None:
            return None
        return {
            "metric": self.metric.name,
            "value": self.verdict.value,
            "bound": self.verdict.bound,
            "rows": self.verdict.rows,
            "prompts": self.verdict.prompts,
            "confidence": self.confidence,
            "max_drop": self.max_drop,
            "cap": self.verdict.cap,
            "clipped": self.verdict.clipped,
        }

    def conclude(self) -> None:
        """Report all verdicts, including those from before an interruption, and the chosen depth."""
        for verdict in self.verdicts:
            outcome = {True: ": passed", False: ": failed, stop", None: ""}[verdict.passed]
            value, bound = self.metric.amount(verdict.value), self.metric.amount(verdict.bound)
            self._say(
                f"verify: depth {verdict.depth} loses {value}, at most {bound} at {100 * self.confidence:g}% "
                f"confidence on {verdict.prompts} prompts"
                f"{self.metric.clipping(verdict.cap, verdict.clipped)}{outcome}"
            )
        if self.depth is None:
            self._say(f"verify: no depth keeps the budget of {self.metric.amount(self.max_drop)}: nothing is exported")
        elif self.max_drop is None:
            self._say(f"verify: depth {self.depth} is exported, with no limit on its loss")
        else:
            self._say(f"verify: depth {self.depth} is the deepest pruning that passed")
