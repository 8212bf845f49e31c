"""Several nodes: two agents of torchrun on one machine, and the variables that SLURM sets, against one process."""

import socket
import subprocess
import sys

import pytest
from ranked import TENSORS, Runs, assert_same_run, prepare

FIT = ("-m", "pop_lightning.cli.fit")
NODES = 2


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="module")
def runs(work):
    return Runs(work)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command_of(runs, output, strategy, **changes):
    """One process on each of two nodes."""
    return runs.command(output, strategy, **{"trainer__num_nodes": NODES, "trainer__devices": 1, **changes})


def start_nodes(runs, commands, strategy):
    """An agent of torchrun per node; ``commands`` has the command line of each."""
    agent = ("-m", "torch.distributed.run", "--nnodes", str(NODES), "--nproc_per_node", "1", "--rdzv_id", "pop")
    agent += ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", "--max_restarts", "0")
    return [runs.start(command, strategy, (*agent, *FIT)) for command in commands]


def start_under_slurm(runs, commands, strategy):
    """What srun would start: a process per task, told by variables who it is."""
    port, processes = str(free_port()), []
    for node, command in enumerate(commands):
        variables = {
            "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "pop", "SLURM_NTASKS": str(NODES), "SLURM_NNODES": str(NODES),
            "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost", "SLURM_PROCID": str(node),
            "SLURM_NODEID": str(node), "SLURM_LOCALID": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, *FIT, *command],
                env=runs.environment(strategy) | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes, codes):
    """Their standard output and error, once all have ended with these codes."""
    said = [process.communicate(timeout=500) for process in processes]
    found = [process.returncode for process in processes]
    assert found == codes, (found, [(out[-1500:], err[-4000:]) for out, err in said])
    return said


LAUNCHERS = {"torchrun": start_nodes, "SLURM": start_under_slurm}


@pytest.mark.full
@pytest.mark.parametrize(
    ("launcher", "strategy"), [("torchrun", "ddp"), ("torchrun", "deepspeed_stage_3"), ("SLURM", "ddp")]
)
def test_two_nodes_give_what_one_process_gives(runs, work, tmp_path, launcher, strategy):
    output = tmp_path / "run"
    command = command_of(runs, output, strategy)
    first, second = finish(LAUNCHERS[launcher](runs, [command] * NODES, strategy), [0, 0])
    assert_same_run(output, runs["one"], work / "base")
    assert (output / TENSORS).is_file()
    # One of them writes and talks, whatever its rank on its own node.
    assert sorted("artifact: " in out for out, _ in (first, second)) == [False, True]
    assert list(output.rglob(".*")) == []
