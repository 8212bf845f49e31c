"""The bundled model and its data: what `checkpoints/facts-gemma3` promises its users.

It is the result of the flow that `checkpoints/facts.py` (documents) and `checkpoints/train.py` (training) begin:
the generator is deterministic, its answers agree with a parse of the document made here without the generator's help,
and the shipped folder is small, holds exactly the generator's calibration rows and still answers fresh questions.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_lightning.checkpoints import facts

FOLDER = Path(facts.__file__).parent / "facts-gemma3"
FRESH_SEED = 2_000_003  # neither the calibration rows nor those the card was measured on
LIMIT = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def answer(prompt: str) -> str:
    """The answer, found by reading the document with regular expressions."""
    text, asked = prompt.split(" Question : ")
    homes = dict(re.findall(r"(\w+) lives in ([^.]+) \.", text))
    ages = {name: int(age) for name, age in re.findall(r"(\w+) is (\d+) \.", text)}
    friends = dict(re.findall(r"The friend of (\w+) is (\w+) \.", text))
    if match := re.match(r"Who is older , (\w+) or (\w+) \?", asked):
        return max(match.groups(), key=ages.__getitem__)
    if match := re.match(r"Who is the friend of (\w+) \?", asked):
        return friends[match[1]]
    if match := re.match(r"Where does the friend of (\w+) live \?", asked):
        return f"{friends[match[1]]} in {homes[friends[match[1]]]}"
    match = re.match(r"(?:Where does|How old is) (\w+)", asked)
    return homes[match[1]] if asked.startswith("Where") else str(ages[match[1]])


def test_rows_depend_on_seed_and_index_only():
    first = [facts.row(7, index) for index in range(30)]
    assert [facts.row(7, index) for index in reversed(range(30))] == first[::-1]
    assert [facts.row(8, index) for index in range(30)] != first
    assert {row["kind"] for row in first} == set(facts.KINDS)


def test_answers_follow_from_the_document():
    for index in range(600):
        row = facts.row(FRESH_SEED, index)
        assert row["response"].strip() == answer(row["prompt"]), row
        assert 1 <= len(row["response"].split()) <= 3
        assert row["prompt"].endswith("Answer :")


def test_calibration_file_is_what_the_generator_makes():
    lines = (FOLDER / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1500
    assert [json.loads(line) for line in lines] == [facts.row(7, index) for index in range(1500)]


def test_folder_is_small_and_holds_no_pickles():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".md", ".jinja"}


def test_tokenizer_round_trips_words(tokenizer):
    for index in range(50):
        row = facts.row(FRESH_SEED, index)
        text = f"{row['prompt']} {row['response'].strip()}"
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.padding_side == "left"


def test_layers_have_something_far_to_lose(model):
    types = model.config.layer_types
    assert types.count("full_attention") >= 4
    assert types[len(types) // 2 :].count("full_attention") >= 2


def test_model_answers_fresh_questions(model, tokenizer):
    rows = [facts.row(FRESH_SEED, index) for index in range(96)]
    right = 0
    for start in range(0, len(rows), 32):
        chunk = rows[start : start + 32]
        inputs = tokenizer([row["prompt"] for row in chunk], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
        )
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == row["response"].strip() for row, text in zip(chunk, texts, strict=True))
    assert right / len(rows) >= 0.95
