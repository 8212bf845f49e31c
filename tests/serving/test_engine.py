"""Artifacts in vLLM against ``StageAwareGenerator``: tokens equal, log-probabilities to 1e-5 in float32.

Context tokens that skipped the pruned layers are counted, so that a plain engine passes none of these tests.
"""

import shutil
from functools import partial
from statistics import median

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pop_lightning import PruningPlan, StageAwareGenerator

from tests.helpers import quantized, served
from tests.helpers.served import EngineError, assert_same, difference, expected, prompts

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

LENGTHS = (1, 2, 3, 5, 31, 32, 33, 40, 64, 65, 100, 200, 400)
NEW = 8
PLANS = [PruningPlan(3, 1), PruningPlan(1, 3), PruningPlan(5, 0.1)]
# Every family once with a plan of its own, and everything for two of them; the rest of the matrix is long.
QUICK = {(family, PLANS[number % 3]) for number, family in enumerate(served.FAMILIES)} | {("gemma3", PLANS[0])}
CELLS = [
    pytest.param(
        family,
        plan,
        id=f"{family}-{plan.depth}-{plan.boundary}",
        marks=() if (family, plan) in QUICK else pytest.mark.full,
    )
    for family in served.FAMILIES
    for plan in PLANS
]


class Case:
    """A base and its artifact in a folder, and what the generator answers."""

    def __init__(self, engines, folder, family, plan, **build):
        self.engines, self.folder, self.plan = engines, folder, plan
        self.generator = served.build(family, folder, plan, **build)
        self.artifact = str(folder / "artifact")

    def run(self, *phases, **job):
        return self.engines.run(self.folder, {"artifact": self.artifact, "phases": list(phases), **job})

    def context(self, lengths):
        return sum(self.plan.context_of(length) for length in lengths)


@pytest.fixture(scope="session")
def case(engines, tmp_path_factory):
    """Cases by family, plan and what else they are built with, built once."""
    cases = {}

    def get(family, plan, **build):
        key = (family, plan, *build.items())
        if key not in cases:
            cases[key] = Case(engines, tmp_path_factory.mktemp(family), family, plan, **build)
        return cases[key]

    return get


def phase(given, together=True, new_tokens=NEW, **sampling):
    return {"prompts": given, "together": together, "new_tokens": new_tokens, "sampling": sampling}


@pytest.mark.parametrize(("family", "plan"), CELLS)
def test_alone_together_and_from_the_prefix_cache(case, family, plan):
    """Cold, repeated, second turns on cached first ones, and all of it in reverse."""
    here = case(family, plan)
    first = prompts(LENGTHS)
    wanted = expected(here.generator, first, NEW)
    second = [prompt[:300] + answer["tokens"] + prompts([40])[0] for prompt, answer in zip(first, wanted, strict=True)]
    wanted_second = expected(here.generator, second, NEW)
    turns = phase(second), phase(second[::-1], together=False)
    found = here.run(phase(first, together=False), phase(first), *turns, phase(first[::-1]))
    single, together, turns, reversed_turns, reversed_first = found["answers"]
    assert_same(single, wanted)
    assert_same(together, wanted)
    assert_same(turns, wanted_second)
    assert_same(reversed_turns[::-1], wanted_second)
    assert_same(reversed_first[::-1], wanted)
    assert found["metrics"]["vllm:prefix_cache_hits"] > 0


@pytest.mark.parametrize("tokens", [4, 7, 40])
@pytest.mark.parametrize(("family", "plan"), CELLS)
def test_chunks_mixed_with_decode(case, family, plan, tokens):
    here = case(family, plan)
    given = prompts(LENGTHS, seed=1)
    found = here.run(
        phase(given),
        engine={"max_num_batched_tokens": tokens, "max_num_seqs": min(4, tokens), "enable_prefix_caching": False},
    )
    assert_same(found["answers"][0], expected(here.generator, given, NEW))
    context, _ = found["counts"][0]
    assert context == here.context(LENGTHS)


@pytest.mark.parametrize(("family", "plan"), CELLS)
def test_preempted_requests(case, family, plan):
    here = case(family, plan)
    # Where all layers slide, a long request holds only the blocks of its window: short ones are admitted and then grow.
    lengths, blocks = (range(30, 46, 2), 16) if family == "mistral" else (range(90, 170, 10), 36)
    given = prompts(lengths, seed=2)
    few = {"num_gpu_blocks_override": blocks, "max_model_len": 256, "max_num_seqs": 8, "enable_prefix_caching": False}
    found = here.run(phase(given, new_tokens=60), engine=few)
    assert_same(found["answers"][0], expected(here.generator, given, 60))
    assert found["metrics"]["vllm:num_preemptions"] > 0
    context, _ = found["counts"][0]
    assert context > here.context(len(each) for each in given)  # computed again


def test_context_tokens_skip_the_pruned_layers(case):
    """The counts are those of the plan, and the answers are not the full model's."""
    here = case("llama", PLANS[0])
    given = prompts(LENGTHS)
    found = here.run(phase(given), engine={"enable_prefix_caching": False})
    assert found["counts"][0] == [here.context(LENGTHS), len(LENGTHS)]
    with here.generator.full_model():
        full = expected(here.generator, given, NEW)
    assert difference(found["answers"][0], full) != 0
    plain = here.engines.run(here.folder, {"base": str(here.folder / "base"), "phases": [phase(given)]})
    assert plain["counts"] == [None]
    assert_same(plain["answers"][0], full)


def test_reused_projections(case):
    here = case("qwen2", PLANS[0], fitted=False)  # with biases
    given = prompts(LENGTHS)
    assert_same(here.run(phase(given))["answers"][0], expected(here.generator, given, NEW))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_torch_compile(case, family):
    here = case(family, PLANS[0])
    given = prompts(LENGTHS)
    found = here.run(phase(given), phase(given[::-1]), engine={"enforce_eager": False, "max_num_batched_tokens": 64})
    wanted = expected(here.generator, given, NEW)
    assert_same(found["answers"][0], wanted)
    assert_same(found["answers"][1][::-1], wanted)


def test_ngram_speculation(case):
    here = case("llama", PLANS[0])
    given = [each * 6 for each in prompts([7, 11, 13])] + prompts([50, 100])
    found = here.run(
        phase(given, new_tokens=40),
        engine={"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3,
                                       "prompt_lookup_min": 1}},
    )  # fmt: skip
    assert_same(found["answers"][0], expected(here.generator, given, 40))
    assert found["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "one_head"])
def test_two_ranks(case, family):
    here = case(family, PLANS[0])
    given = prompts(LENGTHS)
    found = here.run(
        phase(given),
        phase(given[::-1]),
        engine={"tensor_parallel_size": 2, "max_num_batched_tokens": 40},
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    wanted = expected(here.generator, given, NEW)
    assert_same(found["answers"][0], wanted)
    assert_same(found["answers"][1][::-1], wanted)
    assert len(found["counts"]) == 2
    assert found["counts"][0] == found["counts"][1]


QUANTIZED = [("int8", True), ("int8", False), ("int4", True), ("gptq", True), ("awq", False)]


@pytest.mark.parametrize(("kind", "fitted"), QUANTIZED)
def test_quantized_bases(engines, tmp_path, kind, fitted):
    """An artifact of the base, served on a quantized checkpoint of it; layers without a fitted map run quantized."""
    bits, _, _ = quantized.FORMATS[kind]
    here = Case(engines, tmp_path, "llama", PLANS[0], fitted=fitted, change=partial(quantized.round_to_grid, bits=bits))
    quantized.write(tmp_path / "base", tmp_path / "quantized", kind)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    if bits == 8:
        quantized.round_inputs(model)
    reference = StageAwareGenerator.from_artifact(tmp_path / "artifact", model)
    # The CPU's kernels of 4 bits have no float32, so that one token is compared as roughly as in half precision.
    dtype, new = ("float32", 4) if bits == 8 else ("bfloat16", 1)
    lengths = (2, 3, 5, 8, 13, 21, 33, 40)
    given = prompts(lengths)
    found = here.run(
        phase(given, new_tokens=new),
        base=str(tmp_path / "quantized"),
        engine={"dtype": dtype, "enable_prefix_caching": False},
    )
    assert found["counts"][0] == [here.context(lengths), len(lengths)]
    wanted = expected(reference, given, new)
    errors = [difference([ours], [theirs]) for ours, theirs in zip(found["answers"][0], wanted, strict=True)]
    assert None not in errors, "other tokens than the generator's"
    assert max(errors) < 0.2
    if bits == 8:  # in float32 all else is exact, but an input halfway between two whole numbers is rounded either way
        assert median(errors) < 1e-5
    with reference.full_model():
        full = expected(reference, given, new)
    worst = difference(found["answers"][0], full)
    assert worst is None or worst > 0.2
    if kind in ("int8", "int4"):  # the formats that Transformers reads here
        loaded = StageAwareGenerator.from_artifact(tmp_path / "artifact", str(tmp_path / "quantized"))
        assert list(loaded.projections.maps) == (["4", "5"] if fitted else [])
        if kind == "int4":  # inputs of 8 bits are rounded there with another scale than in vLLM
            assert_same(expected(loaded, given, new), wanted)


# --- defects that must not pass ---------------------------------------------------------------------------------------


def test_the_end_of_a_chunk_is_not_the_boundary(case):
    here = case("llama", PLANS[0])
    given = prompts([100, 200])
    chunks = {"max_num_batched_tokens": 40, "enable_prefix_caching": False}
    found = here.run(phase(given), engine=chunks, mutation="chunk_end_is_boundary")
    worst = difference(found["answers"][0], expected(here.generator, given, NEW))
    assert worst is None or worst > 1e-3


def test_blocks_without_the_context_s_end_in_their_hash_are_mixed_up(case):
    here = case("llama", PLANS[0])
    long = prompts([200])[0]
    given = [[long[:96]], [long], [long[:96]]]
    wanted = expected(here.generator, [long[:96], long], NEW)
    wrong = here.run(*map(phase, given), mutation="no_hash_key")["answers"]
    right = here.run(*map(phase, given))["answers"]
    assert_same([right[0][0], right[1][0]], wanted)
    worst = difference([wrong[0][0], wrong[1][0]], wanted)
    assert worst is None or worst > 1e-4


def test_kept_tokens_go_to_their_own_slots(case):
    here = case("llama", PLANS[0])
    given = prompts([100, 200])
    found = here.run(phase(given), mutation="whole_slots")
    worst = difference(found["answers"][0], expected(here.generator, given, NEW))
    assert worst is None or worst > 1e-3


def test_without_a_hook_nothing_is_served(case):
    with pytest.raises(EngineError, match="did not say which tokens of a step are context"):
        case("llama", PLANS[0]).run(phase(prompts([40])), mutation="no_hook")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        ({"enable_lora": True}, "--enable-lora"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"load_format": "dummy"}, "--load-format dummy"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"runner": "pooling"}, "--runner pooling"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "--enable-expert-parallel"),
    ],
)
def test_features_are_refused_before_the_engine_starts(case, engine, named):
    with pytest.raises(EngineError, match=f"the pruned prefill does not work with {named}"):
        case("llama", PLANS[0]).run(phase(prompts([4])), engine=engine)


def test_log_probabilities_of_the_prompt_are_refused(case):
    with pytest.raises(EngineError, match=r"prompt_logprobs .* leave it out, or serve the base"):
        case("llama", PLANS[0]).run(phase(prompts([4]), prompt_logprobs=1))


def test_beam_search_is_refused(case):
    with pytest.raises(EngineError, match="beam search is not served with the pruned prefill"):
        case("llama", PLANS[0]).run(phase(prompts([4])) | {"beams": 2})


def test_a_fine_tuned_base_is_refused(case, engines, tmp_path):
    here = case("llama", PLANS[0])
    for name in ("base", "artifact"):
        shutil.copytree(here.folder / name, tmp_path / name)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.4.mlp.up_proj.weight"] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    job = {"artifact": str(tmp_path / "artifact"), "base": str(tmp_path / "base"), "phases": [phase(prompts([4]))]}
    with pytest.raises(EngineError, match=r"has other weights in model.layers.4.mlp.up_proj.weight"):
        engines.run(tmp_path, job)


def test_a_model_built_otherwise_is_refused(engines, tmp_path):
    """Norms follow the branches: there is no input norm to project from."""
    here = Case(engines, tmp_path, "exaone4", PLANS[0])
    with pytest.raises(EngineError, match=r"Exaone4ForCausalLM cannot be served pruned: .* expected input_layernorm"):
        here.run(phase(prompts([4])))


def test_every_private_name_that_is_missing_is_named(case):
    """In one process, without an engine: loading an artifact looks all of them up."""
    here = case("llama", PLANS[0])
    found = here.engines.run(here.folder, {"probe": True})
    assert len(found["sentences"]) > 25
    for name, sentence in found["sentences"].items():
        assert "cannot serve an artifact: it lacks vllm." in (sentence or ""), name


@pytest.mark.parametrize("name", ["v1_prepare", "block_hasher", "process_inputs", "subclass_attention_backend"])
def test_a_vllm_without_a_name_does_not_serve(case, name):
    with pytest.raises(EngineError, match="cannot serve an artifact: it lacks vllm"):
        case("llama", PLANS[0]).run(phase(prompts([4])), without=name)


def test_half_precision_is_as_close_as_two_right_ways_are(case):
    """bfloat16 rounds differently in two right computations: the answers are compared with float32 instead."""
    here = case("llama", PLANS[0])
    given = prompts([40, 100, 200])
    wanted = expected(here.generator, given, 1)
    found = here.run(phase(given, new_tokens=1), engine={"dtype": "bfloat16"})["answers"][0]
    errors = [abs(ours["logprobs"][0] - theirs["logprobs"][0]) for ours, theirs in zip(found, wanted, strict=True)]
    assert max(errors) < 0.2
