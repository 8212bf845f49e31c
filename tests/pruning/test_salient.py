"""Salient tokens: the selection and the prefill against plain passes that a reader believes at sight."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pop_lightning import InputError, PruningPlan
from pop_lightning.models.positions import position_ids
from pop_lightning.pruning.passes import student_hidden, student_logits, teacher_trace

from tests.helpers.families import (
    ATTENTIONS,
    COMMON,
    EVERY,
    FAMILIES,
    QUICK,
    WINDOW,
    build,
    greedy,
    ragged,
    relative,
    take_all_experts,
)
from tests.helpers.salient import (
    LAYERS,
    assert_same_caches,
    mended_pass,
    pair,
    projected_columns,
    reference_prefill,
)

SCALED = ("llama4",)  # refused: queries are scaled by their position
ROWED = [family for family in EVERY if family not in SCALED and getattr(family, "values", [None])[0] not in SCALED]
OTHERS = [(family, attention) for family in FAMILIES if family not in SCALED for attention in ATTENTIONS[family]]
EDGES = [[1], [2], [3, 1], [4, 2, 1], [WINDOW, 3], [WINDOW + 1, WINDOW, 2], [3 * WINDOW + 1, WINDOW + 2, 5]]


@functools.cache
def shared(family, attention="eager", dtype=torch.float32, seed=0, exact=False):
    """One model for many cases, which none of them changes. ``exact``: a half-precision one's weights in float32."""
    model = build(family, attention, dtype, seed)
    if dtype == torch.bfloat16:
        take_all_experts(model)
    return model.float() if exact else model


def hooks(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def chosen(selected, mask):
    """Which tokens were selected, ``[batch, tokens]``."""
    return torch.zeros_like(mask).scatter(1, selected, 1) * mask


def compare(family, attention, fitted, depth, boundary, salient, lengths, steps=0):
    """Selection, logits and cache of a prefill are those of plain passes; with ``steps`` greedy tokens as well."""
    model, plan = shared(family, attention), PruningPlan(depth, boundary, salient)
    generator, project = pair(model, plan, fitted)
    ids, mask = ragged(lengths)
    selected, logits, cache = reference_prefill(model, ids, mask, plan, project, shared(family))
    ours = generator.prefill(ids, mask)
    if generator.selected is not None:
        assert torch.equal(chosen(generator.selected, mask), chosen(selected, mask))
    assert relative(ours.logits, logits) < 1e-5
    assert_same_caches(ours.past_key_values, cache, mask)
    if steps:
        arguments = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "eos_token_id": None}
        tokens = generator.generate(input_ids=ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]
        assert torch.equal(tokens, greedy(model, logits, cache, mask, steps))
    assert hooks(model) == 0


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("family", ROWED)
def test_prefill_and_generation_are_a_plain_pass_with_unselected_context_projected(family, fitted):
    compare(family, "eager", fitted, 1, 3, 4, [3 * WINDOW + 1, 2 * WINDOW, WINDOW + 2], steps=4)


@pytest.mark.parametrize(("family", "depth"), [("llama", 2), ("mistral", 1), ("gemma3", 3)])
@pytest.mark.parametrize("lengths", EDGES, ids=str)
def test_prompts_around_every_edge_under_sdpa(family, depth, lengths):
    compare(family, "sdpa", True, depth, 3, 4, lengths)


@pytest.mark.full
@pytest.mark.parametrize(("family", "attention"), OTHERS)
@pytest.mark.parametrize("boundary", [1, 4, 32])
def test_prompts_around_every_edge_in_full(family, attention, boundary):
    for depth, salient, lengths in itertools.product((1, 2, 3), (1, 5, 40), EDGES):
        compare(family, attention, bool(salient % 2), depth, boundary, salient, lengths, steps=3 * (depth == 1))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 3 * WINDOW), min_size=1, max_size=3),
    boundary=st.integers(1, 6),
    salient=st.integers(1, 9),
    depth=st.integers(1, LAYERS - 1),
    family=st.sampled_from(QUICK),
)
def test_any_lengths_boundary_and_number_of_salient_tokens(lengths, boundary, salient, depth, family):
    compare(family, "sdpa", True, depth, boundary, salient, lengths)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flex_attention_selects_and_computes_what_eager_attention_does(family):
    plan = PruningPlan(1, 3, 4)
    ids, mask = ragged([3 * WINDOW + 1, WINDOW + 2, 2])
    with torch.compiler.set_stance("force_eager"):
        flex = pair(build(family, "flex_attention"), plan)[0]
        ours = flex.prefill(ids, mask)
    model = shared(family)
    selected, logits, cache = reference_prefill(model, ids, mask, plan, pair(model, plan)[1])
    assert torch.equal(flex.selected[:2], selected[:2])
    assert relative(ours.logits, logits) < 1e-5
    assert_same_caches(ours.past_key_values, cache, mask)


@pytest.mark.parametrize("family", ROWED)
def test_in_bfloat16_the_error_is_that_of_a_plain_pass(family):
    plan, ours_error, plain_error = PruningPlan(1, 3, 4), 0.0, 0.0
    for seed in range(4):
        model = shared(family, "eager", torch.bfloat16, seed)
        exact = shared(family, "eager", torch.bfloat16, seed, exact=True)
        ids, mask = ragged([3 * WINDOW + 1, WINDOW + 2], seed)
        generator, project = pair(model, plan, seed=seed)
        logits = generator.prefill(ids, mask).logits.float()
        projected = projected_columns(mask, plan.boundary, generator.selected)  # near ties may fall another way
        expected, _ = mended_pass(exact, ids, mask, plan.depth, projected, pair(exact, plan, seed=seed)[1])
        plain, _ = mended_pass(model, ids, mask, plan.depth, projected, project)
        ours_error += (logits - expected).square().sum().item()
        plain_error += (plain.float() - expected).square().sum().item()
    assert ours_error <= 1.5**2 * plain_error


# --- how many, and which ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize(("boundary", "salient"), [(3, 4), (3, 0.2), (0.1, 4), (0.15, 0.3), (0.2, 0)])
def test_a_row_computes_the_same_whatever_it_is_batched_with(family, boundary, salient):
    generator, _ = pair(shared(family, "sdpa"), PruningPlan(1, boundary, salient))
    lengths = [3 * WINDOW + 1, 2 * WINDOW, 7, 2]
    ids, mask = ragged(lengths)
    together = generator.prefill(ids, mask)
    selected = generator.selected
    for row, length in enumerate(lengths):
        alone = generator.prefill(ids[row : row + 1, -length:], mask[row : row + 1, -length:])
        if salient and generator.selected is not None:
            own = chosen(selected, mask)[row, -length:]
            assert torch.equal(own, chosen(generator.selected, mask[row : row + 1, -length:])[0])
        assert relative(together.logits[row], alone.logits[0]) < 1e-5
        for ours, single in zip(together.past_key_values.layers, alone.past_key_values.layers, strict=True):
            held = min(length, single.keys.shape[-2])
            assert relative(ours.keys[row, :, -held:], single.keys[0, :, -held:]) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_context_tokens_selected_is_the_plain_model(family):
    model = shared(family, "sdpa")
    ids, mask = ragged([2 * WINDOW + 3, 5])
    ours = pair(model, PruningPlan(1, 2, 99))[0].prefill(ids, mask)
    plain = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=True)
    assert relative(ours.logits, plain.logits[:, -1:]) < 1e-5
    assert_same_caches(ours.past_key_values, plain.past_key_values, mask)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_recency_is_a_longer_boundary(family):
    model = shared(family, "sdpa")
    ids, mask = ragged([2 * WINDOW + 3, WINDOW + 1])
    ours = pair(model, PruningPlan(1, 2, 4, "recency"))[0].prefill(ids, mask)
    longer = pair(model, PruningPlan(1, 6))[0].prefill(ids, mask)
    assert relative(ours.logits, longer.logits) < 1e-5
    assert_same_caches(ours.past_key_values, longer.past_key_values, mask)


# --- teacher-forced passes -------------------------------------------------------------------------------------------


def rows(lengths=(17, 9), response=6):
    ids, mask = ragged(list(lengths))
    new = torch.randint(3, COMMON["vocab_size"], (len(ids), response), generator=torch.Generator().manual_seed(1))
    return ids, mask, torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("boundary", "salient"), [(3, 4), (0.2, 0.3), (0.2, 0)])
@pytest.mark.parametrize("family", ROWED)
def test_rerunning_only_the_pruned_layers_gives_the_generators_logits(family, boundary, salient, masks):
    model, plan = shared(family), PruningPlan(2, boundary, salient)
    generator, _ = pair(model, plan)
    ids, mask, row, row_mask = rows()
    batch = {"input_ids": row, "attention_mask": row_mask, "prompt_length": ids.shape[1]}
    trace = teacher_trace(generator.decoder, batch, plan.depth, masks)
    ours = student_logits(generator.projections, plan, trace, row_mask, ids.shape[1])
    output = generator.prefill(ids, mask)
    rest = model(
        input_ids=row[:, ids.shape[1] : -1],
        attention_mask=row_mask[:, :-1],
        position_ids=position_ids(row_mask)[:, ids.shape[1] : -1],
        past_key_values=output.past_key_values,
        use_cache=True,
    ).logits
    assert relative(ours, torch.cat([output.logits, rest], 1)) < 1e-5


@pytest.mark.parametrize(("boundary", "salient"), [(3, 4), (0.2, 0)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_with_checkpointing_are_those_without(family, boundary, salient):
    model, plan = shared(family, "sdpa"), PruningPlan(1, boundary, salient)
    generator, _ = pair(model, plan)
    projections = generator.projections.requires_grad_(True)
    ids, _, row, row_mask = rows()
    batch = {"input_ids": row, "attention_mask": row_mask, "prompt_length": ids.shape[1]}
    trace = teacher_trace(generator.decoder, batch, plan.depth)
    found = []
    for checkpoint in (False, True):
        hidden = student_hidden(projections, plan, trace, row_mask, ids.shape[1], checkpoint=checkpoint)
        gradients = torch.autograd.grad(hidden.square().sum(), list(projections.parameters()), allow_unused=True)
        found.append(torch.cat([each.flatten() for each in gradients if each is not None]))
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SCALED)
def test_queries_scaled_by_position_are_refused_by_layer(family):
    with pytest.raises(InputError, match="layer 1 scales its queries"):
        pair(build(family), PruningPlan(1, 1, 4), fitted=False)


def test_salient_tokens_without_a_boundary_are_refused():
    with pytest.raises(InputError, match="salient 4 needs a boundary of at least 1, found 0"):
        PruningPlan(1, 0, 4)


def test_an_unknown_selector_is_refused():
    with pytest.raises(InputError, match=r"unknown selector: 'luck'; expected one of attention"):
        pair(build("llama"), PruningPlan(1, 1, 4, "luck"), fitted=False)


def test_flash_attention_is_refused_even_where_it_is_chosen_later():
    model = build("llama")
    generator, _ = pair(model, PruningPlan(1, 1, 4), fitted=False)
    model.config._attn_implementation = "flash_attention_2"
    ids, mask = ragged([9])
    with pytest.raises(InputError, match=r"'flash_attention_2' does not take; use 'sdpa'"):
        generator.prefill(ids, mask)
    with pytest.raises(InputError, match="flash_attention_2"):
        pair(model, PruningPlan(1, 1, 4), fitted=False)
