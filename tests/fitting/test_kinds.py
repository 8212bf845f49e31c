"""The registry of kinds: what the pipeline asks of each, and that a new one is one file and one line."""

import sys

import pytest
import torch

import pop_lightning.fitting
from pop_lightning import InputError, KVProjections, KVProjectionTraining
from pop_lightning.core import kinds as names
from pop_lightning.fitting import kinds
from pop_lightning.fitting.kinds import kind, trained_kind

from tests.helpers.families import build

BIAS = """
from pop_lightning.fitting.full import masters
from pop_lightning.fitting.kinds import TrainedKind

class Bias(TrainedKind):
    def prepare(self, projections, scale):
        masters(projections, self.name)
        for layer in projections.fitted_layers:
            projections.maps[str(layer)].bias.mul_(scale).requires_grad_(True)

    def finish(self, projections, prepared, folder):
        return projections

KIND = Bias("bias")
"""


def test_every_registered_name_is_the_name_of_its_kind():
    assert [kind(name).name for name in names.KINDS] == ["reuse", "closed_form", "lora", "full"]
    assert [kind(name).trains for name in names.KINDS] == [False, False, True, True]


def test_an_unknown_kind_and_one_that_does_not_train_are_refused():
    with pytest.raises(InputError, match=r"projection\.kind must be one of reuse, .*, found loar"):
        kind("loar")
    with pytest.raises(InputError, match="kind closed_form are not trained: expected one of lora, full"):
        trained_kind("closed_form")


def test_a_kind_is_added_by_one_file_and_its_name(tmp_path, monkeypatch):
    (tmp_path / "bias.py").write_text(BIAS)
    monkeypatch.setattr(pop_lightning.fitting, "__path__", [*pop_lightning.fitting.__path__, str(tmp_path)])
    for module in (kinds, sys.modules[KVProjections.__module__]):  # as one line in core/kinds.py would
        monkeypatch.setattr(module, "KINDS", (*names.KINDS, "bias"))
    training = KVProjectionTraining(build("qwen2"), 1, kind="bias", kind_arguments={"scale": 2.0})
    trained = [name for name, each in training.named_parameters() if each.requires_grad]
    assert trained == ["projections.maps.2.bias", "projections.maps.3.bias"]
    with torch.no_grad():
        training.projections.maps["2"].bias.add_(1.0)
    finished = training.trained()
    assert finished.kind == "bias"
    again = KVProjections.from_state(finished.decoder, 1, "bias", finished.fitted_state())
    assert torch.equal(again.maps["2"].bias, finished.maps["2"].bias)
    del sys.modules["pop_lightning.fitting.bias"]
