"""What a Lightning user may expect: an ordinary Trainer around the modules is right, on one process and on two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoTokenizer

from pop_lightning import (
    CalibrationData,
    Evaluation,
    ImportanceScoring,
    InputError,
    KVProjections,
    KVProjectionTraining,
    PruningPlan,
    closed_form,
)
from pop_lightning.evaluation.evaluate import Variant
from pop_lightning.models.decoder import Decoder

from tests.helpers.contract import STEPS, figures
from tests.helpers.families import COMMON, build
from tests.helpers.workbench import save_rows

LAYERS = COMMON["num_hidden_layers"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows=83)


@pytest.fixture(scope="module")
def one(base, rows):
    return figures(base, rows)


@pytest.fixture
def data(base, rows):
    return CalibrationData(rows, AutoTokenizer.from_pretrained(base), batch_size=6)


def trainer(**arguments):
    return lightning.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        **({"logger": False, "enable_checkpointing": False} | arguments),
    )  # fmt: skip


def test_every_row_is_scored_and_verified_once_and_an_epoch_ends(one):
    assert one["rows"] == [25, 25]
    assert one["scores"][0] == one["scores"][1]
    assert one["verified_rows"] == 33
    assert one["steps"] == [STEPS, -(-25 // 6)] == [5, 5]


def test_everything_measured_is_logged(one):
    logged = one["logged"]
    for layer in range(LAYERS):
        for stage, name in enumerate(("prefill", "decode")):
            assert logged[f"{name}_importance/{layer}"] == pytest.approx(one["scores"][0][layer][stage], rel=1e-5)
    for depth in (1, 2):
        for metric in ("kl", "agreement", "nll_increase", "exact_match"):
            assert f"{metric}/{depth}" in logged
    assert logged["kl/1"] > 0


def test_a_model_that_requires_gradients_gets_none_and_still_requires_them(one):
    assert one["gradients"] == one["frozen"] == 0


def test_two_processes_find_the_same_figures(one, base, rows, tmp_path):
    script = Path(sys.modules[figures.__module__].__file__)
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.contract", str(base), str(rows), str(tmp_path), "2"],
        cwd=script.parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for process in range(2):
        two = json.loads((tmp_path / f"{process}.json").read_text())
        assert two.keys() == one.keys()
        for name in ("rows", "verified_rows", "gradients", "frozen"):
            assert two[name] == one[name], name
        for name in ("scores", "fitted", "trained"):
            torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(one[name]), rtol=1e-4, atol=1e-6)
        assert two["logged"] == pytest.approx(one["logged"], rel=1e-4, abs=1e-7)
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
        assert two["steps"] == one["steps"]


def test_a_module_accepts_a_name_a_model_or_a_decoder(base, data):
    model = build("llama")
    scores = []
    for given in (str(base), model, Decoder(model)):
        module = ImportanceScoring(given)
        trainer().validate(module, datamodule=data, verbose=False)
        scores.append(module.scores)
        assert Evaluation(given, {2: KVProjections(module.decoder, 2)}).decoder.num_layers == LAYERS
        assert KVProjectionTraining(given, 2).plan == PruningPlan(2)
    assert all(torch.equal(scores[0], each) for each in scores)
    with pytest.raises(InputError, match="a Transformers model or a Decoder, found Linear"):
        ImportanceScoring(torch.nn.Linear(2, 2))


def test_training_makes_its_projections_trainable_and_does_not_change_the_base(data):
    model = build("llama").requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    projections = KVProjections(Decoder(model), 1)
    start = projections.copy()
    trainer(max_steps=3, limit_val_batches=0).fit(KVProjectionTraining(projections, learning_rate=1e-2), data)
    assert projections.kind == "full"
    assert not torch.equal(projections.maps["3"].weight, start.maps["3"].weight)
    assert torch.equal(projections.maps["1"].weight, start.maps["1"].weight)  # it sees its true input
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(each.requires_grad and each.grad is None for each in model.parameters())


def test_projections_of_another_depth_than_the_plan_are_refused():
    decoder = Decoder(build("llama"))
    with pytest.raises(InputError, match="made for depth 2, not for 1"):
        KVProjectionTraining(KVProjections(decoder, 2), 1)
    with pytest.raises(InputError, match="plan prunes at depth 1, but its projections were made for depth 2"):
        Variant(PruningPlan(1), KVProjections(decoder, 2))
    with pytest.raises(InputError, match="plan prunes at depth 1"):
        Evaluation(decoder, {1: KVProjections(decoder, 2)})
    Variant(PruningPlan(LAYERS), KVProjections(decoder, 2))  # nothing is pruned


def test_training_where_there_is_nothing_to_train_is_refused():
    model = build("llama")
    with pytest.raises(InputError, match=f"nothing can be trained at depth {LAYERS - 1}"):
        KVProjectionTraining(model, LAYERS - 1)
    with pytest.raises(InputError, match="needs the depth"):
        KVProjectionTraining(model)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"temperature": 0}, "temperature must be above 0, found 0"),
        ({"learning_rate": -1e-3}, "learning_rate must be above 0, found -0.001"),
        ({"decay": "cosin"}, "decay must be one of cosine, linear, found 'cosin'"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(setting, expected):
    with pytest.raises(InputError, match=expected):
        KVProjectionTraining(build("llama"), 1, **setting)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_training_is_loaded_from_its_checkpoint(base, data, tmp_path, kind):
    training = KVProjectionTraining(base, 1, kind=kind, learning_rate=1e-2, temperature=3.0)
    fit = trainer(max_steps=3, limit_val_batches=0)
    fit.fit(training, datamodule=data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(name.startswith("projections.") for name in state["state_dict"])
    by_name = KVProjectionTraining.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    given = KVProjectionTraining.load_from_checkpoint(tmp_path / "last.ckpt", start=build("llama"), weights_only=True)
    expected = training.trained().fitted_state()
    for again in (by_name, given):
        assert again.plan == PruningPlan(1)
        assert again.temperature == 3.0
        torch.testing.assert_close(again.trained().fitted_state(), expected)


def test_adapters_are_not_loaded_onto_another_start(data, tmp_path):
    decoder = Decoder(build("llama"))
    fit = trainer(max_steps=1, limit_val_batches=0)
    fit.fit(KVProjectionTraining(decoder, 1, kind="lora"), datamodule=data)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    other = KVProjections(decoder, 1)
    with torch.no_grad():
        other.maps["3"].weight.mul_(1.1)
    with pytest.raises(InputError, match="adapters of this checkpoint were trained on different projections"):
        KVProjectionTraining.load_from_checkpoint(tmp_path / "last.ckpt", start=other, weights_only=True)


def test_scores_are_loaded_from_a_checkpoint(base, data, tmp_path):
    scoring, run = ImportanceScoring(base, seed=3), trainer()
    run.validate(scoring, datamodule=data, verbose=False)
    run.save_checkpoint(tmp_path / "scores.ckpt")
    again = ImportanceScoring.load_from_checkpoint(tmp_path / "scores.ckpt", weights_only=True)
    assert again.seed == 3
    assert torch.equal(again.scores, scoring.scores)


def test_an_evaluation_keeps_what_it_measured_in_its_hyperparameters(base, data, tmp_path):
    reuse = KVProjections(Decoder(build("llama")), 2)
    evaluation, run = Evaluation(base, {2: reuse}, boundary=4), trainer()
    run.validate(evaluation, datamodule=data, verbose=False)
    run.save_checkpoint(tmp_path / "evaluation.ckpt")
    again = Evaluation.load_from_checkpoint(tmp_path / "evaluation.ckpt", variants={2: reuse}, weights_only=True)
    assert again.hparams["measured"] == {
        "2": {"depth": 2, "boundary": 4, "salient": 0, "selector": "attention", "kind": "reuse"}
    }
    assert again.variants["2"].plan == PruningPlan(2, 4)
    run.validate(again, datamodule=data, verbose=False)
    torch.testing.assert_close(again.rows("2"), evaluation.rows("2"))


def test_a_training_that_was_stopped_within_an_epoch_continues_with_the_batches_it_would_have_read(data, tmp_path):
    def seen(callbacks=(), **arguments):
        class Watch(lightning.Callback):
            def on_train_batch_start(self, trainer, module, batch, index):
                read.append(batch["row_seed"].tolist())

        read = []
        fit = trainer(limit_val_batches=0, callbacks=[Watch(), *callbacks], **arguments)
        return fit, read

    whole, expected = seen(max_epochs=2)
    whole.fit(KVProjectionTraining(build("llama"), 1), datamodule=data)
    assert len(expected) == 10
    assert sorted(sum(expected[:5], [])) == sorted(sum(expected[5:], []))  # noqa: RUF017
    assert expected[:5] != expected[5:]
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=1)
    first, read = seen(max_steps=3, callbacks=[kept], enable_checkpointing=True)
    first.fit(KVProjectionTraining(build("llama"), 1), datamodule=data)
    second, rest = seen(max_epochs=2)
    second.fit(KVProjectionTraining(build("llama"), 1), datamodule=data, ckpt_path=kept.best_model_path,
               weights_only=True)  # fmt: skip
    assert read + rest == expected


def test_limited_epochs_have_all_their_steps_and_read_every_row(data):
    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            read.extend(batch["row_seed"].tolist())

    read = []
    fit = trainer(max_epochs=3, limit_train_batches=2, limit_val_batches=0, callbacks=[Watch()])
    fit.fit(KVProjectionTraining(build("llama"), 1), datamodule=data)
    assert fit.global_step == 6
    assert set(read[:25]) == {row.seed for row in data.rows_of("fit")}


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_figures_do_not_depend_on_the_precision_that_a_trainer_casts_modules_to(data, precision):
    model, found = build("llama"), []
    for each in ("32-true", precision):
        run, scoring = trainer(precision=each), ImportanceScoring(model)
        evaluation = Evaluation(model, {1: KVProjections(Decoder(model), 1)})
        run.validate(scoring, datamodule=data, verbose=False)
        run.validate(evaluation, datamodule=data, verbose=False)
        assert scoring.scores.dtype == torch.float64
        found.append((scoring.scores, evaluation.rows("1")["kl"]))
    torch.testing.assert_close(found[1], found[0])


def test_a_loader_of_ones_own_is_refused_where_its_sampler_repeats_rows(data):
    def loader(rows):
        # As Lightning puts into a loader on the first of two processes.
        sampler = DistributedSampler(rows, num_replicas=2, rank=0)
        return DataLoader(rows, batch_size=6, sampler=sampler, collate_fn=data.batch)

    model, rows = build("llama"), data.rows_of("fit")
    evaluation = Evaluation(model, {1: KVProjections(Decoder(model), 1)})
    with pytest.raises(InputError, match="divides 25 rows among 2 processes by repeating some"):
        trainer().validate(ImportanceScoring(model), loader(rows), verbose=False)
    for run in (trainer().validate, trainer().test):
        with pytest.raises(InputError, match="repeating some"):
            run(evaluation, loader(rows), verbose=False)
    scoring = ImportanceScoring(model)
    trainer().validate(scoring, loader(rows[:24]), verbose=False)
    assert scoring.rows == 12


def test_what_was_not_measured_or_cannot_be_pruned_is_a_sentence(data):
    model = build("llama")
    for ask in (lambda scoring: scoring.scores, lambda scoring: scoring.candidates(2)):
        with pytest.raises(InputError, match="nothing was scored yet"):
            ask(ImportanceScoring(model))
    with pytest.raises(InputError, match=f"depth must lie in 1..{LAYERS}"):
        closed_form(model, [2, LAYERS + 1], data)
    with pytest.raises(InputError, match="needs at least one depth"):
        closed_form(model, [], data)


def test_a_trainer_that_is_used_again_does_not_warn_about_its_callbacks(data, caplog):
    run, model = trainer(limit_val_batches=1), build("llama")
    with caplog.at_level("INFO"):
        for _ in range(2):
            run.validate(ImportanceScoring(model), datamodule=data, verbose=False)
    assert "will override existing callbacks" not in caplog.text


def test_losses_are_logged_with_their_terms(data):
    fit = trainer(max_epochs=1)
    fit.fit(KVProjectionTraining(build("llama"), 1, kv_match=0.1, hidden_match=0.1), datamodule=data)
    logged = fit.logged_metrics
    assert {"loss", "loss/kl", "loss/kv", "loss/hidden", "validation_loss"} <= logged.keys()
    assert logged["loss"] == pytest.approx(float(sum(logged[f"loss/{term}"] for term in ("kl", "kv", "hidden"))))


def test_validating_reads_the_split_that_the_module_names(data):
    decoder, read = Decoder(build("llama")), {}
    for module in (ImportanceScoring(decoder), Evaluation(decoder, {1: KVProjections(decoder, 1)}),
                   KVProjectionTraining(decoder, 1)):  # fmt: skip
        run = trainer(limit_val_batches=1)
        run.validate(module, datamodule=data, verbose=False)
        read[type(module).__name__] = run.val_dataloaders.dataset.rows
    expected = {"ImportanceScoring": "fit", "Evaluation": "search", "KVProjectionTraining": "tune"}
    for name, split in expected.items():
        assert {row.seed for row in read[name]} == {row.seed for row in data.rows_of(split)}
