"""Compares ways to select salient tokens at equal cost: none, random, recency, attention, learned, and two oracles.

    python -m pop_lightning.studies.selection --base bundled:facts-gemma3 \\
        --calibration bundled:facts-gemma3/calibration.jsonl --depths '[1,2,3]' --tokens '[5,20,40]'

Projections are the closed form, fitted on the rows' fit split; the figures are means over the verify split of every
seed, which nothing was fitted or chosen on, with 95% intervals over prompts, also of the difference to `attention` on
the same prompts. Two selections that no prefill can know show what a better selector could still gain: `oracle` is what
the full model's pruned layers read most from the response's positions, `gradient` what the pruned model's KL would fall
by, to first order, if a token's keys and values were true. All ways at one depth and number of tokens cost the same,
but for the probing token of `attention` and `learned`.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pop_lightning.core.kinds import SELECTORS
from pop_lightning.core.plan import PruningPlan
from pop_lightning.core.quiet import quiet_lightning
from pop_lightning.core.tables import text_table
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.fitting.selectors import SelectorFit, gains
from pop_lightning.models.attention import attention_weights, seen_from
from pop_lightning.models.decoder import Decoder, Trace
from pop_lightning.models.layer_parts import cut, each_table
from pop_lightning.models.loading import load_model, load_tokenizer
from pop_lightning.pruning.attach_check import check_decoder
from pop_lightning.pruning.flops import speedup
from pop_lightning.pruning.module import outside_inference, resting
from pop_lightning.pruning.passes import student_logits
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.studies.study import Settings, Split, mean_of_seeds, quiet_trainer, rows_of_study

Scores = Callable[[KVProjections, PruningPlan, Trace, Tensor, int], Tensor]
WAYS = ("random", "recency", "attention", "learned", "oracle", "gradient")


def random_scores(projections: KVProjections, plan: PruningPlan, trace: Trace, mask: Tensor, prompt: int) -> Tensor:
    """``[batch, context]``, seeded by the batch's hidden states, so that a repeated run gives the same."""
    seed = int(trace.hidden[plan.depth][0, -1].abs().sum().mul(1e6)) % 2**31
    return torch.rand(len(mask), plan.context_of(prompt), generator=torch.Generator().manual_seed(seed))


def gradient_scores(projections: KVProjections, plan: PruningPlan, trace: Trace, mask: Tensor, prompt: int) -> Tensor:
    """:func:`~pop_lightning.fitting.selectors.gains`, from inside inference mode."""
    with torch.inference_mode(False), resting(projections.decoder.model):
        copied = {"hidden": trace.hidden, "kwargs": trace.kwargs, "masks": trace.masks, "mask": mask}
        copied = outside_inference(copied)
        mask = copied.pop("mask")
        return gains(projections, plan, replace(trace, **copied), mask, prompt)


def oracle_scores(projections: KVProjections, plan: PruningPlan, trace: Trace, mask: Tensor, prompt: int) -> Tensor:
    """The largest attention that the full model's pruned layers pay to each context token from the response."""
    decoder = projections.decoder
    tokens, context, most = mask.shape[1] - 1, plan.context_of(prompt), None
    asking = torch.arange(prompt - 1, tokens).expand(len(mask), -1)
    real = mask[:, prompt - 1 : tokens].bool()[:, None, None, :, None]
    for layer in plan.pruned(decoder.num_layers):
        if decoder.window(layer) is not None:
            continue
        hidden = trace.hidden[layer][:, :tokens]
        tables = each_table(trace.kwargs[layer].get("position_embeddings"), lambda t: t.expand(len(mask), -1, -1))
        tables = cut(tables, slice(tokens))
        keys, _ = decoder.to_cache(layer, decoder.own_kv(layer, hidden), tables)
        seen = seen_from(decoder.parts[layer], asking, mask[:, :tokens])
        own = cut(tables, slice(prompt - 1, tokens))
        weights = attention_weights(decoder, layer, hidden[:, prompt - 1 :], own, asking, keys, seen)
        weights = (weights[..., :context] * real).amax((1, 2, 3))
        most = weights if most is None else most.maximum(weights)
    return most


class Selections(Evaluation):
    """An evaluation in which some variants select by given scores instead of their plan's selector."""

    def __init__(self, decoder: Decoder, variants: Mapping[str, Variant], scores: Mapping[str, Scores]):
        super().__init__(decoder, variants)
        self.scores = {id(variants[name]): function for name, function in scores.items()}

    def _logits(self, variant: Variant, trace: Trace, mask: Tensor, prompt: int) -> Tensor:
        if (function := self.scores.get(id(variant))) is None:
            return super()._logits(variant, trace, mask, prompt)
        scores = function(variant.projections, variant.plan, trace, mask, prompt)
        return student_logits(variant.projections, variant.plan, trace, mask, prompt, scores=scores)


def run(settings: Settings, tokens: Sequence[int], measured_on: str | None = None) -> list[dict[str, Any]]:
    """One entry for each depth, number of selected tokens and way to select them.

    Args:
        tokens: numbers of selected tokens.
        measured_on: rows to measure on instead of those that were held out, as ``settings.calibration``.

    Raises:
        InputError: base, rows or settings do not fit.
    """
    quiet_lightning()
    decoder = Decoder(load_model(settings.base).to(quiet_trainer().strategy.root_device))
    check_decoder(decoder)
    tokenizer = load_tokenizer(settings.base)
    rows = rows_of_study(settings, tokenizer, decoder)
    others = rows_of_study(replace(settings, calibration=measured_on), tokenizer, decoder) if measured_on else rows
    usual = int(torch.tensor([len(row.prompt_ids) for row in others]).median())
    measured: dict[tuple[int, int, str], list[tuple[Tensor, dict[str, Tensor]]]] = {}
    for seed in settings.report_seeds:
        split = Split(settings, decoder, rows, seed)
        variants, scores = {}, {}
        fitted = {at.depth: at.options[at.best()] for at in split.closed_form(sorted(settings.depths, reverse=True))}
        fit = SelectorFit(fitted, settings.boundary)
        split.validate("fitting selectors", fit, split.loader("fit"))
        for depth, projections in fitted.items():
            fit.solve(depth)
            variants[depth, 0, "none"] = Variant(PruningPlan(depth, settings.boundary), projections)
            for number in tokens:
                for way in WAYS:
                    selector = way if way in SELECTORS else "attention"
                    plan = PruningPlan(depth, settings.boundary, number, selector)
                    variants[depth, number, way] = Variant(plan, projections)
                scores[depth, number, "random"] = random_scores
                scores[depth, number, "oracle"] = oracle_scores
                scores[depth, number, "gradient"] = gradient_scores
        named = {str(key): variant for key, variant in variants.items()}
        evaluation = Selections(decoder, named, {str(key): function for key, function in scores.items()})
        measured_rows = Split(settings, decoder, others, seed) if measured_on else split
        split.validate(f"measuring {len(named)} variants on verify", evaluation, measured_rows.loader("verify"))
        for key in variants:
            measured.setdefault(key, []).append(evaluation.rows(str(key)))
    return [
        {"depth": depth, "salient": number, "selector": way}
        | {"speedup": speedup(decoder, PruningPlan(depth, settings.boundary, number), usual)}
        | {
            metric: mean_of_seeds([(rows["prompt"], rows[metric]) for rows in each])
            for metric in ("kl", "agreement", "exact_match")
        }
        | {
            f"{metric} - attention": mean_of_seeds(
                [
                    (rows["prompt"], rows[metric] - other[metric])
                    for rows, other in zip(each, measured[depth, number, "attention"], strict=True)
                ]
            )
            for metric in ("kl", "agreement", "exact_match")
            if way not in ("none", "attention")
        }
        for (depth, number, way), each in measured.items()
    ]


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries as text."""

    def shown(value: Mapping[str, float], scale: float, digits: int) -> str:
        return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(
            *(scale * value[name] for name in ("mean", "low", "high")), d=digits
        )

    return text_table(
        ["depth", "salient", "selector", "counted", "KL", "agreement %", "exact match %", "KL - attention's"],
        [
            [
                str(entry["depth"]),
                str(entry["salient"]),
                entry["selector"],
                f"{entry['speedup']:.2f}x",
                shown(entry["kl"], 1, 4),
                shown(entry["agreement"], 100, 1),
                shown(entry["exact_match"], 100, 1),
                shown(entry["kl - attention"], 1, 4) if "kl - attention" in entry else "",
            ]
            for entry in entries
        ],
        left=(2,),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m pop_lightning.studies.selection``; returns the exit code."""
    from pop_lightning.cli import run as guarded

    parser = argparse.ArgumentParser(description="Compare ways to select salient tokens at equal cost.")
    parser.add_argument("--base", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--measured_on", metavar="FILE", help="rows to measure on (default: held out from those)")
    parser.add_argument("--depths", type=json.loads, required=True, help="a list, such as [1,2]")
    parser.add_argument("--tokens", type=json.loads, default=[5, 20, 40], help="numbers of selected tokens")
    parser.add_argument("--boundary", type=int, default=1)
    parser.add_argument("--report_seeds", type=json.loads, default=[1], help="splits of the rows")
    parser.add_argument("--running_text", type=json.loads, help="[prompt, response] tokens that a text is cut into")
    parser.add_argument("--limit", type=int, help="use that many rows")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    options = vars(parser.parse_args(argv))
    tokens, output, measured_on = (options.pop(name) for name in ("tokens", "output", "measured_on"))

    def body() -> int:
        entries = run(Settings(output="", tuning_seeds=[], steps=0, **options), tokens, measured_on)
        print(table(entries))
        if output is not None:
            output.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        return 0

    return guarded("selection", body)


if __name__ == "__main__":
    raise SystemExit(main())
