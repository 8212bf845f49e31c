"""Tables for the terminal and for logs, drawn by rich."""

from io import StringIO
from textwrap import dedent

from rich import box
from rich.console import Console
from rich.table import Table

_WIDE = 1000  # characters: wide enough that no cell is wrapped or cut; a terminal wraps whole lines itself


def text_table(header: list[str], rows: list[list[str]], left: tuple[int, ...] = (1,)) -> str:
    """A table as plain text; ``left`` names the columns that are not numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=StringIO(), width=_WIDE, color_system=None, markup=False, highlight=False, emoji=False)
    console.print(table)
    lines = (line.rstrip() for line in console.file.getvalue().splitlines())
    return dedent("\n".join(filter(None, lines)))
