"""Where the pruned layers' context keys and values come from: one linear map of n(h_d) per layer, whatever its kind.

Prefill, fitting, training and export all see a :class:`KVProjections`. The first pruned layer reads its true input, so
its own weights are exact and are never replaced; the kinds differ in the layers after it (reuse, closed form, LoRA,
full).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pop_lightning.decoder import Decoder
from pop_lightning.errors import InputError

KINDS = ("reuse", "closed_form", "lora", "full")


class KVProjections(nn.Module):
    """``[k|v]_l = W'_l n(h_d) + b'_l`` for the pruned layers ``depth .. L-1``, before k_norm and RoPE.

    Starts as reuse: W' and b' are the layer's own with its norm's weight folded in. :meth:`replace` puts fitted maps in
    their place. Where the base's weights are no plain tensors, reuse runs the layer's own modules instead.

    Args:
        decoder: the base.
        depth: the first pruned layer, 1..L.
    """

    def __init__(self, decoder: Decoder, depth: int):
        super().__init__()
        self.decoder = decoder
        self.depth = depth
        self.kind = "reuse"
        self.replaced: set[int] = set()
        self.maps = nn.ModuleDict()
        for layer in range(depth, decoder.num_layers):
            reuse = decoder.reuse_map(layer)
            if reuse is not None:
                self.maps[str(layer)] = _linear(reuse.weight, reuse.bias, like=decoder.attention(layer).k_proj.weight)
        self.requires_grad_(False)

    @property
    def fitted_layers(self) -> range:
        """The layers whose maps can differ from reuse: all pruned ones but the first, which sees its true input."""
        return range(self.depth + 1, self.decoder.num_layers)

    def forward(self, layer: int, hidden: Tensor, normed: Tensor | None = None) -> Tensor:
        """Keys and values of ``layer`` for context tokens.

        Args:
            hidden: h_d, ``[batch, context, hidden]``.
            normed: n(h_d), same shape, where the caller has it already.

        Returns:
            ``[batch, context, 2 kv_dim]``.
        """
        if str(layer) not in self.maps:
            return self.decoder.own_kv(layer, hidden)
        normed = self.decoder.normalise(hidden) if normed is None else normed
        linear = self.maps[str(layer)]
        return linear(normed.to(linear.weight.dtype)).to(normed.dtype)

    @torch.no_grad()
    def replace(self, maps: Mapping[int, tuple[Tensor, Tensor]], kind: str) -> "KVProjections":
        """Put fitted maps ``{layer: (W' [2 kv_dim, hidden], b' [2 kv_dim])}`` in place; returns self."""
        for layer, (weight, bias) in maps.items():
            if layer not in self.fitted_layers:
                raise InputError(
                    f"projections for depth {self.depth} belong to layers {self.depth + 1}.."
                    f"{self.decoder.num_layers - 1}, found layer {layer}."
                )
            expected = (2 * self.decoder.kv_dim, self.decoder.config.hidden_size)
            if tuple(weight.shape) != expected:
                raise InputError(f"projection of layer {layer} must be {expected}, found {tuple(weight.shape)}.")
            self.maps[str(layer)] = _linear(weight, bias, like=self.decoder.layers[layer].input_layernorm.weight)
            self.replaced.add(layer)
        self.requires_grad_(False)
        self.kind = kind
        return self

    def fitted_state(self) -> dict[str, Tensor]:
        """What an artifact stores: the replaced maps alone. A layer that reuses its weights has nothing to store."""
        return {
            f"layers.{layer}.{name}": tensor.detach().contiguous()
            for layer in sorted(self.replaced)
            for name, tensor in self.maps[str(layer)].named_parameters()
        }

    @classmethod
    def from_state(cls, decoder: Decoder, depth: int, kind: str, state: Mapping[str, Tensor]) -> "KVProjections":
        """The inverse of :meth:`fitted_state`.

        Raises:
            InputError: a tensor is missing, of an unknown name, or of another shape.
        """
        projections = cls(decoder, depth)
        if kind not in KINDS:
            raise InputError(f"projection kind must be one of {', '.join(KINDS)}, found {kind!r}.")
        layers = [layer for layer in projections.fitted_layers if f"layers.{layer}.weight" in state]
        expected = {f"layers.{layer}.{name}" for layer in layers for name in ("weight", "bias")}
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)[0]
            raise InputError(f"the projections do not fit depth {depth}: {odd} is missing or left over.")
        maps = {layer: (state[f"layers.{layer}.weight"], state[f"layers.{layer}.bias"]) for layer in layers}
        return projections.replace(maps, kind)

    def affine(self, layer: int) -> tuple[Tensor, Tensor]:
        """``(W' [2 kv_dim, hidden], b' [2 kv_dim])`` of a layer, float32 copies."""
        linear = self.maps[str(layer)]
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
        return linear.weight.detach().float().clone(), bias.detach().float().to(linear.weight.device).clone()


def _linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear
