"""Artifacts on the hub, against a stand-in of its API on this machine."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager

from pop_lightning import CalibrationData, InputError, PruningPlan, StageAwareGenerator
from pop_lightning.cli import fit, generate
from pop_lightning.data.rows import until_end
from pop_lightning.generation import hub as hub_room
from pop_lightning.generation.artifact import write_artifact
from pop_lightning.generation.base_identity import base_identity
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import load_model, load_tokenizer, plain_generate
from pop_lightning.run.inputs import respond

from tests.helpers.families import ragged
from tests.helpers.hub import TOKEN, serving
from tests.helpers.workbench import arguments

REPO = "user/llama-pop"
FILES = ["README.md", "custom_generate/generate.py", "kv_projections.safetensors", "pop_config.json"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, an account that is logged in, and an empty cache."""
    with serving() as (hub, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.HfApi, "__init__", _api(address))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def _api(address):
    init = huggingface_hub.hf_api.HfApi.__init__
    return lambda self, endpoint=None, **options: init(self, endpoint or address, **options)


@pytest.fixture(scope="module")
def artifact(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    verified = {"metric": "agreement", "value": 0.002, "bound": 0.009, "confidence": 0.95, "rows": 400, "prompts": 400}
    write_artifact(
        folder,
        plan=PruningPlan(2),
        kind="reuse",
        state={},
        base=base_identity(load_model(str(base)), str(base)),
        recipe={"data": {"calibration": "org/rows"}},
        measured={"verified": verified | {"max_drop": 0.01}},
    )
    return folder


def answers(generate):
    ids, mask = ragged([19, 7])
    return generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


def test_an_artifact_is_published_whole_with_a_card_in_the_hubs_own_fields(hub, artifact):
    generator = StageAwareGenerator.from_artifact(artifact)
    assert generator.push_to_hub(REPO, private=True).endswith(f"/{REPO}/commit/{hub.branches[REPO]['main']}")
    files = hub.files(REPO)
    assert sorted({*files} - {".gitattributes"}) == FILES
    assert hub.private[REPO] is True
    for name in FILES[1:]:
        assert files[name] == (artifact / name).read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "pop-lightning"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.metric_args["bound"]) == ("agreement_loss", 0.002, 0.009)
    assert result.dataset_type == "org/rows"
    assert f'StageAwareGenerator.from_artifact("{REPO}")' in card.text
    assert f'custom_generate="{REPO}"' in card.text
    assert "path/to" not in card.text


def test_an_artifact_of_the_hub_generates_as_its_folder_does_and_then_offline(hub, artifact, monkeypatch):
    expected = StageAwareGenerator.from_artifact(artifact)
    expected.push_to_hub(REPO)
    first = StageAwareGenerator.from_artifact(REPO)
    assert first.plan == expected.plan
    assert torch.equal(answers(first.generate), answers(expected.generate))
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert StageAwareGenerator.from_artifact(REPO).plan == expected.plan
    assert len(hub.requests) == asked


def test_revisions_are_kept_apart(hub, artifact, base, monkeypatch):
    StageAwareGenerator.from_artifact(artifact).push_to_hub(REPO)
    commit = hub.branches[REPO]["main"]
    StageAwareGenerator(load_model(str(base)), PruningPlan(3)).push_to_hub(REPO, revision="deeper", message="depth 3")
    StageAwareGenerator(load_model(str(base)), PruningPlan(1)).push_to_hub(REPO)
    for revision, depth in (("deeper", 3), (commit, 2), ("main", 1), (None, 1)):
        assert StageAwareGenerator.from_artifact(REPO, revision=revision).plan.depth == depth
    with pytest.raises(InputError, match="has no revision 'other'"):
        StageAwareGenerator.from_artifact(REPO, revision="other")
    with pytest.raises(InputError, match="names a version of an artifact on the hub"):
        StageAwareGenerator.from_artifact(artifact, revision="main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert StageAwareGenerator.from_artifact(REPO, revision=commit).plan.depth == 2


def test_a_generator_whose_base_changed_publishes_no_certificate(hub, artifact):
    generator = StageAwareGenerator.from_artifact(artifact)
    generator.model.model.layers[3].self_attn.v_proj.weight.data += 1
    generator.push_to_hub(REPO)
    assert json.loads(hub.files(REPO)["pop_config.json"])["measured"] == {}


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(503, "huggingface.co could not be reached"), (403, "does not let this account write to user/llama-pop: log in")],
)
def test_a_hub_that_fails_or_refuses_is_one_sentence(hub, artifact, status, sentence):
    hub.status = status
    with pytest.raises(InputError, match=sentence):
        hub_room.push(artifact, REPO)


def test_what_cannot_be_read_or_written_is_named(hub, artifact, monkeypatch):
    with pytest.raises(InputError, match="found 'not one'"):
        hub_room.push(artifact, "not one")
    with pytest.raises(InputError, match="user/none is neither a folder nor a repository of the hub"):
        StageAwareGenerator.from_artifact("user/none")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="does not let this account write"):
        hub_room.check_push(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nor in the hub's cache on this machine, and huggingface\.co could not be"):
        StageAwareGenerator.from_artifact("user/none")


def test_the_command_line_reads_an_artifact_of_the_hub(hub, artifact, capsys):
    hub_room.push(artifact, REPO, revision="v1")
    assert generate.main(["prompt", "w1 w2 w3", "--artifact", REPO, "--revision", "v1", "--max_new_tokens", "4"]) == 0
    there = capsys.readouterr().out
    assert generate.main(["prompt", "w1 w2 w3", "--artifact", str(artifact), "--max_new_tokens", "4"]) == 0
    assert there == capsys.readouterr().out


def test_a_run_publishes_its_artifact_and_report_and_a_resumed_one_again(hub, base, data, tmp_path, capsys):
    command = [*arguments(base, data, tmp_path / "run", budget__candidates=[2]), "--push", REPO]
    assert fit.main(command) == 0
    assert re.search(
        rf"\npublished: http://127\S+/{REPO}/commit/\w+\nnote: the card names the base /", capsys.readouterr().out
    )
    files = hub.files(REPO)
    assert files["report.html"] == (tmp_path / "run/report.html").read_bytes()
    assert files["pop_config.json"] == (tmp_path / "run/artifact/pop_config.json").read_bytes()
    hub.branches.clear()
    assert fit.main([*command, "--resume"]) == 0
    assert set(hub.files(REPO)) == set(files)


def test_a_run_that_could_not_publish_is_refused_before_it_begins(hub, base, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert fit.main([*arguments(base, data, tmp_path / "run"), "--push", REPO]) == 2
    assert "does not let this account write to user/llama-pop: log in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- custom_generate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["a folder", "the hub"])
def test_a_plain_model_is_pruned_by_custom_generate(hub, artifact, base, monkeypatch, tmp_path, place):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = answers(model.generate)
    expected = answers(StageAwareGenerator.from_artifact(artifact).generate)
    where = str(artifact)
    if place == "the hub":
        hub_room.push(artifact, REPO)
        where = REPO
    pruned = {"custom_generate": where, "trust_remote_code": True}
    rows = []
    hook = model.model.layers[3].register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[1]))
    for _ in range(2):
        rows.clear()
        assert torch.equal(answers(lambda **given: model.generate(**given, **pruned)), expected)
    assert set(rows) == {1}  # the boundary, not 19 tokens, and no check of the base: the generator was there already
    hook.remove()
    assert torch.equal(answers(model.generate), plain)


@pytest.fixture
def together(artifact, base, tmp_path, monkeypatch):
    """A folder that holds the base's files and the artifact's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = shutil.copytree(base, tmp_path / "together")
    return shutil.copytree(artifact, folder, dirs_exist_ok=True)


def test_an_artifact_next_to_the_weights_prunes_a_trusted_model(together, artifact, base):
    plain = answers(AutoModelForCausalLM.from_pretrained(together).generate)
    expected = answers(StageAwareGenerator.from_artifact(artifact).generate)
    assert not torch.equal(plain, expected)
    model = AutoModelForCausalLM.from_pretrained(together, trust_remote_code=True)
    assert torch.equal(answers(model.generate), expected)
    assert torch.equal(answers(lambda input_ids, **given: model.generate(input_ids, **given)), expected)
    assert torch.equal(answers(plain_generate(model)), plain)
    deeper = StageAwareGenerator(model, PruningPlan(3))
    assert torch.equal(
        answers(deeper.generate), answers(StageAwareGenerator(load_model(str(base)), PruningPlan(3)).generate)
    )
    with deeper.full_model():
        assert torch.equal(answers(deeper.generate), plain)


def test_responses_of_the_full_model_are_not_pruned_by_an_artifact_next_to_its_weights(together, base, data, tmp_path):
    StageAwareGenerator(load_model(str(base)), PruningPlan(1)).save_pretrained(tmp_path / "deep")
    shutil.copytree(tmp_path / "deep", together, dirs_exist_ok=True)
    rows = CalibrationData(str(data), load_tokenizer(str(base)), limit=60)
    rows.setup()
    some, trusted = list(rows.rows())[:8], load_model(str(together), trust_remote_code=True)
    inputs = Decoder(trusted).inputs(rows.batch(some))
    settings = {"max_new_tokens": rows.max_response_tokens, "do_sample": False, "pad_token_id": rows.pad_token_id}
    plain, pruned = (run(**inputs, **settings) for run in (plain_generate(trusted), trusted.generate))
    assert plain.tolist() != pruned.tolist()
    new = plain[:, rows.batch(some)["prompt_length"] :].tolist()
    assert respond(Decoder(trusted), rows, some) == [until_end(tokens, rows.ends) for tokens in new]


@pytest.mark.parametrize("streamed", [False, True])
def test_transformers_serve_answers_with_a_pruned_prefill(together, artifact, streamed):
    expected = StageAwareGenerator.from_artifact(artifact)
    manager = ModelManager(device="cpu", trust_remote_code=True)
    model, tokenizer = manager.load_model_and_processor(manager.process_model_name(str(together)))
    inputs = {"input_ids": torch.arange(5, 24)[None], "attention_mask": torch.ones(1, 19, dtype=torch.long)}
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)

    async def ask():
        run = GenerateManager()
        if not streamed:
            return (await run.generate_non_streaming(model, tokenizer, inputs, config, "1"))[0]
        queue, _ = run.generate_streaming(model, tokenizer, inputs, config, "1")
        pieces = []
        while isinstance(piece := await queue.get(), str):
            pieces.append(piece)
        assert piece is None  # otherwise an error
        return "".join(pieces)

    try:
        pruned, plain = (
            tokenizer.decode(run(**inputs, generation_config=config)[0, 19:], skip_special_tokens=True)
            for run in (expected.generate, plain_generate(model))
        )
        assert asyncio.run(ask()) == pruned != plain
    finally:
        manager.shutdown()


def test_custom_generate_needs_consent(artifact, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="trust_remote_code"):
        answers(lambda **given: model.generate(**given, custom_generate=str(artifact)))


@pytest.mark.full
def test_a_process_of_its_own_reads_and_writes_through_hf_endpoint(artifact, tmp_path):
    code = (
        "from pop_lightning import StageAwareGenerator as G\n"
        f"G.from_artifact({str(artifact)!r}).push_to_hub({REPO!r})\n"
        f"print(G.from_artifact({REPO!r}).plan.depth)"
    )
    with serving() as (hub, address):
        own = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | own, capture_output=True, text=True, timeout=300
        )
        assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
        assert {*FILES} <= {*hub.files(REPO)}
    shutil.rmtree(tmp_path)
