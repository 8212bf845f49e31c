"""The notebook cell of the documentation: from a model and rows in memory to a saved artifact that generates."""

import json
import random

import pytest
import torch
from lightning import Trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_lightning import (
    AccuracyBudget,
    CalibrationData,
    Evaluation,
    ExportArtifact,
    ImportanceScoring,
    InputError,
    StageAwareGenerator,
    closed_form,
)

from tests.helpers.workbench import WORDS, save_base


def test_from_a_model_to_an_artifact_in_one_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, rng = save_base(tmp_path / "base"), random.Random(0)
    rows = [
        {"prompt": " ".join(rng.choices(WORDS[4:], k=12)), "response": " ".join(rng.choices(WORDS[4:], k=2))}
        for _ in range(80)
    ]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    data = CalibrationData(rows, tokenizer)

    scoring = ImportanceScoring(model)
    Trainer().validate(scoring, datamodule=data)
    projections = closed_form(model, scoring.candidates(8), data)

    evaluation = Evaluation(model, projections)
    budget = AccuracyBudget("nll_increase", max_drop=5.0)
    trainer = Trainer(callbacks=[budget, ExportArtifact("artifact")])
    trainer.validate(evaluation, datamodule=data)  # the search split: what to verify
    trainer.test(evaluation, datamodule=data)  # the verify split, once: decides and writes

    generator = StageAwareGenerator.from_artifact("artifact", base=model)

    assert list(projections) == [2, 1]
    assert budget.depth == generator.plan.depth == 1
    assert json.loads((tmp_path / "artifact" / "pop_config.json").read_text())["plan"]["depth"] == 1
    prompt = tokenizer(rows[0]["prompt"], return_tensors="pt")
    assert generator.generate(**prompt, max_new_tokens=3).shape == (1, prompt["input_ids"].shape[1] + 3)
    assert all(torch.is_tensor(each) and each.requires_grad for each in model.parameters())


def test_a_row_in_memory_that_is_not_a_dictionary_is_refused(tmp_path):
    data = CalibrationData([{"prompt": "w1 w2"}, "w3"], AutoTokenizer.from_pretrained(save_base(tmp_path)))
    with pytest.raises(InputError, match="row 2 is a str, not a dictionary"):
        data.setup()
