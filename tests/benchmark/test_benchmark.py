"""The benchmark in process on tiny models: what it reports, what it writes, what it refuses. None looks at a clock."""

import json
import math
from html import unescape

import pytest
import torch
from transformers import Qwen3VLConfig

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.benchmark import benchmark
from pop_lightning.benchmark import report as benchmark_report
from pop_lightning.benchmark.bound import unavoidable
from pop_lightning.cli import generate
from pop_lightning.core.memory import peak_bytes
from pop_lightning.core.numbers import millions
from pop_lightning.generation.artifact import read_artifact, write_artifact
from pop_lightning.models import shapes
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.flops import prefill_flops

from tests.helpers.browser import assert_fits
from tests.helpers.families import COMMON, EVERY, WINDOW, build, ragged, relative, two_pass
from tests.helpers.workbench import arguments, save_base, save_rows

LAYERS = COMMON["num_hidden_layers"]
QUICK = {"repeats": 2, "decode_tokens": 2}
FLAGS = ["--repeats", "2", "--decode_tokens", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def tiny_shape(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", shapes.Shape(None, lambda: build("gemma3").config))
    return "tiny"


def check_point(point, decoder):
    full, pruned = (PruningPlan(decoder.num_layers), PruningPlan(point["depth"], point["boundary"], point["salient"]))
    counted = [point["batch"] * prefill_flops(decoder, plan, point["prompt_tokens"]) for plan in (full, pruned)]
    assert [point["full"]["flops"], point["pruned"]["flops"]] == counted
    assert point["bound"]["counted"] == counted[0] / counted[1]
    for each in (point["full"], point["pruned"]):
        ttft = each["ttft_ms"]
        assert min(ttft["all"]) <= ttft["median"] <= ttft["p90"] <= max(ttft["all"])
        assert each["tokens_per_s"] == pytest.approx(1000 * point["batch"] * point["prompt_tokens"] / ttft["median"])
        assert each["tflops_per_s"] == pytest.approx(each["flops"] / (ttft["median"] / 1000) / 1e12)
        assert each["peak_bytes"] > 0
    numbers = [point["ratio"], point["of_measured_bound"], *(point["bound"][key] for key in ("measured", "counted"))]
    assert all(number > 0 and math.isfinite(number) for number in numbers)
    parts = {"shallow", "projections", "boundary"} | ({"probe"} if point["salient"] else set())
    assert set(point["bound"]["parts_ms"]) == parts


def test_a_grid_on_a_base_model_has_every_point_and_every_file(base, tmp_path, capsys):
    output = tmp_path / "out" / "bench"
    argv = ["--benchmark", "--base", str(base), "--lengths", "5,24", "--batches", "1,2", "--depths", "1,3"]
    assert generate.main([*argv, "--output", str(output), *FLAGS]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["benchmark.html", "benchmark.json", "benchmark.png"]
    assert (output / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((output / "benchmark.json").read_text())
    places = [(p["depth"], p["batch"], p["prompt_tokens"]) for p in result["points"]]
    assert places == [(d, b, n) for d in (1, 3) for b in (1, 2) for n in (5, 24)]
    decoder = Decoder(build("llama"))
    for point in result["points"]:
        check_point(point, decoder)
        assert [len(point["full"]["ttft_ms"]["all"]), len(point["bound"]["ms"]["all"])] == [2, 2]
        assert len(point["decode"]["full_ms"]) == len(point["decode"]["pruned_ms"]) == 2
    assert result["settings"] == {
        "boundary": 1,
        "salient": 0,
        "default_lengths": None,
        "repeats": 2,
        "warmup": 2,
        "decode": 2,
    }
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["machine"]["versions"]["torch"] == torch.__version__
    assert result["model"]["parameters"] == sum(p.numel() for p in decoder.model.parameters())
    page = (output / "benchmark.html").read_text()
    assert page.count("<picture>") == 2, "one plot per batch size"
    assert "<dt>command</dt>" in page
    assert f">{result['points'][0]['ratio']:.3f}</td>" in page
    assert_fits(output / "benchmark.html", tmp_path)
    printed = capsys.readouterr().out
    assert "measured bound" in printed
    rows = [line for line in printed.splitlines() if not line.startswith("The ")]  # noisy times name places as well
    assert "\n".join(rows).count("3/4") == 2 * 4  # two tables


def test_an_artifact_is_measured_with_its_own_plan_and_projections(base, tmp_path):
    rows = save_rows(tmp_path / "rows.jsonl", rows=40)
    from pop_lightning.cli import fit

    changes = {"budget__candidates": [2], "boundary": 3, "budget__min_pruned": 1}
    assert fit.main(arguments(base, rows, tmp_path / "run", **changes)) == 0
    artifact, output = tmp_path / "run" / "artifact", tmp_path / "bench"
    argv = ["--benchmark", "--artifact", str(artifact), "--lengths", "12", "--output", str(output), *FLAGS]
    assert generate.main(argv) == 0
    result = json.loads((output / "benchmark.json").read_text())
    (point,) = result["points"]
    assert (point["depth"], point["boundary"]) == (2, 3)
    assert result["model"]["projection"] == "closed_form"
    with pytest.raises(InputError, match="drop --depths"):
        benchmark.run(benchmark.load(artifact=str(artifact), device="cpu"), depths=[1])


def test_a_shape_is_built_at_random_in_the_dtype_asked_for(tiny_shape):
    model = benchmark.load(shape=tiny_shape, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    again = shapes.build(tiny_shape, dtype=torch.bfloat16, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    result = benchmark.run(model, lengths=[3 * WINDOW], name=tiny_shape, **QUICK)
    (point,) = result["points"]
    assert point["depth"] == LAYERS - LAYERS // 3
    check_point(point, Decoder(model))
    benchmark_report.table(result)


def test_a_shape_that_reads_images_is_measured_on_text(monkeypatch):
    text = COMMON | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    tiny = shapes.Shape(None, lambda: Qwen3VLConfig(text_config=text, vision_config=vision))
    monkeypatch.setitem(shapes.SHAPES, "tiny_vl", tiny)
    model = benchmark.load(shape="tiny_vl", device="cpu")
    (point,) = benchmark.run(model, lengths=[9], depths=[2], **QUICK)["points"]
    check_point(point, Decoder(model))


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_tokens": 0},
        {"boundary": 0},
        {"boundary": 99},
        {"depths": [LAYERS]},
        {"depths": [1], "boundary": 2, "salient": 3},
        {"depths": [1], "boundary": 0.2, "salient": 0.3},
        {"depths": [1], "salient": 99},
    ],
    ids=str,
)
def test_edges_of_the_plan_are_measured_too(changes):
    model = build("gemma3")
    (point,) = benchmark.run(model, lengths=[WINDOW + 3], **QUICK | changes)["points"]
    check_point(point, Decoder(model))
    assert ("decode" in point) == (changes.get("decode_tokens") != 0)
    if changes.get("depths") == [LAYERS] or changes.get("boundary") == 99:
        assert point["bound"]["counted"] == 1


def test_the_change_of_decode_is_that_of_the_two_medians_shown(monkeypatch):
    """Steps that other work slows down in turn, so that the ratios of single rounds say something else."""
    full, pruned = [4.0, 9.0, 4.0, 9.0, 5.0], [5.0, 4.0, 9.0, 4.5, 9.0]
    laps = [lap for pair in zip(full, pruned, strict=True) for lap in pair]
    turns = [1.0] * 4 + [laps[at] for at in (0, 1, 3, 2, 4, 5, 7, 6, 8, 9)]  # warm-up, then who is first changes
    monkeypatch.setattr(benchmark, "lap", lambda steps, device: (turns.pop(0), []))
    generator = StageAwareGenerator(build("llama"), PruningPlan(2))
    ids = benchmark._random_prompts(generator, 8, 1)
    decode = benchmark._decode(generator, benchmark._passes(generator, ids), ids, 5)
    assert (decode["full_ms"], decode["pruned_ms"]) == (full, pruned)
    assert (decode["full_ms_per_token"], decode["pruned_ms_per_token"]) == (5.0, 5.0)
    assert decode["change"] == 0


def test_both_numbers_are_flags_and_in_the_report(base, tmp_path, capsys):
    argv = ["bench", "--base", str(base), "--lengths", "24", "--depths", "1", "--boundary", "2", "--salient", "0.25"]
    assert generate.main([*argv, "--output", str(tmp_path), *FLAGS]) == 0
    assert "boundary 2, salient 0.25" in capsys.readouterr().out
    (point,) = json.loads((tmp_path / "benchmark.json").read_text())["points"]
    check_point(point, Decoder(build("llama")))
    assert (point["boundary"], point["salient"]) == (2, 0.25)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_bound_of_salient_tokens_runs_as_many_rows_as_the_prefill(family):
    model, ids = build(family), ragged([3 * WINDOW + 1])[0]
    rows = []
    generator = StageAwareGenerator(model, PruningPlan(1, 2, 5))
    handle = model.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    generator.prefill(ids)
    real = list(rows)
    steps = unavoidable(generator, ids)
    rows.clear()
    steps["probe"](), steps["boundary"]()
    handle.remove()
    assert rows == real == [1, 7]
    products = [tuple(each.shape) for each in steps["projections"]()]
    assert products == [(3 * WINDOW, 3 * 32)]  # sliding layers need the whole context as well


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("boundary", [0, 1, 3])
def test_the_bound_runs_the_real_work(family, boundary):
    """Its last step gives the pruned model's own logits, its first the plain model's shallow cache, and no more."""
    model, depth = build(family), 2
    ids, mask = ragged([3 * WINDOW + 1, 3 * WINDOW + 1])
    generator = StageAwareGenerator(model, PruningPlan(depth, boundary))
    steps = unavoidable(generator, ids)
    reference, cache = two_pass(model, ids, mask, depth, boundary)
    shallow = steps["shallow"]()
    for layer in range(depth):
        assert relative(shallow.layers[layer].keys, cache.layers[layer].keys) < 1e-5
    assert not any(getattr(layer, "is_initialized", False) for layer in shallow.layers[depth:])
    numbers = sum(product.numel() for product in steps["projections"]())
    context = ids.shape[1] - boundary
    expected = 0
    for layer in range(depth, LAYERS):
        window, width = generator.decoder.window(layer), generator.decoder.parts[layer].kv_dim
        expected += len(ids) * (min(context, window - 1) if window else context) * 2 * width
    assert numbers == expected
    for _ in range(2):  # a pass leaves its filled cache as it was
        logits = steps["boundary"]()
        assert logits.shape == reference.shape
        if boundary:
            assert relative(logits, reference) < 1e-5
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 0


def test_peak_memory_counts_what_lives_at_one_time():
    megabyte = torch.zeros(1 << 20, dtype=torch.uint8)

    def call():
        first = megabyte.clone()
        second = torch.cat([first, first])
        del first
        return second.clone()

    assert peak_bytes(call, torch.device("cpu")) == pytest.approx(4 << 20, rel=0.01)
    assert peak_bytes(lambda: megabyte.view(1024, 1024), torch.device("cpu")) < 1024


def test_points_measured_before_memory_ran_out_are_saved(base, tmp_path, monkeypatch, capsys):
    plain = StageAwareGenerator.prefill

    def small_machine(self, ids, *args, **kwargs):
        if ids.shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, ids, *args, **kwargs)

    monkeypatch.setattr(StageAwareGenerator, "prefill", small_machine)
    argv = ["--benchmark", "--base", str(base), "--lengths", "8,40", "--output", str(tmp_path / "out"), *FLAGS]
    assert generate.main(argv) == 2
    error = capsys.readouterr().err
    assert "--batches" in error
    assert "40 tokens" in error
    assert len(json.loads((tmp_path / "out" / "benchmark.json").read_text())["points"]) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shape", "llama-3.1-8B"], "did you mean llama3_1_8b"),
        (["--shape", "zzz"], "expected one of cpu_small"),
        ([], "--artifact DIR, --base MODEL or --shape NAME"),
        (["--shape", "tiny", "--base", "x"], "drop --artifact and --base"),
        (["--shape", "tiny", "--depths", "5"], r"--depths must lie in 1..4"),
        (["--shape", "tiny", "--depths", "0"], "depth must be at least 1"),
        (["--shape", "tiny", "--depths", "a"], "--depths: expected whole numbers"),
        (["--shape", "tiny", "--boundary", "-1"], "boundary must be at least 0"),
        (["--shape", "tiny", "--lengths", "0"], "--lengths must hold numbers of at least 1"),
        (["--shape", "tiny", "--batches", "1,0"], "--batches must hold numbers of at least 1"),
        (["--shape", "tiny", "--repeats", "0"], "--repeats must be at least 1"),
        (["--shape", "tiny", "--decode_tokens", "-1"], "--decode_tokens must be at least 0"),
        (
            ["--shape", "tiny", "--lengths", "128"],
            "--lengths holds 128; with the 32 tokens of --decode_tokens and 2 that warm up before them it is more than "
            "the model's context of 128 tokens",
        ),
        (
            ["--shape", "tiny", "--lengths", "129", "--decode_tokens", "0"],
            "--lengths holds 129, more than the model's context of 128 tokens",
        ),
        (["--shape", "tiny", "--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
        (["--shape", "tiny", "--device", "cuda:99"], "--device cuda:99 was requested"),
        (["--shape", "tiny", "--dtype", "int8"], "--dtype must be one of float32"),
        (["--shape", "tiny", "--full"], "unknown flag of pop-generate bench: --full (belongs to pop-generate prompt"),
        (["--shape", "tiny", "--output", "/dev/null/x"], "--output /dev/null/x cannot be written"),
        (["--base", "/nowhere"], "/nowhere"),
        (["--artifact", "/nowhere"], "/nowhere is not a folder"),
    ],
)
def test_bad_flags_end_in_one_sentence_and_exit_code_2(flags, words, tiny_shape, capsys):
    assert generate.main(["--benchmark", *flags]) == 2
    captured = capsys.readouterr()
    error = captured.err.splitlines()[-1]
    assert error.startswith("pop-generate: error: ")
    assert words in error
    assert not captured.out


def test_benchmark_flags_without_benchmark_and_generation_without_an_artifact_are_refused(capsys):
    assert generate.main(["--artifact", "x", "--prompt", "y", "--lengths", "8"]) == 2
    assert "--lengths (belongs to pop-generate eval and bench)" in capsys.readouterr().err
    assert generate.main(["--base", "x", "--prompt", "y"]) == 2
    assert "required: --artifact" in capsys.readouterr().err


def test_weights_larger_than_the_machine_are_refused_before_they_are_made():
    with pytest.raises(InputError, match=r"--shape llama3_3_70b has 141.1 GB of weights in bfloat16"):
        shapes._check_memory("llama3_3_70b", torch.bfloat16, torch.device("cpu"), there=100 * 10**9)


CUT = "cut to what the context of"


@pytest.mark.parametrize(
    ("context", "expected", "why"),
    [
        (600, [128, 512, 596], f"128, 512 and 596 tokens: the default lengths, {CUT} 600 tokens has room for"),
        (200, [128, 196], f"128 and 196 tokens: the default lengths, {CUT} 200 tokens has room for"),
        (64, [60], f"60 tokens: the default lengths, {CUT} 64 tokens has room for"),
        (2000, [128, 512, 1024], "128, 512 and 1024 tokens: the default lengths ("),
        (None, [128, 512, 1024], "128, 512 and 1024 tokens: the default lengths ("),
    ],
)
def test_without_lengths_the_default_ones_are_cut_to_the_context(context, expected, why):
    lengths, said = benchmark._default_lengths(build("llama"), context, steps=4)
    assert lengths == expected
    assert said.startswith(why)


def test_the_report_says_which_lengths_were_measured_and_why(tmp_path):
    model = build("llama")
    model.config.max_position_embeddings = 64
    result = benchmark.run(model, repeats=1, decode_tokens=2)
    assert [point["prompt_tokens"] for point in result["points"]] == [60]
    why = result["settings"]["default_lengths"]
    assert f"\nlengths: {why}\n" in benchmark_report.table(result)
    benchmark_report.write_page(result, tmp_path, {})
    assert f"<dt>lengths</dt><dd>{why}</dd>" in (tmp_path / benchmark_report.PAGE).read_text()


@pytest.mark.parametrize(
    ("measured", "expected", "why"),
    [
        ({"prompt_tokens": 15}, 15, "lengths: 15 tokens: the median prompt that the artifact was made with ("),
        ({"speedup": {"prompt_tokens": 14}}, 14, "lengths: 14 tokens: the median prompt that the artifact was made"),
        ({"prompt_tokens": 127}, 124, f"the median prompt that the artifact was made with, {CUT} 128 tokens has room"),
        ({"prompt_tokens": "many", "speedup": 2}, 124, "lengths: 124 tokens: the default lengths, cut"),
    ],
)
def test_without_lengths_an_artifact_is_measured_at_its_median_prompt(measured, expected, why, base, tmp_path):
    plan, (artifact, again) = PruningPlan(2), (tmp_path / "artifact", tmp_path / "again")
    StageAwareGenerator(benchmark.load(base=str(base)), plan).save_pretrained(artifact)
    made = read_artifact(artifact).config["base"]
    write_artifact(again, plan=plan, kind="reuse", state={}, base=made, measured=measured)
    result = benchmark.run(benchmark.load(artifact=str(again), device="cpu"), repeats=1, decode_tokens=2)
    assert [point["prompt_tokens"] for point in result["points"]] == [expected]
    assert why in benchmark_report.table(result)


@pytest.fixture
def steady():
    """A benchmark of two points in which times do not vary and no bound is passed."""
    model = build("llama")
    result = benchmark.run(model, lengths=[8, 24], repeats=2, decode_tokens=0)
    for point in result["points"]:
        for name, ms in (("full", 10.0), ("pruned", 8.0)):
            point[name]["ttft_ms"] = {"median": ms, "p90": ms, "all": [ms, ms]}
        point["bound"] |= {"measured": 1.25, "counted": 1.3, "ms": {"median": 8.0, "p90": 8.0, "all": [8.0, 8.0]}}
        point |= {"ratio": 1.25, "of_measured_bound": 1.0004}  # shown as 100.0%
    return result


def noisy(point):
    point["pruned"]["ttft_ms"]["p90"] = 12.0


def noisy_bound(point):
    point["bound"]["ms"]["p90"] = 12.0


def noisy_decode(point):
    point["decode"] = {"full_ms": [4.0] * 5, "pruned_ms": [4.0, 4.0, 4.0, 6.0, 6.0], "change": 0.0}
    point["decode"] |= {"full_ms_per_token": 4.0, "pruned_ms_per_token": 4.0}


def beyond_its_bound(point):
    point["of_measured_bound"] = 1.161


def bound_above_counted(point):
    point["bound"]["measured"] = 1.352


def ratio_above_counted(point):
    point["ratio"] = 1.352


AT = "at batch 1, 24 tokens, depth 3/4 the "
ABOVE = "Times varied by about 4.0%, or the work that pruning leaves out takes longer per operation than the rest: "


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (noisy, f"The times are noisy: {AT}pruned prefill's p90 lies 50% above its median."),
        (noisy_bound, f"The times are noisy: {AT}measured bound's p90 lies 50% above its median."),
        (noisy_decode, f"The times are noisy: {AT}pruned decode's p90 lies 50% above its median."),
        (
            beyond_its_bound,
            f"Times varied by at least 16.1%: {AT}pruned prefill reached 116.1% of the measured bound, ",
        ),
        (bound_above_counted, f"{ABOVE}{AT}measured bound is that much above the counted bound."),
        (ratio_above_counted, f"{ABOVE}{AT}ratio is that much above the counted bound."),
    ],
)
def test_times_that_varied_are_named_in_the_terminal_and_on_the_page(change, said, steady, tmp_path):
    def shown():
        benchmark_report.write_page(steady, tmp_path, {})
        return benchmark_report.table(steady), unescape((tmp_path / benchmark_report.PAGE).read_text())

    more = "--decode_tokens than 0" if change is noisy_decode else "--repeats than 2"
    advice = f"Repeat on an idle machine, or with more {more}."
    assert not any(advice in each or "varied" in each or "noisy" in each for each in shown())
    change(steady["points"][1])
    for each in shown():
        assert said in each
        assert each.count(advice) == 1
    del steady["points"][0]
    assert said.replace("at batch 1, 24 tokens, depth 3/4 ", "") in shown()[0], "one point needs no place"


def test_sizes_have_the_word_that_fits():
    assert [millions(each) for each in (8_030_261_248, 1_345_678, 1500, 12)] == [
        "8.03 billion",
        "1.35 million",
        "1.5 thousand",
        "12",
    ]
