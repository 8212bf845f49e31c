"""Scoring decides which depths a run measures: from a base's weights to the curve in metrics.json."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pop_lightning.cli import fit

from tests.helpers.families import COMMON
from tests.helpers.workbench import arguments, save_rows, save_tokenizer

LAYERS = 12


def measured(tmp_path, quiet: range) -> list[int]:
    """The depths that a run with three candidates measures, of a base whose ``quiet`` layers add next to nothing."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON | {"num_hidden_layers": LAYERS}))
    with torch.no_grad():
        for layer in quiet:
            model.model.layers[layer].self_attn.o_proj.weight *= 1e-3
            model.model.layers[layer].mlp.down_proj.weight *= 1e-3
    folder = tmp_path / f"{quiet.start}-{quiet.stop}"
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    rows = save_rows(folder / "rows.jsonl")
    changes = {"budget__candidates": 3, "projection__kind": "reuse"}
    assert fit.main(arguments(folder / "base", rows, folder / "run", **changes)) == 0
    importance = json.loads((folder / "run" / "importance.json").read_text())["prefill"]
    assert max(importance[layer] for layer in quiet) < 1e-3 * min(importance[layer] for layer in range(quiet.start))
    return [entry["depth"] for entry in json.loads((folder / "run" / "metrics.json").read_text())["curve"]]


def test_candidates_lie_where_the_scores_of_this_model_rise(tmp_path):
    # Between the shallowest and the deepest pruning, the one that prunes all of what matters little.
    assert measured(tmp_path, range(3, LAYERS)) == [10, 3, 1]
    assert measured(tmp_path, range(8, LAYERS))[1] in (7, 8)
