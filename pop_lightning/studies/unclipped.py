"""What clipping costs: how often a certified ``nll_increase`` hides a larger mean of losses that are not clipped.

The bound of ``nll_increase`` is one of the mean of losses clipped at ``budget.nll_cap``. Here losses beyond the cap are
possible and their mean is 1.02 budgets, so certifying them is an error about the unclipped mean, and a bound below the
clipped mean one about what is promised.

    python -m pop_lightning.studies.unclipped [--draws N] [--output FOLDER]
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from pop_lightning.core.numbers import percent
from pop_lightning.core.tables import text_table
from pop_lightning.evaluation.losses import metric_named
from pop_lightning.evaluation.metrics import Losses
from pop_lightning.studies.promise import budget_of

PROMPTS = (24, 100, 400)
TRUE = 1.02  # the mean that is not clipped, in budgets
SIGMA, RARE = 2.0, 10.0  # of the lognormal law; the nats that a rare prompt loses
METRIC = metric_named("nll_increase")


def lognormal(rng: np.random.Generator, prompts: int, mean: float) -> np.ndarray:
    return rng.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA, prompts)


def clipped_lognormal(mean: float, cap: float) -> float:
    """The mean of ``min(loss, cap)``."""
    distance = (math.log(cap / mean) + SIGMA**2 / 2) / SIGMA
    below = NormalDist().cdf
    return mean * below(distance - SIGMA) + cap * (1 - below(distance))


def rare(rng: np.random.Generator, prompts: int, mean: float) -> np.ndarray:
    return RARE * (rng.random(prompts) < mean / RARE)


def clipped_rare(mean: float, cap: float) -> float:
    """The mean of ``min(loss, cap)``."""
    return mean / RARE * min(RARE, cap)


LAWS: dict[str, tuple[Callable[..., np.ndarray], Callable[[float, float], float]]] = {
    f"lognormal, sigma {SIGMA:g}": (lognormal, clipped_lognormal),
    f"{RARE:g} nats, rarely": (rare, clipped_rare),
}


@dataclass(frozen=True)
class Outcome:
    """Shares of single bounds at 95%: below the mean of clipped losses, and within the budget."""

    losses: str
    prompts: int
    max_drop: float
    missed: float
    certified: float


def simulate(law: str, prompts: int, draws: int, confidence: float = 0.95, seed: int = 0) -> Outcome:
    """Bounds of ``draws`` verify splits whose losses have a mean of 1.02 budgets, unclipped."""
    make, clipped = LAWS[law]
    rng = np.random.default_rng([seed, prompts, *law.encode()])
    max_drop = budget_of(METRIC, prompts, confidence)
    mean = TRUE * max_drop
    bounds = [Losses(make(rng, prompts, mean).tolist()).bound(METRIC, confidence) for _ in range(draws)]
    true = clipped(mean, METRIC.cap)
    return Outcome(
        law, prompts, max_drop, np.mean([b < true for b in bounds]), np.mean([b <= max_drop for b in bounds])
    )


COLUMNS = [
    "losses",
    "prompts",
    "budget",
    "bound below the clipped mean",
    "certified although the unclipped mean is above the budget",
]


def table(outcomes: list[Outcome]) -> list[list[str]]:
    return [
        [each.losses, str(each.prompts), METRIC.amount(each.max_drop), percent(each.missed), percent(each.certified)]
        for each in outcomes
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulate what clipping losses hides.")
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="sizes of the verify split")
    parser.add_argument("--draws", type=int, default=1500, help="bounds of each row of the table")
    parser.add_argument("--output", type=Path, help="folder for unclipped.json")
    args = parser.parse_args(argv)
    outcomes = [simulate(law, prompts, args.draws) for law in LAWS for prompts in args.prompts]
    print(text_table(COLUMNS, table(outcomes), left=(0,)))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "unclipped.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
