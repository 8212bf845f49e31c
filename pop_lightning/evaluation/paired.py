"""Two-sided intervals of the difference between two models that were measured on the same documents.

What one document is worth varies far more than what pruning changes in it, so intervals are computed from the
differences per document, not from the two standard errors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Paired(NamedTuple):
    """A difference, second minus first, with its interval and the name of the method."""

    difference: float
    low: float
    high: float
    method: str


def paired_interval(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95, *, rate: bool = True
) -> Paired:
    """Interval of the difference between two means over the same independent documents.

    - Rates of which all values are 0 or 1: Bonett and Price, "Adjusted Wald confidence interval for a difference of
      binomial proportions based on paired data", Journal of Educational and Behavioral Statistics 2012. It has a width
      even if no document changed, and keeps its coverage at small numbers.
    - Otherwise Student's t of the differences per document.

    Args:
        first, second: one value per document, in the same order; at least two.
        rate: whether values lie in [0, 1], so that 0 and 1 are outcomes; False for nats and times.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    difference, n = float((b - a).mean()), len(a)
    if rate and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        gained, lost = (((b > a).sum() + 1) / (n + 2), ((a > b).sum() + 1) / (n + 2))
        half = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((gained + lost - (gained - lost) ** 2) / (n + 2))
        middle = gained - lost
        return Paired(difference, max(-1.0, middle - half), min(1.0, middle + half), "Bonett-Price")
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * float((b - a).std(ddof=1)) / np.sqrt(n)
    return Paired(difference, difference - half, difference + half, "Student")


def sameness_interval(values: Sequence[float], confidence: float = 0.95) -> Paired:
    """Interval of a mean minus 1, for rates in [0, 1] that compare the second model with the first itself.

    Clopper and Pearson's exact interval where all values are 0 or 1, otherwise Student's t, cut at what is possible.

    Args:
        values: one per document; at least two.
    """
    if set(values) <= {0, 1}:
        exact = stats.binomtest(int(sum(values)), len(values)).proportion_ci(confidence, "exact")
        return Paired(float(np.mean(values)) - 1, float(exact.low) - 1, float(exact.high) - 1, "Clopper-Pearson")
    found = paired_interval([1.0] * len(values), values, confidence)
    return found._replace(low=max(-1.0, found.low), high=min(0.0, found.high))


def bootstrap_interval(
    first: Sequence[Any],
    second: Sequence[Any],
    aggregate: Callable[[list], float],
    confidence: float = 0.95,
    *,
    resamples: int = 1000,
    seed: int = 1234,
) -> Paired:
    """Interval of the difference of a metric that is not a mean, such as a perplexity over all documents.

    Normal, with the standard deviation of the difference over ``resamples`` draws of documents with replacement; a
    draw has the same documents of both.

    Args:
        first, second: what ``aggregate`` expects of each document, in the same order.
    """
    draws = np.random.default_rng(seed).integers(len(first), size=(resamples, len(first)))
    values = [aggregate([second[i] for i in draw]) - aggregate([first[i] for i in draw]) for draw in draws]
    difference = float(aggregate(list(second)) - aggregate(list(first)))
    half = float(stats.norm.ppf((1 + confidence) / 2) * np.std(values, ddof=1))
    return Paired(difference, difference - half, difference + half, f"bootstrap ({resamples} resamples, seed {seed})")
