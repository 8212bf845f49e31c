"""Tables: one set of rows for the terminal (drawn by rich), for pages, and as Markdown to copy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from textwrap import dedent

from markupsafe import Markup, escape
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

_WIDE = 1000  # characters: wide enough that no cell is wrapped or cut; a terminal wraps whole lines itself
_FEW = 5  # columns that fit on a phone if their cells are wrapped
_PROSE = 32  # characters from which a cell of text is wrapped on a page


@dataclass(frozen=True)
class Table:
    """Rows under a header. A template shows it as ``{{ table }}``, in a box of its own that scrolls.

    Attributes:
        rows: cells as text; a cell may be markup, of which other forms than the page show the text.
        left: columns that are not numbers, by index.
        chosen: rows that a page highlights, by index.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: tuple[int, ...] = (0,)
    chosen: tuple[int, ...] = ()

    def only(self, *names: str) -> "Table":
        """The columns with these names."""
        places = [self.header.index(name) for name in names]
        rows = [[row[place] for place in places] for row in self.rows]
        left = tuple(at for at, place in enumerate(places) if place in self.left)
        return replace(self, header=list(names), rows=rows, left=left)

    def titled(self, title: str) -> "Table":
        """With ``title`` in front of the first column's name."""
        first, *others = self.header
        return replace(self, header=[f"{title} {first}", *others])

    def text(self) -> str:
        """For the terminal."""
        return text_table(self.header, [list(map(_plain, row)) for row in self.rows], self.left)

    def markdown(self) -> str:
        """For issues and notes."""
        rule = ["---" if column in self.left else "--:" for column in range(len(self.header))]
        lines = [self.header, rule, *([_plain(cell).replace("|", "\\|") for cell in row] for row in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def __html__(self) -> str:
        head = "".join(self._cell("th", column, name) for column, name in enumerate(self.header))
        body = []
        for index, row in enumerate(self.rows):
            kind = ' class="chosen"' if index in self.chosen else ""
            body.append(f"<tr{kind}>{''.join(self._cell('td', *cell) for cell in enumerate(row))}</tr>\n")
        few = ' class="few"' if len(self.header) <= _FEW else ""
        return (
            f'<div class="scroll" tabindex="0"><table{few}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(body)}'
            f"</tbody></table></div>\n"
            f"<details><summary>as Markdown</summary><pre>{escape(self.markdown())}</pre></details>"
        )

    def _cell(self, tag: str, column: int, content: str) -> str:
        kind = ""
        if column in self.left:
            prose = any(len(_plain(row[column])) > _PROSE for row in self.rows)
            kind = ' class="text wrap"' if prose else ' class="text"'
        return f"<{tag}{kind}>{escape(content)}</{tag}>"


def joined(blocks: Iterable[Table | str]) -> str:
    """Paragraphs and tables as text, with empty lines between them."""
    return "\n\n".join(each.text() if isinstance(each, Table) else each for each in blocks) + "\n"


def _plain(cell: str) -> str:
    return cell.striptags() if isinstance(cell, Markup) else cell


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: tuple[int, ...] = (1,)) -> str:
    """A table as plain text; ``left`` names the columns that are not numbers."""
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # In a notebook rich would display the table instead of writing it.
    plain = {"color_system": None, "markup": False, "highlight": False, "emoji": False, "force_jupyter": False}
    console = Console(file=StringIO(), width=_WIDE, **plain)
    console.print(table)
    lines = (line.rstrip() for line in console.file.getvalue().splitlines())
    return dedent("\n".join(filter(None, lines)))
