"""Detects that a base was changed after projections were made from it: an adapter injected, weights trained or merged.

Reused projections are copies of the base's key and value maps, so a base that changes under a generator would be
prefilled with its old weights and decoded with its new ones.
"""

import torch
from torch import Tensor, nn

from pop_lightning.models.decoder import PLAIN_DTYPES, Decoder

_SAMPLES = 64  # elements of each weight, at most


class BaseWatch:
    """Remembers what the keys and values of the pruned layers are computed from.

    Modules are compared by identity. Of each weight only samples of the diagonal are compared, which any update of the
    whole weight changes. The check runs before every prefill, so it has to be cheap.

    Args:
        decoder: the base, as the projections read it.
        layers: the pruned layers.
    """

    def __init__(self, decoder: Decoder, layers: range):
        self._model, self._layers = decoder.model, layers
        self._parts = _parts(decoder, layers)
        self._link(decoder)
        self._remember()

    def changed(self) -> bool:
        """Whether keys and values are now computed differently. Moved or cast weights count as unchanged."""
        if any(parent._modules.get(name) is not child for parent, name, child in self._links):
            decoder = Decoder(self._model)
            now = _parts(decoder, self._layers)
            if len(now) != len(self._parts) or any(a is not b for a, b in zip(now, self._parts, strict=True)):
                return True
            self._link(decoder)  # only a new wrapper around the same modules, such as that of torch.compile
        if [_memory(module._parameters.get(name)) for module, name in self._weights] == self._memories:
            return not all(map(torch.equal, map(torch.cat, self._views), self._joined))
        before = self._samples
        self._remember()
        return not (len(before) == len(self._samples) and all(map(_same, before, self._samples)))

    def _link(self, decoder: Decoder) -> None:
        """Record the module path to each part: an adapter replaces a module on it and wraps the old one."""
        wanted = {id(part) for part in self._parts}
        links = {}
        for layer in self._layers:
            for path, module in decoder.layers[layer].named_modules(prefix=str(layer)):
                parent = decoder.layers
                for name in path.split(".") if id(module) in wanted else ():
                    links[id(parent), name] = (parent, name, parent._modules[name])
                    parent = parent._modules[name]
        self._links = list(links.values())

    def _remember(self) -> None:
        modules = {id(part): part for part in self._parts}.values()
        found = [
            (module, name, weight.detach())
            for module in modules
            for name, weight in module.named_parameters(recurse=False)
            if _is_readable(weight)
        ]
        self._weights = [(module, name) for module, name, _ in found]
        self._memories = [_memory(weight) for _, _, weight in found]
        # Views show later writes to the weights, and keep their memory from being reused.
        views, groups = [_sample(weight) for _, _, weight in found], {}
        for view in views:
            groups.setdefault((view.device, view.dtype), []).append(view)
        self._views = list(groups.values())
        self._joined = [torch.cat(group) for group in self._views]
        self._samples = [view.to("cpu", copy=True) for view in views]


def _parts(decoder: Decoder, layers: range) -> list[nn.Module]:
    """The modules that compute the keys and values of the layers, in order."""
    read = [decoder.parts[layer] for layer in layers if layer in decoder.parts]
    used = [(it.norm.module, it.keys.linear, it.values.linear, it.k_norm, it.v_norm) for it in read]
    return [part for parts in used for part in parts if part is not None]


def _is_readable(weight: Tensor) -> bool:
    """Whether the elements can be read: not quantized, in shards, or offloaded."""
    plain = type(weight) is nn.Parameter and weight.dtype in PLAIN_DTYPES and weight.dim() in (1, 2)
    return plain and weight.numel() > 0 and not weight.is_meta


def _memory(weight: Tensor | None) -> tuple | None:
    return None if weight is None else (weight.data_ptr(), weight.device, weight.dtype)


def _sample(weight: Tensor) -> Tensor:
    line = weight.diagonal() if weight.dim() == 2 else weight
    return line[:: max(1, len(line) // _SAMPLES)]


def _same(before: Tensor, after: Tensor) -> bool:
    """Whether both are the same weight, each rounded to the other's dtype."""
    first, second = before.to(after.dtype).to(before.dtype), after.to(before.dtype).to(after.dtype)
    return len(before) == len(after) and torch.allclose(first.double(), second.double(), rtol=1e-6, equal_nan=True)
