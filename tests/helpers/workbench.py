"""A base model in a folder and calibration files, built on the spot: what command-line tests run on."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.helpers.families import build

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *[f"w{i}" for i in range(93)]]


def save_base(folder: Path, family: str = "llama", seed: int = 0, tokenizer: bool = True) -> Path:
    model = build(family, seed=seed)
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
    ).save_pretrained(folder)


def save_rows(path: Path, rows: int = 80, responses: bool = True, seed: int = 0) -> Path:
    rng = random.Random(seed)
    lines = []
    for _ in range(rows):
        words = rng.choices(WORDS[4:], k=rng.randint(8, 24))
        line = {"prompt": " ".join(words)}
        if responses:
            line["response"] = " ".join(rng.choices(WORDS[4:], k=rng.randint(1, 4)))
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def arguments(base: Path, data: Path, output: Path, **changes) -> list[str]:
    """A ``pop-fit`` command line that ends in seconds; ``changes`` by key, dots as double underscores."""
    recipe = data.parent / "recipe.yaml"
    recipe.write_text("seed: 0\n")
    values = {
        "model.base": base,
        "data.calibration": data,
        "output": output,
        "budget.metric": "nll_increase",
        "budget.max_drop": 100.0,
        "budget.nll_cap": 101.0,
        "boundary": 1,  # nothing else is searched unless a test asks for it
        "budget.candidates": "all",
        "projection.ridge": [0.1],
        "importance.rows": 8,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    return [
        "--recipe",
        str(recipe),
        "--verbose",
        *[part for key, value in values.items() for part in (f"--{key}", str(value))],
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
