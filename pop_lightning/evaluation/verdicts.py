"""Verdicts on the verify split: depths are tested in a fixed sequence, each by its bound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pop_lightning.core.errors import InputError
from pop_lightning.evaluation.losses import BudgetMetric, metric_named
from pop_lightning.evaluation.metrics import Losses


@dataclass(frozen=True)
class Verdict:
    """The result of the verify split for one depth.

    Attributes:
        depth: number of layers that context tokens run through.
        value: mean loss over the prompts (a fraction, or nats per response token for `nll_increase`).
        bound: upper confidence bound of that mean, of losses clipped at ``cap``.
        rows: number of rows.
        prompts: number of distinct prompts, the sample size of the bound.
        passed: whether the bound is within the budget; None without a budget on the loss.
        cap: the value at which losses were clipped for the bound; 1 for rates, which need no clipping.
        clipped: the share of prompts whose loss is above ``cap``.
        needed: about how many prompts with the same losses would pass; None if it passed, or no number would.
    """

    depth: int
    value: float
    bound: float
    rows: int
    prompts: int
    passed: bool | None
    cap: float = 1.0
    clipped: float = 0.0
    needed: int | None = None


def fixed_sequence(
    depths: Sequence[int],
    losses: Mapping[int, Losses],
    metric: str | BudgetMetric,
    max_drop: float,
    confidence: float = 0.95,
) -> list[Verdict]:
    """Test depths from the shallowest pruning downward and stop at the first that fails.

    The order is fixed before the rows are seen, so every depth is tested at the full confidence without a correction:
    any false acceptance requires that of the first depth whose true loss is above the budget (fixed-sequence testing;
    Angelopoulos et al., "Learn then Test", 2021, section 4). The chosen depth is the last that passed.

    Args:
        depths: the candidates, strictly decreasing: the shallowest pruning first.
        losses: by depth, the losses on the verify split; depths after the first failure are never looked up.
        metric, max_drop, confidence: the budget; `max_drop` is an absolute fraction, or nats per response token.

    Raises:
        InputError: depths out of order, or as for `upper_bound`.
    """
    if any(first <= second for first, second in pairwise(depths)):
        raise InputError(f"Candidate depths must decrease, found {list(depths)}; list the largest depth first.")
    verdicts: list[Verdict] = []
    for depth in depths:
        verdicts.append(judge(depth, losses[depth], metric, confidence, max_drop))
        if not verdicts[-1].passed:
            break
    return verdicts


def judge(depth: int, losses: Losses, metric: str | BudgetMetric, confidence: float, max_drop: float | None) -> Verdict:
    """The verdict on one depth; without a `max_drop` it neither passes nor fails."""

    bound, cap = losses.bound(metric, confidence), metric_named(metric).cap
    passed = None if max_drop is None else bound <= max_drop
    needed = losses.needed(metric, max_drop, confidence) if passed is False and losses.mean < max_drop else None
    return Verdict(depth, losses.mean, bound, losses.rows, len(losses.values), passed, cap, losses.clipped(cap), needed)
