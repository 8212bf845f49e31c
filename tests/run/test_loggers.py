"""A user's own loggers and callbacks in a run, named by class in the recipe."""

import csv
import json

import lightning
import pytest
import yaml
from lightning.pytorch.loggers import Logger
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


class Service(Logger):
    """A logger as that of a service: it begins a run when its experiment is first asked for, and has no files."""

    begun: list = []  # noqa: RUF012

    def __init__(self, project: str, offline: bool = False):
        super().__init__()
        self.project, self.offline, self._run = project, offline, None

    @property
    def experiment(self) -> dict:
        if self._run is None:
            if not self.offline:
                raise RuntimeError("No API key configured. Log in.\nand more lines")
            self._run = {"project": self.project, "logged": [], "config": [], "ended": []}
            self.begun.append(self._run)
        return self._run

    @property
    def name(self):
        return self.project

    @property
    def version(self):
        return None

    def log_metrics(self, metrics, step=None):
        self.experiment["logged"].append({**metrics, "step": step})

    def log_hyperparams(self, params, *_, **__):
        self.experiment["config"].append(params)

    def finalize(self, status):
        self.experiment["ended"].append(status)


def test_a_callback_and_two_loggers_by_class_see_every_stage(base, data, tmp_path):
    Notes.seen.clear()
    Service.begun.clear()
    notes = {"class_path": f"{__name__}.Notes", "init_args": {"word": "mine"}}
    service = {"class_path": f"{__name__}.Service", "init_args": {"project": "mine", "offline": True}}
    loggers = ["lightning.pytorch.loggers.CSVLogger", service]
    changes = {"trainer__callbacks": json.dumps([notes]), "trainer__logger": json.dumps(loggers)}
    depth = trained(base, data, tmp_path, **changes)["depth"]
    steps = [("mine", number, True) for number in (1, 2, 3)]
    assert Notes.seen == [*steps, ("mine", "tested", "Evaluation")]
    (file,) = (tmp_path / "run").rglob("metrics.csv")
    header = file.read_text().partition("\n")[0]
    for name in ("rows", "of_the_callback"):
        assert f"training/lora-depth{depth}/{name}" in header
    (run,) = Service.begun
    assert (run["project"], run["ended"]) == ("mine", ["success"])
    (config,) = run["config"]
    assert config["projection"]["kind"] == "lora"
    assert [each["step"] for each in run["logged"] if f"training/lora-depth{depth}/loss" in each] == [0, 1, 2]
    names = {name for each in run["logged"] for name in each}
    assert {"layers/prefill_importance", "curve/lora/kl", "verified/loss", "speedup/counted"} <= names


def test_a_logger_that_cannot_begin_is_one_sentence(base, data, tmp_path, capsys):
    logger = {"class_path": f"{__name__}.Service", "init_args": {"project": "mine"}}
    assert fit.main(arguments(base, data, tmp_path / "run", trainer__logger=json.dumps(logger))) == 2
    assert capsys.readouterr().err == (
        "pop-fit: error: Service cannot begin a log: No API key configured. Log in; change trainer.logger, or leave it "
        "out.\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_weights_and_biases_offline(base, data, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    init = {"project": "mine", "offline": True, "save_dir": str(tmp_path)}
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": init}
    trained(base, data, tmp_path, trainer__logger=json.dumps(logger))
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = log.read_bytes()
    for name in ("layers/prefill_importance", "curve/lora/kl", "speedup/counted"):
        assert name.encode() in content
