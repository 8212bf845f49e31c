"""pop-fit and pop-generate from the command line, in process: what they write, what they refuse, and resuming."""

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pop_lightning import StageAwareGenerator
from pop_lightning.cli import fit, generate
from pop_lightning.fitting.importance import ImportanceScoring
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.generation.artifact import read_artifact
from pop_lightning.run import inputs, pipeline
from pop_lightning.run.inputs import versions

from tests.helpers.families import COMMON
from tests.helpers.ranked import exported
from tests.helpers.workbench import arguments, save_base, save_rows, snapshot

LAYERS = COMMON["num_hidden_layers"]


@pytest.fixture(scope="module")
def fitted(base, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("fit") / "run"
    assert fit.main(arguments(base, data, output)) == 0
    return output


def test_a_run_writes_everything_it_promises(fitted):
    metrics = json.loads((fitted / "metrics.json").read_text())
    assert metrics["depth"] == 1  # the budget allows everything
    assert metrics["layers"] == LAYERS
    assert {entry["depth"] for entry in metrics["curve"]} == {1, 2, 3}
    assert {entry["projection"] for entry in metrics["curve"]} == {"reuse", "closed_form"}
    assert all({"kl", "agreement", "nll_increase"} <= set(entry) for entry in metrics["curve"])
    assert metrics["verified"]["rows"] == metrics["rows"]["verify"]
    names = {"artifact/pop_config.json", "artifact/kv_projections.safetensors", "artifact/README.md", "importance.json",
             "report.html", "recipe.yaml"}  # fmt: skip
    assert names <= set(snapshot(fitted))
    assert not [name for name in snapshot(fitted) if name.endswith(".tmp")]
    assert read_artifact(fitted / "artifact").prompt_tokens == metrics["arithmetic"]["prompt_tokens"]  # bench's length
    importance = json.loads((fitted / "importance.json").read_text())
    assert len(importance["prefill"]) == LAYERS
    assert importance["prefill"][-1] == 0
    examples, about = metrics["examples"], metrics["about"]
    assert (len(examples["most"]), len(examples["least"]), examples["compared"]) == (3, 2, 16)
    assert about["command"] == f"pop-fit --recipe {fitted / 'recipe.yaml'}"
    assert {"model", "data", "date"} <= set(about)
    page = (fitted / "report.html").read_text()
    assert all(example["origin"] in page for example in examples["most"] + examples["least"])


@pytest.mark.parametrize(
    ("name", "refusal"), [("none.jsonl", "does not exist"), ("rows.xml", "is a file of unknown kind")]
)
def test_data_that_cannot_be_read_is_refused_before_the_base_is_loaded(tmp_path, capsys, name, refusal):
    (tmp_path / "rows.xml").write_text("<prompt>")
    output = tmp_path / "run"
    assert fit.main(arguments(tmp_path / "no-base", tmp_path / name, output)) == 2
    error = capsys.readouterr().err
    assert f"--data.calibration '{tmp_path / name}' {refusal}" in error
    assert "no-base" not in error
    assert not output.exists()


def test_the_artifact_loads_and_generates_as_what_was_measured(fitted, base):
    generator = StageAwareGenerator.from_artifact(fitted / "artifact")
    again = StageAwareGenerator.from_artifact(
        fitted / "artifact", base=AutoModelForCausalLM.from_pretrained(base).eval()
    )
    ids = torch.tensor([[1, 7, 8, 9, 10, 11]])
    expected = again.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(generator.generate(input_ids=ids, max_new_tokens=5, do_sample=False), expected)


def test_a_file_of_the_models_own_answers_matches_exactly(fitted, tmp_path):
    generator = StageAwareGenerator.from_artifact(fitted / "artifact")
    rows = []
    for start in range(4, 16):
        ids = torch.tensor([[start + 1, start, start + 5, start + 9, start + 2]])
        new = generator.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, 5:]
        text = generator.tokenizer.decode(new, skip_special_tokens=True)
        if text:
            prompt = generator.tokenizer.decode(ids[0], skip_special_tokens=True)
            rows.append(json.dumps({"prompt": prompt, "response": text}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    output = tmp_path / "out.jsonl"
    code = generate.main(
        ["--artifact", str(fitted / "artifact"), "--data", str(tmp_path / "rows.jsonl"), "--output", str(output),
         "--compare", "--max_new_tokens", "6"]
    )  # fmt: skip
    assert code == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == len(rows)
    assert all(record["exact_match"] for record in records)
    assert all({"full_generated", "same_text", "common_prefix"} <= set(record) for record in records)


def test_every_row_of_a_file_is_answered_and_what_is_left_out_is_counted(fitted, tmp_path, capsys):
    lines = [{"prompt": "w1 w2", "response": "w3 w4 w5"}, {"prompt": "w1 w2", "response": "w3 w4 w5"}, {"prompt": " "}]
    data, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    command = ["--artifact", str(fitted / "artifact"), "--data", str(data), "--output", str(output)]
    command += ["--max_new_tokens", "2", "--dtype", "bfloat16", "--device", "cpu"]
    assert generate.main(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == len(output.read_text().splitlines()) == 2
    assert summary["unusable"] == {"empty prompt": 1}
    assert summary["references_cut"] == 2
    assert generate.main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert generate.main([*command, "--overwrite"]) == 0


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(data, tmp_path, capsys, monkeypatch):
    none = str(tmp_path / "none")
    command = ["--artifact", none, "--data", str(data), "--output"]
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file" / "out.jsonl", tmp_path / ("o" * 250)):  # the temporary name is longer still
        assert generate.main([*command, str(output)]) == 2
        assert f"--output {output} cannot be written (" in capsys.readouterr().err
    output = tmp_path / "new" / "folder" / "out.jsonl"
    assert generate.main([*command, str(output)]) == 2
    assert none in capsys.readouterr().err  # the output is fine, the artifact is not there
    assert [*output.parent.iterdir()] == []

    def refuse(*args, **kwargs):  # root may write into any folder, so the refusal is made by hand
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    output.write_text("kept")
    monkeypatch.setattr(Path, "touch", refuse)
    assert generate.main([*command, str(output), "--overwrite"]) == 2
    assert f"--output {output} cannot be written (Permission denied)" in capsys.readouterr().err
    assert output.read_text() == "kept"


def test_prompt_streams_and_prints_the_ttft(fitted, capsys):
    assert generate.main(["--artifact", str(fitted / "artifact"), "--prompt", "w1 w2 w3", "--max_new_tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert "TTFT" in captured.err
    assert captured.out.strip()


def test_no_depth_within_the_budget_exits_3_and_exports_nothing(base, data, tmp_path, capsys):
    output = tmp_path / "run"
    assert fit.main(arguments(base, data, output, budget__max_drop=1e-9, budget__nll_cap=5e-9)) == 3
    assert json.loads((output / "metrics.json").read_text())["depth"] is None
    assert not (output / "artifact").exists()
    assert "reuse" in capsys.readouterr().out


def test_every_kind_of_projection_runs(base, data, tmp_path):
    for kind in ("reuse", "lora", "full"):
        output = tmp_path / kind
        changes = {"projection__kind": kind, "projection__steps": 3, "budget__candidates": [2]}
        assert fit.main(arguments(base, data, output, **changes)) == 0
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["projection"] == kind
        StageAwareGenerator.from_artifact(output / "artifact")


def test_keys_of_training_are_used_only_in_training(base, data, tmp_path):
    changes = {"projection__kind": "full", "projection__steps": 2, "budget__candidates": 1}
    changes |= {"trainer__gradient_clip_val": 1.0, "trainer__accumulate_grad_batches": 2}
    assert fit.main(arguments(base, data, tmp_path / "run", **changes)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["depth"] == LAYERS - 2  # one candidate, and one that prunes enough layers


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_precision_of_training_leaves_scores_and_statistics_as_they_are(fitted, base, data, tmp_path, precision):
    changes = {"projection__kind": "full", "projection__steps": 2, "trainer__precision": precision}
    run = tmp_path / "run"
    assert fit.main(arguments(base, data, run, **changes)) == 0
    for name in ("importance.json", "state/closed_form-depth1.safetensors"):
        assert (run / name).read_bytes() == (fitted / name).read_bytes()
    trained = [entry for entry in json.loads((run / "metrics.json").read_text())["curve"] if "steps" in entry]
    assert trained
    assert all(math.isfinite(entry["kl"]) for entry in trained)


def test_prompts_without_responses_are_answered_by_the_full_model_once(base, tmp_path):
    data = save_rows(tmp_path / "prompts.jsonl", responses=False)
    output = tmp_path / "run"
    assert fit.main(arguments(base, data, output, data__max_response_tokens=4)) == 0
    assert (output / "state" / "responses.json").is_file()
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["comparison"][0]["exact_match"] == 1.0  # the full model agrees with itself


def test_a_family_without_sdpa_runs_without_a_word_about_attention(data, tmp_path, capsys):
    base = save_base(tmp_path / "gemma2", "gemma2")
    command = arguments(base, data, tmp_path / "run", projection__kind="reuse", budget__candidates=[2])
    assert fit.main(command) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["depth"] == 2
    for flag in ("--overwrite", "--check"):
        assert fit.main([*command, flag, "--model.attn_implementation", "sdpa"]) == 2
        assert "model.attn_implementation 'sdpa': leave it out" in capsys.readouterr().err


def test_an_existing_output_is_refused_resumed_or_replaced(fitted, base, data, tmp_path, capsys):
    output = tmp_path / "run"
    command = arguments(base, data, output)
    assert fit.main(command) == 0
    before = snapshot(output)
    assert fit.main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert fit.main([*command, "--resume"]) == 0
    assert snapshot(output) == before
    assert fit.main([*command, "--resume", "--seed", "1"]) == 2
    assert "another recipe" in capsys.readouterr().err
    assert fit.main([*command, "--overwrite"]) == 0
    before = snapshot(output)
    assert fit.main([*command, "--overwrite", "--model.base", "nowhere/at-all/here"]) == 2
    assert snapshot(output) == before  # a start that fails costs nothing
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    assert fit.main([*arguments(base, data, tmp_path / "other"), "--overwrite"]) == 2
    assert (tmp_path / "other" / "thesis.tex").read_text() == "precious"


def test_a_run_is_not_resumed_on_other_rows(base, tmp_path, monkeypatch, capsys):
    data, output = save_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "search", _interrupt)
        assert fit.main(arguments(base, data, output)) == 130
    save_rows(data, seed=1)
    assert fit.main([*arguments(base, data, output), "--resume"]) == 2
    assert "has other rows" in capsys.readouterr().err


def test_a_resumed_run_notes_other_versions(base, data, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "search", _interrupt)
        patch.setattr(inputs, "versions", lambda: versions() | {"torch": "2.11.0"})
        assert fit.main(arguments(base, data, output)) == 130
    assert fit.main([*arguments(base, data, output), "--resume"]) == 0
    assert "started with torch 2.11.0 and continues with" in capsys.readouterr().out


def test_a_run_stopped_anywhere_resumes_to_the_same_artifact(base, data, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    assert fit.main(arguments(base, data, whole)) == 0
    for stage in ("search", "verify", "fit_untrained"):
        output = tmp_path / stage
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, stage, _interrupt)
            assert fit.main(arguments(base, data, output)) == 130
        assert not (output / "artifact").exists()
        assert fit.main([*arguments(base, data, output), "--resume"]) == 0
        assert exported(output) == exported(whole)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_training_continues_from_its_checkpoint_to_the_same_bytes(base, data, tmp_path, monkeypatch, kind):
    changes = {
        "projection__kind": kind,
        "projection__steps": 7,
        "projection__checkpoint_every": 2,
        "projection__lora__lora_dropout": 0.2,
        "projection__refit": False,
        "budget__candidates": [1],
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert fit.main(arguments(base, data, whole, **changes)) == 0
    step, steps = KVProjectionTraining.training_step, []

    def stopping(module, batch, index):
        if module.global_step == 5:
            raise KeyboardInterrupt
        return step(module, batch, index)

    def counting(module, batch, index):
        steps.append(module.global_step)
        return step(module, batch, index)

    monkeypatch.setattr(KVProjectionTraining, "training_step", stopping)
    assert fit.main(arguments(base, data, stopped, **changes)) == 130
    checkpoint = torch.load(stopped / "checkpoints" / f"{kind}-depth1" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(name.startswith("projections.") for name in checkpoint["state_dict"])  # never the base
    monkeypatch.setattr(KVProjectionTraining, "training_step", counting)
    assert fit.main([*arguments(base, data, stopped, **changes), "--resume"]) == 0
    assert steps == [4, 5, 6]
    assert exported(stopped) == exported(whole)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_ctrl_c_inside_lightning_exits_130_and_leaves_nothing_half_written(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ImportanceScoring, "validation_step", _interrupt)
    output = tmp_path / "run"
    assert fit.main(arguments(base, data, output)) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not (output / "importance.json").exists()
    assert not (output / "artifact").exists()


def test_bad_input_is_one_sentence_and_exit_2(base, data, tmp_path, capsys):
    no_tokenizer = save_base(tmp_path / "bare", tokenizer=False)
    truncated = save_base(tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    few = save_rows(tmp_path / "few.jsonl", rows=30)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "w1 " * 500, "response": "w2"}) + "\n")
    chat = tmp_path / "chat.jsonl"
    chat.write_text(
        json.dumps({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]})
    )
    cases = [
        ({"model__base": tmp_path / "nowhere"}, "model.base"),
        ({"model__base": no_tokenizer}, "tokenizer"),
        ({"data__calibration": tmp_path / "nothing.jsonl"}, "data.calibration"),
        ({"data__calibration": tmp_path / "empty.jsonl"}, "empty.jsonl"),
        ({"data__calibration": long}, "max_prompt_tokens"),
        ({"data__calibration": chat}, "chat template"),
        ({"data__calibration": few, "budget__metric": "agreement", "budget__max_drop": 0.01}, "349"),
        ({"budget__candidates": [9]}, "1..4"),
        ({"model__base": truncated}, "model.base"),
        ({"trainer__accelerator": "tpu"}, "trainer section"),
        ({"trainer__limit_val_batches": 0.1}, "trainer.limit_val_batches"),
        ({"budget__candidates": 2, "budget__min_pruned": 9}, "budget.min_pruned"),
        ({"output": tmp_path / "file"}, "is a file"),
        ({"output": tmp_path / "file" / "run"}, "output"),
    ]
    for number, (changes, expected) in enumerate(cases):
        output = changes.pop("output", tmp_path / f"run{number}")
        assert fit.main(arguments(base, data, output, **changes)) == 2, changes
        message = capsys.readouterr().err
        assert expected in message, (changes, message)
        assert "Traceback" not in message
        assert message.strip().splitlines()[-1].startswith("pop-fit: error: ")
        assert not (output / "artifact").exists()
        # Candidates are looked at after scoring, whose result is kept; any other refusal leaves no folder.
        assert not output.is_dir() or (output / "importance.json").is_file()


def test_an_output_that_is_not_writable_is_refused(base, data, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):  # root may write into any folder, so the refusal is made by hand
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert fit.main(arguments(base, data, tmp_path / "locked" / "run")) == 2
    assert "cannot be written (Permission denied)" in capsys.readouterr().err


def test_generate_refuses_bad_input_in_one_sentence(fitted, base, data, tmp_path, capsys):
    artifact = str(fitted / "artifact")
    other = save_base(tmp_path / "other", seed=5)
    cases = [
        (["--artifact", str(tmp_path / "none"), "--prompt", "w1"], "none"),
        (["--artifact", artifact, "--prompt", "w1 " * 200], "context"),
        (["--artifact", artifact, "--data", str(data)], "--output"),
        (["--artifact", artifact, "--base", str(other), "--prompt", "w1"], "base"),
        (["--artifact", artifact, "--base", str(tmp_path / "none"), "--prompt", "w1"], "model"),
        (["--artifact", artifact], "see pop-generate --help"),
        (["--artifact", artifact, "--promt", "w1"], "did you mean --prompt?"),
        (
            ["--artifact", artifact, "--prompt", "w1", "--output", "x"],
            "--output (belongs to pop-generate data, eval, ablate and bench)",
        ),
        (["--artifact", artifact, "--prompt", "w1", "--device", "tpu"], "--device"),
        (["--artifact", artifact, "--prompt", "w1", "--dtype", "int8"], "--dtype"),
        (["--artifact", artifact, "--data", str(tmp_path / "no.jsonl"), "--output", "x"], "--data"),
        (["--artifact", artifact, "--data", str(data), "--output", str(tmp_path)], "is a folder"),
        (["--artifact", artifact, "--data", str(data), "--output", "x", "--max_new_tokens", "128"], "context"),
        (["--artifact", artifact, "--prompt", "w1", "--max_new_tokens", "0"], "--max_new_tokens"),
    ]
    for command, expected in cases:
        assert generate.main(command) == 2, command
        message = capsys.readouterr().err
        assert expected in message, (command, message)
        assert "Traceback" not in message
