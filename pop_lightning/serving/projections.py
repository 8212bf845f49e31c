"""Context keys and values of the pruned layers inside vLLM: the artifact's maps, cut to what this rank holds.

``[k|v]_l = W'_l n(h_d) + b'_l``, with the fitted W' of the artifact or the layer's own weights with its norm folded in,
stacked so that one product serves many layers. What a map cannot be made for (weights that are quantized) runs the
layer's own modules. Built inside ``load_weights``, because vLLM repacks weights afterwards.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pop_lightning.core.errors import InputError
from pop_lightning.serving import private


class PrunedLayer:
    """One pruned layer as this rank holds it.

    Raises:
        InputError: the layer is built in a way that is not known here.
    """

    def __init__(self, block: nn.Module, layer: int, family: str):
        self.block, self.layer = block, layer
        attention = getattr(block, "self_attn", None)
        for part in ("qkv_proj", "rotary_emb", "attn"):
            if getattr(attention, part, None) is None:
                raise InputError(f"{family} cannot be served pruned: its layer {layer} has no self_attn.{part}.")
        self.attention = attention
        self.norm = getattr(block, "input_layernorm", None)
        if type(self.norm) not in (private.RMSNorm, private.GemmaRMSNorm) or self.norm.weight is None:
            raise InputError(
                f"{family} cannot be served pruned: the input of its layer {layer} passes through "
                f"{type(self.norm).__name__}, expected input_layernorm as RMSNorm or GemmaRMSNorm."
            )
        self.attn = attention.attn
        self.heads, self.head_dim = self.attn.num_kv_heads, self.attn.head_size
        self.kv_dim = self.heads * self.head_dim
        self.own_rows = slice(self.attn.num_heads * self.head_dim, None)  # of qkv_proj: keys and values

    def normalize(self, hidden: Tensor) -> Tensor:
        """n(h), ``[tokens, hidden]``: the same for all layers."""
        x = hidden.float()
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm.variance_epsilon)).to(hidden.dtype)

    def own_map(self) -> tuple[Tensor, Tensor | None] | None:
        """W' ``[2 kv_dim, hidden]`` and b' of the layer's own weights in float32; None if these are quantized."""
        linear = self.attention.qkv_proj
        if not isinstance(linear.quant_method, private.UnquantizedLinearMethod):
            return None
        scale = self.norm.weight.float() + (1.0 if isinstance(self.norm, private.GemmaRMSNorm) else 0.0)
        bias = None if linear.bias is None else linear.bias[self.own_rows].float()
        return linear.weight[self.own_rows].float() * scale, bias

    def own_kv(self, hidden: Tensor) -> Tensor:
        """``[k|v]`` through the layer's own modules, ``[tokens, 2 kv_dim]``."""
        return self.attention.qkv_proj(self.norm(hidden))[0][..., self.own_rows]

    def cacheable(self, kv: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, after key norm and RoPE, and values, each ``[tokens, heads, head_dim]``."""
        keys, values = kv.split(self.kv_dim, dim=-1)
        norm = getattr(self.attention, "k_norm", None)
        if norm is not None:
            by_head = norm.weight.shape[-1] == self.head_dim
            keys = norm(keys.unflatten(-1, (self.heads, self.head_dim)).contiguous() if by_head else keys)
        keys = keys.reshape(len(kv), self.kv_dim).contiguous()
        # RoPE acts on queries and keys together, in place on some devices: one head is used in place of the queries.
        keys = self.attention.rotary_emb(positions, keys[:, : self.head_dim].clone(), keys)[1]
        shape = (len(kv), self.heads, self.head_dim)
        return keys.reshape(shape), values.reshape(shape)

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write context keys and values to their slots of the paged cache."""
        self.attn.impl.do_kv_cache_update(self.attn, keys, values, self.attn.kv_cache, slots)


def rank_rows(weight: Tensor, heads: int, total_heads: int, head_dim: int, rank: int, ranks: int) -> Tensor:
    """The rows ``[2, heads, head_dim, ...]`` of a whole map that belong to a rank, flattened again.

    Ranks share the key-value heads evenly; where there are fewer heads than ranks, neighbours hold the same head.
    """
    first = rank * heads if total_heads >= ranks else rank // (ranks // total_heads)
    whole = weight.unflatten(0, (2, total_heads, head_dim))
    return whole[:, first : first + heads].flatten(0, 2)


class Projections(nn.Module):
    """The maps of all pruned layers on this rank.

    Args:
        layers: the pruned layers, in order.
        state: tensors of the artifact, ``layers.N.weight`` and ``layers.N.bias``.
        total_heads: key-value heads of the whole model.
        at_most: how many numbers of ``[k|v]`` per context token may wait at once, over all layers.

    Raises:
        InputError: the artifact's tensors do not fit the model.
    """

    def __init__(self, layers: list[PrunedLayer], state: Mapping[str, Tensor], total_heads: int, at_most: int):
        super().__init__()
        self.layers = layers
        maps = {each.layer: _map(each, state, total_heads) for each in layers}
        stacked = [each for each in layers if maps[each.layer] is not None]
        self.own = [each for each in layers if maps[each.layer] is None]
        self.groups = _groups(stacked, at_most)
        for number, group in enumerate(self.groups):
            some = any(maps[each.layer][1] is not None for each in group)
            weight = torch.cat([maps[each.layer][0] for each in group])
            bias = torch.cat([_bias(*maps[each.layer]) for each in group]) if some else None
            # Buffers, so that they are kept with the model when the engine sleeps.
            self.register_buffer(f"weight_{number}", weight, persistent=False)
            self.register_buffer(f"bias_{number}", bias, persistent=False)

    def forward(self, hidden: Tensor) -> Iterator[tuple[PrunedLayer, Tensor]]:
        """Each pruned layer with ``[k|v]`` of the context, ``[tokens, 2 kv_dim]``, for h_d ``[tokens, hidden]``."""
        if self.groups:
            normed = self.layers[0].normalize(hidden)
            for number, group in enumerate(self.groups):
                weight, bias = getattr(self, f"weight_{number}"), getattr(self, f"bias_{number}")
                product = torch.nn.functional.linear(normed, weight, bias)
                yield from zip(group, product.split([2 * each.kv_dim for each in group], dim=-1), strict=True)
        for each in self.own:
            yield each, each.own_kv(hidden)


def _map(layer: PrunedLayer, state: Mapping[str, Tensor], total_heads: int) -> tuple[Tensor, Tensor | None] | None:
    """W' and b' of one layer in the engine's dtype and on its device."""
    weight = state.get(f"layers.{layer.layer}.weight")
    if weight is None:
        own = layer.own_map()
        if own is None:
            return None
        weight, bias = own
    else:
        hidden = len(layer.norm.weight)
        if weight.shape != (expected := (2 * total_heads * layer.head_dim, hidden)):
            raise InputError(
                f"the artifact does not fit this base: its projection of layer {layer.layer} is {tuple(weight.shape)}, "
                f"expected {expected}."
            )
        rank, ranks = private.tensor_rank(), private.tensor_ranks()
        weight, bias = (
            rank_rows(each, layer.heads, total_heads, layer.head_dim, rank, ranks)
            for each in (weight, state[f"layers.{layer.layer}.bias"])
        )
    where = layer.norm.weight
    return weight.to(where), None if bias is None else bias.to(where)


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(len(weight)) if bias is None else bias


def _groups(layers: list[PrunedLayer], at_most: int) -> list[list[PrunedLayer]]:
    """Neighbouring layers whose ``[k|v]`` may wait together."""
    groups: list[list[PrunedLayer]] = []
    waiting = 0
    for each in layers:
        if not groups or waiting + 2 * each.kv_dim > at_most:
            groups.append([])
            waiting = 0
        groups[-1].append(each)
        waiting += 2 * each.kv_dim
    return groups
