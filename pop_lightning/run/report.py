"""Show a run to a person: `report.html` for the browser and a plain table for the terminal.

The pipeline calls this file last, with the contents of `metrics.json` and `importance.json`. Nothing is measured or
decided here; a figure that is missing (no benchmark, no comparison) leaves its section out.
"""

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from pop_lightning.core.files import write_text
from pop_lightning.core.plan import Kept, in_order
from pop_lightning.core.plots import Theme, picture
from pop_lightning.core.tables import text_table
from pop_lightning.evaluation.bounds import rows_needed
from pop_lightning.evaluation.losses import metric_named, number, percent

DASH = "–"
NOISY = 0.2  # a p90 this share above the median is worth a warning


def write_report(metrics: dict[str, Any], importance: dict[str, Any], path: Path) -> None:
    """Write the self-contained page: one file, no script, no font, image or link from outside.

    Args:
        metrics: the contents of `metrics.json`. `arithmetic`, `ttft`, `comparison` and `verified` may be None or empty.
        importance: the contents of `importance.json`: `prefill` and `decode`, one value per layer; may be empty.
        path: where the page goes. It is written under a temporary name next to it and renamed, so that a reader never
            sees half a page.

    Raises:
        KeyError: a key of `metrics` is missing.
        OSError: the page cannot be written.
    """
    write_text(Path(path), _render(metrics, importance))


def print_table(metrics: dict[str, Any]) -> str:
    """The run as plain text for the terminal: what search and verify rows said, and what was chosen."""
    metric = metrics["budget"]["metric"]
    blocks = [
        text_table(
            ["depth", "projection", "KL", "agreement", "NLL increase", "loss", "bound"],
            [
                [
                    str(row["depth"]),
                    row["projection"],
                    number(row.get("kl")),
                    percent(row.get("agreement")),
                    number(row.get("nll_increase")),
                    amount(row.get("loss"), metric),
                    amount(row.get("bound"), metric),
                ]
                for row in _by_depth(metrics["curve"])
            ],
        )
    ]
    if metrics.get("verification"):
        blocks.append(
            text_table(
                ["verify rows: depth", "projection", "loss", "bound", "verdict"],
                [
                    [
                        str(row["depth"]),
                        _or_dash(row.get("projection")),
                        amount(row["value"], metric),
                        amount(row["bound"], metric),
                        verdict(row["passed"]),
                    ]
                    for row in metrics["verification"]
                ],
            )
        )
    if metrics.get("boundaries"):
        salient = _has_salient(metrics)
        blocks.append(
            text_table(
                [
                    f"boundary at depth {metrics['boundaries'][0]['depth']}",
                    *(["salient"] if salient else []),
                    "KL",
                    "agreement",
                    "loss",
                    "bound",
                    "counted",
                ],
                [
                    [
                        str(row["boundary"]),
                        *([str(row.get("salient", 0))] if salient else []),
                        number(row.get("kl")),
                        percent(row.get("agreement")),
                        amount(row.get("loss"), metric),
                        amount(row.get("bound"), metric),
                        ratio(row["speedup"]),
                    ]
                    for row in metrics["boundaries"]
                ],
                left=(),
            )
        )
    if metrics.get("comparison"):
        blocks.append(
            text_table(
                ["comparison", "depth", "exact match", "agreement", "KL"],
                [
                    [
                        row["name"],
                        str(_or_dash(row.get("depth"))),
                        percent(row.get("exact_match")),
                        percent(row.get("agreement")),
                        number(row.get("kl")),
                    ]
                    for row in metrics["comparison"]
                ],
                left=(0,),
            )
        )
    blocks.append(" ".join(filter(None, [headline(metrics), advice(metrics)])))
    return "\n\n".join(blocks) + "\n"


def headline(metrics: dict[str, Any]) -> str:
    """What came out, in one sentence."""
    budget, depth, layers = metrics["budget"], metrics["depth"], metrics["layers"]
    allowed = f"{amount(budget['max_drop'], budget['metric'])} at {confidence(budget['confidence'])} confidence"
    if depth is None:
        pruned = budget["min_pruned"]
        return (
            f"No depth qualified: none that prunes at least {count(pruned, 'layer')} of {layers} is shown to keep the "
            f"loss of {budget['metric']} within {allowed}; nothing was exported."
        )
    start = f"Context tokens run through {depth} of {layers} layers"
    if metrics.get("salient"):
        start += f", but for {tokens(metrics['salient'])} that are selected"
    if wanted := budget.get("speedup"):
        counted = metrics["arithmetic"]
        start = (
            f"{ratio(counted['ratio'])} counted at {count(counted['prompt_tokens'], 'prompt token')} "
            f"({ratio(wanted)} wanted): {start[0].lower()}{start[1:]}"
        )
    verified = metrics.get("verified")
    if not verified:
        return f"{start}; no verify split was opened, so the loss of {budget['metric']} carries no bound."
    metric = verified["metric"]
    condition = "" if _unconditional(budget) else f"; budget {amount(budget['max_drop'], budget['metric'])}"
    return (
        f"{start}{'; ' if wanted else ': '}the loss of {metric} is {amount(verified['value'], metric)}, and at most "
        f"{amount(verified['bound'], metric)} with {confidence(verified['confidence'])} confidence "
        f"({draws(verified)}{condition}){metric_named(metric).clipping(verified.get('cap'), verified.get('clipped'))}."
    )


def _has_salient(metrics: dict[str, Any]) -> bool:
    """Whether some row of the boundary table selects tokens, so that the number is shown."""
    return any(row.get("salient") for row in metrics.get("boundaries") or [])


def _unconditional(budget: dict[str, Any]) -> bool:
    """Whether a depth or a speedup was given, so that no loss was a condition."""
    return bool(budget.get("speedup") or budget.get("depth"))


def advice(metrics: dict[str, Any]) -> str:
    """What to change where the verify rows are too few to show that the budget is kept; empty where they are enough."""
    budget, smallest = metrics["budget"], metrics.get("smallest_certifiable_drop")
    if _unconditional(budget):
        return ""
    if smallest is None or smallest <= budget["max_drop"]:
        return _near_miss(metrics)
    verify = {"rows": metrics["rows"]["verify"], "prompts": (metrics.get("prompts") or {}).get("verify")}
    found = f"The {draws(verify)} can certify no drop below {amount(smallest, budget['metric'])}"
    if budget["max_drop"] <= 0:
        return f"{found}, and no number of rows certifies 0; raise budget.max_drop."
    needed = rows_needed(
        budget["max_drop"], metric_named(budget["metric"], budget.get("nll_cap")), budget["confidence"]
    )
    return f"{found}; give at least {needed} verify rows of different prompts, or raise budget.max_drop."


def _near_miss(metrics: dict[str, Any]) -> str:
    """A depth that kept the budget on the verify rows while its bound did not: more rows may show it."""
    failed = next((each for each in metrics.get("verification") or [] if not each["passed"]), None)
    budget = metrics["budget"]
    if metrics["depth"] is not None or failed is None or failed["value"] > budget["max_drop"]:
        return ""
    metric = budget["metric"]
    return (
        f"Depth {failed['depth']} lost {amount(failed['value'], metric)} on the verify rows, and "
        f"{count(failed['rows'], 'row')} cannot show that it is less than {amount(failed['bound'], metric)}; give more "
        "rows, or raise budget.max_drop."
    )


def noise(ttft: dict[str, Any] | None) -> str:
    """A warning where the times of one prefill spread so far that their ratio says little; else empty."""
    spreads = [
        (name, ttft[f"{name}_p90_ms"] / ttft[f"{name}_ms"] - 1)
        for name in ("full", "pruned")
        if ttft and ttft.get(f"{name}_p90_ms")
    ]
    name, spread = max(spreads, key=lambda each: each[1], default=("", 0.0))
    if spread <= NOISY:
        return ""
    return (
        f"The times are noisy: the {name} prefill's p90 lies {spread:.0%} above its median. Take the ratio as rough; "
        "pop-generate --benchmark on an idle machine gives a better one."
    )


def draws(found: dict[str, Any]) -> str:
    """`600 verify rows`, and of how many prompts where some prompt has several."""
    rows, prompts = count(found["rows"], "verify row"), found.get("prompts")
    return rows if prompts in (None, found["rows"]) else f"{rows} of {count(prompts, 'prompt')}"


def verdict(passed: bool | None) -> str:
    """What a verify row of the table says; `measured` where no budget was a condition."""
    return {True: "passed", False: "failed", None: "measured"}[passed]


def ratio(value: float | None) -> str:
    """A speedup: `1.52x`."""
    return DASH if value is None else f"{value:.2f}x"


def amount(value: float | None, metric: str) -> str:
    """A loss, drop or bound in the metric's own unit."""
    return metric_named(metric).amount(value)


def confidence(value: float) -> str:
    """0.95 as 95%, 0.999 as 99.9%."""
    return f"{100 * value:.6g}%"


def count(value: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def tokens(value: int | float) -> str:
    """A number of tokens, or a share of the prompt: `1 prompt token`, `5% of the prompt`."""
    return f"{100 * value:.3g}% of the prompt" if isinstance(value, float) else count(value, "prompt token")


def flops(value: float | None) -> str:
    """Floating-point operations with an SI prefix."""
    if value is None:
        return DASH
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:,.0f} FLOP"


def milliseconds(value: float | None) -> str:
    """A duration with three significant digits."""
    return DASH if value is None else f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _render(metrics: dict[str, Any], importance: dict[str, Any]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=number,
        percent=percent,
        amount=amount,
        flops=flops,
        ms=milliseconds,
        confidence=confidence,
        ratio=ratio,
        verdict=verdict,
        tokens=tokens,
    )
    template = environment.from_string(files("pop_lightning.run").joinpath("report.html.jinja").read_text("utf-8"))
    metric = metrics["budget"]["metric"]
    arithmetic, ttft = metrics.get("arithmetic") or None, metrics.get("ttft") or None
    chosen = next(
        (
            row
            for row in metrics["curve"]
            if row["depth"] == metrics["depth"] and row["projection"] == metrics.get("projection")
        ),
        None,
    )
    return template.render(
        metrics=metrics,
        budget=metrics["budget"],
        metric=metric,
        depth=metrics["depth"],
        layers=metrics["layers"],
        headline=headline(metrics),
        advice=advice(metrics),
        loss_name=metric_named(metric).what,
        chosen=chosen,
        verified=metrics.get("verified") or None,
        arithmetic=arithmetic,
        saved=1 - arithmetic["pruned_flops"] / arithmetic["full_flops"] if arithmetic else None,
        ttft=ttft,
        speedup=ttft["full_ms"] / ttft["pruned_ms"] if ttft else None,
        noise=noise(ttft),
        wanted=metrics["budget"].get("speedup"),
        unconditional=_unconditional(metrics["budget"]),
        boundaries=metrics.get("boundaries") or [],
        has_salient=_has_salient(metrics),
        frontier_plot=_frontier_plot(metrics),
        fewest=in_order(map(Kept.of, metrics.get("plans") or [metrics]))[0],
        comparison=metrics.get("comparison") or [],
        verification=metrics.get("verification") or [],
        decisions=metrics.get("decisions") or [],
        curve=_by_depth(metrics["curve"]),
        has_ridge=any(row.get("ridge") is not None for row in metrics["curve"]),
        has_steps=any(row.get("steps") for row in metrics["curve"]),
        rows=metrics["rows"],
        unusable=metrics["rows"].get("unusable") or {},
        versions=metrics.get("versions") or {},
        device=metrics.get("device"),
        importance=importance,
        importance_plot=_importance_plot(importance, metrics["depth"]) if importance else None,
        loss_plot=_loss_plot(metrics) if metrics["curve"] else None,
    )


def _by_depth(curve: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(curve, key=lambda row: (-row["depth"], row["projection"]))


def _or_dash(value: Any) -> Any:
    return DASH if value is None else value


def _importance_plot(importance: dict[str, Any], depth: int | None) -> Markup:
    def draw(axes: Axes, theme: Theme) -> None:
        stages = {stage: [float(value) for value in importance[stage]] for stage in ("prefill", "decode")}
        layers = len(stages["prefill"])
        positive = [value for values in stages.values() for value in values if value > 0 and math.isfinite(value)]
        low, high = (min(positive), max(positive)) if positive else (1e-3, 1.0)
        floor = low / 4
        if depth is not None and depth < layers:
            axes.axvspan(depth - 0.5, layers - 0.5, color=theme.band, linewidth=0)
            axes.text(
                layers - 0.45, high * 2.2, f"pruned in prefill (depth {depth})", color=theme.muted, ha="right", va="top"
            )
        for color, marker, (stage, values) in zip(theme.series, "os", stages.items(), strict=False):
            shown = [value if value > 0 else math.nan for value in values]
            axes.plot(range(layers), shown, marker=marker, markersize=4, linewidth=1.6, color=color, label=stage)
            # A log axis has no zero: an exact zero sits at the foot, hollow, and says what it is.
            for layer in (layer for layer, value in enumerate(values) if value == 0):
                axes.plot(layer, floor, marker="v", markersize=6, markerfacecolor="none", color=color, linewidth=0)
                axes.annotate(
                    "exactly 0",
                    (layer, floor),
                    (-7, 0),
                    textcoords="offset points",
                    color=theme.muted,
                    ha="right",
                    va="center",
                )
        axes.set_yscale("log")
        axes.set_ylim(floor / 1.6, high * 2.6)
        axes.set_xlim(-0.5, layers - 0.5)
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(12, max(1, layers))))
        axes.set_xlabel("layer")
        axes.set_ylabel("importance (log scale)")

    return picture(draw, "Importance per layer in prefill and decode")


def _loss_plot(metrics: dict[str, Any]) -> Markup:
    curve, metric, limit = metrics["curve"], metrics["budget"]["metric"], _limit(metrics)

    def draw(axes: Axes, theme: Theme) -> None:
        bounded = False
        for index, kind in enumerate(dict.fromkeys(row["projection"] for row in curve)):
            color = theme.series[index % len(theme.series)]
            rows = sorted((row for row in curve if row["projection"] == kind), key=lambda row: row["depth"])
            depths = [row["depth"] for row in rows]
            losses, bounds = ([_plotted(row.get(key)) for row in rows] for key in ("loss", "bound"))
            axes.plot(depths, losses, marker="o", markersize=4, linewidth=1.6, color=color, label=kind)
            axes.plot(depths, bounds, linewidth=1.1, linestyle=(0, (3, 2)), color=color)
            bounded = bounded or any(math.isfinite(bound) for bound in bounds)
        if bounded:
            axes.plot([], [], linewidth=1.1, linestyle=(0, (3, 2)), color=theme.muted, label="upper bound")
        if limit is not None:
            axes.axhline(limit, color=theme.limit, linewidth=1.4, label=f"budget {amount(limit, metric)}")
        if metrics["depth"] is not None:
            axes.axvline(
                metrics["depth"], color=theme.muted, linewidth=1, linestyle=":", label=f"depth {metrics['depth']}"
            )
        threshold = _loss_axis(axes, metric, limit)
        values = [_plotted(row.get(key)) for row in curve for key in ("loss", "bound")]
        finite = [value for value in values if math.isfinite(value)] + [threshold]
        axes.set_ylim(min(0.0, *finite) - 0.06 * threshold, max(finite) * 1.4 + 0.06 * threshold)
        depths = sorted({row["depth"] for row in curve})
        if len(depths) <= 14:
            axes.xaxis.set_major_locator(FixedLocator(depths))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("depth: layers that context tokens run through")

    return picture(draw, "Loss against depth with upper bounds and the budget")


def _limit(metrics: dict[str, Any]) -> float | None:
    """The loss that the budget allows; None where no loss was a condition."""
    budget = metrics["budget"]
    return None if _unconditional(budget) else float(budget["max_drop"])


def _loss_axis(axes: Axes, metric: str, limit: float | None) -> float:
    """Make the y axis one of losses, linear up to the budget and logarithmic above it; returns where that changes."""
    threshold = limit or 1e-3
    axes.set_yscale("symlog", linthresh=threshold)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold))
    axes.yaxis.set_minor_locator(NullLocator())
    scale, sign = (100, "%") if metric_named(metric).rate else (1, "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{scale * value:.3g}{sign}")
    axes.set_ylabel(metric_named(metric).axis)
    return threshold


def _frontier_plot(metrics: dict[str, Any]) -> Markup | None:
    """Loss against counted speedup: pruning by depth only, and the best of all plans; None without other plans."""
    plans = [plan for plan in metrics.get("plans") or [] if plan["projection"] != "reuse"] or metrics.get("plans") or []
    if len({Kept.of(plan) for plan in plans}) < 2:
        return None
    fewest = in_order(map(Kept.of, plans))[0]
    by_depth = [plan for plan in plans if Kept.of(plan) == fewest]
    limit, metric = _limit(metrics), metrics["budget"]["metric"]

    def draw(axes: Axes, theme: Theme) -> None:
        for color, label, group in zip(theme.series, ("depth only", "all plans"), (by_depth, plans), strict=False):
            best = _staircase([(plan["speedup"], max(0.0, _plotted(plan["loss"]))) for plan in group])
            axes.plot(*zip(*best, strict=True), marker="o", markersize=4, linewidth=1.6, color=color, label=label)
        others = [plan for plan in plans if plan not in by_depth]
        axes.plot(
            [plan["speedup"] for plan in others],
            [max(0.0, _plotted(plan["loss"])) for plan in others],
            linestyle="", marker=".", color=theme.muted, label="measured plans",
        )  # fmt: skip
        if limit is not None:
            axes.axhline(limit, color=theme.limit, linewidth=1.4, label=f"budget {amount(limit, metric)}")
        axes.set_ylim(bottom=-0.06 * _loss_axis(axes, metric, limit))
        axes.set_xlabel("counted speedup of the prefill")

    return picture(draw, "Loss against counted speedup: depth only, and all plans")


def _staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (speedup, loss) that no other one beats in both, by speedup."""
    kept: list[tuple[float, float]] = []
    for speedup, loss in sorted(points, key=lambda point: (-point[0], point[1])):
        if not kept or loss < kept[-1][1]:
            kept.append((speedup, loss))
    return kept[::-1]


def _plotted(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan
