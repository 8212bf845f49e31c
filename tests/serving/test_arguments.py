"""What is decided and refused before an engine starts; nothing here needs vLLM."""

import ast
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pop_lightning import PruningPlan, StageAwareGenerator
from pop_lightning.cli import serve
from pop_lightning.core.errors import InputError
from pop_lightning.generation.artifact import read_artifact
from pop_lightning.serving import engine_args, private
from pop_lightning.serving.arguments import check_config, plan_of

from tests.helpers import served

SERVING = Path(private.__file__).parent
BUNDLED = served.ROOT / "checkpoints" / "facts-gemma3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("served")
    served.build("llama", found, PruningPlan(3, 0.1))
    return found


def test_arguments_name_the_base_the_class_and_the_plan(folder):
    found = engine_args(folder / "artifact", max_model_len=99, hf_overrides={"rope_theta": 5.0})
    assert found == {
        "model": str(folder / "base"),
        "hf_overrides": {
            "rope_theta": 5.0,
            "architectures": ["PopLlamaForCausalLM"],
            "pop": {"artifact": str(folder / "artifact"), "plan": {"depth": 3, "boundary": 0.1}},
        },
        "max_model_len": 99,
    }
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(pop=found["hf_overrides"]["pop"])))
    assert plan_of(config) == PruningPlan(3, 0.1)
    assert plan_of(SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace()))) is None


def test_a_bundled_base_is_found(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    StageAwareGenerator(model, PruningPlan(6)).save_pretrained(tmp_path, base="bundled:facts-gemma3")
    assert Path(engine_args(tmp_path)["model"]).samefile(BUNDLED)


def test_only_one_file_names_vllm():
    for path in SERVING.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "vllm" for name in names), path.name


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (PruningPlan(3, 1, 4), r"salient: 4\), which is not served yet: fit without them \(salient: 0, or budget"),
        (PruningPlan(3, 0), r"boundary 0.*fit with a boundary of at least 1 \(boundary: 1\)"),
        (PruningPlan(served.LAYERS), "prunes nothing"),
    ],
)
def test_a_plan_that_cannot_be_served_is_refused(folder, tmp_path, plan, sentence):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    StageAwareGenerator(model, plan).save_pretrained(tmp_path / "artifact", base=str(folder / "base"))
    with pytest.raises(InputError, match=sentence):
        engine_args(tmp_path / "artifact")


def test_another_base_is_refused(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "base", num_hidden_layers=5)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="num_hidden_layers is 5 there and 6 in the artifact"):
        engine_args(folder / "artifact", tmp_path)
    served.FAMILIES["qwen3"]().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"\(Qwen3ForCausalLM, 6 layers\) is of another class"):
        engine_args(folder / "artifact", tmp_path)
    with pytest.raises(InputError, match=r"no configuration of the base .*nothing"):
        engine_args(folder / "artifact", tmp_path / "nothing")


def test_a_damaged_artifact_is_refused(folder, tmp_path):
    shutil.copytree(folder / "artifact", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "pop_config.json").read_text())
    config["plan"]["depth"] = 2
    (tmp_path / "pop_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not match its own checksum"):
        engine_args(tmp_path)


def test_the_checkpoint_s_tensors_are_compared_while_they_are_read(folder):
    artifact = read_artifact(folder / "artifact")
    tensors = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    check = artifact.checkpoint_check("base")
    assert dict(check.watch(tensors.items())).keys() == tensors.keys()
    check.finish(quantized=False)

    name = "model.layers.2.mlp.down_proj.weight"
    with pytest.raises(InputError, match=f"the given base base has other weights in {name}, as after a merged"):
        list(artifact.checkpoint_check("base").watch((tensors | {name: tensors[name] + 1e-3}).items()))

    check = artifact.checkpoint_check("base")
    list(check.watch((each, tensor) for each, tensor in tensors.items() if each != name))
    with pytest.raises(InputError, match=f"names its weights differently: {name} was expected"):
        check.finish(quantized=False)
    check.finish(quantized=True)
    half = {each: tensor.to(torch.bfloat16) for each, tensor in tensors.items()}
    assert len(list(artifact.checkpoint_check("base").watch(half.items()))) == len(half)


def configuration(**changes):
    """A ``VllmConfig`` as far as it is checked; ``changes`` are ``part__field`` values."""
    parts = {
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "enable_expert_parallel": False,
            "use_ubatching": False,
        },
        "model_config": {
            "runner_type": "generate",
            "is_multimodal_model": False,
            "uses_mrope": False,
            "enable_prompt_embeds": False,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
        "attention_config": {"hisparse_config": None},
        "load_config": {"load_format": "auto"},
        "compilation_config": {"mode": None},
    }
    whole = {"lora_config": None, "speculative_config": None, "kv_transfer_config": None, "ec_transfer_config": None}
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            parts[part][field] = value
        else:
            whole[part] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**fields) for name, fields in parts.items()})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
        ({"parallel_config__data_parallel_size": 2}, "--data-parallel-size"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"parallel_config__enable_expert_parallel": True}, "--enable-expert-parallel"),
        ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "eagle3"),
        ({"speculative_config": SimpleNamespace(method="mtp")}, "mtp"),
        ({"speculative_config": SimpleNamespace(method="draft_model")}, "draft_model"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"ec_transfer_config": object()}, "--ec-transfer-config"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"attention_config__hisparse_config": object()}, "HiSparse"),
        ({"load_config__load_format": "dummy"}, "--load-format dummy"),
        ({"model_config__runner_type": "pooling"}, "--runner pooling"),
        ({"model_config__is_multimodal_model": True}, "images"),
        ({"model_config__uses_mrope": True}, "M-RoPE"),
        ({"model_config__enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"compilation_config__mode": SimpleNamespace(name="STOCK_TORCH_COMPILE")}, "STOCK_TORCH_COMPILE"),
    ],
)
def test_features_that_do_not_work_are_refused_by_name(change, named):
    with pytest.raises(InputError, match=f"the pruned prefill does not work with .*{named}"):
        check_config(configuration(**change))


def test_features_that_work_are_not_refused():
    check_config(configuration())
    check_config(configuration(speculative_config=SimpleNamespace(method="ngram"), load_config__load_format="auto"))


def test_a_missing_name_of_vllm_is_named():
    assert private.look_up("json.encoder:JSONEncoder.encode(o)") is json.JSONEncoder.encode
    with pytest.raises(InputError, match=r"lacks json.encoder.JSONEncoder.gone; expected a version with it, such as"):
        private.look_up("json.encoder:JSONEncoder.gone")
    with pytest.raises(InputError, match=r"lacks json.encoder.JSONEncoder.encode with the argument gone"):
        private.look_up("json.encoder:JSONEncoder.encode(gone)")
    with pytest.raises(InputError, match=r"lacks json.gone.encode"):
        private.look_up("json.gone:encode")


def run(capsys, *words):
    code = serve.main([str(word) for word in words])
    return code, capsys.readouterr().err


def test_pop_serve_says_what_is_wrong(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(private, "check_installed", lambda: None)
    monkeypatch.setattr(serve, "_serve", lambda words: pytest.fail("must not start"))
    code, said = run(capsys, tmp_path)
    assert code == 2
    assert "pop_config.json is missing" in said
    code, said = run(capsys, folder / "artifact", "--model", "other")
    assert code == 2
    assert "--model has no effect" in said
    code, said = run(capsys, folder / "artifact", "--hf-overrides", "[1]")
    assert code == 2
    assert "--hf-overrides must be a JSON object" in said


def test_pop_serve_needs_vllm(folder, capsys, monkeypatch):
    monkeypatch.setattr(private.importlib.util, "find_spec", lambda name: None)
    code, said = run(capsys, folder / "artifact")
    assert code == 2
    assert "pip install 'pop-lightning[vllm]'" in said


def test_pop_serve_passes_everything_else_on(folder, capsys, monkeypatch):
    words = []
    monkeypatch.setattr(private, "check_installed", lambda: None)
    monkeypatch.setattr(serve, "_serve", words.extend)
    given = ("--port", "80", "--hf-overrides", '{"a": 1}', "--max-model-len=99")
    assert run(capsys, folder / "artifact", *given)[0] == 0
    assert words[0] == str(folder / "base")
    overrides = json.loads(words[words.index("--hf-overrides") + 1])
    assert overrides["a"] == 1
    assert overrides["architectures"] == ["PopLlamaForCausalLM"]
    assert words[3:] == ["--port", "80", "--max-model-len=99"]


@pytest.mark.parametrize("given", [True, False])
def test_pop_serve_names_a_folder_for_the_counters_of_all_processes(folder, capsys, monkeypatch, tmp_path, given):
    seen = []
    monkeypatch.setattr(private, "check_installed", lambda: None)
    monkeypatch.setattr(serve, "_serve", lambda words: seen.append(Path(os.environ[serve.METRICS])) or seen[0].stat())
    monkeypatch.delenv(serve.METRICS, raising=False)
    if given:
        monkeypatch.setenv(serve.METRICS, str(tmp_path))
    assert run(capsys, folder / "artifact")[0] == 0
    assert (seen == [tmp_path]) == given
    assert seen[0].exists() == given
    assert (serve.METRICS in os.environ) == given
