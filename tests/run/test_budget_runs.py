"""Whole runs whose budget adapts: trained depths, a requested speedup, a chosen boundary, resuming in the middle."""

import json
import random

import pytest
import torch

from pop_lightning import StageAwareGenerator
from pop_lightning.cli import fit
from pop_lightning.core.plan import PruningPlan
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.pruning.flops import speedup
from pop_lightning.run import pipeline, trainers

from tests.helpers.families import COMMON
from tests.helpers.ranked import TENSORS, exported
from tests.helpers.workbench import WORDS, arguments, save_rows, snapshot

TIGHT = {"budget__nll_cap": 0.3}  # a cap that few prompts can certify a small budget with
TRAINED = TIGHT | {
    "projection__kind": "full",
    "projection__steps": 10,
    "projection__learning_rate": 0.003,
    "projection__checkpoint_every": 4,
    "projection__refit": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prompts without responses: the full model writes them, so that pruning has a loss that training can reduce."""
    return save_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows=160, responses=False)


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """Run ``pop-fit``; returns the exit code, the folder and its metrics, None where there are none."""

    def run(*flags, output=None, **changes):
        output = output or tmp_path_factory.mktemp("run") / "run"
        changes = {"data__max_response_tokens": 6} | changes
        code = fit.main([*arguments(base, data, output, **changes), *flags])
        metrics = output / "metrics.json"
        return code, output, json.loads(metrics.read_text()) if metrics.is_file() else None

    return run


@pytest.fixture(scope="module")
def untrained(run):
    """What closed form loses where nothing is trained."""
    code, _, metrics = run(projection__refit=False, budget__max_drop=0.29, **TIGHT)
    assert code == 0
    return {entry["depth"]: entry for entry in metrics["curve"] if entry["projection"] == "closed_form"}


def entry_of(metrics, depth, projection):
    return next(e for e in metrics["curve"] if (e["depth"], e["projection"]) == (depth, projection))


def decided(metrics, *words):
    return [line for line in metrics["decisions"] if all(word in line for word in words)]


@pytest.fixture(scope="module")
def just_out_of_reach(untrained):
    """A budget that depth 2 misses by a little without training, and depth 1 by far."""
    return 0.97 * untrained[2]["expected_bound"]


@pytest.fixture(scope="module")
def adapted(run, just_out_of_reach):
    code, output, metrics = run(**TRAINED, budget__max_drop=just_out_of_reach)
    assert code in (0, 3)  # what the verify rows say is theirs
    return output, metrics


@pytest.fixture(scope="module")
def extended(run, untrained):
    changes = TRAINED | {"budget__max_drop": 0.6 * untrained[2]["loss"], "budget__extensions": 1}
    return changes, run(**changes)[1]


def test_training_brings_a_depth_within_and_the_next_one_backs_off(adapted, untrained):
    output, metrics = adapted
    assert decided(metrics, "depth 2 (closed_form)", "train it")
    assert decided(metrics, "depth 2 (after", "go deeper")
    assert decided(metrics, "depth 1 (closed_form)", "train it")
    assert decided(metrics, "depth 1 (after", "back off to depth 2")
    trained = entry_of(metrics, 2, "full")
    assert trained["loss"] < entry_of(metrics, 2, "closed_form")["loss"]
    assert entry_of(metrics, 2, "closed_form")["loss"] == untrained[2]["loss"]
    assert [each["projection"] for each in metrics["verification"]] == ["full"]
    assert (trained["steps"], trained["rounds"][0]["loss"]) == (10, trained["loss"])
    assert all(line in (output / "report.html").read_text() for line in metrics["decisions"] if "<" not in line)


def test_a_close_training_continues_for_as_many_steps_again(extended):
    metrics = json.loads((extended[1] / "metrics.json").read_text())
    assert metrics["depth"] is None
    assert decided(metrics, "after 10 steps", "train on")
    assert [each["steps"] for each in entry_of(metrics, 2, "full")["rounds"]] == [10, 20]
    assert entry_of(metrics, 2, "full")["loss"] == min(e["loss"] for e in entry_of(metrics, 2, "full")["rounds"])


def test_a_depth_that_keeps_the_budget_is_exported_with_the_projections_that_were_verified(run, untrained):
    code, output, metrics = run(**TRAINED | {"projection__steps": 2}, budget__max_drop=untrained[2]["bound"] * 1.2)
    assert code == 0
    assert metrics["depth"] == 2
    trained = [entry["depth"] for entry in metrics["curve"] if entry["projection"] == "full"]
    assert 1 in trained  # the next deeper one was tried
    generator = StageAwareGenerator.from_artifact(output / "artifact")
    assert generator.projections.kind == metrics["projection"]


# --- resuming -------------------------------------------------------------------------------------------------------


def same_result(first, second):
    (one, there), (two, here) = ((each, json.loads((each / "metrics.json").read_text())) for each in (first, second))
    timed = ("ttft", "sha256", "about")  # what differs between two runs in two folders
    assert {k: v for k, v in there.items() if k not in timed} == {k: v for k, v in here.items() if k not in timed}
    old, new = snapshot(one), snapshot(two)
    names = [name for name in old if name.startswith("state/") and name.endswith(".safetensors")]
    assert names
    for name in names:
        assert old[name] == new.get(name), name
    assert (one / TENSORS).exists() == (two / TENSORS).exists()
    if (one / TENSORS).exists():
        assert exported(one) == exported(two)


@pytest.mark.parametrize(
    ("stage", "call"),
    [
        ("train", 2),
        *[pytest.param(*each, marks=pytest.mark.full) for each in (("measure", 2), ("measure", 3))],
        pytest.param("_open_verify", 1, marks=pytest.mark.full),
    ],
)
def test_an_adapting_run_stopped_between_stages_resumes_to_the_same_result(
    run, adapted, just_out_of_reach, tmp_path, monkeypatch, stage, call
):
    calls, whole = [], getattr(pipeline, stage)

    def stopping(*args, **kwargs):
        calls.append(stage)
        if len(calls) == call:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    changes = TRAINED | {"budget__max_drop": just_out_of_reach}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, stage, stopping)
        assert run(output=tmp_path / "run", **changes)[0] == 130
    assert run("--resume", output=tmp_path / "run", **changes)[0] in (0, 3)
    same_result(adapted[0], tmp_path / "run")


@pytest.mark.parametrize("step", [13, *[pytest.param(step, marks=pytest.mark.full) for step in (9, 10, 19)]])
def test_an_extension_stopped_in_the_middle_resumes_to_the_same_bytes(run, extended, tmp_path, monkeypatch, step):
    whole = KVProjectionTraining.training_step

    def stopping(module, batch, index):
        if module.global_step == step:
            raise KeyboardInterrupt
        return whole(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(KVProjectionTraining, "training_step", stopping)
        assert run(output=tmp_path / "run", **extended[0])[0] == 130
    run("--resume", output=tmp_path / "run", **extended[0])
    same_result(extended[1], tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("every", [5, 7])
def test_a_round_whose_last_checkpoint_was_not_written_resumes_to_the_same_bytes(
    run, extended, tmp_path, monkeypatch, every
):
    def interrupt(*args):
        raise KeyboardInterrupt

    changes = extended[0] | {"projection__checkpoint_every": every}
    with monkeypatch.context() as patch:
        patch.setattr(trainers._Checkpoints, "on_train_end", interrupt)
        assert run(output=tmp_path / "run", **changes)[0] == 130
    run("--resume", output=tmp_path / "run", **changes)
    same_result(extended[1], tmp_path / "run")


def test_a_verify_split_that_was_opened_is_not_opened_again(run, tmp_path, monkeypatch):
    changes = {"projection__kind": "reuse"}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compare", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(output=tmp_path / "run", **changes)[0] == 130
    monkeypatch.setattr(pipeline, "_open_verify", lambda *args: pytest.fail("opened again"))
    code, output, metrics = run("--resume", output=tmp_path / "run", **changes)
    assert code == 0
    assert metrics["verified"]["rows"] == metrics["rows"]["verify"]
    assert (output / "artifact").is_dir()


# --- the second target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["closed_form", "lora"])
def test_a_requested_speedup_uses_the_largest_depth_that_reaches_it(run, kind, capsys):
    changes = {"projection__kind": kind, "projection__steps": 4, "budget__max_drop": 1e-9, "budget__speedup": 1.5}
    code, output, metrics = run(**changes)
    assert code == 0  # max_drop is no condition
    generator = StageAwareGenerator.from_artifact(output / "artifact")
    tokens = metrics["arithmetic"]["prompt_tokens"]
    reached = [d for d in (3, 2, 1) if speedup(generator.decoder, PruningPlan(d), tokens) >= 1.5]
    assert metrics["depth"] == generator.plan.depth == max(reached)
    assert metrics["arithmetic"]["ratio"] == pytest.approx(speedup(generator.decoder, generator.plan, tokens))
    assert {entry["projection"] for entry in metrics["curve"]} == {"reuse", "closed_form", kind}
    assert metrics["projection"] == min(metrics["curve"], key=lambda e: (e["loss"], e["kl"]))["projection"]
    assert [each["passed"] for each in metrics["verification"]] == [None]
    assert metrics["verified"]["bound"] >= metrics["verified"]["value"]
    out = capsys.readouterr().out
    assert f"{metrics['arithmetic']['ratio']:.2f}x counted at {tokens} prompt tokens (1.50x requested)" in out
    assert "Requested prefill speedup: 1.5" in (output / "artifact" / "README.md").read_text()


def test_a_speedup_that_no_depth_reaches_is_refused_with_the_largest(run, tmp_path, capsys):
    code, output, _ = run(output=tmp_path / "run", budget__speedup=50.0)
    assert code == 2
    message = capsys.readouterr().err
    assert "budget.speedup 50" in message
    assert "at depth 1 and boundary 1" in message
    assert not output.exists()


# --- the boundary ---------------------------------------------------------------------------------------------------


def test_loss_and_cost_at_each_boundary_are_measured_at_the_chosen_depth(run):
    _, output, metrics = run(projection__kind="reuse", budget__boundaries=[1, 4, 8, 64], boundary=2)
    assert [each["boundary"] for each in metrics["boundaries"]] == [1, 2, 4, 8]  # 64 leaves no context
    assert {each["depth"] for each in metrics["boundaries"]} == {metrics["depth"]}
    speedups = [each["speedup"] for each in metrics["boundaries"]]
    assert speedups == sorted(speedups, reverse=True)
    assert speedups[1] == pytest.approx(metrics["arithmetic"]["ratio"])
    fixed = entry_of(metrics, metrics["depth"], "reuse")
    assert metrics["boundaries"][1]["loss"] == fixed["loss"]
    assert metrics["boundaries"][-1]["kl"] < metrics["boundaries"][0]["kl"]
    assert "counted speedup" in (output / "report.html").read_text()


def test_an_automatic_boundary_makes_a_deeper_pruning_possible(run, untrained, capsys):
    limit = 0.8 * untrained[2]["expected_bound"]  # boundary 1 misses it at depth 2
    code, output, metrics = run(boundary="auto", budget__boundaries=[1, 4, 8], budget__max_drop=limit, **TIGHT)
    chosen = metrics["boundary"]
    assert chosen > 1
    assert {entry["boundary"] for entry in metrics["curve"]} == {chosen}
    assert not decided(metrics, "search: boundary 1 is expected to keep the budget")
    assert decided(metrics, f"search: boundary {chosen} is chosen")
    assert "comparing boundaries" not in capsys.readouterr().out  # the search has measured them
    shown = metrics["arithmetic"]["depth"]
    searched = {
        plan["boundary"]: plan["loss"]
        for plan in metrics["plans"]
        if (plan["depth"], plan["projection"]) == (shown, metrics["projection"])
    }
    assert {each["boundary"]: each["loss"] for each in metrics["boundaries"]} == searched
    assert list(searched) == [1, 4, 8]
    if code == 0:
        assert StageAwareGenerator.from_artifact(output / "artifact").plan == PruningPlan(2, chosen)


def test_an_automatic_boundary_works_with_a_requested_speedup(run):
    code, output, metrics = run(boundary="auto", budget__boundaries=[1, 8], budget__speedup=1.15)
    assert code == 0
    plan = StageAwareGenerator.from_artifact(output / "artifact").plan
    assert plan == PruningPlan(metrics["depth"], metrics["boundary"])
    assert metrics["arithmetic"]["ratio"] >= 1.15
    assert decided(metrics, "search: boundary 8 reaches the target speedup at depth 2")


# --- salient tokens ---------------------------------------------------------------------------------------------------


def test_a_plan_with_salient_tokens_is_chosen_verified_and_exported(run, untrained):
    limit = 0.8 * untrained[2]["expected_bound"]  # one boundary token misses it at depth 2
    choices = {"salient": "auto", "budget__salient": [0, 0.2, 0.5], "budget__max_drop": limit}
    code, output, metrics = run(**choices, **TIGHT)
    assert code == 0
    generator = StageAwareGenerator.from_artifact(output / "artifact")
    assert metrics["salient"] in (0.2, 0.5)
    assert generator.plan == PruningPlan(metrics["depth"], 1, metrics["salient"])
    assert decided(metrics, f"search: boundary 1, salient {metrics['salient']} is chosen")
    same_depth = [plan for plan in metrics["plans"] if plan["depth"] == metrics["depth"]]
    counted = {plan.get("salient", 0): plan["speedup"] for plan in same_depth}
    assert metrics["arithmetic"]["ratio"] == counted[metrics["salient"]] < counted[0]
    page = (output / "report.html").read_text()
    assert f"{100 * metrics['salient']:.3g}% of the prompt selected anywhere" in page
    assert "Frontier" in page
    prompt = torch.randint(3, COMMON["vocab_size"], (1, 20))
    generator.generate(input_ids=prompt, max_new_tokens=2)
    assert generator.selected.shape == (1, 20 * metrics["salient"])


def test_a_learned_selector_is_fitted_exported_and_kept_by_a_resumed_run(run):
    code, output, metrics = run(salient=0.2, selector="learned", projection__kind="reuse")
    assert code == 0
    assert metrics["selector"] == "learned"
    generator = StageAwareGenerator.from_artifact(output / "artifact")
    assert generator.plan == PruningPlan(metrics["depth"], 1, 0.2, "learned")
    stored = output / "state" / f"selector-depth{metrics['depth']}.safetensors"
    before = stored.read_bytes()
    stored.write_bytes(before[:-1])  # damaged: fitted again
    others = {path: path.stat().st_mtime_ns for path in output.glob("state/selector-*") if path != stored}
    for name in ("metrics.json", "state/verify.json"):
        (output / name).unlink()
    assert run("--resume", output=output, salient=0.2, selector="learned", projection__kind="reuse")[0] == 0
    assert stored.read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in others} == others


@pytest.mark.full
def test_screening_plans_on_a_part_of_the_rows_changes_no_choice(run, untrained, monkeypatch):
    def limit_of(output):
        return json.loads((output / "state" / "search-plans1.json").read_text())["asked"]["limit"]

    limit = 0.8 * untrained[2]["expected_bound"]
    choices = {"boundary": "auto", "budget__boundaries": [1, 4, 8], "salient": "auto", "budget__salient": [0, 0.5]}
    _, output, every = run(**choices, budget__max_drop=limit, **TIGHT)
    assert limit_of(output) is None
    monkeypatch.setattr("pop_lightning.evaluation.search.SCREENING", 4)
    monkeypatch.setattr("pop_lightning.evaluation.search.TOGETHER", 2)
    _, output, metrics = run(**choices, budget__max_drop=limit, **TIGHT)
    assert 4 <= limit_of(output) < every["rows"]["search"]
    for key in ("depth", "boundary", "salient", "curve", "verified"):
        assert metrics.get(key) == every.get(key)
    assert {(plan["depth"], plan["boundary"], plan.get("salient")) for plan in metrics["plans"]} == {
        (plan["depth"], plan["boundary"], plan.get("salient")) for plan in every["plans"]
    }


def test_the_budget_may_keep_to_depth_and_boundary(run):
    _, _, metrics = run(salient="auto", budget__salient=0, projection__kind="reuse")
    assert "salient" not in metrics
    assert {plan.get("salient", 0) for plan in metrics["plans"]} == {0}


@pytest.mark.parametrize("salient", [0, "auto"])
def test_a_selector_that_selects_nothing_changes_nothing(run, salient):
    changes = {"salient": salient, "budget__salient": 0, "projection__kind": "reuse"}
    _, _, default = run(**changes)
    code, _, other = run(**changes, selector="recency")
    assert code == 0
    assert other["depth"] == default["depth"]
    assert other["curve"] == default["curve"]


# --- prompts, and memory --------------------------------------------------------------------------------------------


def test_several_rows_of_a_prompt_are_one_draw_in_every_bound(base, tmp_path, capsys):
    rng, lines = random.Random(0), []
    for _ in range(40):
        prompt = " ".join(rng.choices(WORDS[4:], k=12))
        lines += [json.dumps({"prompt": prompt, "response": word}) for word in rng.sample(WORDS[4:], 3)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines))
    changes = {"projection__kind": "reuse", "budget__candidates": [2]}
    assert fit.main(arguments(base, rows, tmp_path / "run", **changes)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows"]["verify"] == 3 * metrics["prompts"]["verify"] == metrics["verified"]["rows"]
    assert metrics["verified"]["prompts"] == metrics["prompts"]["verify"]
    assert all(entry["rows"] == 3 * entry["prompts"] for entry in metrics["curve"])
    changes |= {"budget__metric": "agreement", "budget__max_drop": 0.1}  # 34 prompts: fewer than the rows there are
    assert fit.main(arguments(base, rows, tmp_path / "few", **changes)) == 2
    message = capsys.readouterr().err
    assert f"needs 34 different prompts in the verify split, found {metrics['prompts']['verify']}" in message


def test_depths_that_do_not_fit_in_memory_together_are_measured_in_turn(run, capsys):
    _, _, together = run(projection__kind="reuse")
    capsys.readouterr()
    code, output, apart = run(projection__kind="reuse", projection__memory_gib=1e-5)
    out = capsys.readouterr().out
    assert code == 0
    assert [out.count(f"searching at depth {depth} ...") for depth in (3, 2, 1)] == [1, 1, 1]
    assert out.count("verifying ...") == 2
    for key in ("depth", "curve", "verification", "decisions", "verified"):
        assert apart[key] == together[key], key
    assert StageAwareGenerator.from_artifact(output / "artifact").plan.depth == apart["depth"]


def test_where_nothing_qualifies_the_depth_that_lost_least_is_compared(run):
    code, _, metrics = run(budget__max_drop=0.02, **TIGHT)
    assert code == 3
    enough = [entry for entry in metrics["curve"] if entry["depth"] <= 2]
    least = min(enough, key=lambda entry: entry["loss"])
    assert metrics["arithmetic"]["depth"] == least["depth"] == 2
    assert {each["depth"] for each in metrics["comparison"]} == {2, 4}


def test_an_automatic_boundary_without_a_depth_that_may_be_exported_exits_3(run):
    code, _, metrics = run(boundary="auto", budget__candidates=[COMMON["num_hidden_layers"] - 1])
    assert code == 3
    assert any("no depth prunes" in line for line in metrics["decisions"])
