"""Virtual gates: one scalar per layer, stage and row over both branches of a layer (arXiv 2602.03295, section 3).

Scoring needs their gradients at one, where a gate multiplies nothing: dL/dg is the branch's output times its gradient,
read off in the backward pass.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from pop_lightning.models.decoder import Decoder


@contextmanager
def probed(decoder: Decoder, rows: int, context: int):
    """The gradients of every gate at one, at the price of one product per branch in the backward pass.

    Args:
        rows: of the batch.
        context: how many tokens at the front are context; boundary and response tokens follow.

    Yields:
        A list that the backward pass of what runs inside, each layer once, fills with ``(layer, [rows, 2])`` (prefill,
        decode), float32, an entry per branch; :func:`gate_gradients` sums it. The model's weights may be frozen.
    """
    handles, found = [], []

    def start(module, args, kwargs):
        # A leaf below the first layer, so that gradients reach every branch of a frozen model.
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            return None
        hidden = hidden.detach().requires_grad_(True)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def hook(layer: int):
        def apply(module, args, output):
            branch = output[0] if isinstance(output, tuple) else output
            held = by_row(branch.detach(), rows)
            branch.register_hook(lambda grad: found.append((layer, _by_stage(held, grad.view_as(held), context))))

        return apply

    try:
        handles.append(decoder.layers[0].register_forward_pre_hook(start, with_kwargs=True))
        for layer in range(decoder.num_layers):
            for branch in decoder.branches(layer):
                handles.append(branch.register_forward_hook(hook(layer)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def gate_gradients(found: list[tuple[int, Tensor]], layers: int) -> Tensor:
    """``[batch, L, 2]`` from what :func:`probed` collected."""
    total = torch.zeros(len(found[0][1]), layers, 2, device=found[0][1].device)
    for layer, gradient in found:
        total[:, layer] += gradient
    return total


def by_row(output: Tensor, rows: int) -> Tensor:
    """A branch's output as ``[batch, tokens, hidden]``; some mixtures of experts give all tokens flat."""
    return output if output.dim() == 3 else output.unflatten(0, (rows, -1))


def _by_stage(output: Tensor, grad: Tensor, context: int) -> Tensor:
    per_token = (grad.float() * output.float()).sum(-1)
    return torch.stack([per_token[:, :context].sum(1), per_token[:, context:].sum(1)], dim=-1)
