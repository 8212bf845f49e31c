"""Full-size shapes by name: the published dimensions of well-known decoders, as Transformers configs without weights.

What a model costs in operations, bytes and milliseconds depends only on its shape, so operations can be
counted, timed and checked for Llama-3.3-70B without its checkpoint. Nothing here is downloaded.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3VLConfig,
)

from pop_lightning.core.errors import InputError
from pop_lightning.core.memory import device_bytes
from pop_lightning.models.loading import auto_class, check_attention

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _llama3(**dimensions) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=dict(_LLAMA3_ROPE),
        tie_word_embeddings=False,
        **dimensions,
    )


def _gemma3(**dimensions) -> Gemma3TextConfig:
    """Five sliding layers to one global layer, as Transformers lays them out by default."""
    return Gemma3TextConfig(
        vocab_size=262208,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=1024,
        max_position_embeddings=131072,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        **dimensions,
    )


def _llama3_1_8b() -> LlamaConfig:
    return _llama3(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )


def _llama3_3_70b() -> LlamaConfig:
    return _llama3(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    )


def _gemma3_4b() -> Gemma3TextConfig:
    return _gemma3(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


def _gemma3_12b() -> Gemma3TextConfig:
    return _gemma3(
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
    )


def _qwen3_8b() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
    )


def _qwen3_vl_8b() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        tie_word_embeddings=False,
    )


def _mistral_7b() -> MistralConfig:
    return MistralConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        sliding_window=None,
        tie_word_embeddings=False,
    )


def _cpu_small() -> LlamaConfig:
    """Llama's proportions, small enough that two CPU cores prefill 1024 tokens in about a second."""
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=16384,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class Shape:
    """One published shape.

    Attributes:
        base: the hub repository whose config it repeats; None if there is no checkpoint.
        make: builds a new config.
        left_out: parameters of the checkpoint that the config lacks: Gemma's vision tower, which is loaded as well.
    """

    base: str | None
    make: Callable[[], PreTrainedConfig]
    left_out: int = 0


_GEMMA_TOWER = 416_866_032  # parameters of SigLIP, without the projector to the decoder's width

SHAPES = {
    "cpu_small": Shape(None, _cpu_small),
    "gemma3_4b": Shape("google/gemma-3-4b-it", _gemma3_4b, _GEMMA_TOWER + 1152 * 2560 + 1152),
    "gemma3_12b": Shape("google/gemma-3-12b-it", _gemma3_12b, _GEMMA_TOWER + 1152 * 3840 + 1152),
    "llama3_1_8b": Shape("meta-llama/Llama-3.1-8B-Instruct", _llama3_1_8b),
    "llama3_3_70b": Shape("meta-llama/Llama-3.3-70B-Instruct", _llama3_3_70b),
    "mistral_7b": Shape("mistralai/Mistral-7B-Instruct-v0.3", _mistral_7b),
    "qwen3_8b": Shape("Qwen/Qwen3-8B", _qwen3_8b),
    "qwen3_vl_8b": Shape("Qwen/Qwen3-VL-8B-Instruct", _qwen3_vl_8b),  # with its vision tower
}


def of_base(base: str) -> str | None:
    """The name of the shape that repeats the config of a hub repository, or None."""
    return next((name for name, each in SHAPES.items() if each.base == base), None)


def shape(name: str) -> Shape:
    """Look a shape up.

    Raises:
        InputError: there is none with that name; the message suggests the nearest.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name.lower().replace("-", "_").replace(".", "_"), SHAPES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise InputError(f"--shape {name!r} is unknown: expected one of {', '.join(SHAPES)}{hint}")
    return SHAPES[name]


def meta(name: str) -> PreTrainedModel:
    """The model of a shape on the meta device: all modules and sizes, no memory. It can be counted, not run."""
    return from_config(shape(name).make(), torch.bfloat16, torch.device("meta"))


def build(name: str, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> PreTrainedModel:
    """The model of a shape with random weights, created directly on ``device`` in ``dtype``, without a float32 copy.

    Raises:
        InputError: no shape with that name, or its weights are larger than the device's memory.
    """
    device = torch.device(device)
    _check_memory(name, dtype, device, device_bytes(device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return from_config(shape(name).make(), dtype, device)


def from_config(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A frozen model in eval mode with random weights; on the meta device it has shapes but no values.

    ``attn_implementation`` is Transformers' own choice unless given (sdpa where the family has it).
    """
    with device:
        try:
            model = auto_class(config).from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        except (ValueError, ImportError) as error:
            check_attention(f"a base of type {config.model_type}", attn_implementation, error)
            raise
    return model.eval().requires_grad_(False)


def _check_memory(name: str, dtype: torch.dtype, device: torch.device, there: int) -> None:
    needed = sum(p.numel() for p in meta(name).parameters()) * dtype.itemsize
    if needed > there:
        raise InputError(
            f"--shape {name} has {needed / 1e9:.1f} GB of weights in {str(dtype).removeprefix('torch.')}, {device} has "
            f"{there / 1e9:.1f} GB of memory; choose a smaller --shape, a narrower --dtype or another --device."
        )
