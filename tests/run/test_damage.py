"""Output folders with random damage: a resumed run ends with the same results, or refuses with one sentence.

Damage is drawn from ``DAMAGE_SEED``: bits flipped, stretches overwritten, cut, zeroed, deleted or copied over, numbers
of JSON files changed so that they stay valid, files replaced with folders and folders with files; one to three of them.
"""

import os
import random
import re
import shutil
import signal

import pytest

from pop_lightning.cli import fit
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.run import pipeline

from tests.helpers.ranked import exported, read, wait_for
from tests.helpers.workbench import arguments

SEED = int(os.environ.get("DAMAGE_SEED") or 0)
COUNT = 80  # damaged folders for each state of a run in the long suite
DEEPSPEED_COUNT = 8
TRAINED = {"projection__steps": 6, "projection__checkpoint_every": 2, "budget__candidates": [2, 1]}
STATES = {  # how the run was made, and where it was stopped
    "finished": {},
    "searched": {},
    "training full": {"projection__kind": "full", **TRAINED},
    "trained lora": {"projection__kind": "lora", **TRAINED},
}


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    """By state: the folder of a run in it, and that of a run that nothing stopped."""
    folders = {}

    def make(state):
        if state not in folders:
            folder = tmp_path_factory.mktemp(state.replace(" ", "-"))
            whole, stopped = folder / "whole", folder / "stopped"
            assert fit.main(arguments(base, data, whole, **STATES[state])) == 0
            if state in ("finished", "trained lora"):
                shutil.copytree(whole, stopped)
            else:
                with pytest.MonkeyPatch.context() as patch:
                    stop(patch, state)
                    assert fit.main(arguments(base, data, stopped, **STATES[state])) == 130
            folders[state] = stopped, whole
        return folders[state]

    return make


def stop(patch, state):
    """Stop the next run before the verify split is opened, or in the second training after its first checkpoint."""
    step = KVProjectionTraining.training_step

    def interrupted(*_):
        raise KeyboardInterrupt

    def stopping(training, batch, index):
        if training.plan.depth == 1 and training.global_step == 3:
            raise KeyboardInterrupt
        return step(training, batch, index)

    if state == "searched":
        patch.setattr(pipeline, "verify", interrupted)
    else:
        patch.setattr(KVProjectionTraining, "training_step", stopping)


def damage(folder, rng):
    """Damage one file or folder inside ``folder``; returns what was done."""
    path = rng.choice(sorted(folder.rglob("*")))
    name = path.relative_to(folder)
    if path.is_dir():
        shutil.rmtree(path)
        if rng.random() < 0.5:
            path.write_bytes(b"not a folder")
            return f"{name} became a file"
        return f"{name} deleted"
    content = path.read_bytes()
    at = rng.randrange(len(content) or 1)
    how = rng.choice(["bit", "bits", "stretch", "cut", "zeros", "deleted", "folder", "number", "number", "copied"])
    if how == "number" and path.suffix == ".json":
        numbers = [*re.finditer(rb"(?<![\w.])\d+(\.\d+)?", content)]
        if numbers:
            found = rng.choice(numbers)
            other = rng.choice([b"0", b"1", b"2", b"0.5", b"1e9"])
            path.write_bytes(content[: found.start()] + other + content[found.end() :])
        return f"{name}: a number changed"
    if how in ("deleted", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        return f"{name}: {how}"
    if how == "copied":
        other = rng.choice([other for other in sorted(folder.rglob("*")) if other.is_file()])
        path.write_bytes(other.read_bytes())
        return f"{name}: another file copied over it"
    changed = bytearray(content)
    if how == "cut":
        del changed[at:]
    elif how == "zeros":
        changed = bytearray(len(content))
    elif how == "stretch":
        changed[at : at + 16] = rng.randbytes(16)
    elif changed:
        for _ in range(1 if how == "bit" else 8):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    return f"{name}: {how}"


@pytest.mark.parametrize(
    ("state", "count"),
    [("finished", 3), ("searched", 3), *(pytest.param(state, COUNT, marks=pytest.mark.full) for state in STATES)],
)
def test_a_damaged_folder_is_resumed_to_the_same_results_or_refused(made, base, data, tmp_path, capsys, state, count):
    """3 folders of two states in the quick suite, 80 of each of four states in the long one."""
    print(f"DAMAGE_SEED={SEED}")
    stopped, whole = made(state)
    outcomes = {0: 0, 2: 0}
    for number in range(count):
        rng = random.Random(f"{SEED} {state} {number}")
        output = shutil.copytree(stopped, tmp_path / str(number))
        done = [damage(output, rng) for _ in range(rng.randint(1, 3)) if any(output.iterdir())]
        code = fit.main([*arguments(base, data, output, **STATES[state]), "--resume"])
        error = capsys.readouterr().err
        assert code in (0, 2), (number, done)
        assert "Traceback" not in error, (number, done)
        outcomes[code] += 1
        if code == 2:
            last = error.splitlines()[-1]
            assert last.startswith("pop-fit: error: "), (number, done)
            print(number, done, last)
        else:
            assert exported(output) == exported(whole), (number, done)
            for name in ("depth", "boundary", "verified", "curve", "verification"):
                assert read(output, "metrics.json")[name] == read(whole, "metrics.json")[name], (number, done)
            assert read(output, "importance.json") == read(whole, "importance.json"), (number, done)
        shutil.rmtree(output)
    print(f"{state}: {outcomes[0]} of {count} ended as the whole run, {outcomes[2]} were refused")


@pytest.mark.full
@pytest.mark.timeout(3000)  # ten runs of two processes
@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3"])
def test_a_damaged_checkpoint_of_deepspeed_is_resumed_to_the_same_results_or_refused(runs, tmp_path, strategy):
    """Its checkpoints are folders of several files, and two processes must come to one decision about them."""
    print(f"DAMAGE_SEED={SEED}")
    stopped = tmp_path / "stopped"
    process = runs.start(runs.command(stopped, strategy), strategy)
    wait_for(stopped / "checkpoints/full-depth1/last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    runs.finish(process, 143)
    for number in range(DEEPSPEED_COUNT):
        rng = random.Random(f"{SEED} {strategy} {number}")
        output = shutil.copytree(stopped, tmp_path / str(number))
        done = [damage(output / "checkpoints", rng)]
        process = runs.start([*runs.command(output, strategy), "--resume"], strategy)
        _, error = process.communicate(timeout=500)
        assert process.returncode in (0, 2), (number, done, error[-4000:])
        assert "Traceback" not in error, (number, done)
        if process.returncode == 0:
            assert exported(output) == exported(runs[strategy]), (number, done)
        print(number, done, process.returncode, *error.splitlines()[-1:])
