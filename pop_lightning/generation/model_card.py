"""The model card of an artifact: what is pruned, what it was measured to cost, how to load it."""

import json
from typing import Any

from pop_lightning.core.plan import PruningPlan


def model_card(
    plan: PruningPlan, kind: str, base: dict[str, Any], measured: dict[str, Any], recipe: dict[str, Any]
) -> str:
    """The model card: what is pruned, what it was measured to cost, and how to load it. Markdown."""
    layers = base.get("layers")
    of = f" of {layers}" if layers else ""
    revision = f" at revision `{base['revision']}`" if base.get("revision") else ""
    head = [
        "---",
        "library_name: pop-lightning",
        f"base_model: {json.dumps(base['id'], ensure_ascii=False)}",
        "tags: [prefill-only-pruning]",
        "---",
        f"# Prefill-Only Pruning of {base['id']}",
        "",
        f"Context tokens run through the first **{plan.depth}{of} layers** only; decoding runs all of them "
        "([POP, arXiv 2602.03295](https://arxiv.org/abs/2602.03295)). The pruned layers' keys and values of the "
        f"context come from `{kind}` projections, and the last {plan.boundary} prompt token(s) run in full.",
        "",
        f"- Base: `{base['id']}`{revision} (`{base['class']}`). **Its weights are not in here**: they are loaded from "
        "where the base is, and a base with other weights is refused.",
    ]
    data = recipe.get("data", {}).get("calibration") if isinstance(recipe.get("data"), dict) else None
    if data:
        sources = [data] if isinstance(data, str) else data
        head.append(f"- Calibration data: {', '.join(f'`{source}`' for source in sources)}")
    if speedup := measured.get("speedup"):
        head.append(
            f"- Wanted was a prefill speedup of {_figure(speedup['wanted'])}: counted in operations it is "
            f"{_figure(speedup['counted'])} at {speedup['prompt_tokens']} prompt tokens."
        )
    load = [
        "",
        "## Load",
        "```python",
        "from pop_lightning import StageAwareGenerator",
        "generator = StageAwareGenerator.from_artifact(path)  # this folder; base=... for a base that lies elsewhere",
        "output = generator.generate(**inputs, max_new_tokens=64)",
        "```",
        "",
    ]
    return "\n".join([*head, *_verified(measured.get("verified")), *_curve(measured.get("curve"), plan, kind), *load])


def _verified(verified: dict[str, Any] | None) -> list[str]:
    if not verified:
        return []
    text = f"`{verified.get('metric')}`: measured {_figure(verified.get('value'))}"
    if verified.get("bound") is not None:
        text += f", loss at most {_figure(verified['bound'])} with {_figure(verified.get('confidence'))} confidence"
    prompts = verified.get("prompts")
    of = f" of {prompts} prompts" if prompts not in (None, verified.get("rows")) else ""
    text += f" on {verified.get('rows')} rows{of} that nothing was fitted or chosen on"
    if verified.get("max_drop") is not None:
        text += f" (budget: {_figure(verified['max_drop'])})"
    return ["", "## Verified", "", f"{text}."]


def _curve(curve: list[dict[str, Any]] | None, plan: PruningPlan, kind: str) -> list[str]:
    if not curve:
        return []
    columns = [
        key
        for key in ("depth", "projection", "kl", "agreement", "nll_increase", "exact_match")
        if any(key in row for row in curve)
    ]
    lines = ["", "## Measured depths", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in curve:
        mark = "**" if row.get("depth") == plan.depth and row.get("projection") == kind else ""
        cells = " | ".join(f"{mark}{_figure(row.get(key, ''))}{mark}" for key in columns)
        lines.append(f"| {cells} |")
    return lines


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
