"""The budget's decisions on made-up losses: what it trains, when it continues, where it stops, what it verifies."""

import pytest

from pop_lightning.core.plan import Choice, Kept
from pop_lightning.evaluation import search as selection
from pop_lightning.evaluation.losses import METRICS
from pop_lightning.evaluation.search import Measured, Proposal, Training

BUDGET, MARGIN = 0.01, 0.002  # a bound lies MARGIN above its mean


def measured(depth, loss, kind="closed_form", steps=0):
    return Measured(Choice(depth, kind, steps), loss, loss + MARGIN, kl=10 * loss)


def budget(max_drop=BUDGET):
    lines = []
    return selection.Budget(max_drop, METRICS["agreement"], lines.append), lines


def drive(machine, losses):
    """Answer every proposal from ``losses`` by (depth, steps); returns the proposals and what is to be verified."""
    proposals, answer = [], None
    while True:
        try:
            proposal = machine.send(answer)
        except StopIteration as end:
            return proposals, end.value
        proposals.append(proposal)
        choice = proposal.choice
        answer = measured(choice.depth, losses[choice.depth, choice.steps], choice.projection, choice.steps)


def adapt(untrained, trained, extensions=2):
    keeper, lines = budget()
    start = [measured(depth, loss) for depth, loss in untrained.items()]
    machine = selection.within_budget(start, keeper, Training("lora", 100, extensions))
    proposals, sequence = drive(machine, trained)
    assert len(lines) >= len(proposals)
    return [(action, choice.depth, choice.steps) for action, choice in proposals], sequence, lines


def test_depths_that_keep_the_budget_are_not_trained_but_the_deepest():
    proposals, sequence, lines = adapt({8: 0.0, 6: 0.001, 4: 0.004}, {(4, 100): 0.002})
    assert proposals == [("train", 4, 100)]
    assert sequence == [Choice(8, "closed_form"), Choice(6, "closed_form"), Choice(4, "lora", 100)]
    assert "depth 8 (closed_form) loses 0.00%, within the budget of 1.00%: not trained" in lines[0]


def test_a_depth_that_training_brings_within_lets_it_go_deeper_and_back_off():
    untrained = {8: 0.001, 6: 0.03, 4: 0.08, 2: 0.5}
    proposals, sequence, lines = adapt(untrained, {(6, 100): 0.005, (4, 100): 0.05})
    assert proposals == [("train", 6, 100), ("train", 4, 100)]  # depth 2 is never tried
    assert sequence == [Choice(8, "closed_form"), Choice(6, "lora", 100)]
    assert any("depth 6 (after 100 steps)" in line and "go deeper" in line for line in lines)
    assert any("depth 4" in line and "back off to depth 6" in line for line in lines)


def test_a_depth_that_backs_off_to_an_untrained_one_trains_that_instead():
    proposals, sequence, _ = adapt({8: 0.004, 6: 0.2}, {(6, 100): 0.1, (8, 100): 0.001})
    assert proposals == [("train", 6, 100), ("train", 8, 100)]
    assert sequence == [Choice(8, "lora", 100)]


def test_training_continues_while_the_loss_is_close_and_falls():
    proposals, sequence, lines = adapt({8: 0.03, 6: 0.3}, {(8, 100): 0.015, (8, 200): 0.006, (6, 100): 0.2})
    assert proposals == [("train", 8, 100), ("extend", 8, 200), ("train", 6, 100)]
    assert sequence == [Choice(8, "lora", 200)]
    assert any("after 100 steps" in line and "train on" in line for line in lines)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({(8, 100): 0.018, (8, 200): 0.016, (8, 300): 0.015}, 3),  # the extensions are used up
        ({(8, 100): 0.018, (8, 200): 0.019}, 2),  # it no longer falls
        ({(8, 100): 0.021}, 1),  # not close
    ],
)
def test_a_training_that_leads_nowhere_ends(losses, expected):
    proposals, sequence, lines = adapt({8: 0.03, 6: 0.3}, losses)
    assert len(proposals) == expected
    assert sequence == []
    assert "no depth left" in lines[-1]


def test_without_extensions_a_training_is_one_round():
    proposals, _, _ = adapt({8: 0.03}, {(8, 100): 0.015}, extensions=0)
    assert proposals == [("train", 8, 100)]


def test_a_mean_within_the_budget_whose_bound_may_exceed_it_is_verified_last():
    proposals, sequence, lines = adapt({8: 0.001, 6: 0.0095, 4: 0.02}, {(6, 100): 0.009, (6, 200): 0.0091})
    assert proposals == [("train", 6, 100), ("extend", 6, 200)]
    assert sequence == [Choice(8, "closed_form"), Choice(6, "lora", 100)]
    assert "stop here" in lines[-1]


def test_training_that_made_it_worse_is_not_used():
    _, sequence, lines = adapt({8: 0.001}, {(8, 100): 0.003})
    assert sequence == [Choice(8, "closed_form")]
    assert "not better than 8 (closed_form)" in lines[-1]


def test_where_both_keep_the_budget_the_smaller_kl_decides_between_equal_losses():
    keeper, _ = budget()
    start = Measured(Choice(8, "closed_form"), 0.0, 0.002, kl=0.3)
    machine = selection.within_budget([start], keeper, Training("lora", 100))
    assert next(machine) == Proposal("train", Choice(8, "lora", 100))
    with pytest.raises(StopIteration) as end:
        machine.send(Measured(Choice(8, "lora", 100), 0.0, 0.002, kl=0.1))
    assert end.value.value == [Choice(8, "lora", 100)]


def test_without_training_every_depth_whose_mean_fits_is_verified():
    keeper, _ = budget()
    found = selection.untrained([measured(4, 0.0099), measured(8, 0.0), measured(6, 0.02)], keeper)
    assert found == [Choice(8, "closed_form"), Choice(4, "closed_form")]


@pytest.mark.parametrize(
    ("losses", "chosen", "rounds"),
    [
        ({(6, 100): 0.2, (6, 200): 0.1, (6, 300): 0.099}, Choice(6, "lora", 300), 3),
        ({(6, 100): 0.39}, Choice(6, "lora", 100), 1),  # less than a tenth: too little for another round
        ({(6, 100): 0.5}, Choice(6, "closed_form"), 1),
    ],
)
def test_at_a_requested_speedup_the_smallest_loss_wins(losses, chosen, rounds):
    keeper, _ = budget(None)
    fitted = [measured(6, 0.9, "reuse"), measured(6, 0.4)]
    proposals, sequence = drive(selection.least_loss(fitted, keeper, Training("lora", 100, 2)), losses)
    assert sequence == [chosen]
    assert len(proposals) == rounds
    assert drive(selection.least_loss(fitted, keeper, None), {}) == ([], [Choice(6, "closed_form")])


FEW, SOME, MANY = Kept(1), Kept(4), Kept(1, 0.1)
SPEEDUPS = {(8, FEW): 1.3, (6, FEW): 1.6, (4, FEW): 2.0, (8, SOME): 1.28, (6, SOME): 1.5, (4, SOME): 1.9}
SPEEDUPS |= {(8, MANY): 1.2, (6, MANY): 1.4, (4, MANY): 1.7}


def fastest(losses, speedups, screened=False, keeper=None):
    """The chosen tokens, and every request for measurements; ``losses`` by tokens and depth."""
    keeper, requests, answer = keeper or budget()[0], [], None
    machine = selection.fastest_plan([measured(*each) for each in losses[FEW].items()], speedups, screened, keeper)
    while True:
        try:
            requests.append(machine.send(answer))
        except StopIteration as end:
            return end.value, requests
        answer = {(depth, kept): measured(depth, losses[kept][depth]) for depth, kept in requests[-1].plans}


def test_the_tokens_in_full_that_save_most_are_chosen():
    losses = {FEW: {8: 0.001, 6: 0.02, 4: 0.3}, SOME: {8: 0.0, 6: 0.004, 4: 0.2}, MANY: {8: 0.0, 6: 0.001, 4: 0.15}}
    keeper, lines = budget()
    chosen, (request,) = fastest(losses, SPEEDUPS, keeper=keeper)
    assert chosen == SOME  # depth 6 at 1.5x
    assert request.plans == ((4, SOME), (4, MANY), (6, SOME), (6, MANY))  # the others save less than depth 8 alone
    assert any("boundary 4 is expected to keep the budget at depth 6, 1.50x" in line for line in lines)
    slow = SPEEDUPS | {(6, SOME): 1.25, (6, MANY): 1.2}
    assert fastest(losses, slow)[0] == FEW  # deeper would be slower
    nothing = {kept: dict.fromkeys((8, 6, 4), 0.5) for kept in (FEW, SOME, MANY)}
    keeper, lines = budget()
    assert fastest(nothing, SPEEDUPS, keeper=keeper)[0] == FEW
    # Of the search only an expectation is known: a loss can be within the budget where its bound is not.
    assert lines[-1].startswith("search: no plan is expected to keep the budget without training: boundary 1 is chosen")


def test_plans_are_screened_and_then_measured_from_the_fastest_until_one_keeps_the_budget():
    depths, boundaries = range(1, 11), [Kept(k) for k in (4, 8, 16)]
    speedups = {(depth, FEW): 20 - depth for depth in depths}
    speedups |= {(depth, kept): 20 - depth - kept.boundary / 100 for kept in boundaries for depth in depths}
    losses = {FEW: dict.fromkeys(depths, 0.5)}
    losses |= {
        kept: {depth: 0.5 if depth < 3 else 0.015 if depth < 7 else 0.001 for depth in depths} for kept in boundaries
    }
    chosen, (screen, first, second) = fastest(losses, speedups, screened=True)
    assert screen.screen
    assert len(screen.plans) == 30
    assert [plan[0] for plan in first.plans] == [3, 3, 3, 4, 4, 4, 5, 5]  # at most twice the budget
    assert second.plans[:4] == ((5, boundaries[2]), *((6, kept) for kept in boundaries))
    assert chosen == boundaries[0]
    assert sum(len(request.plans) for request in fastest(losses, speedups)[1]) > 16  # nothing was left out


def test_after_a_screening_only_the_plans_that_lose_least_are_measured_on_all_rows():
    depths, boundaries = range(1, 21), [Kept(k) for k in (4, 8, 16)]
    speedups = {(depth, FEW): 30 - depth for depth in depths}
    speedups |= {(depth, kept): 30 - depth - kept.boundary / 100 for kept in boundaries for depth in depths}
    losses = {FEW: dict.fromkeys(depths, 0.5)}
    losses |= {kept: {depth: 0.019 - depth / 10_000 for depth in depths} for kept in boundaries}  # none keeps 1%
    chosen, (screen, *passes) = fastest(losses, speedups, screened=True)
    assert chosen == FEW
    assert len(screen.plans) == 60
    assert [len(request.plans) for request in passes] == [8, 8, 8, 8]
    measured_on_all = [plan for request in passes for plan in request.plans]
    assert min(depth for depth, _ in measured_on_all) == 10  # 11 to 20 are 30 plans, two of depth 10 are the fastest
    assert [plan for plan in measured_on_all if plan[0] == 10] == [(10, boundaries[0]), (10, boundaries[1])]
    losses |= {kept: {depth: 0.001 - depth / 1e5 for depth in depths} for kept in boundaries}  # all keep it
    assert fastest(losses, speedups, screened=True)[1][1].plans[0] == (1, boundaries[0])  # the fastest, not the best


@pytest.mark.parametrize(("rows", "max_drop", "expected"), [(300, 0.01, 100), (199, 0.01, None), (5000, 0.001, 1000)])
def test_screening_needs_enough_rows_for_one_loss_to_decide_nothing(rows, max_drop, expected):
    assert selection.screening_rows(rows, budget(max_drop)[0]) == expected


def test_the_tokens_in_full_with_the_smallest_loss_are_chosen_at_a_requested_speedup():
    keeper, _ = budget(None)
    few, some, many = Kept(1), Kept(1, 0.1), Kept(16)
    plans = {few: [measured(8, 0.02)], some: [measured(7, 0.01), measured(7, 0.3, "reuse")], many: [measured(5, 0.03)]}
    assert selection.kept_of_least_loss(plans, dict.fromkeys(plans, 1.5), keeper) == some


@pytest.mark.parametrize("noise", [(0.0, 3e-8, -3e-8), (-3e-8, 0.0, 3e-8), (3e-8, -3e-8, 0.0)])
def test_equal_losses_are_decided_by_counted_operations_whatever_the_rounding(noise):
    keeper, _ = budget(None)
    few, some, many = Kept(1), Kept(1, 0.1), Kept(16)
    plans = {
        kept: [Measured(Choice(7, "reuse"), n, n, kl=abs(n))] for kept, n in zip((few, some, many), noise, strict=True)
    }
    assert selection.kept_of_least_loss(plans, {few: 1.5, some: 1.6, many: 1.4}, keeper) == some
    assert selection.kept_of_least_loss(plans, {few: 1.5, some: 1.5, many: 1.5}, keeper) == few  # the first
    kinds = [
        Measured(Choice(7, kind), n, n, kl=abs(n)) for kind, n in zip(("reuse", "closed_form"), noise, strict=False)
    ]
    assert keeper.best(kinds).choice.projection == "reuse"


def test_a_loss_that_is_smaller_by_more_than_rounding_decides():
    keeper, _ = budget()
    clearing = [Measured(Choice(7, kind), 0.0, 0.001, kl) for kind, kl in (("reuse", 0.00202), ("closed_form", 0.002))]
    assert keeper.best(clearing).choice.projection == "closed_form"
    missing = [Measured(Choice(7, kind), loss, 1.0, 1.0) for kind, loss in (("reuse", 0.5), ("closed_form", 0.49))]
    assert keeper.best(missing).choice.projection == "closed_form"
    assert keeper.best([*missing, clearing[0]]) is clearing[0]


def test_of_equally_fast_plans_the_first_is_chosen():
    speedups = {(8, FEW): 1.3, (6, FEW): 1.6, (8, SOME): 1.25, (6, SOME): 1.5, (8, MANY): 1.2, (6, MANY): 1.5}
    losses = {FEW: {8: 0.5, 6: 0.5}, SOME: {8: 0.0, 6: 0.004}, MANY: {8: 0.0, 6: 0.001}}
    assert fastest(losses, speedups)[0] == SOME


# --- from measurements to what is verified --------------------------------------------------------------------------


def entry(depth, loss, kind="closed_form", **more):
    figures = {"loss": loss, "expected_bound": loss + MARGIN, "kl": loss, "boundary": 1}
    return {"depth": depth, "projection": kind} | figures | more


def test_what_is_proposed_is_trained_until_it_is_known_what_to_verify():
    lines, asked = [], []
    answers = {Choice(10, "full", 50): 0.001, Choice(8, "full", 50): 0.4}

    def measure(choice):
        asked.append(choice)
        return Measured.of(entry(choice.depth, answers[choice], "full", steps=50))

    untrained = [Measured.of(entry(10, 0.05)), Measured.of(entry(8, 0.5))]
    keeper = selection.Budget(BUDGET, METRICS["agreement"], lines.append)
    proposals = selection.settle(untrained, keeper, Training("full", 50, 1))
    assert selection.finish(proposals, measure) == [Choice(10, "full", 50)]
    assert asked == list(answers)
    assert lines[-1] == "search: to verify, shallowest pruning first: 10 (full, 50 steps)"


def test_without_a_condition_the_least_loss_is_verified():
    measured = [Measured.of(entry(6, 0.3, "reuse")), Measured.of(entry(6, 0.2))]
    keeper = selection.Budget(None, METRICS["agreement"], lambda line: None)
    assert selection.finish(selection.settle(measured, keeper)) == [Choice(6, "closed_form")]
