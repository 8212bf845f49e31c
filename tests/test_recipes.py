"""The recipes of full-size models, run whole and offline on their real classes with every size shrunken."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

from pop_lightning import StageAwareGenerator
from pop_lightning.cli import fit
from pop_lightning.shapes import shape

from families import COMMON, WINDOW
from workbench import WORDS, save_tokenizer

PAPER = ["llama3_1_8b", "gemma3_12b"]
SHARDED = "llama3_3_70b_deepspeed"
OTHERS = [pytest.param(name, marks=pytest.mark.full) for name in ("gemma3_4b", "qwen3_8b", "mistral_7b")]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}w1 {{ message.content }} w2 "
    "{% else %}{{ message.content }} <eos> {% endif %}{% endfor %}"
)


def shrunken(name):
    """The published config with its own choices (norms, windows, biases, tied head) and the tests' sizes."""
    config = shape(name).make()
    for key, value in COMMON.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[4:8]  # for Gemma: sliding, global, sliding, sliding
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    if name.startswith("gemma3"):  # the checkpoint of that name holds a vision tower as well
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14}
        tokens = {"boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92, "mm_tokens_per_image": 4}
        return Gemma3Config(text_config=config.to_dict(), vision_config=vision, **tokens)
    return config


def prepare(name, folder, **changes):
    """The command line of a recipe over a shrunken model and chats in ``folder``; also the chats."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrunken(name.removesuffix("_deepspeed")), dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    save_tokenizer(folder / "base", chat_template=TEMPLATE)
    rng = random.Random(0)
    chats = [
        {
            "messages": [
                {"role": "user", "content": " ".join(rng.choices(WORDS[6:], k=rng.randint(6, 20)))},
                {"role": "assistant", "content": " ".join(rng.choices(WORDS[6:], k=3))},
            ]
        }
        for _ in range(60)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    changes = {
        "model.base": folder / "base",
        "data.calibration": folder / "chats.jsonl",
        "data.max_prompt_tokens": 64,
        "data.max_response_tokens": 8,
        "output": folder / "run",
        "budget.max_drop": 0.9,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return ["--recipe", name, *[part for key, value in changes.items() for part in (f"--{key}", f"{value}")]], chats


@pytest.mark.parametrize("name", [*PAPER, *OTHERS, SHARDED])
def test_a_full_size_recipe_runs_on_its_shrunken_model(name, tmp_path):
    one = {"trainer__strategy": "auto", "trainer__devices": 1, "budget__candidates": [2, 1]} if name == SHARDED else {}
    command, chats = prepare(name, tmp_path, **one)
    assert fit.main(command) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["layers"] == COMMON["num_hidden_layers"]
    assert {entry["projection"] for entry in metrics["curve"]} == {"reuse", "closed_form"}
    generator = StageAwareGenerator.from_artifact(tmp_path / "run" / "artifact")
    assert next(generator.model.parameters()).dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    inputs = tokenizer.apply_chat_template(chats[0]["messages"][:1], return_tensors="pt", return_dict=True)
    assert generator.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.full
def test_the_sharded_recipe_runs_on_two_processes(tmp_path):
    command, _ = prepare(SHARDED, tmp_path, trainer__devices=2, budget__candidates=[2, 1])
    whole_in_shards = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"zero_allow_untested_optimizer": True, "zero_optimization": whole_in_shards}
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PL_DEEPSPEED_CONFIG_PATH": str(tmp_path / "zero3.json"),
        "NOTES": str(tmp_path),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = [*torchrun, str(Path(__file__).with_name("sharded_fit.py")), *command]
    result = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["depth"] in (1, 2)
    assert metrics["ttft"] is None  # a base in shards is no served model
    for rank in (0, 1):
        note = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert note["dtypes"] == ["torch.bfloat16"]
        assert note["share"] <= 0.51 * note["whole"]
    generator = StageAwareGenerator.from_artifact(tmp_path / "run" / "artifact")
    assert next(generator.model.parameters()).dtype == torch.bfloat16
