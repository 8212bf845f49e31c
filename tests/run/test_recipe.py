"""The recipe: what is read, what is printed, and a sentence for everything that is wrong with it."""

import inspect
import json
import random
import sys

import lightning
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from pop_lightning.cli import run
from pop_lightning.cli.fit import main
from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import Kept
from pop_lightning.run import invocation
from pop_lightning.run.invocation import bundled_recipes, parse
from pop_lightning.run.recipe import Budget, Data, Model, Recipe

MINIMAL = {"model": {"base": "some/base"}, "data": {"calibration": "rows.jsonl"}}


@pytest.fixture
def write(tmp_path):
    def write(content, name="my.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    return write


def refusal(*argv):
    with pytest.raises(InputError) as error:
        parse(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def printed(capsys, *argv):
    assert main([*argv, "--print_config"]) == 0
    return capsys.readouterr().out


# --- what is read ---------------------------------------------------------------------------------------------------


def test_defaults_are_the_documented_ones(write):
    recipe = parse(["--recipe", write(MINIMAL)]).recipe
    assert (recipe.seed, recipe.output, recipe.boundary, recipe.salient) == (0, "runs/pop", "auto", 0)
    assert (recipe.model.dtype, recipe.model.attn_implementation) == ("auto", None)
    assert (recipe.data.max_prompt_tokens, recipe.data.batch_size) == (2048, 8)
    assert recipe.to_dict()["data"]["splits"] == {"fit": 0.3, "tune": 0.1, "search": 0.2, "verify": 0.4}
    assert (recipe.projection.kind, recipe.projection.ridge) == ("closed_form", [0.0001, 0.001, 0.01, 0.1, 1.0])
    assert (recipe.projection.warmup, recipe.projection.weight_decay) == (0.1, 0.0)
    assert (recipe.budget.metric, recipe.budget.max_drop, recipe.budget.candidates) == ("agreement", 0.01, 8)
    assert (recipe.trainer["accelerator"], recipe.trainer["devices"], recipe.trainer["logger"]) == ("auto", 1, False)


@pytest.mark.parametrize("name", bundled_recipes())
@pytest.mark.parametrize("form", ["{}", "{}.yaml", "recipes/{}.yaml"])
def test_every_packaged_recipe_parses_by_every_name(name, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing of that name lies there
    recipe = parse(["--recipe", form.format(name)]).recipe
    assert recipe.model.base
    assert recipe.data.splits.verify * 1500 >= 400


def test_the_template_states_the_defaults_and_every_key(write):
    template = parse(["--recipe", "example"]).recipe.to_dict()
    defaults = parse(["--recipe", write(MINIMAL)]).recipe.to_dict()
    differing = {
        f"{section}.{key}"
        for section, values in template.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != defaults[section][key]
    }
    assert differing == {"model.base", "data.calibration", "importance.batch_size"}
    stated = yaml.safe_load(
        (invocation.importlib.resources.files("pop_lightning.recipes") / "example.yaml").read_text()
    )
    for section, values in defaults.items():
        assert section in stated
        if isinstance(values, dict) and section != "trainer":
            assert set(values) == set(stated[section])


def test_a_file_in_the_working_folder_comes_before_a_packaged_recipe(write, tmp_path, monkeypatch):
    write(MINIMAL, "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    assert parse(["--recipe", "tiny.yaml"]).recipe.model.base == "some/base"


def test_the_command_line_overrides_the_file_and_the_last_one_wins(write):
    path = write(MINIMAL | {"seed": 3, "trainer": {"max_steps": 4}})
    argv = ["--recipe", path, "--seed=4", "--seed", "5", "--budget.candidates", "[4, 6]", "--trainer.precision", "32"]
    recipe = parse([*argv, "--data.splits.fit", "0.1", "--data.splits.verify", "0.6"]).recipe
    assert (recipe.seed, recipe.budget.candidates, recipe.data.splits.fit) == (5, [4, 6], 0.1)
    assert recipe.trainer["max_steps"] == 4
    assert parse(["--recipe", path, "--budget.candidates", "all"]).recipe.budget.candidates == "all"
    assert parse(["--recipe", path, "--model.device_map", '{"": "cpu"}']).recipe.model.device_map == {"": "cpu"}


def test_numbers_with_an_exponent_are_numbers(write):
    path = write("model: {base: x}\ndata: {calibration: y}\nprojection: {learning_rate: 1e-3, ridge: [1e-2, 1]}\n")
    recipe = parse(["--recipe", path]).recipe
    assert (recipe.projection.learning_rate, recipe.projection.ridge) == (1e-3, [1e-2, 1.0])


def test_resume_overwrite_and_check_are_read_and_exclude_each_other(write):
    path = write(MINIMAL)
    assert parse(["--recipe", path])[1:4] == (False, False, False)
    assert parse(["--recipe", path, "--resume"])[1:4] == (True, False, False)
    assert parse(["--overwrite", "--recipe", path])[1:4] == (False, True, False)
    assert parse(["--recipe", path, "--check"])[1:4] == (False, False, True)
    assert "not allowed with argument" in refusal("--recipe", path, "--overwrite", "--resume")


@pytest.mark.parametrize("name", ["lightning.pytorch.loggers.CSVLogger", "CSVLogger"])
def test_a_logger_is_named_by_class_and_writes_to_the_output_folder(write, name, tmp_path):
    recipe = parse(["--recipe", write(MINIMAL), "--trainer.logger", name, "--output", str(tmp_path / "o")]).recipe
    logger = recipe.trainer_arguments()["logger"]
    assert isinstance(logger, CSVLogger)
    assert logger.root_dir.startswith(str(tmp_path / "o"))


def test_a_logger_in_the_file_keeps_its_own_folder(write, tmp_path):
    entry = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": str(tmp_path)}}
    recipe = parse(["--recipe", write(MINIMAL | {"trainer": {"logger": entry}})]).recipe
    logger = recipe.trainer_arguments()["logger"]
    assert isinstance(logger, TensorBoardLogger)
    assert logger.save_dir == str(tmp_path)
    argv = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "own")]
    assert parse(["--recipe", write(MINIMAL), *argv]).recipe.trainer_arguments()["logger"].save_dir.endswith("own")


# --- print_config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--budget.max_drop", "0.02", "--budget.candidates", "[3]", "--projection.learning_rate", "1e-05"],
        ["--trainer.logger", "CSVLogger", "--model.revision", "1e3", "--output", "größe: x"],
    ],
)
def test_what_print_config_prints_is_the_same_recipe(write, capsys, argv):
    text = printed(capsys, "--recipe", "tiny", *argv)
    assert parse(["--recipe", write(text)]).recipe == parse(["--recipe", "tiny", *argv]).recipe
    assert printed(capsys, "--recipe", write(text)) == text


def test_a_saved_recipe_is_read_back(tmp_path):
    recipe = parse(["--recipe", "tiny", "--seed", "7"]).recipe
    recipe.save(tmp_path / "recipe.yaml")
    assert parse(["--recipe", str(tmp_path / "recipe.yaml")]).recipe == recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == recipe.to_dict()


# --- what is wrong --------------------------------------------------------------------------------------------------


def test_a_missing_or_unreadable_recipe_is_refused(write, tmp_path):
    assert "pop-fit --list describes them, pop-fit --recipe example --recipe_out my.yaml" in refusal(
        "--model.base", "x"
    )
    assert "neither a file nor a bundled recipe" in refusal("--recipe", "nowhere.yaml")
    assert "did you mean tiny?" in refusal("--recipe", "tinny")
    assert "neither a file" in refusal("--recipe", str(tmp_path))
    assert "expected one argument" in refusal("--recipe")
    for empty in ("", "# a comment only\n", "---\n"):
        assert "is empty" in refusal("--recipe", write(empty))
    assert "is not valid YAML at line 2" in refusal("--recipe", write("seed: 1\nmodel: x: y\n"))
    assert "must hold keys" in refusal("--recipe", write("- model\n- data\n"))
    assert "duplicate key: seed" in refusal("--recipe", write("seed: 1\nseed: 2\n"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80" * 9)
    assert "is not valid YAML" in refusal("--recipe", str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"data": {"calibraton": "x"}}, "unknown recipe key: data.calibraton (did you mean data.calibration?)"),
        ({"max_drop": 0.1}, "unknown recipe key: max_drop (did you mean budget.max_drop?)"),
        ({"bugdet": {"max_drop": 0.1}}, "unknown recipe key: bugdet (did you mean budget?)"),
        ({"modle": {"base": "x"}}, "unknown recipe key: modle (did you mean model?)"),
        (
            {"trainer": {"acelerator": "cpu"}},
            "unknown recipe key: trainer.acelerator (did you mean trainer.accelerator?)",
        ),
        ({"budget": {"max_drop": "much"}}, "budget.max_drop must be a number of at least 0, found 'much'"),
        ({"data": {"batch_size": 1.5}}, "data.batch_size must be a whole number of at least 1, found 1.5"),
        ({"data": {"batch_size": None}}, "data.batch_size must be a whole number of at least 1, found null"),
        ({"projection": {"kind": "m"}}, "projection.kind must be one of reuse, closed_form, lora, full, found 'm'"),
        ({"trainer": {"max_steps": "lots"}}, "trainer.max_steps must be a whole number, found 'lots'"),
        ({"data": {"splits": [1]}}, "data.splits must be a section with keys such as fit, tune, search, verify"),
        ({"model": "x"}, "model must be a section with keys such as base"),
        ({"model": {"base": " "}}, "model.base must be non-empty text, found ' '"),
        ({"data": {"splits": {"fit": 0.5}}}, "data.splits must sum to 1 (fit + tune + search + verify), found 1.2"),
        (
            {"data": {"splits": {"fit": -0.1, "tune": 0.5}}},
            "data.splits.fit must be a number above 0 and below 1, found -0.1",
        ),
        ({"budget": {"max_drop": -0.1}}, "budget.max_drop must be a number of at least 0, found -0.1"),
        ({"budget": {"speedup": 1.0}}, "budget.speedup must be a number above 1 or null, found 1.0"),
        ({"budget": {"extensions": -1}}, "budget.extensions must be a whole number of at least 0, found -1"),
        (
            {"budget": {"boundaries": [1, -4]}},
            "budget.boundaries[1] must be a whole number of at least 0 or a number above 0 and below 1, found -4",
        ),
        ({"boundary": "auto", "budget": {"boundaries": []}}, "budget.boundaries must name what boundary: auto"),
        (
            {"boundary": -1},
            "boundary must be a whole number of at least 0, a number above 0 and below 1 or auto, found -1",
        ),
        (
            {"boundary": "most"},
            "boundary must be a whole number of at least 0, a number above 0 and below 1 or auto, found 'most'",
        ),
        ({"boundary": 0, "salient": 4}, "salient needs a boundary of at least 1"),
        ({"selector": "luck"}, "selector must be one of attention, recency, learned, found 'luck'"),
        ({"budget": {"max_drop": 1.5}}, "budget.max_drop is an absolute fraction, at most 1 for agreement, found 1.5"),
        (
            {"budget": {"metric": "nll_increase", "max_drop": 1.0}},
            "budget.max_drop must be below budget.nll_cap, 1, where losses are clipped: it would promise nothing",
        ),
        (
            {"budget": {"metric": "nll_increase", "max_drop": 0.3, "nll_cap": 0.2}},
            "budget.max_drop must be below budget.nll_cap, 0.2",
        ),
        ({"budget": {"confidence": 0.5}}, "budget.confidence must be a number above 0.5 and below 1, found 0.5"),
        (
            {"budget": {"confidence": float("nan")}},
            "budget.confidence must be a number above 0.5 and below 1, found nan",
        ),
        ({"budget": {"candidates": []}}, "budget.candidates must be a whole number of at least 1, a non-empty list"),
        ({"budget": {"candidates": [0, 3]}}, "budget.candidates[0] must be a whole number of at least 1, found 0"),
        (
            {"budget": {"candidates": "some"}},
            "budget.candidates must be a whole number of at least 1, a non-empty list (each",
        ),
        ({"data": {"batch_size": 0}}, "data.batch_size must be a whole number of at least 1, found 0"),
        ({"projection": {"ridge": []}}, "projection.ridge must be a non-empty list (each a number above 0), found []"),
        ({"projection": {"ridge": [0.1, 0.0]}}, "projection.ridge[1] must be a number above 0, found 0.0"),
        ({"projection": {"warmup": 2}}, "projection.warmup must be a number of at least 0 and at most 1, found 2"),
        ({"seed": 2**32}, "seed must be a whole number of at least 0 and below 4294967296, found 4294967296"),
        ({1: 2}, "unknown recipe key: 1"),
    ],
)
def test_a_key_or_value_that_does_not_fit_is_named(write, content, sentence):
    whole = {**MINIMAL, **content}
    for section in ("model", "data"):
        if isinstance(content.get(section), dict):
            whole[section] = MINIMAL[section] | content[section]
    assert refusal("--recipe", write(whole)).startswith(sentence)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--data.calibraton", "x"], "unknown recipe key: --data.calibraton (did you mean --data.calibration?)"),
        (["--seedd=3"], "unknown recipe key: --seedd (did you mean --seed?)"),
        (["--budget", "3"], "--budget is a section: set one of its keys, such as --budget.metric"),
        (["--budget.max_drop"], "--budget.max_drop needs a value, found none"),
        (["--budget.max_drop", "--resume"], "--budget.max_drop needs a value, found none"),
        (["--budget.max_drop", "x"], "budget.max_drop must be a number of at least 0, found 'x'"),
        (["--data.batch_size", "true"], "data.batch_size must be a whole number of at least 1, found True"),
        (["--resume=yes"], "argument --resume: ignored explicit argument 'yes'"),
        (["tiny"], "unexpected 'tiny': expected --recipe"),
    ],
)
def test_a_command_line_that_does_not_fit_is_named(argv, sentence):
    assert refusal("--recipe", "tiny", *argv).startswith(sentence)


def test_several_errors_are_reported_together(write):
    content = "model: {base: x, dtyp: float32}\ndata: {calibration: y, batch_size: two, splits: {fit: a}}\n"
    text = refusal("--recipe", write(content), "--seedd", "3", "--budget.max_drop", "z")
    assert text.startswith("the recipe has 5 errors: (1) unknown recipe key: --seedd")
    for key in (
        "unknown recipe key: model.dtyp (did you mean model.dtype?)",
        "data.batch_size must",
        "data.splits.fit must",
        "budget.max_drop must",
    ):
        assert key in text
    ranges = refusal("--recipe", write({"data": {"batch_size": 0}, "budget": {"confidence": 2}}))
    assert "the recipe has 4 errors" in ranges  # and the two required keys


# --- the command ----------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_exit_code_2(capsys):
    assert main(["--recipe", "tiny", "--data.calibraton", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pop-fit: error: unknown recipe key: --data.calibraton")
    assert err.count("\n") == 1


def test_help_lists_every_key(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for key in (
        "--recipe",
        "--resume",
        "model.base",
        "data.splits.verify",
        "budget.max_drop",
        "accumulate_grad_batches",
    ):
        assert key in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("code", [0, 3])
def test_the_pipeline_gets_the_recipe_and_returns_the_exit_code(monkeypatch, code):
    calls = []
    monkeypatch.setattr("pop_lightning.run.pipeline.fit", lambda recipe, **flags: calls.append((recipe, flags)) or code)
    assert main(["--recipe", "tiny", "--seed", "9", "--resume"]) == code
    assert calls[0][0].seed == 9
    assert calls[0][1] == {"resume": True, "overwrite": False, "verbose": False, "push": None}


def test_an_interrupt_is_130_and_a_defect_is_not_hidden(capsys):
    def stop():
        raise KeyboardInterrupt

    def break_():
        raise RuntimeError("a defect")

    assert run("pop-fit", stop, stopped="--resume continues the run") == 130
    assert capsys.readouterr().err == "pop-fit: interrupted; --resume continues the run\n"
    with pytest.raises(RuntimeError, match="a defect"):
        run("pop-fit", break_)


@pytest.mark.parametrize(
    ("module", "function", "flags", "said"),
    [
        ("pipeline", "fit", [], "; --resume continues the run: pop-fit --recipe tiny --resume"),
        (
            "pipeline",
            "fit",
            ["--overwrite", "--output", "a b", "--budget.candidates=[2, 1]"],
            "; --resume continues the run: pop-fit --recipe tiny --output 'a b' '--budget.candidates=[2, 1]' --resume",
        ),
        ("pipeline", "fit", ["--resume"], "; --resume continues the run: pop-fit --recipe tiny --resume"),
        ("check", "check", ["--check"], ""),
    ],
)
def test_an_interrupted_run_says_with_which_command_it_continues(monkeypatch, capsys, module, function, flags, said):
    monkeypatch.setattr("pop_lightning.cli.fit.script", lambda name: name)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"pop_lightning.run.{module}.{function}", stop)
    assert main(["--recipe", "tiny", *flags]) == 130
    assert capsys.readouterr().err == f"pop-fit: interrupted{said}\n"


def test_a_process_of_torchrun_names_no_command_that_it_was_not_started_with(monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pop_lightning.run.pipeline.fit", stop)
    monkeypatch.setenv("RANK", "0")
    assert main(["--recipe", "tiny"]) == 130
    assert capsys.readouterr().err == "pop-fit: interrupted; --resume continues the run\n"


# --- what a hostile or broken file holds ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2026-13-45x: y",
        "seed: !!int x",
        "seed: !!timestamp x",
        "seed: !!python/object:os.system x",
        "seed: " + "9" * 5000,
        "? [1, 2]\n: 3",
        "? {a: b}\n: 3",
        "trainer: {callbacks: &a [*a]}",
        "trainer: " + "[" * 1000 + "]" * 1000,
        "trainer: " + "{a: " * 1000 + "1" + "}" * 1000,
        '{"model": ' * 1000 + "1" + "}" * 1000,
        'output: "\\ud83d"',
        'model: {base: x}\n"\\ud83d": 1',
        "seed: \x07",
        "<<: 3",
    ],
)
def test_yaml_that_cannot_be_read_is_one_sentence(write, text):
    sentence = refusal("--recipe", write(text))
    assert len(sentence) < 300 or sentence.startswith("the recipe has")


def test_a_number_of_thousands_of_digits_is_one_sentence(write):
    long = "0x" + "f" * 5000
    for key in ("seed", "projection.steps"):
        assert f"--{key}" in (sentence := refusal("--recipe", write(MINIMAL), f"--{key}", long))
        assert "a whole number beyond 64 bits" in sentence
    text = f"model: {{base: x}}\ndata: {{calibration: y}}\nprojection: {{steps: {long}}}\n"
    assert "at line 3: a whole number beyond 64 bits" in refusal("--recipe", write(text))


def test_a_date_is_text(write):
    path = write("model: {base: x, revision: 2026-01-31}\ndata: {calibration: y}\n")
    assert parse(["--recipe", path]).recipe.model.revision == "2026-01-31"


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--model.revision", "1e3"], "1e3"),
        (["--model.revision", "null"], None),
        (["--model.revision", "'null'"], "null"),
        (["--model.revision", "a: b # c"], "a: b # c"),
        (["--model.revision", "[x"], "[x"),
    ],
)
def test_an_override_of_text_is_the_text_unless_yaml_has_another_kind_that_fits(write, argv, value):
    assert parse(["--recipe", write(MINIMAL), *argv]).recipe.model.revision == value


def test_an_override_that_is_not_yaml_is_named(write):
    sentence = refusal("--recipe", write(MINIMAL), "--budget.candidates", "[1, 2")
    assert sentence.startswith("--budget.candidates is not valid YAML")


def test_an_override_replaces_a_value_of_the_file_that_does_not_fit(write):
    assert parse(["--recipe", write(MINIMAL | {"seed": "x"}), "--seed", "1"]).recipe.seed == 1


def test_empty_sections_are_defaults_and_missing_keys_are_named_once(write):
    assert parse(["--recipe", write("model: {base: x}\ndata: {calibration: y, splits: }\nbudget:\n")]).recipe
    assert refusal("--recipe", write("model:\n")).startswith("the recipe has 2 errors: (1) model.base is required")
    assert refusal("--recipe", write({"modle": {"base": "x"}, "data": MINIMAL["data"]})) == (
        "unknown recipe key: modle (did you mean model?)."
    )


# --- depth ------------------------------------------------------------------------------------------------------------


def test_a_depth_is_fixed_by_its_own_key(write):
    assert parse(["--recipe", write(MINIMAL)]).recipe.depth is None
    assert parse(["--recipe", write(MINIMAL | {"depth": 8})]).recipe.depth == 8
    assert parse(["--recipe", write(MINIMAL), "--depth", "3"]).recipe.depth == 3
    assert "depth must be a whole number of at least 1 or null" in refusal("--recipe", write(MINIMAL | {"depth": 0}))
    both = MINIMAL | {"depth": 8, "budget": {"speedup": 1.5}}
    assert refusal("--recipe", write(both)).startswith("depth already fixes what budget.speedup would choose")


# --- the trainer section ----------------------------------------------------------------------------------------------


def test_the_arguments_read_from_lightnings_source_are_those_of_its_class():
    named = [key.removeprefix("trainer.") for key in invocation._keys() if key.startswith("trainer.")]
    assert named == list(inspect.signature(lightning.Trainer).parameters)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--trainer.logger", "NoLogger"],
            "trainer.logger is not accepted by lightning.Trainer: expected Union[Logger, ",
        ),
        (["--trainer.logger", "CSVLogger", "--trainer.logger.nam", "x"], "does not have the argument nam"),
        (
            ["--trainer.callbacks", "[{class_path: no.such.Callback}]"],
            "trainer.callbacks names a class that cannot be imported: No module named 'no'; install its package, or",
        ),
        (
            ["--trainer.callbacks", "[lightning.pytorch.callbacks.Tiemr]"],
            "names lightning.pytorch.callbacks.Tiemr, but the module lightning.pytorch.callbacks has no Tiemr",
        ),
    ],
)
def test_a_class_that_cannot_be_made_is_named_when_the_trainer_is(argv, sentence):
    recipe = parse(["--recipe", "tiny", *argv]).recipe
    with pytest.raises(InputError) as error:
        recipe.trainer_arguments()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_print_config_imports_nothing_that_a_recipe_names(tmp_path, monkeypatch, capsys, write):
    (tmp_path / "strangers.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(MINIMAL | {"trainer": {"logger": {"class_path": "strangers.Logger"}, "callbacks": ["strangers.C"]}})
    assert "strangers.Logger" in printed(capsys, "--recipe", path)
    assert "strangers" not in sys.modules


# --- for editors and for recipes of one's own -------------------------------------------------------------------------


def test_the_schema_has_the_type_the_range_and_the_meaning_of_every_key(capsys, write):
    assert main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["model", "data"]
    size = schema["$defs"]["Data"]["properties"]["batch_size"]
    assert (size["type"], size["minimum"], size["default"]) == ("integer", 1, 8)
    assert "memory" in size["description"]
    assert "max_steps" in schema["$defs"]["Trainer"]["properties"]
    text = invocation.read("example")
    assert "# yaml-language-server: $schema=" in text


def test_the_bundled_recipes_are_listed_with_what_they_are_for(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == bundled_recipes()
    assert all(len(line.split()) > 5 for line in lines)


def test_a_recipe_is_written_out_with_its_comments_or_with_what_was_changed(tmp_path, capsys):
    out = tmp_path / "mine.yaml"
    assert main(["--recipe", "tiny", "--recipe_out", str(out)]) == 0
    assert out.read_text() == invocation.read("tiny")
    assert main(["--recipe", "tiny", "--recipe_out", str(out)]) == 2
    assert f"--recipe_out {out} already exists and is not overwritten: choose another file" in capsys.readouterr().err
    changed = ["--recipe", "tiny", "--seed", "5"]
    assert main([*changed, "--recipe_out", str(tmp_path / "changed.yaml")]) == 0
    assert parse(["--recipe", str(tmp_path / "changed.yaml")]).recipe == parse(changed).recipe


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pop-fit 0.")


def test_an_error_spells_a_key_as_it_was_given(write, capsys):
    assert main(["--recipe", write(MINIMAL | {"seed": -1}), "--budget.max_drop", "x"]) == 2
    error = capsys.readouterr().err
    assert "(1) seed must be" in error
    assert "(2) --budget.max_drop must be" in error


# --- which tokens run in full ---------------------------------------------------------------------------------------


def ways(boundaries=(1, 16), depth=None, **changes):
    recipe = Recipe(model=Model("x"), data=Data("y"), depth=depth, **changes)
    return recipe.kept(list(boundaries))


def test_what_may_run_in_full_begins_with_the_fewest_tokens():
    budget = Budget(salient=[0.2, 0, 20])
    assert ways() == [Kept(1), Kept(16)]
    assert ways(boundary=1) == [Kept(1)]
    assert ways(boundary=1, salient="auto", budget=budget) == [Kept(1), Kept(1, 20), Kept(1, 0.2)]
    assert ways(boundary=1, salient="auto", budget=Budget(salient=0)) == [Kept(1)]
    assert ways(boundary="auto", salient=4, selector="recency") == [Kept(1, 4, "recency"), Kept(16, 4, "recency")]


def test_a_given_depth_uses_the_papers_choice_instead_of_auto():
    assert ways(depth=3, boundary="auto", salient="auto") == [Kept(1)]
    assert ways(depth=3, boundary=4, salient=0.1) == [Kept(4, 0.1)]


def test_boundary_0_excludes_salient_tokens():
    assert ways([0, 1], boundary="auto", salient="auto", budget=Budget(salient=[0, 8])) == [
        Kept(0),
        Kept(1),
        Kept(1, 8),
    ]
    assert ways([0, 1], boundary=1, salient=4, budget=Budget(boundaries=[0, 1])) == [Kept(1, 4)]  # 0 is only reported
    with pytest.raises(InputError, match="salient needs a boundary of at least 1"):
        ways([0], boundary="auto", salient=4)


# --- a sweep ----------------------------------------------------------------------------------------------------------

PIECES = (
    *("null", "true", "-1", "1e400", ".nan", "[]", "{}", "'", '"', ": ", "- ", "&a ", "*a", "!!int ", "? ", "%", "\t"),
    *("\\ud800", "2026-01-01", "<<: ", "0x" + "f" * 5000, "[" * 60, "class_path: os.abort", "\x00", "é", "auto", "all"),
)


def mutated(text, rng):
    """``text`` with a piece put in, a stretch taken out, or a line moved, once to three times."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) or 1)
        how = rng.randrange(3)
        if how == 0:
            text = text[:at] + rng.choice(PIECES) + text[at + rng.randrange(6) :]
        elif how == 1:
            text = text[:at] + text[at + rng.randrange(40) :]
        else:
            lines = text.splitlines(keepends=True)
            lines.insert(0, lines.pop(at % len(lines)))
            text = "".join(lines)
    return text


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.full)])
def test_a_mutated_recipe_is_a_recipe_or_one_sentence(write, count):
    rng, refused = random.Random(0), []
    for _ in range(count):
        name = rng.choice(["tiny", "example", "llama3_3_70b_deepspeed"])
        path = write(mutated(invocation.read(name), rng))
        try:
            recipe = parse(["--recipe", path]).recipe
        except InputError as error:
            refused.append(str(error))
        else:
            assert parse(["--recipe", write(recipe.to_yaml(), "again.yaml")]).recipe == recipe
    assert count / 10 < len(refused) < count
    assert not [sentence for sentence in refused if "\n" in sentence]
