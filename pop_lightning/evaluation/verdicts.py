"""Verdicts of the verify split: depths tested in one fixed sequence, each against its bound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pop_lightning.core.errors import InputError
from pop_lightning.evaluation.losses import BudgetMetric, metric_named
from pop_lightning.evaluation.metrics import Losses


@dataclass(frozen=True)
class Verdict:
    """What the verify split said about one depth.

    Attributes:
        depth: layers that context tokens run through.
        value: mean loss over the prompts (a fraction, or nats per response token for `nll_increase`).
        bound: upper confidence bound of that mean, of losses clipped at ``cap``.
        rows: number of rows.
        prompts: number of different prompts, which the bound counts.
        passed: whether the bound keeps the budget; None where no budget was a condition.
        cap: where the losses were clipped for the bound; 1 for rates, which need no clipping.
        clipped: the share of prompts that lost more.
    """

    depth: int
    value: float
    bound: float
    rows: int
    prompts: int
    passed: bool | None
    cap: float = 1.0
    clipped: float = 0.0


def fixed_sequence(
    depths: Sequence[int],
    losses: Mapping[int, Losses],
    metric: str | BudgetMetric,
    max_drop: float,
    confidence: float = 0.95,
) -> list[Verdict]:
    """Test depths from the shallowest pruning downward and stop at the first that fails.

    The order is fixed before the rows are seen, so every depth is tested at the full confidence without a correction:
    a false acceptance needs a false acceptance of the first depth whose true loss is above the budget (fixed-sequence
    testing; Angelopoulos et al., "Learn then Test", 2021, section 4). The chosen depth is the last that passed.

    Args:
        depths: the candidates, strictly falling: the shallowest pruning first.
        losses: per depth the losses on the verify split; a depth after the first failure is never looked up, so a lazy
            mapping measures only what is needed.
        metric, max_drop, confidence: the budget; `max_drop` is an absolute fraction, or nats per response token.

    Raises:
        InputError: depths out of order, or as for `upper_bound`.
    """
    if any(first <= second for first, second in pairwise(depths)):
        raise InputError(f"Candidate depths must fall strictly, found {list(depths)}; list the largest depth first.")
    verdicts: list[Verdict] = []
    for depth in depths:
        verdicts.append(judge(depth, losses[depth], metric, confidence, max_drop))
        if not verdicts[-1].passed:
            break
    return verdicts


def judge(depth: int, losses: Losses, metric: str | BudgetMetric, confidence: float, max_drop: float | None) -> Verdict:
    """One depth's verdict; without a `max_drop` nothing can fail."""
    bound, cap = losses.bound(metric, confidence), metric_named(metric).cap
    passed = None if max_drop is None else bound <= max_drop
    return Verdict(depth, losses.mean, bound, losses.rows, len(losses.values), passed, cap, losses.clipped(cap))
