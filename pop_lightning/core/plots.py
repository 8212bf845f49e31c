"""Plots for a page without scripts or outside resources, in the page's light and dark colors."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colors of a plot, the same as in the page's style sheet."""

    ink: str
    muted: str
    line: str
    band: str
    limit: str
    series: tuple[str, str, str, str]


LIGHT = Theme("#1b2026", "#5b6570", "#dde2e7", "#f0f3f6", "#c8322b", ("#2563b8", "#c2690c", "#1c7c4a", "#8a46b5"))
DARK = Theme("#e7ebef", "#a0abb6", "#333b43", "#1e242a", "#ff7a70", ("#7db2f5", "#f0a85a", "#5cc98d", "#c99aec"))


SIZE = (6.2, 3.3)  # inches
SCALE = 112  # CSS pixels of an inch, where there is room


def picture(draw: Callable[[Axes, Theme], None], description: str, size: tuple[float, float] = SIZE) -> Markup:
    """What ``draw`` draws, as an HTML ``picture`` that follows the reader's color scheme.

    Each scheme has its own SVG in a data URI, which keeps its ids and styles separate from those of the page.
    """
    light, dark = (_svg(draw, theme, size) for theme in (LIGHT, DARK))
    return Markup(
        '<picture><source media="(prefers-color-scheme: dark)" srcset="{}"><img src="{}" alt="{}" width="{}"></picture>'
    ).format(dark, light, description, round(SCALE * size[0]))


def _svg(draw: Callable[[Axes, Theme], None], theme: Theme, size: tuple[float, float]) -> str:
    settings = {
        "svg.hashsalt": "pop",  # ids, and therefore the bytes of the page, depend only on the figures
        "svg.fonttype": "none",  # text stays text, so a reader can search for it
        "text.parse_math": False,  # names come from the user; a dollar sign is a dollar sign
        "font.size": 9.5,
        "text.color": theme.ink,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=theme.line, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes, theme)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, handlelength=1.6)
        buffer = BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (speedup, loss) that no other one beats in both, by speedup."""
    kept: list[tuple[float, float]] = []
    for speedup, loss in sorted(points, key=lambda point: (-point[0], point[1])):
        if not kept or loss < kept[-1][1]:
            kept.append((speedup, loss))
    return kept[::-1]
