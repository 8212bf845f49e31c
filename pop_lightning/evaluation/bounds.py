"""Upper confidence bounds of a mean loss, valid for any number of prompts and any distribution of the losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from pop_lightning.core.errors import InputError, Key
from pop_lightning.evaluation.losses import BudgetMetric, metric_named

ALL_IN = 0.6  # share of the wealth of the bettor who stakes all of it
MOST_PROMPTS = 10_000_000  # more are not proposed to anyone
STEP = 0.75  # ratio of the stakes of two successive bettors


def upper_bound(
    losses: Sequence[float],
    metric: str | BudgetMetric,
    confidence: float = 0.95,
    *,
    averaged: bool = False,
    draws: int | None = None,
) -> float:
    """One-sided upper confidence bound of the mean loss, for independent prompts drawn from the same source.

    - 0/1 losses (``exact_match`` with one row per prompt): Clopper and Pearson, Biometrika 1934. Exact.
    - Losses in [0, 1] (``agreement``; ``exact_match`` averaged over several rows of a prompt): :func:`betting_bound`.
    - Unbounded losses (``nll_increase``): the same, of losses clipped to [-cap, cap] of the metric. It bounds the mean
      of losses clipped at ``cap``; a sample cannot bound larger losses. It is never below the unclipped mean.

    Args:
        losses: one value per prompt.
        metric: the metric, or its name in :data:`~pop_lightning.evaluation.losses.METRICS`.
        confidence: probability, over draws of the prompts, that the bound is at or above the true mean.
        averaged: whether some prompt has several rows. The rows, not their losses, decide between the two bounds of
            ``exact_match``: choosing by the losses would invalidate both.
        draws: forecast the bound for this number of prompts with the same distribution of losses.

    Raises:
        InputError: no losses, a loss outside the metric's range or not a number, an unknown metric, or a confidence
            outside (0, 1).
    """
    kind = metric_named(metric)
    _check_confidence(confidence)
    values = np.asarray([float(loss) for loss in losses], dtype=np.float64)
    if values.size == 0:
        raise InputError("A bound needs at least one loss, and there are no rows; add rows to the verify split.")
    if not (finite := np.isfinite(values)).all():
        raise InputError(
            f"A {kind.name} loss is not a finite number; check the model's logits on row {int(finite.argmin())}."
        )
    if kind.binary and not averaged:
        if not np.isin(values, (0.0, 1.0)).all():
            raise InputError(f"{kind.name} losses of one row per prompt must be 0 or 1; compute them with row_loss.")
        errors, prompts = values.sum(), values.size
        if draws is not None:
            errors, prompts = min(draws, math.ceil(values.mean() * draws - 1e-7 * draws)), draws
        return clopper_pearson(int(errors), prompts, confidence)
    if kind.rate:
        if values.min() < 0 or values.max() > 1:
            raise InputError(f"{kind.name} losses must lie in [0, 1], found {values.min():g} to {values.max():g}.")
        return betting_bound(values, confidence, draws)
    scaled = (values.clip(-kind.cap, kind.cap) + kind.cap) / (2 * kind.cap)
    # With heavy clipping, the mean of the unclipped losses can exceed the bound of the clipped ones.
    return max(float(values.mean()), 2 * kind.cap * betting_bound(scaled, confidence, draws) - kind.cap)


def smallest_certifiable(
    prompts: int, metric: str | BudgetMetric, confidence: float = 0.95, *, averaged: bool = False
) -> float:
    """The smallest ``max_drop`` that this number of prompts can certify: the bound at zero loss.

    1 - (1 - confidence)^(1/prompts) for 0/1 losses; for others, (1 - confidence) is multiplied by :data:`ALL_IN`.
    """
    kind = metric_named(metric)
    _check_confidence(confidence)
    return kind.cap if prompts < 1 else -kind.cap * math.expm1(math.log(_error(kind, confidence, averaged)) / prompts)


def rows_needed(
    max_drop: float, metric: str | BudgetMetric, confidence: float = 0.95, *, averaged: bool = False
) -> int:
    """The fewest verify rows, each with its own prompt, that certify ``max_drop`` for a lossless depth.

    299 for 1% of ``exact_match`` at 95%, 349 for 1% of ``agreement``. A depth with losses needs more:
    :func:`largest_certified_loss`.

    Raises:
        InputError: ``max_drop`` is zero or less, which no number of rows can certify.
    """
    kind = metric_named(metric)
    _check_confidence(confidence)
    if max_drop <= 0:
        raise InputError(f"budget.max_drop is {max_drop:g}, which no number of rows can certify; give a positive drop.")
    share = max_drop / kind.cap
    if share >= 1:
        return 1
    return max(1, math.ceil(math.log(_error(kind, confidence, averaged)) / math.log1p(-share) - 1e-9))


def prompts_needed(
    losses: Sequence[float],
    metric: str | BudgetMetric,
    max_drop: float,
    confidence: float = 0.95,
    *,
    averaged: bool = False,
) -> int | None:
    """About how many prompts, with the same distribution of losses, would certify ``max_drop``.

    Arguments are those of :func:`upper_bound`. Within a hundredth of the smallest number.

    Returns:
        None if the mean is not below ``max_drop``, or so close to it that :data:`MOST_PROMPTS` would not be enough.
    """

    def kept(prompts: int) -> bool:
        return upper_bound(losses, metric, confidence, averaged=averaged, draws=prompts) <= max_drop

    low, high = 0, len(losses)
    while not kept(high):
        low, high = high, 2 * high
        if high > MOST_PROMPTS:
            return None
    while high - low > max(1, high // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def largest_certified_loss(
    prompts: int, metric: str | BudgetMetric, max_drop: float, confidence: float = 0.95, *, averaged: bool = False
) -> float | None:
    """The largest mean loss at which so many prompts always certify ``max_drop``; None if zero loss fails too.

    Computed for the least favorable case, where as few prompts as possible lose all they can. A loss that is spread
    over more prompts varies less, which makes the betting bound smaller: its wealth is a positive sum of products that
    are Schur-concave in the losses. (Not guaranteed for losses below zero, which ``nll_increase`` can have.)

    Returns:
        The mean over the prompts, in the metric's unit.
    """
    kind = metric_named(metric)
    whole = kind.binary and not averaged

    def kept(lost: float) -> bool:
        full = int(lost)
        losses = np.zeros(prompts)
        losses[:full] = kind.cap
        if full < prompts:
            losses[full] = (lost - full) * kind.cap
        return upper_bound(losses, kind, confidence, averaged=averaged) <= max_drop

    if prompts < 1 or not kept(0):
        return None
    low, high = 0.0, float(prompts)
    while high - low > (1 if whole else 1e-3):
        middle = (low + high) / 2 if not whole else float((low + high) // 2)
        low, high = (middle, high) if kept(middle) else (low, middle)
    return kind.cap * low / prompts


@dataclass(frozen=True)
class Certifiable:
    """What a number of verify prompts can certify, known before anything is measured; ``str`` makes it a sentence.

    Attributes:
        averaged: whether some prompt has several rows.
        smallest: :func:`smallest_certifiable`.
        largest_loss: :func:`largest_certified_loss`.
    """

    prompts: int
    metric: BudgetMetric
    max_drop: float
    confidence: float
    averaged: bool
    smallest: float
    largest_loss: float | None

    def __str__(self) -> str:
        amount = self.metric.amount
        text = f"{self.prompts} verify prompts can certify a drop of {amount(self.smallest)} at best"
        if self.largest_loss is not None:
            text += f", and {amount(self.max_drop)} for a mean loss of up to {amount(self.largest_loss)}"
            if not self.metric.binary:
                text += " at least, and more where it is spread over many prompts"
        return f"{text} ({self.metric.name}, {100 * self.confidence:g}% confidence)"

    @property
    def needed(self) -> int:
        """:func:`rows_needed`."""
        return rows_needed(self.max_drop, self.metric, self.confidence, averaged=self.averaged)

    def refuse_too_few(self) -> None:
        """Raise :class:`InputError` if the prompts cannot certify the budget even at zero loss."""
        if self.prompts < self.needed:
            raise InputError(
                f"at confidence {self.confidence:g} needs {self.needed} different prompts in the verify split",
                key="budget.max_drop",
                found=f"{self.prompts}, which can certify a drop of {self.metric.amount(self.smallest)} at best",
                advice=("give more rows or raise ", Key("data.splits.verify"), " or ", Key("budget.max_drop")),
            )


def certifiable(
    prompts: int, metric: str | BudgetMetric, max_drop: float, confidence: float = 0.95, *, averaged: bool = False
) -> Certifiable:
    """What ``prompts`` verify prompts can certify; arguments as for :func:`upper_bound`."""
    kind = metric_named(metric)
    return Certifiable(
        prompts,
        kind,
        max_drop,
        confidence,
        averaged,
        smallest_certifiable(prompts, kind, confidence, averaged=averaged),
        largest_certified_loss(prompts, kind, max_drop, confidence, averaged=averaged),
    )


def clopper_pearson(errors: int, rows: int, confidence: float) -> float:
    """Exact upper confidence bound of an error rate (Clopper and Pearson, Biometrika 1934)."""
    if errors == rows:
        return 1.0
    return float(stats.beta.ppf(confidence, errors + 1, rows - errors))


def bettors(prompts: float) -> tuple[np.ndarray, np.ndarray]:
    """Stakes c from 1 down to 1/prompts, by a factor of :data:`STEP`, and each bettor's share of the wealth.

    :data:`ALL_IN` goes to c = 1, which a single prompt of loss 1 ruins. The others share the rest as 1/k, so that
    large stakes, which survive a few such losses, get more than small ones, which only help at high variance.
    """
    ranks = np.arange(1, max(1, math.ceil(math.log(max(2.0, prompts)) / -math.log(STEP))) + 1)
    shares = (1 - ALL_IN) / ranks / (1 / ranks).sum()
    return np.concatenate([[1.0], STEP**ranks]), np.concatenate([[ALL_IN], shares])


def betting_bound(values: np.ndarray, confidence: float, draws: int | None = None) -> float:
    """Upper confidence bound of the mean of independent values in [0, 1], by betting against every larger mean.

    If the true mean is m or more, the wealth prod_i (1 + c (m - x_i) / (1 - m)) of a bettor who stakes a fixed share
    c in [0, 1] has an expectation of at most 1, and so has any mixture of such bettors; by Markov's inequality it
    exceeds 1 / (1 - confidence) with a probability of at most 1 - confidence. The bound is the smallest m whose wealth
    does (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 2024, sections 4
    and 5). The mixture is fixed in advance and a product has no order, so the order of the values does not matter.

    The best stake depends on the unknown variance: hence the mixture (:func:`bettors`). Its cost at 95%: at zero loss
    the bound is 1 - (0.03)^(1/n) or slightly less, where Clopper-Pearson and Hoeffding-Bentkus have 1 - (0.05)^(1/n),
    so 1% needs 349 prompts instead of 299. With a loss of 1 on 2 of 400 prompts it is 2.5% (Clopper-Pearson 1.6%);
    with the same mean of 0.5% spread over many prompts it is 1.3%.

    Args:
        values: ``[prompts]``.
        draws: forecast: scales the wealth to this number of prompts with the same distribution of values.
    """
    distinct, counts = np.unique(values, return_counts=True)
    counts = counts * ((draws or len(values)) / len(values))
    stakes, shares = (column[:, None] for column in bettors(counts.sum()))
    threshold = -math.log1p(-confidence)
    kept, gains = 1 - stakes, stakes * (1 - distinct)

    def excess(x: float) -> float:
        """The log of the wealth against m = 1 - exp(-x), above the threshold; it rises with m."""
        with np.errstate(divide="ignore"):
            logs = np.log(kept + gains * math.exp(x)) @ counts + np.log(shares[:, 0])
        largest = logs.max()
        return largest + math.log(np.exp(logs - largest).sum()) - threshold if math.isfinite(largest) else -math.inf

    mean = float(values.mean())
    low = high = -math.log1p(-min(mean, 1.0)) if mean < 1 else math.inf
    step = 1.0 / counts.sum()
    while high < 36 and excess(high) < 0:  # from about 37 on, 1 - exp(-x) rounds to 1 in float64
        low, high, step = high, high + step, 2 * step
    if high >= 36:
        return 1.0
    root = optimize.brentq(lambda x: max(excess(x), -1e6), low, high, xtol=1e-13) if high > low else high
    return max(mean, -math.expm1(-root - 1e-12))


def _error(kind: BudgetMetric, confidence: float, averaged: bool) -> float:
    return (1 - confidence) * (1.0 if kind.binary and not averaged else ALL_IN)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"budget.confidence is {confidence}; expected a number between 0 and 1, such as 0.95.")
