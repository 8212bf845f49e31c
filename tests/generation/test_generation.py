"""Every feature of ``generate`` over the pruned prefill: equal to the two-pass reference, or refused by name."""

import copy
import functools
import importlib.util
import itertools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    QuantoConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TorchAoConfig,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.masks import tail_mask
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import (
    COMMON,
    EVERY,
    FAMILIES,
    MATRIX,
    QUICK,
    WINDOW,
    build,
    context_pass,
    first_forward_in_two_passes,
    greedy,
    mapped_kv,
    marked,
    ragged,
    random_maps,
    relative,
    two_pass,
    two_pass_generate,
)
from tests.helpers.threads import at_once

LAYERS = COMMON["num_hidden_layers"]
LONG = 3 * WINDOW + 2
GREEDY = {"do_sample": False, "max_new_tokens": 10}


def base(family, attention=None):
    """A seed at which every family writes varied tokens and others than its pruned self."""
    return build(family, attention, seed=2)


class FavourEvenTokens(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, ::2] += 1.0 + 0.01 * input_ids.shape[1]
        return scores


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Record(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


def generators(model, depth=1, boundary=1, kind="reuse"):
    """A generator, and the reference's ``generate`` with the same projections."""
    maps = random_maps(depth, model=model) if kind == "replaced" else {}
    projections = KVProjections(Decoder(model), depth)
    if maps:
        projections.replace(maps, "full")
    project = mapped_kv(model, maps)

    def reference(ids, mask, **arguments):
        if "assistant_model" in arguments or "prompt_lookup_num_tokens" in arguments:
            with first_forward_in_two_passes(model, ids.shape[1], depth, boundary, project):
                return model.generate(input_ids=ids, attention_mask=mask, **arguments)
        return two_pass_generate(model, ids, mask, depth, boundary, project=project, **arguments)

    return StageAwareGenerator(model, PruningPlan(depth, boundary), projections), reference


def repetitive(length=LONG, period=7):
    """A prompt in which prompt-lookup finds candidates at once."""
    ids = torch.arange(length) % period + 5
    return ids.unsqueeze(0), torch.ones(1, length, dtype=torch.long)


FEATURES = {
    "greedy": lambda: GREEDY,
    "sampling": lambda: {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "max_new_tokens": 10},
    "beam search": lambda: GREEDY | {"num_beams": 3, "length_penalty": 0.8},
    "beam sampling": lambda: {"do_sample": True, "num_beams": 2, "max_new_tokens": 8},
    "several beams returned": lambda: GREEDY | {"num_beams": 4, "num_return_sequences": 2},
    "several return sequences": lambda: {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8},
    "logits processors": lambda: (
        GREEDY
        | {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "logits_processor": LogitsProcessorList([FavourEvenTokens()]),
        }
    ),
    "stopping criteria": lambda: GREEDY | {"stopping_criteria": StoppingCriteriaList([StopAt(LONG + 4)])},
    "generation_config": lambda: {
        "generation_config": GenerationConfig(max_new_tokens=6, do_sample=True, top_k=9, pad_token_id=0)
    },
    "guidance": lambda: GREEDY | {"guidance_scale": 1.5},
}
ASSISTED = {
    "prompt lookup": lambda: GREEDY | {"prompt_lookup_num_tokens": 4},
    "prompt lookup, sampling": lambda: {"do_sample": True, "prompt_lookup_num_tokens": 3, "max_new_tokens": 10},
    "assistant": lambda: GREEDY | {"assistant_model": build("llama", seed=7)},
    "assistant, sampling": lambda: {
        "do_sample": True, "assistant_model": build("llama", seed=7), "max_new_tokens": 10,
    },
}  # fmt: skip


def both(model, feature, ids, mask, *, depth=1, boundary=1, kind="reuse"):
    generator, reference = generators(model, depth, boundary, kind)
    torch.manual_seed(0)
    ours = generator.generate(input_ids=ids, attention_mask=mask, **feature())
    torch.manual_seed(0)
    return ours, reference(ids, mask, **feature())


def cases(names):
    """Every feature, with families, boundaries and projection kinds taken in turn."""
    rest = itertools.cycle(itertools.product(QUICK, (1, 4), ("reuse", "replaced")))
    return [(name, *next(itertools.islice(rest, 2, None))) for name in names]


@pytest.mark.parametrize(("name", "family", "boundary", "kind"), cases(FEATURES))
def test_a_feature_of_generate_equals_two_passes(name, family, boundary, kind):
    ids, mask = ragged([LONG] if name == "guidance" else [LONG, 5])
    ours, reference = both(base(family), FEATURES[name], ids, mask, boundary=boundary, kind=kind)
    assert torch.equal(ours, reference)


@pytest.mark.parametrize(("name", "family", "boundary", "kind"), cases(ASSISTED))
def test_assisted_decoding_equals_two_passes(name, family, boundary, kind):
    model = base(family)
    ids, mask = repetitive()
    ours, reference = both(model, ASSISTED[name], ids, mask, boundary=boundary, kind=kind)
    assert torch.equal(ours, reference)


@pytest.mark.full
@pytest.mark.parametrize(("family", "attention"), MATRIX)
def test_every_feature_equals_two_passes_in_full(family, attention):
    model = base(family, attention)
    for boundary, kind in itertools.product((1, 4), ("reuse", "replaced")):
        for (name, feature), length in itertools.product(FEATURES.items(), (1, WINDOW, LONG)):
            ids, mask = ragged([length] if name == "guidance" else [length, max(1, length - 5)])
            ours, reference = both(model, feature, ids, mask, boundary=boundary, kind=kind)
            assert torch.equal(ours, reference), (name, boundary, kind, length)
        for (name, feature), length in itertools.product(ASSISTED.items(), (3, WINDOW, LONG, 40)):
            ids, mask = repetitive(length)
            ours, reference = both(model, feature, ids, mask, boundary=boundary, kind=kind)
            assert torch.equal(ours, reference), (name, boundary, kind, length)


@pytest.mark.parametrize("feature", ["greedy", "prompt lookup"])
def test_boundary_0_with_candidates_and_without_gives_the_same_tokens(feature):
    model = base("gemma3")
    ids, mask = repetitive()
    generator = StageAwareGenerator(model, PruningPlan(2, boundary=0))
    ours = generator.generate(input_ids=ids, attention_mask=mask, **(FEATURES | ASSISTED)[feature]())
    logits, cache = two_pass(model, ids, mask, 2, 0)
    expected = greedy(model, logits, cache, mask, ours.shape[1] - ids.shape[1])
    assert torch.equal(ours[:, ids.shape[1] :], expected)


def test_the_assistants_own_prefill_is_not_pruned():
    model, assistant = base("llama"), build("llama", seed=7)
    ids, mask = repetitive()
    generator, _ = generators(model)
    widths = []
    handle = assistant.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    generator.generate(input_ids=ids, attention_mask=mask, assistant_model=assistant, **GREEDY)
    handle.remove()
    assert widths[0] == ids.shape[1]


def test_scores_and_logits_are_returned_as_by_two_passes():
    model = base("qwen2")
    ids, mask = ragged([LONG, 9])
    generator, reference = generators(model, 2, 4, "replaced")
    arguments = GREEDY | {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    ours, theirs = (
        generator.generate(input_ids=ids, attention_mask=mask, **arguments),
        reference(ids, mask, **arguments),
    )
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert relative(a, b) < 1e-5


def test_a_streamer_gets_prompt_and_tokens():
    model = base("llama")
    ids, mask = ragged([LONG])
    generator, reference = generators(model)
    record = Record()
    tokens = generator.generate(input_ids=ids, attention_mask=mask, streamer=record, **GREEDY)
    assert torch.equal(torch.cat([piece.flatten() for piece in record.pieces]), tokens[0])
    assert record.ended
    assert torch.equal(tokens, reference(ids, mask, **GREEDY))


def test_without_a_prompt_generation_starts_from_the_bos_token():
    model = base("llama")
    generator, _ = generators(model)
    assert torch.equal(generator.generate(**GREEDY), model.generate(**GREEDY))


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("boundary", [1, 4])
def test_inputs_embeds_equal_input_ids(family, boundary):
    model = base(family)
    ids, mask = ragged([LONG, 11])
    generator, reference = generators(model, 2, boundary)
    embeds = model.get_input_embeddings()(ids)
    ours = generator.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, reference(ids, mask, **GREEDY)[:, ids.shape[1] :])
    logits = generator.prefill(inputs_embeds=embeds, attention_mask=mask).logits
    assert relative(logits, two_pass(model, ids, mask, 2, boundary)[0]) < 1e-5
    prefix = generator.prefill(ids[:, :12], mask[:, :12], last=False).past_key_values
    after = generator.generate(inputs_embeds=embeds, attention_mask=mask, past_key_values=prefix, **GREEDY)
    assert torch.equal(after, ours)


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("boundary", [1, 4])
@pytest.mark.parametrize("length", [3, WINDOW - 1, WINDOW, WINDOW + 1, LONG])
def test_static_caches_give_the_tokens_of_dynamic_ones(family, boundary, length):
    model = base(family)
    ids, mask = ragged([length, 2])
    generator, reference = generators(model, 1, boundary)
    expected = reference(ids, mask, **GREEDY)
    assert torch.equal(
        generator.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **GREEDY), expected
    )
    own = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(generator.generate(input_ids=ids, attention_mask=mask, past_key_values=own, **GREEDY), expected)
    whole = torch.ones_like(mask[:1])  # no padding: the model leaves the mask out
    assert torch.equal(
        generator.generate(input_ids=ids[:1], cache_implementation="static", **GREEDY),
        reference(ids[:1], whole, **GREEDY),
    )


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_cache_that_does_not_slide_serves_sliding_layers(family):
    model = base(family)
    ids, mask = ragged([LONG, 12])
    generator, reference = generators(model, 1, 4)
    ours = generator.generate(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(), **GREEDY)
    assert torch.equal(ours, reference(ids, mask, **GREEDY))


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("boundary", [1, 4])
def test_a_second_turn_on_the_returned_cache_prunes_what_is_new(family, boundary):
    model = base(family)
    ids, mask = ragged([LONG, 9])
    generator, reference = generators(model, 1, boundary)
    arguments = GREEDY | {"return_dict_in_generate": True}
    first = generator.generate(input_ids=ids, attention_mask=mask, **arguments)
    expected = reference(ids, mask, **arguments)
    more, ones = ragged([11, 11], seed=3)
    whole = torch.cat([first.sequences, more], 1)
    whole_mask = torch.cat([mask, torch.ones_like(first.sequences[:, ids.shape[1] :]), ones], 1)
    second = generator.generate(
        input_ids=whole, attention_mask=whole_mask, past_key_values=first.past_key_values, **arguments
    )
    again = reference(whole, whole_mask, cache=expected.past_key_values, **arguments)
    assert torch.equal(second.sequences, again.sequences)
    # the next turn may also bring its new tokens alone, under the whole sequence's mask
    uncached = whole.shape[1] - (first.sequences.shape[1] - 1)
    first = generator.generate(input_ids=ids, attention_mask=mask, **arguments)
    third = generator.generate(
        input_ids=whole[:, -uncached:], attention_mask=whole_mask, past_key_values=first.past_key_values, **arguments
    )
    assert torch.equal(third.sequences[:, uncached:], second.sequences[:, whole.shape[1] :])


@pytest.mark.parametrize("family", EVERY)
def test_a_second_turn_on_a_static_cache(family):
    model = base(family)
    ids, mask = ragged([LONG, 9])
    generator, reference = generators(model, 1, 4)
    cache = StaticCache(config=model.config, max_cache_len=80)
    arguments = GREEDY | {"return_dict_in_generate": True}
    first = generator.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **arguments)
    expected = reference(ids, mask, **arguments)
    more, ones = ragged([11, 11], seed=3)
    whole = torch.cat([first.sequences, more], 1)
    whole_mask = torch.cat([mask, torch.ones_like(first.sequences[:, ids.shape[1] :]), ones], 1)
    second = generator.generate(input_ids=whole, attention_mask=whole_mask, past_key_values=cache, **GREEDY)
    assert torch.equal(second, reference(whole, whole_mask, cache=expected.past_key_values, **GREEDY))


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("boundary", [1, 4])
def test_one_prefix_serves_several_requests(family, boundary):
    model = base(family)
    ids, mask = ragged([LONG])
    generator, reference = generators(model, 2, boundary)
    prefix = generator.prefill(ids[:, :12], last=False).past_key_values
    for seed in (1, 2):
        tail, _ = ragged([9], seed)
        request = torch.cat([ids[:, :12], tail], 1)
        ones = torch.ones_like(request)
        ours = generator.generate(
            input_ids=request, attention_mask=ones, past_key_values=copy.deepcopy(prefix), **GREEDY
        )
        assert torch.equal(ours, reference(request, ones, **GREEDY))
    with pytest.raises(InputError, match="another pruning plan"):
        StageAwareGenerator(model, PruningPlan(1)).generate(
            input_ids=ids, attention_mask=mask, past_key_values=copy.deepcopy(prefix), **GREEDY
        )


def test_a_cache_carries_its_plan_even_where_it_is_not_returned_and_loses_it_when_reset():
    model = base("llama")
    ids, mask = ragged([LONG])
    cache = StaticCache(config=model.config, max_cache_len=64)
    StageAwareGenerator(model, PruningPlan(1)).generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY
    )
    other, reference = generators(model, 2)
    with pytest.raises(InputError, match="another pruning plan"):
        other.generate(input_ids=torch.cat([ids, ids], 1), past_key_values=cache, **GREEDY)
    cache.reset()
    ours = other.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    assert torch.equal(ours, reference(ids, mask, **GREEDY))


@pytest.mark.parametrize("family", EVERY)
def test_a_cache_that_the_plain_model_filled_is_taken_as_it_is(family):
    model = base(family)
    ids, mask = ragged([LONG])
    generator, _ = generators(model, 1)
    with generator.full_model():
        prefix = generator.prefill(ids[:, :10], last=False).past_key_values
    ours = generator.generate(input_ids=ids, attention_mask=mask, past_key_values=prefix, **GREEDY)
    plain = model(input_ids=ids[:, :10], use_cache=True).past_key_values
    assert torch.equal(ours, two_pass_generate(model, ids, mask, 1, 1, cache=plain, **GREEDY))


def test_a_cache_that_holds_the_whole_prompt_is_refused():
    model = base("llama")
    ids, mask = ragged([LONG])
    generator, _ = generators(model)
    cache = generator.prefill(ids, mask).past_key_values
    with pytest.raises(InputError, match=f"already hold {LONG} tokens"):
        generator.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(("boundary", "chunk"), [(1, 8), (4, 5), (4, 12), (32, 5)])
def test_chunked_prefill_equals_one_prefill(family, boundary, chunk):
    model = base(family)
    ids, mask = ragged([LONG + 1, 14])  # with chunks of 5, the last one holds 2 tokens: fewer than the boundary
    generator, reference = generators(model, 1, boundary)
    expected = reference(ids, mask, **GREEDY)
    for cache in (None, "static"):
        ours = generator.generate(
            input_ids=ids, attention_mask=mask, prefill_chunk_size=chunk, cache_implementation=cache, **GREEDY
        )
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("family", EVERY)
def test_chunks_by_hand_equal_one_prefill(family):
    model = base(family)
    ids, mask = ragged([LONG, 14])
    generator, _ = generators(model, 1, 4)
    cache = None
    for end in (5, 13, LONG - 5):
        start = 0 if cache is None else cache.get_seq_length()
        cache = generator.prefill(ids[:, start:end], mask[:, :end], cache, last=False).past_key_values
    ours = generator.prefill(ids[:, LONG - 5 :], mask, cache)
    assert relative(ours.logits, two_pass(model, ids, mask, 1, 4)[0]) < 1e-5


def test_an_offloaded_cache_is_refused():
    generator, _ = generators(base("llama"))
    ids, _ = ragged([LONG])
    with pytest.raises(InputError, match="offloaded cache"):
        generator.generate(input_ids=ids, cache_implementation="offloaded", **GREEDY)
    with pytest.raises(InputError, match="offloaded cache"):
        generator.generate(
            input_ids=ids, generation_config=GenerationConfig(cache_implementation="offloaded_static"), max_new_tokens=3
        )


class RoundedLayer(DynamicLayer):
    """A cache layer that stores less than it is given, as quantized ones do: only what it holds is rounded."""

    def update(self, keys, values, *args, **kwargs):
        old = (self.keys, self.values) if self.is_initialized else (keys[:, :, :0], values[:, :, :0])
        returned = tuple(torch.cat([a, b], dim=-2) for a, b in zip(old, (keys, values), strict=True))
        super().update((keys * 32).round() / 32, (values * 32).round() / 32)
        return returned


class RoundedCache(DynamicCache):
    def __init__(self):
        super().__init__()
        self.layer_class_to_replicate = RoundedLayer


def test_a_cache_that_stores_rounded_values_is_attended_to_as_it_stores_them():
    model = base("llama")
    ids, mask = ragged([LONG])
    generator, _ = generators(model, 2, 4)
    ours = generator.prefill(ids, mask, RoundedCache()).logits
    _, cache = context_pass(model, ids, mask, 2, LONG - 4)
    rounded = RoundedCache()
    plain = model(input_ids=ids[:, : LONG - 4], use_cache=True).past_key_values
    for layer in range(LAYERS):
        source = plain if layer < 2 else cache
        rounded.update(source.layers[layer].keys, source.layers[layer].values, layer)
    for layer in range(2):  # below the depth the boundary rows run in the same pass and see the context unrounded
        rounded.layers[layer].keys, rounded.layers[layer].values = plain.layers[layer].keys, plain.layers[layer].values
    reference = model(input_ids=ids[:, LONG - 4 :], past_key_values=rounded, use_cache=True).logits[:, -1:]
    assert relative(ours, reference) < 1e-5


# --- refused by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"token_healing": True}, "token_healing"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
        ({"use_mtp": True}, "use_mtp"),
        ({"prompt_lookup_num_tokens": 3, "output_hidden_states": True}, "output_hidden_states"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_the_first_token(arguments, words):
    generator, _ = generators(base("llama"))
    calls = []
    handle = generator.model.register_forward_pre_hook(lambda *_: calls.append(1))
    ids, _ = repetitive()
    with pytest.raises(InputError, match=words):
        generator.generate(input_ids=ids, max_new_tokens=3, **arguments)
    handle.remove()
    assert not calls


def test_assisted_decoding_over_a_filled_cache_is_refused():
    generator, _ = generators(base("llama"))
    ids, _ = repetitive()
    cache = generator.prefill(ids[:, :9], last=False).past_key_values
    with pytest.raises(InputError, match="needs an empty cache"):
        generator.generate(input_ids=ids, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=3)


def test_the_pruned_model_cannot_assist_itself():
    generator, _ = generators(base("llama"))
    with pytest.raises(InputError, match="its own assistant"):
        generator.generate(input_ids=repetitive()[0], assistant_model=generator.model, max_new_tokens=3)


# --- what is returned in addition to tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("boundary", [1, 4])
def test_hidden_states_and_attentions_above_the_depth_are_those_of_boundary_tokens(family, boundary):
    model = base(family, "eager")
    ids, mask = ragged([LONG, 9])
    depth = 2
    generator, _ = generators(model, depth, boundary)
    ours = generator.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, output_hidden_states=True,
        output_attentions=True, max_new_tokens=2, do_sample=False,
    )  # fmt: skip
    context = LONG - boundary
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    plain = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    _, cache = context_pass(model, ids, mask, depth, context)
    second = model(
        input_ids=ids[:, context:], attention_mask=mask, position_ids=positions[:, context:], past_key_values=cache,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    for layer in range(LAYERS + 1):
        whole = layer <= depth
        expected = plain.hidden_states[layer] if whole else second.hidden_states[layer]
        real = mask.bool() if whole else mask.bool()[:, context:]
        assert relative(ours.hidden_states[0][layer][real], expected[real]) < 1e-5
    for layer in range(depth, LAYERS):
        assert relative(ours.attentions[0][layer], second.attentions[layer]) < 1e-5
    with pytest.raises(InputError, match="output_hidden_states needs boundary >= 1"):
        StageAwareGenerator(model, PruningPlan(2, 0)).prefill(ids, mask, output_hidden_states=True)


# --- attention implementations without a 4-D mask -------------------------------------------------------------------


def flash_stand_in(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """What flash attention computes: causal from the bottom right, padding as a 2-D mask over the keys or None."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    rows, columns = query.shape[2], key.shape[2]
    queries, keys = torch.arange(columns - rows, columns).unsqueeze(-1), torch.arange(columns)
    seen = keys <= queries
    if sliding_window is not None:
        seen = seen & (keys > queries - sliding_window)
    seen = seen.expand(len(query), 1, rows, columns)
    if attention_mask is not None:
        assert attention_mask.shape == (len(query), columns)
        seen = seen & attention_mask[:, None, None].bool()
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash(monkeypatch):
    """A family on flash attention: its interface and its masks are the real ones, its kernels a stand-in."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_stand_in)

    def flash_base(family):
        model = base(family)
        model.config._attn_implementation = "flash_attention_2"  # the setter asks for the kernels' package
        return model

    return flash_base


# Chunks are refused; attention sinks need kernels that are not flash_attention_2.
@pytest.mark.parametrize("family", marked(sorted(FAMILIES.keys() - {"llama4", "gpt_oss"})))
@pytest.mark.parametrize("boundary", [1, 4])
@pytest.mark.parametrize("lengths", [[LONG], [LONG, 9]], ids=["one", "ragged"])
def test_flash_attention_with_its_2d_masks_gives_the_tokens_of_sdpa(flash, family, boundary, lengths):
    ids, mask = ragged(lengths)
    generator, _ = generators(flash(family), 1, boundary)
    _, reference = generators(base(family), 1, boundary)
    ours = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, reference(ids, mask, **GREEDY))


# Transformers has no flex attention for OLMoE, and none with attention sinks on a CPU.
@pytest.mark.parametrize("family", marked(sorted(FAMILIES.keys() - {"olmoe", "gpt_oss"})))
@pytest.mark.parametrize("boundary", [1, 4])
def test_flex_attention_with_its_block_masks_gives_the_tokens_of_sdpa(family, boundary):
    ids, mask = ragged([LONG, 9])
    with torch.compiler.set_stance("force_eager"):  # flex attention's own reference instead of generated code
        generator, _ = generators(base(family, "flex_attention"), 1, boundary)
        ours = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    _, reference = generators(base(family), 1, boundary)
    assert torch.equal(ours, reference(ids, mask, **GREEDY))


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flex_attentions_generated_code_gives_the_logits_of_two_passes(family):
    # the prefill alone: for the growing shapes of decode, the compiler's C++ for CPUs does not build
    torch._dynamo.reset()
    ids, mask = ragged([LONG, 9])
    generator, _ = generators(base(family, "flex_attention"), 1, 4)
    assert relative(generator.prefill(ids, mask).logits, two_pass(base(family), ids, mask, 1, 4)[0]) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_block_mask_is_cut_to_its_last_rows(family):
    model = base(family)
    decoder = Decoder(model)
    ids, mask = ragged([LONG, 9])
    cache = model(input_ids=ids[:, :-4], attention_mask=mask[:, :-4], use_cache=True).past_key_values
    queries, keys = torch.arange(LONG).unsqueeze(-1), torch.arange(LONG)
    for layer in range(LAYERS):
        window = decoder.window(layer) or LONG
        dense = ((keys <= queries) & (keys > queries - window)) & mask[:, None].bool()

        def block(batch, head, query, key, dense=dense):
            return dense[batch, query, key]

        whole = create_block_mask(block, len(ids), None, LONG, LONG, device="cpu")
        held = cache.get_mask_sizes(4, layer)[0]
        cut = tail_mask(decoder, layer, whole, torch.empty(2, 4, 1), LONG - 4, cache)
        assert cut.seq_lengths == (4, held)
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(held), indexing="ij")
        for row in range(len(ids)):
            seen = cut.mask_mod(torch.tensor(row), torch.tensor(0), rows, columns)
            assert torch.equal(seen, dense[row, -4:, -held:])
    with pytest.raises(InputError, match="cannot be cut"):
        tail_mask(decoder, 0, "a mask of some other kind", torch.empty(2, 4, 1), LONG - 4, cache)


def test_flex_attention_with_chunked_prefill_is_refused():
    model = base("llama")
    generator, _ = generators(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match="flex_attention needs"):
        generator.generate(input_ids=repetitive()[0], prefill_chunk_size=4, max_new_tokens=3)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_one_generator_serves_several_threads_at_once():
    model = base("gemma3")
    generator, _ = generators(model, 1)
    requests = [ragged([length, 7], seed) for seed, length in enumerate((LONG, 19, 31, 12))]
    plain = [model.generate(input_ids=ids, attention_mask=mask, **GREEDY) for ids, mask in requests]
    pruned = [generator.generate(input_ids=ids, attention_mask=mask, **GREEDY) for ids, mask in requests]
    assert any(not torch.equal(a, b) for a, b in zip(plain, pruned, strict=True))

    def work(index):
        ids, mask = requests[index]
        for turn in range(6):
            if (index + turn) % 2:
                ours, expected = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY), pruned[index]
            else:
                with generator.full_model():
                    ours, expected = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY), plain[index]
            assert torch.equal(ours, expected), (index, turn)

    at_once(len(requests), work)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_generation_runs_in_inference_mode_and_the_projections_can_be_trained_afterwards():
    model = base("llama")
    ids, mask = ragged([LONG])
    generator, reference = generators(model, kind="replaced")
    expected = reference(ids, mask, **GREEDY)
    generator.projections.replace(random_maps(1), "full")  # so that they are stacked inside
    with torch.inference_mode():
        assert torch.equal(generator.generate(input_ids=ids, attention_mask=mask, **GREEDY), expected)
    generator.projections.requires_grad_(True)
    generator.projections(2, None, torch.randn(3, COMMON["hidden_size"])).sum().backward()
    assert generator.projections.maps["2"].weight.grad.abs().sum() > 0


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """A backend that counts how often its graphs run; no code is generated."""

    class Backend:
        runs = 0

        def __call__(self, graph, inputs):
            def run(*args):
                self.runs += 1
                return graph.forward(*args)

            return run

    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


@pytest.mark.parametrize("cache", [None, "static"])
def test_decode_runs_compiled_and_prefills_never_share_their_code(compiled, cache):
    model = base("gemma3")
    ids, _ = ragged([LONG])
    generator, _ = generators(model, 1, kind="replaced")
    arguments = GREEDY | {"cache_implementation": cache}
    expected = generator.generate(input_ids=ids, **arguments)
    plain = model.generate(input_ids=ids, **arguments)
    assert not torch.equal(expected, plain)
    model.forward = torch.compile(model.forward, backend=compiled)
    for _ in range(2):
        with generator.full_model():
            assert torch.equal(generator.generate(input_ids=ids, **arguments), plain)
        before = compiled.runs
        assert torch.equal(generator.generate(input_ids=ids, **arguments), expected)
        assert compiled.runs - before >= GREEDY["max_new_tokens"] - 1  # every decode step, and never the prefill


# --- weights that are no plain tensors -------------------------------------------------------------------------------


class HalvedLinear(torch.nn.Linear):
    """A stand-in for a quantized layer: it does not multiply with its weight as it is."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * 0.5, self.bias)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("kind", ["reuse", "replaced"])
def test_projections_of_other_linear_classes_run_the_layers_own_modules(family, kind):
    model = base(family)
    for block in model.model.layers:
        for name in ("k_proj", "v_proj", "qkv_proj"):
            if getattr(block.self_attn, name, None) is not None:
                getattr(block.self_attn, name).__class__ = HalvedLinear
    ids, mask = ragged([LONG, 9])
    generator, reference = generators(model, 1, 4, kind)
    assert set(generator.projections.maps) == ({"2", "3"} if kind == "replaced" else set())
    ours = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, reference(ids, mask, **GREEDY))


# Each integration of Transformers that is at hand: quanto comes with the test extra, torchao is noisy at every import.
QUANTISED = {"quanto": lambda: QuantoConfig(weights="int8")}
if importlib.util.find_spec("torchao"):
    from torchao.quantization import Int8WeightOnlyConfig

    QUANTISED["torchao"] = lambda: TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.parametrize("kind", ["reuse", "replaced"])
@pytest.mark.parametrize("integration", QUANTISED)
def test_a_quantized_base(tmp_path, kind, integration):
    base("llama").save_pretrained(tmp_path)
    settings = QUANTISED[integration]()
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map="cpu").eval()
    ids, mask = ragged([LONG, 9])
    generator, reference = generators(model, 1, 4, kind)
    assert set(generator.projections.maps) == ({"2", "3"} if kind == "replaced" else set())
    ours = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, reference(ids, mask, **GREEDY))


@pytest.mark.parametrize("kind", ["reuse", "replaced"])
@pytest.mark.parametrize("stored", ["whole numbers", "packed", "rounded inputs"])
def test_plain_layers_whose_weight_is_not_all(kind, stored):
    """As compressed-tensors leaves them: only the forward that it gives a layer computes what the layer means."""
    model = base("llama")
    for layer in model.model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            scale = linear.weight.abs().max() / 127
            whole = (linear.weight / scale).round().to(torch.int8)
            linear.forward = functools.partial(_scaled, whole, scale, linear.bias)
            if stored == "whole numbers":
                linear.weight = torch.nn.Parameter(whole, requires_grad=False)
            elif stored == "packed":
                del linear.weight
            else:
                linear.quantization_scheme = "W8A8"
                linear.forward = functools.partial(_scaled, whole, scale, linear.bias, levels=127)
    ids, mask = ragged([LONG, 9])
    generator, reference = generators(model, 1, 4, kind)
    assert set(generator.projections.maps) == ({"2", "3"} if kind == "replaced" else set())
    ours = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, reference(ids, mask, **GREEDY))


def _scaled(whole, scale, bias, x, levels=None):
    if levels is not None:
        x = (x * levels).round() / levels
    return torch.nn.functional.linear(x, whole * scale, bias)


@pytest.mark.parametrize("kind", ["reuse", "replaced"])
def test_a_base_whose_layers_wait_on_disk(tmp_path, kind):
    base("gemma3").save_pretrained(tmp_path / "base")
    places = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(LAYERS)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    assert model.model.layers[2].self_attn.k_proj.weight.is_meta
    ids, mask = ragged([LONG, 9])
    generator, _ = generators(model, 1, 4, kind)
    in_memory = base("gemma3")
    _, reference = generators(in_memory, 1, 4, kind)
    ours = generator.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours, reference(ids, mask, **GREEDY))
