"""The artifact on disk: whole or not there, checked when read, and tied to the base it was fitted on."""

import copy
import hashlib
import json
import os
import random
import re
import shutil
import stat

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, QuantoConfig

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.generation.artifact import config_digest, read_artifact, write_artifact
from pop_lightning.generation.base_identity import base_identity
from pop_lightning.generation.model_card import model_card

PLAN = PruningPlan(1, 1)
MEASURED = {
    "verified": {
        "metric": "agreement",
        "value": 0.9987,
        "bound": 0.0042,
        "rows": 600,
        "confidence": 0.95,
        "max_drop": 0.01,
    },
    "curve": [
        {"depth": 1, "projection": "closed_form", "kl": 0.0123, "agreement": 0.9987, "nll_increase": 0.001},
        {"depth": 1, "projection": "reuse", "kl": 0.2, "agreement": 0.9, "nll_increase": 0.1},
    ],
}


def model(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval().requires_grad_(False)


def state():
    generator = torch.Generator().manual_seed(0)
    return {
        "layers.2.weight": torch.randn(32, 32, generator=generator),
        "layers.2.bias": torch.randn(32, generator=generator).bfloat16(),
    }


def write(folder, base=None, **changes):
    arguments = {
        "plan": PLAN,
        "kind": "closed_form",
        "state": state(),
        "base": base_identity(base or model(), "some/base"),
        "recipe": {"seed": 0, "data": {"calibration": "rows.jsonl"}},
        "measured": MEASURED,
    }
    write_artifact(folder, **arguments | changes)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "artifact")


def edit(folder, change, tensors=None):
    """Change the config, and the tensors where given, and redo every checksum as someone with this code could."""
    path, file = folder / "pop_config.json", folder / "kv_projections.safetensors"
    config = json.loads(path.read_text())
    change(config)
    digest = config_digest(config)
    tensors = safetensors.torch.load_file(file) if tensors is None else tensors
    safetensors.torch.save_file(tensors, file, {"format": "pt", "pop_config": digest})
    if isinstance(config.get("projection"), dict):
        config["projection"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    config["integrity"] = {"sha256": digest}
    path.write_text(json.dumps(config))


def test_what_is_written_is_read_back(folder):
    artifact = read_artifact(folder)
    assert (artifact.plan, artifact.kind) == (PLAN, "closed_form")
    assert set(artifact.state) == set(state())
    for name, tensor in state().items():
        assert artifact.state[name].dtype == tensor.dtype
        assert torch.equal(artifact.state[name], tensor)
    assert artifact.config["format"] == 2
    assert artifact.config["projection"]["layers"] == [2]
    assert artifact.config["measured"] == MEASURED
    assert sorted(os.listdir(folder)) == [
        "README.md",
        "custom_generate",
        "kv_projections.safetensors",
        "pop_config.json",
    ]
    artifact.check_base(model())


def test_reuse_holds_no_tensors(tmp_path):
    artifact = read_artifact(write(tmp_path / "artifact", kind="reuse", state={}))
    assert artifact.kind == "reuse"
    assert artifact.state == {}


def test_no_base_weights_and_a_small_fingerprint_at_32_layers():
    deep = model(num_hidden_layers=32)
    assert len(json.dumps(base_identity(deep, "x"))) < 100_000


# --- the base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded_in", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint", [torch.float32, torch.bfloat16])
def test_the_base_in_another_dtype_is_accepted(tmp_path, made_in, loaded_in, checkpoint):
    stored = model().to(checkpoint)
    artifact = read_artifact(write(tmp_path / "artifact", copy.deepcopy(stored).to(made_in)))
    artifact.check_base(copy.deepcopy(stored).to(loaded_in))


def test_another_attention_implementation_and_pad_token_are_the_same_base(folder):
    base = model()
    base.set_attn_implementation("eager")
    base.config.pad_token_id = 3
    base.config.use_cache = False
    read_artifact(folder).check_base(base)


def test_tied_weights_and_meta_weights_are_accepted(tmp_path):
    base = model(tie_word_embeddings=True)
    artifact = read_artifact(write(tmp_path / "artifact", base))
    artifact.check_base(base)
    base.model.layers[1].to("meta")
    artifact.check_base(base)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: model(seed=1), "has other weights in"),
        (lambda: model(num_hidden_layers=4), "num_hidden_layers is 4 there and 3 in the artifact"),
        (lambda: model(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_parameters.rope_theta"),
    ],
)
def test_another_base_is_refused_with_what_differs(folder, other, words):
    with pytest.raises(InputError, match="was made for some/base") as error:
        read_artifact(folder).check_base(other())
    assert words in str(error.value)


def test_another_class_is_refused(folder):
    base = model()
    base.__class__ = type("OtherForCausalLM", (LlamaForCausalLM,), {})
    with pytest.raises(InputError, match=r"OtherForCausalLM.*is of another class"):
        read_artifact(folder).check_base(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("matrix", ["q_proj", "v_proj"])
def test_a_merged_fine_tune_is_refused_by_the_name_of_the_tensor(folder, dtype, matrix):
    base = model()
    weight = getattr(base.model.layers[1].self_attn, matrix).weight
    torch.manual_seed(5)
    weight += 1e-2 * weight.std() * torch.randn(weight.shape[0], 1) * torch.randn(1, weight.shape[1])
    with pytest.raises(InputError, match=rf"other weights in model\.layers\.1\.self_attn\.{matrix}\.weight"):
        read_artifact(folder).check_base(base.to(dtype))


def adapted(wrap):
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    base = model()
    if wrap:
        return get_peft_model(base, config)
    base.add_adapter(config)
    return base


@pytest.mark.parametrize("wrap", [False, True])
def test_an_adapter_that_is_not_merged_is_refused_like_the_merged_one(folder, wrap):
    artifact = read_artifact(folder)
    with pytest.raises(InputError, match=r"has an adapter on \S+ that is not merged"):
        artifact.check_base(adapted(wrap))
    with pytest.raises(InputError, match=r"has an adapter on \S+ that is not merged"):
        base_identity(adapted(wrap), "some/base")
    with pytest.raises(InputError, match="other weights in"):
        artifact.check_base(adapted(True).merge_and_unload())
    artifact.check_base(adapted(True).unload())


@pytest.mark.parametrize("change", ["norms", "one norm", "biases", "buffers"])
def test_changed_vectors_are_refused(tmp_path, change):
    def base():
        made = model(attention_bias=True)
        for layer in made.model.layers:
            layer.self_attn.k_proj.bias.fill_(0.5)
            layer.register_buffer("scale", torch.ones(3))
        return made

    torch.manual_seed(5)
    folder, other = write(tmp_path / "artifact", base()), base()
    layers = other.model.layers
    for tensor in {
        "norms": [each.weight for layer in layers for each in (layer.input_layernorm, layer.post_attention_layernorm)],
        "one norm": [other.model.norm.weight],
        "biases": [layer.self_attn.k_proj.bias for layer in layers],
        "buffers": [layer.scale for layer in layers],
    }[change]:
        tensor += 0.5 * torch.randn_like(tensor)
    read_artifact(folder).check_base(base())
    with pytest.raises(InputError, match="has other weights in"):
        read_artifact(folder).check_base(other)


def test_a_base_that_lacks_a_sampled_weight_is_refused(folder):
    base = model()
    base.model.layers[1].mlp.up_proj = torch.nn.Sequential(base.model.layers[1].mlp.up_proj)
    with pytest.raises(InputError, match=r"names its weights differently: model\.layers\.1\.mlp\.up_proj\.weight"):
        read_artifact(folder).check_base(base)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_base_quantized_is_accepted_and_another_one_is_not(tmp_path, weights):
    for seed in (0, 1):
        model(seed).save_pretrained(tmp_path / f"{seed}")
    artifact = read_artifact(write(tmp_path / "artifact"))
    settings = {"quantization_config": QuantoConfig(weights=weights), "device_map": "cpu"}
    artifact.check_base(AutoModelForCausalLM.from_pretrained(tmp_path / "0", **settings))
    with pytest.raises(InputError, match="has other weights in"):
        artifact.check_base(AutoModelForCausalLM.from_pretrained(tmp_path / "1", **settings))


def test_config_keys_of_another_transformers_version_are_tolerated(folder):
    def newer(config):
        config["base"]["config"]["brand_new"] = 1
        config["base"]["config_hash"] = "of another key set"

    edit(folder, newer)
    read_artifact(folder).check_base(model())


# --- damage ---------------------------------------------------------------------------------------------------------


def test_newer_keys_are_kept_and_tolerated(folder):
    edit(folder, lambda config: config.update(future={"a": 1}) or config["plan"].update(gates=[1]))
    assert read_artifact(folder).config["future"] == {"a": 1}


@pytest.mark.parametrize("name", ["pop_config.json", "kv_projections.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
def test_a_damaged_file_is_named(folder, name, damage):
    path = folder / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"\xff" * len(whole)}[damage])
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_artifact(folder)


def test_one_flipped_byte_is_noticed(folder):
    path = folder / "kv_projections.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"kv_projections\.safetensors has a different SHA-256"):
        read_artifact(folder)


def test_the_files_of_two_artifacts_are_refused_together(folder, tmp_path):
    other = write(tmp_path / "other", measured={})
    os.replace(other / "kv_projections.safetensors", folder / "kv_projections.safetensors")
    edit_one = json.loads((folder / "pop_config.json").read_text())
    edit_one["projection"]["sha256"] = json.loads((other / "pop_config.json").read_text())["projection"]["sha256"]
    (folder / "pop_config.json").write_text(json.dumps(edit_one))
    with pytest.raises(InputError, match="the files of two artifacts were mixed"):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((32,), torch.nan), "layers.2.bias has values that are not finite"),
        (torch.full((32,), torch.inf).bfloat16(), "layers.2.bias has values that are not finite"),
        (torch.ones(32, dtype=torch.int64), "layers.2.bias has the dtype torch.int64"),
    ],
)
def test_senseless_tensors_are_refused_even_with_every_checksum_redone(folder, tmp_path, value, words):
    tensors = state() | {"layers.2.bias": value}
    stated = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    edit(folder, lambda config: config["projection"]["tensors"].update({"layers.2.bias": stated}), tensors)
    with pytest.raises(InputError, match=words):
        read_artifact(folder)
    with pytest.raises(InputError, match=words):
        write(tmp_path / "artifact of it", state=tensors)


def mutated(content, rng):
    """A bit flipped, a byte replaced, removed, doubled, or two bytes swapped, at a random place."""
    content, place = bytearray(content), rng.randrange(len(content) - 1)
    kind = rng.choice(["bit", "bit", "byte", "remove", "double", "swap"])
    if kind == "bit":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        content[place] = rng.randrange(256)
    elif kind == "remove":
        del content[place]
    elif kind == "double":
        content.insert(place, content[place])
    else:
        content[place], content[place + 1] = content[place + 1], content[place]
    return bytes(content)


def survivors(folder, name, contents):
    """How many of ``contents`` in place of a file are read as something other than what was written."""
    path, whole = folder / name, (folder / name).read_bytes()
    right = read_artifact(folder)
    count = 0
    for content in contents:
        path.write_bytes(content)
        try:
            found = read_artifact(folder)
        except InputError:
            continue
        same = (found.plan, found.kind, found.config) == (right.plan, right.kind, right.config)
        count += not (same and found.state.keys() == right.state.keys())
        count += any(not torch.equal(found.state[key], right.state[key]) for key in right.state)
    path.write_bytes(whole)
    return count


@pytest.mark.parametrize("name", ["pop_config.json", "kv_projections.safetensors"])
def test_random_damage_is_refused_or_without_effect(folder, name):
    rng, whole = random.Random(0), (folder / name).read_bytes()
    assert survivors(folder, name, (mutated(whole, rng) for _ in range(200))) == 0


@pytest.mark.full
def test_every_single_bit_of_the_config_is_bound(folder):
    whole = (folder / "pop_config.json").read_bytes()
    flips = (whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in range(8))
    assert survivors(folder, "pop_config.json", flips) == 0


@pytest.mark.full
@pytest.mark.parametrize("name", ["pop_config.json", "kv_projections.safetensors"])
def test_ten_thousand_random_damages_are_refused_or_without_effect(folder, name):
    rng, whole = random.Random(1), (folder / name).read_bytes()
    assert survivors(folder, name, (mutated(whole, rng) for _ in range(10_000))) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["plan"].update(depth=2),
        lambda config: config["plan"].update(boundary=9),
        lambda config: config["measured"]["verified"].update(bound=0.0),
        lambda config: config["projection"].update(layers=[], tensors={}),
        lambda config: config["base"].update(id="other/base"),
        lambda config: config["recipe"].update(seed=1),
        lambda config: config.update(future=1),
        lambda config: config.pop("integrity"),
        lambda config: config["integrity"].update(sha256="0" * 64),
    ],
)
def test_a_change_to_what_the_config_says_is_noticed(folder, change):
    path = folder / "pop_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"pop_config\.json.*integrity\.sha256"):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("layers.2.bias"), "lacks the tensor layers.2.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "holds the tensor extra"),
        (lambda tensors: tensors.update({"layers.2.bias": torch.zeros(3)}), "has layers.2.bias as"),
    ],
)
def test_tensors_that_are_not_the_stated_ones_are_named(folder, change, words):
    tensors = state()
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "kv_projections.safetensors")
    with pytest.raises(InputError, match=words.replace(".", r"\.")):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(format=3), "format 3"),
        (lambda config: config.update(format=1), "format 1, which has no checksum"),
        (lambda config: config.update(format="2"), "format as '2'"),
        (lambda config: config.pop("plan"), "lacks the key plan.depth"),
        (lambda config: config["plan"].update(depth=0), "depth must be at least 1"),
        (lambda config: config["plan"].update(depth="x"), "plan.depth as 'x'"),
        (lambda config: config.update(plan=3), "lacks the key plan.depth"),
        (lambda config: config["projection"].update(kind="magic"), "projection.kind 'magic'"),
        (lambda config: config["projection"].update(tensors=[]), "projection.tensors as"),
        (lambda config: config["projection"].update(layers=[1, 2]), "layers.1.bias is missing or unexpected"),
        (lambda config: config["projection"].pop("layers"), "lacks the key projection.layers"),
        (lambda config: config["projection"].update(kind="reuse"), "expected none"),
        (lambda config: config["base"].pop("id"), "lacks the key base.id"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence_with_the_file(folder, change, words):
    edit(folder, change)
    with pytest.raises(InputError) as error:
        read_artifact(folder)
    assert words in str(error.value)
    assert "pop_config.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        read_artifact(tmp_path / "nowhere")


def test_the_folder_of_a_run_is_refused_with_the_artifact_inside_it(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(InputError, match=r"pop_config.json is missing: .* pop-fit wrote\.$"):
        read_artifact(run)
    shutil.copytree(folder, run / "artifact")
    with pytest.raises(InputError, match=rf"did you mean {re.escape(str(run / 'artifact'))}\?$"):
        read_artifact(run)


# --- whole or not at all --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("broken", ["tensors", "card", "rename"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, there_before, broken):
    folder = tmp_path / "artifact"
    if there_before:
        write(folder)
    rename = os.rename

    def fail(*args, **kwargs):
        if broken == "rename" and not str(args[0]).endswith(".partial"):
            return rename(*args)
        raise RuntimeError("the power went")

    target = {
        "tensors": "safetensors.torch.save_file",
        "card": "pop_lightning.generation.artifact.model_card",
        "rename": "pop_lightning.core.files.os.rename",
    }[broken]
    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(RuntimeError, match="the power went"):
            write(folder, kind="full")
    assert os.listdir(tmp_path) == (["artifact"] if there_before else [])
    if there_before:
        assert read_artifact(folder).kind == "closed_form"


def test_an_artifact_is_replaced_and_leftovers_of_a_killed_run_go(folder):
    (folder.parent / ".artifact.partial").mkdir()
    write(folder, kind="full")
    assert read_artifact(folder).kind == "full"
    assert os.listdir(folder.parent) == ["artifact"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(InputError, match="other than an artifact"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "artifact")


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        folder = write(tmp_path / "artifact")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()} == {0o666 & ~mask}


def test_a_recipe_with_a_path_that_is_not_unicode_is_written(tmp_path):
    odd = os.fsdecode(b"rows-\xff.jsonl")
    folder = write(tmp_path / "artifact", recipe={"data": {"calibration": odd}})
    assert read_artifact(folder).config["recipe"]["data"]["calibration"] == odd


def test_the_card_is_the_hubs(folder, tmp_path):
    data = ModelCard.load(folder / "README.md").data
    assert (data.library_name, data.base_model, data.base_model_relation) == ("pop-lightning", "some/base", "adapter")
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("agreement_loss", 0.9987)
    assert result.metric_name == "loss of agreement against the unpruned model"
    assert result.metric_args == {"bound": 0.0042, "rows": 600, "confidence": 0.95, "max_drop": 0.01}
    local = write(tmp_path / "local", base=None, recipe={"data": {"calibration": ["org/set", "x.txt"]}}, measured={})
    edited = model_card(PLAN, "reuse", base_identity(model(), str(tmp_path)), {}, {})
    assert ModelCard.load(local / "README.md").data.datasets == ["org/set"]
    assert ModelCard(edited).data.base_model is None
    assert "Nothing: these projections were saved without a verification." in edited


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (PruningPlan(1), "the boundary (the last 1 prompt token) runs through all layers."),
        (PruningPlan(1, 0.05), "(the last 5% of the prompt) runs"),
        (PruningPlan(1, 16, 0.025), "selected at each prefill (2.5% of the prompt, selector `attention`)."),
        (PruningPlan(1, 16, 20, "recency"), "selected at each prefill (20 prompt tokens, selector `recency`)."),
    ],
)
def test_the_card_says_which_tokens_run_in_full(plan, words):
    card = model_card(plan, "reuse", base_identity(model(), "some/base"), {}, {})
    assert words in card
    assert ("selected" in card) == bool(plan.salient)


def test_the_card_says_what_was_measured_and_how_to_load(folder):
    card = (folder / "README.md").read_text()
    for words in (
        "from pop_lightning import StageAwareGenerator",
        "StageAwareGenerator.from_artifact(",
        "Its weights are not included",
        "1 of 3 layers",
        "0.9987",
        "0.0042",
        "600 rows",
        "| **1** | **closed_form** | **0.0123** |",
        "rows.jsonl",
    ):
        assert words in card
    assert "None" not in model_card(PLAN, "reuse", base_identity(model(), "x"), {}, {})


def test_the_base_is_named_by_the_commit_that_was_loaded_or_by_its_full_path(tmp_path, monkeypatch):
    loaded = model()
    assert base_identity(loaded, "some/base", "main")["revision"] == "main"
    loaded.config._commit_hash = "0123abc"
    assert base_identity(loaded, "some/base", "main")["revision"] == "0123abc"
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_identity(loaded, "base")["id"] == str(tmp_path / "base")
