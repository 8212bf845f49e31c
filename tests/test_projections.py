"""Projections of every kind: exactness where it is promised, least squares, and training that lowers its loss."""

import lightning
import pytest
import torch

from pop_lightning import InputError, PruningPlan
from pop_lightning.closed_form import ClosedFormFit
from pop_lightning.data import collate
from pop_lightning.decoder import Decoder
from pop_lightning.prefill import student_logits
from pop_lightning.projection_training import KVProjectionTraining, make_trainable, teacher_pass
from pop_lightning.projections import KVProjections

from families import COMMON, FAMILIES, build
from test_importance import rows

LAYERS = COMMON["num_hidden_layers"]


def trainer(**arguments):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip


def loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def fitted(model, depth, batches):
    fit = ClosedFormFit(Decoder(model), [depth])
    trainer().validate(fit, loader(batches), verbose=False)
    return fit


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_form_predicts_as_a_float64_least_squares_solution(family):
    model = build(family)
    batches = [collate(rows(12, seed), 0) for seed in range(4)]
    depth, ridge = 1, 1e-2
    fit = fitted(model, depth, batches)
    ours = fit.solve(depth, ridge)
    decoder = Decoder(model)
    inputs, targets = [], {layer: [] for layer in ours.fitted_layers}
    for batch in batches:
        trace, _ = teacher_pass(decoder, batch, 0)
        real = batch["attention_mask"][:, : batch["prompt_length"] - 1].bool()
        inputs.append(decoder.normalise(trace.hidden[depth][:, : real.shape[1]][real]).double())
        for layer in targets:
            targets[layer].append(decoder.own_kv(layer, trace.hidden[layer][:, : real.shape[1]][real]).double())
    n = torch.cat(inputs)
    n1 = torch.cat([n, torch.ones(len(n), 1, dtype=torch.float64)], 1)
    strength = ridge * (n1**2).sum(0).mean()
    for layer, parts in targets.items():
        own = decoder.reuse_map(layer)
        reuse = n @ own.weight.double().T + (0 if own.bias is None else own.bias.double())
        # ridge as plain least squares: one extra row per coefficient
        design = torch.cat([n1, strength.sqrt() * torch.eye(n1.shape[1], dtype=torch.float64)])
        wanted = torch.cat([torch.cat(parts) - reuse, torch.zeros(n1.shape[1], reuse.shape[1], dtype=torch.float64)])
        reference = reuse + n1 @ torch.linalg.lstsq(design, wanted).solution
        predicted = ours(layer, None, n.float()).double()
        assert ((predicted - reference).norm() / reference.norm()).item() < 1e-5


def test_a_huge_ridge_is_reuse_and_the_first_pruned_layer_is_never_replaced():
    model = build("qwen2")
    fit = fitted(model, 1, [collate(rows(), 0)])
    solved, reuse = fit.solve(1, 1e9), KVProjections(Decoder(model), 1)
    n = torch.randn(5, COMMON["hidden_size"])
    for layer in range(1, LAYERS):
        torch.testing.assert_close(solved(layer, None, n), reuse(layer, None, n), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="layer 1"):
        reuse.replace({1: reuse.affine(1)}, "full")


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_L_minus_1_is_lossless_for_every_kind(family):
    model = build(family)
    batch = collate(rows(4), 0)
    fit = fitted(model, LAYERS - 1, [batch])
    for projections in (KVProjections(Decoder(model), LAYERS - 1), fit.solve(LAYERS - 1, 0.1)):
        trace, teacher = teacher_pass(projections.decoder, batch, LAYERS - 1)
        student = student_logits(
            projections, PruningPlan(LAYERS - 1), trace, batch["attention_mask"], batch["prompt_length"]
        )
        real = batch["attention_mask"][:, batch["prompt_length"] :].bool()
        torch.testing.assert_close(student[real], teacher[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_its_loss_on_rows_it_has_not_seen_and_leaves_the_base_alone(dtype):
    model = build("gemma3", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train = [collate(rows(12, seed), 0) for seed in range(8)]
    unseen = collate(rows(24, seed=99), 0)
    projections = KVProjections(Decoder(model), 1)
    training = KVProjectionTraining(make_trainable(projections), PruningPlan(1), learning_rate=3e-3)
    with torch.no_grad():
        start = training.loss(unseen).item()
    trainer(max_steps=40, max_epochs=-1).fit(training, loader(train))
    with torch.no_grad():
        end = training.loss(unseen).item()
    assert end < 0.9 * start
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert projections.kind == "full"


@pytest.mark.parametrize("kind", ["closed_form", "full"])
def test_projections_survive_their_stored_state(kind):
    model = build("qwen2")
    projections = fitted(model, 1, [collate(rows(), 0)]).solve(1, 0.1)
    projections.kind = kind
    state = projections.fitted_state()
    again = KVProjections.from_state(Decoder(model), 1, kind, state)
    n = torch.randn(5, COMMON["hidden_size"])
    for layer in range(1, LAYERS):
        assert torch.equal(again(layer, None, n), projections(layer, None, n))
    state.pop(next(iter(state)))
    with pytest.raises(InputError, match="missing or left over"):
        KVProjections.from_state(Decoder(model), 1, kind, state)
    assert KVProjections(Decoder(model), 1).fitted_state() == {}
