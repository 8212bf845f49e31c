"""The rule that calls times noisy. Nothing here looks at a clock."""

import pytest

from pop_lightning.core import clock
from pop_lightning.core.clock import NOISY, noise, spread
from pop_lightning.run import report


def test_the_times_that_vary_most_are_named_from_a_fifth_above_the_median_on():
    assert noise({}) == ""
    steady, slow = spread([10.0] * 9), spread([10.0] * 7 + [15.0] * 2)
    assert noise({"the full prefill": steady, "the pruned prefill": {"median": 10.0, "p90": 12.0}}) == ""
    said = "The times are noisy: the full prefill's p90 lies 50% above its median."
    assert (
        noise({"the full prefill": slow, "the pruned prefill": steady, "the bound": {"median": 1, "p90": 1.3}}) == said
    )


@pytest.mark.parametrize("above", [0.0, NOISY - 0.01, NOISY + 0.01, 1.5])
def test_the_report_of_pop_fit_has_the_same_rule(above, monkeypatch):
    ttft = {"full_ms": 10.0, "full_p90_ms": 10.5, "pruned_ms": 8.0, "pruned_p90_ms": 8.0 * (1 + above)}
    said = noise(
        {f"the {n} prefill": {"median": ttft[f"{n}_ms"], "p90": ttft[f"{n}_p90_ms"]} for n in ("full", "pruned")}
    )
    assert report.noise(ttft).startswith(said)
    assert bool(report.noise(ttft)) == bool(said) == (above > NOISY)
    monkeypatch.setattr(clock, "NOISY", 2.0)
    assert report.noise(ttft) == "", "one rule, in one place"
