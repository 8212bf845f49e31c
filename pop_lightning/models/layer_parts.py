"""What one decoder layer is made of: the one file to change for a new family.

:func:`layer_parts` reads a layer by its structure into a :class:`LayerParts`; a family's name is asked for only where
its modules do not show what they do. The attach check (``pruning/attach_check.py``) verifies what was read on the model
itself.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pop_lightning.core import distributed

# Rotary tables as a layer receives them: cos and sin ``[batch, tokens, rotary dim]``, or one complex tensor (Llama 4).
Tables = tuple[Tensor, Tensor] | Tensor

# The entries of ``layer_types`` whose layers can be pruned.
KINDS = ("full_attention", "sliding_attention", "chunked_attention")

# Attributes under which layers hold a part with a recurrent state, and the names of such layers in ``layer_types``.
RECURRENT = ("linear_attn", "mamba", "conv", "mixer", "temporal_block")
RECURRENT_KINDS = ("linear_attention", "mamba", "mamba2", "conv", "hybrid", "hybrid_sliding", "recurrent")

# Attributes under which layers hold their feed-forward branch.
FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe", "moe")

# Families that apply RoPE only in sliding-window layers, which no attribute of their attention shows.
ROTATED_WHERE_SLIDING = ("cohere2",)

# A layer's per-token arguments, and the dimension of each that runs over tokens.
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
class InputNorm:
    """The norm between a layer's input h and its keys and values: ``scale * n(h) + shift``, or the identity.

    Attributes:
        module: the norm, or None where a layer projects h itself (post-norm families: OLMo 2, EXAONE 4); n(h) is h.
        eps: what is added to the mean square.
        centered: whether n(h) has its mean subtracted (LayerNorm).
        offset: the scale minus the stored weight: 1 in families that store the scale's distance from 1 (Gemma).
    """

    module: nn.Module | None = None
    eps: float = 0.0
    centered: bool = False
    offset: float = 0.0

    @classmethod
    def of(cls, module: nn.Module) -> "InputNorm":
        """Read what a norm does from its forward, run on the CPU with weights of one and biases of zero."""
        plain = copy.copy(module)
        plain._parameters = {
            name: None if value is None else nn.Parameter(torch.full((4,), 0.0 if name == "bias" else 1.0))
            for name, value in module._parameters.items()
        }
        if isinstance(plain, nn.LayerNorm):
            plain.normalized_shape = (4,)
        forward = type(module).forward  # without the hooks of the module, and of offloading and sharding libraries
        with torch.no_grad(), torch.device("cpu"):
            scale = forward(plain, torch.tensor([1.0, -1.0, 1.0, -1.0]))[0].item()
            mean = forward(plain, torch.ones(4)).mean().item()
        eps = getattr(module, "variance_epsilon", None) or module.eps
        return cls(module, eps, centered=abs(mean) < 0.5, offset=float(round(scale - 1.0)))

    def __call__(self, hidden: Tensor) -> Tensor:
        """The input of the linear maps, through the layer's own norm."""
        return hidden if self.module is None else self.module(hidden)

    def unweighted(self, hidden: Tensor) -> Tensor:
        """n(h), ``[..., hidden]`` in the dtype of ``hidden``; statistics in float32, as the models have them."""
        if self.module is None:
            return hidden
        x = hidden.float()
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).to(hidden.dtype)

    def scale(self) -> Tensor | float:
        """The factor on n(h), ``[hidden]`` in float32."""
        return 1.0 if self.module is None else self.module.weight.float() + self.offset

    def shift(self) -> Tensor | None:
        """The term added to the scaled n(h), ``[hidden]`` in float32, or None."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.float()


@dataclass(frozen=True)
class LayerParts:
    """How one layer computes queries, keys and values from its input; the fields are in the order of the steps.

    Attributes:
        norm: what is applied to the layer's input first.
        queries, keys, values: rows of the linear maps that follow it; keys and values may be the same rows.
        head_dim: width of one head.
        q_norm, k_norm, v_norm: what normalizes each head, or None.
        norms_join_heads: whether q_norm and k_norm normalize all heads together, as one vector (OLMo 2).
        rotate: RoPE, ``([batch, heads, tokens, head_dim], Tables)`` to the same shape, or None (NoPE).
        norms_after_rotation: whether q_norm and k_norm follow RoPE.
        window: how many tokens back a token sees, itself included, or None for all.
        chunked: whether the window is a chunk: a token sees back to its chunk's start only.
        query_scale: the factor on a query by its position, ``[...]`` to ``[...]``, or None.
    """

    norm: InputNorm
    queries: Rows
    keys: Rows
    values: Rows
    head_dim: int
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    v_norm: nn.Module | None = None
    norms_join_heads: bool = False
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
        """Queries or keys ``[batch, heads, tokens, head_dim]`` normalized and rotated, in the family's order."""
        if norm is not None and not self.norms_after_rotation:
            x = self._normalize(x, norm)
        if self.rotate is not None and tables is not None:
            x = self.rotate(x, tables)
        return norm(x) if norm is not None and self.norms_after_rotation else x

    def key_lengths(self, keys: Tensor) -> Tensor:
        """The mean square that k_norm divides a key by, ``[..., heads, 1]`` of keys ``[..., heads, head_dim]``."""
        squares = keys.square().mean(-1, keepdim=True)
        return squares.mean(-2, keepdim=True).expand_as(squares) if self.norms_join_heads else squares

    def _normalize(self, x: Tensor, norm: nn.Module) -> Tensor:
        if not self.norms_join_heads:
            return norm(x)
        return norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def layer_parts(block: nn.Module, kind: str | None, window: int | None) -> LayerParts | str:
    """Read one decoder layer, or say why its keys and values are not a linear map of its normalized input.

    This is where a family is added: a part with another name or in another place is looked up here and assigned to the
    field of :class:`LayerParts` that describes what it does.

    Args:
        kind: the layer's entry in the config's ``layer_types``, where it has them.
        window: of the layer's cache.
    """
    if (reason := _refusal(block, kind)) is not None:
        return reason
    try:
        norm = InputNorm() if _projects_its_input(block) else InputNorm.of(block.input_layernorm)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return f"its input_layernorm ({type(block.input_layernorm).__name__}) could not be read"
    attention = block.self_attn
    queries, keys, values = _query_key_value_rows(attention)
    after = getattr(attention, "qk_norm", None)  # one norm for both, after RoPE (Llama 4)
    widths = [_width(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    return LayerParts(
        norm=norm,
        queries=queries,
        keys=keys,
        values=values,
        head_dim=attention.head_dim,
        q_norm=after or getattr(attention, "q_norm", None),
        k_norm=after or getattr(attention, "k_norm", None),
        v_norm=getattr(attention, "v_norm", None),
        norms_join_heads=max(widths) > attention.head_dim,
        rotate=_rotation(attention) if _rotates(attention) else None,
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
    normed = not _projects_its_input(block)
    names = ("input_layernorm", "self_attn") if normed else ("self_attn",)
    missing = [name for name in names if getattr(block, name, None) is None]
    missing += [] if part_name(block, FEED_FORWARD) else ["mlp"]
    if not missing:
        missing += [] if not normed or hasattr(block.input_layernorm, "weight") else ["weight in its input_layernorm"]
        missing += [] if hasattr(attention, "head_dim") else ["self_attn.head_dim"]
    if not missing and _query_key_value_rows(attention) is None:
        missing = ["self_attn.k_proj", "self_attn.v_proj"]
    if missing:
        return f"it has no {', '.join(missing)}"
    weight = getattr(getattr(attention, "k_norm", None), "weight", None)
    if weight is not None and len(shape := distributed.whole_shape(weight)) != 1:
        return f"its k_norm has a weight for each head ({' x '.join(map(str, shape))})"
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is not None:
        return "it clips its keys and values (clip_qkv), which no linear map does"
    return None


def _projects_its_input(block: nn.Module) -> bool:
    """Whether keys and values are made of the residual stream itself, norms following the branches (OLMo 2)."""
    return not hasattr(block, "input_layernorm") and hasattr(block, "post_attention_layernorm")


def _width(norm: nn.Module | None) -> int:
    weight = getattr(norm, "weight", None)
    return 0 if weight is None else distributed.whole_shape(weight).numel()


def _rotates(attention: nn.Module) -> bool:
    """Whether a layer has RoPE; the global layers of some families have none (NoPE)."""
    if not getattr(attention, "use_rope", True):
        return False
    window = getattr(attention, "sliding_window", None)
    if getattr(getattr(attention, "config", None), "model_type", None) in ROTATED_WHERE_SLIDING:
        return window is not None
    # A global layer that names a window is one of a hybrid (EXAONE 4); in other families its window is None.
    return window is None or getattr(attention, "is_sliding", True)


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
    if half is not None and half(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]:
        return _rotate_halves
    return lambda x, tables: module.apply_rotary_pos_emb(x, x, *tables)[0]


def part_name(block: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` that a layer has."""
    return next((name for name in names if getattr(block, name, None) is not None), None)


def of_tokens(kwargs: dict, span: slice) -> dict:
    """A layer's keyword arguments with everything that has a value for each token cut to ``span`` of the tokens."""
    return kwargs | {name: cut(kwargs[name], span, dim) for name, dim in PER_TOKEN.items() if name in kwargs}


def of_rows(kwargs: dict, index: Tensor) -> dict:
    """A layer's keyword arguments with everything that has a value for each token at the tokens ``[batch, rows]``."""
    batch = torch.arange(len(index), device=index.device)[:, None]

    def take(value: Tensor, dim: int) -> Tensor:
        where = index.to(value.device)
        if dim == -1:
            value = value.expand(*value.shape[:-2], len(index), value.shape[-1])
            return value.gather(-1, where.expand(*value.shape[:-2], *where.shape))
        return value.expand(len(index), *value.shape[1:])[batch.to(value.device), where]

    return kwargs | {
        name: each_table(kwargs[name], lambda value, dim=dim: take(value, dim))
        for name, dim in PER_TOKEN.items()
        if name in kwargs
    }


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
    rotated = rotated.to(x.dtype)  # the tables may be wider (OLMo 2)
    return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], dim=-1)


def _rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """RoPE on neighboring features as complex numbers, in float32; ``turns`` complex, ``[batch, tokens, dim / 2]``."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns.unsqueeze(1)).flatten(-2).type_as(x)
