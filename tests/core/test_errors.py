"""Errors of bad input: one sentence from fields, whose keys every front end spells in its own way."""

import pickle

import pytest

from pop_lightning.core.errors import InputError, Key, SeveralErrors, as_flags, first_sentence, raise_all

FLAGS = as_flags({"data.calibration": "--data", "data.allow_urls": "--allow_urls", "data.limit": "--limit"})


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("a whole sentence."), "a whole sentence."),
        (InputError("must be at least 1", key="data.limit", found=0), "data.limit must be at least 1, found 0."),
        (InputError("is unknown", key="x", expected="a or b", found="c"), "x is unknown: expected a or b, found c."),
        (InputError("does not exist", key="x", advice="give a file."), "x does not exist; give a file."),
        (InputError("is odd", found=["a" * 99]), f"is odd, found ['{'a' * 75}..."),
    ],
)
def test_the_fields_that_are_given_make_one_sentence(error, sentence):
    assert str(error) == sentence


def test_a_command_line_spells_keys_as_its_flags():
    advice = ("set ", Key("data.allow_urls", "true"), " or ", Key("data.limit", "3"), ", or change it")
    error = InputError(("holds a URL, see ", Key("data.limit")), key="data.calibration", advice=advice)
    assert str(error) == (
        "data.calibration holds a URL, see data.limit; set data.allow_urls: true or data.limit: 3, or change it."
    )
    assert error.render(FLAGS) == "--data holds a URL, see --limit; set --allow_urls or --limit 3, or change it."


def test_advice_that_a_front_end_cannot_follow_is_left_out_and_a_key_without_a_flag_keeps_its_name():
    error = InputError("is small", key="model.base", advice=("raise ", Key("budget.max_drop")))
    assert str(error) == "model.base is small; raise budget.max_drop."
    assert error.render(FLAGS) == "model.base is small."


def test_an_error_inside_a_sentence_is_spelled_along():
    inner = InputError("cannot be read", key="data.calibration", found="x")
    outer = InputError(("row 3 failed: ", inner))
    assert str(outer) == "row 3 failed: data.calibration cannot be read, found x."
    assert outer.render(FLAGS) == "row 3 failed: --data cannot be read, found x."


def test_several_errors_are_numbered_and_one_is_itself():
    one, two = InputError("is bad", key="data.limit"), InputError("a sentence.")
    raise_all([], "the recipe")
    with pytest.raises(InputError, match=r"^data\.limit is bad\.$"):
        raise_all([one], "the recipe")
    with pytest.raises(SeveralErrors) as several:
        raise_all([one, two], "the recipe")
    assert str(several.value) == "the recipe has 2 errors: (1) data.limit is bad; (2) a sentence."
    assert several.value.render(FLAGS) == "the recipe has 2 errors: (1) --limit is bad; (2) a sentence."


def test_errors_survive_pickling_between_processes():
    one = InputError("is bad", key="data.limit", found=3, advice=("lower ", Key("data.batch_size")))
    for error in (one, SeveralErrors([one, InputError("x")], "the recipe")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.render(FLAGS), str(again)) == (type(error), error.render(FLAGS), str(error))


def test_the_first_sentence_of_an_error_that_says_nothing_is_its_type():
    assert first_sentence(KeyError()) == "KeyError."
    assert first_sentence(OSError("disk full\nmore")) == "disk full."
