"""The study of selectors: the oracle's scores, and that all ways agree where there is nothing to choose."""

import json

import pytest
import torch

from pop_lightning.core.plan import PruningPlan
from pop_lightning.data.batches import collate
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.positions import position_ids
from pop_lightning.pruning.passes import teacher_trace
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.studies.selection import WAYS, main, oracle_scores

from tests.fitting.test_projections import rows
from tests.helpers.families import build
from tests.helpers.workbench import save_base, save_rows


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_oracle_is_the_most_that_a_global_layer_of_the_full_model_pays(family):
    model, batch = build(family, attention="eager"), collate(rows(4), 0)
    decoder, mask, prompt, depth = Decoder(model), batch["attention_mask"], batch["prompt_length"], 2
    attentions = model(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids(mask), output_attentions=True
    ).attentions
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(attentions)
    asking = mask[:, prompt - 1 : -1, None].bool()
    expected = torch.stack(
        [
            (weights.amax(1)[:, prompt - 1 : -1, : prompt - 1] * asking).amax(1)
            for layer, weights in enumerate(attentions)
            if layer >= depth and kinds[layer] == "full_attention"
        ]
    ).amax(0)
    ours = oracle_scores(
        KVProjections(decoder, depth), PruningPlan(depth), teacher_trace(decoder, batch, depth), mask, prompt
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_every_way_is_measured_and_with_all_tokens_selected_each_is_the_full_model(tmp_path, capsys):
    base, data = save_base(tmp_path / "base"), save_rows(tmp_path / "rows.jsonl", rows=40)
    output = tmp_path / "selection.json"
    words = f"--base {base} --calibration {data} --depths [1] --tokens [2,900] --output {output}"
    assert main(words.split()) == 0
    entries = {(entry["salient"], entry["selector"]): entry for entry in json.loads(output.read_text())}
    assert set(entries) == {(0, "none"), *((number, way) for number in (2, 900) for way in WAYS)}
    for way in WAYS:
        assert entries[900, way]["kl"]["mean"] < 1e-6 < entries[2, way]["kl"]["mean"]
        assert entries[2, way]["speedup"] > entries[900, way]["speedup"]
    assert "oracle" in capsys.readouterr().out


def test_rows_of_another_file_can_be_measured(tmp_path):
    base, data = save_base(tmp_path / "base"), save_rows(tmp_path / "rows.jsonl", rows=40)
    others, output = save_rows(tmp_path / "others.jsonl", rows=40, seed=1), tmp_path / "selection.json"

    def measured(more: str) -> list[dict]:
        words = f"--base {base} --calibration {data} --depths [1] --tokens [2] --output {output} {more}"
        assert main(words.split()) == 0
        return json.loads(output.read_text())

    held_out = measured("")
    assert measured(f"--measured_on {data}") == held_out
    assert measured(f"--measured_on {others}")[0]["kl"] != held_out[0]["kl"]
