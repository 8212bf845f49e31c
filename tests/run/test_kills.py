"""Runs that are killed at random moments, twice over: resumed, they end with the bytes of an uninterrupted run.

The moments come from a seed that is printed; ``KILL_SEED`` sets it. How long a run takes says only where moments are
drawn from: where none met a run at work, they are drawn anew.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import time

import psutil
import pytest
import torch

from pop_lightning import cli
from pop_lightning.cli import fit

from tests.helpers.ranked import ODD, exported, prepare, read, workers
from tests.helpers.workbench import arguments, save_rows

GENERATING = {**ODD, "data__max_response_tokens": 4}
ENDED = "the run ended at "  # on the clock that all processes share
LIMIT = 300  # seconds; a run takes a few
SEED = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(2**32))
# A server that has everything imported forks the runs of one process, so that the moments fall into their work.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["pop_lightning.run.pipeline", "pop_lightning.cli.fit", "peft"])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp("kills"))
    save_rows(folder / "prompts.jsonl", rows=83, responses=False)  # the full model writes the responses
    return folder


def draw(*what):
    """Random numbers of one test, whatever other tests ran before."""
    print(f"KILL_SEED={SEED}")
    return random.Random(f"{SEED} {what}")


def killed_twice(run, output, rng, longest):
    """Run, and resume, up to a random moment each; anew and within half the time, until one met a run at work.

    Args:
        run: called with the words that resume and a moment in seconds; True where it killed.
        longest: seconds.
    """
    for halved in range(20):
        shutil.rmtree(output, ignore_errors=True)
        moments = [rng.uniform(0, longest / 2**halved) for _ in range(2)]
        killed = [run(resume, moment) for resume, moment in zip(([], ["--resume"]), moments, strict=True)]
        if any(killed):
            return
    pytest.fail(f"no run could be killed, not even within {longest / 2**halved:.6f} s")


class Finished:
    """What a killed run had finished; a resumed one must not do it again."""

    def __init__(self, output):
        self.files = (output / "importance.json", *(output / "state").glob("[!.]*"))
        self.answers = output / "state/responses.json"  # grows batch by batch
        self.files = [path for path in self.files if path.exists() and path != self.answers]
        self.state = self.look()

    def look(self):
        answers = json.loads(self.answers.read_text())["responses"] if self.answers.exists() else {}
        return {path: path.stat().st_mtime_ns for path in self.files}, answers

    def assert_kept(self):
        (times, answers), (times_now, answers_now) = self.state, self.look()
        assert times_now == times
        assert {key: answers_now.get(key) for key in answers} == answers


def assert_as_if_left_alone(output, whole):
    assert exported(output) == exported(whole)
    for name in ("depth", "verified", "curve"):
        assert read(output, "metrics.json")[name] == read(whole, "metrics.json")[name]
    # Nothing that was on its way when a process was killed remains, in the folder or next to it.
    assert [*output.rglob(".*"), *output.parent.glob(".*")] == []


# --- one process ------------------------------------------------------------------------------------------------------


def forked(command, log):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = fit.main(command)
    print(f"{ENDED}{time.monotonic()}", flush=True)
    sys.exit(code)


def run_in_fork(command, log, after=None, number=signal.SIGKILL):
    """The exit code, of a run that gets the signal ``number`` if it is not over after so many seconds.

    That signal ends it: a run that goes on to its end fails the test. A run that ended before the signal was sent does
    not, although it was alive when asked: the news of its end comes through the fork server, late on a busy machine.
    """
    process = FORK.Process(target=forked, args=(command, str(log)))
    process.start()
    process.join(after)
    sent = math.inf
    if after is not None and process.is_alive():
        sent = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    process.join(LIMIT)
    assert not process.is_alive()
    if process.exitcode == 0:
        assert float(log.read_text().rpartition(ENDED)[2].split()[0]) < sent
    return process.exitcode


# What the line begins with that --verbose prints where a part of a stage begins, after the stage's number.
STAGES = (
    "scoring",
    "closed form, pass",
    "choosing",
    "closed form, second",
    "searching",
    "training",
    "verifying",
    "comparing",
)


@contextlib.contextmanager
def sigterm_in(stage):
    """This process gets SIGTERM while a module runs in ``stage``, so inside one of Lightning's loops."""
    left = math.inf

    class Output(io.TextIOBase):
        def write(self, text):
            nonlocal left
            if f": {stage}" in text:
                left = 20

    def count(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        with contextlib.redirect_stdout(Output()):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("stages", [("closed form, pass", "training"), pytest.param(STAGES, marks=pytest.mark.full)])
def test_sigterm_ends_every_stage_resumably(work, tmp_path, capsys, stages):
    def command(name):
        return arguments(work / "base", work / "rows.jsonl", tmp_path / name / "run", **ODD)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    assert fit.main(command("whole")) == 0
    for stage in stages:
        with sigterm_in(stage):
            assert fit.main([*command("run"), "--resume"]) == 143, stage
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("pop-fit: terminated; --resume continues the run: ")
        assert said.endswith(f" {shlex.join(command('run'))} --resume")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    assert fit.main([*command("run"), "--resume"]) == 0
    assert_as_if_left_alone(tmp_path / "run/run", tmp_path / "whole/run")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_that_a_destructor_swallows_comes_again(monkeypatch, capsys):
    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(10))  # the signal is handled in here

    def body():
        swallows = Swallows()
        del swallows
        time.sleep(LIMIT)

    monkeypatch.setattr(cli, "GRACE", 1)
    assert cli.run("pop-generate", body) == 143
    assert capsys.readouterr().err.endswith("pop-generate: terminated\n")


def test_an_error_that_a_library_makes_of_sigterm_is_still_sigterm(capsys):
    def body():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LIMIT)
        except KeyboardInterrupt as error:  # as the import of an extension module does
            raise ImportError("initialization failed") from error

    assert cli.run("pop-generate", body) == 143
    assert capsys.readouterr().err.endswith("pop-generate: terminated\n")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_process_killed_twice_at_random_moments_ends_with_the_same_bytes(work, tmp_path, number, kind):
    """Six times two moments for each kind and signal."""

    def command(name):
        changes = {**GENERATING, "projection__kind": kind}
        return arguments(work / "base", work / "prompts.jsonl", tmp_path / name / "run", **changes)

    log = tmp_path / "log"
    assert run_in_fork(command("warm"), log) == 0
    start = time.monotonic()
    assert run_in_fork(command("whole"), log) == 0, log.read_text()
    duration = time.monotonic() - start
    rng = draw(kind, number.name)
    for trial in map(str, range(6)):
        output = tmp_path / trial / "run"

        def run(resume, moment, trial=trial, output=output):
            code = run_in_fork([*command(trial), *resume], log, after=moment, number=number)
            print(f"run {trial}: {code} after {moment:.3f} of {duration:.3f} s")
            # SIGTERM before there is anything to end, or after all is done, acts by default.
            expected = (-number,) if number == signal.SIGKILL else (-number, 143)
            assert code in (0, *expected), log.read_text()[-4000:]
            return code != 0

        killed_twice(run, output, rng, duration)
        before = Finished(output)
        assert run_in_fork([*command(trial), "--resume"], log) == 0, log.read_text()[-4000:]
        before.assert_kept()
        assert_as_if_left_alone(output, tmp_path / "whole/run")


# --- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wholes():
    return {}


def kill(process, victim):
    """SIGKILL the process of a rank (the launcher where there is none yet), or "launcher"; or send that a signal."""
    started = workers(process)
    each = started[victim] if victim in range(len(started)) else process
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):  # it has just ended by itself
        each.send_signal(victim if isinstance(victim, signal.Signals) else signal.SIGKILL)
    return started


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1, "launcher", signal.SIGTERM])
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_two_processes_killed_twice_at_random_moments_end_with_the_same_bytes(
    runs, work, wholes, tmp_path, strategy, victim
):
    changes = {"data__calibration": work / "prompts.jsonl", "data__max_response_tokens": 4}
    if strategy not in wholes:
        whole, start = work / f"whole-{strategy}/run", time.monotonic()
        runs.finish(runs.start(runs.command(whole, strategy, **changes), strategy))
        wholes[strategy] = whole, time.monotonic() - start
    whole, duration = wholes[strategy]
    output = tmp_path / "run"
    command = runs.command(output, strategy, **changes)

    def run(resume, moment):
        process = runs.start([*command, *resume], strategy)
        started, killed = [], False
        try:
            until = time.monotonic() + moment
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.002)
            if process.poll() is None:
                started, killed = kill(process, victim), True
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        print(f"{victim}: {process.returncode} after {moment:.3f} of {duration:.3f} s")
        expected = {0: (1, -9), 1: (1, -9), "launcher": (-9,), signal.SIGTERM: (143, -15)}[victim]
        assert process.returncode in ((0, *expected) if killed else (0,)), (out[-2000:], err[-4000:])
        _, alive = psutil.wait_procs(started, timeout=60)
        assert not alive
        return killed

    killed_twice(run, output, draw(strategy, victim), duration)
    before = Finished(output)
    runs.finish(runs.start([*command, "--resume"], strategy))
    before.assert_kept()
    assert_as_if_left_alone(output, whole)
