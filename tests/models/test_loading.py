"""Loading a base: what is absent, damaged or of another kind is one sentence; what is harmless loads."""

import json

import datasets
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http
from transformers import AutoTokenizer, LlamaForCausalLM

from pop_lightning import InputError, PruningPlan, StageAwareGenerator
from pop_lightning.core.errors import as_flags
from pop_lightning.data import processor
from pop_lightning.data.examples import read_examples
from pop_lightning.generation.base_identity import base_identity, check_base
from pop_lightning.models import loading
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import load_model, load_tokenizer, stored_dtype

from tests.helpers.families import build, ragged
from tests.helpers.workbench import WORDS, save_base

httpx = next(value for name, value in vars(_http).items() if name.startswith("httpx"))  # whichever version the hub uses


def pickled(folder, state):
    """The base with a pytorch_model.bin as its only weights."""
    save_base(folder)
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


DAMAGES = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a pointer of git-lfs": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
    "text": lambda data: b"hello world, no pickle" * 9,
    "noise in its head": lambda data: data[:60] + bytes(byte ^ 0x55 for byte in data[60:400]) + data[400:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_weights_are_one_sentence_that_never_advises_to_trust_them(tmp_path, kind, damage):
    file = pickled(tmp_path, build("llama").state_dict())
    assert isinstance(load_model(str(tmp_path)), LlamaForCausalLM)
    if kind == "model.safetensors":
        file.unlink()
        build("llama").save_pretrained(tmp_path)
    (tmp_path / kind).write_bytes(DAMAGES[damage]((tmp_path / kind).read_bytes()))
    with pytest.raises(InputError) as error:
        load_model(str(tmp_path))
    assert "weights that cannot be read" in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "is not a model that loads"),
        ({}, r"lacks \d+ tensors of the model .*model\.embed_tokens\.weight.* random numbers"),
    ],
)
def test_weights_of_something_else_are_refused(tmp_path, content, words):
    pickled(tmp_path, content)
    with pytest.raises(InputError, match=words):
        load_model(str(tmp_path))


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_a_tied_one_is_not(tmp_path):
    model = build("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).lm_head.weight is not None
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lacks 1 tensor .*\(lm_head\.weight\).*tie_word_embeddings"):
        load_model(str(tmp_path))


def test_tensors_of_another_shape_are_named_with_both_shapes(tmp_path):
    save_base(tmp_path)
    change_config(tmp_path, intermediate_size=40)
    with pytest.raises(InputError, match=r"lacks 12 tensors .*down_proj\.weight of \[32, 48\] instead of \[32, 40\]"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, load_tokenizer, lambda name: stored_dtype(name, "auto")])
def test_an_adapter_folder_is_refused_with_the_name_of_its_base(tmp_path, load):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(InputError, match=r"is an adapter of org/base, not a model; merge it"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, load_tokenizer, lambda name: stored_dtype(name, "auto")])
def test_a_hub_that_cannot_be_reached_is_named_as_the_reason(monkeypatch, load):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"is not on this machine, and huggingface\.co could not be reached"):
        load("org/base")
    with pytest.raises(InputError, match="could not be reached"):  # not "has none"
        load_tokenizer("org/base", required=False)


@pytest.mark.parametrize("status", [500, 503])
def test_an_error_of_the_hub_is_not_taken_for_a_base_without_a_tokenizer(monkeypatch, status):
    def answer(*_, **__):
        request = httpx.Request("GET", "https://huggingface.co/org/base")
        raise HfHubHTTPError("failed", response=httpx.Response(status, request=request))

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", answer)
    for required in (True, False):
        with pytest.raises(InputError, match=r"huggingface\.co could not be reached; check the connection"):
            load_tokenizer("org/base", required=required)


@pytest.mark.parametrize("failure", ["ConnectError", "ReadTimeout", "ProxyError"])
def test_a_failure_of_the_network_is_named_for_bases_processors_and_data(monkeypatch, failure):
    def fail(*_, **__):
        try:
            raise getattr(httpx, failure)("[Errno -2] Name or service not known")
        except httpx.TransportError as error:
            raise OSError("Can't load it") from error

    for module, name in ((loading.AutoConfig, "from_pretrained"), (processor.AutoProcessor, "from_pretrained")):
        monkeypatch.setattr(module, name, fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    for load in (load_model, processor.load_processor, read_examples):
        with pytest.raises(InputError, match=r"on this machine, and huggingface\.co could not be reached"):
            load("org/base")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_moved_base_names_the_flag_that_gives_its_new_place(tmp_path, load):
    with pytest.raises(InputError, match="does not exist: expected a folder") as error:
        load(str(tmp_path / "moved"))
    assert "give its new location with --base" in error.value.render(as_flags({"model.base": "--base"}))


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_base(tmp_path / "base")
    assert isinstance(load_model("~/base"), LlamaForCausalLM)
    assert len(load_tokenizer("~/base")) == len(WORDS)


def test_a_pad_token_beyond_the_embeddings_is_replaced_and_in_text_it_is_refused(tmp_path):
    save_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer.pad_token_id == len(WORDS)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id
    ids = loaded("w1 [PAD]", return_tensors="pt")
    with pytest.raises(InputError, match=r"token 97 has no embedding in LlamaForCausalLM, which has 97"):
        Decoder(load_model(str(tmp_path))).inputs(ids)


def test_a_base_saved_without_a_cache_generates_as_with_one():
    ids, mask = ragged([19, 7])
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = StageAwareGenerator(build("llama"), PruningPlan(2)).generate(**arguments)
    model = build("llama")
    model.config.use_cache = model.generation_config.use_cache = False
    assert torch.equal(StageAwareGenerator(model, PruningPlan(2)).generate(**arguments), expected)


def whole(model):
    return torch.compile(model, backend="eager")


def body(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def layers(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize("how", [whole, body, layers])
def test_a_compiled_base_is_the_base(how, tmp_path):
    identity = base_identity(build("llama"), "base")
    compiled = how(build("llama"))
    check_base(identity, compiled, tmp_path)
    check_base(base_identity(compiled, "base"), build("llama"), tmp_path)
    assert Decoder(compiled).name == "LlamaForCausalLM"
    with pytest.raises(InputError, match=r"has other weights in model\.embed_tokens\.weight"):
        check_base(identity, how(build("llama", seed=1)), tmp_path)
