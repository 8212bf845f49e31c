"""Shows the result of an ablation: tables for the terminal, and JSON and a page for the output folder.

Reads the plain data that ``ablate.run`` returns; nothing is measured here.
"""

from itertools import cycle
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from pop_lightning.ablation.ablate import JSON, MAIN, PAGE, UNTRAINED
from pop_lightning.core.files import write_json, write_text
from pop_lightning.core.numbers import number, percent, ratio
from pop_lightning.core.pages import render
from pop_lightning.core.plan import Kept
from pop_lightning.core.plots import Theme, picture, staircase
from pop_lightning.core.tables import Table

_INTERVALS = ["exact match", "minus full", "agreement", "NLL increase", "KL"]
_TIMES = ["counted", "TTFT"]
_SHORT = ("counted", "TTFT", "exact match", "agreement", "KL")  # the figures of a plan that are shown


def text(result: dict[str, Any]) -> str:
    """The three tables and the notes."""
    rows, prompts = result["rows"]["verify"], result["prompts"]
    blocks = [
        compared_table(result).text(),
        shares_table(result).text(),
        frontier_table(result).titled("frontier:").text(),
        f"{rows} rows of {prompts} prompts, teacher-forced; brackets: 95% intervals, paired with the full model. TTFT: "
        f"{result['prompt_tokens']} tokens, medians of {result['settings']['repeats']} rounds.",
        *result["notes"],
    ]
    return "\n\n".join(blocks) + "\n"


def write(result: dict[str, Any], folder: Path, about: dict[str, str]) -> None:
    """Write ``ablation.json`` and ``ablation.html`` into ``folder``, each whole or not at all."""
    write_json(folder / JSON, result | {"about": about})
    write_text(folder / PAGE, _page(result, about))


def compared_table(result: dict[str, Any]) -> Table:
    """Table 3: the same depth pruned in every way."""
    rows = [[row["name"], *_figures(row)] for row in result["table3"]]
    return Table([f"depth {result['depth']} of {result['layers']}", *_INTERVALS], rows)


def shares_table(result: dict[str, Any]) -> Table:
    """Table 4: the share of the layers that is pruned, what is saved and what is lost."""
    rows = []
    for row in sorted(result["table4"], key=lambda row: (-row["depth"], UNTRAINED.index(row["projection"]))):
        shares = ", ".join(map(str, row["shares"]))
        rows.append([f"{shares}%", str(row["depth"]), row["projection"], *_times(row), *_figures(row)])
    names = ["pruned", "depth", "projection"]
    return Table([*names, *_TIMES, *_INTERVALS], rows, (0, 2)).only(*names, *_SHORT)


def frontier_table(result: dict[str, Any]) -> Table:
    """The plans of the frontier by measured speedup, with projections of one kind."""
    plans = sorted(_of_kind(result, MAIN), key=lambda row: row["ttft"]["ratio"])
    rows = [
        [str(row["depth"]), str(row["boundary"]), str(row.get("salient", 0)), *_times(row), *_figures(row)]
        for row in plans
    ]
    best = staircase([_place(row) for row in plans])
    chosen = tuple(at for at, row in enumerate(plans) if _place(row) in best)
    names = ["depth", "boundary", "salient"]
    return Table([*names, *_TIMES, *_INTERVALS], rows, (), chosen).only(*names, *_SHORT)


def _times(row: dict[str, Any]) -> list[str]:
    """The cells under :data:`_TIMES`."""
    return [ratio(row["counted"]), ratio(row["ttft"]["ratio"])]


def _figures(row: dict[str, Any]) -> list[str]:
    """The cells under :data:`_INTERVALS`."""
    match, agreement, nll, kl = (row[name] for name in ("exact_match", "agreement", "nll", "kl"))
    if row.get("name") == "full model":
        return [percent(match["value"]), "", percent(1.0), "0", "0"]
    low, high = (f"{100 * (1 + min(0.0, agreement[side])):.1f}" for side in ("low", "high"))
    return [
        percent(match["value"]),
        f"[{100 * match['low']:+.1f}, {100 * match['high']:+.1f}]",
        f"{percent(agreement['value'])} [{low}, {high}]",
        f"{number(nll['difference'], 2)} [{number(nll['low'], 2)}, {number(nll['high'], 2)}]",
        f"{number(kl['value'], 2)} [{number(max(0.0, kl['low']), 2)}, {number(kl['high'], 2)}]",
    ]


def _of_kind(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [row for row in result["frontier"] if row["projection"] == kind]


def _place(row: dict[str, Any]) -> tuple[float, float]:
    """On the frontier: measured speedup, and the loss of agreement."""
    return row["ttft"]["ratio"], 1 - row["agreement"]["value"]


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(result: dict[str, Any], about: dict[str, str]) -> str:
    return render(
        "pop_lightning.ablation",
        "ablation.html.jinja",
        title=f"ablations at depth {result['depth']} of {result['layers']}",
        about=about | {"device": next(iter(result["frontier"]))["ttft"]["device"]} | _versions(result),
        result=result,
        compared=compared_table(result),
        meanings=Table(["row", "what it is"], [[row["name"], row["what"]] for row in result["table3"]], (0, 1)),
        shares=shares_table(result),
        frontier=frontier_table(result),
        frontier_plot=_frontier_plot(result),
        influence=Table(
            ["layer", "block influence"],
            [[str(layer), number(value)] for layer, value in enumerate(result["influence"])],
            (),
        ),
    )


def _versions(result: dict[str, Any]) -> dict[str, str]:
    versions = result["machine"]["versions"]
    return {"versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version)}


def _frontier_plot(result: dict[str, Any]) -> Markup:
    """Loss of agreement against measured speedup: by depth only and by all plans, of every kind."""

    def draw(axes: Axes, theme: Theme) -> None:
        paper = Kept(result["settings"]["boundary"])
        for color, kind in zip(cycle(theme.series), UNTRAINED, strict=False):
            every = _of_kind(result, kind)
            depth_only = [row for row in every if Kept.of(row) == paper]
            for plans, style, label in ((every, "-", kind), (depth_only, "--", None)):
                best = staircase([_place(row) for row in plans])
                axes.plot(*zip(*best, strict=True), style, marker="o", markersize=4, color=color, label=label)
            axes.plot(*zip(*map(_place, every), strict=True), ".", color=theme.muted, zorder=1)
        axes.plot([], [], "--", color=theme.muted, label="depth only")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("measured speedup of the prefill")
        axes.set_ylabel("loss (1 - agreement)")

    return picture(draw, "Loss of agreement against measured speedup")
