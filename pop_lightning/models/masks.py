"""Masks for some rows of a prompt over a cache, and keys and values placed in the cache where masks expect them."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from pop_lightning.core.errors import InputError
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.names import CACHE


def layer_mask(
    decoder: Decoder, layer: int, hidden: Tensor, attention_mask: Tensor | None, cache: Cache
) -> Tensor | None:
    """The mask for ``hidden``'s rows over what ``cache`` already holds for ``layer`` plus those rows themselves.

    Args:
        hidden: ``[batch, rows, hidden]``, of which only shape, dtype and device are used.
        attention_mask: ``[batch, cached + rows]`` of 1 (token) and 0 (padding), or None.
    """
    parts = decoder.parts[layer]
    create = create_chunked_causal_mask if parts.chunked else create_sliding_window_causal_mask
    if parts.window is None:
        create = create_causal_mask
    return create(
        config=decoder.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        layer_idx=layer,
        **{CACHE: cache},
    )


def tail_mask(decoder: Decoder, layer: int, mask, hidden: Tensor, past: int, cache: Cache, following: int = 0):
    """The part of a prompt's ``mask`` for its last rows, over what ``cache`` holds for ``layer`` plus those rows.

    Args:
        mask: the mask that the model built for the whole prompt, in the form of its attention implementation: 4-D
            (sdpa, eager), :class:`BlockMask` (flex), 2-D padding (flash), or None.
        hidden: ``[batch, rows, hidden]``, the last rows; only shape and device are used.
        past: tokens before these rows, cached ones included.
        following: tokens of the mask that follow these rows and are left out.

    Raises:
        InputError: a mask of another form; the message names the implementation.
    """
    rows = hidden.shape[1]
    columns, offset = cache.get_mask_sizes(rows, layer)
    implementation = decoder.config._attn_implementation
    if mask is None:
        # For the whole prompt None meant "causal from the top left", but these rows are at the bottom right.
        if "flash" in implementation or (rows == 1 and not cache.layers[layer].is_compileable):
            return None
        queries = torch.arange(past, past + rows, device=hidden.device).unsqueeze(-1)
        keys = torch.arange(offset, offset + columns, device=hidden.device)
        return (keys <= queries).expand(hidden.shape[0], 1, rows, columns)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        last, end = (length - following for length in mask.shape[2:])
        return mask[:, :, last - rows : last, end - columns : end]
    if isinstance(mask, Tensor) and mask.dim() == 2:
        end = mask.shape[1] - following
        return mask[:, end - columns : end]
    if isinstance(mask, BlockMask):
        return _last_block(mask, rows, columns, following)
    raise InputError(
        f"attn_implementation {implementation!r} builds masks of type {type(mask).__name__}, which cannot be cut "
        f"to the boundary tokens; use 'sdpa', 'eager', 'flex_attention' or 'flash_attention_2'."
    )


def rows_mask(mask, index: Tensor, past: int, columns: int, offset: int = 0):
    """The part of a pass's ``mask`` for the tokens ``index`` ``[batch, rows]``, over ``columns`` keys.

    Args:
        mask: as for :func:`tail_mask`, of the whole pass; a 2-D one has no rows to take.
        index: counted from the pass's first token.
        past: tokens before the pass.
        offset: the position of the first key, which is not 0 where a window has moved on.
    """
    if mask is None:
        keys = torch.arange(offset, offset + columns, device=index.device)
        return (keys <= past + index[..., None])[:, None]
    if isinstance(mask, BlockMask):
        whole, (batch, heads) = mask.mask_mod, mask.shape[:2]

        def some(batch, head, query, key):
            return whole(batch, head, index[batch, query], key)

        device = mask.kv_num_blocks.device
        return create_block_mask(some, max(batch, len(index)), heads, index.shape[1], columns, device=device)
    index = index.to(mask.device)
    batch = torch.arange(len(index), device=mask.device)[:, None]
    return mask.expand(len(index), -1, -1, -1)[batch, :, index].transpose(1, 2)[..., :columns]


def seen(mask) -> Tensor:
    """A mask ``[batch, heads, rows, columns]`` that is not None, as booleans ``[batch, rows, columns]``."""
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, *mask.shape[:2], *mask.seq_lengths, device=mask.kv_num_blocks.device)[:, 0]
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2


def append(cache: Cache, layer: int, keys: Tensor, values: Tensor, skipped: int = 0) -> None:
    """Put keys and values ``[batch, heads, tokens, head_dim]`` into a layer's cache, after ``skipped`` tokens.

    The skipped tokens are those that no later token of the layer can see (``Decoder.visible``). A cache layer that
    slides drops them anyway and only counts them; a static one needs a column of zeros as well, because it holds a
    whole window and not window-1. Every other cache layer gets zeros, which the layer's mask hides.
    """
    held = cache.layers[layer] if layer < len(cache.layers) else None  # plain dynamic caches grow their layers
    length, zeros = None, skipped
    if skipped and isinstance(held, DynamicSlidingWindowLayer):
        length, zeros = "cumulative_length", 0
    elif skipped and isinstance(held, StaticSlidingWindowLayer):
        length, zeros = "cumulative_length_int", 1
    if zeros:
        keys, values = (nn.functional.pad(tensor, (0, 0, zeros, 0)) for tensor in (keys, values))
    cache.update(keys, values, layer)
    if length is not None:
        setattr(held, length, getattr(held, length) + skipped - zeros)


def appendable(cache: Cache) -> Cache:
    """A copy to append to while ``cache`` is unchanged: dynamic layers replace their tensors, not write into them."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def _last_block(mask: BlockMask, rows: int, columns: int, following: int) -> BlockMask:
    """The bottom right ``[rows, columns]`` of a block mask whose last ``following`` tokens are left out."""
    queries, keys = (length - following - kept for length, kept in zip(mask.seq_lengths, (rows, columns), strict=True))
    whole = mask.mask_mod

    def last(batch, head, query, key):
        return whole(batch, head, query + queries, key + keys)

    batch, heads = mask.shape[:2]
    return create_block_mask(last, batch, heads, rows, columns, device=mask.kv_num_blocks.device)
