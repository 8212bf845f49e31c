"""What pruning saves: TTFT measured against the plain model."""

import statistics
import time

import torch

from pop_lightning.generator import StageAwareGenerator


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
