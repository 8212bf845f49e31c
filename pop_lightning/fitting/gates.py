"""Virtual gates: one scalar per layer, stage and row over both branches of a layer (arXiv 2602.03295, section 3).

Scoring needs their gradients only at one, where a gate changes nothing: dL/dg is the branch's output times its
gradient, computed in the backward pass without inserting gates.
"""

from contextlib import contextmanager

import torch
from torch import Tensor

from pop_lightning.models.decoder import Decoder


@contextmanager
def probed(decoder: Decoder, rows: int, context: int):
    """Record the gradients of all gates at one, for one product per branch in the backward pass.

    The model runs once inside, and then backward; its weights may be frozen.

    Args:
        rows: of the batch.
        context: number of context tokens, which come first; boundary and response tokens follow.

    Yields:
        A list that the backward pass fills with ``(layer, [rows, 2])`` (prefill, decode), float32, one entry per
        branch; :func:`gate_gradients` sums it.
    """
    handles, gradients = [], []

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
            value = by_row(branch.detach(), rows)
            branch.register_hook(lambda grad: gradients.append((layer, _by_stage(value, grad.view_as(value), context))))

        return apply

    try:
        handles.append(decoder.layers[0].register_forward_pre_hook(start, with_kwargs=True))
        for layer in range(decoder.num_layers):
            for branch in decoder.branches(layer):
                handles.append(branch.register_forward_hook(hook(layer)))
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def gate_gradients(gradients: list[tuple[int, Tensor]], layers: int) -> Tensor:
    """``[batch, L, 2]``, summed from the list of :func:`probed`."""
    rows, device = len(gradients[0][1]), gradients[0][1].device
    total = torch.zeros(rows, layers, 2, dtype=torch.float32, device=device)
    for layer, gradient in gradients:
        total[:, layer] += gradient
    return total


def by_row(output: Tensor, rows: int) -> Tensor:
    """A branch's output as ``[batch, tokens, hidden]``; some mixtures of experts return it flattened over tokens."""

    return output if output.dim() == 3 else output.unflatten(0, (rows, -1))


def _by_stage(output: Tensor, grad: Tensor, context: int) -> Tensor:
    per_token = (grad.float() * output.float()).sum(-1)
    return torch.stack([per_token[:, :context].sum(1), per_token[:, context:].sum(1)], dim=-1)
