"""lm-eval's tasks for the full and the pruned model on the same documents, with paired intervals of the difference.

Both run on one loaded base, over the same task objects, so that documents, few-shot examples and prompts are the same.
"""

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.metrics import mean
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase

from pop_lightning.core.errors import InputError, first_sentence
from pop_lightning.core.files import check_output_folder, write_json, write_text
from pop_lightning.core.pages import render
from pop_lightning.core.tables import Table
from pop_lightning.evaluation.paired import Paired, bootstrap_interval, paired_interval
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.harness import needle
from pop_lightning.harness.model import PopLM

VARIANTS = ("full", "pruned")
CONFIDENCE = 0.95
CORPUS = ("bleu", "chrf", "chrf++", "ter")  # slow to aggregate: 100 resamples, as in lm-eval's own standard error


@dataclass(frozen=True)
class Difference:
    """One metric of one task: both values with lm-eval's standard errors, and the paired interval of pruned - full.

    ``changed`` of ``documents`` have another value. A group's aggregate has no interval of its own.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    full: float
    full_stderr: float | None
    pruned: float
    pruned_stderr: float | None
    documents: int
    changed: int | None = None
    paired: Paired | None = None


class Tasks(TaskManager):
    """lm-eval's task manager, which loads its tasks once: both models run over the same objects.

    Args:
        names: tasks, groups and tags, with ``*`` as a wildcard, and the tasks of
            :mod:`~pop_lightning.harness.needle`, or ``needle`` for all of them.
        include_path: a folder with tasks of one's own, as YAML.
        lengths: prompt lengths in tokens of tasks that make their own data (``needle``, RULER); 4096 unless given.

    Raises:
        InputError: no such folder, or an unknown name.
    """

    def __init__(self, names: Sequence[str], include_path: str | None = None, lengths: Sequence[int] | None = None):
        if include_path is not None and not Path(include_path).is_dir():
            raise InputError(f"--include_path {include_path!r} is not a folder.")
        expanded = (each for name in names for each in (needle.TASKS if name == "needle" else (name,)))
        self.names, self.loaded = list(dict.fromkeys(expanded)), None
        self.sized = lengths is not None or not set(needle.TASKS).isdisjoint(self.names)
        self.passed = {"max_seq_lengths": list(lengths or [4096])}  # every task gets it; prepare() adds the tokenizer
        super().__init__(include_path=include_path, include_defaults=False, metadata=self.passed)
        # Reading the thousands of tasks that come with lm-eval costs seconds, which other tasks do not need.
        if not set(self.names) <= {*self.all_subtasks, *needle.TASKS}:
            super().__init__(include_path=include_path, metadata=self.passed)
        matches = {name: [name] if name in needle.TASKS else self.match_tasks([name]) for name in self.names}
        for name, matched in matches.items():
            if not matched:
                near = difflib.get_close_matches(name, [*self.all_tasks, *needle.TASKS, "needle"], n=1)
                hint = f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists them, --include_path adds yours."
                raise InputError(f"--tasks: lm-eval has no task {name!r}; {hint}")
        self.names = list(dict.fromkeys(chain.from_iterable(matches.values())))

    @property
    def lengths(self) -> list[int]:
        return self.passed["max_seq_lengths"]

    def check_limit(self, limit: int | None) -> None:
        """Refuse a ``limit`` that would drop whole lengths of the needle tasks.

        Raises:
            InputError: it is smaller than the number of a task's cells.
        """
        needle.check_limit(self.names, self.lengths, limit)

    def prepare(self, tokenizer: PreTrainedTokenizerBase, *, unsafe: bool = False) -> None:
        """Load the tasks.

        Args:
            tokenizer: by which tasks that make their own data measure lengths.
            unsafe: whether the user agreed to run code that the model writes.

        Raises:
            InputError: a task does not load, shows images, or runs code without ``unsafe``.
        """
        self.passed["tokenizer"] = tokenizer.name_or_path
        specs = [needle.task(name, tokenizer, self.lengths) if name in needle.TASKS else name for name in self.names]
        try:
            self.loaded = super().load(specs)
        except InputError:
            raise
        except Exception as error:  # of the task's own code, of datasets or of the network
            raise InputError(f"--tasks {','.join(self.names)} cannot be loaded: {first_sentence(error)}") from error
        for name, task in self.loaded["tasks"].items():
            if getattr(task, "MULTIMODAL", False):
                raise InputError(f"--tasks {name} shows images, which the pop model does not read; choose a text task.")
            if getattr(task, "UNSAFE_CODE", False) and not unsafe:
                raise InputError(f"--tasks {name} runs code that the model wrote; add --confirm_run_unsafe_code.")

    def load(self, task_list):
        return self.loaded


def compare(
    generator: StageAwareGenerator,
    tasks: Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    max_length: int | None = None,
    gen_kwargs: str | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    seed: int | None = None,
    confirm_run_unsafe_code: bool = False,
    output: str | Path | None = None,
    log_samples: bool = False,
    about: Mapping[str, str] | None = None,
) -> tuple[list[Difference], dict[str, dict]]:
    """Run tasks with the full and the pruned model.

    Args:
        seed: of everything random; lm-eval's own seeds unless given.
        output: a folder for ``full/results_*.json`` and ``pruned/results_*.json`` as lm-eval writes them,
            ``samples_*.jsonl`` next to them with ``log_samples``, ``comparison.json``, and a page of
            the differences, ``comparison.html``.
        about: how it was run, for the page.
        The others are those of ``lm_eval.simple_evaluate`` and of :class:`~pop_lightning.harness.model.PopLM`.

    Returns:
        the differences, and lm-eval's results of both variants by name, samples included.

    Raises:
        InputError: a task that is unknown or cannot run with this model, a ``limit`` that would drop lengths, or an
            output that cannot be written.
    """
    tasks.check_limit(limit)
    check_output_folder(output)
    settings = {} if max_length is None else {"max_length": max_length}
    lms = {
        name: PopLM(generator=generator, full=name == "full", batch_size=batch_size, **settings) for name in VARIANTS
    }
    if tasks.sized and max(tasks.lengths) > (context := lms["full"].max_length):
        raise InputError(f"--lengths {max(tasks.lengths)} is more than the model's context of {context} tokens.")
    if apply_chat_template and not generator.tokenizer.chat_template:
        raise InputError("--apply_chat_template: the tokenizer of the base has no chat template.")
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    results = {}
    with redirect_stdout(sys.stderr):  # where some tasks print while they make their data
        tasks.prepare(generator.tokenizer, unsafe=confirm_run_unsafe_code)
        for name, lm in lms.items():
            tracker = EvaluationTracker(output_path=None if output is None else str(output))
            results[name] = simple_evaluate(
                lm,
                {"pretrained": generator.name_or_path, "full": name == "full"},
                tasks=tasks.names,
                task_manager=tasks,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                gen_kwargs=gen_kwargs,
                apply_chat_template=apply_chat_template,
                system_instruction=system_instruction,
                confirm_run_unsafe_code=confirm_run_unsafe_code,
                evaluation_tracker=tracker,
                **({} if seed is None else dict.fromkeys(seeds, seed)),
            )
            if output is not None:
                _write(tracker, name, results[name], log_samples)
    found = differences(tasks, results)
    if output is not None:
        write_json(Path(output) / "comparison.json", summary(found, results))
        write_text(Path(output) / "comparison.html", page(found, results, about or {}))
        if cells := needle.cells(results):
            needle.write_heat_map(cells, Path(output) / "needle.png")
    return found, results


def differences(tasks: Tasks, results: dict[str, dict]) -> list[Difference]:
    """Every metric of every task, paired by document; then the aggregates of groups, without intervals."""
    found = []
    for name, task in tasks.loaded["tasks"].items():
        samples = {variant: _by_metric(results[variant]["samples"][name]) for variant in VARIANTS}
        aggregations = task.aggregation()
        for metric, key in samples["full"]:
            full, pruned = (samples[variant][metric, key] for variant in VARIANTS)
            aggregate = aggregations.get(metric, mean)  # mean where a task names none, as in lm-eval
            if getattr(aggregate, "__name__", "") == "aggregate_metrics":
                # RULER: one metric per length, -1 for documents of another one, and the mean of the others.
                kept = [i for i, pair in enumerate(zip(full, pruned, strict=True)) if pair != (-1, -1)]
                full, pruned, aggregate = [full[i] for i in kept], [pruned[i] for i in kept], mean
                if not kept:
                    continue
            changed = sum(bool(a != b) for a, b in zip(full, pruned, strict=True))
            values = _values(results, "results", name, metric, key)
            higher = results["full"]["higher_is_better"].get(name, {}).get(metric)
            paired = _paired(full, pruned, aggregate, metric)
            found.append(Difference(name, metric, key, higher, *values, len(full), changed, paired))
    for name, group in results["full"].get("groups", {}).items():
        for both in group:
            metric, _, key = both.partition(",")
            if key and not metric.endswith("_stderr"):
                higher = results["full"]["higher_is_better"].get(name, {}).get(metric)
                values = _values(results, "groups", name, metric, key)
                found.append(Difference(name, metric, key, higher, *values, group.get("sample_len", 0)))
    return found


def _by_metric(samples: Sequence[dict]) -> dict[tuple[str, str], list]:
    """The values of each metric and filter, in the order of the documents."""
    values: dict[tuple[str, str], list] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            values.setdefault((metric, sample["filter"]), []).append(sample[metric])
    return values


def _values(results: dict, kind: str, name: str, metric: str, key: str) -> list[float | None]:
    """Value and standard error of the full, then of the pruned model; None where lm-eval has no standard error."""
    values = []
    for variant in VARIANTS:
        entry = results[variant][kind][name]
        stderr = entry.get(f"{metric}_stderr,{key}")
        values += [entry[f"{metric},{key}"], stderr if isinstance(stderr, float) else None]
    return values


def _paired(full: list, pruned: list, aggregate, metric: str) -> Paired | None:
    if len(full) < 2:
        return None
    if aggregate is mean:
        return paired_interval(full, pruned, CONFIDENCE)
    paired = bootstrap_interval(full, pruned, aggregate, CONFIDENCE, resamples=100 if metric in CORPUS else 1000)
    return paired if math.isfinite(paired.difference) else None


def summary(found: Sequence[Difference], results: dict[str, dict]) -> dict[str, Any]:
    """What ``comparison.json`` holds: every difference, and how it was measured."""
    config = results["pruned"]["config"]
    entries = []
    for each in found:
        paired = each.paired._asdict() if each.paired is not None else {"difference": each.pruned - each.full}
        entries.append({name: value for name, value in asdict(each).items() if name != "paired"} | paired)
    return {
        "model": config["model"],
        "pop": config["pop"],
        "confidence": CONFIDENCE,
        "seeds": {name: value for name, value in config.items() if name.endswith("_seed")},
        "lm_eval": results["pruned"]["lm_eval_version"],
        "metrics": entries,
        "needle": needle.cells(results),
    }


def table(found: Sequence[Difference]) -> str:
    """The differences for a terminal."""
    return "\n".join(filter(None, [difference_table(found).text(), note(found), unsolved(found)])) + "\n"


def difference_table(found: Sequence[Difference]) -> Table:
    """One line per task and metric."""
    header = ["task", "metric", "docs", "full", "pruned", "pruned - full", f"{100 * CONFIDENCE:g}% interval", "changed"]
    rows = []
    for each in found:
        paired = each.paired
        rows.append(
            [
                each.task,
                each.metric if each.filter == "none" else f"{each.metric} ({each.filter})",
                str(each.documents),
                _with_error(each.full, each.full_stderr),
                _with_error(each.pruned, each.pruned_stderr),
                f"{each.pruned - each.full:+.4f}",
                "" if paired is None else f"[{paired.low:+.4f}, {paired.high:+.4f}]",
                "" if each.changed is None else str(each.changed),
            ]
        )
    return Table(header, rows, (0, 1))


def note(found: Sequence[Difference]) -> str:
    """How the values and intervals of :func:`difference_table` were computed."""
    methods = sorted({each.paired.method for each in found if each.paired is not None})
    values = "Values with lm-eval's standard error; changed: documents with another value"
    return f"{values}; intervals paired by document: {', '.join(methods)}."


def unsolved(found: Sequence[Difference]) -> str:
    """A sentence on the tasks that the full model scores 0 in by every metric, and so has nothing to lose; else empty.

    Metrics that are better when lower do not count.
    """
    scores: dict[str, list[float]] = {}
    for each in found:
        if each.higher_is_better:
            scores.setdefault(each.task, []).append(each.full)
    names = [name for name, values in scores.items() if not any(values)]
    if not names:
        return ""
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    figures = "its figures say" if len(names) == 1 else "their figures say"
    return f"The full model solves no document of {listed}, so {figures} nothing about pruning."


def page(found: Sequence[Difference], results: dict[str, dict], about: Mapping[str, str]) -> str:
    """The page of a comparison: the table and, where ``needle`` ran, its heat maps."""
    config, cells = results["pruned"]["config"], needle.cells(results)
    changed = [each for each in found if each.paired is not None and not each.paired.low <= 0 <= each.paired.high]
    tasks = list(dict.fromkeys(each.task for each in found))
    seeds = {name.removesuffix("_seed"): value for name, value in config.items() if name.endswith("_seed")}
    return render(
        "pop_lightning.harness",
        "comparison.html.jinja",
        title=", ".join(tasks),
        about={
            "model": str(config["model_args"].get("pretrained", config["model"])),
            "plan": ", ".join(f"{name} {value}" for name, value in config["pop"].items()),
            **about,
            "seeds": ", ".join(f"{name} {value}" for name, value in seeds.items()),
            "versions": f"lm-eval {results['pruned']['lm_eval_version']}",
        },
        tasks=tasks,
        measured=sum(each.paired is not None for each in found),
        differences=difference_table(found),
        note=note(found),
        unsolved=unsolved(found),
        changed=changed,
        confidence=CONFIDENCE,
        heat_maps=needle.pictures(cells) if cells else [],
        grid=needle.grid_table(cells) if cells else None,
        grid_note=needle.NOTE,
    )


def _with_error(value: float, stderr: float | None) -> str:
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def _write(tracker: EvaluationTracker, name: str, results: dict, log_samples: bool) -> None:
    """lm-eval's own files in a folder of the variant's name.

    Raises:
        InputError: they were not written; lm-eval itself only logs why.
    """
    tracker.general_config_tracker.model_name_sanitized = name
    # The tracker adds what it knows to the results that it writes, and rewrites the samples.
    kept = {key: value for key, value in results.items() if key != "samples"}
    tracker.save_results_aggregated(kept, results["samples"])
    written = [Path(tracker.output_path) / name / f"results_{tracker.date_id}.json"]
    if log_samples:
        for task, samples in results["samples"].items():
            tracker.save_results_samples(task, [dict(sample) for sample in samples])
            written.append(written[0].with_name(f"samples_{task}_{tracker.date_id}.jsonl"))
    for path in written:
        if not path.exists():
            raise InputError(f"--output: {path} could not be written.")
