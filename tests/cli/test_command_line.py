"""The command lines around the library: help without its imports, exit codes, and a reader that goes away."""

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "transformers", "datasets", "jsonargparse")


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("fit", ["--help"]),
        ("fit", ["--list"]),
        ("fit", ["--schema"]),
        ("fit", ["--version"]),
        ("fit", ["--recipe", "tiny", "--print_config"]),
        ("fit", ["--print_completion", "bash"]),
        ("generate", ["--help"]),
        ("generate", ["prompt", "--help"]),
        ("generate", ["--version"]),
    ],
)
def test_what_only_prints_imports_nothing_heavy(module, argv):
    code = (
        f"import sys; from pop_lightning.cli import {module}; code = {module}.main({argv!r});"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


def test_the_profilers_warning_of_memory_from_before_does_not_reach_the_user():
    code = (
        "from pop_lightning.cli import importing\n"
        "with importing():\n    import torch\n"
        "from pop_lightning.core.memory import peak_bytes\n"
        "before = [torch.ones(1000, 1000)]\n"
        "print(peak_bytes(before.clear, torch.device('cpu')))"
    )
    done = python(code, env={key: value for key, value in os.environ.items() if key != "TORCH_CPP_LOG_LEVEL"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


@pytest.mark.parametrize(
    "body", ["for number in range(100000): print('a line', number)", "print('a line ' * 100000); sys.exit(0)"]
)
def test_a_reader_that_goes_away_ends_the_program_quietly_with_141(body):
    code = (
        f"import sys; from pop_lightning.cli import run\ndef body():\n    {body}\nsys.exit(run('pop-generate', body))"
    )
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert os.read(read, 6) == b"a line"
    os.close(read)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (141, b"")


def test_another_broken_pipe_is_a_defect_and_not_hidden():
    code = (
        "import sys; from pop_lightning.cli import run\n"
        "def body(): raise BrokenPipeError(32, 'Broken pipe')\n"
        "sys.exit(run('pop-generate', body))"
    )
    done = python(code)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr
