"""The model card of an artifact: what is pruned, what it was measured to cost, how to load it."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from pop_lightning.core.plan import PruningPlan, in_words
from pop_lightning.evaluation.losses import METRICS

PLACE = "path/to/this/folder"  # in the card until it is published; then the repository's id
_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
_COLUMNS = ("depth", "projection", "kl", "agreement", "nll_increase", "exact_match")
_PROMISE = ("metric", "value", "bound", "confidence", "rows", "prompts", "max_drop")  # what the template reads
_FILES = (".jsonl", ".json", ".txt", ".csv", ".parquet")


def model_card(
    plan: PruningPlan, kind: str, base: dict[str, Any], measured: dict[str, Any], recipe: dict[str, Any]
) -> str:
    """The model card, Markdown with the Hub's metadata: base model, data sets, and the verified figure as a result."""
    data = recipe.get("data") if isinstance(recipe.get("data"), dict) else {}
    sources = data.get("calibration") or []
    sources = [sources] if isinstance(sources, str) else [str(source) for source in sources]
    verified, curve = measured.get("verified"), measured.get("curve") or []
    title = f"Prefill-Only Pruning of {base['id']}"
    on_hub = _is_hub_id(base["id"])
    card_data = ModelCardData(
        library_name="pop-lightning",
        base_model=base["id"] if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        pipeline_tag="text-generation",
        tags=["prefill-only-pruning"],
        datasets=[source for source in sources if _is_hub_id(source)] or None,
        model_name=title if verified else None,
        eval_results=[_result(verified, sources, data.get("split"))] if verified else None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        title=title,
        plan=plan,
        boundary=in_words(plan.boundary),
        salient=in_words(plan.salient) if plan.salient else None,
        kind=kind,
        base=base,
        sources=sources,
        speedup=measured.get("speedup"),
        verified=dict.fromkeys(_PROMISE) | verified if verified else None,
        curve=curve,
        columns=[key for key in _COLUMNS if any(key in row for row in curve)],
        figure=_figure,
        clipping=_clipping(verified),
        place=PLACE,
    )
    return str(card)


def _result(verified: dict[str, Any], sources: list[str], split: str | None) -> EvalResult:
    """The verified figure in the Hub's own fields; the bound and what it rests on are arguments of the metric."""
    name = ", ".join(source if _is_hub_id(source) else Path(source).name for source in sources) or "calibration rows"
    return EvalResult(
        task_type="text-generation",
        dataset_type=sources[0] if len(sources) == 1 and _is_hub_id(sources[0]) else "calibration",
        dataset_name=f"{name} (held-out verify split)",
        dataset_split=split,
        metric_type=f"{verified.get('metric')}_loss",  # of which 0 is the best, unlike of the metric itself
        metric_name=f"loss of {verified.get('metric')} against the unpruned model",
        metric_value=verified.get("value"),
        metric_args={key: value for key, value in verified.items() if key not in _PROMISE[:2] and value is not None},
    )


def _clipping(verified: dict[str, Any] | None) -> str:
    known = METRICS.get((verified or {}).get("metric"))
    return "" if known is None else known.clipping(verified.get("cap"), verified.get("clipped"))


def _is_hub_id(name: str) -> bool:
    if name.endswith(_FILES):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
