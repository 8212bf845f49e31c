"""Running some tokens of a pass through the pruned layers, over projected keys and values of all others.

This is what salient tokens need in addition to the plain pruned prefill: tokens anywhere in the prompt run in full, and
their true keys and values take the place of the projected ones, in token order. Generation (``prefill.py``) and
teacher-forced passes (``passes.py``) both use it twice: a probing pass of the last token scores the context, and then
the selected tokens and the boundary run together.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.models.attention import attention_weights
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.layer_parts import cut, of_rows
from pop_lightning.models.masks import rows_mask, seen
from pop_lightning.models.names import CACHE
from pop_lightning.pruning.selectors import selector_named
from pop_lightning.pruning.selectors.base import Seen, choose

PROBES = 1  # of the last prompt tokens, whose attention scores the context


class MendedCache:
    """Given to a layer in place of its cache: some tokens' own keys and values, and projected ones of all others.

    The layer hands in the keys and values of the tokens that it runs; the real cache is then updated once with those of
    the whole pass, so that sliding, static and quantized caches behave as in a plain pass.

    Args:
        cache: the real one, or None to keep nothing.
        projected: keys and values of the context, ``[batch, kv_heads, context, head_dim]`` each.
        index: the tokens that run, ``[batch, rows]``, counted from the pass's first.
        tokens: of the pass.
        kept: which tokens keep projected keys and values even if they run, ``[batch, tokens]``; none unless given.
    """

    def __init__(
        self,
        cache: Cache | None,
        projected: tuple[Tensor, Tensor],
        index: Tensor,
        tokens: int,
        kept: Tensor | None = None,
    ):
        self.cache, self.projected, self.index, self.tokens, self.kept = cache, projected, index, tokens, kept
        self.keys: Tensor | None = None  # what update returned

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        whole = [self._whole(*each) for each in zip(self.projected, (keys, values), strict=True)]
        if self.cache is not None:
            whole = self.cache.update(*whole, layer, *args, **kwargs)
        self.keys = whole[0]
        return tuple(whole)

    def _whole(self, projected: Tensor, own: Tensor) -> Tensor:
        batch, heads, context, width = projected.shape
        index = self.index.to(own.device)[:, None, :, None].expand(-1, heads, -1, width)
        rest = own.new_zeros(batch, heads, self.tokens - context, width)
        whole = torch.cat([projected.to(own), rest], dim=2)
        if self.kept is None:
            return whole.scatter_(2, index, own)
        return torch.where(self.kept.to(own.device)[:, None, :, None], whole, whole.scatter(2, index, own))

    def __getattr__(self, name: str):
        return getattr(self.cache, name)


@dataclass
class PrunedLayers:
    """The pruned layers of one pass, to be run on some of its tokens.

    Attributes:
        hidden: h_d of the pass, ``[batch, tokens, hidden]``.
        past: tokens that caches hold already.
        kwargs: ``{layer: keyword arguments}`` that the model passes to each layer, for all tokens.
        masks: ``{layer: mask}`` for all tokens, as the model builds it.
        projected: ``{layer: (keys, values)}`` of the context, ``[batch, kv_heads, context, head_dim]`` each.
        cut_masks: masks of some tokens that are made already.
    """

    decoder: Decoder
    hidden: Tensor
    past: int = 0
    kwargs: dict[int, dict] = field(default_factory=dict)
    masks: dict[int, object] = field(default_factory=dict)
    projected: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cut_masks: dict[tuple, tuple] = field(default_factory=dict)

    def add(self, layer: int, kwargs: dict, mask, projected: tuple[Tensor, Tensor]) -> None:
        """Record what the model passes to a layer for all tokens, and the projected keys and values of the context."""
        self.kwargs[layer], self.masks[layer], self.projected[layer] = kwargs, mask, projected

    def arguments(
        self, layer: int, index: Tensor, cache: Cache | None, tokens: int | None = None, kept: Tensor | None = None
    ) -> dict:
        """What a layer needs to run the tokens ``index`` ``[batch, rows]``: mask, cache and per-token arguments.

        Args:
            cache: receives the keys and values of the whole pass; None keeps them nowhere.
            tokens: of the pass, if it ends before the last one.
            kept: see :class:`MendedCache`.
        """
        tokens = self.hidden.shape[1] if tokens is None else tokens
        columns, offset = (tokens, 0) if cache is None else cache.get_mask_sizes(tokens, layer)
        return of_rows(self.kwargs[layer], index) | {
            "attention_mask": self._mask(self.masks[layer], index, columns, offset),
            CACHE: MendedCache(cache, self.projected[layer], index, tokens, kept),
        }

    def _mask(self, mask, index: Tensor, columns: int, offset: int):
        """:func:`rows_mask`, once for all layers of a kind, which share one mask."""
        key = id(mask), id(index), columns, offset
        if key not in self.cut_masks:
            # Mask and index are kept with the result, so that no other object gets their ids.
            self.cut_masks[key] = mask, index, rows_mask(mask, index, self.past, columns, offset)
        return self.cut_masks[key][-1]

    def run(
        self,
        index: Tensor,
        cache: Cache | None = None,
        kept: Tensor | None = None,
        run_layer: Callable | None = None,
    ) -> Tensor:
        """What leaves the last layer at the tokens ``index`` ``[batch, rows]``: ``[batch, rows, hidden]``.

        What a layer needed is dropped when it has run.

        Args:
            kept: see :class:`MendedCache`.
            run_layer: ``Decoder.run_layer`` unless given.
        """
        hidden = rows_of(self.hidden, index)
        for layer in list(self.projected):
            arguments = self.arguments(layer, index, cache, kept=kept)
            del self.projected[layer], self.masks[layer], self.kwargs[layer]
            hidden = (run_layer or self.decoder.run_layer)(layer, hidden, **arguments)
        return hidden


class Selection:
    """Scores the context while the probing tokens run through the pruned layers, then selects.

    Args:
        layers: the pass.
        context: how many of its tokens are context.
        in_prompt: how many of them belong to the prompt.
        prompt_tokens: all tokens of the prompt, of which the pass may be a part.
        padding: padding tokens in front of each row, ``[batch]``; none unless given.
        row_ends: where each row's context ends in the pass, ``[batch]``, if not all rows' at ``context``.
        weight: of a fitted selector (``KVProjections.selector``).

    Attributes:
        probes: the probing tokens and any that follow the prompt, ``[batch, probes]``, counted from the pass's first.
    """

    def __init__(
        self,
        layers: PrunedLayers,
        plan: PruningPlan,
        context: int,
        in_prompt: int,
        prompt_tokens: int,
        padding: Tensor | None = None,
        row_ends: Tensor | None = None,
        weight: Tensor | None = None,
    ):
        self.layers, self.plan = layers, plan
        self.selector, self.weight = selector_named(plan.selector), weight
        self.in_prompt, self.prompt_tokens, self.padding = in_prompt, prompt_tokens, padding
        self.context_end, self.row_ends = context, row_ends
        self.width = context if row_ends is None else in_prompt  # scored columns: the widest row's context
        self.decoder = layers.decoder
        self.watched = watched(self.decoder, plan.depth) if plan.salient else frozenset()
        batch, tokens, _ = layers.hidden.shape
        self.probes = torch.arange(max(0, in_prompt - PROBES), tokens, device=layers.hidden.device).expand(batch, -1)
        self.attention: Tensor | None = None
        self.heads: list[Tensor] = []
        self.visible: Tensor | None = None

    @torch.no_grad()
    def watch(self, layer: int, hidden: Tensor, arguments: dict, offset: int = 0) -> None:
        """Record what the probing tokens attended to in a layer that has run.

        Args:
            hidden: the layer's input at the probing tokens, ``[batch, probes, hidden]``.
            arguments: :meth:`PrunedLayers.arguments`, with which the layer ran.
            offset: the position of the first cached key.
        """
        if layer not in self.watched:
            return
        asking = slice(min(PROBES, self.in_prompt))  # tokens after the prompt do not ask
        visible = seen(arguments["attention_mask"])[:, asking]
        weights = attention_weights(
            self.decoder,
            layer,
            hidden[:, asking],
            cut(arguments.get("position_embeddings"), asking),
            self.probes[:, asking] + self.layers.past,
            arguments[CACHE].keys,
            visible,
        )
        first = self.layers.past - offset
        heads = weights[..., first : first + self.width].amax(3).flatten(1, 2)
        if self.selector.fitted:
            self.heads.append(heads.to(self.layers.hidden.device))
        weights = heads.amax(1)
        self.attention = weights if self.attention is None else self.attention.maximum(weights.to(self.attention))
        if self.visible is None:
            self.visible = visible[:, -1, first : first + self.in_prompt]

    def choose(self, allowed: Tensor | None = None, scores: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Select.

        Args:
            allowed: which tokens of the pass may be selected, ``[batch, tokens]``; all unless given.
            scores: of the context, ``[batch, context]``, in place of the selector's.

        Returns:
            The selected columns ``[batch, salient]``, counted from the pass's first token; and which tokens keep their
            projected keys and values even if they run, ``[batch, tokens]``, or None where rows need no such difference.
        """
        batch, tokens, _ = self.layers.hidden.shape
        columns = torch.arange(tokens, device=self.layers.hidden.device)
        in_context = columns < (self.context_end if self.row_ends is None else self.row_ends[:, None])
        usable = in_context.expand(batch, -1)[:, : self.width]
        if self.visible is not None:
            usable = usable.to(self.visible.device) & self.visible[:, : self.width]
        if allowed is not None:
            usable = usable & allowed[:, : self.width].to(usable.device)
        if self.plan.salient:
            if scores is None:
                scores = self.selector.score(self.seen())
            selected = choose(scores, usable, self._count(usable))
        else:
            selected = columns.new_empty(batch, 0)
        if allowed is None and self.row_ends is None:
            return selected, None
        own = torch.zeros(batch, tokens, dtype=torch.bool, device=usable.device)
        own = own.scatter(1, selected, usable.gather(1, selected))
        return selected, in_context.to(own.device) & ~own

    def seen(self) -> Seen:
        """What the selector is given."""
        hidden = self.layers.hidden[:, : self.width]
        if not self.selector.fitted:
            return Seen(hidden, self.attention)
        return Seen(
            hidden,
            self.attention,
            torch.cat(self.heads, 1),
            self.decoder.normalize(hidden),
            self.in_prompt - torch.arange(self.width, device=hidden.device),
            self.visible.sum(-1).clamp(min=1).to(hidden.device),
            self.weight,
        )

    def _count(self, usable: Tensor) -> Tensor:
        """How many tokens each row selects; of a prompt that is read in parts, each part selects its share."""
        real = torch.full((len(usable),), self.in_prompt, device=usable.device)
        if not isinstance(self.plan.salient, float):
            return torch.full_like(real, -(-self.plan.salient * self.in_prompt // self.prompt_tokens))
        if self.padding is not None:
            real = (real - (self.padding - self.layers.past).clamp(min=0)).clamp(min=0)
        return count_of(self.plan.salient, real)


def watched(decoder: Decoder, depth: int) -> frozenset[int]:
    """The pruned layers whose attention counts: those that see the whole context, or all if none does."""
    pruned = range(depth, decoder.num_layers)
    return frozenset([layer for layer in pruned if decoder.window(layer) is None] or pruned)


def check_selector(plan: PruningPlan, weight: Tensor | None) -> None:
    """Raise :class:`InputError` where a plan needs a fitted selector and there is none."""
    if plan.salient and weight is None and selector_named(plan.selector).fitted:
        raise InputError(
            f"selector {plan.selector!r} has no fitted weight for depth {plan.depth}: fit it "
            "(pop_lightning.fitting.selectors.SelectorFit; pop-fit does), or choose selector 'attention'."
        )


def depends_on_padding(plan: PruningPlan) -> bool:
    """Whether rows of one batch that have different lengths differ in their numbers of tokens that run in full."""
    return isinstance(plan.boundary, float) or isinstance(plan.salient, float)


def count_of(part: int | float, tokens: Tensor) -> Tensor:
    """:func:`~pop_lightning.core.plan.number_of` for each row: ``part``, or the share of its tokens ``[batch]``."""
    if isinstance(part, float):
        return (part * tokens.double() - 1e-9).ceil().long()
    return torch.full_like(tokens, part)


def context_ends(plan: PruningPlan, prompt: int, padding: Tensor | None) -> Tensor | None:
    """Where the context of each row ends, ``[batch]``, if the boundary is a share of rows of different lengths.

    Args:
        prompt: the padded prompts' width.
        padding: padding tokens in front of each row, ``[batch]``, or None where there are none.
    """
    if padding is None or not isinstance(plan.boundary, float):
        return None
    return prompt - count_of(plan.boundary, prompt - padding)


def check_salient(decoder: Decoder, plan: PruningPlan, ragged: bool = False) -> None:
    """Raise :class:`InputError` where a model cannot run tokens of a prompt that do not follow one another.

    Args:
        ragged: rows of a batch differ in the number of their boundary tokens (:func:`context_ends`).
    """
    if not (plan.salient or ragged):
        return
    what, instead = "salient tokens", "salient 0"
    if not plan.salient:
        what, instead = "a boundary that is a share of prompts of different lengths", "a whole number for boundary"
    implementation = decoder.config._attn_implementation
    if "flash" in implementation:
        raise InputError(
            f"{what}: each token needs a mask of its own, which attn_implementation {implementation!r} does not take; "
            f"use 'sdpa', 'eager' or 'flex_attention', or {instead}."
        )
    for layer in plan.pruned(decoder.num_layers):
        if layer in decoder.parts and decoder.parts[layer].query_scale is not None:
            raise InputError(
                f"{decoder.name} cannot run {what} at depth {plan.depth}: layer {layer} scales its queries by "
                "their position in the cache (attention temperature), which tokens in the middle of a prompt do not "
                f"have there; use {instead}."
            )


def scratch(cache: Cache, layer: int) -> Cache | None:
    """A copy of one layer's cache that a probing pass may fill, or None where there is nothing to copy."""
    held = cache.layers[layer] if layer < len(cache.layers) else None
    if held is None or not (held.is_compileable or int(held.get_seq_length())):
        return None
    new = copy.copy(cache)
    new.layers = list(cache.layers)
    # Dynamic layers replace their tensors; static ones write into them.
    new.layers[layer] = copy.deepcopy(held) if held.is_compileable else copy.copy(held)
    return new


def rows_of(hidden: Tensor, index: Tensor) -> Tensor:
    """``[batch, tokens, hidden]`` at the tokens ``index`` ``[batch, rows]``."""
    return hidden.gather(1, index.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))
