"""Does the promise hold? The budget's whole path on simulated losses whose true means are known.

Every draw is a run: losses on a search split choose the tokens that run in full (:func:`~.search.fastest_plan`) and the
depths to verify (:func:`~.search.untrained`), losses on an independent verify split are tested in a fixed sequence
(:func:`~.verdicts.fixed_sequence`). A run whose chosen plan truly loses more than the budget is a violation; at 95%
confidence at most 5% of the runs may be one.

    python -m pop_lightning.studies.promise [--quick] [--draws N] [--output FOLDER]
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from pop_lightning.core.plan import Choice, Kept
from pop_lightning.core.tables import text_table
from pop_lightning.evaluation.bounds import smallest_certifiable
from pop_lightning.evaluation.losses import METRICS, BudgetMetric, metric_named
from pop_lightning.evaluation.metrics import Losses, prompt_means
from pop_lightning.evaluation.search import Budget, Measured, Plan, fastest_plan, screening_rows, untrained
from pop_lightning.evaluation.verdicts import fixed_sequence

PROMPTS = (24, 100, 400, 1000)
TRUE = {5: 0.0, 4: 0.4, 3: 1.02, 2: 3.0}  # what each depth truly loses, as a share of the budget
# What each choice of tokens in full leaves of it. The last two make depth 2 lose 1.02 budgets, a trap for a search.
LEFT = {Kept(1): 1.0, Kept(16): 0.7, Kept(1, 0.05): 0.41, Kept(1, 0.1): 0.34, Kept(16, 0.1): 0.34}
SEARCHES = {"depth": (Kept(1),), "plan": tuple(LEFT)}
LAYERS, TOKENS = 6, 250  # that plans' speedups are counted at
BUDGET = 2.5  # the budget, as a multiple of the smallest drop that the prompts can certify
REPEATS = 4  # rows of one prompt where losses are duplicated or averaged


def normal(rng: np.random.Generator, prompts: int, mean: float) -> np.ndarray:
    """Narrow around the mean, and cut at the same distance on both sides, so that the mean is exact."""
    room = min(mean, 1 - mean)
    return mean + rng.normal(0, room / 4, prompts).clip(-room, room)


def heavy_tailed(rng: np.random.Generator, prompts: int, mean: float) -> np.ndarray:
    """Most lose next to nothing, some nearly everything: a beta distribution with a first parameter of 0.2."""
    return rng.beta(0.2, 0.2 * (1 - mean) / mean, prompts) if mean else np.zeros(prompts)


def rare_damage(rng: np.random.Generator, prompts: int, mean: float) -> np.ndarray:
    """A prompt loses nothing, or all it can."""
    return (rng.random(prompts) < mean).astype(float)


LAWS: dict[str, tuple[Callable[..., np.ndarray], bool]] = {  # and whether every prompt has several equal rows
    "normal": (normal, False),
    "heavy-tailed": (heavy_tailed, False),
    "rare damage": (rare_damage, False),
    "duplicated": (rare_damage, True),
}


@dataclass(frozen=True)
class Outcome:
    """Of many runs: how many chose a plan that loses more than the budget, and one as deep as 0.4 budgets allow."""

    search: str
    metric: str
    losses: str
    prompts: int
    max_drop: float
    runs: int
    violations: int
    accepted: int

    @property
    def share(self) -> float:
        return self.violations / self.runs


def draw(rng: np.random.Generator, metric: str, law: str, prompts: int, mean: float) -> Losses:
    """Losses of one variant; ``mean`` is the true one as a share of what a prompt can lose."""
    make, duplicated = LAWS[law]
    kind, values = metric_named(metric), make(rng, prompts, min(mean, 1.0))
    rows = prompts
    if kind.binary and law in ("normal", "heavy-tailed"):  # several rows of a prompt, each lost or not
        values, rows = rng.binomial(REPEATS, values.clip(0, 1)) / REPEATS, prompts * REPEATS
    if duplicated:
        repeated = torch.tensor(np.repeat(values, REPEATS)), torch.arange(prompts).repeat_interleave(REPEATS)
        values, rows = prompt_means(*repeated).numpy(), prompts * REPEATS
    return Losses((kind.cap * values).tolist(), rows)


def budget_of(kind: BudgetMetric, prompts: int, confidence: float) -> float:
    """The budget that ``prompts`` are given: more than they can certify at best, and less than all losses."""
    return min(0.3 * kind.cap, BUDGET * smallest_certifiable(prompts, kind, confidence, averaged=True))


def speedup(depth: int, kept: Kept) -> float:
    """In layers times tokens."""
    plan = kept.at(depth)
    full = plan.boundary_of(TOKENS) + plan.salient_of(TOKENS)
    return LAYERS * TOKENS / (depth * TOKENS + (LAYERS - depth) * full)


def simulate(
    metric: str,
    law: str,
    prompts: int,
    runs: int,
    *,
    search: str = "depth",
    confidence: float = 0.95,
    claimed: float = 0.95,
    seed: int = 0,
) -> Outcome:
    """Run the budget's path ``runs`` times.

    Args:
        search: over depths, or over all plans; a key of ``SEARCHES``.
        confidence: of the bounds; ``claimed`` sets the size of the budget, so that a test can see bounds fail.
    """
    kind = metric_named(metric)
    rng = np.random.default_rng([seed, prompts, *law.encode(), *metric.encode()])
    max_drop = budget_of(kind, prompts, claimed)
    budget = Budget(max_drop, kind, lambda line: None)
    ways = SEARCHES[search]
    truth = {(depth, kept): TRUE[depth] * LEFT[kept] * max_drop for kept in ways for depth in TRUE}

    def drawn(plan: Plan) -> Losses:
        return draw(rng, metric, law, prompts, truth[plan] / kind.cap)

    violations = accepted = 0
    for _ in range(runs):
        losses: dict[Plan, Losses] = {}  # on the search split

        def measured(plan: Plan, rows: int | None = None, losses: dict[Plan, Losses] = losses) -> Measured:
            if plan not in losses:
                losses[plan] = drawn(plan)
            if rows is not None:  # screened: the mean decides
                mean = Losses(losses[plan].values[:rows]).mean
                return Measured(Choice(plan[0], "reuse"), mean, mean, mean)
            mean, bound = losses[plan].mean, losses[plan].bound(kind, confidence, prompts)
            return Measured(Choice(plan[0], "reuse"), mean, bound, mean)

        kept = _tokens_in_full(ways, measured, prompts, budget)
        sequence = [choice.depth for choice in untrained([measured((depth, kept)) for depth in TRUE], budget)]
        verify = {depth: drawn((depth, kept)) for depth in TRUE}
        passed = [v.depth for v in fixed_sequence(sequence, verify, metric, max_drop, confidence) if v.passed]
        violations += bool(passed) and truth[passed[-1], kept] > max_drop
        accepted += bool(passed) and passed[-1] <= 4
    return Outcome(search, metric, law, prompts, max_drop, runs, violations, accepted)


def _tokens_in_full(ways: Sequence[Kept], measured: Callable[..., Measured], prompts: int, budget: Budget) -> Kept:
    """What the pipeline does with the search split's losses to choose them."""
    if len(ways) == 1:
        return ways[0]
    rows = screening_rows(prompts, budget)
    speedups = {(depth, kept): speedup(depth, kept) for kept in ways for depth in TRUE}
    search = fastest_plan([measured((depth, ways[0])) for depth in TRUE], speedups, rows is not None, budget)
    answer = None
    while True:
        try:
            request = search.send(answer)
        except StopIteration as end:
            return end.value
        answer = {plan: measured(plan, rows if request.screen else None) for plan in request.plans}


def table(outcomes: list[Outcome]) -> list[list[str]]:
    return [
        [
            each.search,
            each.metric,
            each.losses,
            f"{each.prompts}",
            metric_named(each.metric).amount(each.max_drop),
            f"{100 * each.share:.1f}%",
            f"{100 * each.accepted / each.runs:.0f}%",
        ]
        for each in outcomes
    ]


COLUMNS = ["searched", "metric", "losses", "prompts", "budget", "violations", "depth at 0.4 budgets kept"]


def markdown(outcomes: list[Outcome]) -> str:
    rows = [COLUMNS, ["---"] * len(COLUMNS), *table(outcomes)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Simulate how often the budget's promise is broken.")
    parser.add_argument("--quick", action="store_true", help="24 and 100 prompts, 40 runs each")
    parser.add_argument(
        "--searched", choices=SEARCHES, nargs="+", default=list(SEARCHES), help="what the search chooses"
    )
    parser.add_argument("--prompts", type=int, nargs="+", help="sizes of the splits")
    parser.add_argument("--draws", type=int, default=200, help="runs of each row of the table")
    parser.add_argument("--output", type=Path, help="folder for promise.json and promise.md")
    args = parser.parse_args(argv)
    sizes, runs = (PROMPTS[:2], 40) if args.quick else (args.prompts or PROMPTS, args.draws)
    outcomes = [
        simulate(metric, law, n, runs, search=search)
        for search in args.searched
        for metric in METRICS
        for law in LAWS
        for n in sizes
    ]
    print(text_table(COLUMNS, table(outcomes)))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "promise.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
        (args.output / "promise.md").write_text(markdown(outcomes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
