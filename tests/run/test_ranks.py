"""Several processes against one: real processes, real DeepSpeed, weights really in shards, and runs that are killed."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from pop_lightning import StageAwareGenerator
from pop_lightning.cli import fit
from pop_lightning.core.errors import InputError
from pop_lightning.core.files import replace_folder, restore_folder
from pop_lightning.data.batches import collate, real_rows
from pop_lightning.data.rows import Row
from pop_lightning.run import pipeline, strategies
from pop_lightning.run.invocation import parse
from pop_lightning.run.trainers import Trainers

from tests.helpers.ranked import (
    TENSORS,
    assert_same_run,
    exported,
    losses,
    read,
    under_torchrun,
    wait_for,
    workers,
)
from tests.helpers.workbench import save_base, save_rows, snapshot

STRATEGIES = ("ddp", "deepspeed_stage_2", "deepspeed_stage_3")


# Between plain copies and shards of everything lie shards of the optimizer's state: covered by the other two.
QUICK = ("ddp", "deepspeed_stage_3")


@pytest.mark.parametrize(
    "strategy", [each if each in QUICK else pytest.param(each, marks=pytest.mark.full) for each in STRATEGIES]
)
def test_two_processes_give_the_results_of_one(runs, work, strategy):
    assert_same_run(runs[strategy], runs["one"], work / "base")


def test_zero_3_never_holds_the_whole_base_on_one_process(runs, work):
    runs["deepspeed_stage_3"]
    for rank in (0, 1):
        note = json.loads((work / f"rank{rank}.json").read_text())
        assert note["after_loading"] == 0
        assert note["share"] <= 0.51 * note["whole"]
        assert 0 < note["most_while_running"] <= 0.2 * note["whole"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_export_and_checkpoints_hold_projections_only(runs, strategy):
    run = runs[strategy]
    generator = StageAwareGenerator.from_artifact(run / "artifact")
    whole = sum(parameter.numel() for parameter in generator.model.parameters())
    trained = sum(tensor.numel() for tensor in safetensors.torch.load_file(run / TENSORS).values())
    assert trained == sum(tensor.numel() for tensor in generator.projections.fitted_state().values()) < whole / 4
    last = run / "checkpoints/full-depth1/last.ckpt"
    inside = last / "checkpoint/mp_rank_00_model_states.pt"
    content = torch.load(inside if last.is_dir() else last, weights_only=True)
    state = content["module" if last.is_dir() else "state_dict"]
    assert sum(tensor.numel() for tensor in state.values()) == trained
    assert all(name.startswith("projections.") for name in state)


# Every plan at depth 3 of 4 loses nothing, so that only rounding tells their losses apart.
TIED = {"budget__speedup": 1.05, "projection__kind": "reuse"}
LIMITED = {"budget__metric": "agreement", "budget__max_drop": 0.3, "budget__min_pruned": 1}


@pytest.mark.parametrize("target", [TIED, pytest.param(LIMITED, marks=pytest.mark.full)], ids=["tied", "limited"])
def test_two_processes_choose_the_plan_of_one(runs, work, tmp_path, target):
    searched = {"boundary": "auto", "budget__boundaries": [1, 4], "salient": "auto", "budget__salient": [0, 0.2]}
    searched |= {"projection__kind": "closed_form", "budget__candidates": [3, 2, 1]} | target
    one, two = tmp_path / "one", tmp_path / "two"
    code = fit.main(runs.command(one, "one", **searched))
    assert code in (0, 3)  # what the verify rows say is theirs
    command = runs.command(two, "ddp", **searched)
    runs.finish(runs.start(command, "ddp", under_torchrun("planned_fit.py")), code)
    first, second = (json.loads((work / f"plan{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    ours, theirs = read(two, "metrics.json"), read(one, "metrics.json")
    decided = ("depth", "boundary", "salient", "projection")
    assert {key: ours.get(key) for key in decided} == {key: theirs.get(key) for key in decided}
    plans = [
        [{key: each.get(key) for key in ("depth", "boundary", "salient")} for each in metrics["plans"]]
        for metrics in (ours, theirs)
    ]
    assert plans[0] == plans[1]
    assert len({(each["boundary"], each["salient"]) for each in plans[0]}) == 4
    if target is TIED:
        assert ours["depth"] == 3
        assert all(abs(each["loss"]) < 1e-6 for each in theirs["plans"])
        assert (ours["boundary"], ours.get("salient")) == (1, None)  # the fewest operations


# --- killed and resumed ---------------------------------------------------------------------------------------------

MOMENTS = {
    "scored": "importance.json",
    "fitted": "state/fitted.json",
    "training": "checkpoints/full-depth1/last.ckpt",
    "trained": "state/full-depth1-steps6.safetensors",
    "searched": "state/search.json",
}


def kill_and_resume(runs, strategy, moment, victim, output):
    """Start a run, kill it once the file of ``moment`` is there, check that nothing lives on, and resume it.

    Args:
        victim: the rank to SIGKILL, "launcher" or "all"; or a signal, which the launcher gets.
    """
    command = runs.command(output, strategy)
    process = runs.start(command, strategy)
    try:
        wait_for(output / MOMENTS[moment], process)
        everyone = workers(process)
        by_signal = isinstance(victim, signal.Signals)
        killed = [each for rank, each in enumerate(everyone) if victim in (rank, "all")]
        for each in [*killed, *([process] if victim in ("launcher", "all") or by_signal else [])]:
            each.send_signal(victim if by_signal else signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        _, alive = psutil.wait_procs(everyone, timeout=30)
        assert not alive
        said = [line for line in err.splitlines() if line.startswith("pop-fit: ")]
        if by_signal:
            assert process.returncode == 128 + victim
            word = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}[victim]
            (sentence,) = said
            assert sentence.startswith(f"pop-fit: {word}; --resume continues the run: ")
            assert sentence.endswith(f" {shlex.join([*command, '--resume'])}")
        elif victim in (0, 1):
            assert process.returncode == 1
            assert said == [
                f"pop-fit: error: process {victim} of the run ended with SIGKILL, so the others were stopped; "
                "--resume continues from what is finished."
            ]
        else:
            assert process.returncode == -signal.SIGKILL
    finally:
        process.kill()
    assert not (output / "metrics.json").exists()
    finished = {
        path: path.stat().st_mtime_ns
        for path in (output / "importance.json", *(output / "state").glob("[!.]*"))
        if path.exists()
    }
    runs.finish(runs.start([*command, "--resume"], strategy))
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert exported(output) == exported(runs[strategy])


def test_a_run_of_two_processes_survives_the_death_of_one(runs, tmp_path):
    kill_and_resume(runs, "ddp", "training", 1, tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize(
    ("strategy", "moment", "victim"),
    [
        ("ddp", "scored", "all"),
        ("ddp", "fitted", signal.SIGTERM),
        ("ddp", "searched", 0),
        ("deepspeed_stage_2", "fitted", "launcher"),
        ("deepspeed_stage_2", "training", signal.SIGINT),
        ("deepspeed_stage_2", "trained", 1),
        ("deepspeed_stage_3", "scored", 1),
        ("deepspeed_stage_3", "training", signal.SIGTERM),
        ("deepspeed_stage_3", "searched", "launcher"),
    ],
)
def test_a_killed_run_of_two_processes_resumes_to_the_same_bytes(runs, tmp_path, strategy, moment, victim):
    kill_and_resume(runs, strategy, moment, victim, tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_of_one_process_resumes_to_the_same_bytes(runs, tmp_path, moment):
    kill_and_resume(runs, "one", moment, "launcher", tmp_path / "run")


# --- other settings, other ends -------------------------------------------------------------------------------------

SETTINGS = {
    "responses are generated": ("deepspeed_stage_3", {"data__max_response_tokens": 4, "projection__kind": "reuse"}),
    "adapters, clipped gradients, several batches a step": (
        "deepspeed_stage_2",
        {
            "projection__kind": "lora",
            "trainer__gradient_clip_val": 0.01,
            "trainer__accumulate_grad_batches": 2,
        },
    ),
    "adapters under DDP": ("ddp", {"projection__kind": "lora", "trainer__accumulate_grad_batches": 2}),
    "a tied head and windows, activations computed again": (
        "deepspeed_stage_3",
        {
            "projection__gradient_checkpointing": "true",
            "importance__gradient_checkpointing": "true",
            "importance__batch_size": 2,
        },
    ),
    "shards in the CPU's memory": ("deepspeed_stage_3_offload", {"projection__steps": 2}),
}


@pytest.mark.full
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_give_the_results_of_one_under_other_settings(runs, work, tmp_path, name):
    strategy, changes = SETTINGS[name]
    base, data = work / "base", work / "rows.jsonl"
    if "windows" in name:
        base = save_base(tmp_path / "gemma3", "gemma3")
    if "generated" in name:
        data = save_rows(tmp_path / "prompts.jsonl", rows=83, responses=False)
    changes = {**changes, "model__base": base, "data__calibration": data}
    one, two = tmp_path / "one", tmp_path / "two"
    assert fit.main(runs.command(one, "one", **changes)) == 0
    runs.finish(runs.start(runs.command(two, strategy, **changes), strategy))
    if "generated" in name:
        assert read(two, "state/responses.json") == read(one, "state/responses.json")
    for stage in ("prefill", "decode"):
        found, wanted = (torch.tensor(read(run, "importance.json")[stage]) for run in (two, one))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=2e-5, atol=0)
    assert read(two, "metrics.json")["depth"] == read(one, "metrics.json")["depth"]


@pytest.mark.full
def test_a_single_process_can_keep_its_base_in_the_cpus_memory(runs, tmp_path):
    command = runs.command(tmp_path / "run", "deepspeed_stage_3_offload", trainer__devices=1)
    runs.finish(runs.start(command, "deepspeed_stage_3_offload"))
    found, wanted = (read(run, "importance.json")["prefill"] for run in (tmp_path / "run", runs["one"]))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-3, atol=0)


AGREEMENT = {"budget__metric": "agreement"}


@pytest.mark.full
def test_processes_stop_together_on_bad_input_and_without_a_depth(runs, tmp_path):
    wrongs = {  # found by the first process for all, and by each process alike
        "data.calibration": {"data__calibration": tmp_path / "nothing.jsonl"},
        "budget.max_drop": {"budget__max_drop": 1e-6, **AGREEMENT},
    }
    for key, wrong in wrongs.items():
        _, err = runs.finish(runs.start(runs.command(tmp_path / "bad", "ddp", **wrong)), code=2)
        (line,) = [line for line in err.splitlines() if line.startswith("pop-fit: ")]
        assert line.startswith(f"pop-fit: error: {key} ")
        assert "on process" not in line
        assert "Traceback" not in err
        assert not (tmp_path / "bad").exists()
    strict = runs.command(tmp_path / "none", "ddp", budget__max_drop=0.15, **AGREEMENT)
    runs.finish(runs.start(strict), code=3)
    assert read(tmp_path / "none", "metrics.json")["depth"] is None
    _, err = runs.finish(runs.start(strict), code=2)
    assert "exists already; give --resume" in err
    runs.finish(runs.start([*strict, "--resume"]), code=3)


# --- the parts, in one process --------------------------------------------------------------------------------------


def test_the_shares_of_a_batch_hold_every_row_once_and_have_one_shape():
    rows = [Row(tuple(range(4, 6 + n)), tuple(range(7, 8 + n % 3)), f"row {n}") for n in range(7)]
    whole = collate(rows, 0)
    for size in (2, 3, 8):
        shares = [collate(rows, 0, rank=rank, size=size) for rank in range(size)]
        assert len({share["input_ids"].shape for share in shares}) == 1
        assert {share["prompt_length"] for share in shares} == {whole["prompt_length"]}
        assert sum(map(real_rows, shares)) == len(rows)
        for rank, share in enumerate(shares):
            count = real_rows(share)
            for name in ("input_ids", "attention_mask", "row_seed"):
                assert share[name][:count].equal(whole[name][rank::size])
            assert not share["attention_mask"][count:].any()


def test_a_folder_whose_replacement_was_cut_short_comes_back(tmp_path, monkeypatch):
    partial, folder = tmp_path / "new", tmp_path / "folder"
    for path, text in ((partial, "new"), (folder, "old")):
        path.mkdir()
        (path / "file").write_text(text)
    rename = os.rename

    def killed(source, target):
        if Path(source) == partial:
            os._exit(9)
        rename(source, target)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(os, "rename", killed)
        replace_folder(partial, folder)
    os.waitpid(child, 0)
    assert not folder.exists()
    restore_folder(folder)
    assert (folder / "file").read_text() == "old"
    replace_folder(partial, folder)
    restore_folder(folder)
    assert snapshot(tmp_path) == {"folder/file": b"new"}


def test_a_run_killed_while_it_opened_its_folder_is_resumed(runs, tmp_path):
    output = tmp_path / "run"
    (output / "state").mkdir(parents=True)
    (output / ".4711.recipe.yaml").write_text("see")
    recipe = parse([*runs.command(output, "one"), "--resume"]).recipe
    pipeline.RunFolder(recipe, resume=True)
    assert (output / "recipe.yaml").is_file()
    for name in ("state/.4711.search.json", ".12.report.html"):
        (output / name).write_text("half of a")
    with pipeline.RunFolder(recipe, resume=True).at_work():
        pass
    assert set(snapshot(output)) == {"recipe.yaml"}


@pytest.mark.parametrize(
    ("strategy", "tasks", "nodes"), [("auto", 2, 2), ("ddp", 2, 2), ("ddp", 4, 2), ("deepspeed_stage_3", 1, 1)]
)
def test_another_number_of_processes_than_the_recipe_names_is_refused(
    runs, tmp_path, monkeypatch, strategy, tasks, nodes
):
    under_slurm(monkeypatch, tasks=tasks, per_node=tasks // nodes, nodes=nodes)
    devices = 2 if strategy == "deepspeed_stage_3" else 1
    recipe = recipe_of(runs, tmp_path, strategy, devices)
    with pytest.raises(InputError, match=rf"trainer.devices {devices} .*SLURM names {tasks} tasks, the recipe"):
        Trainers(recipe)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    if tasks > 1:  # Lightning takes no other setting
        with pytest.raises(InputError, match="--ntasks-per-node"):
            Trainers(recipe)


def test_several_processes_in_a_job_without_srun_are_refused_with_the_command(runs, tmp_path, monkeypatch):
    under_slurm(monkeypatch, tasks=1, per_node=1, nodes=1)
    with pytest.raises(InputError) as error:
        Trainers(recipe_of(runs, tmp_path, "ddp", devices=2))
    assert "srun, one task per process (#SBATCH --nodes 1 --ntasks-per-node 2)" in str(error.value)
    assert "set trainer" not in str(error.value)  # to the one task that there is


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_one_process_in_a_job_of_several_tasks_runs_as_the_error_says(runs, tmp_path, monkeypatch, strategy):
    under_slurm(monkeypatch, tasks=4, per_node=2, nodes=2)
    recipe = recipe_of(runs, tmp_path, strategy, devices=1)
    with pytest.raises(InputError, match=r"SLURM names 4 tasks, the recipe 1\): start it with srun --ntasks 1, or set"):
        Trainers(recipe)
    # What srun sets for its one task; the job's tasks per node stay.
    under_slurm(monkeypatch, tasks=1, per_node=2, nodes=1)
    Trainers(recipe)


@pytest.mark.parametrize(("strategy", "devices"), [("auto", 1), ("ddp", 2)])
def test_another_number_of_processes_than_torchrun_started_is_refused_in_its_words(
    runs, tmp_path, monkeypatch, strategy, devices
):
    given = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}
    for name, value in (given | {"TORCHELASTIC_RUN_ID": "pop"}).items():
        monkeypatch.setenv(name, str(value))
    words = (
        rf"3 processes were started, the recipe {devices}\): .*torchrun --nnodes 1 --nproc_per_node {devices}\), or set"
    )
    with pytest.raises(InputError, match=words):
        Trainers(recipe_of(runs, tmp_path, strategy, devices))


def under_slurm(monkeypatch, tasks, per_node, nodes):
    """The variables of the first task of a job."""
    given = {"NTASKS": tasks, "NTASKS_PER_NODE": per_node, "NNODES": nodes, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def recipe_of(runs, folder, strategy, devices):
    changes = {"trainer__strategy": strategy, "trainer__devices": devices}
    return parse(runs.command(folder, "one", **changes)).recipe


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trainer__strategy": "fsdp"}, "trainer.strategy must be one of auto, ddp, deepspeed_stage_2"),
        ({"trainer__strategy": "ddp", "model__device_map": "auto"}, "model.device_map"),
    ],
)
def test_strategies_that_cannot_run_are_refused(runs, tmp_path, changes, expected):
    with pytest.raises(InputError, match=expected):
        Trainers(parse(runs.command(tmp_path, "one", **changes)).recipe)


def test_without_deepspeed_its_strategies_are_refused_and_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"pip install 'pop-lightning\[deepspeed\]'"):
        strategies.check("deepspeed_stage_3")


@pytest.mark.full
def test_one_process_without_a_strategy_never_imports_deepspeed():
    code = "import sys, pop_lightning.run.pipeline; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
