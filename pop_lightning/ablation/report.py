"""Shows the result of an ablation: tables for the terminal, and JSON and a page for the output folder.

Reads the plain data that ``ablate.run`` returns; nothing is measured here.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from pop_lightning.ablation.ablate import JSON, MAIN, MINUS_MAIN, PAGE, UNTRAINED
from pop_lightning.core.clock import noise
from pop_lightning.core.files import write_json, write_text
from pop_lightning.core.numbers import confidence, count, number, percent, ratio
from pop_lightning.core.pages import render
from pop_lightning.core.plan import Kept, in_words
from pop_lightning.core.plots import Theme, picture, staircase
from pop_lightning.core.tables import Table
from pop_lightning.evaluation.ablations import listed

_MATCH = ["exact match", "minus full, points"]
_INTERVALS = [*_MATCH, "agreement", "KL"]
_TIMES = ["counted speedup", "measured speedup"]
_SHORT = (*_TIMES, "exact match", "agreement", "KL")  # the figures of a plan that are shown
LEAST_MATCH = 0.1  # of the full model; below, exact match depends on a few responses
ROUNDING, _ROUNDED = 1e-6, "< 1e-6"  # nats per token; below, float32 logits do not distinguish a KL from 0


def text(result: dict[str, Any]) -> str:
    """The three tables and the notes."""
    rows, prompts = result["rows"]["verify"], result["prompts"]
    blocks = [
        compared_table(result).text(),
        shares_table(result).text(),
        frontier_table(result).titled("frontier:").text(),
        f"{rows} rows of {prompts} prompts, teacher-forced; brackets: 95% intervals, paired by prompt. "
        f"{measured_speedup(result)}",
        *filter(None, [match_left_out(result), rounding(result), times_noise(result)]),
        *result["notes"],
    ]
    return "\n\n".join(blocks) + "\n"


def write(result: dict[str, Any], folder: Path, about: dict[str, str]) -> None:
    """Write ``ablation.json`` and ``ablation.html`` into ``folder``, each whole or not at all."""
    write_json(folder / JSON, result | {"about": about})
    write_text(folder / PAGE, _page(result, about))


def compared_table(result: dict[str, Any]) -> Table:
    """Table 3: the same depth pruned in every way."""
    rows = [[_named(row), *_figures(row), _minus_main(row)] for row in result["table3"]]
    header = [f"depth {result['depth']} of {result['layers']}", *_INTERVALS, f"KL minus {MAIN}"]
    return Table(header, rows).only(*_informative(result, header))


def shares_table(result: dict[str, Any]) -> Table:
    """Table 4: the share of the layers that is pruned, what is saved and what is lost."""
    rows = []
    for row in sorted(result["table4"], key=lambda row: (-row["depth"], UNTRAINED.index(row["projection"]))):
        shares = ", ".join(map(str, row["shares"]))
        rows.append([f"{shares}%", str(row["depth"]), row["projection"], *_times(row), *_figures(row)])
    names = ["pruned", "depth", "projection"]
    return Table([*names, *_TIMES, *_INTERVALS], rows, (0, 2)).only(*names, *_informative(result, _SHORT))


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
    return Table([*names, *_TIMES, *_INTERVALS], rows, (), chosen).only(*names, *_informative(result, _SHORT))


def conditions(result: dict[str, Any]) -> str:
    """What the rows of Table 3 have in common, and how ``lora`` and ``full`` were trained."""
    settings, names = result["settings"], [row["name"] for row in result["table3"]]
    pruned = listed(range(result["depth"], result["layers"]))
    parts = [
        f"Pruned layers, counted from 0: {pruned}, unless others follow a row's name.",
        f"Boundary: {in_words(settings['boundary'])}.",
    ]
    if any(name.endswith(", salient") for name in names):
        parts.append(f"Salient tokens: {in_words(settings['salient'])}.")
    if "POP, lora" in names:
        parts.append(
            f"lora and full: {count(settings['train_steps'], 'training step')} on the fit rows, started from {MAIN}, "
            f"peak learning rate {settings['learning_rate']:g}, rank {settings['lora']['r']} of lora."
        )
    return " ".join(parts)


def intervals(result: dict[str, Any]) -> str:
    """How intervals were computed, and what they leave out."""
    return (
        f"Means are over prompts, and brackets are {confidence(result['confidence'])} intervals of the difference from "
        f"the full model (in the last column of the first table from POP, {MAIN}), paired by prompt: Bonett and Price "
        "where every prompt counts 0 or 1, Clopper and Pearson for an agreement of 100%, Student's t otherwise. They "
        "cover which prompts are among these verify rows, but neither another split nor another fit, and each holds "
        "for itself, not for all rows of a table together."
    )


def measured_speedup(result: dict[str, Any]) -> str:
    """What the measured speedup is the ratio of."""
    settings = result["settings"]
    return (
        "Measured speedup: the full model's TTFT (time to first token) divided by the pruned model's, below 1x where "
        f"pruning is slower; {count(settings['batch'], 'prompt')} of {result['prompt_tokens']} random tokens, full and "
        f"pruned in turn after warm-up, the median of {count(settings['repeats'], 'round')}."
    )


def match_left_out(result: dict[str, Any]) -> str:
    """Says that exact match is not in the tables, where it is not; else empty."""
    if _match_counts(result):
        return ""
    return (
        f"Exact match is left out: the full model itself reproduces only {percent(_full_match(result))} of the "
        "responses."
    )


def rounding(result: dict[str, Any]) -> str:
    """Explains what the tables show in place of a figure that is rounding, where they do; else empty."""
    tables = compared_table(result), shares_table(result), frontier_table(result)
    if not any(_ROUNDED in row for table in tables for row in table.rows):
        return ""
    last = result["layers"] - 1
    exact = any(row["depth"] == last for row in result["frontier"])
    why = (
        f" Pruning only the last layer (depth {last}) changes nothing: its keys and values for the context are exact, "
        "and no later layer reads what it writes for context tokens."
    )
    return "A KL or a difference below 1e-6 nats is within rounding." + why * exact


def times_noise(result: dict[str, Any]) -> str:
    """A warning if rounds of the same prefill vary so much that speedups are unreliable; else empty."""
    spreads = {
        f"at depth {row['depth']}, {Kept.of(row)} the {name} prefill": {
            "median": row["ttft"][f"{name}_ms"],
            "p90": row["ttft"][f"{name}_p90_ms"],
        }
        for row in result["frontier"]
        for name in ("full", "pruned")
    }
    if not (found := noise(spreads)):
        return ""
    return f"{found} Repeat on an idle machine, or with more --repeats than {result['settings']['repeats']}."


def _full_match(result: dict[str, Any]) -> float:
    return result["table3"][0]["exact_match"]["full"]


def _match_counts(result: dict[str, Any]) -> bool:
    return _full_match(result) >= LEAST_MATCH


def _informative(result: dict[str, Any], names: Sequence[str]) -> list[str]:
    """These columns, without those of an exact match that the full model itself hardly reaches."""
    return [name for name in names if name not in _MATCH or _match_counts(result)]


def _named(row: dict[str, Any]) -> str:
    """The name of a row, with the layers that are left out instead of what the plan prunes."""
    layers = row["removed"] or row["skipped"]
    return f"{row['name']} ({listed(layers)})" if layers else row["name"]


def _times(row: dict[str, Any]) -> list[str]:
    """The cells under :data:`_TIMES`."""
    return [ratio(row["counted"]), ratio(row["ttft"]["ratio"])]


def _figures(row: dict[str, Any]) -> list[str]:
    """The cells under :data:`_INTERVALS`."""
    match, agreement, kl = (row[name] for name in ("exact_match", "agreement", "kl"))
    if row.get("name") == "full model":
        return [percent(match["value"]), "", percent(1.0), "0"]
    low, high = (f"{100 * (1 + min(0.0, agreement[side])):.1f}" for side in ("low", "high"))
    return [
        percent(match["value"]),
        f"{_points(match['difference'])} [{_points(match['low'])}, {_points(match['high'])}]",
        f"{percent(agreement['value'])} [{low}, {high}]",
        _ROUNDED if kl["value"] < ROUNDING else _nats(kl | {"low": max(0.0, kl["low"])}),
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}" if share else "0.0"


def _minus_main(row: dict[str, Any]) -> str:
    """The cell of the difference from the method with :data:`MAIN` projections."""
    return "" if row["name"] == "full model" or row[MINUS_MAIN] is None else _nats(row[MINUS_MAIN])


def _nats(paired: dict[str, Any]) -> str:
    """A difference with its interval."""
    values = [paired[name] for name in ("difference", "low", "high")]
    if max(map(abs, values)) < ROUNDING:
        return _ROUNDED
    difference, low, high = (number(value, 2) for value in values)
    return f"{difference} [{low}, {high}]"


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
        main=MAIN,
        compared=compared_table(result),
        meanings=Table(["row", "what it is"], [[_named(row), row["what"]] for row in result["table3"]], (0, 1)),
        notes=list(filter(None, [match_left_out(result), rounding(result)])),
        conditions=conditions(result),
        intervals=intervals(result),
        measured_speedup=measured_speedup(result),
        noise=times_noise(result),
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
