"""AccuracyBudget and ExportArtifact in an ordinary Trainer: measuring, deciding, verifying once, exporting."""

import json

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from pop_lightning import StageAwareGenerator
from pop_lightning.callbacks import AccuracyBudget, ExportArtifact
from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.data.module import CalibrationData
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.evaluation.verdicts import Verdict
from pop_lightning.generation.artifact import read_artifact
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import load_model, load_tokenizer
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import COMMON
from tests.helpers.workbench import save_rows

LAYERS = COMMON["num_hidden_layers"]


@pytest.fixture(scope="module")
def data(base, tmp_path_factory):
    rows = save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")
    return CalibrationData(str(rows), load_tokenizer(str(base), required=True))


@pytest.fixture(scope="module")
def model(base):
    return load_model(str(base))


@pytest.fixture
def evaluation(model):
    decoder = Decoder(model)
    depths = range(LAYERS - 1, 0, -1)
    return Evaluation(decoder, {str(d): Variant(PruningPlan(d), KVProjections(decoder, d)) for d in depths})


def trainer(*callbacks, **arguments):
    arguments = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False} | arguments
    return lightning.Trainer(accelerator="cpu", callbacks=[*callbacks], **arguments)


def search_and_verify(trainer, evaluation, data):
    trainer.validate(evaluation, dataloaders=data.loader("search"), verbose=False)
    trainer.test(evaluation, dataloaders=data.loader("verify"), verbose=False)


def test_an_ordinary_trainer_decides_and_writes_the_artifact(evaluation, data, base, tmp_path, capsys):
    budget = AccuracyBudget("nll_increase", max_drop=100.0)
    search_and_verify(trainer(budget, ExportArtifact(tmp_path / "artifact")), evaluation, data)
    assert budget.sequence == ["2", "1"]  # depth 3 prunes too few layers to be exported
    assert budget.depth == 1
    assert capsys.readouterr().out.splitlines() == budget.decisions
    generator = StageAwareGenerator.from_artifact(tmp_path / "artifact")
    assert generator.plan == PruningPlan(1)
    config = json.loads((tmp_path / "artifact/pop_config.json").read_text())
    assert config["base"]["id"] == str(base)
    assert config["measured"]["verified"] == budget.promise()
    assert [entry["depth"] for entry in config["measured"]["curve"]] == [3, 2, 1]


def test_the_artifact_says_the_median_prompt_of_a_data_module(evaluation, data, tmp_path):
    budget = AccuracyBudget("nll_increase", max_drop=100.0)
    runs = trainer(budget, ExportArtifact(tmp_path / "artifact"))
    runs.validate(evaluation, datamodule=data, verbose=False)
    runs.test(evaluation, datamodule=data, verbose=False)
    found = read_artifact(tmp_path / "artifact").prompt_tokens
    assert found == int(data.report.prompt_tokens["median"]) > 1


def test_what_it_measured_and_verified_is_what_the_rows_lost(evaluation, data):
    budget = AccuracyBudget("nll_increase", max_drop=100.0)
    runs = trainer(budget)
    runs.validate(evaluation, dataloaders=data.loader("search"), verbose=False)
    lost = {name: evaluation.rows(name)["nll_increase"].double().mean().item() for name in evaluation.variants}
    assert {name: entry["loss"] for name, entry in budget.measured.items()} == pytest.approx(lost)
    runs.test(evaluation, dataloaders=data.loader("verify"), verbose=False)
    lost = evaluation.rows("1")["nll_increase"].double().mean().item()
    assert budget.verdict.value == pytest.approx(lost)
    assert budget.verdict.prompts == data.prompts_of("verify")


def test_a_depth_above_the_budget_is_not_exported(evaluation, data, tmp_path):
    measured = AccuracyBudget("nll_increase", max_drop=100.0)
    search_and_verify(trainer(measured), evaluation, data)
    strict = AccuracyBudget("nll_increase", max_drop=measured.measured["2"]["loss"] + 1e-6)
    search_and_verify(trainer(strict, ExportArtifact(tmp_path / "artifact")), evaluation, data)
    assert strict.sequence[0] == "2"
    assert strict.depth is None
    assert not (tmp_path / "artifact").exists()
    assert strict.decisions[-1].endswith("nothing is exported")


def test_a_second_look_at_the_verify_split_is_refused(evaluation, data):
    budget = AccuracyBudget("nll_increase", max_drop=100.0)
    runs = trainer(budget)
    search_and_verify(runs, evaluation, data)
    decided = list(budget.decisions)
    with pytest.raises(InputError, match="already used"):
        runs.test(evaluation, dataloaders=data.loader("verify"), verbose=False)
    runs.validate(evaluation, dataloaders=data.loader("search"), verbose=False)
    assert budget.decisions == decided


def test_verifying_without_a_search_or_without_a_candidate_is_refused(evaluation, data):
    with pytest.raises(InputError, match="nothing to verify"):
        trainer(AccuracyBudget()).test(evaluation, dataloaders=data.loader("verify"), verbose=False)
    budget = AccuracyBudget("nll_increase", max_drop=-100.0)
    with pytest.raises(InputError, match="keeps the budget of -100 on the search split"):
        search_and_verify(trainer(budget), evaluation, data)
    assert budget.verdicts == []


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_that_is_not_a_share_is_refused(confidence):
    with pytest.raises(InputError, match=f"confidence must be between 0 and 1, such as 0.95; found {confidence}"):
        AccuracyBudget(confidence=confidence)


def test_an_export_without_a_budget_is_refused(evaluation, data, tmp_path):
    with pytest.raises(InputError, match="has no AccuracyBudget"):
        trainer(ExportArtifact(tmp_path / "artifact")).test(
            evaluation, dataloaders=data.loader("verify"), verbose=False
        )


def test_without_a_condition_the_least_loss_is_exported(evaluation, data, tmp_path):
    budget = AccuracyBudget("nll_increase", max_drop=None)
    search_and_verify(trainer(budget, ExportArtifact(tmp_path / "artifact")), evaluation, data)
    least = min(budget.measured.values(), key=lambda entry: (entry["loss"], entry["kl"]))
    assert StageAwareGenerator.from_artifact(tmp_path / "artifact").plan.depth == least["depth"]
    assert budget.promise()["max_drop"] is None


def test_several_validations_add_up_and_ablations_are_ignored(evaluation, data):
    variants = dict(evaluation.variants)
    blind = {"no KV projection": Variant(PruningPlan(2), variants["2"].projections, context_visible=False)}
    budget = AccuracyBudget("nll_increase", max_drop=100.0)
    runs = trainer(budget)
    for part in ({"2": variants["2"]} | blind, {"1": variants["1"]}):
        runs.validate(Evaluation(evaluation.decoder, part), dataloaders=data.loader("search"), verbose=False)
    assert budget.sequence == ["2", "1"]
    for name in budget.sequence:  # each depth in one run, in order
        runs.test(
            Evaluation(evaluation.decoder, {name: variants[name]}), dataloaders=data.loader("verify"), verbose=False
        )
    assert budget.depth == 1


def test_the_verify_split_is_opened_in_the_order_of_the_sequence(evaluation):
    variants = dict(evaluation.variants)
    budget = AccuracyBudget(sequence=["3", "2", "1"])

    def open_with(*names):
        budget.on_test_start(None, Evaluation(evaluation.decoder, {name: variants[name] for name in names}))

    for names in (["2"], ["3", "1"]):
        with pytest.raises(InputError, match="already used"):
            open_with(*names)
    open_with("3", "2")
    budget.verdicts = [Verdict(3, 0.0, 0.005, 600, 600, True)]
    with pytest.raises(InputError, match="already used"):
        open_with("3")
    open_with("2")
    budget.verdicts.append(Verdict(2, 0.02, 0.03, 600, 600, False))
    assert budget.verified
    assert (budget.depth, budget.chosen) == (3, "3")
    with pytest.raises(InputError, match="already used"):
        open_with("1")


def test_what_was_decided_is_logged(evaluation, data, tmp_path):
    logger = CSVLogger(tmp_path)
    budget = AccuracyBudget("nll_increase", max_drop=100.0)
    search_and_verify(trainer(budget, logger=logger), evaluation, data)
    logger.save()
    written = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert "budget/depth" in written
    assert torch.isfinite(torch.tensor(budget.verdict.value))


class Telling(AccuracyBudget):
    """Writes what each process decided."""

    folder = None

    def on_test_end(self, trainer, module):
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps([self.decisions, self.promise()]))


def test_two_processes_decide_the_same_as_one(evaluation, data, tmp_path):
    one = AccuracyBudget("nll_increase", max_drop=100.0)
    search_and_verify(trainer(one), evaluation, data)
    budget = Telling("nll_increase", max_drop=100.0)
    budget.folder = tmp_path
    two = trainer(budget, ExportArtifact(tmp_path / "artifact"), devices=2, strategy="ddp_fork")
    two.validate(evaluation, datamodule=data, verbose=False)
    # A forked process takes what it found with it, so the sequence comes from the run of one process.
    budget.sequence = one.sequence
    two.test(evaluation, datamodule=data, verbose=False)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[1]["value"] == pytest.approx(one.promise()["value"], abs=1e-6)
    assert first[1]["prompts"] == data.prompts_of("verify")
    assert StageAwareGenerator.from_artifact(tmp_path / "artifact").plan.depth == one.depth


def test_modules_of_another_kind_pass_by(data, model):
    class Other(lightning.LightningModule):
        def validation_step(self, batch, index):
            pass

    budget = AccuracyBudget()
    trainer(budget).validate(Other(), dataloaders=data.loader("search"), verbose=False)
    assert budget.sequence is None
