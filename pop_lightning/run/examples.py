"""Example answers for the report: of search rows, those that pruning changes most and least, written by both models."""

from typing import Any

from pop_lightning.generation.batch import Answers
from pop_lightning.generation.comparison import side_by_side, teacher_forced
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models.loading import context_length
from pop_lightning.run.inputs import Run

COMPARED, MOST, LEAST = 16, 3, 2  # rows that are compared, and how many of both ends are shown
NEW_TOKENS = 32


def examples(run: Run, generator: StageAwareGenerator) -> dict[str, Any]:
    """Greedy answers of both models, as plain data.

    Returns:
        ``compared``, the number of search rows that were ranked by the KL on their response; ``new_tokens``, the most
        that an answer has; ``most`` and ``least``, rows of :func:`~pop_lightning.generation.comparison.side_by_side`.
    """
    rows, limit = run.data.rows_of("search")[:COMPARED], context_length(run.decoder.model)
    forced = []
    for start in range(0, len(rows), run.recipe.data.batch_size):
        group = rows[start : start + run.recipe.data.batch_size]
        forced += teacher_forced(generator, group, run.data.pad_token_id)
    ranked = sorted(range(len(rows)), key=lambda at: -forced[at]["kl"])
    least = max(0, min(LEAST, len(rows) - MOST))
    chosen = [rows[at] for at in ranked[:MOST] + ranked[len(ranked) - least :]]
    longest = max(len(row.prompt_ids) for row in chosen)
    new = min(NEW_TOKENS, run.recipe.data.max_response_tokens, *([limit - longest] if limit else []))
    answer = Answers(generator, run.data.tokenizer, new, compare=True)
    shown = [side_by_side(record) for row in chosen for record in answer([row])]
    return {"compared": len(rows), "new_tokens": new, "most": shown[:MOST], "least": shown[MOST:]}
