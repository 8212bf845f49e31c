"""The learned selector: its target against finite differences, its fit against least squares, and its way to disk."""

import lightning
import pytest
import torch

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.data.batches import collate
from pop_lightning.fitting.selectors import RIDGE, SelectorFit, gains
from pop_lightning.generation.artifact import read_artifact
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.positions import position_ids
from pop_lightning.pruning.passes import probe, student_logits, teacher_pass, teacher_trace
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.pruning.selectors.learned import features

from tests.fitting.test_importance import rows
from tests.helpers.families import build, ragged, random_maps, relative
from tests.helpers.salient import mended_pass, pair, projected_columns

PLAN = PruningPlan(1, 2, 4, "learned")


def fitted(model, batches, depths=(1,)):
    decoder = Decoder(model)
    maps = {depth: KVProjections(decoder, depth).replace(random_maps(depth, 0, model), "full") for depth in depths}
    fit = SelectorFit(maps, PLAN.boundary)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.validate(fit, torch.utils.data.DataLoader(batches, batch_size=None), verbose=False)
    return {depth: fit.solve(depth) for depth in depths}


class Moved:
    """Projections of which one layer's output at one token moves by a share of the way to the full model's."""

    def __init__(self, projections, trace, layer, token, share):
        self.projections, self.decoder, self.trace = projections, projections.decoder, trace
        self.layer, self.token, self.share = layer, token, share

    def __call__(self, layer, hidden, normed=None):
        output = self.projections(layer, hidden, normed)
        if layer == self.layer and (column := self.token - (self.context - hidden.shape[1])) >= 0:
            true = self.decoder.own_kv(layer, self.trace.hidden[layer][:, self.token])
            output = output.clone()
            output[:, column] += self.share * (true - output[:, column])
        return output

    context = None


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_target_is_the_change_of_the_kl_by_finite_differences(family):
    model, step = build(family, dtype=torch.float64), 1e-3
    decoder, batch = Decoder(model), collate(rows(1), 0)
    projections = KVProjections(decoder, 1)
    mask, prompt, plan = batch["attention_mask"], batch["prompt_length"], PruningPlan(1, 2)
    trace, teacher = teacher_pass(decoder, batch, 1)

    def kl(layer, token, share):
        moved = Moved(projections, trace, layer, token, share)
        moved.context = plan.context_of(prompt)
        logits = student_logits(moved, plan, trace, mask, prompt).log_softmax(-1)
        target = teacher.log_softmax(-1)
        return (target.exp() * (target - logits)).sum(-1).mean()

    ours = gains(projections, plan, trace, mask, prompt)
    for token in (0, plan.context_of(prompt) - 1):
        expected = sum(
            abs(kl(layer, token, step) - kl(layer, token, -step)) / (2 * step) for layer in range(1, decoder.num_layers)
        )
        assert expected > 0
        torch.testing.assert_close(ours[0, token].double(), expected, rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_weight_is_the_ridge_regression_over_all_rows_however_they_are_batched(family):
    model, every = build(family), rows(12)
    decoder, inputs, targets = Decoder(model), [], []
    projections = fitted(model, [collate(every[:5], 0), collate(every[5:], 0)])[1]
    for row in every:
        batch = collate([row], 0)
        mask, prompt = batch["attention_mask"], batch["prompt_length"]
        if not PLAN.context_of(prompt):
            continue
        trace = teacher_trace(decoder, batch, 1)
        gain = gains(projections, PLAN, trace, mask, prompt)[0]
        inputs.append(features(probe(projections, PLAN, trace, mask, prompt).seen())[0].double())
        targets.append((gain / gain.max()).double())
    x, y = torch.cat(inputs), torch.cat(targets)
    scaled = (RIDGE * x.square().sum(0).clamp(min=1e-12)).sqrt().diag()
    expected = torch.linalg.lstsq(torch.cat([x, scaled]), torch.cat([y, y.new_zeros(len(scaled))])).solution
    predicted, wanted = x @ projections.selector.double(), x @ expected
    assert relative(predicted, wanted) < 1e-4
    assert (predicted - y).square().mean() < y.var()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_prefill_and_teacher_forced_passes_select_the_same_whatever_is_in_the_batch(family):
    model = build(family)
    generator, project = pair(model, PruningPlan(1, 2, 4))
    projections = fitted(model, [collate(rows(8), 0)])[1]
    generator = StageAwareGenerator(model, PLAN, projections)
    ids, mask = ragged([25, 12, 5])
    output = generator.prefill(ids, mask)
    selected = generator.selected
    logits, _ = mended_pass(model, ids, mask, 1, projected_columns(mask, PLAN.boundary, selected), project)
    assert relative(output.logits, logits) < 1e-5
    for row, length in enumerate((25, 12, 5)):
        generator.prefill(ids[row : row + 1, -length:])
        own = generator.selected[0] + ids.shape[1] - length
        assert set(own.tolist()) == set(selected[row].tolist())
    new = torch.randint(3, 90, (3, 4), generator=torch.Generator().manual_seed(1))
    row, whole = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    batch = {"input_ids": row, "attention_mask": whole, "prompt_length": ids.shape[1]}
    trace = teacher_trace(generator.decoder, batch, 1)
    forced = student_logits(projections, PLAN, trace, whole, ids.shape[1])
    positions = position_ids(whole)[:, ids.shape[1] : -1]
    rest = model(
        input_ids=new[:, :-1], attention_mask=whole[:, :-1], position_ids=positions,
        past_key_values=output.past_key_values,
    ).logits  # fmt: skip
    assert relative(forced, torch.cat([output.logits, rest], 1)) < 1e-5


def test_an_artifact_has_the_selector_where_it_is_used(tmp_path):
    model = build("llama")
    projections = fitted(model, [collate(rows(8), 0)])[1]
    model.save_pretrained(tmp_path / "base")
    generator = StageAwareGenerator(model, PLAN, projections)
    generator.save_pretrained(tmp_path / "artifact", tmp_path / "base")
    loaded = StageAwareGenerator.from_artifact(tmp_path / "artifact")
    assert torch.equal(loaded.projections.selector, projections.selector)
    assert loaded.plan == PLAN
    ids, mask = ragged([25, 12])
    assert relative(loaded.prefill(ids, mask).logits, generator.prefill(ids, mask).logits) < 1e-5
    assert torch.equal(loaded.selected, generator.selected)
    StageAwareGenerator(model, PruningPlan(1), projections).save_pretrained(tmp_path / "plain", tmp_path / "base")
    assert "selector.weight" not in read_artifact(tmp_path / "plain").state


def test_a_selector_that_is_missing_or_does_not_fit_is_refused(tmp_path):
    model = build("llama")
    with pytest.raises(InputError, match=r"selector 'learned' has no fitted weight for depth 1: fit it"):
        StageAwareGenerator(model, PLAN)
    projections = fitted(model, [collate(rows(8), 0)])[1]
    with pytest.raises(InputError, match=r"the selector's weight at depth 1 must be \(\d+,\), found \(3,\)"):
        projections.use_selector(torch.zeros(3))
    model.save_pretrained(tmp_path / "base")
    generator = StageAwareGenerator(model, PLAN, projections)
    projections.selector = torch.full_like(projections.selector, torch.nan)
    with pytest.raises(InputError, match=r"selector.weight has values that are not finite"):
        generator.save_pretrained(tmp_path / "artifact", tmp_path / "base")
    with pytest.raises(InputError, match="its sums are empty or not finite"):
        SelectorFit({1: projections}).solve(1)
