"""Show a run to a person: ``report.html`` for the browser and a plain table for the terminal.

The pipeline calls this file last, with the contents of ``metrics.json`` and ``importance.json``. Nothing is measured or
decided here; a figure that is missing (no benchmark, no comparison) leaves its section out.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pop_lightning.core import clock
from pop_lightning.core.files import write_text
from pop_lightning.core.numbers import DASH, confidence, count, flops, milliseconds, number, percent, ratio
from pop_lightning.core.pages import render
from pop_lightning.core.plan import Kept, in_order, in_words
from pop_lightning.core.tables import Table
from pop_lightning.evaluation.bounds import rows_needed
from pop_lightning.evaluation.losses import metric_named
from pop_lightning.run.report_plots import frontier_plot, importance_plot, loss_plot


def write_report(metrics: dict[str, Any], importance: dict[str, Any], path: Path) -> None:
    """Write the self-contained page: one file, no script, no font, image or link from outside.

    The resolved ``recipe.yaml`` next to it is shown on it.

    Args:
        metrics: the contents of ``metrics.json``. ``arithmetic``, ``ttft``, ``comparison`` and ``verified`` may be None
            or empty.
        importance: the contents of ``importance.json``: ``prefill`` and ``decode``, one value per layer; may be empty.
        path: of the page. It is written under a temporary name next to it and renamed, so that a reader never
            sees half a page.

    Raises:
        KeyError: a key of ``metrics`` is missing.
        OSError: the page cannot be written.
    """
    recipe = Path(path).with_name("recipe.yaml")
    shown = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
    write_text(Path(path), _render(metrics, importance, shown))


def summary(metrics: dict[str, Any]) -> list[Table | str]:
    """The run for the terminal: tables of the measurements on search and verify rows, and the choice."""
    losses = ("KL", "agreement", "NLL increase", "loss", "bound")
    blocks: list[Table | str] = [_curve_table(metrics).only("depth", "projection", *losses).titled("search rows:")]
    if metrics.get("verification"):
        columns = ("depth", "projection", "loss", "bound", "verdict")
        blocks.append(_verification_table(metrics).only(*columns).titled("verify rows:"))
    if metrics.get("boundaries"):
        salient = ["salient"] * _has_salient(metrics)
        columns = ("boundary", *salient, "KL", "agreement", "loss", "bound", "counted speedup")
        depth = metrics["boundaries"][0]["depth"]
        blocks.append(_boundary_table(metrics).only(*columns).titled(f"search rows, depth {depth}:"))
    if metrics.get("comparison"):
        columns = ("comparison", "depth", "exact match", "agreement", "KL")
        blocks.append(_comparison_table(metrics).only(*columns).titled("search rows:"))
    blocks += filter(None, [speedups(metrics)])
    blocks.append(" ".join(filter(None, [headline(metrics), advice(metrics)])))
    return blocks


# --- tables -----------------------------------------------------------------------------------------------------------


def _losses(row: dict[str, Any], metric: str) -> list[str]:
    """The cells under :data:`_LOSSES`."""
    return [
        amount(row.get("loss"), metric),
        amount(row.get("bound"), metric),
        number(row.get("kl")),
        percent(row.get("agreement")),
        percent(row.get("exact_match")),
        number(row.get("nll_increase")),
    ]


_LOSSES = ["loss", "bound", "KL", "agreement", "exact match", "NLL increase"]


def _curve_table(metrics: dict[str, Any]) -> Table:
    curve, chosen = _by_depth(metrics["curve"]), _chosen(metrics)
    ridge = any(row.get("ridge") is not None for row in curve)
    steps = any(row.get("steps") for row in curve)
    rows = [
        [
            str(row["depth"]),
            row["projection"],
            *_losses(row, metrics["budget"]["metric"]),
            *([number(row.get("ridge"))] if ridge else []),
            *([str(row.get("steps") or DASH)] if steps else []),
            str(_or_dash(row.get("rows"))),
        ]
        for row in curve
    ]
    header = ["depth", "projection", *_LOSSES, *["ridge"] * ridge, *["steps"] * steps, "rows"]
    return Table(header, rows, (1,), tuple(at for at, row in enumerate(curve) if row is chosen))


def _verification_table(metrics: dict[str, Any]) -> Table:
    budget, verdicts = metrics["budget"], metrics["verification"]
    metric, allowed = budget["metric"], DASH if _unconditional(budget) else amount(budget["max_drop"], budget["metric"])
    rows = [
        [
            str(row["depth"]),
            row.get("projection") or DASH,
            amount(row["value"], metric),
            amount(row["bound"], metric),
            allowed,
            f"{row['rows']:,}",
            f"{row.get('prompts') or row['rows']:,}",
            _colored(row["passed"]),
        ]
        for row in verdicts
    ]
    header = ["depth", "projection", "loss", "bound", "budget", "rows", "prompts", "verdict"]
    return Table(header, rows, (1,), tuple(at for at, row in enumerate(verdicts) if row["depth"] == metrics["depth"]))


def _colored(passed: bool | None) -> Markup:
    return Markup('<span class="{}">{}</span>').format("fail" if passed is False else "pass", verdict(passed))


def _boundary_table(metrics: dict[str, Any]) -> Table:
    salient, found = _has_salient(metrics), metrics["boundaries"]
    rows = [
        [
            str(row["boundary"]),
            *([str(row.get("salient", 0))] if salient else []),
            *_losses(row, metrics["budget"]["metric"]),
            ratio(row["speedup"]),
        ]
        for row in found
    ]
    chosen = [at for at, row in enumerate(found) if metrics["depth"] is not None and Kept.of(row) == Kept.of(metrics)]
    return Table(["boundary", *["salient"] * salient, *_LOSSES, "counted speedup"], rows, (), tuple(chosen))


def _comparison_table(metrics: dict[str, Any]) -> Table:
    rows = [
        [
            row["name"],
            str(_or_dash(row.get("depth"))),
            percent(row.get("exact_match")),
            percent(row.get("agreement")),
            number(row.get("kl")),
            row["what"],
        ]
        for row in metrics["comparison"]
    ]
    return Table(["comparison", "depth", "exact match", "agreement", "KL", "description"], rows, (0, 5))


def _outcome_table(metrics: dict[str, Any]) -> Table:
    """What the chosen plan costs and saves, next to the full model."""
    verified, chosen, ttft = metrics.get("verified"), _chosen(metrics), metrics.get("ttft")
    rows = []
    if verified:
        metric = verified["metric"]
        loss, bound = amount(verified["value"], metric), amount(verified["bound"], metric)
        rows.append([f"loss of {metric}, verify rows", DASH, loss, f"bound {bound}"])
    if chosen:
        rows += [
            ["agreement, search rows", percent(1.0), percent(chosen.get("agreement")), DASH],
            ["KL to the full model, nats per token", "0", number(chosen.get("kl")), DASH],
            ["NLL increase, nats per token", DASH, number(chosen.get("nll_increase")), DASH],
        ]
    if counted := metrics.get("arithmetic"):
        full, pruned = counted["full_flops"], counted["pruned_flops"]
        prompt = count(counted["prompt_tokens"], "prompt token")
        rows.append([f"prefill arithmetic, {prompt}", flops(full), flops(pruned), f"{percent(1 - pruned / full)} less"])
    if ttft:
        prompt = f"TTFT, {count(ttft['prompt_tokens'], 'prompt token')}, batch {ttft['batch']}"
        times = [_time(ttft, "full"), _time(ttft, "pruned")]
        rows.append([prompt, *times, f"{ratio(ttft['full_ms'] / ttft['pruned_ms'])} as fast"])
    return Table(["", "full model", "pruned prefill", "difference"], rows)


def _time(ttft: dict[str, Any], which: str) -> str:
    p90 = ttft.get(f"{which}_p90_ms")
    return milliseconds(ttft[f"{which}_ms"]) + (f" (p90 {milliseconds(p90)})" if p90 is not None else "")


def _split_table(metrics: dict[str, Any]) -> Table:
    rows = metrics["rows"]
    used = {
        "fit": "fitting the projections",
        "tune": "choosing the ridge strength and other settings",
        "search": "comparing depths, deciding what to train and what to verify",
        "verify": "the bound on the loss of the chosen depth",
    }
    lines = [[name, DASH if rows.get(name) is None else f"{rows[name]:,}", use] for name, use in used.items()]
    lines += [["left out", f"{left:,}", reason] for reason, left in (rows.get("unusable") or {}).items()]
    return Table(["split", "rows", "used for"], lines, (0, 2))


# --- sentences --------------------------------------------------------------------------------------------------------


def headline(metrics: dict[str, Any]) -> str:
    """The result in one sentence."""
    budget, depth, layers = metrics["budget"], metrics["depth"], metrics["layers"]
    allowed = f"{amount(budget['max_drop'], budget['metric'])} at {confidence(budget['confidence'])} confidence"
    if depth is None:
        pruned = budget["min_pruned"]
        return (
            f"No depth qualified: none that prunes at least {count(pruned, 'layer')} of {layers} was shown to keep the "
            f"loss of {budget['metric']} within {allowed}; nothing was exported."
        )
    start = f"Context tokens run through {depth} of {layers} layers"
    if metrics.get("salient"):
        start += f", except for {in_words(metrics['salient'])} selected among them"
    if metrics.get("boundary", 1) not in (0, 1):
        start += f", the last {in_words(metrics['boundary'])} through all"
    if requested := budget.get("speedup"):
        counted = metrics["arithmetic"]
        start = (
            f"{ratio(counted['ratio'])} counted at {count(counted['prompt_tokens'], 'prompt token')} "
            f"({ratio(requested)} requested): {start[0].lower()}{start[1:]}"
        )
    verified = metrics.get("verified")
    if not verified:
        return f"{start}; no verify split was opened, so the loss of {budget['metric']} carries no bound."
    metric = verified["metric"]
    most, unadjusted = verified["bound"], ""
    if not _unconditional(budget):
        # Which depth is chosen depends on the bounds, so the chosen one's own bound holds less often than stated.
        most = budget["max_drop"]
        unadjusted = f"; {amount(verified['bound'], metric)} if no other depth had been tested"
    return (
        f"{start}{'; ' if requested else ': '}the loss of {metric} is {amount(verified['value'], metric)}, and at most "
        f"{amount(most, metric)} with {confidence(verified['confidence'])} confidence "
        f"({draws(verified)}{unadjusted}){metric_named(metric).clipping(verified.get('cap'), verified.get('clipped'))}."
    )


def speedups(metrics: dict[str, Any]) -> str:
    """The counted prefill speedup and, where the prefill was timed, the measured one; empty if neither is known."""
    counted, ttft = metrics.get("arithmetic"), metrics.get("ttft")
    if not counted:
        return ""
    start = f"Prefill of {count(counted['prompt_tokens'], 'prompt token')} at depth {counted['depth']}: "
    start += f"{ratio(counted['ratio'])} counted in operations"
    if not ttft:
        return f"{start}; not timed."
    times = f"{milliseconds(ttft['full_ms'])} to {milliseconds(ttft['pruned_ms'])}, {ttft['device']}"
    measured = f"{ratio(ttft['full_ms'] / ttft['pruned_ms'])} measured ({times})"
    return " ".join(filter(None, [f"{start}, {measured}.", noise(ttft)]))


def _has_salient(metrics: dict[str, Any]) -> bool:
    """Whether some row of the boundary table selects tokens, so that the number is shown."""
    return any(row.get("salient") for row in metrics.get("boundaries") or [])


def _unconditional(budget: dict[str, Any]) -> bool:
    """Whether a depth or a speedup was given, so that the loss was not limited."""
    return bool(budget.get("speedup") or budget.get("depth"))


def _limit(metrics: dict[str, Any]) -> float | None:
    """The loss that the budget allows; None where the loss was not limited."""
    budget = metrics["budget"]
    return None if _unconditional(budget) else float(budget["max_drop"])


def advice(metrics: dict[str, Any]) -> str:
    """What to change if there are too few verify rows to show that the budget is kept; empty if there are enough."""
    budget, smallest = metrics["budget"], metrics.get("smallest_certifiable_drop")
    if _unconditional(budget):
        return ""
    if smallest is None or smallest <= budget["max_drop"]:
        return _near_miss(metrics)
    verify = {"rows": metrics["rows"]["verify"], "prompts": (metrics.get("prompts") or {}).get("verify")}
    found = f"The {draws(verify)} cannot certify a drop below {amount(smallest, budget['metric'])}"
    if budget["max_drop"] <= 0:
        return f"{found}, and no number of rows certifies 0; raise budget.max_drop."
    needed = rows_needed(
        budget["max_drop"], metric_named(budget["metric"], budget.get("nll_cap")), budget["confidence"]
    )
    return f"{found}; provide at least {needed} verify rows with different prompts, or raise budget.max_drop."


def _near_miss(metrics: dict[str, Any]) -> str:
    """A depth that kept the budget on the verify rows while its bound did not: more rows may show it."""
    failed = next((each for each in metrics.get("verification") or [] if not each["passed"]), None)
    budget = metrics["budget"]
    if metrics["depth"] is not None or failed is None or failed["value"] > budget["max_drop"]:
        return ""
    metric, rows = budget["metric"], metrics["rows"]
    provide, chance = "more rows", ""
    if needed := failed.get("needed"):
        whole = needed * sum(rows[name] for name in ("fit", "tune", "search", "verify")) / rows["verify"]
        provide = (
            f"about {_rounded_up(needed):,} verify rows with different prompts, {_rounded_up(whole):,} rows in all"
        )
        chance = "That many are enough about half of the time, if they lose as much. "
    drop = math.ceil(failed["bound"] * 1e4) / 1e4
    below = drop < metric_named(metric, budget.get("nll_cap")).cap
    return (
        f"Depth {failed['depth']} lost {amount(failed['value'], metric)} on the verify rows, and "
        f"{count(failed['rows'], 'row')} cannot show that it is less than {amount(failed['bound'], metric)}; provide "
        f"{provide}, or raise budget.max_drop{f' to {drop:g} or more' if below else ''}. {chance}"
        "Rows of this run have been looked at: only a run on new rows certifies the result at the stated confidence."
    )


def _rounded_up(number: float) -> int:
    """``number`` rounded up to two digits."""
    step = 10 ** max(0, len(str(math.ceil(number))) - 2)
    return math.ceil(number / step) * step


def noise(ttft: dict[str, Any] | None) -> str:
    """A warning if the times of one prefill vary so much that their ratio is unreliable; else empty."""
    spreads = {
        f"the {name} prefill": {"median": ttft[f"{name}_ms"], "p90": ttft[f"{name}_p90_ms"]}
        for name in ("full", "pruned")
        if ttft and ttft.get(f"{name}_p90_ms")
    }
    advice = "Treat the ratio as a rough estimate; pop-generate bench on an idle machine gives a better one."
    return f"{found} {advice}" if (found := clock.noise(spreads)) else ""


def draws(found: dict[str, Any]) -> str:
    """``600 verify rows``, with the number of prompts where several rows share one."""
    rows, prompts = count(found["rows"], "verify row"), found.get("prompts")
    return rows if prompts in (None, found["rows"]) else f"{rows} of {count(prompts, 'prompt')}"


def verdict(passed: bool | None) -> str:
    """A verify row's verdict in words; ``measured`` where the loss was not limited."""
    return {True: "passed", False: "failed", None: "measured"}[passed]


def amount(value: float | None, metric: str) -> str:
    """A loss, drop or bound in the metric's own unit."""
    return metric_named(metric).amount(value)


def _render(metrics: dict[str, Any], importance: dict[str, Any], recipe: str | None) -> str:
    filters = {"amount": amount, "confidence": confidence, "ratio": ratio, "tokens": in_words}
    budget, depth = metrics["budget"], metrics["depth"]
    return render(
        "pop_lightning.run",
        "report.html.jinja",
        title="no depth qualified" if depth is None else f"depth {depth} of {metrics['layers']}",
        about=_about(metrics),
        filters=filters,
        metrics=metrics,
        budget=budget,
        depth=depth,
        layers=metrics["layers"],
        headline=headline(metrics),
        advice=advice(metrics),
        loss_name=metric_named(budget["metric"]).what,
        outcome=_outcome_table(metrics),
        arithmetic=metrics.get("arithmetic") or None,
        ttft=metrics.get("ttft") or None,
        noise=noise(metrics.get("ttft")),
        requested=budget.get("speedup"),
        unconditional=_unconditional(budget),
        loss_plot=loss_plot(metrics, _limit(metrics)) if metrics["curve"] else None,
        importance=importance,
        importance_plot=importance_plot(importance, depth) if importance else None,
        frontier_plot=frontier_plot(metrics, _limit(metrics)),
        fewest=in_order(map(Kept.of, metrics.get("plans") or [metrics]))[0],
        comparison=_comparison_table(metrics) if metrics.get("comparison") else None,
        boundaries=_boundary_table(metrics) if metrics.get("boundaries") else None,
        verification=_verification_table(metrics) if metrics.get("verification") else None,
        examples=metrics.get("examples"),
        decisions=metrics.get("decisions") or [],
        splits=_split_table(metrics),
        curve=_curve_table(metrics) if metrics["curve"] else None,
        recipe=recipe,
    )


def _about(metrics: dict[str, Any]) -> dict[str, str]:
    """What was run on what; ``about`` in ``metrics.json`` has the model, the data, the date and the command."""
    about = dict(metrics.get("about") or {})
    if metrics.get("device"):
        about["device"] = metrics["device"]
    if metrics.get("versions"):
        about["versions"] = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    return about


def _chosen(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The chosen plan's entry of the curve."""
    wanted = metrics["depth"], metrics.get("projection")
    return next((row for row in metrics["curve"] if (row["depth"], row["projection"]) == wanted), None)


def _by_depth(curve: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(curve, key=lambda row: (-row["depth"], row["projection"]))


def _or_dash(value: Any) -> Any:
    return DASH if value is None else value
