"""The operation counter against PyTorch's own, against masks, and against figures worked out by hand."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from pop_lightning import PruningPlan, StageAwareGenerator
from pop_lightning.models import shapes
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.flops import count_prefill, prefill_flops, visible_pairs

from tests.helpers.families import COMMON, EVERY, WINDOW, build, ragged

LAYERS = COMMON["num_hidden_layers"]
LENGTHS = (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 1)


def measured_by_torch(generator, tokens):
    """What PyTorch's counter sees in one prefill: linear maps, and attention scaled from every pair to visible ones.

    Under eager attention the only ``bmm`` inside ``self_attn`` are scores and weighted values, so the two can be told
    apart; rotary tables are products too and are left out. PyTorch counts every pair: the share that the mask leaves
    is read off the masks that the layers got.
    """
    model, decoder = generator.model, generator.decoder
    shares, handles = {}, []

    def read_mask(layer):
        def hook(module, args, kwargs):
            mask = kwargs["attention_mask"]
            shares[layer] = 1.0 if mask is None else (mask == 0).float().mean().item()

        return hook

    for layer in range(decoder.num_layers):
        hook = decoder.attention(layer).register_forward_pre_hook(read_mask(layer), with_kwargs=True)
        handles.append(hook)
    ids, _ = ragged([tokens])
    with FlopCounterMode(display=False) as counter:
        generator.prefill(ids)
    for handle in handles:
        handle.remove()
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    products = [
        counter.get_flop_counts()[f"{type(model).__name__}.model.layers.{layer}.self_attn"][torch.ops.aten.bmm]
        for layer in range(decoder.num_layers)
    ]
    rotary = sum(n for name, n in counts.items() if name.endswith("rotary_emb"))
    linear = counts["Global"] - sum(products) - rotary
    attention = sum(product * shares[layer] for layer, product in enumerate(products))
    return linear, attention


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("depth", [1, 2, LAYERS])
def test_the_count_is_what_pytorch_counts_less_the_masked_pairs(family, depth):
    model = build(family, "eager")
    for tokens, boundary in itertools.product(LENGTHS, (1, 4)):
        generator = StageAwareGenerator(model, PruningPlan(depth, boundary))
        counted = count_prefill(generator.decoder, generator.plan, tokens)
        linear, attention = measured_by_torch(generator, tokens)
        assert counted.linear + counted.projections + counted.head == linear, (tokens, boundary)
        assert counted.attention == pytest.approx(attention, rel=1e-6), (tokens, boundary)


def test_visible_pairs_are_the_ones_of_a_mask_written_out():
    for tokens, window in itertools.product(range(1, 12), (None, 1, 2, 5, 11, 20)):
        query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
        mask = (key <= query) & (query - key < (window or tokens))
        for first in range(tokens + 1):
            assert visible_pairs(first, tokens, window) == mask[first:].sum()


def test_at_depth_L_and_with_no_context_nothing_is_saved():
    decoder = Decoder(build("gemma3"))
    plain = prefill_flops(decoder, PruningPlan(LAYERS), 20)
    assert prefill_flops(decoder, PruningPlan(2, boundary=20), 20) == plain
    assert prefill_flops(decoder, PruningPlan(2), 20) < plain


@pytest.mark.parametrize(
    ("name", "depth", "ratio"), [("llama3_1_8b", 22, 1.43), ("gemma3_12b", 32, 1.47), ("qwen3_8b", 24, 1.47)]
)
def test_a_third_pruned_at_2048_tokens_saves_what_the_published_shapes_allow(name, depth, ratio):
    decoder = Decoder(shapes.meta(name))
    plain, pruned = (prefill_flops(decoder, PruningPlan(d), 2048) for d in (decoder.num_layers, depth))
    assert round(plain / pruned, 2) == ratio


def test_llama_8b_is_counted_as_by_hand():
    """One layer: q and o 4096 x 4096, k and v 1024 x 4096, three MLP maps 14336 x 4096; 128256 words in the head."""
    layer = 2 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    pairs = 2048 * 2049 // 2
    counted = count_prefill(Decoder(shapes.meta("llama3_1_8b")), PruningPlan(32), 2048)
    assert (counted.linear, counted.attention) == (32 * 2048 * layer, 32 * 4 * 4096 * pairs)
    assert (counted.projections, counted.head) == (0, 2 * 128256 * 4096)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3_1_8b", 8_030_261_248),
        ("llama3_3_70b", 70_553_706_496),
        ("mistral_7b", 7_248_023_552),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_vl_8b", 8_767_123_696),
    ],
)
def test_a_shape_has_the_published_number_of_parameters(name, parameters):
    model = shapes.meta(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(("name", "parameters"), [("gemma3_4b", 4_300_079_472), ("gemma3_12b", 12_187_325_040)])
def test_a_gemma_shape_with_the_published_vision_tower_has_the_published_number_of_parameters(name, parameters):
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
              "image_size": 896, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    config = Gemma3Config(text_config=shapes.shape(name).make().to_dict(), vision_config=vision)
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
