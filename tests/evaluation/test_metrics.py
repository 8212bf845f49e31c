"""The per-row metrics against a plain loop, and the bounds against direct calculation and simulation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pop_lightning.core.errors import InputError
from pop_lightning.evaluation.bounds import (
    ALL_IN,
    bettors,
    clopper_pearson,
    largest_certified_loss,
    prompts_needed,
    rows_needed,
    smallest_certifiable,
    upper_bound,
)
from pop_lightning.evaluation.losses import METRICS, BudgetMetric, metric_named
from pop_lightning.evaluation.metrics import (
    LOST_NATS,
    ROW_METRICS,
    Losses,
    RowMetrics,
    prompt_losses,
    response_metrics,
    row_loss,
    summary,
)
from pop_lightning.evaluation.verdicts import fixed_sequence, judge


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 7, 11, generator=generator).mul(3)
    student = (teacher + torch.randn(5, 7, 11, generator=generator)).to(dtype)
    targets = teacher.argmax(-1)
    targets[0, 1] = (targets[0, 1] + 1) % 11
    student[4] = teacher[4]
    lengths = torch.tensor([7, 3, 1, 5, 6])
    mask = torch.arange(7)[None] < lengths[:, None]
    targets[~mask] = -100
    return student, teacher.to(dtype), targets, mask


def plain(student, teacher, targets, mask, row):
    kl, same, nll, teacher_nll, hit, teacher_hit = [], [], [], [], [], []
    for r in range(mask.shape[1]):
        if not mask[row, r]:
            continue
        q, p = student[row, r].double().softmax(-1), teacher[row, r].double().softmax(-1)
        kl.append(sum(float(p[v]) * math.log(float(p[v]) / float(q[v])) for v in range(len(p))))
        same.append(float(q.argmax() == p.argmax()))
        nll.append(-math.log(q[targets[row, r]]))
        teacher_nll.append(-math.log(p[targets[row, r]]))
        hit.append(bool(q.argmax() == targets[row, r]))
        teacher_hit.append(bool(p.argmax() == targets[row, r]))
    mean = [sum(x) / len(x) for x in (kl, same, nll, teacher_nll)]
    return dict(zip(ROW_METRICS, [*mean, mean[2] - mean[3], float(all(hit)), float(all(teacher_hit))], strict=True))


@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_response_metrics_equal_a_plain_loop(chunk_size, dtype):
    student, teacher, targets, mask = example(dtype)
    found = response_metrics(student, teacher, targets, mask, chunk_size=chunk_size)
    assert tuple(found) == ROW_METRICS
    for row in range(5):
        for name, value in plain(student, teacher, targets, mask, row).items():
            assert found[name][row].item() == pytest.approx(value, rel=1e-5, abs=1e-6), (name, row)


def test_positions_outside_the_mask_are_never_read():
    student, teacher, targets, mask = example()
    before = response_metrics(student, teacher, targets, mask)
    student[~mask], teacher[~mask] = math.nan, math.inf
    after = response_metrics(student, teacher, targets, mask)
    assert all(torch.equal(before[name], after[name]) for name in ROW_METRICS)


def test_equal_models_lose_nothing_and_ruled_out_tokens_give_no_nan():
    _, teacher, targets, mask = example()
    teacher[..., 3] = -math.inf
    found = response_metrics(teacher, teacher, targets.masked_fill(targets == 3, 0), mask)
    assert found["kl"].eq(0).all()
    assert found["agreement"].eq(1).all()
    assert all(row_loss(found, metric).eq(0).all() for metric in METRICS)


def test_response_metrics_refuses_what_does_not_fit():
    student, teacher, targets, mask = example()
    mask[2] = False
    with pytest.raises(InputError, match="row 2"):
        response_metrics(student, teacher, targets, mask)
    with pytest.raises(InputError, match="shapes"):
        response_metrics(student, teacher[:, :3], targets, mask)


def test_row_losses_of_each_metric():
    metrics = {
        "agreement": torch.tensor([1.0, 0.75, 0.0, 1.0]),
        "nll_increase": torch.tensor([0.5, -0.25, 0.0, 1.0]),
        "exact_match": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "teacher_exact_match": torch.tensor([1.0, 1.0, 0.0, 0.0]),
    }
    assert row_loss(metrics, "agreement").tolist() == [0, 0.25, 1, 0]
    assert row_loss(metrics, "nll_increase").tolist() == [0.5, -0.25, 0, 1]
    assert row_loss(metrics, "exact_match").tolist() == [0, 1, 0, 0]
    with pytest.raises(InputError, match="accuracy"):
        row_loss(metrics, "accuracy")


@pytest.mark.parametrize(("errors", "rows"), [(0, 50), (1, 50), (7, 100), (99, 100), (3, 1000)])
def test_clopper_pearson_is_where_the_binomial_tail_equals_the_error_rate(errors, rows):
    bound = upper_bound([1.0] * errors + [0.0] * (rows - errors), "exact_match", 0.95)
    tail = sum(math.comb(rows, k) * bound**k * (1 - bound) ** (rows - k) for k in range(errors + 1))
    assert tail == pytest.approx(0.05, rel=1e-6)


def test_bound_where_every_row_is_lost_is_one():
    assert upper_bound([1.0] * 9, "exact_match") == 1
    assert upper_bound([1.0] * 9, "agreement") == 1


def plain_wealth(losses, mean):
    """The mixture's wealth against "the mean is ``mean``", bettor by bettor and loss by loss."""
    total = 0.0
    for stake, share in zip(*bettors(len(losses)), strict=True):
        wealth = share
        for loss in losses:
            wealth *= 1 + stake * (mean - loss) / (1 - mean)
        total += wealth
    return total


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.sampled_from([0.5, 0.9, 0.95]))
def test_the_betting_bound_is_where_the_wealth_reaches_its_goal(losses, confidence):
    bound = upper_bound(losses, "agreement", confidence)
    assert np.mean(losses) <= bound <= 1
    if bound < 1 - 1e-9:
        assert plain_wealth(losses, bound + 1e-9) >= (1 - 1e-6) / (1 - confidence)
        if bound > np.mean(losses) + 1e-9:
            assert plain_wealth(losses, bound - 1e-6) <= (1 + 1e-6) / (1 - confidence)


DRAWS = {
    "small": lambda rng, shape: (rng.beta(1, 19, shape), 0.05),
    "rare": lambda rng, shape: ((rng.random(shape) < 0.04) * 1.0, 0.04),
    "large": lambda rng, shape: (rng.random(shape), 0.5),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("rows", [3, 24, 60])
def test_the_betting_bound_covers_the_true_mean_at_any_number_of_rows(draw, rows):
    samples, mean = DRAWS[draw](np.random.default_rng(1), (300, rows))
    bounds = np.array([upper_bound(sample, "agreement", 0.9) for sample in samples])
    assert (bounds >= mean).mean() >= 0.9 - 2 * math.sqrt(0.09 / 300)
    assert (bounds >= samples.mean(axis=1)).all()


@pytest.mark.parametrize("rows", [3, 8, 24, 100])
def test_the_bound_of_the_nll_covers_where_large_losses_are_rare(rows):
    # Nine in ten draws of 3 rows hold none of the large losses: a bootstrap of them would promise about zero.
    generator = np.random.default_rng(2)
    samples = np.where(generator.random((300, rows)) < 0.03, 0.8, 0.001)
    bounds = np.array([upper_bound(sample, "nll_increase", 0.95) for sample in samples])
    assert (bounds >= 0.03 * 0.8 + 0.97 * 0.001).mean() >= 0.95


def test_the_bound_of_the_nll_clips_at_the_cap_and_says_how_often():
    losses = Losses([0.01] * 99 + [3.0])
    assert losses.bound("nll_increase", 0.95) == Losses([0.01] * 99 + [1.0]).bound("nll_increase", 0.95)
    verdict = judge(4, losses, "nll_increase", 0.95, 0.3)
    assert (verdict.cap, verdict.clipped, verdict.passed) == (1.0, 0.01, True)
    lost = judge(4, Losses([0.01] * 99 + [LOST_NATS]), "nll_increase", 0.95, 0.3)
    assert lost.bound == lost.value > 1, "a bound of clipped losses is never below the mean of the losses as they are"
    assert lost.passed is False
    wider = metric_named("nll_increase", cap=5.0)
    assert losses.bound(wider, 0.95) > losses.bound("nll_increase", 0.95)
    assert metric_named("agreement", cap=5.0).cap == 1


def test_a_bound_adapts_to_the_variance():
    spread, lost = [0.05] * 40 + [0.0] * 360, [1.0] * 2 + [0.0] * 398  # both lose 0.5%
    assert upper_bound(spread, "agreement") < 0.014
    assert 0.024 < upper_bound(lost, "agreement") < 0.026


@pytest.mark.parametrize(("metric", "error"), [("agreement", 0.05 * ALL_IN), ("exact_match", 0.05)])
def test_bound_at_zero_loss_is_the_smallest_certifiable_drop(metric, error):
    for rows in (1, 10, 299, 1000):
        closed = 1 - error ** (1 / rows)
        assert smallest_certifiable(rows, metric, 0.95) == pytest.approx(closed, rel=1e-9)
        found = upper_bound([0.0] * rows, metric, 0.95)
        assert closed * 0.9 <= found <= closed * (1 + 1e-9)  # the other bettors of the mixture win a little as well
    assert smallest_certifiable(0, metric) == 1
    assert upper_bound([0.0] * 100, "nll_increase") <= smallest_certifiable(100, "nll_increase")


@pytest.mark.parametrize(("metric", "rows"), [("agreement", 349), ("exact_match", 299), ("nll_increase", 349)])
def test_rows_that_one_percent_needs(metric, rows):
    assert rows_needed(0.01, metric, 0.95) == rows
    assert upper_bound([0.0] * rows, metric) <= 0.01
    assert upper_bound([0.0] * (rows - 40), metric) > 0.01
    assert rows_needed(1.0, "exact_match") == 1
    with pytest.raises(InputError, match="max_drop"):
        rows_needed(0.0, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_the_largest_certified_loss_is_the_last_that_keeps_the_budget(metric):
    most = largest_certified_loss(1000, metric, 0.02)
    lost, scale = most * 1000, METRICS[metric].cap
    assert 0 < most < 0.02
    worst = [scale] * int(lost) + [lost % 1 * scale] + [0.0] * (999 - int(lost))
    assert upper_bound(worst, metric) <= 0.02
    assert upper_bound([scale, *worst[:-1]], metric) > 0.02
    if metric != "exact_match":  # as much, but spread: the bound follows the variance
        assert upper_bound([most] * 1000, metric) < upper_bound(worst, metric)
    assert largest_certified_loss(20, metric, 0.02) is None


@given(st.lists(st.floats(0, 1), min_size=20, max_size=20))
def test_losses_of_0_and_1_are_the_worst_of_the_same_mean(losses):
    lost = sum(losses)
    worst = ([1.0] * int(lost) + [lost % 1] + [0.0] * 20)[:20]
    assert upper_bound(losses, "agreement") <= upper_bound(worst, "agreement") + 1e-9


def test_bettors_share_their_wealth_which_never_becomes_negative():
    for prompts in (1, 3, 400):
        stakes, shares = bettors(prompts)
        assert shares.sum() == pytest.approx(1)
        assert shares[0] == ALL_IN
        assert (stakes > 0).all()
        assert (stakes <= 1).all()


@pytest.mark.parametrize("metric", METRICS)
def test_a_forecast_for_the_same_number_of_prompts_is_the_bound(metric):
    values = [0.0] * 50 + [1.0] * 5
    losses = Losses(values)
    assert losses.bound(metric, 0.95, prompts=55) == pytest.approx(losses.bound(metric, 0.95))
    assert losses.mean < losses.bound(metric, 0.95, prompts=550) < losses.bound(metric, 0.95)
    assert losses.bound(metric, 0.95, prompts=550) == pytest.approx(upper_bound(values * 10, metric, 0.95))


@pytest.mark.parametrize("metric", METRICS)
def test_the_number_of_prompts_at_which_a_failed_loss_would_pass(metric):
    lost = [0.0] * 57 + [1.0]  # 1.7%
    verdict = judge(4, Losses(lost), metric, 0.95, 0.03)
    assert verdict.passed is False
    assert judge(4, Losses(lost * (verdict.needed // len(lost) + 1)), metric, 0.95, 0.03).passed
    assert not judge(4, Losses(lost * int(0.9 * verdict.needed / len(lost))), metric, 0.95, 0.03).passed
    assert judge(4, Losses(lost), metric, 0.95, 0.01).needed is None  # the mean itself is above
    assert judge(4, Losses(lost), metric, 0.95, 0.5).needed is None  # it passed
    assert prompts_needed(lost, metric, 1 / 58 + 1e-7) is None


def test_a_metric_is_one_object_in_the_registry(monkeypatch):
    first = BudgetMetric("first_token", "first tokens lost", "loss", lambda rows: rows["first"], binary=True)
    monkeypatch.setitem(METRICS, "first_token", first)
    rows = measured([1, 2, 3], [0.0, 0.0, 0.0]) | {"first": torch.tensor([0.0, 1.0, 0.0])}
    assert summary(rows, "first_token", 0.95, 3)["loss"] == pytest.approx(1 / 3)
    assert rows_needed(0.01, "first_token") == 299
    assert first.amount(0.25) == "25.00%"


# --- values that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_pruned_model_without_a_distribution_has_lost(value):
    teacher = example()[1]
    mask, student = torch.ones(5, 7), teacher.clone()
    student[2, 3] = value
    found = response_metrics(student, teacher, teacher.argmax(-1), mask)
    whole = response_metrics(teacher, teacher, teacher.argmax(-1), mask)
    changed = found["agreement"] < whole["agreement"]
    assert changed.tolist() == [False, False, True, False, False]
    assert found["exact_match"][2] == 0
    assert found["kl"][2] == pytest.approx(LOST_NATS / 7)
    assert all(value.isfinite().all() for value in found.values())


def test_bounds_refuse_bad_losses():
    with pytest.raises(InputError, match="no rows"):
        upper_bound([], "agreement")
    with pytest.raises(InputError, match="finite"):
        upper_bound([0.0, math.nan], "nll_increase")
    with pytest.raises(InputError, match="0 or 1"):
        upper_bound([0.5], "exact_match")
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        upper_bound([1.5], "agreement")
    with pytest.raises(InputError, match=r"exact_match losses must lie in \[0, 1\]"):
        upper_bound([1.5], "exact_match", averaged=True)
    with pytest.raises(InputError, match="confidence"):
        upper_bound([0.0], "agreement", 95)


def test_fixed_sequence_stops_at_the_first_failure():
    losses = {11: [0.0] * 400, 8: [0.0] * 400, 6: [1.0] * 40 + [0.0] * 360}  # depth 4 would raise if looked up
    losses = {depth: Losses(values) for depth, values in losses.items()}
    verdicts = fixed_sequence([11, 8, 6, 4], losses, "exact_match", 0.01)
    assert [(v.depth, v.passed, v.rows) for v in verdicts] == [(11, True, 400), (8, True, 400), (6, False, 400)]
    assert verdicts[-1].value == pytest.approx(0.1)
    assert all(v.passed == (v.bound <= 0.01) for v in verdicts)
    assert fixed_sequence([], {}, "agreement", 0.01) == []
    with pytest.raises(InputError, match="largest depth first"):
        fixed_sequence([4, 8], losses, "agreement", 0.01)


# --- several rows of one prompt -------------------------------------------------------------------------------------


def measured(prompts, losses):
    """Rows as `RowMetrics.compute` returns them, whose agreement loses `losses`."""
    lost = torch.tensor(losses)
    same = {name: torch.zeros(len(losses)) for name in ROW_METRICS}
    exact = {"exact_match": (lost == 0).float(), "teacher_exact_match": torch.ones(len(losses))}
    return same | exact | {"agreement": 1 - lost, "prompt": torch.tensor(prompts)}


def test_the_budget_holds_for_the_chosen_depth_and_its_own_bound_less_often():
    """Which depth is chosen depends on the bounds, so the bound of the chosen one is not one of a fixed depth."""
    rng, runs, prompts, budget = np.random.default_rng(0), 20_000, 1000, 0.02
    truth = budget * np.array([0, 0.4, 1.001, 3])
    bound_at = np.array([clopper_pearson(errors, prompts, 0.95) for errors in range(120)])
    bounds = bound_at[rng.binomial(prompts, truth, (runs, 4))]
    chosen = np.cumprod(bounds <= budget, axis=1).sum(axis=1) - 1
    assert chosen.min() == 0
    assert (truth[chosen] > budget).mean() <= 0.05
    assert (bounds[np.arange(runs), chosen] < truth[chosen]).mean() > 0.05


@pytest.mark.parametrize("metric", ["agreement", "exact_match"])
def test_rows_of_one_prompt_are_one_draw(metric):
    once = prompt_losses(measured([5, 3, 9], [0.0, 1.0, 0.0]), metric)
    thrice = prompt_losses(measured([5, 3, 9] * 3, [0.0, 1.0, 0.0] * 3), metric)
    assert list(thrice.values) == list(once.values) == [1.0, 0.0, 0.0]  # in order of the prompts
    assert (once.rows, thrice.rows) == (3, 9)
    assert thrice.bound(metric, 0.95) >= once.bound(metric, 0.95)  # repeating a prompt shows nothing new


def test_a_prompts_loss_is_the_mean_of_its_rows():
    losses = prompt_losses(measured([7, 7, 7, 1], [1.0, 0.0, 0.0, 0.0]), "exact_match")
    assert list(losses.values) == pytest.approx([0.0, 1 / 3])
    assert losses.mean == pytest.approx(1 / 6)
    assert losses.averaged
    assert losses.bound("exact_match", 0.95) == upper_bound([0.0, 1 / 3], "agreement", 0.95)
    found = summary(measured([7, 7, 7, 1], [1.0, 0.0, 0.0, 0.0]), "agreement", 0.95, 100)
    assert (found["rows"], found["prompts"]) == (4, 2)
    assert found["agreement"] == pytest.approx(1 - found["loss"]) == pytest.approx(5 / 6)


def test_bounds_over_prompts_cover_where_rows_of_a_prompt_fail_together():
    generator = np.random.default_rng(5)
    prompts, rows, rate, covered, by_row = 60, 4, 0.1, [], []
    for _ in range(200):
        lost = (generator.random(prompts) < rate).astype(float)  # all rows of a prompt alike: the worst case
        losses = prompt_losses(measured(np.repeat(np.arange(prompts), rows).tolist(), np.repeat(lost, rows).tolist()),
                               "exact_match")  # fmt: skip
        covered.append(losses.bound("exact_match", 0.9) >= rate)
        by_row.append(upper_bound(np.repeat(lost, rows), "exact_match", 0.9) >= rate)
    assert np.mean(covered) >= 0.9 - 2 * math.sqrt(0.09 / 200)
    assert np.mean(by_row) < 0.85  # what counting rows would have promised


def test_the_choice_between_the_bounds_of_exact_match_does_not_look_at_the_losses():
    assert Losses([0.0, 1.0, 0.0], rows=6).averaged
    looser = Losses([0.0, 1.0, 0.0], rows=6).bound("exact_match", 0.95)
    assert looser > Losses([0.0, 1.0, 0.0]).bound("exact_match", 0.95)


def test_row_losses_do_not_depend_on_the_order_of_batches():
    generator = torch.Generator().manual_seed(4)
    values = {"kl": torch.rand(23, generator=generator), "agreement": torch.rand(23, generator=generator)}
    seeds = torch.randint(0, 2**62, (23,), generator=generator)
    seeds[5] = seeds[6]  # two equal rows must not depend on the order either

    def collect(order, batch):
        metric = RowMetrics(["kl", "agreement"])
        for part in order.split(batch):
            metric.update({name: value[part] for name, value in values.items()}, seeds[part])
        return metric.compute()

    first = collect(torch.arange(23), 23)
    second = collect(torch.randperm(23, generator=generator), 4)
    assert all(torch.equal(first[name], second[name]) for name in values)
    assert first["kl"].shape == (23,)
    assert first["kl"].dtype == torch.float32
    best = seeds.argmin()
    assert first["agreement"][0].item() == pytest.approx(values["agreement"][best].item())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_rank_without_rows_joins_the_gather_with_the_right_types():
    sent = []

    def gather(tensor, group=None):
        sent.append(tensor.dtype)
        other = torch.tensor([3, 1]) if tensor.dtype == torch.int64 else torch.tensor([0.3, 0.1])
        return [tensor, other]

    metric = RowMetrics(["kl"], dist_sync_fn=gather, distributed_available_fn=lambda: True)
    assert metric.compute()["kl"].tolist() == pytest.approx([0.1, 0.3])
    assert sent == [torch.int64, torch.int64, torch.float32]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_row_losses_start_empty_reset_and_name_a_missing_value():
    metric = RowMetrics(["kl"])
    assert metric.compute()["kl"].shape == (0,)
    metric.update({"kl": torch.ones(2)}, torch.arange(2))
    metric.reset()
    with pytest.raises(InputError, match="'kl'"):
        metric.update({"agreement": torch.ones(2)}, torch.arange(2))
    with pytest.raises(InputError, match=r"\[batch\]"):
        metric.update({"kl": torch.ones(3)}, torch.arange(2))
