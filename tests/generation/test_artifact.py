"""The artifact on disk: whole or not there, checked when read, and tied to the base it was fitted on."""

import copy
import json
import os

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.generation.artifact import read_artifact, write_artifact
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


def edit(folder, change):
    path = folder / "pop_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_what_is_written_is_read_back(folder):
    artifact = read_artifact(folder)
    assert (artifact.plan, artifact.kind) == (PLAN, "closed_form")
    assert set(artifact.state) == set(state())
    for name, tensor in state().items():
        assert artifact.state[name].dtype == tensor.dtype
        assert torch.equal(artifact.state[name], tensor)
    assert artifact.config["format"] == 1
    assert artifact.config["measured"] == MEASURED
    assert sorted(os.listdir(folder)) == ["README.md", "kv_projections.safetensors", "pop_config.json"]
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


def test_tied_weights_and_meta_weights_are_no_obstacle(tmp_path):
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
    with pytest.raises(InputError, match=r"kv_projections\.safetensors has another SHA-256"):
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
        (lambda config: config.update(format=2), "format 2"),
        (lambda config: config.update(format="1"), "format as '1'"),
        (lambda config: config.pop("plan"), "lacks the key plan.depth"),
        (lambda config: config["plan"].update(depth=0), "depth must be at least 1"),
        (lambda config: config["plan"].update(depth="x"), "plan.depth as 'x'"),
        (lambda config: config.update(plan=3), "lacks the key plan.depth"),
        (lambda config: config["projection"].update(kind="magic"), "projection.kind 'magic'"),
        (lambda config: config["projection"].update(tensors=[]), "projection.tensors as"),
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
    with pytest.raises(InputError, match="is no folder"):
        read_artifact(tmp_path / "nowhere")


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
        "card": "pop_lightning.generation.model_card.model_card",
        "rename": "pop_lightning.generation.artifact.os.rename",
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
    with pytest.raises(InputError, match="is no artifact"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "artifact")


def test_the_card_says_what_was_measured_and_how_to_load(folder):
    card = (folder / "README.md").read_text()
    for words in (
        "from pop_lightning import StageAwareGenerator",
        "StageAwareGenerator.from_artifact(path)",
        "Its weights are not in here",
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
