"""Attention weights of one layer, recomputed from its queries and cached keys, whatever kernel the model uses."""

import torch
from torch import Tensor

from pop_lightning.models.decoder import Decoder
from pop_lightning.models.layer_parts import LayerParts, Tables


def attention_weights(
    decoder: Decoder,
    layer: int,
    hidden: Tensor,
    position_embeddings: Tables | None,
    columns: Tensor,
    keys: Tensor,
    seen: Tensor,
) -> Tensor:
    """The attention weights of selected query tokens of a layer.

    Args:
        hidden: the layer's input at the query tokens, ``[batch, rows, hidden]``.
        position_embeddings: their rotary tables, ``[batch, rows, head_dim]`` each.
        columns: their positions in the sequence, ``[batch, rows]``.
        keys: of the whole sequence, as cached, ``[batch, kv_heads, tokens, head_dim]``.
        seen: which tokens each query sees, ``[batch, rows, tokens]``: :func:`seen_from`, or a mask of the model's own.

    Returns:
        ``[batch, kv_heads, queries per kv head, rows, tokens]``, float32; the sum is 1 without attention sinks.
    """
    attention, parts = decoder.attention(layer), decoder.parts[layer]
    queries = parts.queries(parts.norm(hidden)).unflatten(-1, (-1, parts.head_dim)).transpose(1, 2)
    queries = parts.place(queries, parts.q_norm, position_embeddings)
    if parts.query_scale is not None:
        queries = (queries * parts.query_scale(columns)[:, None, :, None]).to(queries.dtype)
    queries = queries.unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("bghqd,bgtd->bghqt", queries, keys).float()
    scores = scores * getattr(attention, "scaling", parts.head_dim**-0.5)
    if (cap := getattr(attention, "attn_logit_softcapping", None)) is not None:
        scores = torch.tanh(scores / cap) * cap
    scores = scores.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
    if (sinks := getattr(attention, "sinks", None)) is None:
        return scores.softmax(-1)
    # One score per head that belongs to no token; the weight that it gets is dropped (gpt-oss).
    sinks = sinks.float().view(1, keys.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


def seen_from(parts: LayerParts, columns: Tensor, attention_mask: Tensor) -> Tensor:
    """Which tokens the queries at ``columns`` ``[batch, rows]`` see: back as far as the layer's window, no padding.

    Args:
        attention_mask: ``[batch, tokens]`` of 1 (token) and 0 (padding).

    Returns:
        ``[batch, rows, tokens]``.
    """
    tokens = torch.arange(attention_mask.shape[1], device=columns.device)
    seen = (tokens <= columns[..., None]) & attention_mask[:, None].bool()
    if parts.chunked:
        first = (attention_mask.cumsum(-1) == 0).sum(-1)  # chunks are counted from a row's first token
        chunk, own = (tokens - first[:, None]) // parts.window, (columns - first[:, None]) // parts.window
        seen &= chunk[:, None] == own[..., None]
    elif parts.window is not None:
        seen &= tokens > columns[..., None] - parts.window
    return seen
