"""The metrics that a budget can be stated in: one object each, in one registry.

To add one, write its :class:`BudgetMetric` here (or in its own file) and add it to :data:`METRICS`. Recipe, bounds,
callback, check and report read everything that differs between metrics from these objects. Nothing heavy is imported,
because the command line lists the names.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pop_lightning.core.errors import InputError
from pop_lightning.core.numbers import number, percent


@dataclass(frozen=True)
class BudgetMetric:
    """The loss of a row under a metric, and the properties of such losses that are known in advance.

    Attributes:
        name: in recipes, artifacts and reports.
        what: description of the loss, for a caption.
        axis: label of a plot's axis.
        loss: maps a batch's row metrics (:func:`pop_lightning.evaluation.metrics.response_metrics`), ``[batch]`` each,
            to the loss ``[batch]`` that the budget bounds.
        binary: whether a row's loss is 0 or 1.
        rate: whether losses lie in [0, 1] and read as percentages; otherwise they are unbounded, and clipped for the
            bound.
        cap: the largest loss. Unbounded losses are clipped at it, and a budget must be smaller. The promise is then
            about clipped losses: a sample shows nothing about how large an unseen loss can be. A small cap needs few
            prompts, a large one counts rare damage in full.
    """

    name: str
    what: str
    axis: str
    loss: Callable[[Mapping[str, Any]], Any]
    binary: bool = False
    rate: bool = True
    cap: float = 1.0

    def clipping(self, cap: float | None, clipped: float | None) -> str:
        """The clipping in a bound, as the end of a sentence; empty for rates."""
        if self.rate or cap is None:
            return ""
        return f", where the loss of a prompt counts as {cap:g} nats at most ({percent(clipped or 0.0)} lost more)"

    def amount(self, value: float | None) -> str:
        """A loss, drop or bound in the metric's unit: percent for rates, nats otherwise."""
        if self.rate:
            return percent(value)
        return number(value) if value is None or not math.isfinite(value) else f"{number(value)} nats"


def _agreement(metrics: Mapping[str, Any]) -> Any:
    return (1 - metrics["agreement"]).clamp(0, 1)


def _exact_match(metrics: Mapping[str, Any]) -> Any:
    # At least the drop in exact match, because rows that pruning happens to repair are not credited.
    return ((metrics["teacher_exact_match"] > 0.5) & (metrics["exact_match"] < 0.5)).float()


def _nll_increase(metrics: Mapping[str, Any]) -> Any:
    return metrics["nll_increase"]


METRICS: dict[str, BudgetMetric] = {
    metric.name: metric
    for metric in (
        BudgetMetric(
            "agreement",
            "response tokens where the pruned model's most likely token differs from the full model's",
            "loss (1 - agreement)",
            _agreement,
        ),
        BudgetMetric(
            "nll_increase",
            "increase of the negative log-likelihood, in nats per response token",
            "loss (nats per token)",
            _nll_increase,
            rate=False,
        ),
        BudgetMetric(
            "exact_match",
            "responses that the full model gets right and the pruned model wrong",
            "loss (responses lost)",
            _exact_match,
            binary=True,
        ),
    )
}


def metric_named(name: "str | BudgetMetric", cap: float | None = None) -> BudgetMetric:
    """The metric with that name.

    Args:
        name: in :data:`METRICS`; a metric is returned unchanged.
        cap: the value at which unbounded losses are clipped (``budget.nll_cap``).

    Raises:
        InputError: there is none.
    """
    if isinstance(name, BudgetMetric):
        return name
    if name not in METRICS:
        raise InputError(key="budget.metric", expected=f"one of {', '.join(METRICS)}", found=name)
    metric = METRICS[name]
    return metric if metric.rate or cap is None else replace(metric, cap=cap)
