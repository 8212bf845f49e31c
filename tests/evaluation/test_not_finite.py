"""Models that overflow: a base that does is refused by the row, a pruned model that does has lost the row."""

import lightning
import pytest
import torch

from pop_lightning.core.errors import InputError
from pop_lightning.data.batches import collate
from pop_lightning.data.rows import Row
from pop_lightning.evaluation.evaluate import Evaluation
from pop_lightning.evaluation.metrics import LOST_NATS, prompt_losses
from pop_lightning.fitting.importance import ImportanceScoring
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.passes import teacher_trace
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import build

OVERFLOWS = 11  # the token on which activations leave float16's range


def rows():
    short = [Row((5, 6, 7 + i, 9), (8, 4), f"rows.jsonl line {i + 1}") for i in range(2)]
    return [*short, Row((5, 6, *([7] * 20), OVERFLOWS, 9), (8, 4), "rows.jsonl line 3")]


@pytest.fixture(scope="module")
def overflowing():
    """A healthy float32 model whose layer 0 adds about 4e4 to an input of about 4e4 on one token only."""
    model = build("llama")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[OVERFLOWS] = 4e4 * embedding[OVERFLOWS].sign()
        layer = model.model.layers[0].mlp
        # The gate is large where the normed input has this token's signs, so that up and down pass its signs on.
        signs = embedding[OVERFLOWS].sign()
        layer.gate_proj.weight.copy_(signs.expand_as(layer.gate_proj.weight))
        layer.up_proj.weight.copy_(signs.expand_as(layer.up_proj.weight))
        layer.down_proj.weight.copy_(40 * signs[:, None].expand_as(layer.down_proj.weight))
    return model


def validate(module, batch):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.validate(module, torch.utils.data.DataLoader([batch], batch_size=None), verbose=False)
    return module


def test_a_base_that_overflows_in_float16_is_refused_by_the_origin_of_the_row(overflowing):
    batch = collate(rows(), 0)
    decoder = Decoder(overflowing)
    teacher_trace(decoder, batch, 0)  # in float32 it is healthy
    half = Decoder(build("llama").half())
    half.model.load_state_dict(overflowing.state_dict())
    assert half.model(**half.inputs(collate(rows()[:2], 0))).logits.isfinite().all()
    modules = (
        Evaluation(half, {2: KVProjections(half, 2)}),
        ImportanceScoring(half),
        ImportanceScoring(half, gradient_checkpointing=True),
    )
    for module in modules:
        with pytest.raises(InputError, match=r"on rows\.jsonl line 3 are not finite.*float16.*model\.dtype"):
            validate(module, batch)


def test_a_head_that_overflows_is_refused():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.inf
    decoder = Decoder(model)
    with pytest.raises(InputError, match=r"logits on rows\.jsonl line 1 are not finite"):
        validate(Evaluation(decoder, {2: KVProjections(decoder, 2)}), collate(rows(), 0))


@pytest.mark.parametrize(("metric", "lost"), [("agreement", 1.0), ("exact_match", 1.0), ("nll_increase", LOST_NATS)])
def test_a_pruned_model_that_overflows_has_lost_every_metric(metric, lost):
    decoder = Decoder(build("llama"))
    model = decoder.model
    batch = collate(rows()[:2], 0)
    answered = decoder.response_logits(batch).argmax(-1)  # the base is right everywhere
    batch["input_ids"][:, batch["prompt_length"]] = answered[:, 0]
    batch["input_ids"][:, batch["prompt_length"] + 1] = decoder.response_logits(batch).argmax(-1)[:, 1]
    hidden = model.config.hidden_size
    maps = {
        layer: (torch.full((2 * decoder.kv_dim, hidden), torch.nan), torch.zeros(2 * decoder.kv_dim))
        for layer in range(3, decoder.num_layers)
    }
    broken = KVProjections(decoder, 2).replace(maps, "full")
    module = validate(Evaluation(decoder, {2: broken, 3: KVProjections(decoder, 3)}), batch)
    assert prompt_losses(module.rows("2"), metric).mean == pytest.approx(lost, rel=0.1)
    assert prompt_losses(module.rows("3"), metric).mean == pytest.approx(0, abs=1e-4)
