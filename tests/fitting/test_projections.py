"""Projections of every kind: exactness where it is promised, least squares, and training that lowers its loss."""

import copy
import gc
import json
import math
from itertools import chain

import lightning
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.data.batches import collate
from pop_lightning.data.rows import Row
from pop_lightning.fitting import training as projection_training
from pop_lightning.fitting.closed_form import fit_depths
from pop_lightning.fitting.full import make_trainable
from pop_lightning.fitting.regressions import (
    GROUPINGS,
    OBJECTIVES,
    ClosedFormFit,
    Shape,
    ValueRefit,
    _Sums,
    bytes_needed,
    held_bytes,
)
from pop_lightning.fitting.training import JointTraining, KVProjectionTraining, chunked_kl
from pop_lightning.models.attention import attention_weights, seen_from
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.layer_parts import cut
from pop_lightning.models.positions import position_ids
from pop_lightning.pruning.passes import student_logits, teacher_pass
from pop_lightning.pruning.projections import KVProjections

from tests.fitting.test_importance import rows
from tests.helpers.families import COMMON, EVERY, build, mapped_kv, ragged, random_maps, relative, two_pass

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


@pytest.mark.parametrize("family", EVERY)
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
        inputs.append(decoder.normalize(trace.hidden[depth][:, : real.shape[1]][real]).double())
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


@pytest.mark.parametrize("family", EVERY)
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


def one_row_at_a_time(decoder, batch, row, boundary=1):
    """A row without its padding, and what the eager model attends to: what a reader checks the fast path against."""
    real = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][real][None]
    context = int(real[: batch["prompt_length"]].sum()) - boundary
    with decoder.tracing() as trace:
        attention = decoder.model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    queries = range(context, ids.shape[1] - 1)  # boundary and response, without the last token, which predicts nothing
    return trace, attention, context, queries


@pytest.mark.parametrize("family", EVERY)
def test_recomputed_attention_is_what_the_model_pays(family):
    eager, fast = build(family, attention="eager"), Decoder(build(family))
    batch = collate(rows(4), 0)
    mask = batch["attention_mask"]
    expected = eager(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids(mask), output_attentions=True
    ).attentions
    columns = torch.arange(batch["prompt_length"] - 1, mask.shape[1]).expand(len(mask), -1)
    with fast.tracing() as trace:
        fast.model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids(mask))
    for layer in range(LAYERS):
        tables, hidden = trace.kwargs[layer]["position_embeddings"], trace.hidden[layer]
        keys, _ = fast.to_cache(layer, fast.own_kv(layer, hidden), tables)
        start = int(columns[0, 0])
        seen = seen_from(fast.parts[layer], columns, mask)
        ours = attention_weights(
            fast, layer, hidden[:, start:], cut(tables, slice(start, None)), columns, keys, seen
        ).flatten(1, 2)
        real = mask[:, start:].bool()
        torch.testing.assert_close(
            ours.transpose(1, 2)[real], expected[layer][:, :, start:].transpose(1, 2)[real], rtol=1e-4, atol=1e-5
        )


def ridge_solution(inputs, targets, prior, ridge):
    """Least squares toward ``prior`` (``[outputs, inputs]``), float64, one extra row per coefficient."""
    strength = ridge * (inputs**2).sum(0).mean()
    design = torch.cat([inputs, strength.sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)])
    wanted = torch.cat([targets - inputs @ prior.T, torch.zeros(inputs.shape[1], len(prior), dtype=torch.float64)])
    return prior + torch.linalg.lstsq(design, wanted).solution.T


def folded(decoder, layer):
    own = decoder.reuse_map(layer)
    bias = torch.zeros(len(own.weight)) if own.bias is None else own.bias
    return torch.cat([own.weight, bias[:, None]], 1).double()


def with_one(n):
    return torch.cat([n, torch.ones_like(n[:, :1])], 1).double()


def close_in_prediction(ours, reference, inputs):
    """Compare predictions: on an ill-conditioned Gram the coefficients themselves are loose."""
    expected, found = inputs @ reference.T, inputs @ ours.double().T
    assert ((found - expected).norm() / expected.norm()).item() < 1e-4


@pytest.mark.parametrize("grouping", ["head", "layer"])
@pytest.mark.parametrize("family", EVERY)
def test_attention_weighted_fits_equal_a_loop_over_rows_queries_and_heads(family, grouping):
    model = build(family, attention="eager")
    for block in model.model.layers:
        block.self_attn.floor_scale = (
            8192  # Llama 4 counts it from a batch's padding: to reproduce it, a row is batched by itself
        )
    decoder = Decoder(model)
    batches = [collate(rows(5, seed), 0) for seed in range(2)]
    depth, ridge, layer = 1, 1e-2, 3
    fit = ClosedFormFit(decoder, [depth], grouping=grouping, queries=100)
    trainer().validate(fit, loader(batches), verbose=False)
    kv_dim = decoder.parts[layer].kv_dim
    kv_heads = kv_dim // decoder.attention(layer).head_dim
    share = COMMON["num_attention_heads"] // kv_heads
    tokens, kvs, key_weights = [], [], []
    pooled, read = [[] for _ in range(kv_heads)], [[] for _ in range(kv_heads)]
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            trace, attention, context, queries = one_row_at_a_time(decoder, batch, row)
            n = with_one(decoder.normalize(trace.hidden[depth][0, :context]))
            kv = decoder.own_kv(layer, trace.hidden[layer])[0].double()
            keys, values = kv[:, :kv_dim].unflatten(1, (kv_heads, -1)), kv[:, kv_dim:].unflatten(1, (kv_heads, -1))
            lengths = torch.ones(len(kv), kv_heads, dtype=torch.float64)
            if (v_norm := getattr(decoder.attention(layer), "v_norm", None)) is not None:
                # What is fitted is a value before its norm, which divides it by its length, taken as given.
                lengths, values = values.square().mean(-1).sqrt(), v_norm(values)
            if grouping == "layer":
                lengths = lengths.mean(1, keepdim=True).expand(-1, kv_heads)
            weight = torch.zeros(context, dtype=torch.float64)
            for head in range(COMMON["num_attention_heads"]):
                group = head // share
                for query in queries:
                    a = attention[layer][0, head, query].double()
                    output = a @ values[:, group]
                    distance = (values[:context, group] - output).square().sum(1)
                    if decoder.parts[layer].k_norm is not None:
                        together = family in ("olmo2", "olmo3", "olmoe")  # one length for the keys of all heads
                        normed = keys[:context].flatten(1) if together else keys[:context, group]
                        distance = distance / normed.square().mean(1)
                    weight += a[:context] ** 2 * distance
                    pooled[group].append((a[:context] / lengths[:context, group]) @ n)
                    every = a[:context] @ values[:context].flatten(1)
                    read[group].append(every.unflatten(0, (kv_heads, -1))[group] if grouping == "head" else every)
            tokens.append(n)
            kvs.append(kv[:context])
            key_weights.append(weight)
    n, kv, prior = torch.cat(tokens), torch.cat(kvs), folded(decoder, layer)
    solved = fit.solve(depth, ridge, "attention").affine(layer)
    ours = torch.cat([solved[0], solved[1][:, None]], 1)
    root = torch.cat(key_weights).sqrt()[:, None]
    close_in_prediction(ours[:kv_dim], ridge_solution(root * n, root * kv[:, :kv_dim], prior[:kv_dim], ridge), root * n)
    if grouping == "layer":
        pooled, read = [list(chain(*pooled))], [list(chain(*read))]
    parts = zip(pooled, read, ours[kv_dim:].chunk(len(pooled)), prior[kv_dim:].chunk(len(pooled)), strict=True)
    for inputs, targets, found, start in parts:
        inputs, targets = torch.stack(inputs), torch.stack(targets)
        close_in_prediction(found, ridge_solution(inputs, targets, start, ridge), inputs)


@pytest.mark.parametrize("grouping", ["head", "layer"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_second_pass_fits_values_to_what_the_pruned_models_own_queries_ask(family, grouping):
    model = build(family, attention="eager")
    decoder = Decoder(model)
    batch = collate(rows(5), 0)
    depth, ridge, layer, kv_heads = 1, 1e-2, 3, COMMON["num_key_value_heads"]
    kv_dim, share = decoder.parts[layer].kv_dim, COMMON["num_attention_heads"] // COMMON["num_key_value_heads"]
    start = fitted(model, depth, [batch]).solve(depth, 1e-2, "attention")
    second = ValueRefit({depth: start}, grouping=grouping, queries=100)
    trainer().validate(second, loader([batch]), verbose=False)
    pooled, wanted = [[] for _ in range(kv_heads)], [[] for _ in range(kv_heads)]
    for row in range(len(batch["input_ids"])):
        trace, full, context, queries = one_row_at_a_time(decoder, batch, row)
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        full_values = decoder.own_kv(layer, trace.hidden[layer])[0, :, kv_dim:].double()
        # The pruned model, plainly: a context pass, its caches above the depth replaced, then the rest.
        cache = model(input_ids=ids[:, :context], use_cache=True).past_key_values
        hidden = trace.hidden[depth][:, :context]
        for above in range(depth, LAYERS):
            tables = tuple(table[:, :context] for table in trace.kwargs[above]["position_embeddings"])
            keys, values = decoder.to_cache(above, start(above, hidden), tables)
            cache.layers[above].keys, cache.layers[above].values = keys, values
        pruned = model(input_ids=ids[:, context:-1], past_key_values=cache, output_attentions=True).attentions
        own = cache.layers[layer].values[0].transpose(0, 1).flatten(1).double()
        n = with_one(decoder.normalize(hidden[0]))
        for head in range(COMMON["num_attention_heads"]):
            group = head // share
            for position, query in enumerate(queries):
                theirs, ours = full[layer][0, head, query].double(), pruned[layer][0, head, position].double()
                target = theirs @ full_values - ours[context:] @ own[context:]
                pooled[group].append(ours[:context] @ n)
                wanted[group].append(target if grouping == "layer" else target.unflatten(0, (kv_heads, -1))[group])
    weight, bias = second.solve(depth, ridge).affine(layer)
    ours, prior = torch.cat([weight, bias[:, None]], 1)[kv_dim:], folded(decoder, layer)[kv_dim:]
    if grouping == "layer":
        pooled, wanted = [list(chain(*pooled))], [list(chain(*wanted))]
    parts = zip(pooled, wanted, ours.chunk(len(pooled)), prior.chunk(len(pooled)), strict=True)
    for inputs, targets, found, start_rows in parts:
        inputs = torch.stack(inputs)
        close_in_prediction(found, ridge_solution(inputs, torch.stack(targets), start_rows, ridge), inputs)
    assert torch.equal(weight[:kv_dim], start.affine(layer)[0][:kv_dim])  # keys stay


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_closed_form_does_not_depend_on_how_rows_are_batched(family):
    model, data = build(family), rows(9)
    together, apart = ([collate(data, 0)], [collate([row], 0) for row in reversed(data)])
    fits = [ClosedFormFit(Decoder(model), [1, 2], queries=2) for _ in range(2)]
    for fit, batches in zip(fits, (together, apart), strict=True):
        trainer().validate(fit, loader(batches), verbose=False)
    n = Decoder(model).normalize(torch.randn(50, COMMON["hidden_size"]))
    for objective in OBJECTIVES:
        first, second = (fit.solve(1, 0.1, objective) for fit in fits)
        for layer in first.fitted_layers:
            torch.testing.assert_close(first(layer, None, n), second(layer, None, n), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bfloat16_base_is_fitted_like_its_float32_copy(objective):
    batches = [collate(rows(12, seed), 0) for seed in range(4)]
    half = build("gemma3", dtype=torch.bfloat16)
    copy = build("gemma3")
    copy.load_state_dict(half.float().state_dict())
    half = half.to(torch.bfloat16)
    solved = []
    for model in (half, copy):
        fit = ClosedFormFit(Decoder(model), [1])
        trainer().validate(fit, loader(batches), verbose=False)
        solved.append(fit.solve(1, 0.1, objective))
    assert solved[0].maps["3"].weight.dtype == torch.bfloat16
    n = Decoder(copy).normalize(torch.randn(50, COMMON["hidden_size"]))
    for layer in (2, 3):
        ours, reference = (each(layer, None, n) for each in solved)
        assert ((ours - reference).norm() / reference.norm()).item() < 0.03


@pytest.mark.parametrize("boundary", [0, 1, 3, 100])
def test_every_boundary_can_be_fitted(boundary):
    model, batch = build("mistral"), collate(rows(6), 0)
    fit = ClosedFormFit(Decoder(model), [1], boundary)
    trainer().validate(fit, loader([batch]), verbose=False)
    for objective in OBJECTIVES:
        solved = fit.solve(1, 0.1, objective)
        second = ValueRefit({1: solved}, boundary)
        trainer().validate(second, loader([batch]), verbose=False)
        assert all(tensor.isfinite().all() for tensor in second.solve(1, 0.1).fitted_state().values())


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_stated_memory_is_what_the_sums_take(grouping):
    model = build("llama")
    fit = ClosedFormFit(model, [1, 2, 3], grouping=grouping)
    trainer().validate(fit, loader([collate(rows(), 0)]), verbose=False)
    held = fit.sums.nbytes
    assert held == sum(bytes_needed(Shape.of(fit.decoder), depth, grouping) for depth in (1, 2, 3))


def test_depths_take_several_passes_under_a_small_bound_and_give_the_same_projections():
    decoder = Decoder(build("llama"))
    shape = Shape.of(decoder)
    batches = [collate(rows(12, seed), 0) for seed in range(2)]
    seen, held = [], []

    def alive():
        """Bytes of everything that a fit holds, whoever holds it."""
        gc.collect()
        return sum(each.nbytes for each in gc.get_objects() if type(each) in (KVProjections, _Sums))

    def validate(what, module, data):
        seen.append(what)
        trainer().validate(module, data, verbose=False)
        held.append(alive() - before)

    def run(memory, **arguments):
        found = {}
        for fitted in fit_depths(
            decoder, [3, 2, 1], boundary=1, ridges=[1e-2, 1.0], fit_rows=loader(batches), memory=memory,
            tune_rows=loader([collate(rows(8, 9), 0)]), validate=validate, **arguments,
        ):  # fmt: skip
            found[fitted.depth] = fitted.kl, fitted.best()
            del fitted
        return found

    before, least = alive(), held_bytes(shape, [1], "head")
    small = run(least, grouping="head")
    assert sum("pass" in what and "second" not in what for what in seen) == 2
    assert sum("choosing" in what for what in seen) > 4  # not every option of a depth at a time
    assert max(held) <= least
    large = run(2**30)
    assert list(small) == [3, 2, 1]
    assert small == large
    for kl, best in small.values():
        assert kl[best] <= kl["reuse", None]  # it is always an option, so what is chosen is never worse
    with pytest.raises(InputError, match=r"projection\.memory_gib"):
        run(1000, grouping="head")


def fit_flops(
    shape: Shape,
    depths: list[int],
    context: int,
    tokens: int,
    queries: int,
    grouping: str,
) -> int:
    """Operations (2 per multiply-add) per row that the sums of ``depths`` add to a forward pass.

    Args:
        context: context tokens of the row, of ``tokens`` in all.
        queries: boundary and response tokens whose attention is used.
    """
    width, outputs, samples = shape.hidden + 1, 2 * shape.kv_dim, shape.heads * queries
    head_dim = shape.kv_dim // shape.kv_heads
    fitted = [range(depth + 1, shape.layers) for depth in depths]
    asked = len({layer for layers in fitted for layer in layers})
    if grouping == "none":
        tokens = context
    total = asked * 2 * tokens * shape.hidden * outputs  # the targets
    per_depth, per_pair = 2 * context * width * width, 2 * context * width * outputs
    if grouping != "none":
        total += asked * 2 * samples * head_dim * (shape.hidden + tokens)  # queries and scores
        groups = shape.groups(grouping)
        # what queries read from all tokens, and from the context for one head or for all; the keys' weights
        total += asked * 2 * samples * (head_dim * (tokens + context) + shape.kv_dim // groups * context + context)
        per_pair += 2 * context * width * (width + shape.kv_dim)  # keys
        per_pair += 2 * samples * width * (context + width + shape.kv_dim // groups)  # values
    return total + sum(per_depth + len(layers) * per_pair for layers in fitted if layers)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_operations_are_counted_as_torch_counts_them(grouping):
    decoder = Decoder(build("llama"))
    row = collate([Row(tuple(range(3, 43)), tuple(range(3, 12)), "row")], 0)
    fit = ClosedFormFit(decoder, [1, 2], grouping=grouping, queries=5)
    with FlopCounterMode(display=False) as counted:
        fit.validation_step(row, 0)
    end = 39 if grouping == "none" else 49
    with FlopCounterMode(display=False) as forward:
        decoder.model(input_ids=row["input_ids"][:, :end], use_cache=False, logits_to_keep=1)
    ours = fit_flops(Shape.of(decoder), [1, 2], 39, 49, 5, grouping)
    assert ours == pytest.approx(counted.get_total_flops() - forward.get_total_flops(), rel=0.02)


def test_eight_depths_of_an_8b_llama_cost_at_most_one_forward_pass_more():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    prompt, response = 2048, 512
    tokens = prompt + response
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    pairs = tokens * (tokens + 1) // 2  # causal
    forward = 2 * tokens * matrices + 4 * pairs * config.hidden_size * config.num_hidden_layers
    shape = Shape(4096, 32, 1024, 32, 8, 2)
    for depths in (range(3, 32, 4), range(16, 24), range(1, 9)):
        for grouping in GROUPINGS:
            extra = fit_flops(shape, list(depths), prompt, tokens, queries=24, grouping=grouping)
            assert extra <= forward, (list(depths), grouping)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_its_loss_on_unseen_rows_and_does_not_change_the_base(dtype):
    model = build("gemma3", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train = [collate(rows(12, seed), 0) for seed in range(8)]
    unseen = collate(rows(24, seed=99), 0)
    projections = KVProjections(Decoder(model), 1)
    training = KVProjectionTraining(projections, learning_rate=3e-3)
    with torch.no_grad():
        start = training.loss(unseen).item()
    trainer(max_steps=40, max_epochs=-1).fit(training, loader(train))
    with torch.no_grad():
        end = training.loss(unseen).item()
    assert end < 0.9 * start
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert projections.kind == "full"


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_stacking_does_not_duplicate_weights_or_change_results(family):
    projections = KVProjections(Decoder(build(family)), 1).replace(random_maps(1), "full")
    n = torch.randn(2, 5, COMMON["hidden_size"])
    before = {layer: projections(layer, None, n) for layer in range(1, LAYERS)}
    stacks = projections.stack()
    assert projections.stack() is stacks
    assert sorted(layer for stack in stacks for layer in stack.layers) == [1, 2, 3]
    owned = {tensor.untyped_storage().data_ptr() for tensor in projections.parameters()}
    assert owned == {t.untyped_storage().data_ptr() for s in stacks for t in (s.weight, s.bias) if t is not None}
    for stack in stacks:
        product = torch.nn.functional.linear(n, stack.weight, stack.bias).chunk(len(stack.layers), dim=-1)
        for layer, ours in zip(stack.layers, product, strict=True):
            torch.testing.assert_close(ours, before[layer])
            assert torch.equal(projections(layer, None, n), before[layer])


def test_a_stack_never_answers_with_old_weights():
    model = build("qwen2")
    projections = KVProjections(Decoder(model), 1).replace(random_maps(1), "full")
    generator = StageAwareGenerator(model, PruningPlan(1), projections)
    ids, mask = ragged([20, 9])

    def agrees():
        maps = {layer: projections.affine(layer) for layer in projections.fitted_layers}
        expected = two_pass(model, ids, mask, 1, 1, mapped_kv(model, maps))[0]
        return relative(generator.prefill(ids, mask).logits, expected) < 1e-5

    assert agrees()
    projections.replace(random_maps(1, seed=1), "full")
    assert agrees()
    with torch.no_grad():
        projections.maps["2"].weight.mul_(1.5)  # in place, as an optimizer does
        projections.maps["3"].bias.add_(0.5)
    assert agrees()
    projections.maps["3"].requires_grad_(True)  # under training: no stack holds it, and its memory is its own
    projections.maps["3"].weight.data = projections.maps["3"].weight.data * 0.5
    assert agrees()
    assert all(3 not in stack.layers for stack in projections.stack())
    projections.requires_grad_(False)
    assert agrees()
    projections.double().float()  # moved and cast: every parameter has new memory
    assert agrees()
    again = copy.deepcopy(projections)
    again.maps["2"].weight.data.zero_()
    assert agrees()
    state = projections.fitted_state()
    assert torch.equal(
        safetensors.torch.load(safetensors.torch.save(state))["layers.3.weight"], state["layers.3.weight"]
    )


# --- training -------------------------------------------------------------------------------------------------------


def test_chunked_kl_equals_the_plain_loss_and_never_holds_all_logits():
    decoder = Decoder(build("gemma3"))
    student, teacher = (torch.randn(50, COMMON["hidden_size"]) for _ in range(2))
    vocabulary, temperature = COMMON["vocab_size"], 2.0
    plain_student, chunked_student = (student.clone().requires_grad_() for _ in range(2))
    expected = (decoder.logits(teacher) / temperature).softmax(-1)
    found = (decoder.logits(plain_student) / temperature).log_softmax(-1)
    plain = temperature**2 * (expected * (expected.log() - found)).sum(-1).mean()
    plain.backward()
    with Largest(vocabulary) as largest:
        chunked = chunked_kl(decoder, chunked_student, teacher, temperature, chunk=7)
        chunked.backward()
    torch.testing.assert_close(chunked, plain)
    torch.testing.assert_close(chunked_student.grad, plain_student.grad)
    assert largest.rows == 7


class Largest(TorchDispatchMode):
    """The most rows that any tensor of vocabulary width had while active."""

    def __init__(self, width):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            wide = isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == self.width
            # The head's own weight, or a view of it, is no logit.
            if wide and tensor.shape != (COMMON["hidden_size"], self.width):
                self.rows = max(self.rows, tensor.numel() // self.width)
        return output


def test_nothing_below_the_depth_is_kept_for_the_backward_pass(monkeypatch):
    projections = make_trainable(KVProjections(Decoder(build("llama")), 2))
    module = KVProjectionTraining(projections)
    kept, original = [], projection_training.teacher_trace

    def watched(*args):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            return original(*args)

    monkeypatch.setattr(projection_training, "teacher_trace", watched)
    batch = collate(rows(), 0)
    loss = module.loss(batch)
    loss.backward()
    assert not kept
    assert not any(each.requires_grad for each in original(module.decoder, batch, 0).hidden.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projections.maps["3"].parameters())


@pytest.mark.parametrize("family", EVERY)
def test_gradient_checkpointing_changes_no_gradient(family):
    gradients = []
    for checkpointing in (False, True):
        module = KVProjectionTraining(
            build(family), 1, kv_match=0.1, hidden_match=0.1, gradient_checkpointing=checkpointing
        )
        module.loss(collate(rows(), 0)).backward()
        gradients.append([p.grad for p in module.projections.maps["3"].parameters()])
    torch.testing.assert_close(*gradients)


def test_matching_terms_are_relative_squared_errors():
    decoder, batch = Decoder(build("qwen2")), collate(rows(4), 0)
    plan, prompt, mask = PruningPlan(1), batch["prompt_length"], batch["attention_mask"]
    trace, _ = teacher_pass(decoder, batch, 0)
    projections = KVProjections(decoder, 1)

    def loss(**weights):
        return KVProjectionTraining(projections, **weights).loss(batch).item()

    real = mask[:, : prompt - 1].bool()
    errors = []
    for layer in (2, 3):
        wanted = decoder.own_kv(layer, trace.hidden[layer][:, : prompt - 1])[real]
        found = decoder.own_kv(layer, trace.hidden[1][:, : prompt - 1])[real]
        errors.append(((found - wanted) ** 2).mean() / (wanted**2).mean())
    assert loss(kv_match=3.0) - loss() == pytest.approx(3 * torch.stack(errors).mean().item(), rel=1e-3)
    with decoder.tracing() as pruned:
        student_logits(projections, plan, trace, mask, prompt)
    real = mask[:, prompt - 1 : -1].bool()
    errors = []
    for layer in (2, 3, 4):
        wanted, found = trace.hidden[layer][:, prompt - 1 : -1][real], pruned.hidden[layer][real]
        errors.append(((found - wanted) ** 2).mean() / (wanted**2).mean())
    assert loss(hidden_match=3.0) - loss() == pytest.approx(3 * torch.stack(errors).mean().item(), rel=1e-3)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_learning_rate_warms_up_and_decays_to_zero(decay):
    module = KVProjectionTraining(build("llama"), 1, learning_rate=1.0, warmup=0.2, decay=decay)
    rates = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    batches = [collate(rows(2), 0)] * 20
    trainer(max_steps=20, max_epochs=-1, callbacks=[Watch()], gradient_clip_val=1e-9).fit(module, loader(batches))
    assert rates.index(max(rates)) == 4
    assert max(rates) == pytest.approx(1.0)
    assert rates[0] == 0
    middle = 0.5 if decay == "linear" else 0.5 * (1 + math.cos(math.pi * 8 / 16))
    assert rates[12] == pytest.approx(middle)
    assert rates[-1] < 0.1


def test_simultaneous_trainings_give_the_results_of_separate_ones():
    batches = [collate(rows(8, seed), 0) for seed in range(5)]

    def modules():
        decoder = Decoder(build("llama"))
        return [KVProjectionTraining(decoder, depth, learning_rate=rate) for depth, rate in ((1, 1e-3), (2, 3e-3))]

    alone, together = modules(), modules()
    for module in alone:
        trainer(max_steps=5, max_epochs=-1).fit(module, loader(batches))
    trainer(max_steps=5, max_epochs=-1).fit(JointTraining(together), loader(batches))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(
            one.projections.fitted_state(), other.projections.fitted_state(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start_kind", ["reuse", "closed_form"])
def test_adapters_reload_onto_the_projections_they_started_from(start_kind, dtype, tmp_path):
    model = build("qwen3", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [collate(rows(8, seed), 0) for seed in range(4)]
    start = KVProjections(Decoder(model), 1)
    if start_kind == "closed_form":
        start = fitted(model, 1, batches).solve(1, 0.1, "attention")
    arguments = {"r": 3, "lora_alpha": 6.0, "lora_dropout": 0.1, "use_rslora": True}
    training = KVProjectionTraining(start.copy(), kind="lora", kind_arguments=arguments, learning_rate=1e-2)
    with torch.no_grad():
        first = training.eval().loss(batches[0]).item()
    trainer(max_steps=20, max_epochs=-1).fit(training.train(), loader(batches))
    with torch.no_grad():
        assert training.eval().loss(batches[0]).item() < first
    trained = training.trained(tmp_path)
    assert trained.kind == "lora"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: config[name] for name in arguments} == arguments
    again = PeftModel.from_pretrained(start, str(tmp_path)).eval()
    n = Decoder(model).normalize(torch.randn(40, COMMON["hidden_size"], dtype=dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    moved = 0.0
    for layer in range(1, LAYERS):
        ours = again(layer, None, n).float()
        torch.testing.assert_close(ours, trained(layer, None, n).float(), rtol=tolerance, atol=tolerance)
        plain = KVProjections.from_state(Decoder(model), 1, "lora", trained.fitted_state())
        assert torch.equal(plain(layer, None, n), trained(layer, None, n))
        moved = max(moved, (ours - KVProjections(Decoder(model), 1)(layer, None, n).float()).abs().max().item())
    assert moved > 1e-2


def test_adapter_dropout_acts_in_training_only():
    batch, model = collate(rows(), 0), build("llama")
    module = KVProjectionTraining(model, 1, kind="lora", kind_arguments={"r": 2, "lora_dropout": 0.5})
    for name, parameter in module.projections.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    module.train()
    with torch.no_grad():
        assert module.loss(batch).item() != module.loss(batch).item()
        module.eval()
        assert module.loss(batch).item() == module.loss(batch).item()


@pytest.mark.parametrize("kind", ["closed_form", "lora", "full"])
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
    with pytest.raises(InputError, match="missing or unexpected"):
        KVProjections.from_state(Decoder(model), 1, kind, state)
    assert KVProjections(Decoder(model), 1).fitted_state() == {}
