"""Baselines and ablations: each is compared with a plain model whose layers were changed by hand."""

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from unittest.mock import patch

import lightning
import pytest
import torch
from transformers import DynamicCache

from pop_lightning import StageAwareGenerator
from pop_lightning.core.plan import PruningPlan
from pop_lightning.data.batches import collate
from pop_lightning.data.module import CalibrationData
from pop_lightning.evaluation.ablations import comparison, evenly_spaced, listed, other_layers
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.fitting.influence import BlockInfluence
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import end_tokens, load_model, load_tokenizer
from pop_lightning.pruning.passes import hidden_without_layers, student_logits, teacher_trace
from pop_lightning.pruning.projections import KVProjections

from tests.fitting.test_projections import rows
from tests.helpers.families import EVERY, build

LAYERS = 4


@contextmanager
def passing_through(model, layers, run=False):
    """Inside, these layers return their input; with ``run`` they run first, which fills the cache."""

    def forward(own):
        def identity(hidden_states, *args, **kwargs):
            output = own(hidden_states, *args, **kwargs) if run else hidden_states
            return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

        return identity

    with ExitStack() as stack:
        for layer in map(model.model.layers.__getitem__, layers):
            stack.enter_context(patch.object(layer, "forward", forward(layer.forward)))
        yield


def plain_logits(model, row, removed=(), skipped=(), boundary=1):
    """Of one row, at the positions that predict its response."""
    ids, prompt = torch.tensor([row.prompt_ids + row.response_ids]), len(row.prompt_ids)
    if removed:
        with passing_through(model, removed):
            return model(ids, use_cache=False).logits[0, prompt - 1 : -1]
    cache = DynamicCache(config=model.config)
    with passing_through(model, skipped, run=True):
        model(ids[:, : prompt - boundary], past_key_values=cache)
    return model(ids[:, prompt - boundary :], past_key_values=cache).logits[0, boundary - 1 : -1]


def our_logits(decoder, some, removed=(), skipped=(), boundary=1):
    batch = collate(some, 0)
    trace = teacher_trace(decoder, batch, 0)
    mask, prompt = batch["attention_mask"], batch["prompt_length"]
    plan = PruningPlan(LAYERS, boundary)
    return decoder.logits(hidden_without_layers(decoder, plan, trace, mask, prompt, removed=removed, skipped=skipped))


@pytest.mark.parametrize("left_out", [{"skipped": (0,)}, {"skipped": (1, 3)}, {"removed": (0, 2)}, {"removed": (1,)}])
@pytest.mark.parametrize("family", EVERY)
def test_layers_are_left_out_as_in_a_plain_model_whose_layers_do_nothing(family, left_out):
    model, some = build(family), rows(3)
    # Llama 4 scales queries by their position in the cache, which padding shifts in the plain model too.
    batches = [[row] for row in some] if family == "llama4" else [some]
    for boundary, batch in product((1, 3), batches):
        ours = our_logits(Decoder(model), batch, **left_out, boundary=boundary)
        for row, logits in zip(batch, ours, strict=True):
            plain = plain_logits(model, row, **left_out, boundary=boundary)
            torch.testing.assert_close(logits[: len(plain)], plain, rtol=1e-4, atol=1e-4)


def test_a_boundary_that_is_a_share_counts_each_rows_own_tokens():
    model, some = build("llama"), rows(3)
    ours = our_logits(Decoder(model), some, skipped=(1, 2), boundary=0.3)
    for row, logits in zip(some, ours, strict=True):
        plain = plain_logits(model, row, skipped=(1, 2), boundary=PruningPlan(1, 0.3).boundary_of(len(row.prompt_ids)))
        torch.testing.assert_close(logits[: len(plain)], plain, rtol=1e-4, atol=1e-4)


def test_skipping_the_last_layers_is_the_method_with_reused_projections():
    decoder, batch = Decoder(build("gemma3")), collate(rows(3), 0)
    trace, mask, prompt = teacher_trace(decoder, batch, 2), batch["attention_mask"], batch["prompt_length"]
    skipped = hidden_without_layers(decoder, PruningPlan(2), trace, mask, prompt, skipped=(2, 3))
    pop = student_logits(KVProjections(decoder, 2), PruningPlan(2), trace, mask, prompt)
    torch.testing.assert_close(decoder.logits(skipped), pop, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_block_influence_is_the_cosine_of_what_enters_and_leaves_a_layer(family):
    model, some = build(family), rows(5)
    module = BlockInfluence(model)
    loader = torch.utils.data.DataLoader(some, batch_size=2, collate_fn=lambda few: collate(few, 0))
    (logged,) = trainer(accelerator="cpu").validate(module, loader, verbose=False)
    cosines = [[] for _ in range(LAYERS)]
    handles = [
        layer.register_forward_hook(
            lambda _, args, output, mine=mine: mine.extend(
                torch.cosine_similarity(args[0], output[0] if isinstance(output, tuple) else output, dim=-1)[0].tolist()
            )
        )
        for layer, mine in zip(model.model.layers, cosines, strict=True)
    ]
    for row in some:
        model(torch.tensor([row.prompt_ids + row.response_ids]))
    for handle in handles:
        handle.remove()
    expected = [1 - sum(each) / len(each) for each in cosines]
    torch.testing.assert_close(module.influence, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert list(logged.values()) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_layers_of_least_influence_are_removed_and_as_many_are_skipped_elsewhere():
    decoder = Decoder(build("llama"))
    reuse = Variant(PruningPlan(2), KVProjections(decoder, 2))
    table = other_layers(reuse, [0.4, 0.1, 0.3, 0.2])
    assert table["ShortGPT"].variant.removed == (1, 3)
    assert table["first layers"].variant.skipped == (0, 1)
    assert table["evenly spaced layers"].variant.skipped == (1, 3)
    one = other_layers(replace(reuse, plan=PruningPlan(3), projections=KVProjections(decoder, 3)), [1, 2, 3, 0])
    assert [one[name].variant.skipped for name in ("first third", "every third layer")] == [(0,), (3,)]
    assert all(each.variant.is_ablation for each in one.values())
    assert evenly_spaced(12, 4) == (2, 5, 8, 11)
    assert evenly_spaced(5, 2) == (1, 4)
    assert listed((5, 8, 9, 10)) == "5, 8 to 10"
    assert listed((2, 3)) == "2, 3"


def test_a_comparison_leaves_out_one_part_of_the_method_at_a_time():
    decoder, plan = Decoder(build("llama")), PruningPlan(2, 3, 2)
    reuse = Variant(plan, KVProjections(decoder, 2))
    best = Variant(plan, KVProjections(decoder, 2))
    table = {name: each.variant for name, each in comparison({"reuse": reuse, "closed_form": best}, best).items()}
    assert table["full model"].plan.depth == LAYERS
    assert table["layers removed"].removed == (2, 3)
    assert table["no boundary handling"].plan == PruningPlan(2, 0)
    assert not table["no KV projection"].context_visible
    assert table["POP, closed_form"] is best
    assert [name for name, variant in table.items() if variant.is_ablation] == ["layers removed", "no KV projection"]


def test_exact_match_is_that_of_greedy_generation():
    model = load_model("bundled:facts-gemma3")
    tokenizer, decoder = load_tokenizer("bundled:facts-gemma3"), Decoder(model)
    data = CalibrationData("bundled:facts-gemma3/calibration.jsonl", tokenizer, limit=8, end_tokens=end_tokens(model))
    some, reuse = data.read_rows(), Variant(PruningPlan(2), KVProjections(decoder, 2))
    variants = {
        "pop": reuse,
        "no boundary": replace(reuse, plan=PruningPlan(2, 0)),
        "removed": replace(reuse, removed=(1, 9, 10)),
    }
    evaluation = Evaluation(decoder, variants)
    loader = torch.utils.data.DataLoader(some, batch_size=8, collate_fn=data.batch)
    trainer(accelerator="cpu").validate(evaluation, loader, verbose=False)
    order = sorted(some, key=lambda row: row.seed)
    batch = data.batch([replace(row, response_ids=()) for row in order])
    longest = max(len(row.response_ids) for row in order)

    def generated(generate):
        with torch.no_grad():
            output = generate(**decoder.inputs(batch), max_new_tokens=longest, do_sample=False)
        answers = output[:, batch["prompt_length"] :].tolist()
        return [
            tuple(ids[: len(row.response_ids)]) == row.response_ids for ids, row in zip(answers, order, strict=True)
        ]

    for name in ("pop", "no boundary"):
        found = generated(StageAwareGenerator(model, variants[name].plan).generate)
        assert evaluation.rows(name)["exact_match"].bool().tolist() == found
    with passing_through(model, variants["removed"].removed, run=True):
        assert evaluation.rows("removed")["exact_match"].bool().tolist() == generated(model.generate)


def trainer(**arguments):
    return lightning.Trainer(
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, **arguments
    )
