"""pop-fit --check: the rule of bytes against measured steps, its words for what does not fit, every recipe offline."""

import contextlib
import itertools
import json
import re
import socket
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from pop_lightning.cli import fit
from pop_lightning.core.memory import peak_bytes
from pop_lightning.core.plan import Choice, Kept, PruningPlan
from pop_lightning.evaluation.bounds import largest_certified_loss, rows_needed, smallest_certifiable
from pop_lightning.evaluation.search import Budget, Measured, fastest_plan, screening_rows
from pop_lightning.models import shapes
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.flops import prefill_flops, speedup
from pop_lightning.run import check, pipeline
from pop_lightning.run.check import Base, Machine, Rows, estimate
from pop_lightning.run.costs import Batch, Costs, Stage
from pop_lightning.run.depths import reaching
from pop_lightning.run.invocation import bundled_recipes, parse

from tests.helpers import vision
from tests.helpers.workbench import arguments, save_base, save_rows

SIZES = {
    "vocab_size": 2000,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=64, layer_types=["sliding_attention"] * 3 + ["full_attention"] * 2
    ),
}
DEPTHS = [3, 2]
COUNTS = {"fit": 30, "tune": 10, "search": 20, "verify": 40}
WITHIN = 0.2
# The choice's own step is an evaluation; what it holds besides are options that no single step makes.
STEPS = (
    "responses: prompts",
    "responses: tokens",
    "scoring",
    "closed form: fit",
    "selectors",
    "search",
    "search: screening",
    "training",
    "comparison",
)


def decoder(family, dtype=torch.float32, device="meta", attention="sdpa"):
    torch.manual_seed(0)
    return Decoder(shapes.from_config(CONFIGS[family](), dtype, torch.device(device), attention))


def recipe(**changes):
    changes = {"importance__batch_size": "null", "boundary": 1} | changes
    words = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return parse(["--recipe", "example", *words]).recipe


def stages(base, batch, boundaries=(), devices=1, missing=10, **changes):
    settings = recipe(**{"data__batch_size": batch.rows} | changes)
    made = Costs(base, settings, DEPTHS, boundaries, batch, batch)
    return {stage.name: stage for stage in made.stages(COUNTS, missing, devices)}


def compare(family, dtype, batch, attention="sdpa", only=STEPS, **changes):
    """Every stage's step as the pipeline runs it, built and run twice: sums and optimizer states stay."""
    real = decoder(family, dtype, "cpu", attention)
    expected = stages(decoder(family, dtype, "meta", attention), batch, **changes)
    assert only is STEPS or expected.keys() >= set(only)
    for name in expected.keys() & set(only):
        stage = expected[name]

        def twice(stage=stage):
            step = stage.build(real, Batch(stage.size, batch.prompt, batch.response).collated(torch.device("cpu")))
            step()
            step()

        measured = peak_bytes(twice, torch.device("cpu"))
        assert abs(stage.bytes / measured - 1) < WITHIN, (name, family, dtype, batch, stage, measured)


# --- figures against measured ones ----------------------------------------------------------------------------------


def test_the_peak_of_every_step_is_within_a_fifth_of_a_measured_one():
    compare("gemma3", torch.float32, Batch(2, 150, 40), projection__kind="lora", projection__grouping="layer")


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.full), "gemma3"])
def test_salient_tokens_need_what_the_rule_says(family):
    changes = {"projection__kind": "reuse", "boundary": 16, "salient": 0.1}
    batch = Batch(2, 400, 20)
    compare(family, torch.float32, batch, **changes)
    base = decoder(family)
    plain, selecting = (stages(base, batch, **changes | {"salient": value})["search"] for value in (0, 0.1))
    assert selecting.flops > plain.flops


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
def test_a_selection_over_many_pruned_layers_needs_what_the_rule_says(monkeypatch, dtype, rows):
    """Keys and values of all pruned layers at once outweigh a plain pass, and so do the features of a selector."""
    monkeypatch.setitem(SIZES, "num_hidden_layers", 12)
    monkeypatch.setitem(SIZES, "vocab_size", 100)
    changes = {"projection__kind": "reuse", "boundary": 16, "salient": 0.3, "selector": "learned"}
    compare("llama", dtype, Batch(rows, 200, 10), only=("selectors", "search"), **changes)


@pytest.mark.full
@pytest.mark.parametrize("family", CONFIGS)
def test_a_screening_of_plans_needs_what_the_rule_says(family, monkeypatch):
    monkeypatch.setitem(COUNTS, "search", 200)
    changes = {"projection__kind": "reuse", "boundary": "auto", "salient": "auto", "budget__max_drop": 0.1}
    batch = Batch(2, 300, 10)
    compare(family, torch.float32, batch, only=("search: screening",), boundaries=[1, 16], **changes)


@pytest.mark.parametrize("screened", [True, False])
def test_the_plans_that_a_search_measures_at_most_are_counted(screened):
    """Driven to its end: no plan keeps the budget, and none loses so much that the screening leaves it out."""
    base, batch, kept = decoder("llama"), Batch(2, 120, 30), [Kept(1), Kept(4), Kept(16), Kept(64)]
    settings = recipe(boundary="auto", budget__max_drop=0.01, budget__min_pruned=2)
    depths, rows = [4, 3, 2, 1], 200 if screened else 150
    costs = Costs(base, settings, depths, [1, 4, 16, 64], batch, batch)
    found = {stage.name: stage for stage in costs.stages(COUNTS | {"search": rows}, 0)}
    budget = Budget(0.01, settings.budget.loss, lambda line: None)
    worth = [depth for depth in depths if base.num_layers - depth >= 2]
    fewest = [Measured(Choice(depth, "closed_form"), 0.015, 0.05) for depth in worth]
    speedups = {(depth, k): speedup(base, k.at(depth), batch.prompt) for k in kept for depth in worth}
    limit = screening_rows(rows, budget)
    assert (limit is not None) == screened
    search, answer, done = fastest_plan(fewest, speedups, screened, budget), None, {True: [], False: []}
    with contextlib.suppress(StopIteration):
        while True:
            request = search.send(answer)
            done[request.screen].append(costs.evaluation("", rows, [k.at(depth) for depth, k in request.plans]))
            answer = {plan: Measured(Choice(plan[0], "closed_form"), 0.015, 0.05) for plan in request.plans}
    assert found["search: plans"].operations == pytest.approx(sum(stage.operations for stage in done[False]))
    assert found["search: plans"].rows == rows
    assert len(done[False]) == 2  # of at most eight plans each
    if screened:
        (screening,) = done[True]
        assert found["search: screening"].operations == pytest.approx(screening.operations)
        assert found["search: screening"].rows == limit == 100
    else:
        assert "search: screening" not in found
    assert found["search: chosen"].rows == rows


def test_a_requested_speedup_measures_one_depth_of_every_plan():
    base, batch = decoder("llama"), Batch(2, 120, 30)
    settings = recipe(boundary="auto", budget__speedup=1.2)
    reached = {Kept(1): 3, Kept(4): 3, Kept(16): 2}  # 64 tokens in full reach it nowhere
    costs = Costs(base, settings, [3, 2], [1, 4, 16, 64], batch, batch, reached=reached)
    found = {stage.name: stage for stage in costs.stages(COUNTS, 0)}
    measured = costs.evaluation("", COUNTS["search"], [Kept(4).at(3), Kept(16).at(2)], kinds=2)
    assert found["search: plans"].operations == measured.operations
    assert not {"search: screening", "search: chosen"} & set(found)


def test_a_fitted_selector_is_a_stage_where_it_may_be_used():
    base, batch = decoder("llama"), Batch(2, 120, 30)
    assert "selectors" not in stages(base, batch)
    assert "selectors" not in stages(base, batch, salient=4)
    stage = stages(base, batch, salient=4, selector="learned")["selectors"]
    features = SIZES["hidden_size"] + 2 * SIZES["num_attention_heads"] * 3 + 6  # at depth 2, three layers are pruned
    sums = 8 * ((features + 1) ** 2 + (features + 1 - 2 * SIZES["num_attention_heads"]) ** 2)
    maps = 4 * 2 * 48 * SIZES["hidden_size"] * (3 + 2)
    assert sums < stage.kept <= 1.1 * (sums + maps)
    assert stage.rows == COUNTS["fit"]


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.full), "gemma3"])
def test_gradient_checkpointing_lowers_the_peak_of_scoring_as_the_rule_says(family):
    batch, changes = Batch(2, 200, 30), {"projection__kind": "reuse", "importance__gradient_checkpointing": "true"}
    compare(family, torch.float32, batch, **changes)
    kept, again = (stages(decoder(family), batch, **given)["scoring"] for given in ({}, changes))
    assert again.bytes < 0.6 * kept.bytes
    assert again.flops > kept.flops


@pytest.mark.full
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "grouping"), [("full", "none"), ("lora", "head")])
def test_peaks_over_batches_lengths_types_and_families(family, dtype, kind, grouping):
    changes = {"projection__kind": kind, "projection__grouping": grouping}
    for rows, (prompt, response) in itertools.product((1, 4), ((200, 30), (100, 120))):
        compare(family, dtype, Batch(rows, prompt, response), **changes)
    compare(family, dtype, Batch(2, 200, 60), projection__kind=kind, projection__gradient_checkpointing="true")
    compare(family, dtype, Batch(2, 200, 60), "eager", projection__kind=kind)


def test_scoring_has_batches_of_its_own():
    base = decoder("llama")
    own = stages(base, Batch(8, 120, 30), importance__batch_size=1)["scoring"]
    same, large = (stages(base, Batch(rows, 120, 30))["scoring"] for rows in (1, 8))
    assert own.bytes == same.bytes < large.bytes


def test_operations_are_those_of_whole_passes_and_of_what_is_rerun():
    """The full model's pass and, per depth, no more than the pruned layers of the last tokens over their context."""
    base, batch = decoder("llama"), Batch(1, 200, 20)
    full = prefill_flops(base, PruningPlan(base.num_layers), batch.tokens)
    head = 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    found = stages(base, batch, projection__kind="reuse")
    verify, scoring = found["verify"], found["scoring"]
    teacher = full + 19 * head
    assert teacher + 2 * 20 * head < verify.operations < 2 * teacher
    # Forward, and backward through the activations only, with two products and a half in attention where there was one.
    assert 2 * teacher < scoring.operations < 2.5 * teacher
    assert verify.flops == 40 * verify.operations


def test_a_training_batch_is_shared_by_all_devices():
    base, changes = decoder("llama"), {"projection__kind": "full", "projection__start": "reuse"}
    lengths, given = Batch(2, 120, 30), changes | {"projection__batch_size": 6}
    alone = stages(base, lengths, **given)["training"]
    shared = stages(base, lengths, devices=4, **given)["training"]
    two = stages(base, lengths, **changes | {"projection__batch_size": 2})["training"]  # the most of 6 that one reads
    assert shared.bytes == two.bytes < alone.bytes
    assert shared.rows == recipe().projection.steps * 6


def test_boundaries_are_compared_on_search_rows_at_one_depth():
    base, batch = decoder("llama"), Batch(2, 120, 30)
    several = stages(base, batch, boundaries=[4, 16, 64], projection__kind="reuse")["boundaries"]
    one = stages(base, batch, boundaries=[1], projection__kind="reuse")["boundaries"]
    assert several.rows == COUNTS["search"]
    # The full model, and the pruned one at k of 1, 4, 16 and 64: the more tokens run in full, the more operations.
    assert 3 * one.flops < 2 * several.flops < 10 * one.flops
    assert "boundaries" not in stages(base, batch, projection__kind="reuse")


def test_a_step_with_a_selector_that_is_fitted_later_runs():
    batch, changes = Batch(1, 40, 4), {"salient": 4, "selector": "learned", "projection__kind": "reuse"}
    stage = stages(decoder("llama"), batch, **changes)["verify"]
    stage.build(decoder("llama", device="cpu"), batch.collated(torch.device("cpu")))()


def test_shards_devices_and_offload_lower_what_a_device_holds():
    stage = Stage("training", 1, 0.0, 4 * 10**9, 5 * 10**9, None, 1, trained=10**9)  # 3 GB of states and gradients
    needs, weights = {}, {}
    for strategy in ("auto", "ddp", "deepspeed_stage_3", "deepspeed_stage_3_offload"):
        settings = {"trainer.accelerator": "gpu", "trainer.devices": 1 if strategy == "auto" else 8}
        words = [f"--{key}={value}" for key, value in (settings | {"trainer.strategy": strategy}).items()]
        checked = parse(["--recipe", "llama3_1_8b", *words]).recipe
        machine, base = Machine.of(checked), Base(checked)
        weights[strategy], needs[strategy] = machine.weights(base), machine.stage(stage)
    assert weights["ddp"] == weights["auto"] == 2 * 8_030_261_248
    head = 2 * 128256 * 4096
    assert weights["deepspeed_stage_3"] == weights["ddp"] // 8 + head
    assert weights["deepspeed_stage_3_offload"] == head
    assert needs["deepspeed_stage_3"] < needs["auto"] < needs["ddp"]


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **others):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def unmeasured(monkeypatch):
    monkeypatch.setattr(check, "measure", lambda found: "steps have tests of their own")


@pytest.mark.parametrize("name", bundled_recipes())
def test_every_recipe_is_checked_and_printed_offline(name, offline, unmeasured, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = ["--data.calibration", "bundled:facts-gemma3/calibration.jsonl"] if name == "example" else []
    assert fit.main(["--recipe", name, *rows, "--check"]) == 0
    shown = capsys.readouterr().out
    assert ("assumed: bundled shape" in shown) == (name != "tiny")
    for stage in ("scoring", "search", "verify", "comparison"):
        assert f"\n{stage}" in shown
    assert ("search of plans: counted at most" in shown) == (parse(["--recipe", name]).recipe.boundary == "auto")
    limit = parse(["--recipe", name]).recipe.projection.memory_gib
    kept = re.findall(r"^closed form: (?:fit|choice) .*?(\S+) +\S+ +\S+$", shown, re.MULTILINE)
    assert len(kept) == 2
    assert all(float(each) <= limit for each in kept)
    if name == "llama3_1_8b":  # eight depths in one pass over the rows, and one more for the second fit
        assert 2 < float(re.search(r"operations are ([\d.]+)x", shown)[1]) < 4
    if name == "llama3_3_70b_deepspeed":
        needs = float(re.search(r"memory: ([\d.]+) GiB per device", shown)[1])
        assert needs <= check.USABLE * 79  # what PyTorch finds on a card of 80 GB
        assert "it fits a GPU of 80 GB" in shown
    assert fit.main(["--recipe", name, "--print_config"]) == 0
    assert not list(tmp_path.iterdir())


def checked_on_gpus(base, **changes):
    """A recipe's estimate on GPUs, its rows assumed."""
    named = {"model.base": base, "data.calibration": "nobody/rows", "data.limit": 1000, "trainer.accelerator": "gpu"}
    named |= {"data.max_prompt_tokens": 60, "data.max_response_tokens": 4, "importance.batch_size": "null"} | changes
    checked = parse(["--recipe", "example", *[f"--{key}={value}" for key, value in named.items()]]).recipe
    loaded = Base(checked)
    return estimate(checked, loaded, Rows.of(checked, loaded), Machine.of(checked))


def test_a_step_of_every_stage_is_measured_on_a_small_base_and_nothing_is_written(base, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "something").write_text("of the user")  # pop-fit refuses such a folder, a check does not care
    rows = save_rows(tmp_path / "rows.jsonl", responses=False)
    words = arguments(base, rows, output, data__max_response_tokens=9, projection__kind="lora")
    assert fit.main([*words, "--check"]) == 0
    shown, errors = capsys.readouterr()
    assert not errors  # no bar of another library, since this is a log
    assert "its own config" in shown
    assert "longest batch 24 + 9 tokens" in shown
    assert "measured GiB" in shown
    assert "time: about" in shown
    for stage in ("responses: tokens", "scoring", "closed form: fit", "search", "training", "verify", "comparison"):
        (line,) = (line for line in shown.splitlines() if line.startswith(f"{stage} "))
        cells = line.removeprefix(stage).split()
        assert float(cells[6]) > float(cells[2]), line  # measured, and the base's own share of it
        assert cells[-1] in ("s", "min"), line
    assert [path.name for path in output.iterdir()] == ["something"]


def test_a_terminal_has_a_bar_with_the_name_of_the_stage(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert fit.main([*arguments(base, data, tmp_path / "run"), "--check"]) == 0
    shown, bar = capsys.readouterr()
    assert "stage 1 of" not in shown
    named = re.findall(r"one step of stage (\d+) of (\d+): ([^|]*?): +\d+%", bar)
    numbers, totals, names = zip(*dict.fromkeys(named), strict=True)
    assert [int(number) for number in numbers] == list(range(1, int(totals[0]) + 1))
    assert set(totals) == {str(len(numbers))}
    assert all(f"\n{name} " in shown for name in names), "the table has a line of every stage"


def test_a_misfit_names_the_key_and_a_value_that_fits(base, data, unmeasured, tmp_path, monkeypatch, capsys):
    words = [*arguments(base, data, tmp_path / "run", data__batch_size=8), "--check"]
    assert fit.main(words) == 0
    checked = parse(words[:-1]).recipe
    loaded = Base(checked)
    needs = estimate(checked, loaded, Rows.of(checked, loaded), Machine.of(checked)).needs
    monkeypatch.setattr(check, "device_bytes", lambda device: int(0.6 * needs) / check.USABLE)
    capsys.readouterr()
    assert fit.main(words) == 2
    shown = capsys.readouterr().out
    assert "it does not fit: set importance.batch_size 4" in shown
    assert "not measured, because it does not fit" in shown
    assert fit.main([*words, "--importance.batch_size", "4"]) == 0
    assert fit.main([*words, "--data.batch_size", "4"]) == 0


@pytest.mark.parametrize(
    ("changes", "stage", "keys"),
    [
        (
            {"projection.grouping": "head", "data.batch_size": 1, "data.max_prompt_tokens": 12},
            "closed form",
            ["projection.memory_gib"],
        ),
        (
            {"projection.kind": "full", "projection.start": "reuse", "projection.batch_size": 512},
            "training",
            ["projection.gradient_checkpointing", "projection.batch_size"],
        ),
        (
            {"model.dtype": "float32"},
            "scoring",
            ["importance.batch_size", "importance.gradient_checkpointing", "data.batch_size", "model.dtype"],
        ),
    ],
)
def test_what_can_be_changed_follows_from_the_stage(base, changes, stage, keys):
    found = checked_on_gpus(base, **changes)
    assert found.largest.name.startswith(stage)
    proposed = {key for values in check.changes(found) for each in values for key in each}
    assert set(keys) <= proposed


@pytest.fixture(scope="module")
def reads_images(tmp_path_factory):
    return vision.save_base(tmp_path_factory.mktemp("gemma3"), "gemma3")


def test_shards_are_not_proposed_where_they_are_refused(base, reads_images):
    def proposed(found):
        return [each["trainer.devices"] for values in check.changes(found) for each in values if len(each) > 1]

    assert proposed(checked_on_gpus(base)) == [2, 4, 8, 16]
    assert not proposed(checked_on_gpus(base, **{"model.device_map": "auto"}))
    assert not proposed(checked_on_gpus(reads_images))
    sharded = {"trainer.strategy": "deepspeed_stage_3", "trainer.devices": 8}
    assert proposed(checked_on_gpus(base, **sharded)) == [16]


def test_a_proposed_change_holds_for_all_stages(base):
    found = checked_on_gpus(base, **{"data.batch_size": 16})
    assert not list(check.ways_out(found, 1000))
    text, changed = next(check.ways_out(found, int(0.6 * found.needs)))
    assert text == "importance.batch_size 8"
    assert changed.needs <= 0.6 * found.needs
    assert [stage.name for stage in changed.stages] == [stage.name for stage in found.stages]
    assert found.recipe.importance.batch_size is None  # the user's recipe stays


def test_images_are_refused_where_the_run_would_refuse_them(reads_images, tmp_path, capsys):
    rows = vision.save_rows(tmp_path / "chats.jsonl", rows=30)
    words = [*arguments(reads_images, rows, tmp_path / "run"), "--check"]
    assert fit.main(words) == 0
    assert fit.main([*words, "--trainer.strategy", "deepspeed_stage_3"]) == 2
    assert "has images, and trainer.strategy deepspeed_stage_3 needs" in capsys.readouterr().err
    picture = vision.save_pictures(tmp_path / "pictures", count=1)[0]
    row = {"response": "w6", "images": [f"pictures/{picture}"]}
    prompts = [f"w{number} {vision.PLACEHOLDER['gemma3']}" for number in range(6, 36)]
    rows.write_text("".join(json.dumps(row | {"prompt": prompt}) + "\n" for prompt in prompts))
    assert fit.main([*words, "--boundary", "3"]) == 2  # the prompt ends in the image
    assert "boundary 3 begins inside an image of chats.jsonl line" in capsys.readouterr().err


@pytest.mark.parametrize(("rows", "max_drop", "code"), [(200, 0.05, 0), (200, 0.01, 2)])
def test_the_smallest_certifiable_drop_is_that_of_the_given_rows(
    base, unmeasured, tmp_path, capsys, rows, max_drop, code
):
    path = save_rows(tmp_path / "rows.jsonl", rows=rows)
    words = arguments(base, path, tmp_path / "run", budget__metric="agreement", budget__max_drop=max_drop)
    assert fit.main([*words, "--check"]) == code
    shown = capsys.readouterr().out
    least = smallest_certifiable(80, "agreement", 0.95)
    assert f"80 verify prompts can certify a drop of {least:.2%}" in shown
    if not code:
        most = largest_certified_loss(80, "agreement", max_drop)
        assert f"{max_drop:.2%} for a mean loss of up to {most:.2%}" in shown
    if code:
        assert f"needs {rows_needed(max_drop, 'agreement', 0.95)}: give 873 rows or more, or set budget." in shown
        assert "--data.splits" not in shown  # all rows would not be enough


def test_what_a_check_proposes_for_too_few_rows_is_enough(base, unmeasured, tmp_path, capsys):
    path = save_rows(tmp_path / "rows.jsonl", rows=700)
    words = arguments(base, path, tmp_path / "run", budget__metric="agreement", budget__max_drop=0.01)
    assert fit.main([*words, "--check"]) == 2
    shown = capsys.readouterr().out
    flags = re.search(r"or give (--data\.splits\.fit .*)\.$", shown, re.MULTILINE)[1].split()
    assert flags[::2] == [f"--data.splits.{name}" for name in ("fit", "tune", "search", "verify")]
    assert sum(map(float, flags[1::2])) == pytest.approx(1)
    assert fit.main([*words, *flags, "--check"]) == 0
    likely, least = re.search(r"set budget\.max_drop to (\S+) \((\S+) can be reached only if", shown).groups()
    assert float(likely) == pytest.approx(2 * smallest_certifiable(280, "agreement"), abs=1e-4)
    for drop in (likely, least):
        assert fit.main([*words, "--budget.max_drop", drop, "--check"]) == 0
    rows = re.search(r"give (\d+) rows or more, or", shown)[1]
    save_rows(path, rows=int(rows))
    assert fit.main([*words, "--check"]) == 0
    capsys.readouterr()
    assert fit.main([*words, "--data.limit", "100", "--check"]) == 2
    assert f"give {rows} rows or more and set data.limit to as many (it is 100), or" in capsys.readouterr().out
    assert fit.main([*words, "--data.limit", rows, "--check"]) == 0


def test_a_drop_that_bounds_nothing_is_not_proposed(base, unmeasured, tmp_path, capsys):
    path = save_rows(tmp_path / "rows.jsonl", rows=8)
    words = arguments(base, path, tmp_path / "run", budget__metric="agreement", budget__max_drop=0.01)
    assert fit.main([*words, "--check"]) == 2  # 3 verify rows can certify 69% at best
    assert "needs 349: give 873 rows or more." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"trainer.devices": 2}, "in one process"), ({"trainer.strategy": "deepspeed_stage_3"}, "in shards")],
)
def test_a_base_of_several_processes_is_not_loaded(base, monkeypatch, settings, said):
    def load(*arguments, **others):
        raise AssertionError("the whole base was loaded")

    monkeypatch.setattr(check, "load_model", load)
    assert said in check.measure(checked_on_gpus(base, **settings | {"trainer.accelerator": "cpu"}))


@pytest.mark.parametrize("flags", [["--check"], []])
def test_a_boundary_that_leaves_no_context_is_refused(base, data, tmp_path, unmeasured, capsys, flags):
    words = [*arguments(base, data, tmp_path / "run"), *flags]
    said = "context in any row, whose longest prompt has 24 tokens: give"
    for given, named in (
        (["--boundary", "24"], f"boundary 24 leaves no {said} a smaller boundary"),
        (["--boundary", "0.99"], f"boundary 0.99 leaves no {said} a smaller boundary"),
        (["--boundary", "auto", "--budget.boundaries", "[24, 600]"], f"boundaries [24, 600] leaves a {said} smaller"),
    ):
        assert fit.main([*words, *given]) == 2
        assert named in capsys.readouterr().err
        assert not (tmp_path / "run" / "importance.json").exists()


def test_a_boundary_that_leaves_a_context_in_the_longest_row_only_is_used(base, data, tmp_path, unmeasured):
    assert fit.main([*arguments(base, data, tmp_path / "run", boundary=23), "--check"]) == 0


@pytest.fixture
def only_loaded(monkeypatch):
    """A run that ends when it has loaded the base and the rows."""
    monkeypatch.setattr(pipeline, "run_stages", lambda run: pipeline.NOTHING_QUALIFIES)


def test_boundaries_that_the_search_leaves_out_are_named(base, data, tmp_path, unmeasured, only_loaded, capsys):
    words = arguments(base, data, tmp_path / "run", boundary="auto", budget__boundaries=[1, 2, 600])
    said = re.compile(r"boundaries: 600 of budget\.boundaries leaves no context in a prompt of \d+ tokens .*uses 1, 2")
    assert fit.main([*words, "--check"]) == 0
    assert said.search(capsys.readouterr().out)
    assert fit.main(words) == pipeline.NOTHING_QUALIFIES
    assert said.search(capsys.readouterr().out)
    assert fit.main([*words, "--check", "--budget.boundaries", "[1, 2]"]) == 0
    assert "boundaries: " not in capsys.readouterr().out


def test_a_check_names_the_rows_that_are_not_used_as_the_run_does(
    base, data, tmp_path, unmeasured, only_loaded, capsys
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(data.read_text() + '{"prompt": 3}\n')
    words = arguments(base, rows, tmp_path / "run")
    assert fit.main([*words, "--check"]) == 0
    (checked,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert "not used: 1 rows that cannot be read (first: data.calibration" in checked
    assert fit.main(words) == pipeline.NOTHING_QUALIFIES
    assert checked in capsys.readouterr().out.splitlines()


def test_a_requested_speedup_decides_the_depths_and_the_loss_is_not_limited(base, data, tmp_path, unmeasured, capsys):
    # A max_drop that 32 verify rows could never show: under a speedup it is not a condition.
    changes = {"budget__metric": "agreement", "budget__max_drop": 0.001, "budget__speedup": 1.2}
    words = arguments(base, data, tmp_path / "run", **changes, projection__kind="lora", boundary="auto")
    words += ["--budget.boundaries", "[1, 2, 4, 64]"]
    checked = parse(words).recipe
    loaded = Base(checked)
    rows = Rows.of(checked, loaded)
    found = estimate(checked, loaded, rows, Machine.of(checked))
    possible = [Kept(1), Kept(2), Kept(4)]  # 64 is above every prompt
    expected = reaching(checked.budget, loaded.decoder, possible, rows.median)
    assert found.costs.depths == sorted(set(expected.values()), reverse=True)
    assert fit.main([*words, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "is requested, so the loss is not limited" in shown
    assert "training: counted once, at the deepest" in shown
    assert fit.main([*words, "--budget.speedup", "1000", "--check"]) == 2
    assert "budget.speedup 1000 is more than any depth reaches" in capsys.readouterr().err


def test_rows_that_are_not_here_are_assumed_from_the_recipe(base, tmp_path, unmeasured, capsys):
    changes = {"data__limit": 100, "data__max_prompt_tokens": 20, "data__max_response_tokens": 5}
    words = [*arguments(base, tmp_path / "rows", tmp_path / "run", **changes), "--data.calibration", "nobody/rows"]
    assert fit.main([*words, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "fit 30, tune 10, search 20, verify 40 (assumed: " in shown
    assert "data.limit of 100 rows is used, 20 + 5 tokens each" in shown


def test_the_closed_forms_grouping_and_what_the_finer_ones_need(capsys, unmeasured):
    words = ["--recipe", "llama3_1_8b", "--budget.candidates", "[30,26,22]", "--data.batch_size", "1", "--check"]
    assert fit.main(words) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("closed form: grouping"))
    assert line.startswith("closed form: grouping layer in one pass over the fit rows, projection.memory_gib 32;")
    assert "head needs projection.memory_gib" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.base", "nobody/nothing"], "model.base 'nobody/nothing' is not on this machine"),
        (["--check=yes"], "ignored explicit argument 'yes'"),
        (["--resume"], "not allowed with argument --check"),
        (["--budget.candidates", "[99]"], "budget.candidates must lie in 1..32"),
        (["--data.calibration", "none.jsonl"], "data.calibration 'none.jsonl' does not exist"),
        (["--trainer.max_steps", "3"], "trainer.max_steps is 3, which would cut"),
        (["--trainer.strategy", "fsdp"], "trainer.strategy must be one of auto, ddp, "),
        (["--trainer.devices", "2", "--model.device_map", "auto"], "cannot be combined with trainer.strategy auto"),
        (["--trainer.strategy", "ddp", "--model.device_map", "auto"], "cannot be combined with trainer.strategy ddp"),
    ],
)
def test_bad_usage_is_one_sentence(words, said, offline, capsys):
    assert fit.main(["--recipe", "llama3_1_8b", "--check", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_config_without_weights_is_enough_for_memory(tmp_path, data, capsys):
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).config.save_pretrained(tmp_path / "base")
    assert fit.main([*arguments(tmp_path / "base", data, tmp_path / "run"), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "the base's tokenizer is not on this machine, so the 80 rows are counted" in shown
    assert "time: not measured, because the base does not load here" in shown


def test_a_family_without_sdpa_is_checked_with_the_attention_that_it_has(data, tmp_path, capsys):
    words = [*arguments(save_base(tmp_path / "base", "gemma2"), data, tmp_path / "run"), "--check"]
    assert fit.main(words) == 0
    assert "time: about" in capsys.readouterr().out
    assert fit.main([*words, "--model.attn_implementation", "sdpa"]) == 2
    assert "leave it out, or set it to 'eager'" in capsys.readouterr().err


def test_the_table_has_a_row_of_every_bundled_recipe():
    rows = check.hardware_table(bundled_recipes()).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f"pop-fit --recipe {name}" for name in bundled_recipes()]
    assert not any("GPU above" in row for row in rows)


def test_a_card_holds_less_than_it_is_sold_with():
    gib = 2**30
    assert check.card_for(0.94 * 79 * gib) == 80
    assert check.card_for(0.94 * 80 * gib) == 141
    assert check.card_for(140 * gib) is None
