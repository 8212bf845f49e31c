"""The pruned prefill and generation against two plain passes, and what must hold exactly."""

import contextlib
import functools
import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.positions import position_ids
from pop_lightning.pruning import prefill
from pop_lightning.pruning.passes import student_logits
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import (
    COMMON,
    EVERY,
    MATRIX,
    WINDOW,
    build,
    greedy,
    mapped_kv,
    ragged,
    random_maps,
    relative,
    take_all_experts,
    two_pass,
)

LAYERS = COMMON["num_hidden_layers"]
KINDS = ("reuse", "replaced")


# Where the matrices run: on a GPU as well where there is one.
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@functools.cache
def shared(family, attention, device, dtype=torch.float32, seed=0, exact=False):
    """One model for many cases; nothing in this file's matrices changes it. ``exact``: the same weights in float32."""
    model = build(family, attention, dtype, seed).to(device)
    if dtype == torch.bfloat16:
        take_all_experts(model)
    return model.float() if exact else model


def hooks(model):
    """Only pre-hooks are ours: Transformers does not remove its forward hooks when hidden states were asked for."""
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def lengths(boundary):
    """Prompt lengths around every edge: one token, the boundary, the window, several windows."""
    edges = {1, 2, boundary, boundary + 1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 1, boundary + 2 * WINDOW + 1}
    return sorted(edges - {0})


def prompts(batch, length, seed=0):
    return ragged([length] if batch == "one" else [length, 1, (length + 1) // 2], seed)


def pruned_pair(model, depth, boundary, kind, seed=0):
    """The generator under test and the reference's projections: reuse, or random maps in place of fitted ones."""
    maps = random_maps(depth, seed, model) if kind == "replaced" else {}
    maps = {layer: tuple(tensor.to(model.dtype) for tensor in pair) for layer, pair in maps.items()}
    projections = KVProjections(Decoder(model), depth)
    if maps:
        projections.replace(maps, "full")
    return StageAwareGenerator(model, PruningPlan(depth, boundary), projections), maps


def compare(family, attention, kind, depth, boundary, batch, length, *, device="cpu", seed=0, steps=0):
    """Float32: logits and caches to 1e-5 of the two-pass reference; with ``steps``, greedy tokens one for one."""
    model = shared(family, attention, device, seed=seed)
    ids, mask = (tensor.to(device) for tensor in prompts(batch, length, seed))
    generator, maps = pruned_pair(model, depth, boundary, kind, seed)
    ours = generator.prefill(ids, mask)
    logits, cache = two_pass(model, ids, mask, depth, boundary, mapped_kv(model, maps))
    assert relative(ours.logits, logits) < 1e-5
    real = mask.bool()
    for layer in range(LAYERS):
        ours_layer, ref_layer = ours.past_key_values.layers[layer], cache.layers[layer]
        assert ours_layer.get_seq_length() == ref_layer.get_seq_length()
        held = ref_layer.keys.shape[-2]
        visible = real[:, -held:]
        for name in ("keys", "values"):
            a = getattr(ours_layer, name).transpose(1, 2)[visible]
            b = getattr(ref_layer, name).transpose(1, 2)[visible]
            assert relative(a, b) < 1e-5, (layer, name)
    if steps:
        arguments = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "eos_token_id": None}
        tokens = generator.generate(input_ids=ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]
        assert torch.equal(tokens, greedy(model, logits, cache, mask, steps))
    assert hooks(model) == 0


def compare_in_bfloat16(family, attention, kind, depth, boundary, batch, length, *, device="cpu", seeds=range(4)):
    """Against the float32 reference, at most 1.5 times the error that two plain passes in bfloat16 make."""
    ours_error, two_pass_error = 0.0, 0.0
    for seed in seeds:
        model = shared(family, attention, device, torch.bfloat16, seed)
        exact = shared(family, attention, device, torch.bfloat16, seed, exact=True)
        ids, mask = (tensor.to(device) for tensor in prompts(batch, length, seed))
        generator, maps = pruned_pair(model, depth, boundary, kind, seed)
        reference, _ = two_pass(exact, ids, mask, depth, boundary, mapped_kv(exact, maps))
        plain, _ = two_pass(model, ids, mask, depth, boundary, mapped_kv(model, maps))
        ours_error += (generator.prefill(ids, mask).logits.float() - reference).square().sum().item()
        two_pass_error += (plain.float() - reference).square().sum().item()
    assert ours_error <= 1.5**2 * two_pass_error


PAIRWISE = [
    # family, attention, kind, depth, boundary, batch, length
    ("llama", "sdpa", "reuse", 2, 1, "ragged", 25),
    ("llama", "eager", "replaced", 1, 0, "one", 21),
    ("llama", "sdpa", "replaced", 3, 4, "one", 2),
    ("llama", "eager", "reuse", 1, 32, "ragged", 33),
    ("llama", "sdpa", "reuse", 1, 4, "one", 25),
    ("mistral", "sdpa", "reuse", 2, 4, "ragged", 9),
    ("mistral", "eager", "replaced", 1, 1, "one", 8),
    ("mistral", "sdpa", "replaced", 1, 0, "ragged", 25),
    ("mistral", "eager", "reuse", 3, 32, "one", 49),
    ("qwen2", "sdpa", "replaced", 1, 1, "ragged", 7),
    ("qwen2", "eager", "reuse", 3, 4, "ragged", 21),
    ("qwen2", "sdpa", "reuse", 2, 0, "one", 9),
    ("qwen2", "sdpa", "replaced", 2, 32, "one", 33),
    ("qwen3", "sdpa", "replaced", 2, 1, "one", 25),
    ("qwen3", "eager", "reuse", 1, 4, "ragged", 5),
    ("qwen3", "sdpa", "reuse", 1, 0, "ragged", 8),
    ("qwen3", "eager", "replaced", 1, 32, "one", 49),
    ("gemma3", "sdpa", "replaced", 1, 1, "ragged", 25),
    ("gemma3", "eager", "reuse", 2, 0, "ragged", 9),
    ("gemma3", "sdpa", "reuse", 3, 4, "one", 21),
    ("gemma3", "sdpa", "replaced", 1, 32, "ragged", 49),
    ("qwen3_moe", "sdpa", "replaced", 1, 4, "ragged", 25),
    ("qwen3_moe", "eager", "reuse", 2, 0, "one", 9),
    ("phi3", "sdpa", "replaced", 1, 1, "ragged", 25),
    ("phi3", "eager", "reuse", 2, 4, "one", 9),
    ("smollm3", "sdpa", "reuse", 1, 4, "ragged", 25),
    ("smollm3", "eager", "replaced", 2, 1, "one", 8),
    ("gemma2", "eager", "replaced", 1, 4, "ragged", 25),
    ("gemma2", "eager", "reuse", 2, 1, "one", 9),
    ("gemma4", "sdpa", "replaced", 1, 4, "ragged", 25),
    ("gemma4", "eager", "reuse", 2, 1, "one", 9),
    ("gemma4", "sdpa", "reuse", 1, 0, "ragged", 8),
    ("gemma4_moe", "sdpa", "reuse", 1, 4, "ragged", 25),
    ("gemma4_moe", "eager", "replaced", 2, 1, "one", 9),
    ("llama4", "sdpa", "replaced", 1, 4, "ragged", 25),
    ("llama4", "eager", "reuse", 2, 1, "one", 16),
    ("llama4", "sdpa", "reuse", 1, 32, "ragged", 33),
    ("gpt_oss", "eager", "replaced", 1, 4, "ragged", 25),
    ("gpt_oss", "eager", "reuse", 2, 0, "one", 9),
    ("olmo2", "sdpa", "replaced", 1, 1, "ragged", 25),
    ("olmo2", "eager", "reuse", 2, 4, "one", 9),
    ("olmo3", "sdpa", "reuse", 1, 4, "ragged", 25),
    ("olmo3", "eager", "replaced", 2, 1, "one", 8),
    ("exaone4", "sdpa", "replaced", 1, 4, "ragged", 25),
    ("exaone4", "eager", "reuse", 2, 1, "one", 9),
    ("cohere2", "sdpa", "replaced", 1, 4, "ragged", 25),
    ("cohere2", "eager", "reuse", 2, 0, "one", 9),
    ("nemotron", "sdpa", "replaced", 1, 1, "ragged", 25),
    ("nemotron", "eager", "reuse", 2, 4, "one", 9),
    ("olmoe", "sdpa", "replaced", 1, 4, "ragged", 25),
    ("olmoe", "eager", "reuse", 2, 1, "one", 9),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "attention", "kind", "depth", "boundary", "batch", "length"), PAIRWISE)
def test_prefill_and_greedy_tokens_equal_two_passes(family, attention, kind, depth, boundary, batch, length, device):
    compare(family, attention, kind, depth, boundary, batch, length, device=device, steps=WINDOW + 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(("kind", "attention", "boundary"), [("reuse", "sdpa", 4), ("replaced", "eager", 1)])
def test_in_bfloat16_the_error_is_that_of_two_passes(family, kind, attention, boundary, device):
    attention = attention if (family, attention) in MATRIX else None
    compare_in_bfloat16(family, attention, kind, 1, boundary, "ragged", 25, device=device)


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boundary", [0, 1, 4, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "attention"), MATRIX)
def test_prefill_and_greedy_tokens_equal_two_passes_in_full(family, attention, kind, boundary, device):
    for depth, batch, length in itertools.product((1, 2, 3), ("one", "ragged"), lengths(boundary)):
        steps = WINDOW + 3 if depth == 1 else 1
        compare(family, attention, kind, depth, boundary, batch, length, device=device, steps=steps)


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("boundary", [1, 4, 32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "attention"), MATRIX)
def test_in_bfloat16_the_error_is_that_of_two_passes_in_full(family, attention, kind, boundary, device):
    for batch, length in itertools.product(("one", "ragged"), lengths(boundary)):
        compare_in_bfloat16(family, attention, kind, 1, boundary, batch, length, device=device)


@pytest.mark.parametrize("family", EVERY)
def test_at_depth_L_and_with_pruning_off_generation_is_the_plain_model(family):
    model = build(family)
    ids, mask = ragged([19, 7])
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**arguments)
    assert torch.equal(StageAwareGenerator(model, PruningPlan(LAYERS)).generate(**arguments), plain)
    pruned = StageAwareGenerator(model, PruningPlan(1))
    with pruned.full_model():
        assert torch.equal(pruned.generate(**arguments), plain)
    whole_prompt = StageAwareGenerator(model, PruningPlan(1, boundary=19))
    assert torch.equal(whole_prompt.generate(**arguments), plain)


@pytest.mark.parametrize("family", EVERY)
def test_depth_L_minus_1_loses_nothing(family):
    model = build(family)
    ids, mask = ragged([23, 11])
    plain = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask)).logits[:, -1:]
    pruned = StageAwareGenerator(model, PruningPlan(LAYERS - 1)).prefill(ids, mask).logits
    assert relative(pruned, plain) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("split", [1, 7, 15])
def test_a_prefix_then_the_rest_equals_one_prefill(family, split):
    model = build(family)
    ids, mask = ragged([20])
    generator = StageAwareGenerator(model, PruningPlan(2))
    prefix = generator.prefill(ids[:, :split], last=False).past_key_values
    rest = generator.prefill(ids[:, split:], past_key_values=prefix)
    assert relative(rest.logits, two_pass(model, ids, mask, 2, 1)[0]) < 1e-5


def test_a_cache_of_another_plan_is_refused():
    model = build("llama")
    ids, _ = ragged([20])
    cache = StageAwareGenerator(model, PruningPlan(2)).prefill(ids[:, :9], last=False).past_key_values
    with pytest.raises(InputError, match="another pruning plan"):
        StageAwareGenerator(model, PruningPlan(1)).prefill(ids[:, 9:], past_key_values=cache)


def test_a_cache_of_other_projections_at_the_same_depth_is_refused():
    model = build("llama")
    ids, _ = ragged([20])
    fitted, _ = pruned_pair(model, 1, 1, "replaced", seed=0)
    reuse, _ = pruned_pair(model, 1, 1, "reuse")
    others, _ = pruned_pair(model, 1, 1, "replaced", seed=1)
    again, _ = pruned_pair(model, 1, 1, "replaced", seed=0)

    def prefix():
        return fitted.prefill(ids[:, :9], last=False).past_key_values

    for other in (reuse, others):
        with pytest.raises(InputError, match="other projections"):
            other.prefill(ids[:, 9:], past_key_values=prefix())
    expected = fitted.prefill(ids[:, 9:], past_key_values=prefix()).logits
    assert torch.equal(again.prefill(ids[:, 9:], past_key_values=prefix()).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_projections_follow_a_model_that_is_moved_or_cast(kind):
    model = build("llama")
    ids, mask = ragged([20, 7])
    generator, _ = pruned_pair(model, 1, 1, kind)
    model.to(torch.bfloat16)  # without the generator's knowledge
    expected, _ = pruned_pair(build("llama", dtype=torch.bfloat16), 1, 1, kind)
    wanted = expected.prefill(ids, mask).logits
    # Folded in float32 and then rounded, or from rounded weights: a few roundings apart.
    assert relative(generator.prefill(ids, mask).logits.float(), wanted.float()) < 8 * torch.finfo(torch.bfloat16).eps
    assert {tensor.dtype for tensor in generator.projections.parameters()} == {torch.bfloat16}
    back = generator.to(torch.float32)
    assert back is generator
    assert {tensor.dtype for tensor in generator.projections.parameters()} == {torch.float32}


def test_hooks_are_removed_when_generation_fails():
    model = build("llama")
    generator = StageAwareGenerator(model, PruningPlan(2))
    with pytest.raises(Exception, match=r".+"):
        generator.generate(input_ids=torch.tensor([[5, 10_000]]), max_new_tokens=2)
    assert hooks(model) == 0
    with pytest.raises(InputError, match="use_cache=False"):
        generator.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("boundary", [0, 1, 3])
def test_rerunning_only_the_pruned_layers_gives_the_pruned_models_logits(family, boundary):
    model = build(family)
    ids, mask = ragged([17, 9])
    response = torch.randint(3, COMMON["vocab_size"], (2, 6), generator=torch.Generator().manual_seed(1))
    row, row_mask = torch.cat([ids, response], 1), torch.cat([mask, torch.ones_like(response)], 1)
    decoder, plan = Decoder(model), PruningPlan(2, boundary)
    with decoder.tracing() as trace:
        model(input_ids=row, attention_mask=row_mask, position_ids=position_ids(row_mask), use_cache=False)
    ours = student_logits(KVProjections(decoder, 2), plan, trace, row_mask, ids.shape[1])
    logits, cache = two_pass(model, ids, mask, 2, boundary)
    rest = model(
        input_ids=response[:, :-1],
        attention_mask=row_mask[:, :-1],
        position_ids=position_ids(row_mask)[:, ids.shape[1] : -1],
        past_key_values=cache,
        use_cache=True,
    ).logits
    assert relative(ours, torch.cat([logits, rest], 1)) < 1e-5


# --- what a prefill costs ------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Every operation that ran, and those that make the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.names, self.products = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.append(name)
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.products.append((left.shape[0], right.shape[1]))
        return func(*args, **(kwargs or {}))

    @property
    def waits(self):
        return sum(name in self.WAITS for name in self.names)


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors made while it is on."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs or {})):
            if isinstance(tensor, torch.Tensor):  # whatever is first seen as an argument was there before
                self.known.add(tensor.untyped_storage())
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def freed(self, size):
        self.live -= size


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize(("boundary", "batch"), [(1, "one"), (4, "ragged")])
def test_above_the_depth_context_tokens_get_keys_and_values_and_nothing_else(family, boundary, batch):
    model, depth, length = build(family), 1, 3 * WINDOW
    ids, mask = prompts(batch, length)
    generator = StageAwareGenerator(model, PruningPlan(depth, boundary))
    rows, handles = {}, []
    operations = Operations()
    for layer in range(depth, LAYERS):
        block = model.model.layers[layer]
        attention, feed_forward = block.self_attn, block.feed_forward if family == "llama4" else block.mlp
        queries = attention.qkv_proj if family == "phi3" else attention.q_proj
        for name, module in {"q": queries, "o": attention.o_proj, "mlp": feed_forward}.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, key=(layer, name): rows.__setitem__(key, args[0].shape[1])
                )
            )
    handles.append(model.lm_head.register_forward_hook(lambda *call: rows.__setitem__("head", call[2].shape[1])))
    handles.append(model.model.layers[depth].register_forward_pre_hook(lambda *_: operations.products.clear()))
    with operations:
        generator.prefill(ids, mask)
    for handle in handles:
        handle.remove()
    assert rows.pop("head") == 1
    assert set(rows.values()) == {boundary}
    # one product per visible span, over the tokens that the span's layers will ever see
    decoder = generator.decoder
    spans = {}
    for layer in range(depth, LAYERS):
        visible = decoder.visible(layer, length - boundary)
        spans[visible] = spans.get(visible, 0) + 2 * decoder.parts[layer].kv_dim
    expected = sorted((len(ids) * visible, width) for visible, width in spans.items())
    larger = [product for product in operations.products if product[0] > len(ids) * boundary]
    assert sorted(larger) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("boundary", [1, 4])
def test_pruning_adds_no_wait_for_the_device_and_no_step_that_grows_with_the_prompt(family, boundary):
    model = build(family)
    generator = StageAwareGenerator(model, PruningPlan(1, boundary))
    counts = []
    for length in (2 * WINDOW, 8 * WINDOW):
        for cache in (None, StaticCache(config=model.config, max_cache_len=80)):
            ids, _ = ragged([length])
            with Operations() as pruned:
                generator.prefill(ids, past_key_values=cache)
            if cache is not None:
                cache.reset()
            with generator.full_model(), Operations() as plain:
                generator.prefill(ids, past_key_values=cache)
            assert pruned.waits <= plain.waits
            counts.append(len(pruned.names))
    assert counts[:2] == counts[2:]


def test_decode_runs_without_hooks():
    model = build("gemma3")
    ids, mask = ragged([2 * WINDOW])
    generator = StageAwareGenerator(model, PruningPlan(1))
    met = []
    handle = model.lm_head.register_forward_hook(lambda *_: met.append(hooks(model)))
    generator.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    handle.remove()
    assert met == [0, 0, 0, 0]


def wide(kv_heads, family="llama"):
    """Layers enough, and keys and values wide enough, for one product over all of them to be too much memory."""
    shape = COMMON | {
        "num_hidden_layers": 20, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": kv_heads,
        "num_attention_heads": 8, "max_position_embeddings": 1024,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "gemma3":
        config = Gemma3TextConfig(**shape, sliding_window=64, layer_types=["sliding_attention", "full_attention"] * 10)
        return Gemma3ForCausalLM(config).eval().requires_grad_(False)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval().requires_grad_(False)


def peak(generator, ids, pruned=True):
    with contextlib.nullcontext() if pruned else generator.full_model():
        generator.prefill(ids)
        with LiveBytes() as memory:
            generator.prefill(ids)
    return memory.peak


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("depth", [1, 13])
def test_peak_memory_of_a_prefill_is_at_most_the_plain_models(family, kv_heads, depth):
    model = wide(kv_heads, family)
    ids = torch.randint(3, 97, (2, 512), generator=torch.Generator().manual_seed(0))
    generator = StageAwareGenerator(model, PruningPlan(depth))
    assert peak(generator, ids) <= peak(generator, ids, pruned=False)


def test_the_bound_on_waiting_products_is_what_keeps_the_peak_low(monkeypatch):
    model = wide(8)
    ids = torch.randint(3, 97, (2, 512), generator=torch.Generator().manual_seed(0))
    generator = StageAwareGenerator(model, PruningPlan(1))
    monkeypatch.setattr(prefill, "mlp_dim", lambda config: 1 << 30)
    assert peak(generator, ids) > peak(generator, ids, pruned=False)


@pytest.mark.parametrize(("depth", "boundary"), [(0, 1), (5, 1), (2, -1), (1.5, 1)])
def test_a_plan_outside_the_model_is_refused(depth, boundary):
    with pytest.raises(InputError):
        StageAwareGenerator(build("llama"), PruningPlan(depth, boundary))


def test_a_model_that_is_built_otherwise_is_refused_by_name():
    model = build("llama")
    attention = model.model.layers[3].self_attn
    plain = attention.k_proj.forward
    attention.k_proj.forward = lambda x: plain(x) * 1.01  # a scale that the projections cannot know of
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*layer 3"):
        StageAwareGenerator(model, PruningPlan(2))
