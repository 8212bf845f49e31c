"""Formats a benchmark: tables for the terminal, and JSON, a plot and a page for the output folder.

Reads the plain data that ``benchmark.run`` returns; nothing is measured here.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from pop_lightning.core.clock import noise, spread
from pop_lightning.core.errors import InputError
from pop_lightning.core.files import write_json, write_text, write_whole
from pop_lightning.core.numbers import millions
from pop_lightning.core.pages import render
from pop_lightning.core.plots import Theme, picture
from pop_lightning.core.tables import Table

JSON, PLOT, PAGE = "benchmark.json", "benchmark.png", "benchmark.html"
ROUNDING = 0.0005  # half of the last digit that a share of a bound is shown with
PAIRS = (
    "Pairs are full, pruned. Peak memory is one prefill's, above the weights and projections. The ratio and "
    "the measured bound are medians of the rounds' own ratios; the change of decode is that of the two medians."
)


def table(result: dict[str, Any]) -> str:
    """The model and machine, two tables with one line per point (times, and rates and memory), and :func:`doubts`."""
    times, rates, found = times_table(result), rates_table(result), doubts(result)
    lengths = result["settings"]["default_lengths"]
    subject = [*_subject(result), *([f"lengths: {lengths}"] if lengths else [])]
    return "\n".join([*subject, "", times.text(), "", rates.text(), PAIRS, *filter(None, [found])]) + "\n"


def _subject(result: dict[str, Any]) -> list[str]:
    """What was measured and on what, a line each."""
    model, machine, settings = result["model"], result["machine"], result["settings"]
    return [
        f"{model['name']}: {model['class']}, {model['layers']} layers, {millions(model['parameters'])} "
        f"parameters, {model['dtype']}, {model['attn_implementation']} attention, {model['projection']} projections, "
        f"weights {model['weight_bytes'] / 1e6:.0f} MB",
        f"{machine['device']}, threads: {machine['threads']}; torch {machine['versions']['torch']}, transformers "
        f"{machine['versions']['transformers']}; boundary {settings['boundary']}, "
        f"salient {settings.get('salient', 0)}, medians of {settings['repeats']} rounds",
    ]


def times_table(result: dict[str, Any]) -> Table:
    header = ["batch", "tokens", "depth", "full TTFT (p90) ms", "pruned TTFT (p90) ms", "ratio", "measured bound"]
    return Table([*header, "reached", "counted bound"], [_times(point) for point in result["points"]], left=())


def rates_table(result: dict[str, Any]) -> Table:
    header = ["batch", "tokens", "depth", "tokens/s", "TFLOP/s", "peak MB", "projections MB", "decode ms/token"]
    return Table(header, [_rates(point) for point in result["points"]], left=())


def _place(point: dict[str, Any]) -> list[str]:
    return [str(point["batch"]), str(point["prompt_tokens"]), f"{point['depth']}/{point['layers']}"]


def _times(point: dict[str, Any]) -> list[str]:
    full, pruned = (point[name]["ttft_ms"] for name in ("full", "pruned"))
    return [
        *_place(point),
        f"{full['median']:.1f} ({full['p90']:.1f})",
        f"{pruned['median']:.1f} ({pruned['p90']:.1f})",
        f"{point['ratio']:.3f}",
        f"{point['bound']['measured']:.3f}",
        f"{100 * point['of_measured_bound']:.1f}%",
        f"{point['bound']['counted']:.3f}",
    ]


def _rates(point: dict[str, Any]) -> list[str]:
    full, pruned, decode = point["full"], point["pruned"], point.get("decode")
    return [
        *_place(point),
        f"{full['tokens_per_s']:.0f}, {pruned['tokens_per_s']:.0f}",
        f"{full['tflops_per_s']:.3g}, {pruned['tflops_per_s']:.3g}",
        f"{full['peak_bytes'] / 1e6:.1f}, {pruned['peak_bytes'] / 1e6:.1f}",
        f"{point['projection_bytes'] / 1e6:.1f}",
        f"{decode['full_ms_per_token']:.2f}, {decode['pruned_ms_per_token']:.2f} ({100 * decode['change']:+.1f}%)"
        if decode
        else "-",
    ]


def doubts(result: dict[str, Any]) -> str:
    """What shows that times varied, at the point where it is largest, and what to do; empty where nothing does.

    That is rounds that differ, a pruned prefill faster than the work that it cannot avoid, and more than was counted.
    """
    points = result["points"]
    places = [
        f"at batch {point['batch']}, {point['prompt_tokens']} tokens, depth {point['depth']}/{point['layers']} "
        if len(points) > 1
        else ""
        for point in points
    ]
    spreads = {}
    for at, point in zip(places, points, strict=True):
        spreads |= {f"{at}the {name} prefill": point[name]["ttft_ms"] for name in ("full", "pruned")}
        spreads[f"{at}the measured bound"] = point["bound"]["ms"]
    found, decoded = [noise(spreads)], _decode_noise(points, places)
    reached, at = max((point["of_measured_bound"], at) for point, at in zip(points, places, strict=True))
    if reached - 1 > ROUNDING:
        found.append(
            f"Times varied by at least {reached - 1:.1%}: {at}the pruned prefill reached {reached:.1%} of the measured "
            "bound, which it cannot exceed."
        )
    above, at, name = max(
        (value / point["bound"]["counted"] - 1, at, name)
        for point, at in zip(points, places, strict=True)
        for name, value in (("measured bound", point["bound"]["measured"]), ("ratio", point["ratio"]))
    )
    if above > ROUNDING:
        found.append(
            f"Times varied by about {above:.1%}, or the work that pruning leaves out takes longer per operation than "
            f"the rest: {at}the {name} is that much above the counted bound."
        )
    settings = result["settings"]
    more = [f"--repeats than {settings['repeats']}"] if any(found) else []
    more += [f"--decode_tokens than {settings['decode']}"] if decoded else []
    if not more:
        return ""
    return " ".join(filter(None, [*found, decoded, f"Repeat on an idle machine, or with more {' and '.join(more)}."]))


def _decode_noise(points: Sequence[dict[str, Any]], places: Sequence[str]) -> str:
    """As :func:`doubts`, of the single decode steps."""
    return noise(
        {
            f"{at}the {name} decode": spread(point["decode"][f"{name}_ms"])
            for at, point in zip(places, points, strict=True)
            if "decode" in point
            for name in ("full", "pruned")
        }
    )


def make_folder(folder: str | Path) -> Path:
    """Make the output folder before anything is measured, so that a missing permission does not waste an hour.

    Raises:
        InputError: it cannot be made or written.
    """
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise InputError(f"--output {folder} cannot be written ({error.strerror}); choose another folder.") from error


def write(result: dict[str, Any], folder: Path) -> None:
    """Write ``benchmark.json`` (everything, including all single timings) and ``benchmark.png`` into ``folder``.

    Each appears whole or not at all, and replaces that of an earlier run.
    """
    write_json(folder / JSON, result)
    write_whole(folder / PLOT, lambda path: figure(result).savefig(path, dpi=150))


def write_page(result: dict[str, Any], folder: Path, about: Mapping[str, str]) -> None:
    """Write ``benchmark.html``: the tables and the plots for a person.

    Args:
        about: how it was run.
    """
    write_text(folder / PAGE, _page(result, about))


def _page(result: dict[str, Any], about: Mapping[str, str]) -> str:
    longest = max(result["points"], key=lambda point: point["prompt_tokens"])
    (model, machine), lengths = _subject(result), result["settings"]["default_lengths"]
    plots = []
    for name, draw in _panels(result):

        def drawn(axes: Axes, theme: Theme, draw=draw) -> None:
            draw(axes)
            for kind in _kinds(theme.muted):
                axes.add_line(kind)
            axes.set_ylim(bottom=min(1.0, axes.get_ylim()[0]))

        plots.append((name, picture(drawn, f"Speedup of the prefill with its bounds, {name}")))
    return render(
        "pop_lightning.benchmark",
        "benchmark.html.jinja",
        title=f"{result['model']['name']}: benchmark",
        about={"model": model, "machine": machine} | ({"lengths": lengths} if lengths else {}) | dict(about),
        longest=longest,
        plots=plots,
        times=times_table(result),
        doubts=doubts(result),
        rates=rates_table(result),
        pairs=PAIRS,
        settings=result["settings"],
    )


def figure(result: dict[str, Any]) -> Figure:
    """Speedup over prompt length with both bounds; one panel per batch size, one color per depth.

    With one length and several depths the axis is the number of pruned layers, and a color is a batch size.
    """
    panels = _panels(result)
    drawing = Figure(figsize=(1.5 + 4.2 * len(panels), 4.2), layout="constrained")
    drawing.suptitle(
        f"{result['model']['name']}, {result['model']['dtype']}, {result['machine']['device']}",
        fontsize=10,
    )
    every = drawing.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, draw) in zip(every, panels, strict=True):
        axes.set_title(name, fontsize=10)
        draw(axes)
        axes.grid(alpha=0.3)
    first = drawing.axes[0]
    first.legend(handles=[*_kinds("0.3"), *first.get_legend_handles_labels()[0]], fontsize=8)
    first.set_ylim(bottom=min(1.0, first.get_ylim()[0]))  # 1 means no gain: the axis starts there
    for axes in drawing.axes[1:]:
        axes.set_ylabel("")
    return drawing


def _kinds(color: str) -> list[Line2D]:
    """What the styles of the lines mean."""
    return [
        Line2D([], [], color=color, marker="o", label="measured"),
        Line2D([], [], color=color, linestyle="--", marker="_", label="measured bound"),
        Line2D([], [], color=color, linestyle=":", marker="x", label="counted bound"),
    ]


def _panels(result: dict[str, Any]) -> list[tuple[str, Callable[[Axes], None]]]:
    """Name and drawing of every panel."""
    points = result["points"]
    by_depth = len({p["prompt_tokens"] for p in points}) == 1 and len({p["depth"] for p in points}) > 1
    key = "prompt_tokens" if by_depth else "batch"

    def draw(axes: Axes, value: int) -> None:
        here = [point for point in points if point[key] == value]
        if by_depth:
            _panel(axes, here, lambda p: p["layers"] - p["depth"], "batch", "batch {}")
            axes.set_xlabel("pruned layers")
        else:
            _panel(axes, here, lambda p: p["prompt_tokens"], "depth", "depth {}")
            axes.set_xscale("log", base=2)
            axes.set_xlabel("prompt tokens")
        axes.set_ylabel("plain TTFT / pruned TTFT")
        ticks = sorted({line for each in axes.get_lines() for line in each.get_xdata()})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())

    return [
        (f"{value} tokens" if by_depth else f"batch {value}", partial(draw, value=value))
        for value in sorted({point[key] for point in points})
    ]


def _panel(axes: Axes, points: list[dict[str, Any]], x, series: str, label: str) -> None:
    for index, value in enumerate(sorted({point[series] for point in points})):
        own = sorted((point for point in points if point[series] == value), key=x)
        at, color = [x(point) for point in own], f"C{index}"
        axes.plot(at, [p["ratio"] for p in own], "o-", color=color, label=label.format(value))
        axes.plot(at, [p["bound"]["measured"] for p in own], "--", marker="_", color=color)
        axes.plot(at, [p["bound"]["counted"] for p in own], ":", marker="x", color=color)
