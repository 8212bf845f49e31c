"""``pop-generate``: commands with flags of their own, the old spelling, and sampling."""

import json
import threading

import pytest

from pop_lightning import StageAwareGenerator
from pop_lightning.cli import generate
from pop_lightning.core.plan import PruningPlan
from pop_lightning.generation.artifact import write_artifact
from pop_lightning.generation.base_identity import base_identity
from pop_lightning.generation.stream import stream
from pop_lightning.models.loading import load_model

from tests.helpers.workbench import save_base, save_rows


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """An artifact of reused projections over a tiny base."""
    folder = tmp_path_factory.mktemp("artifact")
    base = str(save_base(folder / "base"))
    identity = base_identity(load_model(base), base)
    write_artifact(folder / "artifact", plan=PruningPlan(2), kind="reuse", state={}, base=identity)
    return str(folder / "artifact")


@pytest.fixture
def refused(capsys):
    def refused(*argv):
        assert generate.main(list(argv)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err.removeprefix("pop-generate: error: ").strip()

    return refused


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--artifact", "a", "--prompt", "x"], ["prompt", "--artifact", "a", "--prompt", "x"]),
        (["--data=x", "--artifact", "a", "--output", "o"], ["data", "--data=x", "--artifact", "a", "--output", "o"]),
        (["--shape", "s", "--benchmark"], ["bench", "--shape", "s"]),
        (["prompt", "x", "--artifact", "a"], ["prompt", "x", "--artifact", "a"]),
        (["--help"], ["--help"]),
    ],
)
def test_the_spelling_without_commands_is_translated(old, new):
    assert generate._translated(old) == new


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["chatt"], "argument COMMAND: invalid choice: 'chatt'"),
        (["--artifact", "a"], "no command was given: expected one of prompt, chat, data, eval, ablate, bench"),
        (["prompt", "x", "--artifact", "a", "--lengths", "8"], "--lengths (belongs to pop-generate eval and bench)"),
        (["bench", "--compare"], "unknown flag of pop-generate bench: --compare (belongs to pop-generate data)"),
        (["--artifact", "a", "--prompt", "x", "--data", "y"], "--data (belongs to pop-generate data and ablate)"),
        (["prompt", "x", "--artifact", "a", "--tempratur", "1"], "--tempratur (did you mean --temperature?)"),
        (["prompt", "--artifact", "a"], "--prompt is required"),
        (["data", "--artifact", "a", "--output", "o"], "--data is required"),
        (["prompt", "x", "--artifact", "a", "--temperature", "-1"], "expected a number of at least 0, found '-1'"),
        (["prompt", "x", "--artifact", "a", "--temperature", "nan"], "expected a number of at least 0, found 'nan'"),
        (["prompt", "x", "--artifact", "a", "--top_p", "1.5"], "expected a number in 0..1, found '1.5'"),
        (["prompt", "x", "--artifact", "a", "--top_k", "0"], "expected a whole number of at least 1, found '0'"),
        (["prompt", "x", "--artifact", "a", "--seed", "1"], "--seed has no effect on greedy decoding"),
        (["prompt", "x", "--artifact", "a", "--allow_urls"], "--allow_urls needs --image or --video"),
        (["data", "x", "--artifact", "a", "--output", "o", "--limit", "x"], "expected a whole number of at least 1"),
        (["data", "x", "--artifact", "a", "--output", "o", "--compare", "--top_k", "2"], "--compare compares greedy"),
        (["prompt", "w1 \ud83d", "--artifact", "a"], "--prompt is not valid Unicode at character 4"),
        (["data", "x", "--artifact", "a", "--output", "o", "--max_prompt_tokens", "0"], "of at least 1, found '0'"),
        (["data", "no.jsonl", "--artifact", "a", "--output", "o"], "--data 'no.jsonl' does not exist"),
    ],
)
def test_a_command_line_that_does_not_fit_is_one_sentence(refused, argv, sentence):
    assert sentence in refused(*argv)


def test_a_prompt_is_sampled_by_its_seed_and_greedy_without_flags(artifact, capsys):
    def answer(*argv):
        command = ["prompt", "w1 w2 w3", "--artifact", artifact, "--max_new_tokens", "12", *argv]
        assert generate.main(command) == 0
        return capsys.readouterr().out

    greedy = answer()
    assert greedy == answer("--temperature", "0")
    assert greedy == answer("--top_k", "1", "--seed", "1")
    hot = [answer("--temperature", "5", "--seed", seed) for seed in ("1", "1", "2")]
    assert hot[0] == hot[1]
    assert len({greedy, hot[0], hot[2]}) == 3


def test_the_first_rows_of_a_file_are_answered_up_to_the_limit(artifact, tmp_path, capsys):
    rows, out = save_rows(tmp_path / "rows.jsonl", 6), tmp_path / "out.jsonl"
    command = ["data", str(rows), "--artifact", artifact, "--output", str(out), "--max_new_tokens", "4"]
    assert generate.main([*command, "--limit", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2
    prompts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == prompts[:2]
    first = out.read_text()
    sampled = [*command, "--limit", "2", "--overwrite", "--temperature", "5", "--seed", "3"]
    assert generate.main(sampled) == 0
    drawn = out.read_text()
    assert generate.main(sampled) == 0
    assert out.read_text() == drawn != first


def test_generation_stops_when_nobody_reads_on(artifact):
    generator = StageAwareGenerator.from_artifact(artifact)
    before = threading.active_count()
    pieces = stream(generator, "w1 w2", max_new_tokens=100)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_rows_above_the_prompt_limit_are_left_out_and_counted(artifact, tmp_path, capsys):
    rows, out = save_rows(tmp_path / "rows.jsonl", 6), tmp_path / "out.jsonl"
    lengths = [len(json.loads(line)["prompt"].split()) for line in rows.read_text().splitlines()]
    command = ["data", str(rows), "--artifact", artifact, "--output", str(out), "--max_new_tokens", "4"]
    assert generate.main([*command, "--max_prompt_tokens", "2"]) == 2
    assert "change the rows, --max_prompt_tokens (2) or --max_new_tokens (4)." in capsys.readouterr().err
    assert generate.main([*command, "--max_prompt_tokens", str(sorted(lengths)[2])]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == sum(length <= sorted(lengths)[2] for length in lengths)
    assert summary["unusable"] == {"prompt longer than max_prompt_tokens": 6 - summary["rows"]}
