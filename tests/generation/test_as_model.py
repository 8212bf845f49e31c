"""The generator where a model is expected, its artifact, and a base that changes under it."""

import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.generation.artifact import read_artifact
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.projections import KVProjections

from tests.helpers.families import COMMON, build, random_maps, relative
from tests.helpers.workbench import save_base

LAYERS = COMMON["num_hidden_layers"]
GREEDY = {"do_sample": False, "max_new_tokens": 8}
IDS = torch.arange(5, 35)[None]


def adapter(**changes):
    settings = {"r": 4, "lora_alpha": 64, "target_modules": ["k_proj", "v_proj"], "init_lora_weights": False}
    return LoraConfig(**settings | changes)


def fitted(model, depth=1):
    return KVProjections(Decoder(model), depth).replace(random_maps(depth, model=model), "full")


# --- in place of a model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), seed=2)


@pytest.fixture(scope="module")
def generator(folder):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return StageAwareGenerator(model, PruningPlan(1), tokenizer=AutoTokenizer.from_pretrained(folder))


def test_a_text_generation_pipeline_runs_the_pruned_model(generator, caplog):
    tokenizer, text = generator.tokenizer, " ".join(f"w{i}" for i in range(30))
    with caplog.at_level(logging.ERROR, "transformers"):
        pipe = pipeline("text-generation", model=generator, tokenizer=tokenizer, device="cpu")
    assert not caplog.records  # "The model ... is not supported"
    assert "StageAwareGenerator" in repr(pipe)
    inputs = tokenizer(text, return_tensors="pt")
    pruned = generator.generate(**inputs, **GREEDY, pad_token_id=tokenizer.pad_token_id)[0]
    plain = generator.model.generate(**inputs, **GREEDY, pad_token_id=tokenizer.pad_token_id)[0]
    assert not torch.equal(pruned, plain)
    (found,) = pipe(text, return_tensors=True, **GREEDY)
    assert found["generated_token_ids"] == pruned.tolist()
    several = pipe([text, "w1 w2"], batch_size=2, return_tensors=True, **GREEDY)
    assert [
        token for token in several[0][0]["generated_token_ids"] if token != tokenizer.pad_token_id
    ] == pruned.tolist()


def test_a_pipeline_saves_an_artifact_with_its_tokenizer(generator, tmp_path):
    pipeline("text-generation", model=generator, tokenizer=generator.tokenizer, device="cpu").save_pretrained(tmp_path)
    again = StageAwareGenerator.from_artifact(tmp_path)
    assert torch.equal(again.generate(IDS, **GREEDY), generator.generate(IDS, **GREEDY))
    assert (tmp_path / "tokenizer.json").is_file()


def test_a_generator_shows_its_plan(generator):
    assert repr(generator) == "StageAwareGenerator(LlamaForCausalLM, depth 1 of 4, boundary 1)"


def test_what_a_caller_reads_of_a_model(generator):
    model = generator.model
    for name in ("config", "generation_config", "device", "dtype", "name_or_path"):
        assert getattr(generator, name) == getattr(model, name)
    assert generator.can_generate()
    assert not hasattr(generator, "hf_device_map")
    model.train()
    assert generator.eval() is generator
    assert not model.training
    generator.tie_weights()


def test_a_forward_is_a_decode_step_of_a_filled_cache_and_refused_without_one(generator):
    with pytest.raises(InputError, match="does not say where its prompt ends"):
        generator(IDS)
    with generator.full_model():
        assert torch.equal(generator(IDS).logits, generator.model(IDS).logits)
    expected = generator.generate(IDS, **GREEDY, eos_token_id=-1)[:, IDS.shape[1] :]
    output, tokens = generator.prefill(IDS), []
    for _ in range(8):
        tokens.append(output.logits[:, -1:].argmax(-1))
        output = generator(tokens[-1], past_key_values=output.past_key_values)
    assert torch.equal(torch.cat(tokens, 1), expected)


def test_an_empty_prompt_is_a_sentence(generator):
    with pytest.raises(InputError, match="the prompt is empty"):
        generator.generate(IDS[:, :0], **GREEDY)


# --- its artifact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reuse", "full"])
def test_a_saved_generator_is_loaded_again(folder, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = StageAwareGenerator(model, PruningPlan(1, 2), fitted(model) if kind == "full" else None)
    generator.save_pretrained(tmp_path / "artifact")
    again = StageAwareGenerator.from_artifact(tmp_path / "artifact")
    assert (again.plan, again.projections.kind) == (generator.plan, kind)
    assert torch.equal(again.generate(IDS, **GREEDY), generator.generate(IDS, **GREEDY))
    assert read_artifact(tmp_path / "artifact").config["measured"] == {}  # nothing was certified


def test_a_model_without_a_name_needs_one_to_be_saved(folder, tmp_path):
    generator = StageAwareGenerator(build("llama", seed=2), PruningPlan(1))
    with pytest.raises(InputError, match="give its folder as base"):
        generator.save_pretrained(tmp_path / "artifact")
    generator.save_pretrained(tmp_path / "artifact", base=str(folder))
    StageAwareGenerator.from_artifact(tmp_path / "artifact")


def test_a_base_that_moved_is_named_with_the_flag_that_helps(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    StageAwareGenerator(model, PruningPlan(1)).save_pretrained(tmp_path / "artifact")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"is no longer at .*/base; give .* \(--base\)"):
        StageAwareGenerator.from_artifact(tmp_path / "artifact")
    StageAwareGenerator.from_artifact(tmp_path / "artifact", tmp_path / "moved")


def test_a_home_folder_is_expanded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(folder, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    StageAwareGenerator(model, PruningPlan(1)).save_pretrained("~/artifact")
    assert StageAwareGenerator.from_artifact("~/artifact", "~/base").plan == PruningPlan(1)


# With four bits quanto compiles an extension, for half a minute.
@pytest.mark.parametrize("weights", ["int8", pytest.param("int4", marks=pytest.mark.full)])
def test_an_artifact_runs_on_its_base_quantized(folder, tmp_path, weights):
    from transformers import QuantoConfig

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    StageAwareGenerator(model, PruningPlan(1), fitted(model)).save_pretrained(tmp_path / "artifact")
    quantized = StageAwareGenerator.from_artifact(
        tmp_path / "artifact", quantization_config=QuantoConfig(weights=weights), device_map="cpu"
    )
    assert quantized.generate(IDS, **GREEDY).shape == (1, 38)


# --- a base that changes --------------------------------------------------------------------------------------------


@torch.no_grad()
def write_in_place(model):
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight *= 1.5


@torch.no_grad()
def write_to_data(model):
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data += 0.1 * torch.randn_like(layer.self_attn.k_proj.weight)


def new_data(model):
    for layer in model.model.layers:
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data + 0.5


def new_parameter(model):
    linear = model.model.layers[-1].self_attn.k_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)


def new_layer(model):
    model.model.layers[-1] = build("llama", seed=5).model.layers[-1]


def add_adapter(model):
    model.add_adapter(adapter())


def wrap_in_peft(model):
    get_peft_model(model, adapter())


def merge_adapter(model):
    get_peft_model(model, adapter()).merge_and_unload()


CHANGES = [write_in_place, write_to_data, new_data, new_parameter, new_layer, add_adapter, wrap_in_peft, merge_adapter]


@pytest.mark.parametrize("change", CHANGES)
def test_reused_projections_follow_a_base_that_changes(change):
    model = build("llama")
    lossless, early = (StageAwareGenerator(model, PruningPlan(depth)) for depth in (LAYERS - 1, 1))
    before = early.prefill(IDS).logits
    change(model)
    with torch.no_grad():
        plain = model(IDS).logits[:, -1:]
    assert relative(lossless.prefill(IDS).logits, plain) < 1e-5
    after = early.prefill(IDS).logits
    assert not torch.allclose(after, before)
    assert torch.equal(after, StageAwareGenerator(model, PruningPlan(1)).prefill(IDS).logits)


@pytest.mark.parametrize("change", CHANGES)
def test_fitted_projections_are_refused_on_a_base_that_changed(change):
    model = build("llama")
    generator = StageAwareGenerator(model, PruningPlan(1), fitted(model))
    generator.prefill(IDS)
    change(model)
    with pytest.raises(InputError, match=r"changed .* after its projections were fitted"):
        generator.prefill(IDS)
    with generator.full_model():
        generator.prefill(IDS)


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to(torch.float64),
        lambda model: model.load_state_dict({name: each.clone() for name, each in model.state_dict().items()}),
        lambda model: model.requires_grad_(True),
        lambda model: setattr(model.model.layers[-1].mlp.act_fn, "inplace", False),
        lambda model: model.add_adapter(adapter(target_modules=["q_proj"])),
    ],
)
def test_fitted_projections_stay_where_keys_and_values_did_not_change(move):
    model = build("llama")
    generator = StageAwareGenerator(model, PruningPlan(1), fitted(model))
    generator.prefill(IDS)
    move(model)
    generator.prefill(IDS)
    generator.prefill(IDS)


def test_a_layer_that_is_compiled_later_did_not_change():
    model = build("llama")
    generator = StageAwareGenerator(model, PruningPlan(1), fitted(model))
    before = generator.prefill(IDS).logits
    model.model.layers[-1] = torch.compile(model.model.layers[-1], backend="eager")
    assert torch.equal(generator.prefill(IDS).logits, before)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_has_the_name_of_either_version_of_transformers(generator, name):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = generator.generate(ids, max_new_tokens=3)
    filled = generator.decoder.new_cache()
    generator.prefill(ids[:, :3], last=False, **{name: filled})
    assert filled.get_seq_length() == 3
    assert generator(ids[:, 3:4], **{name: filled}).logits.shape[1] == 1
    filled.crop(-1)
    assert generator.generate(ids, max_new_tokens=3, **{name: filled}).equal(expected)
    assert filled.get_seq_length() > 3
