"""The self-check at load: what was read from a model's structure is verified on the model itself, before it serves.

The whole model and its two stages run over the same random tokens, with every attention replaced by one that records
its keys and values and attends to nothing (there is no cache yet). The stages must give what the whole model gives, and
projecting each pruned layer's true input through its own weights must give its keys and values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pop_lightning.core.errors import InputError
from pop_lightning.serving import private

TOKENS = 16


@torch.no_grad()
def check_model(model: Any) -> None:
    """Check a loaded :class:`PrunedModel`.

    Raises:
        InputError: naming the family and the first difference.
    """
    config = model.engine_config
    device = model.pruned[0].norm.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.model_config.get_vocab_size(), (TOKENS,), generator=generator).to(device)
    last = config.model_config.max_model_len - 1
    positions = torch.linspace(0, last, TOKENS).long().to(device)
    try:
        with _recording(model) as inputs, private.set_forward_context(None, config, num_tokens=TOKENS):
            whole = model.model.forward(ids, positions, None)
        with _recording(model), private.set_forward_context(None, config, num_tokens=TOKENS):
            state = model.first_stage(ids, positions)
            staged = model.second_stage(state, positions, torch.arange(TOKENS, device=device))
    except InputError:
        raise
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{model.family} cannot be served pruned: {reason}.") from error
    _compare(model, "the hidden states of its two stages", staged, whole)
    _compare(model, f"the input of layer {model.plan.depth}", _sum(state), inputs[model.plan.depth]["hidden"])
    for layer in model.pruned:
        hidden = inputs[layer.layer]["hidden"]
        own = layer.own_kv(hidden)
        for name, ours in zip(("keys", "values"), layer.cacheable(own, positions), strict=True):
            theirs = inputs[layer.layer][name].reshape(ours.shape)
            _compare(model, f"the {name} of layer {layer.layer}, projected from its input,", ours, theirs)
    for layer, kv in model.projections(_sum(state)):
        if layer.layer == model.plan.depth:  # the first pruned layer sees its true input
            _compare(model, f"the projection of layer {layer.layer}", kv, layer.own_kv(_sum(state)))


def _sum(state: Any) -> Tensor:
    return sum(state.tensors.values())


@contextmanager
def _recording(model: Any) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Inside, attention attends to nothing; yields the input, keys and values of each pruned layer."""
    seen: dict[int, dict[str, Tensor]] = {each.layer: {} for each in model.pruned}
    hooks, replaced = [], []
    pruned = {id(each.attn): each.layer for each in model.pruned}

    def attend(layer: int | None):
        def forward(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
            if layer is not None:
                seen[layer] |= {"keys": key.clone(), "values": value.clone()}
            return torch.zeros_like(query)

        return forward

    def record(layer: int):
        def hook(_, args: tuple, kwargs: dict) -> None:
            arguments = dict(zip(("positions", "hidden_states", "residual"), args, strict=False)) | kwargs
            residual = arguments.get("residual")
            hidden = arguments["hidden_states"]
            seen[layer]["hidden"] = hidden.clone() if residual is None else hidden + residual

        return hook

    try:
        for module in model.modules():
            if isinstance(module, private.Attention):
                module.forward = attend(pruned.get(id(module)))
                replaced.append(module)
        for each in model.pruned:
            hooks.append(each.block.register_forward_pre_hook(record(each.layer), with_kwargs=True))
        yield seen
    finally:
        for module in replaced:
            del module.forward
        for hook in hooks:
            hook.remove()


def _compare(model: Any, what: str, ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.float().abs().max().clamp(min=1e-30)
    error = ((ours.float() - theirs.float()).abs().max() / scale).item()
    single = theirs.dtype in (torch.float32, torch.float64)
    tolerance = 1e-5 if single else 16 * torch.finfo(theirs.dtype).eps
    if not error <= tolerance:
        raise InputError(
            f"{model.family} cannot be served pruned: {what} differ from the model's own by {error:.1e} (relative)."
        )
