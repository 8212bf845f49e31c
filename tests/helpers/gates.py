"""Virtual gates of any value, multiplied into a running model: what scoring's gradients at one are compared with."""

from contextlib import contextmanager

import torch
from torch import Tensor

from pop_lightning.fitting.gates import by_row
from pop_lightning.models.decoder import Decoder


class _Gate(torch.autograd.Function):
    """``x * g`` with one g per row and stage; the gate's gradient is summed in float32, whatever dtype x has."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, context: int) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.context = context
        return x * _per_token(gate, context, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, gate = ctx.saved_tensors
        per_token = (grad.float() * x.float()).sum(-1)
        split = [per_token[:, : ctx.context].sum(1), per_token[:, ctx.context :].sum(1)]
        return grad * _per_token(gate, ctx.context, grad), torch.stack(split, dim=-1), None


def _per_token(gate: Tensor, context: int, like: Tensor) -> Tensor:
    """``[batch, 2]`` spread over ``[batch, tokens, 1]``: the first ``context`` tokens are prefill, the rest decode."""
    tokens = like.shape[1]
    spread = torch.cat([gate[:, :1].expand(-1, context), gate[:, 1:].expand(-1, tokens - context)], dim=1)
    return spread.unsqueeze(-1).to(like.dtype)


@contextmanager
def gated(decoder: Decoder, gates: Tensor, context: int):
    """Gate every branch of every layer while the model runs.

    Args:
        gates: ``[batch, L, 2]`` (prefill, decode), float32, a leaf where gradients are wanted.
        context: how many tokens at the front are context; boundary and response tokens follow.
    """
    handles = []

    def hook(layer: int):
        def apply(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            first = _Gate.apply(by_row(first, len(gates)), gates[:, layer], context).view_as(first)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return apply

    try:
        for layer in range(decoder.num_layers):
            for branch in decoder.branches(layer):
                handles.append(branch.register_forward_hook(hook(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
