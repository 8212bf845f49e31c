"""What a person sees of a run: bars with the stage's name on a terminal, results alone in a log."""

import json
import re
import sys

import pytest

from pop_lightning.cli import fit
from pop_lightning.core.commands import script
from pop_lightning.run.progress import Progress, duration

from tests.helpers.workbench import arguments

FAST = {"budget__candidates": [2, 1]}


def command(*given, **changes):
    return [word for word in arguments(*given, **FAST, **changes) if word != "--verbose"]


@pytest.fixture
def terminal(monkeypatch):
    """A run that finds a terminal."""
    monkeypatch.setattr(Progress, "interactive", True)


def screen(out):
    """The lines that a terminal shows after ``out``: a carriage return goes back to the beginning of the line."""
    shown = []
    for line in out.split("\n"):
        shown.append("")
        for piece in line.split("\r"):
            shown[-1] = piece + shown[-1][len(piece) :]
    return [line.rstrip() for line in shown]


def test_a_log_holds_results_and_the_next_command(base, data, tmp_path, capfd):
    assert fit.main(command(base, data, tmp_path / "a run", trainer__enable_progress_bar="true")) == 0
    out, err = capfd.readouterr()
    assert "\r" not in out + err
    assert "stage " not in out + err
    assert re.search(r"Prefill of \d+ prompt tokens at depth \d: [\d.]+x counted in operations, [\d.]+x measured", out)
    total, report, artifact, following = out.splitlines()[-4:]
    assert re.fullmatch(r"total time: \d+ s( \(.+\))?", total)
    assert (report, artifact) == (f"report: {tmp_path}/a run/report.html", f"artifact: {tmp_path}/a run/artifact")
    assert following == f"next: {script('pop-generate')} prompt --artifact '{tmp_path}/a run/artifact' --prompt \"...\""


def test_a_command_is_named_by_its_path_where_the_shell_would_not_find_it(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    installed = tmp_path / "bin" / "pop-generate"
    installed.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert script("pop-generate") == str(installed)
    assert script("pop-serve") == "pop-serve"  # not installed there
    monkeypatch.chdir(tmp_path)
    assert script("pop-generate") == "bin/pop-generate"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert script("pop-generate") == "pop-generate"


def test_verbose_names_every_stage_in_a_log(base, data, tmp_path, capsys):
    assert fit.main([*command(base, data, tmp_path / "run"), "--verbose"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")]
    assert lines[0] == "stage 1 of 6: loading the base and the rows ..."
    assert lines[1] == "stage 2 of 6: scoring layers ..."
    assert "stage 3 of 6: closed form, second pass ..." in lines
    assert lines[-1] == "stage 6 of 6: timing the prefill ..."
    assert [int(line.split()[1]) for line in lines] == sorted(int(line.split()[1]) for line in lines)


def test_bars_have_the_name_of_their_stage_a_rate_and_the_time_left(
    base, data, tmp_path, capsys, monkeypatch, terminal
):
    for name in ("COLUMNS", "LINES"):
        monkeypatch.setenv(name, "140")
    changes = {"projection__kind": "lora", "projection__steps": 3, "trainer__logger": "true"}
    changes |= {"trainer__enable_progress_bar": "true", "depth": 2}
    assert fit.main(command(base, data, tmp_path / "run", **changes)) == 0
    out = capsys.readouterr().out
    bars = [line for line in re.split(r"[\r\n]+", out) if "%|" in line]
    assert all(re.match(r"stage \d of 6: \w", bar) for bar in bars)
    ended = [bar for bar in bars if "100%" in bar]
    for expected in (
        r"stage 2 of 6: scoring layers: 100%.+\b1/1 \[\d\d:\d\d<\d\d:\d\d, [\d,]+ tokens/s\]",
        r"stage 3 of 6: closed form, pass 1 of 1: 100%",
        r"stage 4 of 6: training depth 2 for 3 steps.* 3/3 .*tokens/s, loss [\d.]+\]",
    ):
        assert any(re.match(expected, bar) for bar in ended), expected
    decisions = json.loads((tmp_path / "run" / "metrics.json").read_text())["decisions"]
    assert {line.partition(":")[0] for line in decisions} == {"search", "verify"}
    assert [line for line in screen(out) if line in decisions] == decisions  # each on a line of its own
    assert "v_num" not in out
    assert "--" not in "".join(bars)
    assert "stage 1 of 6: loading the base and the rows ..." in out


def test_a_bar_of_the_users_own_replaces_the_runs(base, data, tmp_path, capsys, terminal):
    changes = {"trainer__callbacks": "lightning.pytorch.callbacks.TQDMProgressBar"}
    assert fit.main(command(base, data, tmp_path / "run", trainer__enable_progress_bar="true", **changes)) == 0
    out = capsys.readouterr().out
    assert "Validation" in out
    assert "stage 2 of 6: scoring layers: " not in out


def test_reuse_has_no_stage_that_fits(base, data, tmp_path, capsys):
    assert fit.main([*command(base, data, tmp_path / "run", projection__kind="reuse"), "--verbose"]) == 0
    assert "stage 5 of 5: comparing ..." in capsys.readouterr().out


def test_times_are_those_of_the_stages(monkeypatch):
    clock = iter([0, 5, 10, 95, 100, 100.2])
    monkeypatch.setattr("pop_lightning.run.progress.time.perf_counter", lambda: next(clock))
    progress = Progress(["loading", "search", "report"])
    for name in progress.stages:
        with progress.stage(name):
            pass
    assert progress.total() == "1 min 30 s (loading 5 s, search 1 min 25 s)"
    assert [duration(each) for each in (8.4, 125, 12000)] == ["8 s", "2 min 05 s", "3 h 20 min"]
    assert sys.stdout.isatty() == progress.interactive
