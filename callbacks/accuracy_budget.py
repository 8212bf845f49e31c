"""AccuracyBudget: drives what is trained, picks what is verified, and tests it once with a confidence bound.

It watches ``Evaluation`` runs. On the search split it measures, and proposes what to train
next until it knows what to verify; on the verify split, which it sees once, it tests that in a fixed sequence. It
measures and decides; the pipeline acts.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import lightning

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import Choice
from pop_lightning.evaluation import search as selection
from pop_lightning.evaluation.metrics import prompt_losses, summary
from pop_lightning.evaluation.search import Measured, Proposal, Training
from pop_lightning.evaluation.verdicts import Verdict, fixed_sequence, judge


class AccuracyBudget(lightning.Callback):
    """Pick a depth under ``max_drop`` at ``confidence``, or the least loss at a wanted ``speedup``.

    Args:
        metric: ``agreement``, ``nll_increase`` or ``exact_match``.
        max_drop: absolute fraction for rates, nats per response token for NLL; no condition under ``speedup``.
        confidence: of the bound on the verify split.
        min_pruned: the fewest pruned layers worth exporting; the last layer is free, so at least 2 as a rule.
        speedup: the wanted prefill speedup, as the depths that are measured reach it.
        verify_prompts: how many prompts the verify split has; what it may show follows from that.

    Attributes:
        measured: after a search run, what each watched variant lost (:func:`pop_lightning.evaluation.metrics.summary`).
        sequence: after the search: what to verify, shallowest pruning first.
        verdicts: of the verification, so far.
        decisions: one readable line per decision.
    """

    def __init__(
        self,
        metric: str = "agreement",
        max_drop: float = 0.01,
        confidence: float = 0.95,
        min_pruned: int = 2,
        *,
        speedup: float | None = None,
        verify_prompts: int = 1,
    ):
        self.metric, self.confidence, self.min_pruned = metric, confidence, min_pruned
        self.max_drop, self.speedup, self.verify_prompts = max_drop, speedup, verify_prompts
        self.measured: dict[str, dict[str, Any]] = {}
        self.sequence: list[Choice] = []
        self.verdicts: list[Verdict] = []
        self.decisions: list[str] = []
        self._condition = max_drop if speedup is None else None
        self._losses = selection.Budget(self._condition, self._unit, self.decisions.append)
        self._stage, self._names = None, {}
        self._search: Generator[Proposal, Measured, list[Choice]] | None = None
        self._proposal: Proposal | None = None

    # --- search -----------------------------------------------------------------------------------------------------

    def choose_boundary(
        self, curve: Iterable[Mapping[str, Any]], kind: str, speedups: Mapping[tuple[int, int], float], layers: int
    ) -> int:
        """The boundary k, from the untrained ``kind`` in a curve that was measured at several.

        Args:
            speedups: the counted prefill speedup by ``(depth, k)``; under a wanted speedup, of the depth that reaches
                it at each k.
        """
        by_boundary: dict[int, list[Measured]] = {}
        curve = list(curve)
        for entry in curve:
            wanted = (entry["depth"], entry["boundary"]) in speedups and self._worthwhile(entry["depth"], layers)
            if wanted and (entry["projection"] == kind or self.speedup is not None):
                by_boundary.setdefault(entry["boundary"], []).append(Measured.of(entry))
        if not by_boundary:
            least = min(entry["boundary"] for entry in curve)
            self._losses.say(f"boundary: no depth prunes {self.min_pruned} layers: k = {least} is taken, the least")
            return least
        if self.speedup is None:
            return selection.boundary_within_budget(by_boundary, speedups, self._losses)
        return selection.boundary_of_least_loss(by_boundary, self._losses)

    def search(
        self, curve: Sequence[Mapping[str, Any]], kind: str, layers: int, training: Training | None = None
    ) -> None:
        """Begin with what was measured without training: a curve of several kinds, of which ``kind`` is the recipe's.

        Then :meth:`propose` and :meth:`record` take turns until there is nothing more to propose.
        """
        measured = [
            Measured.of(entry)
            for entry in curve
            if self._worthwhile(entry["depth"], layers) and (entry["projection"] == kind or self.speedup is not None)
        ]
        if self.speedup is not None:
            self._search = selection.least_loss(measured, self._losses, training)
        elif training is not None:
            self._search = selection.within_budget(measured, self._losses, training)
        else:
            self._settle(selection.untrained(measured, self._losses))
            return
        self._advance(None)

    def best(self, entries: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Of several entries of one depth the one whose projections would be taken."""
        return min(entries, key=lambda entry: self._losses.rank(Measured.of(entry)))

    def propose(self) -> Proposal | None:
        """What to train and measure next; None once :attr:`sequence` is known."""
        return self._proposal

    def record(self, entry: Mapping[str, Any]) -> None:
        """Take in what was measured where the proposal asked."""
        self._advance(Measured.of(entry))

    def _advance(self, measured: Measured | None) -> None:
        try:
            self._proposal = self._search.send(measured)
        except StopIteration as end:
            self._settle(end.value)

    def _settle(self, sequence: list[Choice]) -> None:
        self._proposal, self.sequence = None, sequence
        text = ", ".join(map(str, self.sequence)) or f"none prunes {self.min_pruned} layers within the budget"
        self.decisions.append(f"search: to verify, shallowest pruning first: {text}")

    def _worthwhile(self, depth: int, layers: int) -> bool:
        return self.speedup is not None or layers - depth >= self.min_pruned

    # --- what is watched --------------------------------------------------------------------------------------------

    def watch(self, stage: str, names: Iterable[str] | Mapping[int, str]) -> "AccuracyBudget":
        """Say what the next ``validate`` run is.

        Args:
            stage: ``search`` or ``verify``.
            names: of the variants that take part; for ``verify`` by their depth, in the order of :attr:`sequence`,
                whose depths may come in several runs, each depth in one of them.

        Raises:
            InputError: a depth is not next in the sequence, or the verification is over.
        """
        if stage == "verify":
            tested = {verdict.depth for verdict in self.verdicts}
            waiting = [choice.depth for choice in self.sequence if choice.depth not in tested]
            if not names or self.verified or list(names) != waiting[: len(names)]:
                raise InputError(
                    "the verify split was opened already, or for other depths than the search handed over: a second "
                    "look would void its bound."
                )
        self._stage, self._names = stage, names
        return self

    def on_validation_epoch_end(self, trainer, module) -> None:
        if self._stage == "search":
            self.measured = {
                name: summary(module.rows(name), self.metric, self.confidence, self.verify_prompts)
                for name in self._names
            }
        elif self._stage == "verify":
            losses = {depth: prompt_losses(module.rows(name), self.metric) for depth, name in self._names.items()}
            if self._condition is None:
                self.verdicts += [judge(depth, losses[depth], self.metric, self.confidence, None) for depth in losses]
            else:
                self.verdicts += fixed_sequence(list(losses), losses, self.metric, self.max_drop, self.confidence)
        self._stage = None

    # --- verification -----------------------------------------------------------------------------------------------

    @property
    def verified(self) -> bool:
        """Whether the verification is over: all of the sequence was tested, or a depth failed."""
        failed = any(verdict.passed is False for verdict in self.verdicts)
        return failed or len(self.verdicts) == len(self.sequence) > 0

    @property
    def verdict(self) -> Verdict | None:
        """Of the deepest pruning that passed so far; None where none did."""
        return next((each for each in reversed(self.verdicts) if each.passed is not False), None)

    @property
    def depth(self) -> int | None:
        """The chosen depth."""
        return None if self.verdict is None else self.verdict.depth

    @property
    def choice(self) -> Choice | None:
        """The chosen depth with its projections."""
        return next((each for each in self.sequence if each.depth == self.depth), None)

    def promise(self) -> dict[str, Any] | None:
        """What the verify split says about the chosen depth, as plain data; None where none was chosen."""
        if self.verdict is None:
            return None
        return {
            "metric": self.metric,
            "value": self.verdict.value,
            "bound": self.verdict.bound,
            "rows": self.verdict.rows,
            "prompts": self.verdict.prompts,
            "confidence": self.confidence,
            "max_drop": self._condition,
        }

    def conclude(self, layers: int) -> None:
        """Say what the verdicts mean."""
        for verdict in self.verdicts:
            outcome = {True: ": passed", False: ": failed, stop", None: ""}[verdict.passed]
            self.decisions.append(
                f"verify: depth {verdict.depth} loses {self._losses.amount(verdict.value)}, at most "
                f"{verdict.bound:.4f} at {100 * self.confidence:g}% confidence on {verdict.prompts} prompts{outcome}"
            )
        if self.depth is None:
            self.decisions.append(f"verify: no depth keeps the budget of {self.max_drop:g}: nothing is exported")
        elif self.speedup is not None:
            self.decisions.append(
                f"verify: depth {self.depth} of {layers} reaches the wanted speedup of {self.speedup:g}: exported"
            )
        else:
            self.decisions.append(f"verify: depth {self.depth} of {layers} is the deepest pruning that passed")

    @property
    def _unit(self) -> str:
        return "nats per response token" if self.metric == "nll_increase" else f"{self.metric} (fraction)"
