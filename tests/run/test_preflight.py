"""pop-fit --check: the dry run against measured steps, its words for what does not fit, every recipe offline."""

import itertools
import json
import re
import socket

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from pop_lightning.cli import fit
from pop_lightning.core.memory import peak_bytes
from pop_lightning.core.plan import PruningPlan
from pop_lightning.evaluation.bounds import rows_needed, smallest_certifiable
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.models import shapes
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.flops import prefill_flops
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.run import estimate, preflight
from pop_lightning.run.depths import reaching
from pop_lightning.run.dry_run import DryRun
from pop_lightning.run.estimate import Base, Estimate, Machine, Rows
from pop_lightning.run.recipe import bundled_recipes, parse
from pop_lightning.run.stage_costs import Cost, Steps, batch_of, costs

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
WITHIN = 0.2


def decoder(family, dtype, device, attention="sdpa"):
    torch.manual_seed(0)
    return Decoder(shapes.from_config(CONFIGS[family](), dtype, torch.device(device), attention))


def recipe(**changes):
    changes = {"importance__batch_size": "null"} | changes
    words = [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return parse(["--recipe", "example", *words]).recipe


def steps(family, dtype, device, batch, attention="sdpa", **changes):
    """Every kind of step, those of the closed form and of training twice: sums and optimiser states stay behind."""
    made = Steps(decoder(family, dtype, device, attention), recipe(**changes), DEPTHS, batch)
    named = made.all(responses=True)
    again = {name: lambda step=step: (step(), step()) for name, step in named.items() if name in ("fit", "train")}
    # A measurement does not see that memory from before it is freed, so decode fills its cache inside.
    return named | again | {"decode": lambda: made.decode()()}


def predicted(*arguments, **changes):
    with DryRun() as run:
        found = {}
        for name, step in steps(*arguments[:2], "meta", *arguments[2:], **changes).items():
            run.reset()
            before = run.held
            step()
            found[name] = run.peak - before
    return found


def compare(*arguments, **changes):
    expected = predicted(*arguments, **changes)
    for name, step in steps(*arguments[:2], "cpu", *arguments[2:], **changes).items():
        measured = peak_bytes(step, torch.device("cpu"))
        assert abs(expected[name] / measured - 1) < WITHIN, (name, arguments[:2], expected[name], measured)


# --- figures against measured ones ----------------------------------------------------------------------------------


def test_the_peak_of_every_step_is_within_a_fifth_of_a_measured_one():
    compare("gemma3", torch.float32, batch_of(2, 150, 40), projection__kind="lora", projection__grouping="layer")


@pytest.mark.parametrize("family", CONFIGS)
def test_gradient_checkpointing_lowers_the_peak_of_scoring_as_the_dry_run_says(family):
    batch, changes = batch_of(2, 200, 30), {"projection__kind": "reuse", "importance__gradient_checkpointing": "true"}
    compare(family, torch.float32, batch, **changes)
    without = predicted(family, torch.float32, batch, projection__kind="reuse")["scoring"]
    assert predicted(family, torch.float32, batch, **changes)["scoring"] < 0.6 * without


def test_scoring_takes_batches_of_its_own():
    dry = decoder("llama", torch.float32, "meta")

    def scoring(**changes):
        settings = recipe(projection__kind="reuse", **changes)
        return next(each for each in costs(dry, settings, DEPTHS, prompt=120, response=30) if each.name == "scoring")

    own, same, large = (
        each.peak - each.kept
        for each in (
            scoring(data__batch_size=8, importance__batch_size=1),
            scoring(data__batch_size=1),
            scoring(data__batch_size=8),
        )
    )
    assert own == same < large


@pytest.mark.full
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "grouping"), [("full", "none"), ("lora", "head")])
def test_peaks_over_batches_lengths_types_and_families(family, dtype, kind, grouping):
    for rows, (prompt, response) in itertools.product((1, 4), ((200, 30), (100, 120))):
        batch = batch_of(rows, prompt, response)
        compare(family, dtype, batch, projection__kind=kind, projection__grouping=grouping)
    compare(family, dtype, batch_of(2, 200, 60), projection__kind=kind, projection__gradient_checkpointing="true")
    compare(family, dtype, batch_of(2, 200, 60), "eager", projection__kind=kind)


def test_a_whole_evaluation_of_the_search_takes_what_its_stage_says():
    """The stage as the pipeline runs it: every depth's maps held, one batch measured."""
    dry, real = decoder("llama", torch.float32, "meta"), decoder("llama", torch.float32, "cpu")
    settings = recipe(data__batch_size=3, projection__kind="reuse")
    stage = next(each for each in costs(dry, settings, DEPTHS, prompt=120, response=30) if each.name == "search")

    def measured():
        projections = {depth: KVProjections(real, depth) for depth in DEPTHS}
        variants = {str(depth): Variant(PruningPlan(depth), each) for depth, each in projections.items()}
        with torch.no_grad():
            Evaluation(real, variants).validation_step(batch_of(3, 120, 30), 0)

    assert abs(stage.peak / peak_bytes(measured, torch.device("cpu")) - 1) < WITHIN


def test_operations_of_a_plain_pass_are_those_of_the_counter():
    """One prompt: its layers, and the head on one token. The counter leaves rotary tables out, though products too."""
    dry = decoder("llama", torch.float32, "meta")
    made = Steps(dry, recipe(), DEPTHS, batch_of(1, 200, 1))
    with DryRun() as run:
        made.prefill()
    assert run.flops == pytest.approx(prefill_flops(dry, PruningPlan(dry.num_layers), 200), rel=1e-3)


def test_a_dry_run_leaves_nothing_behind():
    attend = torch.nn.functional.scaled_dot_product_attention
    run, kept = DryRun(), []

    def fails():
        with run:
            kept.append(torch.zeros(1000, device="meta"))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fails()
    assert torch.nn.functional.scaled_dot_product_attention is attend
    assert torch.zeros(3).sum().item() == 0
    assert run.held == kept.pop().nbytes
    assert run.held == 0
    assert run.peak == 4000


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    def refuse(*arguments, **others):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


SHORT = ("llama3_1_8b", "gemma3_12b", "qwen3_vl_8b", "tiny")  # the paper's three, and the demo's


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.full) for name in bundled_recipes()]
)
def test_every_recipe_is_checked_and_printed_offline(name, offline, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "pace", lambda found: "time has a test of its own")
    rows = ["--data.calibration", "bundled:facts-gemma3/calibration.jsonl"] if name == "example" else []
    assert fit.main(["--recipe", name, *rows, "--check"]) == 0
    shown = capsys.readouterr().out
    assert ("assumed: bundled shape" in shown) == (name != "tiny")
    for stage in ("scoring", "search", "verify", "comparison"):
        assert f"\n{stage}" in shown
    limit = parse(["--recipe", name]).recipe.projection.memory_gib
    for line in shown.splitlines():
        if line.startswith("closed form: ") and re.search(r"pass  |choice  ", line):
            assert float(line.split()[-3]) <= limit, line
    if name == "llama3_1_8b":  # eight depths in one pass over the rows, and one more for the second fit
        ratios = [float(each) for each in re.findall(r"pass ([\d.]+)x", shown)]
        assert len(ratios) == 2
        assert max(ratios) <= 2
    if name == "llama3_3_70b_deepspeed":
        needs = float(re.search(r"memory: ([\d.]+) GiB per device", shown)[1])
        assert needs <= estimate.USABLE * 79  # what PyTorch finds on a card of 80 GB
        assert "it fits a GPU of 80 GB" in shown
    assert fit.main(["--recipe", name, "--print_config"]) == 0
    assert not list(tmp_path.iterdir())


def test_every_recipe_names_a_base_that_a_shape_stands_for():
    for name in bundled_recipes():
        base = parse(["--recipe", name]).recipe.model.base
        assert base.startswith("bundled:") or shapes.of_base(base), name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def test_a_small_base_is_timed_on_its_own_rows_and_nothing_is_written(base, data, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    (output / "something").write_text("of the user")  # pop-fit refuses such a folder, a check does not care
    assert fit.main([*arguments(base, data, output), "--check"]) == 0
    shown = capsys.readouterr().out
    assert "its own config" in shown
    assert "longest batch 24 + 5 tokens" in shown  # four words and the end token
    assert "time: about" in shown
    assert [path.name for path in output.iterdir()] == ["something"]


def test_rows_without_responses_are_generated_first(base, tmp_path, capsys):
    rows = save_rows(tmp_path / "rows.jsonl", responses=False)
    changes = {"data.max_response_tokens": 9, "projection.kind": "lora"}
    words = [f"--{key}={value}" for key, value in changes.items()]
    assert fit.main([*arguments(base, rows, tmp_path / "run"), *words, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "longest batch 24 + 9 tokens" in shown
    for stage in ("responses: prompts", "responses: tokens", "training"):
        assert f"\n{stage}" in shown
    assert "decode" in shown.splitlines()[-1]


def test_a_misfit_names_the_key_and_a_value_that_fits(base, data, tmp_path, monkeypatch, capsys):
    words = [*arguments(base, data, tmp_path / "run", data__batch_size=8), "--check"]
    assert fit.main(words) == 0
    checked = parse(words[:-1]).recipe
    loaded = Base.of(checked)
    there = int(0.6 * preflight.estimate(checked, loaded, Rows.of(checked, loaded), Machine.of(checked)).needs)
    monkeypatch.setattr(estimate, "device_bytes", lambda device: there / estimate.USABLE)
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
            [
                "importance.batch_size",
                "importance.gradient_checkpointing true",
                "data.batch_size",
                "model.dtype bfloat16",
                "deepspeed_stage_3",
            ],
        ),
    ],
)
def test_what_can_be_changed_follows_from_the_stage(base, changes, stage, keys):
    """Which keys are tried, over a small base that is said to run on GPUs."""
    found = checked_on_gpus(base, **changes)
    assert found.largest.name.startswith(stage)
    tried = [text for values in preflight._changes(found, found.needs) for text, _ in values]
    for key in keys:
        assert any(key in text for text in tried), (key, tried)


def checked_on_gpus(base, **changes):
    """A recipe's estimate on GPUs, its rows assumed."""
    named = {"model.base": base, "data.calibration": "nobody/rows", "data.limit": 1000, "trainer.accelerator": "gpu"}
    named |= {"data.max_prompt_tokens": 60, "data.max_response_tokens": 4, "importance.batch_size": "null"} | changes
    words = [f"--{key}={value}" for key, value in named.items()]
    checked = parse(["--recipe", "example", *words]).recipe
    loaded = Base.of(checked)
    return preflight.estimate(checked, loaded, Rows.of(checked, loaded), Machine.of(checked))


@pytest.fixture(scope="module")
def reads_images(tmp_path_factory):
    return vision.save_base(tmp_path_factory.mktemp("gemma3"), "gemma3")


def test_shards_are_not_proposed_where_they_are_refused(base, reads_images):
    def proposed(found):
        return [text for values in preflight._changes(found, found.needs) for text, _ in values]

    assert any("deepspeed_stage_3" in text for text in proposed(checked_on_gpus(base)))
    placed = checked_on_gpus(base, **{"model.device_map": "auto"})
    assert not any("deepspeed_stage_3" in text for text in proposed(placed))
    assert not any("deepspeed_stage_3" in text for text in proposed(checked_on_gpus(reads_images)))
    sharded = checked_on_gpus(base, **{"trainer.strategy": "deepspeed_stage_3", "trainer.devices": 8})
    assert [text for text in proposed(sharded) if "devices" in text] == [
        "trainer.strategy deepspeed_stage_3 with trainer.devices 16"
    ]


def test_ways_out_run_all_stages_for_a_value_that_fits_the_largest_one_alone(base, monkeypatch):
    found, runs = checked_on_gpus(base, **{"data.batch_size": 16}), []
    made = preflight.estimate

    def counted(*arguments, only):
        runs.append(only)
        return made(*arguments, only=only)

    monkeypatch.setattr(preflight, "estimate", counted)
    assert not list(preflight.ways_out(found, 1000))
    assert runs.count(None) == 0
    runs.clear()
    text, changed = next(preflight.ways_out(found, int(0.3 * found.needs)))
    assert text == "importance.batch_size 4"
    assert changed.needs <= 0.3 * found.needs
    assert {stage.name for stage in changed.stages} == {stage.name for stage in found.stages}
    assert runs.count(None) == 1


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


def test_shards_devices_and_offload_lower_what_a_device_holds():
    settings = {"trainer.accelerator": "gpu", "data.batch_size": 1, "projection.kind": "reuse", "data.limit": 1000}
    needs, weights = {}, {}
    for strategy in ("auto", "ddp", "deepspeed_stage_3", "deepspeed_stage_3_offload"):
        devices = 1 if strategy == "auto" else 8
        words = [f"--{key}={value}" for key, value in (settings | {"trainer.strategy": strategy}).items()]
        checked = parse(["--recipe", "llama3_1_8b", f"--trainer.devices={devices}", *words]).recipe
        machine, loaded = Machine.of(checked), Base.of(checked)
        weights[strategy] = machine.weights(loaded)
        needs[strategy] = machine.stage(costs_of_training(loaded, checked))
    assert weights["ddp"] == weights["auto"] == 2 * 8_030_261_248
    head = 2 * 128256 * 4096
    assert weights["deepspeed_stage_3"] == weights["ddp"] // 8 + head
    assert weights["deepspeed_stage_3_offload"] == head
    assert needs["deepspeed_stage_3"] < needs["auto"] < needs["ddp"]


def costs_of_training(loaded, checked):
    """A stage of 9 GB, of which 3 GB are gradients and optimiser states."""
    return Cost("training", "steps", 0.0, 0, 9 * 10**9, "train", shared=3 * 10**9, gradients=10**9)


@pytest.mark.parametrize(("rows", "max_drop", "code"), [(200, 0.05, 0), (200, 0.01, 2)])
def test_the_smallest_certifiable_drop_is_that_of_the_given_rows(base, tmp_path, capsys, rows, max_drop, code):
    path = save_rows(tmp_path / "rows.jsonl", rows=rows)
    words = arguments(base, path, tmp_path / "run", budget__metric="agreement", budget__max_drop=max_drop)
    assert fit.main([*words, "--check"]) == code
    shown = capsys.readouterr().out
    least = smallest_certifiable(80, "agreement", 0.95)
    assert f"80 verify rows can certify a drop of {least:.2%}" in shown
    if code:
        assert f"needs {rows_needed(max_drop, 'agreement', 0.95)}: set " in shown
        for key in ("budget.max_drop", "data.limit"):
            assert key in shown


@pytest.mark.parametrize(
    ("machine", "said"),
    [({"spread": 2}, "device_map spreads the base over 2 GPUs"), ({"strategy": "deepspeed_stage_3"}, "in shards")],
)
def test_a_base_that_is_spread_or_sharded_is_not_timed(base, data, tmp_path, monkeypatch, machine, said):
    def load(*arguments, **others):
        raise AssertionError("the whole base was loaded")

    monkeypatch.setattr(preflight, "load_model", load)
    checked = parse(arguments(base, data, tmp_path / "run")).recipe
    loaded = Base.of(checked)
    given = {"gpu": False, "devices": 1, "strategy": "auto", "bytes": 2**30, "found": 1} | machine
    found = Estimate(checked, loaded, None, Machine(**given), [], [])
    assert said in preflight.pace(found)


def test_a_timing_reads_the_rows_of_one_batch(base, data, tmp_path, monkeypatch):
    checked = parse(arguments(base, data, tmp_path / "run", data__batch_size=2)).recipe
    loaded = Base.of(checked)
    found = preflight.estimate(checked, loaded, Rows.of(checked, loaded), Machine.of(checked))
    read, collate = [], found.rows.data.batch
    monkeypatch.setattr(found.rows.data, "batch", lambda rows: read.append(rows) or collate(rows))
    monkeypatch.setattr(preflight, "_seconds", lambda step, device: 1.0)
    assert set(preflight.pace(found)) >= {"scoring", "evaluate"}
    ((first, second),) = read
    lengths = sorted(row.length for row in found.rows.data.rows_of("fit"))
    assert lengths[0] < first.length < lengths[-1]
    assert lengths[0] < second.length <= first.length


def test_a_training_batch_is_shared_by_all_devices():
    dry = decoder("llama", torch.float32, "meta")
    settings = recipe(projection__kind="full", projection__start="reuse", projection__batch_size=6)
    lengths = {"prompt": 120, "response": 30}
    (alone,) = (each for each in costs(dry, settings, DEPTHS, **lengths) if each.name == "training")
    (shared,) = (each for each in costs(dry, settings, DEPTHS, **lengths, devices=4) if each.name == "training")
    settings.projection.batch_size = 2  # the most rows that one of 4 devices reads of 6
    (two,) = (each for each in costs(dry, settings, DEPTHS, **lengths) if each.name == "training")
    assert shared.peak == two.peak < alone.peak
    machine = Machine(gpu=True, devices=4, strategy="ddp", bytes=None, found=0)
    found = Estimate(recipe(projection__kind="full", projection__batch_size=6), None, None, machine, [], [])
    assert found.rows_read(shared) == found.recipe.projection.steps * 6


def test_boundaries_are_compared_on_search_rows_at_one_depth():
    dry, settings = decoder("llama", torch.float32, "meta"), recipe(projection__kind="reuse")
    lengths = {"prompt": 120, "response": 30}
    stages = {each.name: each for each in costs(dry, settings, DEPTHS, boundaries=[4, 16, 64], **lengths)}
    assert stages["boundaries"].rows == "search"
    # The full model, and the pruned one at k of 1, 4, 16 and 64: each the dearer, the more tokens run in full.
    alone = {each.name: each for each in costs(dry, settings, [2], boundaries=[1], **lengths)}
    assert 3 * alone["boundaries"].flops < 2 * stages["boundaries"].flops < 10 * alone["boundaries"].flops
    assert "boundaries" not in {each.name for each in costs(dry, settings, DEPTHS, **lengths)}


def test_a_wanted_speedup_decides_the_depths_and_makes_no_loss_a_condition(base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "pace", lambda found: "it is not asked for")
    # A max_drop that 32 verify rows could never show: under a speedup it is no condition.
    changes = {"budget__metric": "agreement", "budget__max_drop": 0.001, "budget__speedup": 1.2}
    words = arguments(base, data, tmp_path / "run", **changes, projection__kind="lora", boundary="auto")
    words += ["--budget.boundaries", "[1, 2, 4, 64]"]
    checked = parse(words).recipe
    loaded = Base.of(checked)
    rows = Rows.of(checked, loaded)
    found = preflight.estimate(checked, loaded, rows, Machine.of(checked))
    expected = reaching(checked.budget, loaded.decoder, [1, 2, 4], rows.median)  # 64 is above every prompt
    assert found.depths == sorted(set(expected.values()), reverse=True)
    assert fit.main([*words, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "under which the loss is no condition" in shown
    assert "training: counted once, at the deepest" in shown
    assert fit.main([*words, "--budget.speedup", "1000", "--check"]) == 2
    assert "budget.speedup 1000 is more than any depth reaches" in capsys.readouterr().err


def test_rows_that_are_not_here_are_assumed_from_the_recipe(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "pace", lambda found: "it is not asked for")
    changes = {"data__limit": 100, "data__max_prompt_tokens": 20, "data__max_response_tokens": 5}
    words = [*arguments(base, tmp_path / "rows", tmp_path / "run", **changes), "--data.calibration", "nobody/rows"]
    assert fit.main([*words, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "fit 30, tune 10, search 20, verify 40 (assumed: " in shown
    assert "data.limit of 100 rows is taken, 20 + 5 tokens each" in shown


def test_the_closed_forms_grouping_and_what_the_finer_ones_take(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "pace", lambda found: "it is not asked for")
    words = ["--recipe", "llama3_1_8b", "--budget.candidates", "[30,26,22]", "--data.batch_size", "1", "--check"]
    assert fit.main(words) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("closed form: grouping"))
    assert line.startswith("closed form: grouping layer in one pass over the fit rows, projection.memory_gib 32;")
    assert "head takes projection.memory_gib" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.base", "nobody/nothing"], "model.base 'nobody/nothing' is not on this machine"),
        (["--check=yes"], "--check takes no value"),
        (["--resume"], "--check writes nothing"),
        (["--budget.candidates", "[99]"], "budget.candidates must lie in 1..32"),
        (["--data.calibration", "none.jsonl"], "data.calibration 'none.jsonl' does not exist"),
        (["--trainer.max_steps", "3"], "trainer.max_steps is 3, which would cut"),
        (["--trainer.strategy", "fsdp"], "trainer.strategy must be one of auto, ddp, "),
        (["--trainer.devices", "2", "--model.device_map", "auto"], "does not go with trainer.strategy auto"),
        (["--trainer.strategy", "ddp", "--model.device_map", "auto"], "does not go with trainer.strategy ddp"),
    ],
)
def test_bad_usage_is_one_sentence(words, said, offline, capsys):
    assert fit.main(["--recipe", "llama3_1_8b", "--check", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_config_without_weights_is_enough_for_memory(tmp_path, data, capsys):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).config.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base" / "config.json").read_text())["hidden_size"] == 96
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


def test_the_table_of_all_recipes_is_made_from_the_same_estimate():
    table = preflight.hardware_table(["mistral_7b"])
    assert "| `pop-fit --recipe mistral_7b` | " in table
    assert table.endswith("| one GPU of 80 GB |")


@pytest.mark.full
def test_the_table_has_a_row_of_every_bundled_recipe():
    rows = preflight.hardware_table(bundled_recipes()).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [f"pop-fit --recipe {name}" for name in bundled_recipes()]
    assert not any("GPU above" in row for row in rows)


def test_a_card_holds_less_than_it_is_sold_with():
    gib = 2**30
    assert preflight.card_for(0.94 * 79 * gib) == 80
    assert preflight.card_for(0.94 * 80 * gib) == 141
    assert preflight.card_for(140 * gib) is None
