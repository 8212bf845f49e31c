"""Models that read images: exactness against two plain passes wherever the images are, and what is refused."""

import contextlib
import functools
import itertools

import pytest
import torch
from transformers import StaticCache

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.benchmark.benchmark import run as benchmark
from pop_lightning.fitting.importance import ImportanceScoring
from pop_lightning.fitting.regressions import ClosedFormFit
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.passes import student_logits, teacher_pass
from pop_lightning.pruning.projections import KVProjections

from tests.fitting.test_importance import loss_under_gates, score
from tests.helpers.families import COMMON, WINDOW, relative
from tests.helpers.threads import at_once
from tests.helpers.vision import (
    DEEPSTACK,
    FAMILIES,
    IMAGE,
    LAYERS,
    build,
    context_pass,
    greedy,
    images,
    positions,
    prompts,
    substituted,
    two_pass,
    types,
    with_response,
)

LAYOUTS = {  # numbers are words, pairs are images; every image has a token before and one after it
    "start": [[(4, 4), 6]],
    "middle": [[5, (4, 8), 4]],
    "adjacent": [[6, (8, 4)]],  # the boundary token closes the image
    "several": [[2, (4, 4), 3, (8, 4), (4, 4), 4]],
    "windows": [[(4, 4), 2 * WINDOW + 3, (4, 4), WINDOW + 1]],
    "mixed": [[4, (4, 8), 9, (4, 4), 2], [7], [3, (8, 8)], [(4, 4), 1]],
}
TEXT = {"max_new_tokens": 11, "do_sample": False}


@functools.cache
def shared(family, attention="sdpa", dtype=torch.float32, seed=0, exact=False):
    """One model for many cases; none of them changes it. ``exact``: the same weights in float32."""
    model = build(family, attention, dtype, seed)
    return model.float() if exact else model


def arguments(family, batch):
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **images(family, batch)}


def pruned_pair(model, family, depth, boundary, kind):
    """The generator under test and the reference's projections: reuse, or random maps in place of fitted ones."""
    maps = {}
    if kind == "replaced":
        generator = torch.Generator().manual_seed(0)
        height = 2 * COMMON["num_key_value_heads"] * COMMON["head_dim"]
        for layer in range(depth + 1, LAYERS[family]):
            weight = 0.2 * torch.randn(height, COMMON["hidden_size"], generator=generator)
            maps[layer] = tuple(x.to(model.dtype) for x in (weight, 0.2 * torch.randn(height, generator=generator)))
    projections = KVProjections(Decoder(model), depth)
    if maps:
        projections.replace(maps, "full")
    return StageAwareGenerator(model, PruningPlan(depth, boundary), projections), maps


def depths(family):
    return range(DEEPSTACK if family == "qwen3_vl" else 1, LAYERS[family])


def compare(family, attention, kind, depth, boundary, layout):
    """Float32: logits and caches to 1e-5 of the two-pass reference, greedy tokens one for one."""
    model, batch = shared(family, attention), prompts(family, LAYOUTS[layout])
    generator, maps = pruned_pair(model, family, depth, boundary, kind)
    ours = generator.prefill(**arguments(family, batch))
    logits, cache = two_pass(model, batch, depth, boundary, maps)
    assert relative(ours.logits, logits) < 1e-5
    for layer in range(LAYERS[family]):
        ours_layer, reference = ours.past_key_values.layers[layer], cache.layers[layer]
        assert ours_layer.get_seq_length() == reference.get_seq_length()
        visible = batch["attention_mask"].bool()[:, -reference.keys.shape[-2] :]
        for name in ("keys", "values"):
            a, b = (getattr(each, name).transpose(1, 2)[visible] for each in (ours_layer, reference))
            assert relative(a, b) < 1e-5, (layer, name)
    tokens = generator.generate(**arguments(family, batch), **TEXT)[:, batch["prompt_length"] :]
    assert torch.equal(tokens, greedy(model, logits, cache, batch, TEXT["max_new_tokens"]))


PAIRWISE = [
    # family, attention, kind, depth, boundary, layout
    ("gemma3", "sdpa", "reuse", 1, 1, "start"),
    ("gemma3", "eager", "replaced", 1, 1, "middle"),
    ("gemma3", "sdpa", "replaced", 2, 1, "adjacent"),
    ("gemma3", "eager", "reuse", 3, 0, "several"),
    ("gemma3", "sdpa", "replaced", 1, 3, "windows"),
    ("gemma3", "sdpa", "replaced", 1, 1, "mixed"),
    ("gemma3", "eager", "reuse", 2, 1, "mixed"),
    ("qwen3_vl", "sdpa", "reuse", 2, 1, "start"),
    ("qwen3_vl", "eager", "replaced", 2, 2, "middle"),
    ("qwen3_vl", "sdpa", "replaced", 3, 1, "adjacent"),
    ("qwen3_vl", "eager", "reuse", 4, 0, "several"),
    ("qwen3_vl", "sdpa", "replaced", 2, 3, "windows"),
    ("qwen3_vl", "sdpa", "replaced", 2, 1, "mixed"),
    ("qwen3_vl", "eager", "reuse", 3, 0, "mixed"),
]


@pytest.mark.parametrize(("family", "attention", "kind", "depth", "boundary", "layout"), PAIRWISE)
def test_prefill_and_greedy_tokens_equal_two_passes(family, attention, kind, depth, boundary, layout):
    compare(family, attention, kind, depth, boundary, layout)


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "attention"), list(itertools.product(FAMILIES, ("sdpa", "eager"))))
def test_prefill_and_greedy_tokens_equal_two_passes_in_full(family, attention, layout):
    text_behind_images = min(2 + sum(0 if isinstance(p, tuple) else p for p in row[-1:]) for row in LAYOUTS[layout])
    for kind, depth in itertools.product(("reuse", "replaced"), depths(family)):
        for boundary in {0, 1, min(3, text_behind_images - 1), 40}:
            compare(family, attention, kind, depth, boundary, layout)


SALIENT = [
    ("gemma3", "sdpa", "middle", 1, 6),
    ("gemma3", "eager", "mixed", 1, 5),
    ("gemma3", "sdpa", "windows", 2, 0.3),
    ("qwen3_vl", "sdpa", "several", 2, 6),
    ("qwen3_vl", "eager", "mixed", 2, 5),
    ("qwen3_vl", "sdpa", "mixed", 3, 0.4),
]


@pytest.mark.parametrize(("family", "attention", "layout", "depth", "salient"), SALIENT)
def test_salient_tokens_among_images_equal_one_substituted_pass(family, attention, layout, depth, salient):
    model, batch = shared(family, attention), prompts(family, LAYOUTS[layout])
    without, maps = pruned_pair(model, family, depth, 1, "replaced")
    projections, plan = without.projections, PruningPlan(depth, 1, salient)
    generator = StageAwareGenerator(model, plan, projections)
    ours = generator.prefill(**arguments(family, batch))
    selected, tokens = generator.selected, batch["input_ids"]
    assert relative(ours.logits, substituted(model, batch, depth, 1, maps, selected)[:, -1:]) < 1e-5
    read = types(tokens.gather(1, selected))[batch["attention_mask"].gather(1, selected).bool()]
    assert (read > 0).any() == (family == "qwen3_vl")  # images that see ahead of themselves are never selected
    written = generator.generate(**arguments(family, batch), **TEXT)[:, batch["prompt_length"] :]
    rows = batch | {
        "input_ids": torch.cat([tokens, written], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(written)], 1),
    }
    expected = substituted(model, rows, depth, 1, maps, selected)[:, batch["prompt_length"] - 1 : -1]
    assert torch.equal(expected.argmax(-1), written)
    trace, _ = teacher_pass(generator.decoder, rows, depth)
    student = student_logits(projections, plan, trace, rows["attention_mask"], batch["prompt_length"])
    assert relative(student, expected) < 1e-5


def test_a_share_that_begins_inside_a_rows_own_image_is_refused():
    model = shared("gemma3")
    batch = prompts("gemma3", [[2, (4, 4), 30], [2, (4, 4), 2]])  # of the second row, a share of 0.4 is 4 tokens of 10
    generator = StageAwareGenerator(model, PruningPlan(1, 0.4))
    with pytest.raises(InputError, match="boundary 4 begins inside an image of prompt 2"):
        generator.prefill(**arguments("gemma3", batch))
    with pytest.raises(InputError, match="boundary 4 begins inside an image of prompt 2"):
        generator.generate(**arguments("gemma3", batch), max_new_tokens=2)
    StageAwareGenerator(model, PruningPlan(1, 0.3)).prefill(**arguments("gemma3", batch))


def test_images_in_front_of_embeddings_are_recognized_by_their_types():
    model, batch = shared("gemma3"), prompts("gemma3", LAYOUTS["middle"])
    generator = StageAwareGenerator(model, PruningPlan(1, 1, 6))
    given = arguments("gemma3", batch)
    expected = generator.prefill(**given).logits
    selected = generator.selected
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
    assert torch.equal(generator.prefill(**given).logits, expected)
    assert torch.equal(generator.selected, selected)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_the_error_is_that_of_two_passes(family):
    ours_error, two_pass_error, depth = 0.0, 0.0, depths(family)[0]
    for seed in range(4):
        model, exact = (shared(family, "sdpa", torch.bfloat16, seed, exact) for exact in (False, True))
        batch = prompts(family, LAYOUTS["mixed"], seed)
        reference, _ = two_pass(exact, batch, depth, 1)
        plain, _ = two_pass(model, batch, depth, 1)
        generator, _ = pruned_pair(model, family, depth, 1, "reuse")
        ours = generator.prefill(**arguments(family, batch)).logits
        ours_error += (ours.float() - reference).square().sum().item()
        two_pass_error += (plain.float() - reference).square().sum().item()
    assert ours_error <= 1.5**2 * two_pass_error


@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_references_agree(family):
    model, batch = shared(family), prompts(family, LAYOUTS["mixed"])
    for boundary in (0, 1):
        depth = depths(family)[0]
        expected, _ = two_pass(model, batch, depth, boundary)
        assert relative(substituted(model, batch, depth, boundary)[:, -1:], expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_pruned_generation_is_the_plain_model(family):
    model, batch = shared(family), prompts(family, LAYOUTS["mixed"])
    call, depth = arguments(family, batch), depths(family)[0]
    plain = model.generate(**call, **TEXT)
    assert torch.equal(StageAwareGenerator(model, PruningPlan(LAYERS[family])).generate(**call, **TEXT), plain)
    assert torch.equal(StageAwareGenerator(model, PruningPlan(depth, boundary=40)).generate(**call, **TEXT), plain)
    pruned = StageAwareGenerator(model, PruningPlan(depth))
    with pruned.full_model():
        assert torch.equal(pruned.generate(**call, **TEXT), plain)
        logits = pruned.prefill(**call).logits
    expected = model(**call, position_ids=positions(model, batch)).logits[:, -1:]
    assert relative(logits, expected) < 1e-5
    lossless = StageAwareGenerator(model, PruningPlan(LAYERS[family] - 1)).prefill(**call).logits
    assert relative(lossless, expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("boundary", [0, 1, 3])
def test_rerunning_only_the_pruned_layers_gives_the_pruned_models_logits(family, boundary):
    rows = [[4, (4, 8), 9, (4, 4), 2], [7], [(8, 8), 3]]
    model, batch, depth = shared(family), with_response(prompts(family, rows)), depths(family)[0]
    decoder, plan = Decoder(model), PruningPlan(depth, boundary)
    trace, teacher = teacher_pass(decoder, batch, depth)
    ours = student_logits(KVProjections(decoder, depth), plan, trace, batch["attention_mask"], batch["prompt_length"])
    at_loss = slice(batch["prompt_length"] - 1, -1)
    assert relative(ours, substituted(model, batch, depth, boundary)[:, at_loss]) < 1e-5
    plain = model(**arguments(family, batch), position_ids=positions(model, batch)).logits[:, at_loss]
    assert relative(teacher, plain) < 1e-5
    assert relative(decoder.response_logits(batch), plain) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_padding_changes_nothing(family):
    """It takes the place of a row where one of several processes has none."""
    model, depth = shared(family), depths(family)[0]
    batch = with_response(prompts(family, [[4, (4, 8), 3], [9]]))
    padded = batch | {
        name: torch.cat([batch[name], torch.zeros_like(batch[name][:1])]) for name in ("input_ids", "attention_mask")
    }
    decoder, logits = Decoder(model), []
    for each in (batch, padded):
        trace, _ = teacher_pass(decoder, each, depth)
        mask, length = each["attention_mask"], each["prompt_length"]
        logits.append(student_logits(KVProjections(decoder, depth), PruningPlan(depth), trace, mask, length))
    assert relative(logits[1][:2], logits[0]) < 1e-5


# --- boundaries that reach into an image ----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "boundary"),
    [("gemma3", 7), ("gemma3", 8), ("gemma3", 9), ("qwen3_vl", 4), ("qwen3_vl", 5), ("qwen3_vl", 8), ("qwen3_vl", 9)],
)
def test_a_boundary_that_holds_image_tokens_is_exact(family, boundary, attention):
    """Whole images where they attend to later tokens of their own (Gemma), any part of one where all is causal."""
    rows = [[9, (4, 4), 2], [(4, 4), 2], [14]]  # 7 or 8 of the last tokens belong to the image or come after it
    model, depth = shared(family, attention), depths(family)[0]
    batch = prompts(family, rows)
    generator, _ = pruned_pair(model, family, depth, boundary, "reuse")
    expected = substituted(model, batch, depth, boundary)[:, -1:]
    assert relative(generator.prefill(**arguments(family, batch)).logits, expected) < 1e-5
    batch = with_response(batch)
    trace, _ = teacher_pass(generator.decoder, batch, depth)
    ours = student_logits(generator.projections, generator.plan, trace, batch["attention_mask"], batch["prompt_length"])
    whole = substituted(model, batch, depth, boundary)[:, batch["prompt_length"] - 1 : -1]
    assert relative(ours, whole) < 1e-5


@pytest.mark.parametrize("boundary", [1, 8])
def test_flex_attentions_block_masks_are_cut_around_images(boundary):
    batch = prompts("gemma3", [[9, (4, 4), 2], [(4, 4), 2], [14]])
    with torch.compiler.set_stance("force_eager"):  # flex attention's own reference instead of generated code
        generator, _ = pruned_pair(shared("gemma3", "flex_attention"), "gemma3", 1, boundary, "reuse")
        ours = generator.prefill(**arguments("gemma3", batch)).logits
        rows = with_response(batch)
        trace, _ = teacher_pass(generator.decoder, rows, 1)
        student = student_logits(
            generator.projections, generator.plan, trace, rows["attention_mask"], rows["prompt_length"]
        )
    expected = substituted(shared("gemma3"), rows, 1, boundary)[:, rows["prompt_length"] - 1 : -1]
    assert relative(ours, expected[:, :1]) < 1e-5
    assert relative(student, expected) < 1e-5


def test_a_boundary_that_begins_inside_an_image_that_sees_ahead_is_refused():
    model, batch = shared("gemma3"), prompts("gemma3", [[9], [3, (4, 4), 1]])
    for boundary in (3, 4, 5):  # one word, the closing token, then one to three of the image's four tokens
        generator = StageAwareGenerator(model, PruningPlan(1, boundary))
        for call in (generator.prefill, functools.partial(generator.generate, max_new_tokens=2)):
            with pytest.raises(InputError, match=f"boundary {boundary} begins inside an image of prompt 2"):
                call(**arguments("gemma3", batch))
    for boundary in (2, 6):
        StageAwareGenerator(model, PruningPlan(1, boundary)).prefill(**arguments("gemma3", batch))


# --- several turns and several conversations ------------------------------------------------------------------------


def second_turn(first, output, family, words=5, seed=7):
    """The whole conversation after a first turn: its prompt, what was generated, and new words."""
    new = torch.randint(3, 90, (len(output), words), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([output, new], 1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(ids[:, first["prompt_length"] :])], 1)
    return first | {"input_ids": ids, "attention_mask": mask, "prompt_length": ids.shape[1]}


def continued(model, family, first, whole, depth, cache):
    """Greedy tokens of a second turn, by plain passes: the context of the new tokens through ``depth`` layers, their
    keys and values above it from there, then the last token in full. The turn is short, so substitution says it."""
    held = int(cache.get_seq_length())
    place = positions(model, whole)[..., held:]
    body, count = model.model.language_model, whole["input_ids"].shape[1] - held
    handles, seen = [], []
    handles.append(
        body.layers[depth].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    )
    for layer in range(depth, LAYERS[family]):
        attention, norm = body.layers[layer].self_attn, body.layers[layer].input_layernorm
        for linear in (attention.k_proj, attention.v_proj):
            handles.append(
                linear.register_forward_hook(
                    lambda module, args, output, norm=norm: torch.cat(
                        [module.forward(norm(seen[0][:, : count - 1])), output[:, count - 1 :]], 1
                    )
                )
            )
    output = model(
        input_ids=whole["input_ids"][:, held:],
        attention_mask=whole["attention_mask"],
        position_ids=place,
        past_key_values=cache,
        use_cache=True,
    )
    for handle in handles:
        handle.remove()
    return greedy(model, output.logits[:, -1:], output.past_key_values, whole, TEXT["max_new_tokens"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_after_images_equals_plain_passes_whatever_ran_in_between(family):
    model, depth = shared(family), depths(family)[0]
    generator = StageAwareGenerator(model, PruningPlan(depth))
    conversations = [prompts(family, rows, seed) for seed, rows in enumerate(([[3, (4, 8), 4], [9]], [[(8, 8), 30]]))]
    kept = [
        generator.generate(**arguments(family, first), **TEXT, return_dict_in_generate=True) for first in conversations
    ]
    for first, output in zip(conversations, kept, strict=True):
        whole = second_turn(first, output.sequences, family)
        logits, cache = two_pass(model, first, depth, 1)
        written = greedy(model, logits, cache, first, 10)  # generate leaves its last token out of the cache
        assert torch.equal(output.sequences[:, first["prompt_length"] : -1], written)
        expected = continued(model, family, first, whole, depth, cache)
        tokens = generator.generate(
            input_ids=whole["input_ids"],
            attention_mask=whole["attention_mask"],
            past_key_values=output.past_key_values,
            **TEXT,
        )
        assert torch.equal(tokens[:, whole["prompt_length"] :], expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pruning", [True, False])
def test_a_second_turn_without_a_mask_does_not_depend_on_what_ran_in_between(family, pruning):
    generator = StageAwareGenerator(shared(family), PruningPlan(depths(family)[0]))
    first, other = (prompts(family, rows, seed) for seed, rows in ((0, [[3, (4, 8), 4]]), (1, [[(8, 8), 30], [5]])))

    def turns(between):
        with contextlib.nullcontext() if pruning else generator.full_model():
            inputs = arguments(family, first)
            del inputs["attention_mask"]
            output = generator.generate(**inputs, **TEXT, num_return_sequences=1, return_dict_in_generate=True)
            if between:
                generator.generate(**arguments(family, other), **TEXT)
            whole = second_turn(first, output.sequences, family)["input_ids"]
            return generator.generate(input_ids=whole, past_key_values=output.past_key_values, **TEXT)

    assert torch.equal(turns(True), turns(False))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rest", [[6], [2, (4, 8), 3]])
def test_a_prefix_with_an_image_then_the_rest_equals_one_prefill(family, rest):
    model, depth = shared(family), depths(family)[0]
    generator = StageAwareGenerator(model, PruningPlan(depth))
    whole = prompts(family, [[3, (4, 4), 4, *rest]])
    split = 3 + 6 + 4
    count = {"gemma3": 1, "qwen3_vl": 16}[family]  # of pixel_values, the prefix's part
    parts = [
        {"pixel_values": whole["vision"]["pixel_values"][:count], "image_grid_thw": torch.tensor([[1, 4, 4]])},
        {"pixel_values": whole["vision"]["pixel_values"][count:], "image_grid_thw": torch.tensor([[1, 4, 8]])},
    ]
    calls = []
    for part, ids in zip(parts, whole["input_ids"].split([split, whole["prompt_length"] - split], 1), strict=True):
        vision = {name: part[name] for name in whole["vision"]} if (ids == IMAGE).any() else {}
        calls.append({"input_ids": ids, **images(family, {"input_ids": ids, "vision": vision})})
    if "token_type_ids" in calls[1]:  # Gemma reads them by a token's place in the whole sequence
        calls[1]["token_type_ids"] = types(whole["input_ids"])
    cache = generator.prefill(**calls[0], last=False).past_key_values
    model.model.rope_deltas = torch.full((1, 1), 99)  # another conversation's
    ours = generator.prefill(**calls[1], past_key_values=cache)
    assert relative(ours.logits, two_pass(model, whole, depth, 1)[0]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_do_not_mix_the_positions_of_their_images(family):
    model, depth = shared(family), depths(family)[0]
    generator = StageAwareGenerator(model, PruningPlan(depth))
    batches = [prompts(family, [row], seed) for seed, row in enumerate(([(8, 8), 9], [12], [2, (4, 8), (4, 4), 3]))]
    alone = [generator.generate(**arguments(family, batch), **TEXT) for batch in batches]
    found = [None] * len(batches)

    def generate(number):
        for _ in range(3):
            found[number] = generator.generate(**arguments(family, batches[number]), **TEXT)

    at_once(len(batches), generate)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


# --- features of generate, videos -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_processors_and_static_caches_work_with_images(family):
    model, depth = shared(family), depths(family)[0]
    batch = prompts(family, [[4, (4, 8), 9], [7]])
    call, length = arguments(family, batch), batch["prompt_length"]
    generator = StageAwareGenerator(model, PruningPlan(depth))
    dynamic = generator.generate(**call, **TEXT)
    static = StaticCache(config=model.config.get_text_config(), max_cache_len=length + 11)
    assert torch.equal(generator.generate(**call, **TEXT, past_key_values=static), dynamic)
    for how in ({"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 1.5}):
        _, cache = context_pass(model, batch, depth, length - 1)
        cache.batch_repeat_interleave(how.get("num_beams", 1))
        place = {"position_ids": positions(model, batch)}
        plain = {name: batch[name] for name in ("input_ids", "attention_mask")} | place
        expected = model.generate(**plain, **TEXT, **how, past_key_values=cache)
        assert torch.equal(generator.generate(**call, **TEXT, **how), expected)


def test_videos_and_images_of_several_sizes_are_exact():
    model, depth = shared("qwen3_vl"), DEEPSTACK
    batch = prompts("qwen3_vl", [[3, (2, 4, 4), 2, (8, 4), 5], [4], [(3, 4, 8), 6]])
    generator = StageAwareGenerator(model, PruningPlan(depth))
    logits, cache = two_pass(model, batch, depth, 1)
    assert relative(generator.prefill(**arguments("qwen3_vl", batch)).logits, logits) < 1e-5
    tokens = generator.generate(**arguments("qwen3_vl", batch), **TEXT)[:, batch["prompt_length"] :]
    assert torch.equal(tokens, greedy(model, logits, cache, batch, TEXT["max_new_tokens"]))
    batch = with_response(batch)
    trace, _ = teacher_pass(generator.decoder, batch, depth)
    ours = student_logits(generator.projections, generator.plan, trace, batch["attention_mask"], batch["prompt_length"])
    expected = substituted(model, batch, depth, 1)[:, batch["prompt_length"] - 1 : -1]
    assert relative(ours, expected) < 1e-5


def test_a_depth_inside_the_deepstack_layers_is_refused_with_the_smallest_one_allowed():
    model = build("qwen3_vl")
    for depth in range(1, DEEPSTACK):
        message = rf"depth {depth}: .*DeepStack.* the smallest depth allowed is {DEEPSTACK}"
        with pytest.raises(InputError, match=message):
            StageAwareGenerator(model, PruningPlan(depth))
        with pytest.raises(InputError, match=message):
            benchmark(model, depths=[depth], lengths=[8], repeats=1)
    assert Decoder(build("gemma3")).smallest_depth == 1


# --- scoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_what_a_row_with_images_is_batched_with(family):
    rows = [[4, (4, 8), 9], [7], [(4, 4), 3]]

    together = with_response(prompts(family, rows))
    alone = []
    pixels = {"gemma3": [1, 0, 1], "qwen3_vl": [32, 0, 16]}[family]
    for number, kept in enumerate(together["vision"]["pixel_values"].split(pixels)):
        length = int(together["attention_mask"][number].sum())
        row = {name: together[name][number : number + 1, -length:] for name in ("input_ids", "attention_mask")}
        vision = {"pixel_values": kept} if len(kept) else {}
        if vision and family == "qwen3_vl":
            vision["image_grid_thw"] = together["vision"]["image_grid_thw"][0 if number == 0 else 1][None]
        alone.append(row | {"vision": vision, "prompt_length": length - 6, "row_seed": torch.tensor([number])})
    scores = score(build(family), [together])
    assert torch.allclose(scores, score(build(family), alone), rtol=1e-4)
    assert (scores[:-1] > 0).all()
    assert scores[-1, 0] == 0  # nothing reads the last layer's context


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_rows_with_images_are_the_same_where_layers_run_again(family, attention):
    decoder = Decoder(shared(family, attention))
    batch = with_response(prompts(family, [[4, (4, 8), 9], [7], [(4, 4), WINDOW + 3, (8, 4), 2]]))
    targets = batch["input_ids"][:, batch["prompt_length"] :]
    kept, again = (ImportanceScoring(decoder, gradient_checkpointing=each) for each in (False, True))
    gates = torch.ones(3, LAYERS[family], 2, requires_grad=True)
    loss_under_gates(kept, batch, gates, targets).backward()
    for given in (targets, None):  # None: targets drawn from each one's own logits
        assert relative(again.gradients(batch, given), kept.gradients(batch, given)) < 1e-5
    assert relative(again.gradients(batch, targets), gates.grad) < 1e-5


# --- closed form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_reads_images_whole_wherever_the_context_ends(family):
    """The pass of the plain objective stops at the context where it may; with images its result is the same."""
    batch = with_response(prompts(family, [[12, (4, 4)], [17], [(8, 8), 5]]))
    boundary = 1 if family == "gemma3" else 3  # after, or inside the first row's image
    decoder, depth = Decoder(shared(family)), depths(family)[0]
    fits = [ClosedFormFit(decoder, [depth], boundary, grouping=each) for each in ("none", "head")]
    for fit in fits:
        fit.validation_step(batch, 0)
    stopped, whole = (fit.solve(depth, 0.1, "plain") for fit in fits)
    for layer in stopped.fitted_layers:
        for ours, expected in zip(stopped.affine(layer), whole.affine(layer), strict=True):
            assert relative(ours, expected) < 1e-5
    assert relative(stopped.affine(depth + 1)[0], KVProjections(decoder, depth).affine(depth + 1)[0]) > 1e-3
