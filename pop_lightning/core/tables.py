"""Tables for the terminal."""

from collections.abc import Iterable


def text_table(header: list[str], rows: list[list[str]], left: tuple[int, ...] = (1,)) -> str:
    """A plain table for the terminal; ``left`` names the columns that are not numbers."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]

    def line(cells: Iterable[str]) -> str:
        padded = (
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line("-" * width for width in widths), *map(line, rows)])
