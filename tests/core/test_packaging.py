"""What an installation holds: callbacks, recipes and the bundled model under one name, editable and as a wheel."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pop_lightning.callbacks
import pop_lightning.checkpoints
import pop_lightning.recipes

ROOT = Path(__file__).parents[2]


def test_the_editable_install_sees_the_top_level_folders():
    for package, folder in (
        (pop_lightning.callbacks, "callbacks"),
        (pop_lightning.recipes, "recipes"),
        (pop_lightning.checkpoints, "checkpoints"),
    ):
        assert Path(package.__file__).resolve().parent == ROOT / folder


def test_the_console_scripts_are_declared():
    scripts = {entry.name: entry.value for entry in importlib.metadata.entry_points(group="console_scripts")}
    assert scripts["pop-fit"] == "pop_lightning.cli.fit:entry"
    assert scripts["pop-generate"] == "pop_lightning.cli.generate:entry"


def test_the_wheel_holds_code_recipes_and_bundled_models(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pop_lightning").rglob("*.jinja")}
    expected.add("pop_lightning/recipes/tiny.yaml")
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "pop_lightning").rglob("*.py")}
    expected |= {
        f"pop_lightning/{path.relative_to(ROOT)}"
        for folder in ("callbacks", "checkpoints")
        for path in (ROOT / folder).glob("*.py")
    }
    expected |= {
        f"pop_lightning/checkpoints/{path.relative_to(ROOT / 'checkpoints')}"
        for path in (ROOT / "checkpoints").glob("*/*")
        if path.suffix in (".json", ".jsonl", ".safetensors", ".md")
    }
    assert expected <= names
    assert not any(name.startswith(("tests", "callbacks", "recipes", "checkpoints")) for name in names)
