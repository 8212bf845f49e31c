"""README and docs: every block of commands or code runs, or names what it needs that a test has not."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from pop_lightning.run.invocation import parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Minutes: these run with the long suites.
SLOW = ("make ", "pop-fit --recipe tiny", "pop-generate bench", "pop-generate ablate")
LONG = ("examples.md", "hub.md")  # what their cells use is tested elsewhere as well


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    @property
    def needs(self) -> str | None:
        found = re.match(r"# needs: (.+)", self.text)
        return found and found[1]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path):
    text = path.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield Block(path.name, text[: found.start()].count("\n") + 1, found[1], found[2])


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [block for block in ALL if block.language == "" and block.needs is None]
CODE = [block for block in ALL if block.language == "python" and block.needs is None]


def assert_runs(command: list[str], folder: Path) -> None:
    """Run a command in a folder that has what the repository's root has, with the scripts of this environment."""
    for name in ("checkpoints", "recipes", "docs"):
        (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]


def slow(block: Block) -> bool:
    return block.text.startswith(SLOW) or block.page in LONG


def test_the_readme_fits_in_two_hundred_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(r"`((?:tests|pop_lightning|callbacks|checkpoints)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize(
    "block", [pytest.param(each, marks=pytest.mark.full if slow(each) else ()) for each in COMMANDS], ids=str
)
def test_commands_run(block, tmp_path):
    text = block.text
    if text.startswith("make "):  # what make would run, in a folder of its own and without installing again
        target = text.split()[1]
        plan = subprocess.run(
            ["make", "-n", "-o", ".venv/.installed", target], cwd=ROOT, capture_output=True, text=True
        )
        text = "\n".join(line for line in plan.stdout.splitlines() if "pop-fit" in line).replace(".venv/bin/", "")
        assert text, plan
    assert_runs(["bash", "-euo", "pipefail", "-c", text], tmp_path)


@pytest.mark.parametrize(
    "block", [pytest.param(each, marks=pytest.mark.full if slow(each) else ()) for each in CODE], ids=str
)
def test_code_runs_or_is_the_code_of_its_file(block, tmp_path):
    if excerpt := re.match(r"# excerpt of (\S+)\n", block.text):
        source = textwrap.dedent((ROOT / excerpt[1]).read_text())
        wanted = [line.strip() for line in block.text.splitlines()[1:]]
        lines = [line.partition("  #")[0].strip() for line in source.splitlines()]
        assert any(lines[at : at + len(wanted)] == wanted for at in range(len(lines))), f"{excerpt[1]} reads otherwise"
        return
    (tmp_path / "cell.py").write_text(block.text)
    assert_runs([sys.executable, "cell.py"], tmp_path)


@pytest.mark.parametrize("block", [each for each in ALL if each.language == "yaml"], ids=str)
def test_recipe_fragments_have_keys_that_exist(block, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"model": {"base": "x"}, "data": {"calibration": "y"}} | yaml.safe_load(block.text))
    )
    assert parse(["--recipe", str(tmp_path / "recipe.yaml")]).recipe


@pytest.mark.parametrize("block", [each for each in ALL if each.language == "json"], ids=str)
def test_rows_are_json(block):
    assert all(json.loads(line) for line in block.text.splitlines())


def test_every_block_is_run_or_says_why_not():
    known = {"", "python", "yaml", "json", "text"}
    assert {block.language for block in ALL} <= known
    assert len(COMMANDS) >= 4
    assert len(CODE) >= 2
