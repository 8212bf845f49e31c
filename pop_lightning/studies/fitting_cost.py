"""What scoring and training cost, as ratios to plain passes of the same model on the same batch, in one run.

``python -m pop_lightning.studies.fitting_cost`` measures, alternating after warm-up: importance scoring against a plain
forward and backward with frozen weights (gradients flow through the activations, as they must for scoring), with
gradient checkpointing and without, and a training step at half depth against a plain full fine-tuning step. Peak
memory is printed next to each. It is separate from the pipeline, whose modules it runs as they are.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pop_lightning.core.clock import synchronize
from pop_lightning.core.memory import peak_bytes
from pop_lightning.fitting.importance import ImportanceScoring
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import load_model

SCORING_LIMIT, TRAINING_LIMIT = 1.15, 0.5


@dataclass
class Settings:
    """What is measured.

    Args:
        base: a hub id, a folder or ``bundled:NAME``; a random Llama of the shape below unless given.
        layers, hidden, vocabulary: of the random Llama.
        batch: rows; ``prompt`` tokens each, and a quarter of that as response.
        repeats: pairs that the median ratio is taken over.
        device: ``cpu`` or ``cuda``.
    """

    base: str | None = None
    layers: int = 8
    hidden: int = 256
    vocabulary: int = 4096
    batch: int = 2
    prompt: int = 256
    repeats: int = 7
    device: str = "cpu"
    dtype: str = "float32"


def run(settings: Settings) -> dict[str, dict]:
    """By what is measured: medians in seconds, peaks in MiB, the ratio and, where there is one, its limit."""
    model = _model(settings)
    decoder = Decoder(model)
    response = max(1, settings.prompt // 4)
    ids = torch.randint(3, decoder.config.vocab_size, (settings.batch, settings.prompt + response))
    batch = {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "prompt_length": settings.prompt,
        "row_seed": torch.arange(settings.batch),
    }
    plain = _plain_backward(decoder, batch)
    found = {
        "scoring": compare(_scoring(decoder, batch), plain, settings.repeats, model) | {"limit": SCORING_LIMIT},
        "scoring, gradient checkpointing": compare(_scoring(decoder, batch, True), plain, settings.repeats, model),
    }
    # One model serves both: fine-tuning asks for gradients of its weights only while it runs.
    found["training step"] = compare(
        _training_step(decoder, batch), _fine_tuning_step(decoder, batch), settings.repeats, model
    )
    found["training step"]["limit"] = TRAINING_LIMIT
    return found


def compare(ours: Callable[[], None], plain: Callable[[], None], repeats: int, model) -> dict[str, float]:
    """Run both in turn; medians, the median of the pairs' ratios, and the peak memory of each above what was held."""
    device = model.device
    peaks = [peak_bytes(each, device) for each in (ours, plain)]  # warm-up as well
    pairs = [(_seconds(ours, device), _seconds(plain, device)) for _ in range(repeats)]
    ratios = sorted(first / second for first, second in pairs)
    return {
        "seconds": statistics.median(first for first, _ in pairs),
        "plain_seconds": statistics.median(second for _, second in pairs),
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "peak_mib": peaks[0] / 2**20,
        "plain_peak_mib": peaks[1] / 2**20,
    }


# --- the four passes ------------------------------------------------------------------------------------------------


def _scoring(decoder: Decoder, batch: dict, gradient_checkpointing: bool = False) -> Callable[[], None]:
    module = ImportanceScoring(decoder, gradient_checkpointing=gradient_checkpointing)
    return lambda: module.gradients(batch).double().pow(2).sum(0)


def _plain_backward(decoder: Decoder, batch: dict) -> Callable[[], None]:
    embed = decoder.model.get_input_embeddings()

    def once() -> None:
        handle = embed.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        try:
            _plain_loss(decoder, batch).backward()
        finally:
            handle.remove()

    return once


def _training_step(decoder: Decoder, batch: dict) -> Callable[[], None]:
    depth = decoder.num_layers // 2
    module = KVProjectionTraining(decoder, depth)
    optimizer = torch.optim.AdamW([module.parameter_group()])

    def once() -> None:
        module.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return once


def _fine_tuning_step(decoder: Decoder, batch: dict) -> Callable[[], None]:
    weights = list(decoder.model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=0.0)  # the arithmetic of a step; the weights stay

    def once() -> None:
        for weight in weights:
            weight.requires_grad_(True)
        try:
            _plain_loss(decoder, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)

    return once


def _plain_loss(decoder: Decoder, batch: dict) -> Tensor:
    logits = decoder.response_logits(batch)
    targets = batch["input_ids"][:, batch["prompt_length"] :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# --- measuring ------------------------------------------------------------------------------------------------------


def _seconds(once: Callable[[], None], device: torch.device) -> float:
    gc.collect()
    synchronize(device)
    start = time.perf_counter()
    once()
    synchronize(device)
    return time.perf_counter() - start


def _model(settings: Settings):
    if settings.base is not None:
        return load_model(settings.base, dtype=settings.dtype).to(settings.device)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 7 // 2,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 64,
        num_key_value_heads=max(1, settings.hidden // 256),
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(settings.device, getattr(torch, settings.dtype))
    return model.eval().requires_grad_(False)


def render(found: dict[str, dict]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| | time (s) | plain (s) | ratio (lowest to highest) | wanted | peak (MiB) | plain peak (MiB) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        wanted = f"at most {each['limit']:g}" if "limit" in each else ""
        lines.append(
            f"| {name} | {each['seconds']:.3f} | {each['plain_seconds']:.3f} | {each['ratio']:.3f} "
            f"({each['lowest']:.3f} to {each['highest']:.3f}) | {wanted} | {each['peak_mib']:.1f} | "
            f"{each['plain_peak_mib']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """``python -m pop_lightning.studies.fitting_cost``; returns the exit code."""
    from jsonargparse import ArgumentParser

    from pop_lightning.cli import run as guarded

    parser = ArgumentParser(prog="python -m pop_lightning.studies.fitting_cost", description=__doc__)
    parser.add_class_arguments(Settings)

    def body() -> int:
        print(render(run(Settings(**parser.parse_args(argv).as_dict()))))
        return 0

    return guarded("fitting_cost", body)


if __name__ == "__main__":
    raise SystemExit(main())
