"""What one decoder layer is made of: the one file to change for a new family.

:func:`layer_parts` reads a layer by its structure into a :class:`LayerParts`; nothing here asks for a family by name,
and the attach check (``pruning/attach_check.py``) tries what was read on the model itself."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Rotary tables as a layer gets them: cos and sin ``[batch, tokens, rotary dim]``, or one complex tensor (Llama 4).
Tables = tuple[Tensor, Tensor] | Tensor


KINDS = ("full_attention", "sliding_attention", "chunked_attention")


# What a part that keeps a state is called in a layer, and what such layers are called in ``layer_types``.
RECURRENT = ("linear_attn", "mamba", "conv", "mixer", "temporal_block")


RECURRENT_KINDS = ("linear_attention", "mamba", "mamba2", "conv", "hybrid", "hybrid_sliding", "recurrent")


FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "moe")


# What a layer is told of each of its tokens, and along which dimension of it the tokens lie.
PER_TOKEN = {"position_embeddings": 1, "position_ids": -1, "per_layer_input": 1}


@dataclass(frozen=True)
class Rows:
    """Some output rows of a linear map: all of a ``k_proj``, or the keys' share of a fused ``qkv_proj``."""

    linear: nn.Module
    start: int
    count: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.count)

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(x)[..., self.span]


@dataclass(frozen=True)
class LayerParts:
    """How one layer makes queries, keys and values out of its input; the order of the fields is that of the steps.

    Attributes:
        norm: the input norm.
        queries, keys, values: rows of the linear maps that follow it; keys and values may be the same rows.
        head_dim: width of one head.
        q_norm, k_norm, v_norm: what normalises each head, or None.
        rotate: RoPE, ``([batch, heads, tokens, head_dim], Tables)`` to the same shape, or None (NoPE).
        norms_after_rotation: whether q_norm and k_norm follow RoPE.
        window: how many tokens back a token sees, itself included, or None for all.
        chunked: whether the window is a chunk: a token sees back to its chunk's start only.
        query_scale: the factor on a query by its position, ``[...]`` to ``[...]``, or None.
    """

    norm: nn.Module
    queries: Rows
    keys: Rows
    values: Rows
    head_dim: int
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    v_norm: nn.Module | None = None
    rotate: Callable[[Tensor, Tables], Tensor] | None = None
    norms_after_rotation: bool = False
    window: int | None = None
    chunked: bool = False
    query_scale: Callable[[Tensor], Tensor] | None = None

    @property
    def kv_dim(self) -> int:
        """Width of the layer's keys (and values): key-value heads times head_dim."""
        return self.keys.count

    @property
    def kv_heads(self) -> int:
        return self.keys.count // self.head_dim

    @property
    def heads(self) -> int:
        return self.queries.count // self.head_dim

    def place(self, x: Tensor, norm: nn.Module | None, tables: Tables | None) -> Tensor:
        """Queries or keys ``[batch, heads, tokens, head_dim]`` normalised and rotated, in the family's order."""
        if norm is not None and not self.norms_after_rotation:
            x = norm(x)
        if self.rotate is not None and tables is not None:
            x = self.rotate(x, tables)
        return norm(x) if norm is not None and self.norms_after_rotation else x


def layer_parts(block: nn.Module, kind: str | None, window: int | None) -> LayerParts | str:
    """Read one decoder layer, or say why it has no keys and values that a linear map of its input gives.

    This is where a family is added: a part that has another name or another place is found here and put into the
    field of :class:`LayerParts` that says what it does.

    Args:
        kind: the layer's entry in the config's ``layer_types``, where it has them.
        window: of the layer's cache.
    """
    if (reason := _refusal(block, kind)) is not None:
        return reason
    attention = block.self_attn
    queries, keys, values = _query_key_value_rows(attention)
    after = getattr(attention, "qk_norm", None)  # one norm for both, behind RoPE (Llama 4)
    return LayerParts(
        norm=block.input_layernorm,
        queries=queries,
        keys=keys,
        values=values,
        head_dim=attention.head_dim,
        q_norm=after or getattr(attention, "q_norm", None),
        k_norm=after or getattr(attention, "k_norm", None),
        v_norm=getattr(attention, "v_norm", None),
        rotate=_rotation(attention) if getattr(attention, "use_rope", True) else None,
        norms_after_rotation=after is not None,
        window=window,
        chunked=kind == "chunked_attention",
        query_scale=_query_scale(attention),
    )


def _refusal(block: nn.Module, kind: str | None) -> str | None:
    """Why a layer cannot be pruned, as the rest of a sentence about it."""
    attention = getattr(block, "self_attn", None)
    if (part := part_name(block, RECURRENT)) is not None or kind in RECURRENT_KINDS:
        return f"it is a recurrent layer ({part or kind}): its cache holds a state, not keys and values of each token"
    if any(hasattr(attention, name) for name in ("kv_b_proj", "kv_a_proj_with_mqa")):
        return "it has multi-head latent attention (MLA), whose keys and values are expanded from a compressed latent"
    if getattr(attention, "is_kv_shared_layer", False):
        return "it shares the keys and values of an earlier layer and has none of its own"
    if hasattr(block, "altup"):
        return "it carries several residual streams (AltUp), of which no single one gives its keys and values"
    if kind is not None and kind not in KINDS:
        return f"its kind is {kind}, of which only {', '.join(KINDS)} are known"
    missing = [name for name in ("input_layernorm", "self_attn") if getattr(block, name, None) is None]
    missing += [] if part_name(block, FEED_FORWARD) else ["mlp"]
    if not missing:
        missing += [] if hasattr(block.input_layernorm, "weight") else ["weight in its input_layernorm"]
        missing += [] if hasattr(attention, "head_dim") else ["self_attn.head_dim"]
    if not missing and _query_key_value_rows(attention) is None:
        missing = ["self_attn.k_proj", "self_attn.v_proj"]
    if missing:
        return f"it has no {', '.join(missing)}"
    width = getattr(getattr(attention, "k_norm", None), "weight", torch.empty(0)).numel()  # 0 where it is sharded
    if width not in (0, attention.head_dim):
        return "it normalises the keys of all heads together, not each head"
    return None


def _query_key_value_rows(attention: nn.Module) -> tuple[Rows, Rows, Rows] | None:
    fused = getattr(attention, "qkv_proj", None)  # queries, keys and values stacked in this order (Phi-3)
    if fused is not None and hasattr(attention, "num_key_value_heads"):
        kv_dim = attention.num_key_value_heads * attention.head_dim
        q_dim = fused.out_features - 2 * kv_dim
        return Rows(fused, 0, q_dim), Rows(fused, q_dim, kv_dim), Rows(fused, q_dim + kv_dim, kv_dim)
    linears = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    if linears[2] is None and getattr(attention, "use_alternative_attention", False):
        linears[2] = linears[1]  # the values are the keys before their norm and RoPE (Gemma 4's global layers)
    if not all(hasattr(linear, "out_features") for linear in linears):
        return None
    return tuple(Rows(linear, 0, linear.out_features) for linear in linears)


def _query_scale(attention: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Llama 4 sharpens the attention of far tokens in layers without RoPE."""
    if not getattr(attention, "attn_temperature_tuning", False) or getattr(attention, "use_rope", True):
        return None
    floor, scale = attention.floor_scale, attention.attn_scale
    return lambda columns: torch.log1p(torch.floor((columns.float() + 1.0) / floor)) * scale + 1.0


def _rotation(attention: nn.Module) -> Callable[[Tensor, Tables], Tensor]:
    """Our own RoPE where the family splits heads in halves or, by complex numbers, in pairs; else the family's own."""
    module = sys.modules[type(attention).__module__]
    if not hasattr(module, "apply_rotary_pos_emb"):
        return _rotate_pairs if hasattr(module, "apply_rotary_emb") else _rotate_halves
    half = getattr(module, "rotate_half", None)
    if half is None or half(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]:
        return _rotate_halves
    return lambda x, tables: module.apply_rotary_pos_emb(x, x, *tables)[0]


def part_name(block: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that a layer has."""
    return next((name for name in names if getattr(block, name, None) is not None), None)


def of_tokens(kwargs: dict, span: slice) -> dict:
    """A layer's keyword arguments with everything that tells something of each token cut to ``span`` of the tokens."""
    return kwargs | {name: cut(kwargs[name], span, dim) for name, dim in PER_TOKEN.items() if name in kwargs}


def each_table(tables: Tables | None, change: Callable[[Tensor], Tensor]) -> Tables | None:
    """``change`` applied to a tensor, or to each of a tuple of them; None stays None."""
    if tables is None or isinstance(tables, Tensor):
        return None if tables is None else change(tables)
    return tuple(change(table) for table in tables)


def cut(value, span: slice, dim: int = 1, device: torch.device | None = None):
    """A tensor, a tuple of them, or None, cut along its tokens and moved where a device is given."""
    return each_table(value, lambda each: (each[..., span] if dim == -1 else each[:, span]).to(device))


def _rotate_halves(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE in the half-split layout of Llama and its descendants, over as many features as the tables are wide."""
    cos, sin = (table.unsqueeze(1) for table in tables)
    width, half = cos.shape[-1], cos.shape[-1] // 2
    turned = x[..., :width]
    rotated = turned * cos
    rotated[..., :half].addcmul_(turned[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(turned[..., :half], sin[..., half:])
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)


def _rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE on neighbouring features as complex numbers, in float32; ``turns`` complex, ``[batch, tokens, dim / 2]``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(-2).type_as(x)
