"""A small sample of the simulation of the budget's promise."""

import json

import pytest

from pop_lightning.evaluation.losses import METRICS
from pop_lightning.studies.promise import LAWS, SEARCHES, main, simulate

QUICK = [("agreement", "rare damage"), ("exact_match", "normal")]
OVER_PLANS = [
    pytest.param(metric, law, "plan", marks=[] if (metric, law) in QUICK else pytest.mark.full)
    for metric in METRICS
    for law in LAWS
]


@pytest.mark.parametrize(
    ("metric", "law", "search"), [*((metric, law, "depth") for metric in METRICS for law in LAWS), *OVER_PLANS]
)
def test_the_promise_holds_on_few_prompts(metric, law, search):
    outcome = simulate(metric, law, 24, 40, search=search)
    assert outcome.violations <= 5  # at a true rate of 5%, more than 5 of 40 have a chance of 1%


@pytest.mark.parametrize("search", SEARCHES)
def test_the_simulation_sees_bounds_that_do_not_hold(search):
    assert simulate("exact_match", "rare damage", 100, 100, search=search, confidence=0.5).share > 0.1


def test_the_promise_is_not_empty():
    assert simulate("agreement", "normal", 100, 20).accepted >= 18


def test_the_study_writes_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pop_lightning.studies.promise.PROMPTS", (24, 30))
    assert main(["--draws", "2", "--output", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "promise.json").read_text())) == 2 * len(SEARCHES) * len(LAWS) * len(METRICS)
    assert (tmp_path / "promise.md").read_text().startswith("| searched |")
    assert "violations" in capsys.readouterr().out
