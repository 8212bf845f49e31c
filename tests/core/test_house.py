"""The rooms of the house: imports point one way, from what uses to what is used, and never in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up: a room imports from the rooms before it, and from its own files.
ROOMS = (
    "core",
    "models",
    "data",
    "pruning",
    "evaluation",
    "fitting",
    "generation",
    "harness",
    "serving",
    "benchmark",
    "callbacks",
    "run",
    "ablation",
    "cli",
    "studies",
    "checkpoints",
)
SERVING_READS = ("pop_lightning.core", "pop_lightning.generation.artifact", "pop_lightning.generation.hub")


def modules() -> dict[str, Path]:
    """Every module of the library by its name."""
    found = {}
    for path in (ROOT / "pop_lightning").glob("*/**/*.py"):
        if not any(parent.is_symlink() for parent in path.parents):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    for room in ("callbacks", "checkpoints"):
        for path in (ROOT / room).rglob("*.py"):
            found[".".join(("pop_lightning", *path.relative_to(ROOT).with_suffix("").parts))] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imported(path: Path) -> Iterator[str]:
    """What a file imports from the library, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("pop_lightning."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pop_lightning"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


MODULES = modules()
ARROWS = {name: sorted(set(imported(path)) - {name}) for name, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert room(module) in ROOMS, f"{module} lies in a room that the order of rooms does not name"
    for other in ARROWS[module]:
        if other == "pop_lightning":  # the public names, which are looked up lazily
            continue
        assert ROOMS.index(room(other)) <= ROOMS.index(room(module)), f"{module} imports {other}, which lies above it"
        if room(module) == "serving" and room(other) != "serving":
            assert other.startswith(SERVING_READS), f"{module} imports {other}: a served engine reads artifacts only"


def test_no_circle():
    done, path = set(), []

    def visit(module: str) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in ARROWS.get(module, ()):
            visit(other)
        done.add(path.pop())

    for module in MODULES:
        visit(module)


def test_the_faults_that_this_file_looks_for_are_found(tmp_path):
    file = tmp_path / "file.py"
    file.write_text("def late():\n    from pop_lightning.run.pipeline import fit\n    import pop_lightning.cli.fit\n")
    assert list(imported(file)) == ["pop_lightning.run.pipeline", "pop_lightning.cli.fit"]
