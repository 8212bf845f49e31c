"""The retrieval sweep: RULER's definitions at every length and position, for any tokenizer."""

import json

import pytest

from pop_lightning import PruningPlan, StageAwareGenerator
from pop_lightning.cli import generate
from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.core.errors import InputError
from pop_lightning.harness import needle
from pop_lightning.models.loading import load_model, load_tokenizer

from tests.helpers.browser import assert_fits

BASE = resolve_bundled("bundled:facts-gemma3")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


def test_a_single_needle_is_where_the_position_says_and_fills_the_length(tokenizer):
    documents = needle.documents("needle_single", tokenizer, [200, 400])
    assert len(documents) == 2 * len(needle.POSITIONS) * needle.PER_CELL
    noise = len(tokenizer(f"{needle.NOISE}\n", add_special_tokens=False).input_ids)
    for document in documents:
        (value,) = document["outputs"]
        lines = document["input"].split("\n")[1:-1]
        at = [index for index, line in enumerate(lines) if line.startswith("One of the special magic numbers")]
        assert at == [round(document["position"] * (len(lines) - 1))]
        assert value in lines[at[0]]
        assert document["input"].count(needle.NOISE) == len(lines) - 1
        whole = len(tokenizer(f"{document['input']} {document['gen_prefix']}").input_ids)
        assert whole == document["tokens"] <= document["length"] - 32
        assert whole + noise > document["length"] - 32  # one more sentence would be too long
    assert needle.documents("needle_single", tokenizer, [200, 400]) == documents
    assert len({document["outputs"][0] for document in documents}) > 90


def test_several_needles_are_all_asked_for(tokenizer):
    for document in needle.documents("needle_several", tokenizer, [350]):
        keys = document["gen_prefix"].removeprefix("The special magic numbers for ").partition(" mentioned")[0]
        for key, value in zip(keys.replace("and ", "").split(", "), document["outputs"], strict=True):
            assert f"numbers for {key} is: {value}." in document["input"]
        assert document["position"] is None


def test_a_chain_of_hops_can_be_followed_in_order(tokenizer):
    for document in needle.documents("needle_hops", tokenizer, [400]):
        known = []
        for line in document["input"].split("\n"):
            if line.strip().startswith("VAR "):
                name, _, value = line.strip().removeprefix("VAR ").partition(" = ")
                assert value == (f"VAR {known[-1]}" if known else document["input"].split("value ")[1].split()[0])
                known.append(name)
        assert known == document["outputs"]
        assert len(set(known)) == needle.HOPS + 1


def test_the_score_is_the_share_of_what_was_asked_for():
    assert needle.string_match("they are abcde and FGHIJ", ["ABCDE", "FGHIJ", "KLMNO", "PQRST"]) == 0.5


def test_a_length_without_room_is_refused_with_what_is_needed(tokenizer):
    with pytest.raises(
        InputError, match=r"--lengths 64 is too short for needle_several: this tokenizer needs at least \d+"
    ):
        needle.documents("needle_several", tokenizer, [64])


def test_the_sweep_draws_both_models_side_by_side(tmp_path, capsys):
    generator = StageAwareGenerator(load_model(BASE), PruningPlan(3))
    generator.save_pretrained(tmp_path / "artifact")
    command = ["eval", "--artifact", str(tmp_path / "artifact"), "--tasks", "needle", "--output", str(tmp_path / "out")]
    assert generate.main([*command, "--lengths", "2000"]) == 2
    assert "--lengths 2000 is more than the model's context of 1024 tokens" in capsys.readouterr().err
    assert generate.main([*command, "--lengths", "350,450", "--limit", "9"]) == 2
    assert "--limit 9 leaves cells of needle_single without a document" in capsys.readouterr().err
    assert generate.main([*command, "--lengths", "350,450", "--limit", "10", "--gen_kwargs", "max_gen_toks=3"]) == 0
    printed = capsys.readouterr().out
    assert "needle_single at 25%  " in printed
    assert "The full model solves no document of needle_single, needle_several and needle_hops" in printed
    assert [line.split()[-2:] for line in printed.splitlines() if line.startswith("needle  ")] == [["350", "450"]]
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["needle"]
    assert len(found) == 2 * (len(needle.POSITIONS) + 2)
    assert {cell["documents"] for cell in found if cell["task"] == "needle_single"} == {1}
    assert (tmp_path / "out" / "needle.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "comparison.html").read_text().count("<picture>") == 2
    assert_fits(tmp_path / "out" / "comparison.html", tmp_path)


@pytest.mark.parametrize(
    ("name", "lengths", "least", "cells"),
    [
        ("needle_single", [320, 440], 10, "2 lengths x 5 positions"),
        ("needle_single", [320, 320], 5, "1 length x 5 positions"),
        ("needle_hops", [320, 440, 500], 3, "3 lengths"),
    ],
)
def test_a_limit_keeps_every_cell_or_is_refused(tokenizer, name, lengths, least, cells):
    with pytest.raises(
        InputError, match=rf"--limit {least - 1} leaves cells of {name} .* at least {least} \({cells}\)"
    ):
        needle.check_limit(["look_up", name], lengths, least - 1)
    needle.check_limit(["look_up", name], lengths, least)
    needle.check_limit(["look_up"], lengths, 1)
    needle.check_limit([name], lengths, None)
    places = {(each["length"], each["position"]) for each in needle.documents(name, tokenizer, lengths)}
    assert {(e["length"], e["position"]) for e in needle.documents(name, tokenizer, lengths)[:least]} == places


def test_every_cell_holds_the_mean_of_its_documents():
    def sample(position, length, score):
        return {"doc": {"position": position, "length": length}, "string_match": score}

    full = {"needle_single": [sample(0.5, 64, 1.0), sample(0.5, 64, 0.0), sample(1.0, 64, 1.0)], "other": []}
    pruned = {"needle_single": [sample(0.5, 64, 0.0), sample(0.5, 64, 0.0), sample(1.0, 64, 1.0)], "other": []}
    found = needle.cells({"full": {"samples": full}, "pruned": {"samples": pruned}})
    assert [(cell["position"], cell["documents"], cell["full"], cell["pruned"]) for cell in found] == [
        (0.5, 2, 0.5, 0.0),
        (1.0, 1, 1.0, 1.0),
    ]
    assert "needle_single at 50%    0.50 0.00" in needle.grid_table(found).text()
