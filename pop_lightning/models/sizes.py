"""Weights that one token is multiplied with in a layer, from which operations and activations are counted."""

import inspect

from torch import nn

from pop_lightning.core import distributed
from pop_lightning.models.decoder import Decoder


def mlp_dim(config) -> int:
    """Width of the feed-forward branch for one token, which dominates a layer's activations."""
    dense = getattr(config, "intermediate_size", None) or config.hidden_size
    expert, active = getattr(config, "moe_intermediate_size", None), _active_experts(config)
    return min(dense, expert * active) if expert and active else dense


def linear_weights(decoder: Decoder, layer: int) -> int:
    """How many weights of a layer's linear maps one token is multiplied with; of experts only those that run."""
    total = 0
    for module in decoder.layers[layer].modules():
        own = list(module.parameters(recurse=False))
        shapes = [distributed.whole_shape(weight) for weight in own]
        stacked = [shape[1:].numel() for shape in shapes if len(shape) == 3]
        if stacked and hasattr(module, "num_experts"):
            # If the experts' forward does not receive the routing, every expert runs on all tokens (Llama 4).
            routed = {"top_k_index", "router_indices"} & inspect.signature(module.forward).parameters.keys()
            total += sum(stacked) * (_active_experts(decoder.config) if routed else module.num_experts)
        else:
            total += sum(shape.numel() for shape in shapes if len(shape) == 2)
    return total


def linear_weights_outside(decoder: Decoder) -> int:
    """The same count for linear maps outside the layers that run on every token (per-layer inputs)."""
    inside = set(decoder.layers.modules())
    outside = (module for module in decoder.body.modules() if module not in inside)
    return sum(distributed.whole_shape(each.weight).numel() for each in outside if isinstance(each, nn.Linear))


def _active_experts(config) -> int | None:
    """How many experts of a mixture each token runs through, or None if the config does not say."""
    return next((n for name in ("num_experts_per_tok", "top_k_experts") if (n := getattr(config, name, None))), None)
