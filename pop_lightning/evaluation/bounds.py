"""Upper confidence bounds of a mean loss, valid at small numbers of prompts."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats

from pop_lightning.core.errors import InputError
from pop_lightning.core.kinds import METRICS


def upper_bound(
    losses: Sequence[float], metric: str, confidence: float = 0.95, seed: int = 0, *, averaged: bool = False
) -> float:
    """One-sided upper confidence bound of the mean loss, for independent prompts drawn from the same source.

    - `exact_match` with one row per prompt (0/1 losses): Clopper and Pearson, Biometrika 1934. Exact: holds at every
      number of prompts.
    - `agreement`, and `exact_match` averaged over several rows of a prompt (losses in [0, 1]): Hoeffding-Bentkus (Bates
      et al., "Distribution-Free, Risk-Controlling Prediction Sets", 2021, section 3.1): the largest mean that the
      p-value does not reject. Holds at every number of prompts.
    - `nll_increase` (unbounded): BCa bootstrap (Efron 1987) as in `scipy.stats.bootstrap`, 9999 resamples. Holds
      asymptotically only: with few prompts or heavy tails the true confidence is lower than stated. Prompts that are
      all equal have nothing to resample and give their value; a single prompt gives infinity.

    Args:
        losses: one value per prompt.
        metric: one of `METRICS`.
        confidence: probability, over draws of the prompts, that the bound is at or above the true mean.
        seed: of the bootstrap's resampling; the two other bounds are not random.
        averaged: some prompt has several rows. It is how the rows are, not how the losses came out, that decides
            between the two bounds of `exact_match`: choosing by the losses would void both.

    Raises:
        InputError: no losses, a loss outside the metric's range or not a number, an unknown metric, or a confidence
            outside (0, 1).
    """
    check_metric(metric)
    _check_confidence(confidence)
    values = np.asarray([float(loss) for loss in losses], dtype=np.float64)
    if values.size == 0:
        raise InputError("There are no rows to bound a loss with; give the verify split at least one row.")
    if not np.isfinite(values).all():
        raise InputError(
            f"A {metric} loss is not a finite number; check the model's logits on row {_first_bad(values)}."
        )
    if metric == "nll_increase":
        return _bootstrap(values, confidence, seed)
    if metric == "exact_match" and not averaged:
        if not np.isin(values, (0.0, 1.0)).all():
            raise InputError("exact_match losses of one row per prompt must be 0 or 1; use row_loss to make them.")
        return clopper_pearson(int(values.sum()), values.size, confidence)
    if values.min() < 0 or values.max() > 1:
        raise InputError(f"{metric} losses must lie in [0, 1], found {values.min():g} to {values.max():g}.")
    return hoeffding_bentkus(math.fsum(values), values.size, confidence)


def smallest_certifiable(prompts: int, metric: str, confidence: float = 0.95) -> float | None:
    """The smallest `max_drop` that so many prompts certify: the bound at zero loss, 1 - (1 - confidence)^(1/prompts).

    None for `nll_increase`, whose bootstrap bound has no such floor.
    """
    check_metric(metric)
    _check_confidence(confidence)
    if metric == "nll_increase":
        return None
    return 1.0 if prompts < 1 else -math.expm1(math.log1p(-confidence) / prompts)


def rows_needed(max_drop: float, metric: str, confidence: float = 0.95) -> int | None:
    """The fewest verify rows, each of its own prompt, with which a lossless depth keeps `max_drop`: 299 for 1% at 95%.

    A depth that does lose something needs more. None for `nll_increase`, whose bootstrap bound has no such
    floor.

    Raises:
        InputError: a `max_drop` of zero or less for a rate, which no number of rows can certify.
    """
    check_metric(metric)
    _check_confidence(confidence)
    if metric == "nll_increase":
        return None
    if max_drop <= 0:
        raise InputError(f"budget.max_drop is {max_drop:g}, which no number of rows can certify; give a positive drop.")
    if max_drop >= 1:
        return 1
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-max_drop)))


def clopper_pearson(errors: int, rows: int, confidence: float) -> float:
    if errors == rows:
        return 1.0
    return float(stats.beta.ppf(confidence, errors + 1, rows - errors))


def hoeffding_bentkus(total: float, rows: int, confidence: float) -> float:
    """The bound where `rows` losses in [0, 1] sum to `total`."""
    low, high = min(total / rows, 1.0), 1.0
    if low == 1.0:
        return 1.0
    # The p-value falls in the mean: bisect for where it crosses 1 - confidence, and keep the rejected (upper) end.
    for _ in range(60):
        middle = (low + high) / 2
        if _hoeffding_bentkus_p(total, rows, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _hoeffding_bentkus_p(total: float, rows: int, mean: float) -> float:
    """p-value of "the true mean is at least `mean`" when `rows` losses in [0, 1] sum to `total`."""
    observed = min(total / rows, mean)
    if mean >= 1:
        return float(observed >= 1)
    entropy = (1 - observed) * math.log((1 - observed) / (1 - mean))
    if observed > 0:
        entropy += observed * math.log(observed / mean)
    hoeffding = math.exp(-rows * entropy)
    # Losses are float32: a sum such as 1.00000002 stands for 1 and must not round up to 2.
    bentkus = math.e * float(stats.binom.cdf(math.ceil(total - 1e-7 * rows), rows, mean))
    return min(1.0, hoeffding, bentkus)


def _bootstrap(values: np.ndarray, confidence: float, seed: int) -> float:
    if values.size == 1:
        return math.inf
    if values.min() == values.max():
        return float(values[0])

    def upper(method: str) -> float:
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            result = stats.bootstrap(
                (values,),
                np.mean,
                confidence_level=confidence,
                alternative="less",
                method=method,
                n_resamples=9999,
                batch=max(1, 2_000_000 // values.size),  # bounds the resampled array at 16 MB
                rng=np.random.default_rng(seed),
            )
        return float(result.confidence_interval.high)

    bound = upper("BCa")
    # Nearly constant data can leave BCa without an acceleration; the percentile bound is always defined.
    return bound if math.isfinite(bound) else upper("percentile")


def _first_bad(values: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(values))[0])


def check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise InputError(f"budget.metric is '{metric}'; expected one of {', '.join(METRICS)}.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"budget.confidence is {confidence}; expected a number between 0 and 1, such as 0.95.")
