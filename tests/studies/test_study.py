"""The study and the cost command: end to end on a tiny model, and the figures that they print from known numbers."""

import json

import pytest
import torch

from pop_lightning.studies import fitting_cost, study
from pop_lightning.studies.study import Settings, main

from tests.helpers.families import COMMON
from tests.helpers.workbench import save_base, save_rows

LAYERS = COMMON["num_hidden_layers"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return save_base(folder / "base"), save_rows(folder / "rows.jsonl", rows=60)


def command(base, data, output, /, **changes):
    values = {
        "base": base, "calibration": data, "output": output, "report_seeds": [1, 2], "tuning_seeds": [0], "steps": 3,
        "learning_rates": [1e-3, 1e-2], "ranks": [2], "ridges": [0.1], "depths": [3, 1], "batch_size": 8,
    } | changes  # fmt: skip
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def test_the_study_measures_every_kind_at_every_depth_and_saves_what_it_prints(inputs, tmp_path, capsys):
    assert main(command(*inputs, tmp_path)) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "study.json").read_text())
    kinds = {"reuse", "closed form", "LoRA, rank 2", "full"}
    fitted = {f"closed form: {objective}" for objective in ("plain", "attention", "refit")}
    found = {depth: {row["projection"] for row in result["table"] if row["depth"] == depth} for depth in (1, 3)}
    assert found == {1: kinds | fitted, 3: kinds}  # depth L-1: nothing to fit
    assert set(result["learning_rates"]) == {"LoRA, rank 2", "full"}
    for row in result["table"]:
        assert row["kl"]["low"] <= row["kl"]["mean"] <= row["kl"]["high"]
        assert len(row["kl"]["seeds"]) == 2
    lossless = [row for row in result["table"] if row["depth"] == 3]
    assert all(row["kl"]["mean"] < 1e-6 and row["removed"] is None for row in lossless)
    assert (tmp_path / "study.md").read_text() in printed
    assert (tmp_path / "study.png").stat().st_size > 5000
    assert result["chosen"][0]["seed"] == 1


def test_rows_of_running_text_have_exactly_the_lengths_asked_for(inputs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{(i + j) % 90}" for j in range(40)) for i in range(30)))
    output = tmp_path / "out"
    arguments = command(inputs[0], text, output, running_text=[12, 4], steps=0, depths=[2], report_seeds=[1])
    assert main(arguments) == 0
    tokens = 30 * 40
    assert json.loads((output / "study.json").read_text())["rows"] in (tokens // 16, tokens // 15)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"depths": [9]}, "--depths must lie in 1..3"),
        ({"report_seeds": [0, 1]}, "--report_seeds"),
        ({"tuning_seeds": []}, "--tuning_seeds"),
        ({"base": "nowhere/at/all"}, "model"),
        ({"running_text": [5]}, "--running_text"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(inputs, tmp_path, capsys, changes, expected):
    assert main(command(*inputs, tmp_path, **changes)) == 2
    message = capsys.readouterr().err
    assert expected in message.strip().splitlines()[-1]
    assert "Traceback" not in message


def rows(kl, agreement=1.0):
    kl = torch.tensor(kl)
    match = torch.ones_like(kl)
    return {"kl": kl, "agreement": match * agreement, "exact_match": match, "prompt": torch.arange(len(kl))}


def test_a_row_that_several_seeds_measured_counts_as_one_draw():
    values = torch.rand(60, generator=torch.Generator().manual_seed(0))
    once = study.mean_of_seeds([(torch.arange(60), values)])
    thrice = study.mean_of_seeds([(torch.arange(60), values)] * 3)
    assert (thrice["mean"], thrice["low"], thrice["high"]) == pytest.approx((once["mean"], once["low"], once["high"]))
    apart = study.mean_of_seeds([(torch.arange(60) + 60 * seed, values) for seed in range(3)])
    assert apart["high"] - apart["low"] < 0.75 * (once["high"] - once["low"])
    assert once["low"] < values.mean().item() < once["high"]


def test_shares_depths_and_verdicts_follow_from_the_rows():
    settings = Settings(base="", calibration="", output="", steps=0)
    before, after = [1.0, 2.0, 3.0, 2.0] * 25, [0.4, 0.8, 1.2, 0.8] * 25  # every row loses 60%
    figures = [
        {
            (depth, kind): rows(kl, 1.0 if depth >= reached else 0.5)
            for depth in range(1, 6)
            for kind, kl, reached in (("reuse", before, 4), ("closed form", after, 3))
        }
        for _ in range(2)
    ]
    removed = study._removed(figures, 3, "reuse", "closed form")
    assert removed["mean"] == pytest.approx(0.6)
    assert removed["low"] == pytest.approx(0.6)
    answers = study._hypotheses(figures, 6, settings)
    assert answers["half depth"] == 3
    assert answers["closed form removes half of reuse's KL"]["holds"] is True
    assert answers["depth at a loss of 0.01 (agreement), per seed"] == {"reuse": [4, 4], "closed form": [3, 3]}
    assert answers["closed form: a sixth of the layers more than reuse"]["holds"] is True
    assert study._judge({"mean": 0.5, "low": 0.4, "high": 0.6}, 0.5)["holds"] is None
    assert study._judge({"mean": 0.3, "low": 0.2, "high": 0.4}, 0.5)["holds"] is False


@pytest.mark.full
def test_the_cost_command_prints_every_ratio_with_its_memory(capsys):
    arguments = ["--layers", "4", "--hidden", "64", "--vocabulary", "128", "--prompt", "32", "--repeats", "1"]
    assert fitting_cost.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[-3:]] == [
        "scoring",
        "scoring, gradient checkpointing",
        "training step",
    ]
    settings = fitting_cost.Settings(layers=4, hidden=64, vocabulary=128, prompt=32, repeats=1)
    found = fitting_cost.run(settings)["training step"]
    # Gradients and moments of all weights against those of two layers' projections.
    assert 0 < found["peak_mib"] < found["plain_peak_mib"]
