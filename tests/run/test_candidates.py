"""Scoring decides which depths a run measures: from a base's weights to the curve in metrics.json."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pop_lightning.cli import fit
from pop_lightning.core.plan import Kept
from pop_lightning.models.decoder import Decoder
from pop_lightning.run.depths import ways
from pop_lightning.run.recipe import Data, Model, Recipe

from tests.helpers.families import COMMON, build
from tests.helpers.workbench import arguments, save_base, save_rows, save_tokenizer

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


# --- which tokens run in full -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "attention", "selects"),
    [("llama", None, True), ("llama", "flash_attention_2", False), ("llama4", None, False)],
)
def test_a_search_leaves_out_salient_tokens_where_the_base_cannot_run_them(family, attention, selects):
    recipe = Recipe(model=Model("x", attn_implementation=attention), data=Data("y"), salient="auto")
    found = ways(recipe, Decoder(build(family)), [1, 4])
    assert found[:2] == [Kept(1), Kept(4)]
    assert any(kept.salient for kept in found) == selects
    asked = Recipe(model=Model("x", attn_implementation=attention), data=Data("y"), boundary=1, salient=0.1)
    assert ways(asked, Decoder(build(family)), [1, 4]) == [Kept(1, 0.1)]  # refused by name later


@pytest.mark.full
def test_a_run_says_why_it_searches_no_salient_tokens(tmp_path):
    base, rows = save_base(tmp_path / "base", "llama4"), save_rows(tmp_path / "rows.jsonl")
    changes = {"salient": "auto", "budget__salient": [0, 0.2], "projection__kind": "reuse"}
    assert fit.main(arguments(base, rows, tmp_path / "run", **changes)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "salient" not in metrics
    assert metrics["decisions"][0].startswith("search: plans with salient tokens are left out: ")
    assert "scales its queries" in metrics["decisions"][0]
