"""Runs of one and of several real processes, for test_ranks.py, test_kills.py and test_nodes.py."""

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from pop_lightning.cli import fit
from pop_lightning.core.errors import LAUNCHED_BY
from pop_lightning.data.batches import collate
from pop_lightning.data.rows import Row
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import load_model
from pop_lightning.pruning.passes import teacher_trace

from tests.helpers.workbench import arguments, save_base, save_rows

TENSORS = "artifact/kv_projections.safetensors"
# Odd numbers everywhere: 25 rows to fit, 8 to tune, 17 to search and 33 to verify; no batch divides among two.
ODD = {
    "data__batch_size": 6,
    "importance__rows": 9,
    "projection__kind": "full",
    "projection__steps": 6,
    "projection__batch_size": 7,
    "projection__checkpoint_every": 2,
    "projection__kv_match": 0.1,
    "projection__hidden_match": 0.1,
    "budget__candidates": [2, 1],
    "trainer__logger": "lightning.pytorch.loggers.CSVLogger",
    "trainer__log_every_n_steps": 1,
}


def prepare(folder: Path) -> Path:
    """A base, rows, and DeepSpeed settings under which even the smallest weight is in shards."""
    save_base(folder / "base")
    save_rows(folder / "rows.jsonl", rows=83)
    nothing_whole = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    zero = {"stage": 3} | dict.fromkeys(nothing_whole, 0)
    (folder / "zero3.json").write_text(json.dumps({"zero_allow_untested_optimizer": True, "zero_optimization": zero}))
    return folder


FIT = ("-m", "pop_lightning.cli.fit")


def under_torchrun(helper: str) -> tuple[str, ...]:
    """The program, as ``Runs.start`` is given it, that runs a file of this folder in two processes."""
    own = str(Path(__file__).with_name(helper))
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", own)


class Runs:
    """Finished runs by strategy, each made once."""

    def __init__(self, work):
        self.work, self.done = work, {}

    def command(self, output, strategy, **changes):
        trainer = {} if strategy == "one" else {"trainer__strategy": strategy, "trainer__devices": 2}
        return arguments(self.work / "base", self.work / "rows.jsonl", output, **{**ODD, **trainer, **changes})

    def environment(self, strategy):
        extra = {"PL_DEEPSPEED_CONFIG_PATH": str(self.work / "zero3.json")} if strategy.endswith("3") else {}
        return os.environ | {"OMP_NUM_THREADS": "1", "NOTES": str(self.work)} | extra

    def start(self, command, strategy="one", program=FIT):
        return subprocess.Popen(
            [sys.executable, *program, *command],
            env=self.environment(strategy),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process, code=0):
        out, err = process.communicate(timeout=500)
        assert process.returncode == code, (process.returncode, out[-2000:], err[-4000:])
        return out, err

    def __getitem__(self, strategy) -> Path:
        if strategy not in self.done:
            output = self.work / strategy
            if strategy == "one":
                assert fit.main(self.command(output, strategy)) == 0
            else:
                program = under_torchrun("sharded_fit.py") if strategy == "deepspeed_stage_3" else FIT
                self.finish(self.start(self.command(output, strategy), strategy, program))
            self.done[strategy] = output
        return self.done[strategy]


def workers(process) -> list[psutil.Process]:
    """The processes that ``pop-fit`` has started so far, in the order of their ranks."""
    found = {}
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            variables = child.environ()
            if LAUNCHED_BY in variables:
                found[int(variables["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def wait_for(path: Path, process) -> None:
    """Return once ``path`` exists; ``process``, which will write it, must not end before."""
    until = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


def read(run, name):
    return json.loads((run / name).read_text())


def exported(run) -> list:
    """The tensors of an artifact to the byte; its metadata name the recipe, and so the output folder."""
    return sorted(safetensors.deserialize((run / TENSORS).read_bytes()), key=lambda entry: entry[0])


def losses(run):
    """The training losses of a run, step by step."""
    files = sorted(run.rglob("metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
    rows = [row for path in files for row in csv.DictReader(path.open())]
    return [
        float(row[name]) for row in rows for name in row if re.fullmatch(r"training/[^/]+/loss", name) and row[name]
    ]


def predictions(run, depth, kind, inputs):
    """What the fitted maps of a run make of normalized hidden states ``[tokens, hidden]``."""
    state = safetensors.torch.load_file(run / f"state/{kind}-depth{depth}.safetensors")
    layers = {name.rpartition(".")[0] for name in state}
    return {name: inputs @ state[f"{name}.weight"].T + state[f"{name}.bias"] for name in sorted(layers)}


def assert_same_run(two: Path, one: Path, base: Path) -> None:
    """Importance, closed form, losses, curve and depth of a run of two processes are those of a run of one."""
    ours, theirs = read(two, "importance.json"), read(one, "importance.json")
    assert ours["rows"] == theirs["rows"] == ODD["importance__rows"]
    for stage in ("prefill", "decode"):
        found, wanted = torch.tensor(ours[stage]), torch.tensor(theirs[stage])
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
        assert found.argsort().equal(wanted.argsort())
        assert (found[:-1] > 0).all()

    decoder = Decoder(load_model(str(base)))
    rows = [Row(tuple(range(4, 20)), (7, 8), "row"), Row(tuple(range(30, 60)), (9,), "row")]
    for depth in (2, 1):
        trace = teacher_trace(decoder, collate(rows, 0), depth)
        inputs = decoder.normalize(trace.hidden[depth]).flatten(0, 1)
        found, wanted = (predictions(run, depth, "closed_form", inputs) for run in (two, one))
        assert found.keys() == wanted.keys()
        for name, predicted in wanted.items():
            assert (found[name] - predicted).abs().max() <= 1e-5 * predicted.abs().max()

    assert len(losses(two)) == ODD["projection__steps"]  # the budget has the deepest depth trained alone
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-5, atol=0)
    ours, theirs = read(two, "metrics.json"), read(one, "metrics.json")
    assert ours["depth"] == theirs["depth"] == 1
    assert ours["rows"] == theirs["rows"]
    for found, wanted in zip(ours["curve"], theirs["curve"], strict=True):
        assert {key: found[key] for key in ("depth", "projection", "rows")} == {
            key: wanted[key] for key in ("depth", "projection", "rows")
        }
        for key in ("kl", "nll_increase", "bound"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-6)
    assert ours["verified"]["rows"] == theirs["verified"]["rows"]
