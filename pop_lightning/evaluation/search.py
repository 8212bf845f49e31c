"""What follows from losses on the search split: what to train next, which boundary, what to verify. No model in here.

The budget callback measures and asks this file; the pipeline does what it proposes. :func:`within_budget` and
:func:`least_loss` are state machines written as generators: each yields proposals, is sent what was measured there, and
returns what goes to the verify split. They look at nothing else, so the same losses give the same run, on every rank
and after every interruption.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pop_lightning.core.plan import Choice

CLOSE = 2.0  # a loss of at most this many times the budget is worth more steps


@dataclass(frozen=True)
class Measured:
    """What a choice lost on the search split.

    Attributes:
        loss: the mean, in the budget's unit.
        expected_bound: the bound that the verify split would give if it lost the same.
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


class Proposal(NamedTuple):
    """What the pipeline is asked to do: start a training, or go on with it for as many steps again."""

    action: Literal["train", "extend"]
    choice: Choice


@dataclass(frozen=True)
class Budget:
    """What may be lost, and where decisions are reported.

    Attributes:
        max_drop: the most that may be lost; None where the target is a speedup and no loss is a condition.
        unit: of losses, for the lines.
        say: takes one readable line per decision.
    """

    max_drop: float | None
    unit: str
    say: Callable[[str], Any]

    def clears(self, measured: Measured) -> bool:
        """Whether the verify split can be expected to show that the budget is kept."""
        return self.max_drop is not None and measured.expected_bound <= self.max_drop

    def rank(self, measured: Measured) -> tuple[float, ...]:
        """Orders the projections of one depth, the best first.

        Those that clear the budget by their KL, which distinguishes what a loss of a few rows cannot; others by loss.
        """
        return (0, measured.kl) if self.clears(measured) else (1, measured.loss, measured.kl)

    def fits(self, measured: Measured) -> bool:
        """Whether the mean is within the budget, which a bound may still fail to show."""
        return measured.loss <= self.max_drop

    def tell(self, measured: Measured, what: str) -> None:
        choice = measured.choice
        how = f"after {choice.steps} steps" if choice.steps else choice.projection
        place = ""
        if self.max_drop is not None:
            place = f", {'within' if self.fits(measured) else 'above'} the budget of {self.max_drop:g}"
            if self.fits(measured) and not self.clears(measured):
                place += f" (verify rows that lose as much show {measured.expected_bound:.4f})"
        self.say(f"search: depth {choice.depth} ({how}) loses {self.amount(measured.loss)}{place}: {what}")

    def amount(self, loss: float) -> str:
        return f"{round(loss, 4) + 0.0:.4f} {self.unit}"  # no negative zero


def settle(
    measured: Sequence[Measured], budget: Budget, training: "Training | None" = None
) -> Generator[Proposal, Measured, list[Choice]]:
    """What to verify, shallowest pruning first, from measurements of untrained projections.

    Proposes what to train and is sent what was measured there; without a ``training`` it proposes nothing.

    Args:
        measured: what is worth an artifact: one measurement per depth where a loss is the condition.
    """
    if budget.max_drop is None:
        sequence = yield from least_loss(measured, budget, training)
    elif training is None:
        sequence = untrained(measured, budget)
    else:
        sequence = yield from within_budget(measured, budget, training)
    text = ", ".join(map(str, sequence)) or "nothing, no depth that is worth an artifact keeps the budget"
    budget.say(f"search: to verify, shallowest pruning first: {text}")
    return sequence


def finish(
    proposals: Generator[Proposal, Measured, list[Choice]], measure: Callable[[Choice], Measured] | None = None
) -> list[Choice]:
    """Do what :func:`settle` proposes until it knows what to verify.

    Args:
        measure: trains a choice and measures it; not needed where nothing is trained.
    """
    found = None
    try:
        while True:
            found = measure(proposals.send(found).choice)
    except StopIteration as end:
        return end.value


def untrained(measured: Sequence[Measured], budget: Budget) -> list[Choice]:
    """Where nothing is trained: every depth whose mean fits, shallowest pruning first.

    A depth that may not be certified costs nothing there: the verification stops at it and keeps those before it.
    """
    for each in _falling(measured):
        budget.tell(each, "to be verified" if budget.fits(each) else "left out")
    return [each.choice for each in _falling(measured) if budget.fits(each)]


@dataclass(frozen=True)
class Training:
    """How a recipe trains.

    Attributes:
        kind: of the trained projections.
        steps: of one round.
        extensions: how many more rounds a training may get.
    """

    kind: str
    steps: int
    extensions: int = 0

    def rounds(
        self,
        before: Measured,
        budget: Budget,
        worth: Callable[[Measured, Measured], bool] = lambda last, found: False,
    ) -> Generator[Proposal, Measured, Measured]:
        """Train at ``before``'s depth and go on while it is ``worth`` it; returns the best, ``before`` included.

        Args:
            worth: given the round before the last and the last one.
        """
        depth, best, last = before.choice.depth, before, before
        for number in range(1, self.extensions + 2):
            action = "train" if number == 1 else "extend"
            found = yield Proposal(action, Choice(depth, self.kind, number * self.steps))
            best = min(best, found, key=budget.rank)
            more = number <= self.extensions and worth(last, found)
            enough = "trained enough" if found is best else f"no better than {best.choice}"
            budget.tell(found, "train on" if more else enough)
            if not more:
                break
            last = found
        return best


def within_budget(
    untrained: Sequence[Measured], budget: Budget, training: Training
) -> Generator[Proposal, Measured, list[Choice]]:
    """Train where it decides: the shallowest depth that does not keep the budget untrained, then deeper from there.

    A training goes on where it ends at most :data:`CLOSE` times the budget and its last round lowered the loss.

    Args:
        untrained: one measurement per depth that is worth an artifact, without training.

    Returns:
        What to verify, shallowest pruning first: each depth with its best projections (:meth:`Budget.rank`).
    """

    def close(last: Measured, found: Measured) -> bool:
        return not budget.clears(found) and found.loss <= CLOSE * budget.max_drop and found.loss < last.loss

    sequence: list[Measured] = []
    trained: set[int] = set()
    for before in _falling(untrained):
        if budget.clears(before):
            budget.tell(before, "not trained, go deeper")
            sequence.append(before)
            continue
        budget.tell(before, "train it")
        trained.add(before.choice.depth)
        best = yield from training.rounds(before, budget, close)
        if budget.fits(best):
            sequence.append(best)
        if not budget.clears(best):
            back = f"back off to depth {sequence[-1].choice.depth}" if sequence else "no depth is left, stop"
            budget.tell(best, "verified last, stop here" if budget.fits(best) else back)
            break
        budget.tell(best, "go deeper")
    if sequence and sequence[-1].choice.depth not in trained:
        budget.tell(sequence[-1], "the deepest to verify, so it is trained to lose less")
        sequence[-1] = yield from training.rounds(sequence[-1], budget)
    return [each.choice for each in sequence]


def least_loss(
    fitted: Sequence[Measured], budget: Budget, training: Training | None
) -> Generator[Proposal, Measured, list[Choice]]:
    """The second target: at a depth that is given, the projections that lose least.

    A training goes on while a round lowers the loss by a tenth.

    Args:
        fitted: every untrained kind at that depth.
        training: None trains nothing.
    """

    def falling(last: Measured, found: Measured) -> bool:
        return last.loss - found.loss > 0.1 * abs(last.loss)

    for each in fitted:
        budget.tell(each, "fitted")
    best = min(fitted, key=budget.rank)
    if training is not None:
        best = yield from training.rounds(best, budget, falling)
    budget.tell(best, "it loses least there and is taken")
    return [best.choice]


def boundary_within_budget(
    measured: Mapping[int, Sequence[Measured]], speedups: Mapping[tuple[int, int], float], budget: Budget
) -> int:
    """The boundary k that saves most: each k is taken to its deepest depth that the verify split may certify.

    A larger k loses less at a depth and costs more there, so it pays where it makes a deeper one possible. Where no k
    keeps the budget at any depth, the smallest.

    Args:
        measured: untrained projections, by k: one measurement per depth that is worth an artifact.
        speedups: the counted prefill speedup by ``(depth, k)``.
    """
    reached = {}
    for k, each in sorted(measured.items()):
        depths = [one.choice.depth for one in each if budget.clears(one)]
        if not depths:
            budget.say(f"boundary: k = {k} keeps the budget at no depth without training")
            continue
        reached[k] = speedups[min(depths), k]
        budget.say(
            f"boundary: k = {k} keeps the budget down to depth {min(depths)}, {reached[k]:.2f}x fewer operations"
        )
    chosen = max(reached, key=lambda k: (reached[k], -k)) if reached else min(measured)
    budget.say(f"boundary: k = {chosen} is taken, {'it saves most' if reached else 'the least of them'}")
    return chosen


def boundary_of_least_loss(measured: Mapping[int, Sequence[Measured]], budget: Budget) -> int:
    """The boundary k that loses least at the depth where it reaches the wanted speedup; the smaller k of equals."""
    best = {k: min(each, key=budget.rank) for k, each in sorted(measured.items())}
    for k, one in best.items():
        budget.say(
            f"boundary: k = {k} reaches the wanted speedup at depth {one.choice.depth} and loses "
            f"{budget.amount(one.loss)}"
        )
    chosen = min(best, key=lambda k: (*budget.rank(best[k]), k))
    budget.say(f"boundary: k = {chosen} is taken, it loses least")
    return chosen


def _falling(measured: Sequence[Measured]) -> list[Measured]:
    return sorted(measured, key=lambda each: -each.choice.depth)
