"""From text to text: prompts that are empty or not text, and rows of any length."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.generation.batch import generate_file
from pop_lightning.generation.stream import stream

from tests.helpers.workbench import WORDS, save_base


@pytest.fixture
def generator(tmp_path):
    folder = save_base(tmp_path / "base", seed=2)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return StageAwareGenerator(model, PruningPlan(1), tokenizer=AutoTokenizer.from_pretrained(folder))


def answer(generator, prompt):
    return "".join(piece for piece, _ in stream(generator, prompt, max_new_tokens=6))


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_starts_from_the_bos_token(generator, prompt):
    tokenizer, bos = generator.tokenizer, torch.tensor([[WORDS.index("<bos>")]])
    tokens = generator.generate(bos, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 1:]
    assert answer(generator, prompt).strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_an_empty_prompt_without_a_bos_token_is_a_sentence(generator):
    generator.tokenizer.bos_token = generator.generation_config.bos_token_id = None
    with pytest.raises(InputError, match="--prompt is empty, and the base has no BOS token"):
        answer(generator, "")


@pytest.mark.parametrize("prompt", ["w1 \ud83d w2", "\udcff"])
def test_a_prompt_that_is_not_unicode_is_a_sentence(generator, prompt):
    with pytest.raises(InputError, match="--prompt is not valid Unicode at character"):
        answer(generator, prompt)


@pytest.mark.parametrize(("limit", "answered"), [(None, 2), (5, 1), (40, 2), (100, 3)])
def test_rows_longer_than_the_limit_are_left_out_and_the_context_is_only_the_default(
    generator, tmp_path, limit, answered
):
    generator.config.max_position_embeddings = 48
    data, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    prompts = [" ".join(f"w{i}" for i in range(length)) for length in (3, 30, 60)]
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    summary = generate_file(generator, str(data), output, max_new_tokens=8, max_prompt_tokens=limit)
    assert summary["rows"] == answered == len(output.read_text().splitlines())
    left_out = {"prompt longer than max_prompt_tokens": 3 - answered} if answered < 3 else {}
    assert summary["unusable"] == left_out
