"""Salient tokens: the selection and the prefill against plain passes that a reader believes at sight."""

import pytest
import torch
from transformers import DynamicCache

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import (
    COMMON,
    EVERY,
    WINDOW,
    build,
    context_pass,
    greedy,
    mapped_kv,
    ragged,
    random_maps,
    relative,
)

LAYERS = COMMON["num_hidden_layers"]


class Mended(DynamicCache):
    """A plain cache in whose layers from ``depth`` on the columns ``projected`` hold projected keys and values."""

    def __init__(self, model, mask, depth, projected, project):
        super().__init__(config=model.config)
        self.model, self.depth, self.projected, self.project = model, depth, projected, project
        self.positions = (mask.cumsum(-1) - 1).clamp(min=0)
        self.hidden = None
        self.handle = model.model.layers[depth].register_forward_pre_hook(self.remember, with_kwargs=True)

    def remember(self, module, args, kwargs):
        self.hidden = args[0] if args else kwargs["hidden_states"]

    def update(self, keys, values, layer, *args, **kwargs):
        if layer >= self.depth and self.hidden is not None:
            new = self.project(layer, self.hidden, self.positions)
            here = self.projected[:, None, :, None]
            keys, values = torch.where(here, new[0], keys), torch.where(here, new[1], values)
        return super().update(keys, values, layer, *args, **kwargs)


def mended_pass(model, ids, mask, depth, boundary, selected, project):
    """One plain pass of all tokens, in which unselected context has projected keys and values: logits and cache."""
    projected = torch.ones_like(mask, dtype=torch.bool)
    projected.scatter_(1, selected, False)
    projected[:, ids.shape[1] - boundary :] = False
    cache = Mended(model, mask, depth, projected, project)
    try:
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=cache.positions, past_key_values=cache, use_cache=True
        )
    finally:
        cache.handle.remove()
    cache.hidden = None
    return output.logits[:, -1:], cache


def most_read(model, ids, mask, depth, context, number, project):
    """What the last token reads most over projected keys: the most that any head of a global layer pays."""
    end = ids.shape[1] - 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    _, cache = context_pass(model, ids, mask, depth, end, project)
    read = model(
        input_ids=ids[:, end:],
        attention_mask=mask,
        position_ids=positions[:, end:],
        past_key_values=cache,
        use_cache=True,
        output_attentions=True,
    ).attentions
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * LAYERS
    whole = [layer for layer in range(depth, LAYERS) if kinds[layer] == "full_attention"]
    if len({weights.shape[-1] for weights in read}) == 1 and read[0].shape[-1] < end:  # every layer slides
        read = [torch.nn.functional.pad(weights, (end + 1 - weights.shape[-1], 0)) for weights in read]
    scores = torch.stack([read[layer][:, :, 0, :context].amax(1) for layer in whole]).amax(0)
    return scores.masked_fill(mask[:, :context] == 0, -1).topk(number).indices.sort(-1).values


def pair(model, plan, fitted, seed=0):
    maps = random_maps(plan.depth, seed, model) if fitted else {}
    projections = KVProjections(Decoder(model), plan.depth)
    if maps:
        projections.replace(maps, "full")
    return StageAwareGenerator(model, plan, projections), mapped_kv(model, maps)


def assert_same_caches(ours, reference, mask):
    for layer in range(LAYERS):
        a, b = ours.layers[layer], reference.layers[layer]
        assert a.get_seq_length() == b.get_seq_length()
        visible = mask.bool()[:, -b.keys.shape[-2] :]
        for name in ("keys", "values"):
            close = getattr(a, name).transpose(1, 2)[visible], getattr(b, name).transpose(1, 2)[visible]
            assert relative(*close) < 1e-5, (layer, name)


SCALED = ("llama4",)  # refused: queries are scaled by their position
ROWED = [family for family in EVERY if family not in SCALED and getattr(family, "values", [None])[0] not in SCALED]


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("family", ROWED)
def test_prefill_and_generation_are_a_plain_pass_with_unselected_context_projected(family, fitted):
    model = build(family, attention="eager")
    depth, boundary, number = 1, 3, 4
    generator, project = pair(model, PruningPlan(depth, boundary, number), fitted)
    ids, mask = ragged([3 * WINDOW + 1, 2 * WINDOW, WINDOW + 2])
    ours = generator.prefill(ids, mask)
    selected = generator.selected
    assert torch.equal(selected, most_read(model, ids, mask, depth, ids.shape[1] - boundary, number, project))
    logits, cache = mended_pass(model, ids, mask, depth, boundary, selected, project)
    assert relative(ours.logits, logits) < 1e-5
    assert_same_caches(ours.past_key_values, cache, mask)
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = generator.generate(input_ids=ids, attention_mask=mask, **arguments)[:, ids.shape[1] :]
    assert torch.equal(tokens, greedy(model, logits, cache, mask, 4))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", SCALED)
def test_queries_scaled_by_position_are_refused_by_layer(family):
    with pytest.raises(InputError, match="layer 1 scales its queries"):
        pair(build(family), PruningPlan(1, 1, 4), fitted=False)
