"""The pruned layers' context keys and values: one linear map of n(h_d) per layer, whatever its kind.

Prefill, fitting, training and export all use a :class:`KVProjections`. The first pruned layer reads its true input, so
its own weights are exact and are never replaced; the kinds differ in the layers after it (reuse, closed form, LoRA,
full).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pop_lightning.core.errors import InputError
from pop_lightning.core.kinds import KINDS
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.salient import watched
from pop_lightning.pruning.selectors.learned import width

SELECTOR = "selector.weight"  # the name of its tensor in a state
_SAMPLES = 64  # numbers of each fitted map that go into its fingerprint


@dataclass(frozen=True)
class Stack:
    """The maps of all pruned layers that see the same span of the context and have one width, stacked.

    Attributes:
        layers: in order.
        weight: ``[layers * 2 kv_dim, hidden]``; every layer's own weight is a view of it, so nothing is stored twice.
        bias: ``[layers * 2 kv_dim]``, zeros for a layer without one; None if no layer has one.
    """

    layers: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None

    @property
    def height(self) -> int:
        """2 kv_dim of each layer."""
        return self.weight.shape[0] // len(self.layers)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of ``count`` layers from the ``first``-th on."""
        part = slice(first * self.height, (first + count) * self.height)
        return self.weight[part], None if self.bias is None else self.bias[part]


class KVProjections(nn.Module):
    """``[k|v]_l = W'_l n(h_d) + b'_l`` for the pruned layers ``depth .. L-1``, before k_norm and RoPE.

    Starts as reuse: W' and b' are the layer's own with its norm's weight folded in. :meth:`replace` installs fitted
    maps. If the base's weights are not plain tensors (quantized, offloaded), reuse runs the layer's own modules.

    Args:
        decoder: the base.
        depth: the first pruned layer, 1..L.

    Attributes:
        selector: the weight of a fitted selector of salient tokens at this depth, ``[features]`` float32, or None.

    Raises:
        InputError: a pruned layer has no keys and values of its own to project.
    """

    def __init__(self, decoder: Decoder, depth: int):
        super().__init__()
        decoder.check_depth(depth)
        self.decoder = decoder
        self.depth = depth
        self.kind = "reuse"
        self.replaced: set[int] = set()
        self.selector: Tensor | None = None
        self.maps = nn.ModuleDict()
        self._stacks: tuple[Stack, ...] = ()
        for layer in range(depth, decoder.num_layers):
            reuse = decoder.reuse_map(layer)
            if reuse is not None:
                self.maps[str(layer)] = _linear(reuse.weight, reuse.bias, *decoder.placement(layer))
        self.requires_grad_(False)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.parameters())

    @property
    def fitted_layers(self) -> range:
        """The layers whose maps can differ from reuse: all pruned ones but the first, which sees its true input."""
        return range(self.depth + 1, self.decoder.num_layers)

    def forward(self, layer: int, hidden: Tensor, normed: Tensor | None = None) -> Tensor:
        """Keys and values of ``layer`` for context tokens.

        Args:
            hidden: h_d, ``[batch, context, hidden]``.
            normed: n(h_d), same shape, if the caller already has it.

        Returns:
            ``[batch, context, 2 kv_dim]``.
        """
        if str(layer) not in self.maps:
            return self.decoder.own_kv(layer, hidden)
        normed = self.decoder.normalize(hidden) if normed is None else normed
        linear = self.maps[str(layer)]
        return linear(normed.to(linear.weight.dtype)).to(normed.dtype)

    # --- stacked, for inference -----------------------------------------------------------------------------------

    def stack(self) -> tuple[Stack, ...]:
        """The maps of layers of one span and width, stacked for one product; layers that cannot be are left out.

        Built on the first call: each layer's weight becomes a view of its stack. A map that was replaced, moved, cast
        or put under training since then is no longer such a view; this is detected here and the map stacked again, so
        the stacks never hold stale weights. A layer is left out if its map is being trained, is not a plain linear
        layer (LoRA), or does not exist (the base's own modules run).
        """
        maps, spans = dict(self.maps.items()), {}
        for layer in range(self.depth, self.decoder.num_layers):
            linear = maps.get(str(layer))
            if type(linear) is nn.Linear and not linear.weight.requires_grad and linear.weight.numel():
                key = (self.decoder.window(layer), linear.weight.device, linear.weight.dtype, len(linear.weight))
                spans.setdefault(key, []).append(layer)
        groups = [tuple(layers) for layers in spans.values()]
        if [stack.layers for stack in self._stacks] != groups or not all(map(self._holds, self._stacks)):
            self._stacks = ()  # freed before the new ones are made
            self._stacks = tuple(map(self._stack, groups))
        return self._stacks

    def __getstate__(self) -> dict:
        """Leaves out the stacks: a copy builds its own."""
        return self.__dict__ | {"_stacks": ()}

    @torch.no_grad()
    def _stack(self, layers: tuple[int, ...]) -> Stack:
        linears = [self.maps[str(layer)] for layer in layers]
        height, width = linears[0].weight.shape
        with torch.inference_mode(False):  # so that the weights can be trained later, even if stacked in inference mode
            weight = linears[0].weight.new_empty(len(layers) * height, width)
            bias = None
            if any(linear.bias is not None for linear in linears):
                bias = weight.new_zeros(len(layers) * height)
            for i, linear in enumerate(linears):
                part = slice(i * height, (i + 1) * height)
                linear.weight.data = weight[part].copy_(linear.weight)
                if linear.bias is not None:
                    linear.bias.data = bias[part].copy_(linear.bias)
        return Stack(layers, weight, bias)

    def _holds(self, stack: Stack) -> bool:
        """Whether every layer's weight and bias are still views of the stack's memory."""
        for i, layer in enumerate(stack.layers):
            linear, (weight, bias) = self.maps[str(layer)], stack.rows(i, 1)
            if linear.weight.data_ptr() != weight.data_ptr():
                return False
            if linear.bias is not None and (bias is None or linear.bias.data_ptr() != bias.data_ptr()):
                return False
        return True

    @torch.no_grad()
    def replace(self, maps: Mapping[int, tuple[Tensor, Tensor]], kind: str) -> "KVProjections":
        """Put fitted maps ``{layer: (W' [2 kv_dim, hidden], b' [2 kv_dim])}`` in place; returns self."""
        for layer, (weight, bias) in maps.items():
            if layer not in self.fitted_layers:
                raise InputError(
                    f"projections for depth {self.depth} belong to layers {self.depth + 1}.."
                    f"{self.decoder.num_layers - 1}, found layer {layer}."
                )
            expected = (2 * self.decoder.parts[layer].kv_dim, self.decoder.config.hidden_size)
            if tuple(weight.shape) != expected:
                raise InputError(f"projection of layer {layer} must be {expected}, found {tuple(weight.shape)}.")
            self.maps[str(layer)] = _linear(weight, bias, *self.decoder.placement(layer))
            self.replaced.add(layer)
        self.requires_grad_(False)
        self.kind = kind
        return self

    def fitted_state(self) -> dict[str, Tensor]:
        """The tensors that an artifact stores: replaced maps, because layers that reuse their weights need none, and
        the weight of a fitted selector."""
        state = {
            f"layers.{layer}.{name}": tensor.detach().contiguous()
            for layer in sorted(self.replaced)
            for name, tensor in self.maps[str(layer)].named_parameters()
        }
        return state if self.selector is None else state | {SELECTOR: self.selector}

    @classmethod
    def from_state(cls, decoder: Decoder, depth: int, kind: str, state: Mapping[str, Tensor]) -> "KVProjections":
        """The inverse of :meth:`fitted_state`.

        Raises:
            InputError: a tensor is missing, has an unknown name, or another shape.
        """
        projections = cls(decoder, depth)
        if kind not in KINDS:
            raise InputError(f"projection kind must be one of {', '.join(KINDS)}, found {kind!r}.")
        layers = [layer for layer in projections.fitted_layers if f"layers.{layer}.weight" in state]
        expected = {f"layers.{layer}.{name}" for layer in layers for name in ("weight", "bias")}
        if set(state) - {SELECTOR} != expected:
            odd = sorted((set(state) - {SELECTOR}) ^ expected)[0]
            raise InputError(f"the projections do not fit depth {depth}: {odd} is missing or unexpected.")
        maps = {layer: (state[f"layers.{layer}.weight"], state[f"layers.{layer}.bias"]) for layer in layers}
        return projections.replace(maps, kind).use_selector(state.get(SELECTOR))

    def use_selector(self, weight: Tensor | None) -> "KVProjections":
        """Give the projections a fitted selector's weight, ``[features]``, or none; returns self."""
        if weight is not None:
            expected = (width(self.decoder, watched(self.decoder, self.depth)),)
            if tuple(weight.shape) != expected:
                raise InputError(
                    f"the selector's weight at depth {self.depth} must be {expected}, found {tuple(weight.shape)}."
                )
            weight = weight.detach().float()
        self.selector = weight
        return self

    def copy(self, kind: str | None = None) -> "KVProjections":
        """Independent projections with the same maps in the base's dtype, of the same ``kind`` unless given."""
        return KVProjections.from_state(self.decoder, self.depth, kind or self.kind, self.fitted_state())

    @property
    def fingerprint(self) -> str:
        """A short hash of sampled numbers of every fitted map, stored on caches. All reuse projections share one."""
        return fingerprint(self.fitted_state())

    def place(self) -> "KVProjections":
        """Move every map to the device and dtype in which its layer computes; returns self.

        A map that is being trained or has adapters is left as it is.
        """
        for layer, linear in self.maps.items():
            if type(linear) is nn.Linear and not linear.weight.requires_grad:
                device, dtype = self.decoder.placement(int(layer))
                if (linear.weight.device, linear.weight.dtype) != (device, dtype):
                    linear.to(device, dtype)
        return self

    def affine(self, layer: int) -> tuple[Tensor, Tensor]:
        """``(W' [2 kv_dim, hidden], b' [2 kv_dim])`` of a layer, float32 copies."""
        linear = self.maps[str(layer)]
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
        return linear.weight.detach().float().clone(), bias.detach().float().to(linear.weight.device).clone()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of the tensors' names and of some numbers of each."""
    sampled = hashlib.sha256()
    for name, tensor in tensors.items():
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // _SAMPLES)].float().tolist()
        sampled.update(f"{name} {values}".encode())
    return sampled.hexdigest()[:16]


def _linear(weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=device, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear
