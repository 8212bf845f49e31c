"""``pop-generate eval``: tasks of every kind on both models, paired intervals, and lm-eval's files."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks as lm_eval_tasks
import numpy as np
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import pop_lightning.harness
from pop_lightning import PruningPlan, StageAwareGenerator
from pop_lightning.cli import generate
from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.evaluation.paired import bootstrap_interval, paired_interval
from pop_lightning.harness.compare import Difference, Tasks, compare, page, table
from pop_lightning.models.loading import load_model, load_tokenizer

BASE = resolve_bundled("bundled:facts-gemma3")
MEAN = {"aggregation": "mean", "higher_is_better": True}
TASKS = {
    "look_up": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{response}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": " {{response}}",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks over facts to look up, as a user would write them."""
    folder = tmp_path_factory.mktemp("tasks")
    with open(f"{BASE}/calibration.jsonl") as lines:
        rows = [json.loads(next(lines)) for _ in range(8)]
    for row in rows:
        row["response"] = row["response"].strip()
    answers = sorted({row["response"] for row in rows})
    rng = random.Random(0)
    for row in rows:
        others = rng.sample([answer for answer in answers if answer != row["response"]], 2)
        row["choices"] = [row["response"], *others]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    local = {
        "dataset_path": "json",
        "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **local, **task}))
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    StageAwareGenerator(load_model(BASE), PruningPlan(3)).save_pretrained(folder)
    return str(folder)


def generator(depth):
    return StageAwareGenerator(load_model(BASE), PruningPlan(depth), tokenizer=load_tokenizer(BASE))


def test_at_full_depth_every_kind_of_task_has_the_numbers_of_the_hf_model(folder):
    ours = generator(12)
    found, results = compare(ours, Tasks(list(TASKS), str(folder)), batch_size=3)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    hf = HFLM(pretrained=ours.model, tokenizer=load_tokenizer(BASE), batch_size=3)
    reference = simple_evaluate(hf, tasks=list(TASKS), task_manager=manager)
    assert {each.task for each in found} == set(TASKS)
    for variant in ("full", "pruned"):
        for task, expected in reference["samples"].items():
            for ours, theirs in zip(results[variant]["samples"][task], expected, strict=True):
                assert ours["arguments"] == theirs["arguments"]
                assert np.shape(ours["resps"]) == np.shape(theirs["resps"])
                for value, other in zip(np.ravel(ours["resps"]), np.ravel(theirs["resps"]), strict=True):
                    assert value == other if isinstance(other, str) else value == pytest.approx(other, abs=1e-4)
            for name, value in reference["results"][task].items():
                mine = results[variant]["results"][task][name]
                assert mine == pytest.approx(value, rel=1e-4) if isinstance(value, float) else mine == value
    assert {each.changed for each in found if each.task in ("look_up", "choose")} == {0}


def test_a_task_without_a_prompt_is_the_only_one_that_pruning_leaves_as_it_is(folder):
    found, results = compare(generator(1), Tasks(list(TASKS), str(folder)), batch_size=3)
    by_metric = {(each.task, each.metric): each for each in found}
    for task in TASKS:
        full, pruned = (results[variant]["samples"][task] for variant in ("full", "pruned"))
        same = [one["resps"] == other["resps"] for one, other in zip(full, pruned, strict=True)]
        assert all(same) == (task == "text"), task
    for name in (("look_up", "exact_match"), ("choose", "acc"), ("last_word", "acc")):
        assert by_metric[name].paired.difference == pytest.approx(by_metric[name].pruned - by_metric[name].full)
    assert by_metric["look_up", "exact_match"].pruned < by_metric["look_up", "exact_match"].full
    assert by_metric["text", "word_perplexity"].changed == 0
    assert by_metric["text", "word_perplexity"].paired.method.startswith("bootstrap")
    text = table(found)
    assert "pruned - full" in text
    assert "Bonett-Price" in text


def test_the_command_prints_a_table_and_writes_what_lm_eval_writes(artifact, folder, tmp_path, capsys):
    command = ["eval", "--artifact", artifact, "--tasks", "look_up,choose", "--include_path", str(folder)]
    command += ["--limit", "5", "--output", str(tmp_path / "out"), "--log_samples", "--batch_size", "4"]
    assert generate.main(command) == 0
    printed = capsys.readouterr().out
    assert "exact_match" in printed
    assert "± 0." in printed
    for variant, pruned in (("full", False), ("pruned", True)):
        (results,) = (tmp_path / "out" / variant).glob("results_*.json")
        config = json.loads(results.read_text())["config"]
        assert (config["pop"].get("depth") == 3) == pruned
        (samples,) = (tmp_path / "out" / variant).glob("samples_choose_*.jsonl")
        assert len(samples.read_text().splitlines()) == 5
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert comparison["seeds"]["fewshot_seed"] == 1234
    entry = comparison["metrics"][0]
    assert entry["documents"] == 5
    assert entry["low"] <= entry["difference"] <= entry["high"]
    assert entry["difference"] == pytest.approx(entry["pruned"] - entry["full"])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert f"[{entry['low']:+.4f}, {entry['high']:+.4f}]" in page
    assert f"<dt>artifact</dt><dd>{artifact}</dd>" in page
    assert "<picture>" not in page


def test_without_the_extra_the_command_says_what_to_install(artifact, monkeypatch, capsys):
    for name in ("compare", "needle"):
        monkeypatch.delattr(pop_lightning.harness, name, raising=False)
        monkeypatch.delitem(sys.modules, f"pop_lightning.harness.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert generate.main(["eval", "--artifact", artifact, "--tasks", "look_up"]) == 2
    assert "--tasks needs lm_eval: pip install 'pop-lightning[eval]'." in capsys.readouterr().err


@pytest.mark.full  # a group makes lm-eval read all of its tasks, which it may name
def test_a_group_has_both_aggregates(folder, tmp_path):
    for path in folder.glob("*.yaml"):
        shutil.copy(path, tmp_path)
    again = yaml.safe_load((folder / "choose.yaml").read_text()) | {"task": "choose_again"}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    group = {"group": "both", "task": ["choose", "choose_again"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    found, _ = compare(generator(1), Tasks(["both"], str(tmp_path)), batch_size=4, limit=4)
    each = {entry.task: entry for entry in found if entry.metric == "acc"}
    assert set(each) == {"choose", "choose_again", "both"}
    assert (each["both"].full, each["both"].pruned) == (each["choose"].full, each["choose"].pruned)
    assert each["both"].paired is None
    assert "both" in table(found)
    assert Tasks(["choose*", "look_up"], str(tmp_path)).names == ["choose", "choose_again", "look_up"]


@pytest.mark.full  # lm-eval's command always reads all of its tasks
def test_lm_evals_own_command_knows_the_model(artifact, folder, tmp_path):
    command = [Path(sys.executable).with_name("lm_eval"), "--model", "pop", "--model_args", f"artifact={artifact}"]
    command += ["--tasks", "choose", "--limit", "2", "--include_path", str(folder), "--output_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["config"]["pop"]["depth"] == 3
    done = subprocess.run([*command[:4], "artifact=nowhere", *command[5:]], capture_output=True, text=True, timeout=300)
    assert done.returncode
    assert "InputError: nowhere is not a folder" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("imports", "expected"),
    [("lm_eval, torch", [True, True, False]), ("torch, lm_eval.api.registry, lm_eval.models", [False, True, False])],
)
def test_the_model_is_known_by_name_where_lm_eval_imports_torch(imports, expected):
    code = (
        f"import sys, {imports}; from lm_eval.api.registry import model_registry as known\n"
        "print(['pop' in known, 'hf' in known, 'pop_lightning.harness.model' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{expected}\n", done.stderr


CODE_EVAL = """
import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        names = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(names))

    def _compute(self, predictions, references, k):
        return {"pass@1": float("assert" in references[0] and predictions[0][0].startswith("def "))}, {}
"""


@pytest.mark.full
def test_the_task_files_of_gsm8k_and_humaneval_run_over_local_data(artifact, tmp_path, monkeypatch, capsys):
    """HumanEval's file loads the metric ``code_eval``, from the hub or from a folder of this name."""
    rows = {
        "gsm8k": [{"question": f"Tom has {n} eggs and buys 2 .", "answer": f"{n} + 2\n#### {n + 2}"} for n in range(7)],
        "humaneval": [
            {"task_id": f"HumanEval/{n}", "prompt": f"def f{n}(x):\n", "entry_point": f"f{n}", "test": "assert True"}
            for n in range(3)
        ],
    }
    (tmp_path / "code_eval").mkdir()
    (tmp_path / "code_eval" / "code_eval.py").write_text(CODE_EVAL)
    for name, each in rows.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, each)))
        local = {
            "include": str(Path(lm_eval_tasks.__file__).parent / name / f"{name}.yaml"),
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"train": str(data), "test": str(data)}},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(local))
    monkeypatch.chdir(tmp_path)
    command = ["eval", "--artifact", artifact, "--tasks", "local_gsm8k,local_humaneval", "--include_path", "."]
    command += ["--limit", "2", "--gen_kwargs", "max_gen_toks=8", "--confirm_run_unsafe_code", "--output", "out"]
    assert generate.main([*command, "--log_samples"]) == 0
    printed = capsys.readouterr().out
    assert "exact_match (strict-match)" in printed
    assert "exact_match (flexible-extract)" in printed
    assert "pass@1 (create_test)" in printed
    (samples,) = Path("out/pruned").glob("samples_local_gsm8k_*.jsonl")
    prompt = json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("Question:") == 6  # five examples, as the task file says
    metrics = json.loads(Path("out/comparison.json").read_text())["metrics"]
    assert {(each["metric"], each["full"]) for each in metrics if each["task"] == "local_humaneval"} == {
        ("pass@1", 1.0)
    }


@pytest.mark.full  # reads all tasks of lm-eval, and RULER makes 500 documents per task
def test_rulers_tasks_that_need_no_download_run(artifact, capsys):
    """The others need essays, SQuAD or HotpotQA."""
    tasks = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
    command = ["eval", "--artifact", artifact, "--tasks", ",".join(tasks), "--lengths", "900", "--limit", "1"]
    assert generate.main([*command, "--gen_kwargs", "max_gen_toks=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith(tasks)] == [[task, "900", "1"] for task in tasks]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        pytest.param(
            ["--tasks", "lookup"],
            "lm-eval has no task 'lookup'; did you mean look_up?",
            marks=pytest.mark.full,  # reads all tasks of lm-eval
        ),
        (["--tasks", "look_up", "--include_path", "nowhere"], "--include_path 'nowhere' is not a folder"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "look_up", "--log_samples"], "--log_samples needs --output"),
        (["--tasks", "look_up", "--batch_size", "0"], "--batch_size must be a whole number of at least 1, or auto"),
        (["--tasks", "broken"], "--tasks broken cannot be loaded: "),
        (["--tasks", "unsafe"], "--tasks unsafe runs code that the model wrote; add --confirm_run_unsafe_code"),
        (["--tasks", "look_up", "--apply_chat_template"], "the tokenizer of the base has no chat template"),
        (["--tasks", "look_up", "--gen_kwargs", "max_gen_toks=4000"], "generates up to 4000 tokens, and the model's"),
        (["--tasks", "look_up", "--output", "/proc/no"], "--output '/proc/no' cannot be written"),
    ],
)
def test_what_cannot_run_is_one_sentence(artifact, folder, capsys, argv, sentence):
    if not (folder / "broken.yaml").exists():
        task = yaml.safe_load((folder / "look_up.yaml").read_text())
        broken = {"data_files": {"test": str(folder / "nowhere.jsonl")}}
        (folder / "broken.yaml").write_text(yaml.safe_dump(task | {"task": "broken", "dataset_kwargs": broken}))
        (folder / "unsafe.yaml").write_text(yaml.safe_dump(task | {"task": "unsafe", "unsafe_code": True}))
    where = [] if "--include_path" in argv else ["--include_path", str(folder)]
    assert generate.main(["eval", "--artifact", artifact, *argv, *where]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_paired_interval_covers_and_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    covered = widths = 0
    for _ in range(400):
        full = rng.random(60) < 0.7
        pruned = np.where(rng.random(60) < 0.1, rng.random(60) < 0.3, full)
        paired = paired_interval(full, pruned)
        covered += paired.low <= 0.1 * (0.3 - 0.7) <= paired.high
        widths += paired.high - paired.low
    assert covered >= 0.93 * 400
    assert widths / 400 < 0.75 * 2 * 1.96 * np.sqrt(2 * 0.7 * 0.3 / 60)


def test_a_task_that_the_full_model_cannot_do_is_named():
    def difference(task, full, higher=True, metric="acc"):
        return Difference(task, metric, "none", higher, full, None, 0.0, None, 4)

    solved = [difference("a", 0.0), difference("a", 0.25, metric="f1"), difference("b", 0.5)]
    assert "solves no document" not in table(solved)
    assert "of c, so its figures say nothing about pruning" in table([*solved, difference("c", 0.0)])
    lower = [difference("c", 0.0), difference("c", 12.5, higher=False, metric="perplexity")]
    assert "of c, so its figures" in table(lower)
    assert "solves no document" not in table([difference("d", 0.0, higher=False)])
    several = [difference(name, 0.0) for name in "cde"]
    sentence = "The full model solves no document of c, d and e, so their figures say nothing about pruning."
    assert sentence in table(several)
    config = {"model": "pop", "model_args": {}, "pop": {}}
    results = {"full": {"samples": {}}, "pruned": {"samples": {}, "config": config, "lm_eval_version": "0"}}
    assert sentence in page(several, results, {})


def test_no_document_that_changed_leaves_a_width():
    paired = paired_interval([1, 0, 1, 1], [1, 0, 1, 1])
    assert paired.difference == 0
    assert paired.low < -0.1
    assert paired.high > 0.1


def test_values_that_are_not_0_or_1_have_students_interval():
    paired = paired_interval([0.1, 0.5, 0.9], [0.2, 0.4, 0.8])
    assert paired.difference == pytest.approx(-1 / 30)
    assert paired.high - paired.difference == pytest.approx(4.302653 * np.sqrt(1 / 75) / np.sqrt(3), rel=1e-6)


def test_a_bootstrap_of_a_mean_is_close_to_students_interval():
    rng = np.random.default_rng(1)
    first = rng.random(200)
    second = first + rng.normal(0.1, 0.2, 200)
    expected, found = paired_interval(first, second), bootstrap_interval(first, second, np.mean)
    assert found.difference == pytest.approx(expected.difference)
    assert found.low == pytest.approx(expected.low, abs=5e-3)
    assert found == bootstrap_interval(first, second, np.mean)
