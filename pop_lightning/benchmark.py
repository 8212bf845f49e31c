"""What pruning saves: operations counted from the model's own shapes, and TTFT measured against the plain model."""

import statistics
import time

import torch
from torch import nn

from pop_lightning.decoder import Decoder
from pop_lightning.generator import StageAwareGenerator
from pop_lightning.plan import PruningPlan


def prefill_flops(decoder: Decoder, plan: PruningPlan, tokens: int) -> int:
    """Operations (2 per multiply-add) of one prefill of ``tokens`` tokens; embeddings and norms are left out.

    Attention counts the pairs that causality and the layer's window leave. The head runs on the last token.
    """
    context = max(0, tokens - plan.boundary)
    total = 2 * decoder.head.weight.numel()
    for layer in range(decoder.num_layers):
        block, window = decoder.layers[layer], decoder.window(layer) or tokens
        linear = 2 * sum(m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear))
        per_pair = 4 * decoder.attention(layer).q_proj.out_features
        first = context if layer >= plan.depth else 0
        total += linear * (tokens - first)
        total += per_pair * sum(min(position + 1, window) for position in range(first, tokens))
        if first:
            seen = min(context, window - 1) if decoder.window(layer) else context
            total += 2 * 2 * decoder.kv_dim * decoder.config.hidden_size * seen
    return total


def measure_ttft(generator: StageAwareGenerator, tokens: int, *, batch: int = 1, repeats: int = 9) -> dict:
    """Time of one prefill, plain and pruned alternating after warm-up: medians in milliseconds and their ratio."""
    device = generator.model.device
    ids = torch.randint(0, generator.decoder.config.vocab_size, (batch, tokens), device=device)

    def once(pruned: bool) -> float:
        _synchronise(device)
        start = time.perf_counter()
        if pruned:
            generator.prefill(ids)
        else:
            with generator.full_model():
                generator.prefill(ids)
        _synchronise(device)
        return 1000 * (time.perf_counter() - start)

    for _ in range(2):
        once(True), once(False)
    pairs = [(once(False), once(True)) for _ in range(repeats)]
    return {
        "prompt_tokens": tokens,
        "batch": batch,
        "full_ms": statistics.median(full for full, _ in pairs),
        "pruned_ms": statistics.median(pruned for _, pruned in pairs),
        "ratio": statistics.median(full / pruned for full, pruned in pairs),
        "repeats": repeats,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
