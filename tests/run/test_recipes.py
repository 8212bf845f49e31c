"""The recipes of full-size models, run whole and offline on their real classes with every size reduced."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer, Gemma3Config

from pop_lightning import StageAwareGenerator
from pop_lightning.cli import fit
from pop_lightning.models.loading import auto_class
from pop_lightning.models.shapes import shape

from tests.helpers import sharded_fit, vision
from tests.helpers.families import COMMON, WINDOW
from tests.helpers.workbench import WORDS, save_tokenizer

PAPER = ["llama3_1_8b", "gemma3_12b", "qwen3_vl_8b"]
SHARDED = "llama3_3_70b_deepspeed"
OTHERS = [pytest.param(name, marks=pytest.mark.full) for name in ("gemma3_4b", "qwen3_8b", "mistral_7b")]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}w1 {{ message.content }} w2 "
    "{% else %}{{ message.content }} <eos> {% endif %}{% endfor %}"
)


def shrunken(name):
    """The published config with its own choices (norms, windows, biases, tied head) and the tests' sizes."""
    config = shape(name).make()
    text = config.get_text_config()
    for key, value in COMMON.items():
        setattr(text, key, value)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[4:8]  # for Gemma: sliding, global, sliding, sliding
    if getattr(text, "sliding_window", None):
        text.sliding_window = WINDOW
    tokens = {"image_token_id": vision.IMAGE, "video_token_id": vision.VIDEO}
    if name.startswith("gemma3"):  # the checkpoint of that name holds a vision tower as well
        tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        tower |= {"image_size": 28, "patch_size": 14}
        tokens = {"boi_token_index": vision.OPEN, "eoi_token_index": vision.CLOSE, "image_token_index": vision.IMAGE}
        return Gemma3Config(text_config=config.to_dict(), vision_config=tower, mm_tokens_per_image=4, **tokens)
    if name == "qwen3_vl_8b":  # its three DeepStack layers, and three that can be pruned
        text.num_hidden_layers = 6
        text.rope_parameters = text.rope_parameters | {"mrope_section": [2, 1, 1]}
        tower = {"hidden_size": 16, "intermediate_size": 16, "depth": 3, "num_heads": 2, "patch_size": 4}
        tower |= {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1, 2]}
        for key, value in tower.items():
            setattr(config.vision_config, key, value)
        for key, value in (
            tokens | {"vision_start_token_id": vision.OPEN, "vision_end_token_id": vision.CLOSE}
        ).items():
            setattr(config, key, value)
    return config


def chats(folder, family, rows=60):
    """Chats of text; for a model that reads images two thirds of them show some, in a file next to their pictures."""
    if family is not None:
        return vision.save_rows(folder / "chats.jsonl", rows)
    rng = random.Random(0)
    lines = []
    for _ in range(rows):
        said = [" ".join(rng.choices(WORDS[6:], k=count)) for count in (rng.randint(6, 20), 3)]
        roles = zip(("user", "assistant"), said, strict=True)
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return folder / "chats.jsonl"


def prepare(name, folder, **changes):
    """The command line of a recipe over a shrunken model and chats in ``folder``, the model, and its vision family."""
    torch.manual_seed(0)
    config = shrunken(name.removesuffix("_deepspeed"))
    family = next((family for family in vision.FAMILIES if name.startswith(family)), None)
    model = auto_class(config).from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    if family is None:
        save_tokenizer(folder / "base", chat_template=TEMPLATE)
    else:
        vision.processor(family).save_pretrained(folder / "base")
    changes = {
        "model.base": folder / "base",
        "data.calibration": chats(folder, family),
        "data.max_prompt_tokens": 64,
        "data.max_response_tokens": 8,
        "output": folder / "run",
        "budget.max_drop": 0.9,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return (
        ["--recipe", name, *[part for key, value in changes.items() for part in (f"--{key}", f"{value}")]],
        model,
        family,
    )


@pytest.mark.parametrize("name", [*PAPER, *OTHERS, SHARDED])
def test_a_full_size_recipe_runs_on_its_shrunken_model(name, tmp_path):
    one = {"trainer__strategy": "auto", "trainer__devices": 1, "budget__candidates": [2, 1]} if name == SHARDED else {}
    command, model, family = prepare(name, tmp_path, **one)
    assert fit.main(command) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["layers"] == model.config.get_text_config().num_hidden_layers
    assert {entry["projection"] for entry in metrics["curve"]} == {"reuse", "closed_form"}
    generator = StageAwareGenerator.from_artifact(tmp_path / "run" / "artifact")
    assert type(generator.model) is type(model)
    assert next(generator.model.parameters()).dtype == torch.bfloat16
    first = [{"role": "user", "content": "w7 w8 w9"}]
    if family is None:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        inputs = tokenizer.apply_chat_template(first, return_tensors="pt", return_dict=True)
    else:
        shown = {"type": "image", "path": str(tmp_path / "pictures" / "0.png")}
        first[0]["content"] = [shown, {"type": "text", "text": "w7 w8 w9"}]
        inputs = AutoProcessor.from_pretrained(tmp_path / "base").apply_chat_template(
            first, return_tensors="pt", return_dict=True, tokenize=True
        )
        assert "pixel_values" in inputs
    new = generator.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert new.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.full
def test_the_sharded_recipe_runs_on_two_processes(tmp_path):
    command, *_ = prepare(SHARDED, tmp_path, trainer__devices=2, budget__candidates=[2, 1])
    whole_in_shards = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"zero_allow_untested_optimizer": True, "zero_optimization": whole_in_shards}
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PL_DEEPSPEED_CONFIG_PATH": str(tmp_path / "zero3.json"),
        "NOTES": str(tmp_path),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = [*torchrun, str(Path(sharded_fit.__file__)), *command]
    result = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["depth"] in (1, 2)
    assert metrics["ttft"] is None  # a base in shards is not measured
    for rank in (0, 1):
        note = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert note["dtypes"] == ["torch.bfloat16"]
        assert note["share"] <= 0.51 * note["whole"]
    generator = StageAwareGenerator.from_artifact(tmp_path / "run" / "artifact")
    assert next(generator.model.parameters()).dtype == torch.bfloat16
