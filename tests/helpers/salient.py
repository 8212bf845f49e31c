"""The slow plain reference of salient tokens: two plain passes select, one plain pass with a mended cache generates."""

import math
from contextlib import contextmanager

import torch
from transformers import DynamicCache

from pop_lightning import StageAwareGenerator
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.names import CACHE
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import COMMON, context_pass, mapped_kv, random_maps, relative

LAYERS = COMMON["num_hidden_layers"]


class Mended(DynamicCache):
    """A plain cache that, in one forward, puts projected keys and values at the columns of ``projected``.

    ``projected`` is ``[batch, tokens]`` of the forward after :meth:`mend`; that forward may have more tokens
    (candidates of assisted decoding) and more rows (beams, return sequences) than it.
    """

    def __init__(self, model, depth, project):
        super().__init__(config=model.config)
        self.depth, self.project = depth, project
        self.hidden = self.projected = None
        self.handle = model.model.layers[depth].register_forward_pre_hook(self._remember, with_kwargs=True)

    def mend(self, projected, positions):
        self.projected, self.positions = projected, positions
        return self

    def _remember(self, module, args, kwargs):
        if self.projected is not None and kwargs.get(CACHE) is self:
            self.hidden = args[0] if args else kwargs["hidden_states"]

    def update(self, keys, values, layer, *args, **kwargs):
        if layer >= self.depth and self.hidden is not None:
            times, tokens = len(keys) // len(self.projected), self.projected.shape[1]
            projected, positions = (each.repeat_interleave(times, 0) for each in (self.projected, self.positions))
            new = self.project(layer, self.hidden[:, :tokens], positions)
            here = projected[:, None, :, None]
            keys, values = (
                torch.cat([torch.where(here, mended.to(own), own[:, :, :tokens]), own[:, :, tokens:]], dim=2)
                for mended, own in zip(new, (keys, values), strict=True)
            )
            if layer == LAYERS - 1:
                self.hidden = self.projected = None
        return super().update(keys, values, layer, *args, **kwargs)


@contextmanager
def mended(model, depth, project):
    """A :class:`Mended`, whose hook is removed at the end."""
    cache = Mended(model, depth, project)
    try:
        yield cache
    finally:
        cache.handle.remove()


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def projected_columns(mask, boundary, selected):
    """``[batch, tokens]``: neither selected ``[batch, salient]`` nor one of the ``boundary`` last tokens."""
    projected = torch.ones_like(mask, dtype=torch.bool)
    projected.scatter_(1, selected, False)
    return projected & (torch.arange(mask.shape[1]) < mask.shape[1] - boundary)


def mended_pass(model, ids, mask, depth, projected, project, cache=None):
    """One plain pass of the tokens after those of ``cache``, in which some have projected keys and values.

    Args:
        ids, projected: ``[batch, tokens]``; mask ``[batch, cached + tokens]``.
        cache: a :class:`Mended` to go on with.

    Returns:
        The last token's logits, and the cache.
    """
    new = cache is None
    cache = Mended(model, depth, project) if new else cache
    positions = positions_of(mask)[:, -ids.shape[1] :]
    try:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache.mend(projected, positions),
            use_cache=True,
        )
    finally:
        if new:
            cache.handle.remove()
    return output.logits[:, -1:], cache


def attention_read(model, ids, mask, depth, context, project, cache=None):
    """What the last token reads of each context token over projected keys: the most that any head of a layer that sees
    the whole context pays, ``[batch, context]``; padding and what no layer sees is -1. ``model`` must run eager
    attention."""
    end = ids.shape[1] - 1
    past = 0 if cache is None else int(cache.get_seq_length())
    if cache is not None:  # kept as it is: its layers replace their tensors
        cache, held = DynamicCache(config=model.config), cache
        for layer, own in zip(cache.layers, held.layers, strict=True):
            layer.__dict__ |= own.__dict__
    if end > past:
        _, cache = context_pass(model, ids, mask, depth, end, project, cache)
    read = model(
        input_ids=ids[:, end:],
        attention_mask=mask,
        position_ids=positions_of(mask)[:, end:],
        past_key_values=cache,
        use_cache=True,
        output_attentions=True,
    ).attentions
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * LAYERS
    whole = [layer for layer in range(depth, LAYERS) if kinds[layer] == "full_attention"]
    whole = whole or list(range(depth, LAYERS))
    read = [torch.nn.functional.pad(weights, (end + 1 - weights.shape[-1], 0), value=-1) for weights in read]
    scores = torch.stack([read[layer][:, :, 0, past:context].amax(1) for layer in whole]).amax(0)
    return scores.masked_fill(mask[:, past:context] == 0, -1)


def most_read(model, ids, mask, depth, context, number, project, cache=None):
    """The ``number`` context tokens that are read most (a number, or one for each row): columns of the whole sequence.

    Rows with fewer tokens repeat their first one, and one without any has column 0, which is padding."""
    past = 0 if cache is None else int(cache.get_seq_length())
    scores = attention_read(model, ids, mask, depth, context, project, cache)
    numbers = [number] * len(ids) if isinstance(number, int) else number
    rows = []
    for row, wanted in zip(scores, numbers, strict=True):
        taken = row.argsort(descending=True, stable=True)[: min(wanted, int((row >= 0).sum()))].sort().values
        rows.append(taken)
    width = max(map(len, rows))
    first = [row[:1] if len(row) else row.new_zeros(1) for row in rows]
    return past + torch.stack(
        [torch.cat([own.expand(width - len(row)), row]) for own, row in zip(first, rows, strict=True)]
    )


def share(part, tokens):
    """A share of so many tokens, rounded up."""
    return math.ceil(part * tokens - 1e-9)


def pair(model, plan, fitted=True, seed=0):
    """A generator, and the same projections for the reference."""
    maps = random_maps(plan.depth, seed, model) if fitted else {}
    maps = {layer: tuple(tensor.to(model.dtype) for tensor in each) for layer, each in maps.items()}
    projections = KVProjections(Decoder(model), plan.depth)
    if maps:
        projections.replace(maps, "full")
    return StageAwareGenerator(model, plan, projections), mapped_kv(model, maps)


def reference_prefill(model, ids, mask, plan, project, reader=None):
    """Selected tokens, logits and cache of a whole prompt; ``reader`` is the same model with eager attention."""
    context = ids.shape[1] - plan.boundary_of(ids.shape[1])
    if context <= 0:
        selected = torch.zeros(len(ids), 0, dtype=torch.long)
    else:
        selected = most_read(reader or model, ids, mask, plan.depth, context, plan.salient, project)
    projected = projected_columns(mask, plan.boundary, selected)
    return selected, *mended_pass(model, ids, mask, plan.depth, projected, project)


def reference_generate(model, ids, mask, plan, project, selected, **arguments):
    """Any feature of ``generate``: the plain model's own, over a cache that mends its first forward."""
    projected = projected_columns(mask, plan.boundary, selected)
    with mended(model, plan.depth, project) as cache:
        cache.mend(projected, positions_of(mask))
        return model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **arguments)


def assert_same_caches(ours, reference, mask, bound=1e-5):
    for layer in range(LAYERS):
        a, b = ours.layers[layer], reference.layers[layer]
        assert a.get_seq_length() == b.get_seq_length()
        visible = mask.bool()[:, -b.keys.shape[-2] :]
        for name in ("keys", "values"):
            close = getattr(a, name).transpose(1, 2)[visible], getattr(b, name).transpose(1, 2)[visible]
            assert relative(*close) < bound, (layer, name)
