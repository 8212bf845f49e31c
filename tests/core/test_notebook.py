"""Output in the kernel of a notebook: tables as HTML, text once, and text tables that stay text."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from pop_lightning.core.notebook import in_notebook, show
from pop_lightning.core.tables import Table, joined
from pop_lightning.run.progress import Progress

TABLE = Table(["name", "depth"], [["a", "8"], ["b", "9"]])


@pytest.fixture
def displayed(monkeypatch):
    """What IPython would show, in a process that looks like a kernel; rich sees one as well."""
    found = []
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})
    display.HTML, display.display = (lambda text: ("html", text)), found.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda segments, text: found.append(("rich", text)))
    return found


def test_a_text_table_is_returned_and_not_displayed(displayed):
    assert TABLE.text().split() == ["name", "depth", "─" * len(TABLE.text().splitlines()[1]), "a", "8", "b", "9"]
    assert displayed == []


def test_tables_are_displayed_and_sentences_printed_each_once(displayed, capsys):
    show(["before", TABLE, "after"])
    assert displayed == [("html", TABLE.__html__())]
    assert capsys.readouterr().out == "before\nafter\n"


def test_a_notebook_can_show_bars(displayed):
    assert in_notebook()
    assert Progress().interactive


def test_elsewhere_all_is_text(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    show(["before", TABLE])
    assert capsys.readouterr().out == f"before\n\n{TABLE.text()}\n\n"
    assert joined([TABLE, "after"]) == f"{TABLE.text()}\n\nafter\n"


def test_ipython_on_a_terminal_is_not_a_notebook(displayed, monkeypatch):
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: SimpleNamespace(config={}))
    assert not in_notebook()
