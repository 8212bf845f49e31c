"""Quantized checkpoints in formats that vLLM reads, made on the spot, and models that compute what they compute.

The base itself is rounded to the grid of a format first, so that the quantized checkpoint loses nothing: an artifact of
the base fits it, and the base in float32 is its reference.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 32
PART = "_proj.weight"  # ends the name of each quantized weight
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight columns in one number


def grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers ``[out, in]`` and their scales, one per row (8 bits) or per ``GROUP`` of a row (4 bits)."""
    groups = weight.unflatten(1, (-1, weight.shape[1] if bits == 8 else GROUP))
    most = 2 ** (bits - 1) - 1
    scales = (groups.abs().amax(-1, keepdim=True) / most).bfloat16().float()  # exact in every format
    return (groups / scales).round().clamp(-most - 1, most).flatten(1).to(torch.int32), scales[..., 0]


def round_to_grid(model: nn.Module, bits: int) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(PART):
            whole, scales = grid(parameter.data, bits)
            parameter.data = (whole.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1)


def write(base: Path, folder: Path, kind: str) -> None:
    """The checkpoint ``base``, which is rounded to the grid, as ``kind``: one of ``FORMATS``."""
    bits, config, pack = FORMATS[kind]
    shutil.copytree(base, folder)
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.endswith(PART):
            whole, scales = grid(tensor, bits)
            parts = pack(whole, scales)
            tensors |= {f"{name.removesuffix('weight')}{part}": each.contiguous() for part, each in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": config}))


def _in_columns(whole: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight numbers of 0 to 15 in each of 32 bits, along the last dimension."""
    eights = whole.long().unflatten(-1, (-1, 8))[..., list(order)]
    packed = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _int8(whole: Tensor, scales: Tensor) -> dict[str, Tensor]:
    return {"weight": whole.to(torch.int8), "weight_scale": scales}


def _int4(whole: Tensor, scales: Tensor) -> dict[str, Tensor]:
    packed = _in_columns(whole + 8)
    return {"weight_packed": packed, "weight_scale": scales, "weight_shape": torch.tensor(whole.shape)}


def _gptq(whole: Tensor, scales: Tensor) -> dict[str, Tensor]:
    groups, width = scales.T.shape
    return {
        "qweight": _in_columns(whole + 8).T,
        "qzeros": _in_columns(torch.full((groups, width), 7)),  # one less than the zero point
        "scales": scales.T.half(),
        "g_idx": torch.arange(whole.shape[1], dtype=torch.int32) // GROUP,
    }


def _awq(whole: Tensor, scales: Tensor) -> dict[str, Tensor]:
    zeros = torch.full(scales.T.shape, 8)
    return {
        "qweight": _in_columns((whole + 8).T, AWQ_ORDER),
        "qzeros": _in_columns(zeros, AWQ_ORDER),
        "scales": scales.T.half(),
    }


def _compressed(form: str, weights: dict, inputs: dict | None = None) -> dict:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "dynamic": False, **weights}}
    group["input_activations"] = inputs
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
# bits, the configuration's entry, and how a weight is stored
FORMATS = {
    "int8": (8, _compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, DYNAMIC), _int8),
    "int4": (4, _compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP}), _int4),
    "gptq": (4, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}, _gptq),
    "awq": (4, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}, _awq),
}


class Int8Inputs(nn.Linear):
    """A linear layer whose input is rounded to 8 bits, each token with a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return nn.functional.linear((x / scale).round() * scale, self.weight, self.bias)


def round_inputs(model: nn.Module) -> None:
    """Round the inputs of all quantized layers to 8 bits."""
    for name, module in model.named_modules():
        if f"{name}.weight".endswith(PART):
            module.__class__ = Int8Inputs
