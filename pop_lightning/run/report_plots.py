"""The plots of a run's report: importance by layer, loss against depth, and the frontier of plans."""

import math
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, SymmetricalLogLocator

from pop_lightning.core.plan import Kept, in_order
from pop_lightning.core.plots import Theme, picture, staircase
from pop_lightning.evaluation.losses import metric_named


def importance_plot(importance: dict[str, Any], depth: int | None) -> Markup:
    """The contents of ``importance.json`` by layer; the layers above ``depth`` are marked."""

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
            # A log axis has no zero: an exact zero is drawn as a hollow mark at the bottom, with a label.
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


def loss_plot(metrics: dict[str, Any], limit: float | None) -> Markup:
    """The measured depths of ``metrics.json``; ``limit`` is the loss that the budget allows, if it limits any."""
    curve, metric = metrics["curve"], metrics["budget"]["metric"]

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
            axes.axhline(limit, color=theme.limit, linewidth=1.4, label=f"budget {metric_named(metric).amount(limit)}")
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


def frontier_plot(metrics: dict[str, Any], limit: float | None) -> Markup | None:
    """Loss against counted speedup: pruning by depth only, and the best of all plans; None without other plans."""
    plans = [plan for plan in metrics.get("plans") or [] if plan["projection"] != "reuse"] or metrics.get("plans") or []
    if len({Kept.of(plan) for plan in plans}) < 2:
        return None
    fewest = in_order(map(Kept.of, plans))[0]
    by_depth = [plan for plan in plans if Kept.of(plan) == fewest]
    metric = metrics["budget"]["metric"]

    def draw(axes: Axes, theme: Theme) -> None:
        for color, label, group in zip(theme.series, ("depth only", "all plans"), (by_depth, plans), strict=False):
            best = staircase([(plan["speedup"], max(0.0, _plotted(plan["loss"]))) for plan in group])
            axes.plot(*zip(*best, strict=True), marker="o", markersize=4, linewidth=1.6, color=color, label=label)
        others = [plan for plan in plans if plan not in by_depth]
        axes.plot(
            [plan["speedup"] for plan in others],
            [max(0.0, _plotted(plan["loss"])) for plan in others],
            linestyle="", marker=".", color=theme.muted, label="measured plans",
        )  # fmt: skip
        for plan in plans:
            if plan["depth"] == metrics["depth"] and Kept.of(plan) == Kept.of(metrics):
                place = plan["speedup"], max(0.0, _plotted(plan["loss"]))
                axes.plot(*place, linestyle="", marker="*", markersize=12, color=theme.ink, label="exported")
        if limit is not None:
            axes.axhline(limit, color=theme.limit, linewidth=1.4, label=f"budget {metric_named(metric).amount(limit)}")
        axes.set_ylim(bottom=-0.06 * _loss_axis(axes, metric, limit))
        axes.set_xlabel("counted speedup of the prefill")

    return picture(draw, "Loss against counted speedup: depth only, and all plans")


def _loss_axis(axes: Axes, metric: str, limit: float | None) -> float:
    """Scale the y axis for losses, linear up to the budget and logarithmic above it; returns where that changes."""
    threshold = limit or 1e-3
    axes.set_yscale("symlog", linthresh=threshold)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=threshold))
    axes.yaxis.set_minor_locator(NullLocator())
    scale, sign = (100, "%") if metric_named(metric).rate else (1, "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{scale * value:.3g}{sign}")
    axes.set_ylabel(metric_named(metric).axis)
    return threshold


def _plotted(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan
