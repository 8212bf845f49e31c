"""Tiny random models that vLLM's CPU attention accepts, their artifacts, and an engine in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pop_lightning import PruningPlan, StageAwareGenerator
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import randomize

ROOT = Path(__file__).parents[2]
LAYERS, VOCABULARY, WINDOW = 6, 128, 48
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = SHAPE | {"head_dim": 32}  # vLLM's CPU attention needs 32 or more
SLIDING = ["sliding_attention", "full_attention"] * 3
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"hidden_size": 128})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**WIDE, **EXPERTS, mlp_only_layers=[1])),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE | {"hidden_size": 128})),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**WIDE, sliding_window=WINDOW, query_pre_attn_scalar=32, attn_logit_softcapping=20.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**WIDE, sliding_window=WINDOW, layer_types=SLIDING, query_pre_attn_scalar=32)
    ),
}
MORE = {
    "one_head": lambda: LlamaForCausalLM(LlamaConfig(**WIDE | {"num_key_value_heads": 1})),  # which all ranks hold
    "exaone4": lambda: Exaone4ForCausalLM(Exaone4Config(**WIDE, layer_types=["full_attention"] * LAYERS)),
}


def build(
    family: str,
    folder: Path,
    plan: PruningPlan,
    *,
    fitted: bool = True,
    seed: int = 0,
    change: Callable[[PreTrainedModel], None] = lambda model: None,
) -> StageAwareGenerator:
    """A random model in ``folder/base`` and its artifact in ``folder/artifact``; returns the generator of both.

    Args:
        fitted: perturbed projections in place of reuse.
        change: of the model's weights, before anything is made of them.
    """
    torch.manual_seed(seed)
    model = randomize((FAMILIES | MORE)[family](), family)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_((64 / model.config.hidden_size) ** 0.5)  # activations of one size in all of them
    if not model.config.tie_word_embeddings:
        model.lm_head.weight.data.mul_(0.3)  # logits of ordinary size, or their last bit is 1e-5
    change(model)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "base")
    model.set_attn_implementation("eager")
    projections = KVProjections(Decoder(model), plan.depth)
    if fitted and projections.fitted_layers:
        maps = {layer: projections.affine(layer) for layer in projections.fitted_layers}
        moved = {layer: tuple(_moved(part) for part in parts) for layer, parts in maps.items()}
        projections.replace(moved, "closed_form")
    generator = StageAwareGenerator(model, plan, projections)
    generator.save_pretrained(folder / "artifact", base=str(folder / "base"))
    return generator


def _moved(part: torch.Tensor) -> torch.Tensor:
    return part + 0.3 * part.abs().mean().clamp(min=0.05) * torch.randn_like(part)


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def expected(generator: StageAwareGenerator, given: list[list[int]], new_tokens: int) -> list[dict]:
    """Greedy tokens of ``generator``, each with its log-probability: what an engine must answer."""
    answers = []
    for prompt in given:
        found = generator.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[0, len(prompt) :].tolist()
        logprobs = torch.cat(found.logits).float().log_softmax(-1)
        answers.append({"tokens": tokens, "logprobs": [logprobs[i, token].item() for i, token in enumerate(tokens)]})
    return answers


def assert_same(found: list[dict], wanted: list[dict], tolerance: float = 1e-5) -> None:
    """Equal tokens, and log-probabilities that differ by less than ``tolerance``."""
    worst = difference(found, wanted)
    assert worst is not None, "other tokens than the generator's"
    assert worst < tolerance, f"log-probabilities differ by {worst:.1e}"


def difference(found: list[dict], wanted: list[dict]) -> float | None:
    """The largest difference of two log-probabilities; None where a token differs."""
    assert len(found) == len(wanted)
    if any(ours["tokens"] != theirs["tokens"] for ours, theirs in zip(found, wanted, strict=True)):
        return None
    return max(
        abs(one - other)
        for ours, theirs in zip(found, wanted, strict=True)
        for one, other in zip(ours["logprobs"], theirs["logprobs"], strict=True)
    )


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


class Engines:
    """Runs engines one after the other, each in a process of its own; use as a context manager."""

    def __enter__(self) -> "Engines":
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.engine"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, folder: Path, job: dict) -> dict:
        """What an engine found that ran ``job`` (see ``tests/serving/engine.py``).

        Raises:
            EngineError: it failed; the message is the end of its output.
        """
        (folder / "job.json").write_text(json.dumps(job))
        (folder / "found.json").unlink(missing_ok=True)
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        if code != "0":
            raise EngineError((folder / "log.txt").read_text()[-8000:])
        return json.loads((folder / "found.json").read_text())


class EngineError(Exception):
    """An engine that did not start, or failed."""
