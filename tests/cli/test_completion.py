"""Completion in shells: the printed scripts parse, and complete flags, values, recipes and files."""

import shutil
import subprocess

import pytest

from pop_lightning.cli import fit, generate, serve
from pop_lightning.core.completion import SHELLS
from pop_lightning.run.invocation import bundled_recipes

COMMANDS = {"pop-fit": fit, "pop-generate": generate, "pop-serve": serve}
# What bash does when Tab is pressed after the last word.
TAB = '''source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
function=$(complete -p "$1" | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
$function
printf '%s\\n' "${COMPREPLY[@]}"'''


@pytest.fixture
def script(capsys, tmp_path):
    """Writes what a command prints for a shell to a file."""

    def write(command, shell):
        assert COMMANDS[command].main(["--print_completion", shell]) == 0
        path = tmp_path / f"{command}.{shell}"
        path.write_text(capsys.readouterr().out)
        return path

    return write


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_script_parses(command, shell, script):
    path = script(command, shell)
    assert "--print_completion" in path.read_text()
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    done = subprocess.run([shell, "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("pop-fit --budget.max", ["--budget.max_drop"]),
        ("pop-fit --recipe tiny --res", ["--resume"]),
        ("pop-fit --projection.kind ", ["reuse", "closed_form", "lora", "full"]),
        ("pop-fit --budget.metric agr", ["agreement"]),
        ("pop-fit --data.allow_urls ", ["true", "false"]),
        ("pop-fit --recipe ", [*bundled_recipes(), "mine.yaml", "rows"]),
        ("pop-fit --data.calibration mi", ["mine.yaml"]),
        ("pop-fit --model.base ", ["rows"]),
        ("pop-fit --trainer.dev", ["--trainer.devices"]),
        ("pop-generate ch", ["chat"]),
        ("pop-generate data --ba", ["--base", "--batch_size"]),
        ("pop-generate chat --batch", []),
        ("pop-generate prompt --image ", ["mine.yaml", "rows"]),
        ("pop-generate bench --artifact ", ["rows"]),
        ("pop-serve ", ["rows"]),
        ("pop-serve rows --artifact-", ["--artifact-revision"]),
    ],
)
def test_bash_completes(line, expected, script, tmp_path):
    path = script(line.split()[0], "bash")
    folder = tmp_path / "folder"
    (folder / "rows").mkdir(parents=True)
    (folder / "mine.yaml").touch()
    done = subprocess.run(
        ["bash", "-c", TAB, "bash", path, *line.split(" ")], cwd=folder, capture_output=True, text=True
    )
    assert (sorted(done.stdout.split()), done.stderr) == (sorted(expected), "")


def test_zsh_gets_recipes_and_files_for_one_flag(script):
    (line,) = (each for each in script("pop-fit", "zsh").read_text().splitlines() if '"--recipe[' in each)
    # The colons inside are the inner command's, so zsh must not divide the outer entry at them.
    assert f"'names\\:name\\:({' '.join(bundled_recipes())})' 'files\\:file\\:_files'" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_another_shell_is_refused(command, capsys):
    assert COMMANDS[command].main(["--print_completion", "cmd.exe"]) == 2
    assert "'cmd.exe' (choose from" in capsys.readouterr().err


def test_the_server_accepts_the_flag_as_vllm_writes_its_own(capsys):
    assert serve.main(["--print-completion", "bash"]) == 0
    assert "-F _shtab_pop_serve pop-serve" in capsys.readouterr().out
