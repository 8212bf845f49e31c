"""Virtual gates: their gradients, their identities, and scores that depend on content only."""

import lightning
import pytest
import torch

from pop_lightning import PruningPlan
from pop_lightning.data.batches import collate
from pop_lightning.data.rows import Row
from pop_lightning.fitting.importance import ImportanceScoring, candidates, draw_residuals
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.positions import position_ids
from pop_lightning.pruning.passes import student_logits, teacher_pass
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import COMMON, EVERY, build
from tests.helpers.gates import gated

LAYERS = COMMON["num_hidden_layers"]


def rows(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return tuple(torch.randint(3, COMMON["vocab_size"], (n,), generator=generator).tolist())

    return [Row(draw(7 + 2 * i), draw(2 + i % 3), f"row {i}") for i in range(count)]


def score(model, batches, seed=0):
    module = ImportanceScoring(Decoder(model), seed=seed)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    return module.scores


def loss_under_gates(module, batch, gates, targets):
    with gated(module.decoder, gates, batch["prompt_length"] - module.boundary):
        return module.loss(batch, targets)


@pytest.mark.parametrize("family", EVERY)
def test_gate_gradients_equal_finite_differences(family):
    # eager attention masks with float64's least number, which its own float32 softmax cannot hold
    model = build(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    module, batch = ImportanceScoring(Decoder(model)), collate(rows(2), 0)
    targets = batch["input_ids"][:, batch["prompt_length"] :]
    gates = torch.ones(2, LAYERS, 2, dtype=torch.float64, requires_grad=True)
    # the float32 statistics of norms and of the loss bound how close differences can come, so the step is not small
    loss_under_gates(module, batch, gates, targets).backward()
    step = 4e-3
    for row, layer, stage in [(0, 0, 0), (1, 1, 1), (0, 2, 0), (1, 3, 1)]:
        moved = []
        for sign in (1, -1):
            shifted = gates.detach().clone()
            shifted[row, layer, stage] += sign * step
            moved.append(loss_under_gates(module, batch, shifted, targets).item())
        difference = (moved[0] - moved[1]) / (2 * step)
        assert gates.grad[row, layer, stage].item() == pytest.approx(difference, rel=2e-3, abs=2e-3)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EVERY)
def test_scoring_reads_the_gradients_of_gates_at_one(family, dtype, gradient_checkpointing):
    decoder, batch = Decoder(build(family, dtype=dtype)), collate(rows(3), 0)
    module = ImportanceScoring(decoder, gradient_checkpointing=gradient_checkpointing)
    targets = batch["input_ids"][:, batch["prompt_length"] :]
    gates = torch.ones(3, LAYERS, 2, requires_grad=True)
    loss_under_gates(module, batch, gates, targets).backward()
    found = module.gradients(batch, targets)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    scale = gates.grad.abs().max()
    torch.testing.assert_close(found / scale, gates.grad / scale, rtol=tolerance, atol=tolerance)
    hooks = [hook for each in module.decoder.model.modules() for hook in (each._forward_hooks, each._forward_pre_hooks)]
    assert not any(hooks)


@pytest.mark.parametrize("family", EVERY)
def test_prefill_gates_at_zero_above_depth_are_the_pruned_model_with_reuse(family):
    model = build(family)
    decoder, plan, batch = Decoder(model), PruningPlan(2), collate(rows(3), 0)
    gates = torch.ones(3, LAYERS, 2)
    gates[:, plan.depth :, 0] = 0
    mask, prompt = batch["attention_mask"], batch["prompt_length"]
    with gated(decoder, gates, prompt - 1):
        gated_logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids(mask)).logits
    trace, _ = teacher_pass(decoder, batch, plan.depth)
    pruned = student_logits(KVProjections(decoder, plan.depth), plan, trace, mask, prompt)
    real = mask[:, prompt:].bool()
    torch.testing.assert_close(gated_logits[:, prompt - 1 : -1][real], pruned[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_last_layers_prefill_importance_is_exactly_zero(family):
    scores = score(build(family), [collate(rows(), 0)])
    assert scores[-1, 0] == 0
    assert (scores[:-1] > 0).all()
    assert scores[-1, 1] > 0


def test_scores_do_not_depend_on_batch_size_padding_or_order():
    model, data = build("gemma3"), rows()
    together = score(model, [collate(data, 0)])
    apart = score(model, [collate([row], 0) for row in reversed(data)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=0)
    assert not torch.allclose(together, score(model, [collate(data, 0)], seed=1), rtol=1e-2)


def test_scores_are_the_mean_over_rows_of_each_rows_squares():
    model, data = build("llama"), rows(3)
    module = ImportanceScoring(model)
    squares = sum(module.gradients(collate([row], 0))[0].double() ** 2 for row in data)
    torch.testing.assert_close(score(model, [collate(data, 0)]), squares / 3, rtol=1e-4, atol=0)


def test_residuals_have_the_mean_and_covariance_of_drawn_targets():
    logits = torch.tensor([[4.0, 1.0, 0.0, -1.0, -1.0]]).expand(40_000, -1)
    p = logits[0].double().softmax(-1)
    drawn = draw_residuals(logits, torch.tensor([30_000, 10_000]), torch.tensor([3, 4]), seed=0).double()
    torch.testing.assert_close(drawn.mean(0), torch.zeros(5).double(), rtol=0, atol=5e-3)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), p.diag() - p.outer(p), rtol=0, atol=2e-3)


@pytest.mark.parametrize("sharpness", [1, 20])
def test_scores_estimate_the_expectation_over_targets_drawn_from_the_model(sharpness):
    """Against the sum over every target of one response token, weighted with its probability.

    Where the model is sure, targets that were drawn would all be the likeliest, which adds next to nothing to the sum.
    """
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight *= sharpness
    module, batch = ImportanceScoring(model), collate([Row(tuple(range(8, 24)), (7,), "row")], 0)
    p = module.decoder.response_logits(batch)[0, 0].detach().softmax(-1).double()
    assert (p.max() > 0.99) == (sharpness > 1)
    exact = sum(q * module.gradients(batch, torch.tensor([[y]]))[0].double() ** 2 for y, q in enumerate(p))
    found = torch.zeros_like(exact)
    for seed in range(60):
        module.seed = seed
        found += module.gradients(batch)[0].double() ** 2 / 60
    torch.testing.assert_close(found, exact, rtol=0.4, atol=0)


def test_candidates_lie_densely_where_importance_rises_fast():
    flat, drops_at_3, drops_at_9 = [1.0] * 12, [1.0] * 3 + [1e-6] * 9, [1.0] * 9 + [1e-6] * 3
    assert candidates(flat, 12) == list(range(10, 0, -1))
    assert candidates(flat, 5) == [10, 8, 6, 4, 1]
    assert candidates(drops_at_3, 5) == [10, 6, 3, 2, 1]
    assert candidates(drops_at_9, 5) == [10, 9, 8, 5, 1]
    assert candidates(flat, 3, smallest=4, min_pruned=4) == [8, 6, 4]


def test_scoring_leaves_the_users_model_as_it_was():
    model = build("llama").train().requires_grad_(True)
    model.model.layers[0].eval()
    model.lm_head.requires_grad_(False)
    before = [module.training for module in model.modules()], [each.requires_grad for each in model.parameters()]
    expected = score(build("llama"), [collate(rows(), 0)])
    assert score(model, [collate(rows(), 0)]).equal(expected)
    assert before == ([module.training for module in model.modules()], [e.requires_grad for e in model.parameters()])
    assert all(each.grad is None for each in model.parameters())


def test_a_model_is_left_as_it_was_by_a_run_that_fails():
    model = build("llama").train().requires_grad_(True)
    with pytest.raises(KeyError):
        score(model, [{"input_ids": torch.zeros(1, 3)}])
    assert model.training
    assert all(each.requires_grad for each in model.parameters())
