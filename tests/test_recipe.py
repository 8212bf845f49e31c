"""Recipes and the command line: the bundled ones parse, overrides land, and every mistake is told in one sentence."""

import sys
import types
from pathlib import Path

import lightning
import pytest
import yaml

from pop_lightning.cli import fit, run
from pop_lightning.errors import InputError
from pop_lightning.recipe import bundled_recipes, parse

MINIMAL = "model: {base: some/base}\ndata: {calibration: rows.jsonl}\n"


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that records what it is called with."""
    calls = []
    module = types.ModuleType("pop_lightning.pipeline")
    module.fit = lambda recipe, *, resume, overwrite: calls.append((recipe, resume, overwrite)) or 0
    monkeypatch.setitem(sys.modules, "pop_lightning.pipeline", module)
    monkeypatch.setattr("pop_lightning.pipeline", module, raising=False)
    return calls


def test_bundled_recipes_parse():
    assert bundled_recipes() == ["example", "tiny"]
    tiny = parse(["--recipe", "tiny"]).recipe
    assert tiny.model.base == "bundled:facts-gemma3"
    assert tiny.data.splits.verify == 0.4
    assert tiny.budget.candidates == "all"
    assert tiny.trainer["accelerator"] == "cpu"
    example = parse(["--recipe=example.yaml"]).recipe
    assert example.model.dtype == "bfloat16"
    assert example.projection.learning_rate == 1e-3


def test_defaults(file):
    invocation = parse(["--recipe", file(MINIMAL)])
    recipe = invocation.recipe
    assert (invocation.resume, invocation.overwrite) == (False, False)
    assert (recipe.seed, recipe.output, recipe.boundary) == (0, "runs/pop", 1)
    assert recipe.projection.ridge == [0.001, 0.01, 0.1, 1.0]
    assert recipe.budget.candidates == 8
    assert recipe.trainer["devices"] == 1
    assert recipe.trainer["logger"] is False


def test_overrides(file):
    changes = (
        "--budget.max_drop 2e-2 --budget.max_drop=0.03 --budget.candidates [2,3] --model.revision 123 --data.limit=7 "
        "--trainer.max_steps -1 --projection.ridge=[1,2.5] --data.splits.fit 0.2 --data.splits.tune 0.2 "
        "--trainer.precision bf16-true"
    )
    recipe = parse(["--recipe", file(MINIMAL + "budget: {max_drop: 0.1}\n"), *changes.split()]).recipe
    assert recipe.budget.max_drop == 0.03
    assert recipe.budget.candidates == [2, 3]
    assert recipe.model.revision == "123"
    assert recipe.data.limit == 7
    assert recipe.projection.ridge == [1, 2.5]
    assert recipe.data.splits.tune == 0.2
    assert recipe.trainer["precision"] == "bf16-true"


def test_required_keys_may_come_from_the_command_line(file):
    recipe = parse(["--recipe", file("seed: 3\nmodel:\n"), "--model.base", "b", "--data.calibration", "c"]).recipe
    assert (recipe.seed, recipe.model.base, recipe.data.calibration) == (3, "b", "c")


@pytest.mark.parametrize("name", ["tiny", "example"])
def test_print_config_round_trips(name, tmp_path, capsys):
    assert fit.main(["--recipe", name, "--budget.max_drop", "1e-7", "--print_config"]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "printed.yaml"
    path.write_text(text)
    again = parse(["--recipe", str(path)]).recipe
    assert again.to_dict() == yaml.safe_load(text)
    assert again.budget.max_drop == 1e-7
    again.save(tmp_path / "saved.yaml")
    assert parse(["--recipe", str(tmp_path / "saved.yaml")]).recipe == again


def test_trainer_arguments_make_a_trainer(file):
    callback = "{callbacks: [{class_path: lightning.pytorch.callbacks.Timer, init_args: {interval: step}}]}"
    recipe = parse(["--recipe", file(MINIMAL + f"trainer: {callback}\n"), "--trainer.accelerator", "cpu"]).recipe
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()
    trainer = lightning.Trainer(**recipe.trainer_arguments())
    assert any(isinstance(each, lightning.pytorch.callbacks.Timer) for each in trainer.callbacks)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("a: [", "is not YAML at line"),
        (b"\xff\xfe\x00", "is not YAML"),
        ("- 1\n", "must hold keys such as model.base"),
        ("words\n", "must hold keys such as model.base"),
        ("seed: 1\nseed: 2\n", "key seed stands there twice"),
        (MINIMAL + "budgett: {}\n", "key budgett in recipe"),
        (MINIMAL + "budget: {max_dop: 1}\n", "did you mean budget.max_drop?"),
        (MINIMAL + "max_drop: 1\n", "did you mean budget.max_drop?"),
        (MINIMAL + "trainer: {max_epoch: 1}\n", "did you mean trainer.max_epochs?"),
        (MINIMAL + "budget: 3\n", "budget must be a section with keys such as metric"),
        (MINIMAL + "1: 3\n", "key 1 in recipe"),
        (MINIMAL + "budget: {max_drop: much}\n", "budget.max_drop must be a number, found 'much'"),
        (MINIMAL + "budget: {max_drop: null}\n", "budget.max_drop must be a number, found null"),
        (MINIMAL + "trainer: {devices: null}\n", "trainer.devices must be"),
        (MINIMAL + "trainer: {callbacks: [{class_path: No}]}\n", "trainer.callbacks must be"),
        (MINIMAL + "seed: 1.5\n", "seed must be a whole number, found 1.5"),
        (MINIMAL + "seed: true\n", "seed must be a whole number, found True"),
        (MINIMAL + "output: 3\n", "output must be text, found 3"),
        (
            MINIMAL + "budget: {candidates: some}\n",
            "must be a whole number or a list of whole numbers or all",
        ),
        (MINIMAL + "projection: {kind: magic}\n", "one of reuse, closed_form, full, found 'magic'"),
        (MINIMAL + "projection: {ridge: 1}\n", "projection.ridge must be a list of numbers, found 1"),
        (MINIMAL + "trainer: {max_epochs: x}\n", "trainer.max_epochs must be a whole number or null, found 'x'"),
        ("model: {base: x}\n", "data.calibration is required"),
        ("data: {calibration: x}\n", "model.base is required"),
    ],
)
def test_mistakes_in_the_file(file, text, sentence):
    with pytest.raises(InputError) as caught:
        parse(["--recipe", file(text)])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no recipe was given"),
        (["--resume"], "no recipe was given"),
        (["--recipe"], "--recipe needs a value"),
        (["--recipe", ""], "neither a file nor a bundled recipe"),
        (["--recipe", "tinny"], "did you mean tiny?"),
        (["--recipe", "."], "neither a file nor a bundled recipe"),
        (["--recipe", "tiny", "stray"], "found 'stray' on the command line"),
        (
            ["--recipe", "tiny", "--budget.max_dop", "1"],
            "max_dop is unknown (did you mean --budget.max_drop?)",
        ),
        (["--recipe", "tiny", "--max_drop", "1"], "did you mean --budget.max_drop?"),
        (["--recipe", "tiny", "--budget", "1"], "--budget is a section"),
        (["--recipe", "tiny", "--seed"], "--seed needs a value, found none: expected --seed a whole number"),
        (["--recipe", "tiny", "--seed", "--resume"], "--seed needs a value"),
        (["--recipe", "tiny", "--seed", "x"], "seed must be a whole number, found 'x'"),
        (["--recipe", "tiny", "--resume=1"], "--resume takes no value"),
        (["--recipe", "tiny", "--resume", "--overwrite"], "both given"),
        (["--recipe", "tiny", "--model.dtype", "int8"], "one of auto, float32, bfloat16, float16, found 'int8'"),
        (["--recipe", "tiny", "--budget.max_drop=-1"], "budget.max_drop must be at least 0, found -1"),
        (["--recipe", "tiny", "--budget.max_drop=nan"], "budget.max_drop"),
        (["--recipe", "tiny", "--budget.confidence=1"], "budget.confidence must lie between 0.5 and 1"),
        (["--recipe", "tiny", "--budget.confidence=0.5"], "budget.confidence must lie between 0.5 and 1"),
        (["--recipe", "tiny", "--budget.candidates=[]"], "at least one depth"),
        (["--recipe", "tiny", "--budget.candidates=[0]"], "depths of at least 1"),
        (["--recipe", "tiny", "--budget.candidates=0"], "budget.candidates must be at least 1"),
        (["--recipe", "tiny", "--data.splits.fit=0.5"], "data.splits must sum to 1"),
        (["--recipe", "tiny", "--data.splits.fit=0", "--data.splits.tune=0.4"], "data.splits.fit must be above 0"),
        (["--recipe", "tiny", "--data.batch_size=0"], "data.batch_size must be at least 1"),
        (["--recipe", "tiny", "--boundary=-1"], "boundary must be at least 0"),
        (["--recipe", "tiny", "--projection.steps=0"], "projection.steps must be at least 1"),
        (["--recipe", "tiny", "--projection.ridge=[]"], "at least one strength"),
        (["--recipe", "tiny", "--projection.ridge=[1,0]"], "projection.ridge[1] must be above 0"),
        (["--recipe", "tiny", "--output="], "output is required"),
    ],
)
def test_mistakes_on_the_command_line_exit_with_two(arguments, sentence, capsys, pipeline):
    assert fit.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("pop-fit: error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert pipeline == []


def test_main_hands_over_to_the_pipeline(pipeline):
    assert fit.main(["--recipe", "tiny", "--resume"]) == 0
    assert fit.main(["--overwrite", "--recipe", "tiny"]) == 0
    assert [call[1:] for call in pipeline] == [(True, False), (False, True)]
    assert pipeline[0][0].output == "runs/tiny"


def test_exit_codes(capsys):
    def raises(error):
        def body():
            raise error

        return body

    assert run("p", lambda: 3) == 3
    assert run("p", lambda: None) == 0
    assert run("p", raises(KeyboardInterrupt())) == 130
    assert run("p", raises(InputError("no."))) == 2
    assert capsys.readouterr().err.endswith("p: error: no.\n")
    with pytest.raises(ZeroDivisionError):
        run("p", raises(ZeroDivisionError()))


def test_entry_exits_with_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pop-fit"])
    with pytest.raises(SystemExit) as stop:
        fit.entry()
    assert stop.value.code == 2


def test_help(capsys):
    assert fit.main(["--help"]) == 0
    assert "--recipe NAME_OR_PATH" in capsys.readouterr().out


def test_every_choice_in_tiny_has_a_comment():
    lines = (Path(__file__).parents[1] / "recipes" / "tiny.yaml").read_text().splitlines()
    choices = [line for line in lines if ": " in line and not line.startswith("#")]
    assert choices
    assert all("  # " in line for line in choices)
