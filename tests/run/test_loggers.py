"""A user's own loggers and callbacks in a run, named by class in the recipe."""

import csv
import json

import lightning
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pop_lightning.cli import fit

from tests.helpers.workbench import arguments

TRAINED = {"projection__kind": "lora", "projection__steps": 3, "budget__candidates": [2, 1], "budget__speedup": 1.4}


def trained(base, data, tmp_path, **changes):
    assert fit.main(arguments(base, data, tmp_path / "run", **TRAINED, trainer__log_every_n_steps=1, **changes)) == 0
    return json.loads((tmp_path / "run/metrics.json").read_text())


def test_tensorboard_has_one_folder_with_every_figure_and_the_recipe(base, data, tmp_path):
    metrics = trained(base, data, tmp_path, trainer__logger="true")
    (event, *more) = (tmp_path / "run").rglob("events.out*")
    assert {each.parent for each in more} <= {event.parent}
    assert event.parent == tmp_path / "run/tensorboard"
    accumulator = EventAccumulator(str(event.parent)).Reload()
    tags = accumulator.Tags()["scalars"]

    def points(tag):
        return {each.step: each.value for each in accumulator.Scalars(tag)}

    depth = metrics["depth"]
    steps = points(f"training/lora-depth{depth}/loss")
    assert len(steps) == 3
    curve = {each["projection"]: each for each in metrics["curve"] if each["depth"] == depth}
    for kind in ("reuse", "closed_form", "lora"):
        assert points(f"curve/{kind}/kl")[depth] == pytest.approx(curve[kind]["kl"], rel=1e-5)
    assert set(points("layers/prefill_importance")) == {0, 1, 2, 3}
    assert points("verified/loss") == {depth: pytest.approx(metrics["verified"]["value"], rel=1e-5)}
    assert points("speedup/counted") == {depth: pytest.approx(metrics["arithmetic"]["ratio"], rel=1e-5)}
    assert {tag.partition("/")[0] for tag in tags} >= {"importance", "fitting", "search", "training", "verification"}
    saved = yaml.safe_load((event.parent / "hparams.yaml").read_text())
    assert saved["projection"]["kind"] == "lora"
    assert saved["budget"]["speedup"] == 1.4


@pytest.mark.full
def test_a_csv_logger_by_class_keeps_one_version(base, data, tmp_path):
    metrics = trained(base, data, tmp_path, trainer__logger="lightning.pytorch.loggers.CSVLogger")
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    name = f"training/lora-depth{metrics['depth']}/loss"
    assert [row["step"] for row in rows if row.get(name)] == ["0", "1", "2"]
    assert (file.parent / "hparams.yaml").is_file()


class Notes(lightning.Callback):
    """A callback as a user writes one: it logs, and keeps what it saw."""

    seen: list = []  # noqa: RUF012

    def __init__(self, word: str):
        self.word = word

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        module.log("rows", float(len(batch["input_ids"])))
        trainer.logger.log_metrics({"of_the_callback": 1.0}, trainer.global_step)
        self.seen.append((self.word, trainer.global_step, trainer.logger.experiment is not None))

    def on_test_end(self, trainer, module):
        self.seen.append((self.word, "tested", type(module).__name__))


def test_a_callback_and_two_loggers_by_class_see_every_stage(base, data, tmp_path):
    Notes.seen.clear()
    notes = {"class_path": f"{__name__}.Notes", "init_args": {"word": "mine"}}
    loggers = ["lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"]
    changes = {"trainer__callbacks": json.dumps([notes]), "trainer__logger": json.dumps(loggers)}
    depth = trained(base, data, tmp_path, **changes)["depth"]
    steps = [("mine", number, True) for number in (1, 2, 3)]
    assert Notes.seen == [*steps, ("mine", "tested", "Evaluation")]
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    header = file.read_text().partition("\n")[0]
    for name in ("rows", "of_the_callback"):
        assert f"training/lora-depth{depth}/{name}" in header
    assert len({each.parent for each in (tmp_path / "run").rglob("events.out*")}) == 1
