"""A small sample of the simulation of losses beyond the cap."""

import json

import numpy as np
import pytest

from pop_lightning.studies.unclipped import LAWS, main, simulate


@pytest.mark.parametrize("law", LAWS)
def test_the_mean_of_clipped_losses_is_that_of_many_draws(law):
    make, clipped = LAWS[law]
    losses = make(np.random.default_rng(0), 1_000_000, 0.05)
    assert np.minimum(losses, 1.0).mean() == pytest.approx(clipped(0.05, 1.0), rel=0.02)
    assert losses.mean() == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("law", LAWS)
def test_the_bound_holds_for_clipped_losses_only(law):
    outcome = simulate(law, 24, 200)
    assert outcome.missed <= 0.09  # at a true rate of 5%, more than 18 of 200 have a chance of 1%
    assert outcome.certified > 0.1


def test_the_study_writes_its_figures(tmp_path, capsys):
    assert main(["--draws", "3", "--prompts", "24", "--output", str(tmp_path)]) == 0
    assert [each["prompts"] for each in json.loads((tmp_path / "unclipped.json").read_text())] == [24, 24]
    assert "clipped mean" in capsys.readouterr().out
