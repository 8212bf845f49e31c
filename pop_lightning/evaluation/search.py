"""Decisions from losses on the search split: what to train next, which tokens run in full, and what to verify.

Works on measured losses only, without a model. The pipeline and the budget callback measure and carry out what is
proposed here. :func:`within_budget`, :func:`least_loss` and :func:`fastest_plan` are state machines written as
generators: they yield proposals, are sent the measurements, and return their choice. They depend on nothing else, so
the same losses give the same run, on every rank and after every interruption. Another number of processes sums in
another order: losses that differ by no more than that are equal here, and a documented order decides.
"""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pop_lightning.core.plan import Choice, Kept
from pop_lightning.evaluation.losses import BudgetMetric

CLOSE = 2.0  # more steps, or more rows, are worthwhile while the loss is at most this many times the budget
TOGETHER = 8  # plans that are measured in one pass, the fastest first
SCREENING = 100  # the fewest rows on which plans are screened
FINALISTS = 32  # the most plans that are measured on all rows after a screening, so in four passes at most
# Losses and KLs that differ by less are equal. Sums in float32 that are added up in another order differ by some 1e-7,
# and the projections fitted to them change a loss by some 1e-5 of it.
EQUAL, EQUAL_SHARE = 1e-6, 1e-3

Plan = tuple[int, Kept]  # depth, and the tokens that run in full


@dataclass(frozen=True)
class Measured:
    """The losses of a choice on the search split.

    Attributes:
        loss: the mean, in the budget's unit.
        expected_bound: the bound that the verify split would give with the same losses.
        kl: to the full model.
    """

    choice: Choice
    loss: float
    expected_bound: float
    kl: float = 0.0

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Measured":
        """From an entry of the curve in ``metrics.json``."""
        return cls(Choice.of(entry), entry["loss"], entry["expected_bound"], entry["kl"])


class PlansToMeasure(NamedTuple):
    """A request to the pipeline: measure untrained projections with these plans.

    Attributes:
        screen: on a part of the search rows only.
    """

    plans: tuple[Plan, ...]
    screen: bool = False


class Proposal(NamedTuple):
    """A request to the pipeline: start a training, or extend it by another round of the same number of steps."""

    action: Literal["train", "extend"]
    choice: Choice


@dataclass(frozen=True)
class Budget:
    """The limit on the loss, and where decisions are reported.

    Attributes:
        max_drop: the largest acceptable loss; None if the target is a speedup and the loss is not limited.
        metric: of the losses, which writes them in its unit.
        say: called with one readable line per decision.
    """

    max_drop: float | None
    metric: BudgetMetric
    say: Callable[[str], Any]

    def clears(self, measured: Measured) -> bool:
        """Whether the verify split is expected to certify the budget."""
        return self.max_drop is not None and measured.expected_bound <= self.max_drop

    def best(self, measured: Iterable[Measured]) -> Measured:
        """The best of several; of equals the first, so they are given in the order of preference.

        Of those that clear the budget, if there are any, the smallest KL, which is finer than a loss from a few rows;
        otherwise the smallest loss, and of equal losses the smallest KL.
        """
        measured = list(measured)
        if clearing := [each for each in measured if self.clears(each)]:
            return least(clearing, lambda each: each.kl)
        return least(measured, lambda each: each.loss, lambda each: each.kl)

    def fits(self, measured: Measured) -> bool:
        """Whether the mean is within the budget; its bound may still exceed it."""
        return measured.loss <= self.max_drop

    def report(self, measured: Measured, decision: str) -> None:
        choice = measured.choice
        how = f"after {choice.steps} steps" if choice.steps else choice.projection
        place = ""
        if self.max_drop is not None:
            place = (
                f", {'within' if self.fits(measured) else 'above'} the budget of {self.metric.amount(self.max_drop)}"
            )
            if self.fits(measured) and not self.clears(measured):
                expected = self.metric.amount(measured.expected_bound)
                place += f" (the expected bound on the verify split is {expected})"
        self.say(f"search: depth {choice.depth} ({how}) loses {self.metric.amount(measured.loss)}{place}: {decision}")


def least(several: Iterable[Any], *figures: Callable[[Any], float]) -> Any:
    """The smallest first figure; of equals (:data:`EQUAL`) the smallest second one, and so on; at last the first."""
    remaining = list(several)
    for figure in figures:
        smallest = min(map(figure, remaining))
        remaining = [each for each in remaining if figure(each) - smallest <= max(EQUAL, EQUAL_SHARE * abs(smallest))]
    return remaining[0]


def settle(
    measured: Sequence[Measured], budget: Budget, training: "Training | None" = None
) -> Generator[Proposal, Measured, list[Choice]]:
    """The choices to verify, shallowest pruning first, from measurements of untrained projections.

    Yields what to train and is sent its measurement; without a ``training`` it yields nothing.

    Args:
        measured: of what may be exported; with a limit on the loss, one measurement per depth.
    """
    if budget.max_drop is None:
        sequence = yield from least_loss(measured, budget, training)
    elif training is None:
        sequence = untrained(measured, budget)
    else:
        sequence = yield from within_budget(measured, budget, training)
    text = ", ".join(map(str, sequence)) or "nothing, no depth that may be exported keeps the budget"
    budget.say(f"search: to verify, shallowest pruning first: {text}")
    return sequence


def finish(
    proposals: Generator[Proposal, Measured, list[Choice]], measure: Callable[[Choice], Measured] | None = None
) -> list[Choice]:
    """Carry out the proposals of :func:`settle`; returns the choices to verify.

    Args:
        measure: trains a choice and measures it; not needed if nothing is trained.
    """
    measured = None
    try:
        while True:
            measured = measure(proposals.send(measured).choice)
    except StopIteration as end:
        return end.value


def untrained(measured: Sequence[Measured], budget: Budget) -> list[Choice]:
    """The choices to verify without training: every depth whose mean fits, shallowest pruning first.

    A depth that fails the verification does no harm: the sequence stops there and keeps the depths before it.
    """
    ordered = _shallowest_first(measured)
    for candidate in ordered:
        budget.report(candidate, "to be verified" if budget.fits(candidate) else "left out")
    return [candidate.choice for candidate in ordered if budget.fits(candidate)]


@dataclass(frozen=True)
class Training:
    """A recipe's training settings.

    Attributes:
        kind: of the trained projections.
        steps: of one round.
        extensions: the largest number of further rounds.
    """

    kind: str
    steps: int
    extensions: int = 0

    def rounds(
        self,
        before: Measured,
        budget: Budget,
        extend: Callable[[Measured, Measured], bool] = lambda previous, latest: False,
    ) -> Generator[Proposal, Measured, Measured]:
        """Train at ``before``'s depth, round after round while ``extend``; returns the best, ``before`` included.

        Args:
            extend: decides, from the previous and the latest round, whether another one is worthwhile.
        """
        depth, best, previous = before.choice.depth, before, before
        for number in range(1, self.extensions + 2):
            action = "train" if number == 1 else "extend"
            latest = yield Proposal(action, Choice(depth, self.kind, number * self.steps))
            best = budget.best([best, latest])
            more = number <= self.extensions and extend(previous, latest)
            enough = "training ends" if latest is best else f"not better than {best.choice}"
            budget.report(latest, "train on" if more else enough)
            if not more:
                break
            previous = latest
        return best


def within_budget(
    untrained: Sequence[Measured], budget: Budget, training: Training
) -> Generator[Proposal, Measured, list[Choice]]:
    """Train from the shallowest depth that misses the budget untrained, and prune deeper while the budget is kept.

    A training is extended if its loss is at most :data:`CLOSE` times the budget and the last round lowered it.

    Args:
        untrained: one measurement without training per depth that may be exported.

    Returns:
        The choices to verify, shallowest pruning first: the best projections of each depth (:meth:`Budget.best`).
    """

    def close(previous: Measured, latest: Measured) -> bool:
        return not budget.clears(latest) and latest.loss <= CLOSE * budget.max_drop and latest.loss < previous.loss

    sequence: list[Measured] = []
    trained: set[int] = set()
    for before in _shallowest_first(untrained):
        if budget.clears(before):
            budget.report(before, "not trained, go deeper")
            sequence.append(before)
            continue
        budget.report(before, "train it")
        trained.add(before.choice.depth)
        best = yield from training.rounds(before, budget, close)
        if budget.fits(best):
            sequence.append(best)
        if not budget.clears(best):
            back = f"back off to depth {sequence[-1].choice.depth}" if sequence else "no depth left, stop"
            budget.report(best, "verified last, stop here" if budget.fits(best) else back)
            break
        budget.report(best, "go deeper")
    if sequence and sequence[-1].choice.depth not in trained:
        budget.report(sequence[-1], "the deepest to verify, so it is trained to lower the loss")
        sequence[-1] = yield from training.rounds(sequence[-1], budget)
    return [selected.choice for selected in sequence]


def least_loss(
    fitted: Sequence[Measured], budget: Budget, training: Training | None
) -> Generator[Proposal, Measured, list[Choice]]:
    """The projections with the smallest loss at a given depth, for a target speedup.

    A training is extended while a round lowers the loss by a tenth.

    Args:
        fitted: every untrained kind at that depth, the simplest first: of equals it is chosen.
        training: None to train nothing.
    """

    def falling(previous: Measured, latest: Measured) -> bool:
        return previous.loss - latest.loss > 0.1 * abs(previous.loss)

    for untrained_kind in fitted:
        budget.report(untrained_kind, "without training")
    best = budget.best(fitted)
    if training is not None:
        best = yield from training.rounds(best, budget, falling)
    budget.report(best, "the smallest loss at this depth, chosen")
    return [best.choice]


def screening_rows(rows: int, budget: Budget) -> int | None:
    """The number of search rows to screen plans on: enough for one lost row to decide nothing; None to screen none.

    Args:
        rows: in the search split. With fewer than twice as many, screening would save too little.
    """
    needed = max(SCREENING, math.ceil(budget.metric.cap / max(budget.max_drop, 1e-9)))
    return needed if 2 * needed <= rows else None


def fastest_plan(
    fewest: Sequence[Measured], speedups: Mapping[Plan, float], screened: bool, budget: Budget
) -> Generator[PlansToMeasure, Mapping[Plan, Measured], Kept]:
    """The tokens to run in full: those of the fastest plan that the verify split is expected to certify.

    More tokens lose less at a depth and cost more, so they pay off if they make a deeper pruning possible. Yields the
    plans to measure and is sent their measurements. Only plans that are faster than the best with the fewest tokens are
    measured: first all of them on a part of the rows, if there are enough rows, where those that lose more than
    :data:`CLOSE` times the budget are left out, and all but the :data:`FINALISTS` most promising; then the others, the
    fastest first and :data:`TOGETHER` in one pass, until one keeps the budget. Of equally fast plans the first in
    ``speedups``. If none keeps the budget at any depth, the fewest tokens.

    Args:
        fewest: measurements with the fewest tokens, which ``speedups`` lists first.
        speedups: the prefill speedup of every plan that may be exported, from counted operations, in the order of
            :func:`~pop_lightning.core.plan.in_order`, and the smallest pruning first.
        screened: whether there are enough rows.
    """
    first = next(kept for _, kept in speedups)
    measured = {(candidate.choice.depth, first): candidate for candidate in fewest}

    def keeping(plans: Iterable[Plan]) -> list[Plan]:
        return [plan for plan in plans if budget.clears(measured[plan])]

    chosen = max(keeping(measured), key=speedups.__getitem__, default=None)
    least = 1.0 if chosen is None else speedups[chosen]
    waiting = [plan for plan, ratio in speedups.items() if plan[1] != first and ratio > least]
    if screened and len(waiting) > TOGETHER:
        some = yield PlansToMeasure(tuple(waiting), screen=True)
        close = [plan for plan in waiting if some[plan].loss <= CLOSE * budget.max_drop]
        budget.say(f"search: {len(close)} of {len(waiting)} faster plans lose little on a part of the rows")
        if len(close) > FINALISTS:
            budget.say(f"search: the {FINALISTS} most promising are measured on all rows")

        def promise(plan: Plan) -> tuple[bool, float, float]:
            """What may keep the budget first, the fastest of it first; then what loses least."""
            clears = budget.clears(some[plan])
            return not clears, 0.0 if clears else some[plan].loss, -speedups[plan]

        promising = sorted(close, key=promise)[:FINALISTS]
        waiting = [plan for plan in close if plan in promising]
    waiting.sort(key=lambda plan: -speedups[plan])
    while waiting:
        together, waiting = waiting[:TOGETHER], waiting[TOGETHER:]
        measured |= yield PlansToMeasure(tuple(together))
        if kept := keeping(together):
            chosen = kept[0]  # the fastest
            break
    if chosen is None:
        budget.say(
            f"search: no plan is expected to keep the budget without training: {first} is chosen, the fewest tokens"
        )
        return first
    for kept in dict.fromkeys(kept for _, kept in measured):
        if plans := keeping(plan for plan in measured if plan[1] == kept):
            depth, _ = best = max(plans, key=speedups.__getitem__)
            counted = f"{speedups[best]:.2f}x fewer operations"
            budget.say(f"search: {kept} is expected to keep the budget at depth {depth}, {counted}")
    budget.say(f"search: {chosen[1]} is chosen, the largest speedup; the verify rows decide the depth")
    return chosen[1]


def kept_of_least_loss(
    measured: Mapping[Kept, Sequence[Measured]], speedups: Mapping[Kept, float], budget: Budget
) -> Kept:
    """The tokens to run in full: the smallest loss at the depth that reaches the target speedup.

    Of equal losses the smallest KL, then the fewest counted operations, then the first.

    Args:
        measured: every untrained kind at that depth, the simplest first.
        speedups: of these plans, from counted operations.
    """
    best = {kept: budget.best(candidates) for kept, candidates in measured.items()}
    for kept, candidate in best.items():
        budget.say(
            f"search: {kept} reaches the target speedup at depth {candidate.choice.depth} and loses "
            f"{budget.metric.amount(candidate.loss)}"
        )
    fastest = sorted(best, key=lambda kept: -speedups[kept])
    winner = budget.best(best[kept] for kept in fastest)
    chosen = next(kept for kept in fastest if best[kept] is winner)
    budget.say(f"search: {chosen} is chosen, the smallest loss")
    return chosen


def _shallowest_first(measured: Sequence[Measured]) -> list[Measured]:
    return sorted(measured, key=lambda candidate: -candidate.choice.depth)
