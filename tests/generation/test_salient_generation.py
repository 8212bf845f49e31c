"""Every feature of ``generate`` with salient tokens: equal to plain passes over a mended cache, or refused by name."""

import copy
import itertools

import pytest
import torch
from transformers import QuantizedCache, StaticCache

from pop_lightning import InputError, PruningPlan

from tests.generation.test_generation import (
    ASSISTED,
    FEATURES,
    GREEDY,
    LONG,
    RoundedCache,
    base,
    compiled,
    repetitive,
)
from tests.helpers.families import EVERY, QUICK, WINDOW, greedy, ragged, relative
from tests.helpers.salient import (
    assert_same_caches,
    mended,
    mended_pass,
    most_read,
    pair,
    positions_of,
    projected_columns,
    reference_generate,
)
from tests.helpers.threads import at_once

__all__ = ["compiled"]
PLAN = PruningPlan(1, 3, 4)
ROWED = [family for family in EVERY if "llama4" not in (family, getattr(family, "values", [None])[0])]


def both(family, arguments, ids, mask, plan=PLAN, **ours):
    """What the generator writes, and what the plain model writes after a mended first forward."""
    model = base(family)
    generator, project = pair(model, plan)
    torch.manual_seed(0)
    written = generator.generate(input_ids=ids, attention_mask=mask, **arguments(), **ours)
    selected = most_read(
        base(family, "eager"), ids, mask, plan.depth, ids.shape[1] - plan.boundary, plan.salient, project
    )
    torch.manual_seed(0)
    return written, reference_generate(model, ids, mask, plan, project, selected, **arguments())


def cases(names, families=QUICK):
    return [(name, family) for name, family in zip(names, itertools.cycle(families))]


@pytest.mark.parametrize(("name", "family"), cases(FEATURES, ("gemma3", "qwen2", "mistral")))
def test_a_feature_of_generate_equals_a_mended_plain_pass(name, family):
    ids, mask = ragged([LONG] if name == "guidance" else [LONG, 9])
    assert torch.equal(*both(family, FEATURES[name], ids, mask))


@pytest.mark.parametrize(("name", "family"), cases(ASSISTED, ("mistral", "gemma3", "llama", "qwen2")))
def test_assisted_decoding_equals_a_mended_plain_pass(name, family):
    ids, mask = repetitive()
    assert torch.equal(*both(family, ASSISTED[name], ids, mask))


@pytest.mark.full
@pytest.mark.parametrize("family", ROWED)
def test_every_feature_equals_a_mended_plain_pass_in_full(family):
    for (name, feature), length in itertools.product(FEATURES.items(), (1, WINDOW, LONG)):
        ids, mask = ragged([length] if name == "guidance" else [length, max(1, length - 5)])
        plan = PruningPlan(1, min(3, max(1, length - 1)), 4)
        if length > plan.boundary:
            assert torch.equal(*both(family, feature, ids, mask, plan)), (name, length)
    for (name, feature), length in itertools.product(ASSISTED.items(), (5, WINDOW, LONG, 40)):
        ids, mask = repetitive(length)
        assert torch.equal(*both(family, feature, ids, mask)), (name, length)


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_inputs_embeds_equal_input_ids(family):
    model = base(family)
    generator, _ = pair(model, PLAN)
    ids, mask = ragged([LONG, 9])
    expected = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)[:, LONG:]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generator.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), expected)


def test_shares_count_the_rows_tokens_whatever_generate_is_given():
    model = base("llama")
    generator, _ = pair(model, PruningPlan(1, 0.2, 0.2))
    ids, mask = ragged([LONG, 9])
    expected = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    alone = generator.generate(input_ids=ids[1:, -9:], **GREEDY)
    assert torch.equal(expected[1, LONG:], alone[0, 9:])
    assert torch.equal(generator.generate(input_ids=ids, **GREEDY), expected)  # the mask is made of the pad tokens
    static = generator.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(static, expected)
    beams = generator.generate(input_ids=ids, attention_mask=mask, num_beams=2, **GREEDY)
    assert torch.equal(beams[1, LONG:], generator.generate(input_ids=ids[1:, -9:], num_beams=2, **GREEDY)[0, 9:])


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma3", "mistral", "llama"])
@pytest.mark.parametrize("length", [5, WINDOW, WINDOW + 1, LONG])
def test_static_caches_give_the_tokens_of_dynamic_ones(family, length):
    model = base(family)
    ids, mask = ragged([length, 2])
    generator, _ = pair(model, PLAN)
    expected = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    static = generator.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    assert torch.equal(static, expected)
    own = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(generator.generate(input_ids=ids, attention_mask=mask, past_key_values=own, **GREEDY), expected)


# The first use of quanto compiles an extension, for half a minute.
@pytest.mark.full
def test_a_quantized_cache_stores_the_true_keys_of_selected_tokens():
    pytest.importorskip("optimum.quanto")
    model = base("llama")
    ids, mask = ragged([LONG])
    generator, project = pair(model, PLAN, fitted=False)
    arguments = {"nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 8, "residual_length": 4}
    cache = QuantizedCache("quanto", model.config, **arguments)
    ours = generator.prefill(ids, mask, cache)
    _, exact = mended_pass(model, ids, mask, 1, projected_columns(mask, 3, generator.selected), project)
    plain = QuantizedCache("quanto", model.config, **arguments)
    for layer, held in enumerate(exact.layers):
        plain.update(held.keys, held.values, layer)
        for name in ("_quantized_keys", "_quantized_values"):
            a, b = (getattr(each.layers[layer], name).dequantize() for each in (ours.past_key_values, plain))
            assert ((a - b).abs() > 1e-5).float().mean() < 0.01  # a value next to an edge may round the other way


def test_a_cache_that_stores_rounded_values_is_filled_once():
    model = base("llama")
    ids, mask = ragged([LONG])
    generator, _ = pair(model, PLAN)
    rounded, plain = generator.prefill(ids, mask, RoundedCache()), generator.prefill(ids, mask)
    assert torch.equal(rounded.logits, plain.logits)  # a whole prompt attends to what it was given
    for a, b in zip(rounded.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(a.keys, (b.keys * 32).round() / 32)


def turns(model, plan, project, parts, reader):
    """A prompt read in parts, ``(ids, mask up to their end, boundary, salient)`` each: logits and the cache of all."""
    with mended(model, plan.depth, project) as cache:
        for ids, mask, boundary, salient in parts:
            context = mask.shape[1] - boundary
            whole = torch.zeros(len(ids), mask.shape[1], dtype=torch.long)
            past = mask.shape[1] - ids.shape[1]
            whole[:, past:] = ids
            selected = most_read(reader, whole, mask, plan.depth, context, salient, project, cache if past else None)
            projected = projected_columns(mask, boundary, selected)[:, past:]
            logits, _ = mended_pass(model, ids, mask, plan.depth, projected, project, cache)
        return logits, cache


@pytest.mark.parametrize("family", ROWED)
@pytest.mark.parametrize("static", [False, True])
def test_a_prefix_selects_among_its_own_tokens(family, static):
    model = base(family)
    generator, project = pair(model, PLAN)
    ids, mask = ragged([LONG])
    cache = StaticCache(config=model.config, max_cache_len=64) if static else None
    prefix = generator.prefill(ids[:, :14], mask[:, :14], cache, last=False).past_key_values
    assert generator.selected.shape == (1, PLAN.salient)
    ours = generator.prefill(ids[:, 14:], mask, prefix)
    share = -(-PLAN.salient * (LONG - 14) // LONG)
    assert generator.selected.shape == (1, share)
    assert generator.selected.min() >= 14
    parts = [(ids[:, :14], mask[:, :14], 0, PLAN.salient), (ids[:, 14:], mask, 3, share)]
    logits, expected = turns(model, PLAN, project, parts, base(family, "eager"))
    assert relative(ours.logits, logits) < 1e-5
    if not static:
        assert_same_caches(ours.past_key_values, expected, mask)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_second_turn_selects_among_its_new_tokens(family, static):
    model = base(family)
    generator, project = pair(model, PLAN)
    ids, mask = ragged([LONG, 9])
    cache = StaticCache(config=model.config, max_cache_len=80) if static else None
    arguments = GREEDY | {"return_dict_in_generate": True}
    first = generator.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **arguments)
    more, ones = ragged([11, 11], seed=3)
    whole = torch.cat([first.sequences, more], 1)
    whole_mask = torch.cat([mask, torch.ones_like(first.sequences[:, LONG:]), ones], 1)
    second = generator.generate(
        input_ids=whole, attention_mask=whole_mask, past_key_values=first.past_key_values, **arguments
    )
    read = first.sequences.shape[1] - 1
    share = -(-PLAN.salient * (whole.shape[1] - read) // whole.shape[1])
    eager = base(family, "eager")
    with mended(model, PLAN.depth, project) as held:
        selected = most_read(eager, ids, mask, 1, LONG - 3, PLAN.salient, project)
        mended_pass(model, ids, mask, 1, projected_columns(mask, 3, selected), project, held)
        answer = first.sequences[:, LONG:-1]
        known = whole_mask[:, :read]
        model(
            input_ids=answer, attention_mask=known, position_ids=positions_of(known)[:, LONG:], past_key_values=held,
            use_cache=True,
        )  # fmt: skip
        selected = most_read(eager, whole, whole_mask, 1, whole.shape[1] - 3, share, project, held)
        held.mend(projected_columns(whole_mask, 3, selected)[:, read:], positions_of(whole_mask)[:, read:])
        expected = model.generate(input_ids=whole, attention_mask=whole_mask, past_key_values=held, **GREEDY)
    assert torch.equal(second.sequences, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_chunks_of_a_prefill_each_select_their_share(family, cache):
    model, chunk = base(family), 12
    generator, project = pair(model, PLAN)
    ids, mask = ragged([LONG + 1, 16])
    length = ids.shape[1]
    ours = generator.generate(
        input_ids=ids, attention_mask=mask, prefill_chunk_size=chunk, cache_implementation=cache, max_new_tokens=6,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    parts = []
    for start in range(0, length, chunk):
        end = min(length, start + chunk)
        share = -(-PLAN.salient * (end - start) // length)
        parts.append((ids[:, start:end], mask[:, :end], max(0, end - max(start, length - 3)), share))
    logits, held = turns(model, PLAN, project, parts, base(family, "eager"))
    assert torch.equal(ours[:, length:], greedy(model, logits, held, mask, 6))


def test_one_prefix_serves_several_requests():
    model = base("gemma3")
    generator, _ = pair(model, PLAN)
    ids, mask = ragged([LONG])
    prefix = generator.prefill(ids[:, :14], last=False).past_key_values
    expected = generator.prefill(ids[:, 14:], mask, copy.deepcopy(prefix)).logits
    generator.prefill(ids[:, 14:] % 50 + 4, mask, copy.deepcopy(prefix))
    assert torch.equal(generator.prefill(ids[:, 14:], mask, prefix).logits, expected)


@pytest.mark.parametrize("other", [PruningPlan(1, 3), PruningPlan(1, 3, 5), PruningPlan(1, 3, 4, "recency")])
def test_a_cache_of_other_salient_tokens_is_refused(other):
    model = base("llama")
    ids, _ = ragged([LONG])
    prefix = pair(model, PLAN)[0].prefill(ids[:, :14], last=False).past_key_values
    with pytest.raises(InputError, match="another pruning plan"):
        pair(model, other)[0].prefill(ids[:, 14:], past_key_values=prefix)


# --- hooks, threads, compiled models ---------------------------------------------------------------------------------


def test_nothing_stays_attached_when_a_selection_fails(monkeypatch):
    model = base("llama")
    generator, _ = pair(model, PLAN)
    ids, mask = ragged([LONG])

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("pop_lightning.pruning.salient.choose", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with generator.full_model():
        plain = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(plain, model.generate(input_ids=ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_of_layers_that_run_twice_are_refused(name):
    model = base("llama", "eager")
    generator, _ = pair(model, PLAN)
    ids, mask = ragged([LONG])
    with pytest.raises(InputError, match=f"{name} needs boundary >= 1, salient 0"):
        generator.prefill(ids, mask, **{name: True})
    with pytest.raises(InputError, match=f"{name} needs boundary >= 1, salient 0"):
        generator.generate(ids, max_new_tokens=2, **{name: True})


def test_a_boundary_as_a_share_over_ragged_rows_is_refused_with_states_and_with_flash_attention():
    model = base("llama")
    generator, _ = pair(model, PruningPlan(1, 0.2))
    whole, _ = ragged([LONG, LONG])
    states = generator.prefill(whole, output_hidden_states=True).hidden_states
    assert states[-1].shape[1] == generator.plan.boundary_of(LONG)
    with pytest.raises(InputError, match="rows of different lengths a boundary that is not a share"):
        generator.prefill(*ragged([LONG, 9]), output_hidden_states=True)
    model.config._attn_implementation = "flash_attention_2"
    ids, mask = ragged([LONG, 9])
    with pytest.raises(InputError, match="a whole number for boundary"):
        generator.prefill(ids, mask)


def test_threads_select_for_themselves():
    model = base("gemma3")
    generator, _ = pair(model, PLAN)
    requests = [ragged([length, 7], seed) for seed, length in enumerate((LONG, 19, 31))]
    expected = []
    for ids, mask in requests:
        tokens = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        expected.append((tokens, generator.selected))

    def work(index):
        ids, mask = requests[index]
        for _ in range(3):
            tokens = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
            assert torch.equal(tokens, expected[index][0])
            assert torch.equal(generator.selected, expected[index][1])

    at_once(len(requests), work)


@pytest.mark.full
def test_a_compiled_model_selects_uncompiled_and_decodes_compiled(compiled):
    model = base("gemma3")
    ids, _ = ragged([LONG])
    generator, _ = pair(model, PLAN)
    expected = generator.generate(input_ids=ids, **GREEDY)
    model.forward = torch.compile(model.forward, backend=compiled)
    for _ in range(2):
        before = compiled.runs
        assert torch.equal(generator.generate(input_ids=ids, **GREEDY), expected)
        assert compiled.runs - before >= GREEDY["max_new_tokens"] - 1


def test_without_salient_tokens_a_plan_computes_what_it_always_did():
    model = base("llama")
    ids, mask = ragged([LONG, 9])
    plain = pair(model, PruningPlan(1, 3))[0].prefill(ids, mask)
    zero = pair(model, PruningPlan(1, 3, 0))[0]
    assert torch.equal(zero.prefill(ids, mask).logits, plain.logits)
    assert zero.selected is None
    assert PruningPlan(1, 3, 0).fingerprint == PruningPlan(1, 3).fingerprint
