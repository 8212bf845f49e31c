"""``pop-generate ablate`` on a tiny base: what is measured agrees with itself, and what does not fit is refused."""

import copy
import json
import re

import pytest
import torch
from markupsafe import escape

from pop_lightning.ablation import report
from pop_lightning.ablation.ablate import Settings, _difference, _figures
from pop_lightning.cli import generate
from pop_lightning.core.errors import InputError
from pop_lightning.core.numbers import number
from pop_lightning.core.plan import Kept, PruningPlan
from pop_lightning.data.module import CalibrationData
from pop_lightning.evaluation.paired import paired_interval
from pop_lightning.generation.artifact import write_artifact
from pop_lightning.generation.base_identity import base_identity
from pop_lightning.models.loading import load_model

from tests.helpers.browser import assert_fits
from tests.helpers.workbench import save_base, save_rows

POP = ["full model", "POP, reuse", "POP, closed_form"]
ABLATIONS = [
    "layers removed",
    "no boundary handling",
    "no KV projection",
    "ShortGPT",
    "first layers",
    "evenly spaced layers",
]


def arguments(base, data, output, *more):
    small = ["--repeats", "1", "--boundaries", "1,4", "--salients", "0,0.25", "--shares", "25,30,50"]
    return ["ablate", "--base", str(base), "--data", str(data), "--output", str(output), *small, *more]


@pytest.fixture(scope="module")
def found(base, data, tmp_path_factory):
    """The folder of a run, and its ``ablation.json``."""
    folder = tmp_path_factory.mktemp("found")
    assert generate.main(arguments(base, data, folder, "--depth", "2", "--train_steps", "2", "--tokens", "12")) == 0
    return folder, json.loads((folder / "ablation.json").read_text())


def test_every_way_is_measured_on_the_same_rows(found):
    result = found[1]
    table = {row["name"]: row for row in result["table3"]}
    assert list(table) == [*POP, "POP, lora", "POP, full", "POP, closed_form, salient", *ABLATIONS]
    assert result["rows"]["verify"] == 32
    assert len({(row["exact_match"]["full"], row["nll"]["full"]) for row in result["table3"]}) == 1
    full = table["full model"]
    assert full["agreement"]["value"] == 1
    assert full["kl"]["value"] == pytest.approx(0, abs=1e-6)
    for row in result["table3"]:
        for metric in ("exact_match", "agreement", "nll", "kl"):
            figure = row[metric]
            assert figure["difference"] == pytest.approx(figure["value"] - figure["full"])
            assert figure["low"] <= figure["difference"] + 1e-12 or figure["method"] == "Bonett-Price"
    assert table["POP, closed_form, salient"]["kl"]["value"] < table["POP, closed_form"]["kl"]["value"]
    assert table["POP, closed_form"]["kl"]["value"] < table["no KV projection"]["kl"]["value"]
    assert sorted(table["first layers"]["skipped"]) == [0, 1]
    least = sorted(sorted(range(4), key=lambda layer: result["influence"][layer])[:2])
    assert table["ShortGPT"]["removed"] == least


def test_the_tables_and_the_frontier_show_the_same_measurement(found):
    result = found[1]
    points = {(row["projection"], row["depth"], Kept.of(row)): row for row in result["frontier"]}
    kept = {Kept(1), Kept(4), Kept(1, 0.25), Kept(4, 0.25)}
    assert set(points) == {
        (kind, depth, each) for kind in ("reuse", "closed_form") for depth in (3, 2) for each in kept
    }
    by_name = {row["name"]: row for row in result["table3"]}
    for kind in ("reuse", "closed_form"):
        assert by_name[f"POP, {kind}"]["kl"] == points[kind, 2, Kept(1)]["kl"]
    assert [(row["shares"], row["depth"]) for row in result["table4"]] == [([25, 30], 3), ([50], 2)] * 2
    assert all(
        row == {"shares": row["shares"]} | points[row["projection"], row["depth"], Kept(1)] for row in result["table4"]
    )
    assert all(row["kl"]["value"] < 1e-6 for row in result["frontier"] if row["depth"] == 3)  # its K/V are exact
    for row in result["frontier"]:
        assert row["ttft"]["prompt_tokens"] == 12
        assert row["ttft"]["full_ms"] > 0
    counted = {row["depth"]: row["counted"] for row in result["table4"]}
    assert 1 < counted[3] < counted[2]


def test_the_page_shows_every_row_and_fits_on_a_phone(found, tmp_path):
    folder, result = found
    page = (folder / "ablation.html").read_text()
    for row in result["table3"]:
        assert f"{row['name']}</td>" in page or f"{row['name']} (" in page
    assert page.count("data:image/svg+xml") == 2
    assert not re.search(r'<script|(?<!<a href=")https?://(?!www\.w3\.org)', page)
    assert re.findall(r'<a href="([^"]*)"', page) == [
        "https://arxiv.org/abs/2602.03295",
        "https://arxiv.org/abs/2403.03853",
    ]
    assert_fits(folder / "ablation.html", tmp_path)


def test_the_text_has_the_three_tables(found):
    shown = report.text(found[1])
    assert [name for name in (*POP, *ABLATIONS) if f"\n{name} " not in shown] == []
    assert "25, 30%" in shown
    assert "frontier:" in shown
    assert "layers removed (2, 3) " in shown
    assert "first layers (0, 1) " in shown
    assert "below 1x where pruning is slower" in shown
    for table in (report.shares_table(found[1]), report.frontier_table(found[1])):
        assert {"counted speedup", "measured speedup"} < set(table.header)


def test_the_page_says_what_the_rows_are_and_how_intervals_are_made(found):
    folder, result = found
    page = (folder / "ablation.html").read_text()
    for sentence in (report.conditions(result), report.intervals(result), *(row["what"] for row in result["table3"])):
        assert str(escape(sentence)) in page
    assert report.conditions(result) == (
        "Pruned layers, counted from 0: 2, 3, unless others follow a row's name. Boundary: 1 prompt token. "
        "Salient tokens: 5% of the prompt. lora and full: 2 training steps on the fit rows, started from closed_form, "
        "peak learning rate 0.001, rank 16 of lora."
    )
    methods = {row[metric]["method"] for row in result["table3"] for metric in ("exact_match", "agreement", "kl")}
    assert methods == {"Bonett-Price", "Clopper-Pearson", "Student"}
    assert result["table3"][0]["agreement"]["method"] == "Clopper-Pearson"  # an agreement of 100%


def test_the_settings_identify_the_model_and_the_rows(found, base, data, tmp_path):
    settings = found[1]["settings"]
    assert {name: settings[name] for name in ("model", "data", "rows", "seed", "batch_size", "limit")} == {
        "model": str(base),
        "data": str(data),
        "rows": 80,
        "seed": 0,
        "batch_size": 8,
        "limit": None,
    }
    digests = [CalibrationData(path, str(base)).digest for path in (data, save_rows(tmp_path / "rows.jsonl", seed=1))]
    assert digests[0] == settings["rows_sha256"] != digests[1]


@pytest.fixture
def result(found):
    """A copy of what was found, in which the full model reproduces half of the responses."""
    result = copy.deepcopy(found[1])
    for row in (*result["table3"], *result["table4"], *result["frontier"]):
        row["exact_match"] |= {"full": 0.5, "value": 0.25, "difference": -0.25, "low": -0.4, "high": -0.05}
    return result


def column(table, name):
    """The cells of one column by those of the first one."""
    return {row[0]: row[table.header.index(name)] for row in table.rows}


def test_exact_match_has_its_difference_in_points(result):
    cells = column(report.compared_table(result), "minus full, points")
    assert cells["POP, reuse"] == "-25.0 [-40.0, -5.0]"


def test_kl_is_compared_with_that_of_the_main_row_paired_by_prompt(found, result):
    table = {row["name"]: row for row in result["table3"]}
    main = table["POP, closed_form"]["kl"]["value"]
    cells = column(report.compared_table(result), "KL minus closed_form")
    for name, row in table.items():
        paired = row["kl_minus_closed_form"]
        if name == "POP, closed_form":
            assert paired is None
            continue
        assert paired["difference"] == pytest.approx(row["kl"]["value"] - main)
        assert paired["low"] < paired["difference"] < paired["high"]
    assert cells["POP, closed_form"] == cells["full model"] == ""
    shown = number(table["no KV projection"]["kl_minus_closed_form"]["difference"], 2)
    assert cells["no KV projection"].startswith(f"{shown} [")
    assert cells["no KV projection"] in (found[0] / "ablation.html").read_text()


def test_the_interval_between_two_rows_is_of_the_differences_per_prompt():
    class Rows:
        def rows(self, name):
            kl = {"first": [1.0, 3.0, 2.0, 50.0], "second": [1.5, 3.5, 2.25, 51.0]}[name]
            return {"prompt": torch.tensor([1, 1, 2, 3]), "kl": torch.tensor(kl)}

    assert _difference(Rows(), "first", "second") == paired_interval([0, 0, 0], [0.5, 0.25, 1], rate=False)._asdict()


def test_exact_match_is_left_out_where_the_full_model_hardly_has_any(found, result):
    assert found[1]["table3"][0]["exact_match"]["full"] < 0.1
    tables = (report.compared_table, report.shares_table, report.frontier_table)
    names = {"exact match", "minus full, points"}
    assert all(not names & set(table(found[1]).header) for table in tables)
    assert all("exact match" in table(result).header for table in tables)
    sentence = "Exact match is left out: the full model itself reproduces only 0.00% of the responses."
    assert sentence in report.text(found[1])
    assert sentence in (found[0] / "ablation.html").read_text()
    assert "Exact match is left out" not in report.text(result)


def test_a_kl_that_is_rounding_is_not_shown_as_a_result(result, tmp_path):
    for row in (*result["table4"], *result["frontier"]):
        if row["depth"] == 3:
            row["kl"] |= {"value": 2.8e-8, "difference": 2.8e-8, "low": 2.6e-8, "high": 3.0e-8}
    assert column(report.frontier_table(result), "KL")["3"] == "< 1e-6"
    assert "[" in column(report.frontier_table(result), "KL")["2"]
    sentence = "Pruning only the last layer (depth 3) changes nothing"
    assert sentence in report.text(result)
    report.write(result, tmp_path, {})
    assert sentence in (tmp_path / "ablation.html").read_text()
    for row in (*result["table3"], *result["table4"], *result["frontier"]):
        for entry in (row["kl"], row["nll"], row.get("kl_minus_closed_form") or {}):
            entry |= {"value": 0.5, "difference": 0.5, "low": 0.4, "high": 0.6}
    assert "rounding" not in report.text(result)
    result["table3"][1]["kl_minus_closed_form"] |= {"difference": -2e-8, "low": -4e-8, "high": 1e-8}
    assert column(report.compared_table(result), "KL minus closed_form")["POP, reuse"] == "< 1e-6"
    assert "A KL or a difference below 1e-6 nats is within rounding." in report.text(result)


def test_noisy_times_are_named(result, tmp_path):
    for row in result["frontier"]:
        row["ttft"] |= {"full_ms": 10.0, "full_p90_ms": 11.0, "pruned_ms": 10.0, "pruned_p90_ms": 11.0}
    assert "noisy" not in report.text(result)
    for row in result["frontier"]:
        if (row["depth"], Kept.of(row)) == (3, Kept(1)):
            row["ttft"]["pruned_p90_ms"] = 14.0
    sentence = "The times are noisy: at depth 3, boundary 1 the pruned prefill's p90 lies 40% above its median."
    assert sentence in report.text(result)
    report.write(result, tmp_path, {})
    page = (tmp_path / "ablation.html").read_text()
    assert escape(sentence) in page
    assert "more --repeats than 1." in page


def test_an_artifact_gives_its_base_and_plan(base, data, tmp_path):
    identity = base_identity(load_model(str(base)), str(base))
    write_artifact(tmp_path / "artifact", plan=PruningPlan(3, 2), kind="reuse", state={}, base=identity)
    small = ["--repeats", "1", "--boundaries", "2", "--salients", "0", "--shares", "25", "--salient", "0"]
    few = ["--data", str(data), "--limit", "30", "--output", str(tmp_path / "out")]
    assert generate.main(["ablate", "--artifact", str(tmp_path / "artifact"), *few, *small]) == 0
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert result["depth"] == 3
    assert {row["name"]: row["boundary"] for row in result["table3"]}["POP, reuse"] == 2
    assert [row["boundary"] for row in result["frontier"]] == [2, 2]
    assert not any("salient" in row["name"] for row in result["table3"])


@pytest.mark.full
def test_rows_without_responses_are_answered_by_the_full_model_once(base, tmp_path):
    data = save_rows(tmp_path / "rows.jsonl", 30, responses=False)
    small = ["--repeats", "1", "--boundaries", "1", "--salients", "0", "--shares", "25", "--max_new_tokens", "3"]
    command = ["ablate", "--base", str(base), "--data", str(data), "--output", str(tmp_path / "out"), *small]
    assert generate.main(command) == 0
    kept = (tmp_path / "out" / "responses.json").read_bytes()
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert {row["exact_match"]["full"] for row in result["table3"]} == {1.0}
    assert generate.main(command) == 0
    assert (tmp_path / "out" / "responses.json").read_bytes() == kept


def test_what_a_model_cannot_do_is_left_out_with_the_reason(data, tmp_path):
    # Llama 4 scales queries by their position in the cache in the last layer: no salient tokens at any depth.
    base = save_base(tmp_path / "base", "llama4")
    assert generate.main(arguments(base, data, tmp_path / "out", "--limit", "30", "--depth", "2")) == 0
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert all("salient" not in row for row in result["frontier"])
    assert any(note.startswith("boundary 1, salient 0.25 at depth 2 is left out: ") for note in result["notes"])
    assert "is left out" in report.text(result)


def test_intervals_are_over_prompts():
    class Rows:
        def rows(self, name):
            zeros = torch.zeros(4)
            return {
                "prompt": torch.tensor([1, 1, 2, 3]),
                "kl": torch.tensor([1.0, 3.0, 2.0, 5.0]),
                "agreement": torch.tensor([1.0, 0.0, 0.5, 1.0]),
                "nll": torch.tensor([1.0, 1.0, 2.0, 3.0]),
                "teacher_nll": zeros,
                "exact_match": torch.tensor([1.0, 1.0, 0.0, 1.0]),
                "teacher_exact_match": torch.ones(4),
            }

    figures = _figures(Rows(), "x")
    assert figures["kl"]["value"] == 3
    low, high = paired_interval([0, 0, 0], [2, 2, 5], rate=False)[1:3]
    assert (figures["kl"]["low"], figures["kl"]["high"]) == pytest.approx((low, high))
    assert figures["exact_match"]["method"] == "Bonett-Price"
    assert figures["exact_match"]["low"] == pytest.approx(paired_interval([1, 1, 1], [1, 0, 1]).low)
    assert figures["agreement"]["difference"] == pytest.approx((0.5 + 0.5 + 1) / 3 - 1)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--depth", "4"], "--depth must lie in 1..3 for this model of 4 layers, found 4."),
        (["--depth", "0"], "--depth: expected a whole number of at least 1, found '0'"),
        (["--boundary", "0"], "--boundary must be at least 1"),
        (["--boundary", "100"], "--boundary 100 leaves no context in the rows' prompts"),
        (["--shares", "20,100"], "--shares must hold percentages between 1 and 99, found 100."),
        (["--salients", "1.5"], "salient as a share of the prompt must lie between 0 and 1, found 1.5."),
        (["--boundaries", "x"], "expected a whole number or a share below 1, found 'x'"),
        (["--tokens", "999"], "--tokens 999 is more than the model's context of 128 tokens."),
        (["--limit", "4"], "--data leaves fewer than 2 different prompts to measure"),
        (["--limit", "3"], "found 3 usable rows"),
        (["--data", "no.jsonl"], "--data 'no.jsonl' does not exist"),
        (["--output", "/dev/null/x"], "--output '/dev/null/x' cannot be written"),
        (["--artifact", "a"], "expected --base MODEL or --artifact DIR, whose base is measured; found both."),
    ],
)
def test_what_does_not_fit_is_one_sentence(base, data, tmp_path, capsys, more, sentence):
    assert generate.main(arguments(base, data, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("pop-generate: error: ")
    assert sentence in error
    assert not (tmp_path / "out" / "ablation.json").exists()


def test_a_base_or_an_artifact_is_needed(data, tmp_path, capsys):
    assert generate.main(["ablate", "--data", str(data), "--output", str(tmp_path)]) == 2
    assert "found neither" in capsys.readouterr().err


def test_settings_are_checked_before_anything_loads():
    with pytest.raises(InputError, match="boundary of at least 1"):
        Settings(boundaries=(0,))
    assert Settings().kept == [Kept(1, 0), Kept(16, 0), Kept(1, 0.05), Kept(16, 0.05)]
