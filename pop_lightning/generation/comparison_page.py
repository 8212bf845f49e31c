"""The page and the table of a comparison on rows of one's own: measures, times, and the answers that changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from pop_lightning.core.clock import noise
from pop_lightning.core.numbers import number, percent, ratio
from pop_lightning.core.pages import render
from pop_lightning.core.plots import Theme, picture
from pop_lightning.core.tables import Table
from pop_lightning.generation.comparison import GROUPS, REPEATS, Measure, outcome, side_by_side
from pop_lightning.generation.generator import StageAwareGenerator

CHANGED, SAME = 100, 3  # rows on the page, at most


def render_page(
    summary: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    generator: StageAwareGenerator,
    about: Mapping[str, str],
) -> str:
    """The page of :func:`~pop_lightning.generation.batch.generate_file`'s result with ``compare``."""
    compared = summary["compared"]
    changed = sorted((record for record in records if not record["same_text"]), key=_order)
    same = [record for record in records if record["same_text"]]
    plan = generator.plan
    return render(
        "pop_lightning.generation",
        "comparison.html.jinja",
        title=f"{len(changed)} of {len(records)} answers changed",
        about={
            "model": f"{generator.name_or_path} ({generator.decoder.num_layers} layers, "
            f"{str(generator.dtype).removeprefix('torch.')})",
            "plan": f"depth {plan.depth}, {plan.kept}; {generator.projections.kind} projections",
            **about,
        },
        headline=headline(compared),
        groups=[(name, table(compared, measures), measures) for name, measures in _present(compared)],
        compared=compared,
        notes=notes(summary),
        times=times_table(compared) if "ttft" in compared else None,
        noise=times_noise(compared),
        times_plot=_times_plot([record for record in records if "ttft_ms" in record]),
        repeats=REPEATS,
        methods=sorted({each["method"] for each in compared.values() if isinstance(each, dict) and "method" in each}),
        changed=[side_by_side(record) for record in changed[:CHANGED]],
        changed_rows=len(changed),
        same=[side_by_side(record) for record in same[:SAME]],
        same_rows=len(same),
    )


def headline(compared: Mapping[str, Any]) -> str:
    """What pruning changed, in one sentence."""
    same = compared["same_text"]
    kept = same["rows"] - same["changed"]
    parts = [f"Both models wrote the same answer for {kept:,} of {same['rows']:,} rows"]
    match = compared.get("exact_match")
    if match and not _is_zero(match):
        parts.append(f"exact match {percent(match['pruned'])} pruned, {percent(match['full'])} in full")
    if times := compared.get("ttft"):
        parts.append(f"first token {ratio(times['ratio'])} as fast")
    return "; ".join(parts) + "."


def _present(compared: Mapping[str, Any]) -> list[tuple[str, tuple[Measure, ...]]]:
    """The measures that there are, by group, without those of :func:`_left_out`."""
    shown = {name: [each for each in group if each.name in compared] for name, group in GROUPS.items()}
    left_out = _left_out(compared)
    found = [(name, tuple(each for each in group if each not in left_out)) for name, group in shown.items()]
    return [(name, measures) for name, measures in found if measures]


def _left_out(compared: Mapping[str, Any]) -> list[Measure]:
    """Shares that are 0 for both models: running text is never continued as its author did, with or without pruning."""
    measures = (each for group in GROUPS.values() for each in group)
    return [each for each in measures if each.full and each.unit == "share" and _is_zero(compared.get(each.name))]


def _is_zero(entry: Mapping[str, Any] | None) -> bool:
    return entry is not None and entry["full"] == entry["pruned"] == 0


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables has to know of :func:`~pop_lightning.generation.batch.generate_file`'s result."""
    found = []
    if cut := summary["references_cut"]:
        references = "1 reference of the file is" if cut == 1 else f"{cut:,} references of the file are"
        found.append(
            f"{references} longer than --max_new_tokens {summary['max_new_tokens']} and compared up to there; "
            "pop-fit's figures count up to data.max_response_tokens."
        )
    if left_out := _left_out(summary["compared"]):
        names = ", ".join(measure.label for measure in left_out)
        found.append(f"Not shown: {names} (0 for both models on every row, which says nothing about pruning).")
    return found


def table(compared: Mapping[str, Any], measures: Sequence[Measure]) -> Table:
    """One line per measure: both values, their difference with its interval, and the rows that changed."""
    rows = []
    for measure in measures:
        entry = compared[measure.name]
        show = percent if measure.unit == "share" else number
        rows.append(
            [
                measure.label,
                show(entry["full"]),
                show(entry["pruned"]),
                _signed(entry["difference"], measure),
                _interval(entry, measure),
                f"{entry['changed']:,}",
                f"{entry['rows']:,}",
            ]
        )
    return Table(["measure", "full", "pruned", "pruned - full", "95% interval", "changed", "rows"], rows)


def text(summary: Mapping[str, Any]) -> str:
    """All tables of :func:`~pop_lightning.generation.batch.generate_file`'s result for the terminal."""
    compared = summary["compared"]
    blocks = [f"{name}\n{table(compared, measures).text()}" for name, measures in _present(compared)]
    blocks += ["\n".join(found)] if (found := notes(summary)) else []
    if "ttft" in compared:
        blocks.append(f"Time to first token\n{times_table(compared).text()}")
        if found := times_noise(compared):
            blocks.append(found)
    return "\n\n".join([*blocks, headline(compared)]) + "\n"


def _signed(value: float, measure: Measure) -> str:
    if measure.unit == "nats":
        return f"{'+' if value > 0 else ''}{number(value)}"
    return f"{100 * value + 0.0:+.2f}"


def _interval(entry: Mapping[str, Any], measure: Measure) -> str:
    return f"[{_signed(entry['low'], measure)}, {_signed(entry['high'], measure)}]" if "low" in entry else ""


def times_table(compared: Mapping[str, Any]) -> Table:
    times = compared["ttft"]
    interval = f"[{times['low']:.3f}, {times['high']:.3f}]" if "low" in times else ""
    row = [
        f"{times['full_ms']:.1f}",
        f"{times['pruned_ms']:.1f}",
        f"{times['ratio']:.3f}",
        interval,
        str(times["rows"]),
    ]
    return Table(["full, ms", "pruned, ms", "full / pruned", "95% interval", "rows"], [row], left=())


def times_noise(compared: Mapping[str, Any]) -> str:
    """A warning if rounds of the same prefill vary so much that the ratio is unreliable; else empty."""
    times = compared.get("ttft", {})
    names = [name for name in ("full", "pruned") if f"{name}_spread" in times]
    if not (found := noise({f"the {name} prefill": times[f"{name}_spread"] for name in names})):
        return ""
    return (
        f"{found} Treat the ratio as a rough estimate, and repeat on an idle machine; a small model on a CPU with "
        "OMP_NUM_THREADS=1."
    )


def _times_plot(timed: Sequence[Mapping[str, Any]]) -> Markup | None:
    if len(timed) < 2:
        return None

    def draw(axes: Axes, theme: Theme) -> None:
        tokens = [record["prompt_tokens"] for record in timed]
        for color, marker, key, label in zip(
            theme.series, "os", ("full_ttft_ms", "ttft_ms"), ("full model", "pruned"), strict=False
        ):
            values = [record[key] for record in timed]
            axes.plot(tokens, values, marker, markersize=4, color=color, label=label, alpha=0.8)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel("TTFT (ms)")

    return picture(draw, "Time to first token of both models against the prompt's length")


def _order(record: Mapping[str, Any]) -> tuple:
    return ("lost", "gained", "changed").index(outcome(record)), record["common_prefix"], record["row"]
