"""Measures of the pruned model next to the full one on the same rows, each with a paired interval.

Three kinds, which never share a name: of *freely generated* answers (exact match, token F1, ROUGE-L, first-token
agreement, common prefix); *teacher-forced*, on the responses that rows have (agreement, NLL and KL, as in ``pop-fit``);
and *times* to the first token.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device

from pop_lightning.core.clock import alternate, spread
from pop_lightning.data.batches import collate
from pop_lightning.data.rows import Row
from pop_lightning.evaluation.answers import common_prefix, rouge_l, token_f1
from pop_lightning.evaluation.metrics import response_metrics
from pop_lightning.evaluation.paired import Paired, paired_interval, sameness_interval
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.pruning.passes import student_logits, teacher_pass

CONFIDENCE = 0.95
SHOWN = 600  # characters of a prompt on a page, its end
REPEATS, WARMUP = 3, 1  # timed rounds of a row's prefill, and untimed ones before them
ROUNDS = REPEATS + WARMUP


@dataclass(frozen=True)
class Measure:
    """One measure.

    Attributes:
        name: of the pruned model's value in a row's record.
        label: in tables.
        what: how it is computed, for a caption.
        full: name of the full model's value; None where the pruned model is compared with the full one itself.
        unit: ``share`` (0 to 1) or ``nats``.
    """

    name: str
    label: str
    what: str
    full: str | None = None
    unit: str = "share"


GROUPS: dict[str, tuple[Measure, ...]] = {
    "Against the references": (
        Measure("exact_match", "exact match", "the answer is the reference's text", "full_exact_match"),
        Measure("token_f1", "token F1", "F1 of the words, as in SQuAD", "full_token_f1"),
        Measure("rouge_l", "ROUGE-L", "F-measure of the longest common subsequence of words", "full_rouge_l"),
    ),
    "Against the full model's answers": (
        Measure("same_text", "same answer", "both models wrote the same text"),
        Measure("first_token_agreement", "first-token agreement", "both answers begin with the same token"),
        Measure("common_prefix", "common prefix", "share of the longer answer's tokens up to the first difference"),
        Measure("token_f1_to_full", "token F1", "of the pruned model's answer to the full model's"),
        Measure("rouge_l_to_full", "ROUGE-L", "of the pruned model's answer to the full model's"),
    ),
    "Teacher-forced, on the rows' responses": (
        Measure("agreement", "agreement", "share of response tokens where both find the same token most likely"),
        Measure("nll", "NLL", "negative log-likelihood of the response, nats per token", "full_nll", "nats"),
        Measure("kl", "KL", "of the full model's distribution to the pruned one's, nats per token", None, "nats"),
    ),
}


# --- one row ----------------------------------------------------------------------------------------------------------


def answers(full: Sequence[int], pruned: Sequence[int], full_text: str, pruned_text: str) -> dict[str, float]:
    """Measures of two freely generated answers, given as token ids without end tokens and as text."""
    return {
        "same_text": float(full_text == pruned_text),
        "first_token_agreement": float(full[:1] == pruned[:1]),
        "common_prefix": common_prefix(full, pruned),
        "token_f1_to_full": token_f1(pruned_text, full_text),
        "rouge_l_to_full": 1.0 if pruned_text == full_text else rouge_l(pruned_text, full_text),
    }


@torch.no_grad()
def teacher_forced(generator: StageAwareGenerator, rows: Sequence[Row], pad_token_id: int) -> list[dict[str, float]]:
    """``agreement``, ``nll``, ``full_nll`` and ``kl`` of every row; nothing for a row without a response."""
    having = [at for at, row in enumerate(rows) if row.response_ids]
    found: list[dict[str, float]] = [{} for _ in rows]
    if not having:
        return found
    decoder, plan = generator.decoder, generator.plan
    batch = collate([rows[at] for at in having], pad_token_id, generator.vision)
    batch = move_data_to_device(batch, generator.device)
    prompt, mask = batch["prompt_length"], batch["attention_mask"]
    trace, teacher = teacher_pass(decoder, batch, plan.depth)
    student = student_logits(generator.projections, plan, trace, mask, prompt)
    metrics = response_metrics(student, teacher, batch["input_ids"][:, prompt:], mask[:, prompt:])
    named = {"agreement": "agreement", "nll": "nll", "full_nll": "teacher_nll", "kl": "kl"}
    values = {name: metrics[source].tolist() for name, source in named.items()}
    for line, at in enumerate(having):
        found[at] = {name: each[line] for name, each in values.items()}
    return found


def ttft(
    generator: StageAwareGenerator, row: Row, pad_token_id: int, on_round: Callable[[], object] | None = None
) -> dict[str, Any]:
    """Milliseconds of one prefill of the row's prompt by itself, in rounds in which both models take turns.

    Args:
        on_round: called after each of the :data:`ROUNDS` rounds.

    Returns:
        The medians ``full_ttft_ms`` and ``ttft_ms``, and those of the single rounds as lists, ``full_ttft_rounds_ms``
        and ``ttft_rounds_ms``.
    """
    batch = collate([replace(row, response_ids=())], pad_token_id, generator.vision)
    inputs = generator.decoder.inputs(batch)

    def full():
        with generator.full_model():
            return generator.prefill(**inputs)

    runs = {"full_ttft": {"prefill": full}, "ttft": {"prefill": lambda: generator.prefill(**inputs)}}
    laps = alternate(runs, generator.device, REPEATS, WARMUP, on_round)
    rounds = {name: [total for total, _ in each] for name, each in laps.items()}
    return {f"{name}_ms": statistics.median(each) for name, each in rounds.items()} | {
        f"{name}_rounds_ms": each for name, each in rounds.items()
    }


def outcome(record: Mapping[str, Any]) -> str:
    """``same`` text, or what the change means: the reference was ``lost`` or ``gained``, or just ``changed``."""
    if record["same_text"]:
        return "same"
    matches = record.get("full_exact_match"), record.get("exact_match")
    return {(1, 0): "lost", (0, 1): "gained"}.get(matches, "changed")


def side_by_side(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row as ``answers.html.jinja`` shows it; what both answers have in front of their first difference is apart."""
    full, pruned, prompt = record["full_generated"], record["generated"], record["prompt"]
    common = "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(full, pruned, strict=False)))
    if full != pruned:
        common = common[: common.rfind(" ") + 1]  # differences begin with a word
    return {
        "origin": record["origin"],
        "outcome": outcome(record),
        "prompt": prompt if len(prompt) <= SHOWN else f"… {prompt[-SHOWN:]}",
        "reference": record.get("response"),
        "common": common,
        "full": full[len(common) :],
        "pruned": pruned[len(common) :],
        "prefix": record["common_prefix"],
    }


# --- all rows ---------------------------------------------------------------------------------------------------------


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The means over the rows that have a measure, with intervals of the difference pruned - full.

    Returns:
        ``confidence`` and, by the measure's name, ``rows``, ``full``, ``pruned``, ``difference``, ``changed`` (rows
        where both models differ) and, from two rows on, ``low``, ``high`` and ``method`` of the interval. ``ttft`` has
        ``rows``, the medians ``full_ms`` and ``pruned_ms``, ``ratio`` (full / pruned, the geometric mean over rows)
        with its interval, and ``full_spread`` and ``pruned_spread`` (``median`` and ``p90`` of all rounds, each divided
        by its row's median).
    """
    found: dict[str, Any] = {"confidence": CONFIDENCE}
    for measure in (each for group in GROUPS.values() for each in group):
        rows = [record for record in records if measure.name in record]
        if rows:
            found[measure.name] = _summarize(measure, rows)
    if timed := [record for record in records if "ttft_ms" in record]:
        found["ttft"] = _summarize_times(timed)
    return found


def _summarize(measure: Measure, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pruned = [row[measure.name] for row in rows]
    same = 0.0 if measure.unit == "nats" else 1.0  # what the full model would have next to itself
    full = [row[measure.full] for row in rows] if measure.full else [same] * len(rows)
    entry = {"rows": len(rows), "full": statistics.fmean(full), "pruned": statistics.fmean(pruned)}
    entry["difference"] = entry["pruned"] - entry["full"]
    entry["changed"] = sum(a != b for a, b in zip(full, pruned, strict=True))
    if len(rows) < 2:
        return entry
    if measure.full is None and measure.unit == "share":
        interval = sameness_interval(pruned, CONFIDENCE)
    else:
        interval = paired_interval(full, pruned, CONFIDENCE, rate=measure.unit == "share")
    if measure.name == "kl":
        interval = interval._replace(low=max(0.0, interval.low))
    return entry | _interval(interval)


def _summarize_times(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The interval is one of the mean log ratio, because ratios multiply."""
    full, pruned = ([row[name] for row in rows] for name in ("full_ttft_ms", "ttft_ms"))
    entry = {"rows": len(rows), "full_ms": statistics.median(full), "pruned_ms": statistics.median(pruned)}
    for name, key in (("full", "full_ttft"), ("pruned", "ttft")):
        # Rows from a journal of an older version have no rounds.
        shares = [lap / row[f"{key}_ms"] for row in rows for lap in row.get(f"{key}_rounds_ms", ())]
        if shares:
            found = spread(shares)
            entry[f"{name}_spread"] = {"median": found["median"], "p90": found["p90"]}
    logs = [math.log(value) for value in pruned], [math.log(value) for value in full]
    entry["ratio"] = math.exp(statistics.fmean(logs[1]) - statistics.fmean(logs[0]))
    if len(rows) < 2:
        return entry
    found = paired_interval(*logs, CONFIDENCE, rate=False)
    found = found._replace(low=math.exp(found.low), high=math.exp(found.high), method=f"{found.method}, of logarithms")
    return entry | _interval(found)


def _interval(paired: Paired) -> dict[str, Any]:
    return {"low": paired.low, "high": paired.high, "method": paired.method}
