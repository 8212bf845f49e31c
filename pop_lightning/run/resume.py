"""What a run may be resumed with: a key that no finished result depends on may change, such as a smaller batch.

What the base and the rows are is compared by their content (``pipeline.load``), so that a moved file or another
spelling of a path changes nothing. Keys that are named nowhere here change no result, or its rounding at most.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pop_lightning.core.errors import show

# By the files that a finished piece of work leaves in the output folder: what it is, and the keys that it depends on.
# A name that ends in a dot is a whole section.
_DEPENDS: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    ("state/data.json",): (
        "the rows were split with it",
        ("seed", "model.dtype", "data.splits.", "data.max_response_tokens"),
    ),
    ("importance.json",): ("layers were scored with it", ("importance.", "boundary")),
    ("state/closed_form-*", "state/fitted.json", "state/selector-*"): (
        "the closed form was fitted with it",
        ("projection.ridge", "projection.grouping", "projection.queries", "projection.refit", "projection.memory_gib",
         "boundary", "depth", "budget.candidates", "budget.min_pruned", "budget.speedup"),
    ),
    ("state/full-*", "state/lora-*", "checkpoints/*/last.ckpt"): (
        "projections were trained with it",
        ("projection.start", "projection.steps", "projection.learning_rate", "projection.temperature",
         "projection.warmup", "projection.decay", "projection.weight_decay", "projection.kv_match",
         "projection.hidden_match", "projection.batch_size", "boundary", "salient", "selector",
         "trainer.accumulate_grad_batches",
         "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm", "trainer.precision"),
    ),
    ("state/lora-*", "checkpoints/lora-*/last.ckpt"): ("adapters were trained with it", ("projection.lora.",)),
    ("state/verify.json", "artifact", "metrics.json"): (
        "the verify split was opened for it, and a second look would void its bound",
        ("budget.", "depth", "boundary", "salient", "selector", "projection.kind"),
    ),
}  # fmt: skip
# The tokens that run in full decide which depths reach a requested speedup, and so which were fitted.
_AT_A_SPEEDUP: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    ("state/closed_form-*", "state/fitted.json"): (
        "the closed form was fitted at the depths that it leads to", ("budget.boundaries", "salient", "budget.salient")
    ),
}  # fmt: skip
_FREE = {"importance.batch_size", "importance.gradient_checkpointing"}


def refused_changes(before: Mapping[str, Any], now: Mapping[str, Any], exists: Callable[[str], bool]) -> list[str]:
    """One piece of a sentence per changed key that a finished result depends on.

    Args:
        before: the recipe that the run was started with, as plain data; keys that one of the two lacks are not
            compared, other than a trainer's, which names only what differs from Lightning's defaults.
        now: the recipe to resume with.
        exists: whether the output folder has a file of that pattern.
    """
    before, now = _effective(before), _effective(now)
    known = [key for key in before | now if (key in before and key in now) or key.startswith("trainer.")]
    changed = [key for key in known if before.get(key) != now.get(key) and key not in _FREE]
    refused = {}
    speedup = any(recipe.get("budget.speedup") is not None for recipe in (before, now))
    for patterns, (reason, names) in (_DEPENDS | (_AT_A_SPEEDUP if speedup else {})).items():
        for key in changed:
            if any(key == name or (name.endswith(".") and key.startswith(name)) for name in names) and any(
                map(exists, patterns)
            ):
                refused[key] = f"{key} was {show(before.get(key))} and is {show(now.get(key))} ({reason})"
    return list(refused.values())


def _effective(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, those without an effect under the others' left out."""
    flat = dict(_flat(recipe))
    # Without a batch size of its own, training reads the other stages' one.
    flat["projection.batch_size"] = flat.get("projection.batch_size") or flat.get("data.batch_size")
    if flat.get("projection.grouping") != "auto":
        flat.pop("projection.memory_gib", None)
    if flat.get("boundary") != "auto":
        flat.pop("budget.boundaries", None)
    if flat.get("salient") != "auto":
        flat.pop("budget.salient", None)
    if not isinstance(flat.get("budget.candidates"), int):
        flat.pop("budget.min_pruned", None)
    return flat


def _flat(content: Mapping[str, Any], prefix: str = ""):
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and not key.startswith("trainer."):
            yield from _flat(value, f"{key}.")
        else:
            yield key, value
