"""What all pages share: tables in three forms, escaping, and a layout that fits on a phone."""

import pytest
from markupsafe import Markup

from pop_lightning.core.pages import circumstances, render
from pop_lightning.core.tables import Table

from tests.helpers.browser import assert_fits, layout

TABLE = Table(
    ["name", "depth", "what"],
    [["a|b", "8", "<i>"], ["c", Markup('<span class="pass">9</span>'), "a sentence that is long enough to be wrapped"]],
    left=(0, 2),
    chosen=(1,),
)


def page(content: str, about: dict[str, str]) -> str:
    """A page of a template that holds only ``content``, from a package of this test's own."""
    return render("tests.core", "page_of_a_test.html.jinja", title="a & b", about=about, content=content)


def test_a_table_has_the_same_cells_in_every_form():
    assert TABLE.titled("first:").text().splitlines()[0].split() == ["first:", "name", "depth", "what"]
    assert TABLE.text().splitlines()[-1].split()[:2] == ["c", "9"]
    assert TABLE.markdown().splitlines() == [
        "| name | depth | what |",
        "| --- | --: | --- |",
        "| a\\|b | 8 | <i> |",
        "| c | 9 | a sentence that is long enough to be wrapped |",
    ]
    shown = TABLE.__html__()
    assert "<td>8</td>" in shown
    assert '<td><span class="pass">9</span></td>' in shown
    assert '<td class="text wrap">&lt;i&gt;</td>' in shown
    assert shown.count('<tr class="chosen">') == 1
    assert '<table class="few">' in shown, "its cells are wrapped on a phone"
    assert "<table>" in Table(["x"] * 9, []).__html__()


def test_columns_are_chosen_by_name_and_keep_their_side():
    only = TABLE.only("what", "depth")
    assert (only.header, only.left) == (["what", "depth"], (0,))
    assert only.rows[0] == ["<i>", "8"]


def test_a_page_escapes_what_it_is_given_and_says_what_was_run():
    shown = page("<script>", {"model": "<b>", "command": "pop-fit --recipe 'a b'"})
    assert "<title>POP Lightning: a &amp; b</title>" in shown
    assert "<dt>model</dt><dd>&lt;b&gt;</dd>" in shown
    assert "<script" not in shown


def test_the_command_is_the_one_that_was_typed_or_one_that_does_the_same(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/pop-fit", "--recipe", "a b"])
    assert circumstances("pop-fit", "other")["command"] == "pop-fit --recipe 'a b'"
    assert circumstances("pop-generate", "other")["command"] == "other"


def test_a_page_fits_on_a_phone_and_one_that_does_not_is_found(tmp_path):
    wide = Table([f"column {index}" for index in range(30)], [["1.2345"] * 30])
    (tmp_path / "page.html").write_text(page(wide, {"command": "x" * 300, "model": "word " * 100}))
    assert_fits(tmp_path / "page.html", tmp_path)
    (tmp_path / "page.html").write_text(page(Markup('<p style="width: 700px">x</p>'), {}))
    phone, laptop = layout(tmp_path / "page.html", tmp_path)
    assert phone["needed"] > phone["width"]
    assert phone["outside"]
    assert laptop["outside"] == []
    with pytest.raises(AssertionError):
        assert_fits(tmp_path / "page.html", tmp_path)
