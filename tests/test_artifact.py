"""The artifact folder: what goes in comes out, and whatever is damaged, newer or made for another base is refused."""

import json
import re

import pytest
import torch
from families import build

from pop_lightning import artifact as module
from pop_lightning.artifact import CARD, CONFIG, WEIGHTS, base_identity, check_base, read_artifact, write_artifact
from pop_lightning.errors import InputError
from pop_lightning.plan import PruningPlan

STATE = {
    "layers.3.weight": torch.arange(32 * 32, dtype=torch.float32).reshape(32, 32) / 7,
    "layers.3.bias": torch.ones(32, dtype=torch.bfloat16),
}
MEASURED = {"verify": {"drop": 0.0031, "upper": float("nan")}, "speedup": 1.5, "depths": [1, 2]}


@pytest.fixture
def model():
    return build("llama")


def write(folder, model, **changes):
    values = {
        "plan": PruningPlan(2),
        "kind": "closed_form",
        "state": STATE,
        "base": base_identity(model, "org/base", "main"),
        "recipe": {"seed": 0},
        "measured": MEASURED,
    }
    return write_artifact(folder, **(values | changes))


@pytest.fixture
def folder(tmp_path, model):
    return write(tmp_path / "artifact", model)


def edit(folder, change):
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def test_round_trip(folder, model):
    artifact = read_artifact(folder)
    assert artifact.plan == PruningPlan(2, 1)
    assert artifact.kind == "closed_form"
    assert artifact.state.keys() == STATE.keys()
    assert all(torch.equal(artifact.state[name], STATE[name]) for name in STATE)
    assert artifact.config["base"]["id"] == "org/base"
    assert artifact.config["measured"]["verify"] == {"drop": 0.0031, "upper": None}
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, WEIGHTS, CARD])
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]
    check_base(artifact, model)


def test_reuse_stores_no_tensor(tmp_path, model):
    artifact = read_artifact(write(tmp_path / "artifact", model, kind="reuse", state={}))
    assert artifact.kind == "reuse"
    assert artifact.state == {}


def test_card_shows_figures_and_how_to_load(folder):
    card = (folder / CARD).read_text()
    assert "| verify.drop | 0.0031 |" in card
    assert "from pop_lightning import StageAwareGenerator" in card
    assert "base_model: org/base" in card
    assert str(folder) not in card


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_same_base_in_another_dtype_is_accepted(tmp_path, family, dtype, attention):
    artifact = read_artifact(write(tmp_path / "artifact", build(family)))
    check_base(artifact, build(family, attention, dtype))
    half = read_artifact(write(tmp_path / "half", build(family, dtype=dtype)))
    check_base(half, build(family, attention))


def test_saved_and_loaded_base_is_accepted(tmp_path, folder, model):
    model.save_pretrained(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    check_base(read_artifact(folder), loaded)


def test_other_weights_refused(folder):
    with pytest.raises(InputError, match=r"org/base.*another: the values of model.embed_tokens.weight differ"):
        check_base(read_artifact(folder), build("llama", seed=1))


def test_other_class_refused(folder):
    with pytest.raises(InputError, match="class is MistralForCausalLM, expected LlamaForCausalLM"):
        check_base(read_artifact(folder), build("mistral"))


def test_other_config_refused(folder, model):
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(InputError, match="config hashes to"):
        check_base(read_artifact(folder), model)


def test_other_layer_count_refused(folder, model):
    model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match="number of layers is 3, expected 4"):
        check_base(read_artifact(folder), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_rank_one_update_refused(folder, dtype):
    model = build("llama", dtype=dtype)
    weight = model.model.layers[2].self_attn.q_proj.weight
    generator = torch.Generator().manual_seed(3)
    update = torch.outer(torch.randn(weight.shape[0], generator=generator), torch.randn(32, generator=generator))
    with torch.no_grad():
        weight.add_(0.02 * update.to(dtype))
    with pytest.raises(InputError, match=re.escape("model.layers.2.self_attn.q_proj.weight differ")):
        check_base(read_artifact(folder), model)


def test_fingerprint_is_bounded(model):
    fingerprint = base_identity(model, "x")["fingerprint"]
    assert len(fingerprint) == 4 * 7 + 2
    assert all(len(values) == 8 for values in fingerprint.values())


def test_truncated(folder):
    content = (folder / WEIGHTS).read_bytes()
    for length in (0, 4, 20, len(content) // 2, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(InputError, match="is damaged"):
            read_artifact(folder)


def test_damaged_although_the_hash_agrees(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    edit(folder, lambda config: config["projection"].update(sha256=module._sha256(folder / WEIGHTS)))
    with pytest.raises(InputError, match="cannot be read"):
        read_artifact(folder)


def test_flipped_byte(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-100] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        read_artifact(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"{re.escape(name)} is missing"):
        read_artifact(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match="no artifact stands at"):
        read_artifact(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "\x00", "[1]", "3"])
def test_config_is_no_json_object(folder, text):
    (folder / CONFIG).write_text(text)
    with pytest.raises(InputError, match=r"not JSON|JSON object"):
        read_artifact(folder)


def test_newer_keys_are_tolerated(folder):
    def change(config):
        config["later"] = {"a": 1}
        for section in ("plan", "projection", "base"):
            config[section]["later"] = 1
        config["projection"]["tensors"]["layers.3.bias"]["later"] = 1

    edit(folder, change)
    assert read_artifact(folder).plan == PruningPlan(2)


def test_newer_format_refused(folder):
    edit(folder, lambda config: config.update(format=2))
    with pytest.raises(InputError, match=r"format 2, this version .* reads up to 1"):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("section", "key"), [(section, key) for section, keys in module._REQUIRED.items() for key in [None, *keys]]
)
def test_missing_keys(folder, section, key):
    edit(folder, lambda config: config.pop(section) if key is None else config[section].pop(key))
    with pytest.raises(InputError, match=f"no section {section}" if key is None else rf"{section}\.{key} in"):
        read_artifact(folder)


def test_tensors_other_than_stated(folder):
    edit(folder, lambda config: config["projection"]["tensors"]["layers.3.bias"].update(shape=[31]))
    with pytest.raises(InputError, match=re.escape("bfloat16 [32] in")):
        read_artifact(folder)
    edit(folder, lambda config: config["projection"]["tensors"].pop("layers.3.bias"))
    with pytest.raises(InputError, match="missing in pop_config"):
        read_artifact(folder)


def test_nothing_half_written(tmp_path, model, monkeypatch):
    def fail(config):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_card", fail)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        write(tmp_path / "artifact", model)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_artifact(folder, model, monkeypatch):
    def fail(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_card", fail)
    with pytest.raises(KeyboardInterrupt):
        write(folder, model, plan=PruningPlan(3))
    assert read_artifact(folder).plan == PruningPlan(2)
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]


def test_replaces_an_old_artifact(folder, model):
    write(folder, model, plan=PruningPlan(3))
    assert read_artifact(folder).plan == PruningPlan(3)
    assert [path.name for path in folder.parent.iterdir()] == ["artifact"]
