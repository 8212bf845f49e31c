"""What a run survives: keys that may change, files that are damaged, a second run, a full disk, memory that ran out."""

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from pop_lightning.cli import fit
from pop_lightning.core import files
from pop_lightning.core.errors import InputError
from pop_lightning.core.memory import memory_advice
from pop_lightning.fitting.importance import ImportanceScoring
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.run import pipeline
from pop_lightning.run.folder import RunFolder
from pop_lightning.run.invocation import parse
from pop_lightning.run.resume import refused_changes
from pop_lightning.run.trainers import _step_of

from tests.helpers.ranked import TENSORS, exported
from tests.helpers.workbench import arguments, save_base, save_rows, snapshot

SEED = int(os.environ.get("DISK_SEED") or random.SystemRandom().randrange(2**32))


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    assert fit.main(arguments(base, data, output)) == 0
    return output


@pytest.fixture
def copy(finished, tmp_path):
    """A finished run of its own; its name in the recipe may be another, which changes nothing."""
    return shutil.copytree(finished, tmp_path / "run")


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def searched(base, data, tmp_path_factory):
    """A run that was stopped before it opened the verify split."""
    output = tmp_path_factory.mktemp("searched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "verify", interrupted)
        assert fit.main(arguments(base, data, output)) == 130
    return output


# --- keys -------------------------------------------------------------------------------------------------------------


def test_keys_without_an_effect_on_results_may_change(searched, base, data, tmp_path, monkeypatch, capsys):
    output = shutil.copytree(searched, tmp_path / "run")
    before = {name: content for name, content in snapshot(output).items() if name.endswith(".safetensors")}
    monkeypatch.chdir(tmp_path)
    changes = {"data__batch_size": 3, "importance__batch_size": 2, "trainer__log_every_n_steps": 7}
    changes["trainer__logger"] = "lightning.pytorch.loggers.CSVLogger"
    relative = os.path.relpath(base, tmp_path)
    assert fit.main([*arguments(relative, data, "run", **changes), "--resume"]) == 0
    assert "scoring layers" not in capsys.readouterr().out
    assert {name: snapshot(output).get(name) for name in before} == before


def test_a_looser_budget_refits_nothing_until_the_verify_split_is_opened(searched, base, data, tmp_path, capsys):
    output = shutil.copytree(searched, tmp_path / "run")
    stated = (output / "state/closed_form-depth1.safetensors").stat().st_mtime_ns
    changes = {"budget__max_drop": 100.5, "budget__confidence": 0.9}
    assert fit.main([*arguments(base, data, output, **changes), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "closed form, pass" not in out
    assert "searching at depth" in out  # the bounds are those of another confidence
    assert (output / "state/closed_form-depth1.safetensors").stat().st_mtime_ns == stated
    assert json.loads((output / "metrics.json").read_text())["verified"]["confidence"] == 0.9
    assert fit.main([*arguments(base, data, output, **changes | {"budget__max_drop": 100.7}), "--resume"]) == 2
    message = capsys.readouterr().err
    assert "budget.max_drop was 100.5 and is 100.7 (the verify split was opened" in message


def test_each_refused_key_is_named_with_both_values_and_what_depends_on_it():
    recipe = {
        "seed": 0,
        "depth": None,
        "boundary": 1,
        "salient": 0,
        "selector": "attention",
        "data": {"batch_size": 8, "splits": {"fit": 0.3}},
        "importance": {"rows": 8, "batch_size": None},
        "projection": {"ridge": [0.1], "batch_size": None, "lora": {"r": 4}, "grouping": "head", "memory_gib": 8.0},
        "budget": {"candidates": "all", "max_drop": 0.01, "min_pruned": 2, "boundaries": [1], "salient": [0, 0.1]},
        "trainer": {},
    }

    def refused(change, *present):
        now = json.loads(json.dumps(recipe))
        section, _, key = change[0].rpartition(".")
        target = now
        for part in section.split(".") if section else ():
            target = target[part]
        target[key] = change[1]
        names = [name.replace("*", "x") for name in present]
        return refused_changes(recipe, now, lambda pattern: pattern.replace("*", "x") in names)

    everything = ["state/data.json", "importance.json", "state/closed_form-*", "state/full-*", "state/lora-*"]
    cases = [
        (("seed", 1), "state/data.json", "seed was 0 and is 1"),
        (("data.splits.fit", 0.4), "state/data.json", "data.splits.fit was 0.3 and is 0.4"),
        (("importance.rows", 9), "importance.json", "importance.rows was 8 and is 9"),
        (("projection.ridge", [1.0]), "state/closed_form-*", "projection.ridge was [0.1] and is [1.0]"),
        (("data.batch_size", 4), "state/full-*", "projection.batch_size was 8 and is 4"),
        (("projection.lora.r", 8), "state/lora-*", "projection.lora.r was 4 and is 8"),
        (("trainer.precision", "bf16-mixed"), "state/full-*", "trainer.precision was null and is 'bf16-mixed'"),
        (("budget.max_drop", 0.5), "state/verify.json", "budget.max_drop was 0.01 and is 0.5"),
        (("boundary", 4), "importance.json", "boundary was 1 and is 4"),
        (("salient", 0.1), "state/full-*", "salient was 0 and is 0.1"),
        (("salient", 0.1), "state/verify.json", "salient was 0 and is 0.1"),
        (("selector", "recency"), "state/full-*", "selector was 'attention' and is 'recency'"),
        (("selector", "learned"), "state/verify.json", "selector was 'attention' and is 'learned'"),
        (("projection.ridge", [1.0]), "state/selector-*", "projection.ridge was [0.1] and is [1.0]"),
    ]
    for change, file, expected in cases:
        (sentence,) = refused(change, file)
        assert sentence.startswith(expected), sentence
        assert refused(change) == []
    without_effect = [("projection.memory_gib", 1.0), ("importance.batch_size", 1), ("budget.boundaries", [4])]
    for change in (*without_effect, ("budget.salient", [0])):
        assert refused(change, *everything, "state/verify.json") == [], change
    recipe |= {"boundary": "auto", "salient": "auto"}
    for change in (("budget.boundaries", [4]), ("budget.salient", [0])):
        assert refused(change, "state/verify.json")[0].startswith(change[0])
    # Until the verify split is opened, other tokens may be chosen among, unless they decide the depths.
    fitted = ("state/data.json", "importance.json", "state/closed_form-*", "state/search.json")
    for change in (("selector", "learned"), ("budget.salient", [0]), ("salient", 0.1)):
        assert refused(change, *fitted) == [], change
    recipe["budget"]["speedup"] = 1.5
    for change in (("budget.boundaries", [4]), ("budget.salient", [0]), ("salient", 0.1)):
        assert "the closed form was fitted at the depths" in refused(change, *fitted)[0]


def test_a_finished_run_is_not_resumed_on_other_rows_or_another_base(copy, base, data, tmp_path, capsys):
    rows = save_rows(tmp_path / "rows.jsonl", seed=1)
    before = snapshot(copy)
    assert fit.main([*arguments(base, rows, copy), "--resume"]) == 2
    captured = capsys.readouterr()
    assert "has other rows than when the run" in captured.err
    assert "artifact:" not in captured.out
    other = save_base(tmp_path / "other", seed=5)
    assert fit.main([*arguments(other, data, copy), "--resume"]) == 2
    assert "has other weights than when the run" in capsys.readouterr().err
    assert {**snapshot(copy), "recipe.yaml": b""} == {**before, "recipe.yaml": b""}


# --- what is damaged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_an_artifact_that_is_gone_or_damaged_is_written_again_from_state(finished, copy, base, data, capsys, damage):
    tensors = copy / TENSORS
    if damage == "gone":
        shutil.rmtree(copy / "artifact")
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    else:
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(content)
    assert fit.main([*arguments(base, data, copy), "--resume"]) == 0
    out = capsys.readouterr().out
    assert "is missing or damaged: it is written again" in out
    assert "scoring layers" not in out
    assert "verifying" not in out
    assert exported(copy) == exported(finished)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("importance.json", "cut"),
        ("importance.json", "another number"),
        ("state/fitted.json", "empty"),
        ("state/search.json", "another number"),
        ("state/closed_form-depth2.safetensors", "zeros"),
        ("state/closed_form-depth2.safetensors", "flipped"),
    ],
)
def test_state_that_was_damaged_is_made_again(searched, finished, base, data, tmp_path, name, damage):
    output = shutil.copytree(searched, tmp_path / "run")
    content = (output / name).read_bytes()
    damaged = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(len(content)),
        "flipped": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
        "another number": re.sub(rb"\d\.\d+", b"7.5", content, count=1),  # still valid JSON
    }[damage]
    (output / name).write_bytes(damaged)
    assert fit.main([*arguments(base, data, output), "--resume"]) == 0
    assert (output / name).read_bytes() == content
    assert exported(output) == exported(finished)


def test_results_without_a_record_of_their_rows_are_refused(searched, base, data, tmp_path, capsys):
    output = shutil.copytree(searched, tmp_path / "run")
    (output / "state/data.json").unlink()
    assert fit.main([*arguments(base, data, output), "--resume"]) == 2
    assert "has results, but state/data.json, which names their base and rows" in capsys.readouterr().err


def test_a_budget_stays_what_was_verified_where_the_record_of_it_is_gone(copy, base, data, capsys):
    (copy / "state/verify.json").unlink()
    (copy / "metrics.json").unlink()
    assert fit.main([*arguments(base, data, copy, budget__max_drop=99.0), "--resume"]) == 2
    assert "budget.max_drop was 100.0 and is 99.0 (the verify split was opened" in capsys.readouterr().err


def test_a_flipped_bit_of_a_checkpoint_is_noticed_although_pytorch_reads_it(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"global_step": 3, "weight": torch.ones(64)}, path)
    assert _step_of(path) == 3
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(64).numpy().tobytes()) + 9] ^= 4
    path.write_bytes(content)
    assert torch.load(path)["weight"].ne(1).sum() == 1
    assert _step_of(path) == 0


def test_projections_that_were_written_stay_where_the_fit_was_stopped_before_its_end(
    finished, base, data, tmp_path, monkeypatch
):
    output, write = tmp_path / "run", RunFolder.write_projections

    def stopping(folder, choice, projections):
        write(folder, choice, projections)
        if choice.depth == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_projections", stopping)
        assert fit.main(arguments(base, data, output)) == 130
    written = {path: path.stat().st_mtime_ns for path in (output / "state").glob("*.safetensors")}
    assert len(written) == 2
    assert not (output / "state/fitted.json").exists()
    assert fit.main([*arguments(base, data, output), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert exported(output) == exported(finished)


# --- the lock ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pop_lightning.run.folder import RunFolder
from pop_lightning.run.invocation import parse
folder = RunFolder(parse(sys.argv[1:]).recipe, resume=True)
print("held", flush=True)
time.sleep(600)
"""


def test_a_run_at_work_is_neither_resumed_nor_replaced_and_a_killed_one_is(base, data, tmp_path, capsys):
    output = tmp_path / "run"
    command = arguments(base, data, output)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        (output / "importance.json").write_text("{}")
        before = snapshot(output)
        for flag in ("--resume", "--overwrite"):
            assert fit.main([*command, flag]) == 2
            message = capsys.readouterr().err
            assert f"belongs to a run at work (process {holder.pid} on " in message
            assert snapshot(output) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunFolder(parse(command).recipe, resume=True).at_work():
        pass
    assert not (output / "state/.lock").exists()


# --- a disk and a memory that run out ---------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_in_any_stage_and_the_run_can_be_resumed(
    finished, base, data, tmp_path, monkeypatch, capsys
):
    output, sync = tmp_path / "run", files._sync
    for number in (2, 5, 8):  # of the files that are written, which one finds no room
        left = [number]

        def full(path, left=left):
            left[0] -= path.is_file()
            if left[0] == 0 and path.is_file():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(path)

        monkeypatch.setattr(files, "_sync", full)
        assert fit.main([*arguments(base, data, output), *["--resume"] * output.exists()]) == 2, number
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert "No space left on device" in message
        assert str(output) in message
    monkeypatch.setattr(files, "_sync", sync)
    assert fit.main([*arguments(base, data, output), "--resume"]) == 0
    assert exported(output) == exported(finished)


def test_an_output_that_vanishes_is_one_sentence(base, data, tmp_path, monkeypatch, capsys):
    output, score = tmp_path / "run", pipeline.score

    def removing(run):
        shutil.rmtree(output)
        return score(run)

    monkeypatch.setattr(pipeline, "score", removing)
    assert fit.main(arguments(base, data, output)) == 2
    message = capsys.readouterr().err
    assert f"output {output} was removed or replaced while the run was at work" in message
    assert not output.exists()


@pytest.mark.parametrize(
    ("module", "kind", "key"),
    [(ImportanceScoring, "validation_step", "importance.batch_size (8)"),
     (KVProjectionTraining, "training_step", "projection.gradient_checkpointing")],
)  # fmt: skip
def test_memory_that_runs_out_says_which_key_to_change(base, data, tmp_path, monkeypatch, capsys, module, kind, key):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module, kind, full)
    changes = {"projection__kind": "full", "projection__steps": 2, "budget__candidates": [2]}
    assert fit.main(arguments(base, data, tmp_path / "run", **changes)) == 2
    message = capsys.readouterr().err
    assert "memory ran out" in message
    assert key in message
    assert "--resume" in message


def test_memory_advice_does_not_change_other_errors():
    with pytest.raises(RuntimeError, match="shapes"), memory_advice("lower it"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(InputError, match="memory ran out; lower it"), memory_advice("lower it"):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["pop_lightning.run.pipeline", "pop_lightning.cli.fit", "peft"])


def limited(command, log, limit):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    read, write = os.pipe()  # what is printed is no file, so the limit leaves it alone
    if os.fork() == 0:
        os.close(write)
        while part := os.read(read, 65536):
            os.write(descriptor, part)
        os._exit(0)
    os.dup2(write, 1)
    os.dup2(write, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(fit.main(command))


@pytest.mark.full
def test_disks_that_fill_up_at_random_end_with_a_sentence_and_the_run_can_be_resumed(base, data, tmp_path):
    """24 limits of a file's size, drawn from a seed: each hits whichever writer comes to it first."""
    print(f"DISK_SEED={SEED}")
    rng, failed = random.Random(SEED), 0
    changes = {"projection__kind": "lora", "projection__steps": 4, "projection__checkpoint_every": 2}
    whole = tmp_path / "whole"
    assert fit.main(arguments(base, data, whole, **changes)) == 0
    for number in range(24):
        output, log = tmp_path / str(number), tmp_path / f"{number}.log"
        command = arguments(base, data, output, **changes)
        process = FORK.Process(target=limited, args=(command, str(log), int(2 ** rng.uniform(6, 18))))
        process.start()
        process.join()
        said = log.read_text()
        assert process.exitcode in (0, 2), said[-3000:]
        assert "Traceback" not in said
        if process.exitcode == 2:
            failed += 1
            assert str(output) in said.splitlines()[-1]
            assert fit.main([*command, "--resume"]) == 0
        assert exported(output) == exported(whole)
    print(f"{failed} of 24 runs found no room")
    assert failed


# --- what is given ----------------------------------------------------------------------------------------------------


def test_a_given_depth_is_verified_for_its_loss_and_exported_whatever_it_loses(base, data, tmp_path, capsys):
    output = tmp_path / "run"
    changes = {"depth": 1, "budget__metric": "agreement", "budget__max_drop": 0.001}  # far too few rows for that
    assert fit.main(arguments(base, data, output, **changes)) == 0
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["depth"] == 1
    assert {entry["depth"] for entry in metrics["curve"]} == {1}
    assert metrics["verification"][0]["passed"] is None
    assert metrics["verified"]["bound"] >= metrics["verified"]["value"] > 0.001
    assert metrics["verified"]["max_drop"] is None
    assert "Depth 1 was given" in (output / "report.html").read_text()
    assert "with no limit on its loss" in capsys.readouterr().out
    for depth in (4, 9):
        assert fit.main(arguments(base, data, tmp_path / "refused", depth=depth)) == 2
        assert "depth prunes nothing" in capsys.readouterr().err


def test_splits_of_one_row_each_run_to_the_end(base, tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", rows=4)
    output = tmp_path / "run"
    assert fit.main(arguments(base, rows, output, depth=2, budget__metric="agreement", budget__max_drop=1.0)) == 0
    metrics = json.loads((output / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert {metrics["rows"][name] for name in ("fit", "tune", "search", "verify")} == {1}


def test_callbacks_of_the_recipe_survive_the_run_and_its_resuming(base, data, tmp_path):
    output = tmp_path / "run"
    command = arguments(base, data, output, projection__kind="full", projection__steps=2, budget__candidates=[2])
    command += ["--trainer.callbacks", '[{"class_path": "lightning.pytorch.callbacks.Timer"}]']
    assert fit.main(command) == 0
    assert "Timer" in (output / "recipe.yaml").read_text()
    assert "Timer" in (output / "artifact/pop_config.json").read_text()
    shutil.rmtree(output / "artifact")
    assert fit.main([*command, "--resume"]) == 0
    assert (output / TENSORS).is_file()


def test_a_logger_whose_package_is_missing_is_refused_before_the_base_is_loaded(base, data, tmp_path, capsys):
    command = arguments(tmp_path / "nowhere", data, tmp_path / "run")
    assert fit.main([*command, "--trainer.logger", "lightning.pytorch.loggers.CometLogger"]) == 2
    message = capsys.readouterr().err
    assert "trainer" in message
    assert "comet" in message.lower()
    assert not (tmp_path / "run").exists()


def test_a_home_folder_is_expanded(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with RunFolder(parse(arguments(base, data, "~/run")).recipe).at_work():
        assert (tmp_path / "run/recipe.yaml").is_file()
    assert not (tmp_path / "~").exists()
