"""Several nodes: two agents of torchrun on one machine, and the variables that SLURM sets, against one process."""

import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from pop_lightning import cli
from pop_lightning.core.errors import LAUNCHED_BY, InputError

from tests.helpers.ranked import assert_same_run, exported

FIT = ("-m", "pop_lightning.cli.fit")
NODES = 2


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
    """What srun would start on two nodes: a process per task, identified by environment variables."""
    port = str(free_port())
    return [
        start_task(runs, command, strategy, {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node), "MASTER_PORT": port})
        for node, command in enumerate(commands)
    ]


def start_task(runs, command, strategy, variables):
    """A task of srun, the only one on its node unless ``variables`` say otherwise."""
    srun = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "pop", "SLURM_NTASKS": str(NODES), "SLURM_NNODES": str(NODES),
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost", "SLURM_LOCALID": "0", "MASTER_ADDR": "localhost",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *FIT, *command],
        env=runs.environment(strategy) | srun | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes, codes):
    """Their standard output and error, once all have ended with these codes."""
    output = [process.communicate(timeout=500) for process in processes]
    found = [process.returncode for process in processes]
    assert found == codes, (found, [(out[-1500:], err[-4000:]) for out, err in output])
    return output


def start_on_each(runs, commands, strategy):
    """``pop-fit`` on each node, with the variables by which Lightning's processes find each other."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *FIT, *command],
            env=runs.environment(strategy) | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": str(node)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, command in enumerate(commands)
    ]


LAUNCHERS = {"torchrun": start_nodes, "SLURM": start_under_slurm, "pop-fit": start_on_each}


@pytest.fixture(scope="module")
def wholes(runs, work):
    """Runs of two nodes that nobody disturbed, by launcher and strategy, with what each node output."""
    made = {}

    def whole(launcher, strategy):
        if (launcher, strategy) not in made:
            output = work / f"{launcher}-{strategy}"
            command = command_of(runs, output, strategy)
            nodes = finish(LAUNCHERS[launcher](runs, [command] * NODES, strategy), [0, 0])
            made[launcher, strategy] = output, [out for out, _ in nodes]
        return made[launcher, strategy]

    return whole


@pytest.mark.full
@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [
        ("torchrun", "ddp"),
        ("torchrun", "deepspeed_stage_3"),
        ("SLURM", "ddp"),
        ("SLURM", "deepspeed_stage_3"),
        ("pop-fit", "ddp"),
    ],
)
def test_two_nodes_give_the_results_of_one_process(runs, work, wholes, launcher, strategy):
    output, printed = wholes(launcher, strategy)
    assert_same_run(output, runs["one"], work / "base")
    # One of them writes and talks, whatever its rank on its own node.
    assert sorted("artifact: " in out for out in printed) == [False, True]
    assert list(output.rglob(".*")) == []


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
@pytest.mark.parametrize("victim", ["the first process's node", "the other node", "the other node's agent alone"])
def test_a_run_outlives_the_death_of_a_node(runs, wholes, tmp_path, strategy, victim):
    output = tmp_path / "run"
    command = command_of(runs, output, strategy)
    agents = start_nodes(runs, [command] * NODES, strategy)
    try:
        until = time.monotonic() + 300
        while not (output / "checkpoints/full-depth1/last.ckpt").exists():
            assert all(agent.poll() is None for agent in agents)
            assert time.monotonic() < until
            time.sleep(0.01)
        nodes = {}
        for agent in agents:
            (worker,) = psutil.Process(agent.pid).children()
            nodes[int(worker.environ()["RANK"])] = agent, worker
        agent, worker = nodes[0 if "first" in victim else 1]
        agent.send_signal(signal.SIGKILL)
        if "alone" not in victim:
            worker.send_signal(signal.SIGKILL)
        for each in agents:
            each.communicate(timeout=120)
            assert each.returncode != 0
        _, alive = psutil.wait_procs([worker for _, worker in nodes.values()], timeout=60)
        assert not alive
    finally:
        for each in agents:
            each.kill()
    assert not (output / "metrics.json").exists()
    finish(start_nodes(runs, [[*command, "--resume"]] * NODES, strategy), [0, 0])
    assert exported(output) == exported(wholes("torchrun", strategy)[0])


WRONG = {
    "an output that the nodes do not share": ({}, {"output": "elsewhere"}, "output .* every node mounts"),
    "rows that one node lacks": ({}, {"data__calibration": "nothing.jsonl"}, r"data.calibration.*\(on process 1\)"),
    "a base that one node lacks": ({}, {"model__base": "nowhere"}, r"model.base.*\(on process 1\)"),
}


def errors_in(output):
    """The lines in which ``pop-fit`` speaks of what is wrong, from every process's output."""
    assert not any("Traceback" in err for _, err in output)
    return [line for _, err in output for line in err.splitlines() if line.startswith("pop-fit: ")]


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
@pytest.mark.parametrize("wrong", WRONG)
def test_nodes_stop_together_with_one_sentence_and_leave_no_folder(runs, tmp_path, wrong, strategy):
    here, there, expected = WRONG[wrong]
    there = {
        key: tmp_path / value if value in ("elsewhere", "nothing.jsonl", "nowhere") else value
        for key, value in there.items()
    }
    commands = [
        command_of(runs, **{"output": tmp_path / "run", "strategy": strategy, **changes}) for changes in (here, there)
    ]
    output = finish(start_under_slurm(runs, commands, strategy), [2, 2])
    (line,) = errors_in(output)
    assert re.search(expected, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["auto", "ddp", "deepspeed_stage_3"])
def test_an_error_on_all_nodes_before_they_join_is_reported_once_on_each(runs, tmp_path, strategy):
    command = command_of(runs, tmp_path / "run", strategy, trainer__num_nodes=1)
    lines = errors_in(finish(start_under_slurm(runs, [command] * NODES, strategy), [2, 2]))
    assert len(lines) == NODES
    assert all("trainer.num_nodes 1 do not fit" in line and "SLURM names 2 tasks" in line for line in lines)
    assert ["(on process 1)" in line for line in lines] == [False, True]
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_what_only_another_node_lacks_is_reported_there_by_one_process(runs, tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise ImportError('none on this node')")
    command = command_of(runs, tmp_path / "run", "deepspeed_stage_3", trainer__devices=2)
    # The first node's processes would wait for these.
    tasks = [
        {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(local)}
        | {"PYTHONPATH": str(tmp_path)}
        for local, number in enumerate((2, 3))
    ]
    node = [start_task(runs, command, "deepspeed_stage_3", {"SLURM_NODEID": "1"} | task) for task in tasks]
    (line,) = errors_in(finish(node, [2, 2]))
    assert line.startswith("pop-fit: error: trainer.strategy deepspeed_stage_3 needs DeepSpeed")
    assert line.endswith("(on process 2).")


@pytest.mark.parametrize(
    ("started", "variables", "expected"),
    [
        ("by nobody else", {}, "pop-fit: error: Wrong.\n"),
        ("by pop-fit", {"RANK": "3", "LOCAL_RANK": "3", LAUNCHED_BY: "47"}, "pop-fit: error: Wrong (on process 3).\n"),
        ("by torchrun", {"RANK": "0", "LOCAL_RANK": "0"}, "pop-fit: error: Wrong.\n"),
        ("by torchrun, next to another", {"RANK": "1", "LOCAL_RANK": "1"}, ""),
        ("by torchrun, on another node", {"RANK": "8", "LOCAL_RANK": "0"}, "pop-fit: error: Wrong (on process 8).\n"),
        ("by srun, next to another", {"SLURM_PROCID": "9", "SLURM_LOCALID": "1"}, ""),
        (
            "by srun, on another node",
            {"SLURM_PROCID": "8", "SLURM_LOCALID": "0"},
            "pop-fit: error: Wrong (on process 8).\n",
        ),
        (
            "by torchrun, which srun started on each node",
            {"RANK": "8", "LOCAL_RANK": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
            "pop-fit: error: Wrong (on process 8).\n",
        ),
    ],
)
def test_before_they_join_one_process_of_a_node_reports(monkeypatch, capsys, started, variables, expected):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID", LAUNCHED_BY):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def wrong():
        raise InputError("Wrong.")

    assert cli.run("pop-fit", wrong) == 2
    assert capsys.readouterr().err == expected
