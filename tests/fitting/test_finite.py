"""Sums, solutions and trained projections that are not finite are refused with a sentence, and never exported."""

import re

import pytest
import torch

from pop_lightning import InputError
from pop_lightning.cli import fit
from pop_lightning.data.batches import collate
from pop_lightning.fitting.regressions import ClosedFormFit
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.attach_check import check_decoder
from pop_lightning.pruning.projections import KVProjections

from tests.fitting.test_importance import rows
from tests.fitting.test_projections import fitted, loader, trainer
from tests.helpers.families import build
from tests.helpers.workbench import arguments


def batches(number=2):
    return [collate(rows(8, seed), 0) for seed in range(number)]


@torch.no_grad()
def with_huge_values(layer, factor):
    """A model with values of that size in ``layer``, whose output projection undoes it: the same function."""
    model = build("llama")
    attention = model.model.layers[layer].self_attn
    attention.v_proj.weight.mul_(factor)
    attention.o_proj.weight.div_(factor)
    return model


def test_running_sums_that_overflow_name_objective_layer_and_depth():
    model = with_huge_values(3, 1e20)  # squares of values overflow float32 in the weights of the keys' regression
    assert model(input_ids=torch.arange(5, 20)[None]).logits.isfinite().all()
    fit_all = ClosedFormFit(Decoder(model), [1])
    with pytest.raises(InputError, match=r"sums of keys for layer 3 at depth 1 .* set projection\.grouping to none"):
        trainer().validate(fit_all, loader(batches()), verbose=False)
    plain = ClosedFormFit(Decoder(model), [1], grouping="none")
    trainer().validate(plain, loader(batches()), verbose=False)
    assert plain.solve(1, 0.1).affine(3)[0].isfinite().all()  # the advice works


def test_a_solution_that_the_bases_dtype_cannot_hold_is_refused():
    fit_all = fitted(build("llama"), 1, batches())
    # As of targets that float16 holds and the regression's weights exceed.
    fit_all.sums.cross = {name: matrix * 1e9 for name, matrix in fit_all.sums.cross.items()}
    assert fit_all.solve(1, 1e-6).affine(3)[0].isfinite().all()
    fit_all.decoder.model.half()
    with pytest.raises(InputError, match=r"closed form: the projection of layer 2 at depth 1 .* float16; raise proj"):
        fit_all.solve(1, 1e-6)


def test_a_ridge_that_leaves_a_singular_regression_is_refused():
    model = build("llama")
    few = [collate(rows(1), 0)]  # fewer context tokens than inputs
    with pytest.raises(InputError, match=r"layer 2 at depth 1 has no unique .* ridge of 1e-30; raise projection"):
        fitted(model, 1, few).solve(1, 1e-30)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_training_that_diverges_ends_with_a_sentence(kind):
    projections = KVProjections(Decoder(build("llama")), 1)
    training = KVProjectionTraining(projections, kind=kind, learning_rate=1e30, warmup=0.0)
    sentence = rf"training of kind {kind}: the loss at depth 1 is (nan|inf) at step [12]; .* lower projection\.learning"
    with pytest.raises(InputError, match=sentence):
        trainer(max_steps=6, max_epochs=-1).fit(training, loader(batches(6)))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_values_broken_by_the_last_step_are_refused_although_the_loss_does_not_show_them(kind, tmp_path):
    projections = KVProjections(Decoder(build("llama")), 1)
    training = KVProjectionTraining(projections, kind=kind)
    trainer(max_steps=1, max_epochs=-1).fit(training, loader(batches()))
    with torch.no_grad():
        next(p for p in projections.maps["3"].parameters() if p.requires_grad).flatten()[0] = float("nan")
    with pytest.raises(InputError, match=rf"kind {kind}: the projection of layer 3 at depth 1 .* in float32; start"):
        training.trained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_trained_values_that_float16_cannot_hold_are_refused(kind):
    projections = KVProjections(Decoder(build("llama", dtype=torch.float16)), 1)
    training = KVProjectionTraining(projections, kind=kind, learning_rate=1e7, warmup=0.0)
    trainer(max_steps=1, max_epochs=-1).fit(training, loader(batches()))
    with pytest.raises(InputError, match=rf"kind {kind}: the projection of layer 2 at depth 1 .* in float16; choose"):
        training.trained()


def test_reused_weights_that_float16_cannot_hold_name_the_dtype():
    model = build("llama").half()
    layer = model.model.layers[3]
    with torch.no_grad():
        layer.input_layernorm.weight[0] = 6e4
        layer.self_attn.v_proj.weight[0, 0] = 5.0
    with pytest.raises(InputError, match=r"value weights of layer 3, .* not finite in float16; choose another"):
        check_decoder(Decoder(model))


def test_a_run_that_diverges_exports_nothing_and_exits_with_2(base, data, tmp_path, capsys):
    output = tmp_path / "run"
    changes = {"projection__kind": "full", "projection__start": "reuse", "projection__steps": 4}
    changes |= {"projection__learning_rate": 1e30, "projection__warmup": 0.0, "budget__candidates": [1]}
    command = arguments(base, data, output, **changes)
    for flags in ([], ["--resume"]):
        assert fit.main([*command, *flags]) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.match(r"pop-fit: error: training of kind full: the loss at depth 1 is", last), last
        assert "--projection.learning_rate" in last
        assert not (output / "artifact").exists()
