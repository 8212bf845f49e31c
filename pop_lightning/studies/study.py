"""The study: what each kind of projection loses at every depth of one model, tuned on some seeds, reported on others.

``python -m pop_lightning.studies.study --base DIR --calibration FILE --output DIR`` prints and saves a table, JSON
and a plot. A seed draws the splits: projections are fitted on ``fit``, every choice about closed form is made on
``tune``, and figures come from ``verify``. The learning rate of each trained kind is the only thing tuned across
depths: on the tuning seeds only, by the KL they leave on ``search``. It is separate from the pipeline and uses the same
fitting and evaluation.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from scipy import stats
from torch.utils.data import DataLoader

from pop_lightning.core.errors import InputError
from pop_lightning.core.files import write_json, write_text, write_whole
from pop_lightning.core.plan import PruningPlan
from pop_lightning.core.quiet import quiet_lightning
from pop_lightning.data.batches import collate
from pop_lightning.data.examples import read_examples
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.processor import vision_processor
from pop_lightning.data.rows import Row
from pop_lightning.data.splits import split_rows
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.evaluation.metrics import row_loss
from pop_lightning.fitting.closed_form import FittedDepth, fit_depths
from pop_lightning.fitting.regressions import OBJECTIVES
from pop_lightning.fitting.training import JointTraining, KVProjectionTraining
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import context_length, end_tokens, load_model, load_tokenizer
from pop_lightning.pruning.attach_check import check_decoder

FRACTIONS = {"fit": 0.45, "tune": 0.15, "search": 0.1, "verify": 0.3}
METRICS = ("kl", "agreement", "exact_match")


@dataclass
class Settings:
    """What a study is made of.

    Args:
        base: a hub id, a folder or ``bundled:NAME``.
        calibration: rows, as for ``data.calibration`` of a recipe.
        output: a folder for ``study.json``, ``study.md`` and ``study.png``.
        depths: which are studied; ``all`` is 1..L-1.
        tuning_seeds: splits that the learning rates are chosen on.
        report_seeds: splits that the figures come from.
        running_text: ``[prompt, response]``: read a text file as one stream cut into rows of that many tokens.
        limit: use that many rows.
        ranks: of LoRA; ``lora_alpha`` is twice the rank.
        learning_rates: to choose from, for each trained kind; with a single one there is nothing to tune.
        steps: of training; ``batch_size`` rows each. 0 leaves training out.
        ridges: to choose from, for each closed form.
        queries: boundary and response tokens per row whose attention weighs the errors.
        metric: what the budget of 1% is counted in.
        budget: an absolute fraction.
    """

    base: str
    calibration: str
    output: str
    depths: list[int] | Literal["all"] = "all"
    tuning_seeds: list[int] = field(default_factory=lambda: [0])
    report_seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    boundary: int = 1
    running_text: list[int] | None = None
    limit: int | None = None
    ranks: list[int] = field(default_factory=lambda: [4, 16])
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    steps: int = 100
    batch_size: int = 16
    temperature: float = 1.0
    ridges: list[float] = field(default_factory=lambda: [0.0001, 0.001, 0.01, 0.1, 1.0])
    queries: int = 24
    metric: Literal["agreement", "exact_match"] = "agreement"
    budget: float = 0.01


Figures = dict[tuple[int, str], dict[str, torch.Tensor]]  # (depth, kind): per-row metrics, and the rows' seeds


def run(settings: Settings) -> dict:
    """The whole study; returns what ``study.json`` holds.

    Raises:
        InputError: base, rows or settings do not fit.
    """
    quiet_lightning()
    decoder = Decoder(load_model(settings.base).to(quiet_trainer().strategy.root_device))
    check_decoder(decoder)
    tokenizer = load_tokenizer(settings.base)
    rows = rows_of_study(settings, tokenizer, decoder)
    first, last = decoder.smallest_depth, decoder.num_layers - 1
    depths = sorted(range(first, last + 1) if settings.depths == "all" else settings.depths, reverse=True)
    if not depths or not all(first <= depth <= last for depth in depths):
        raise InputError(f"--depths must lie in {first}..{last} for this model, found {settings.depths}.")
    overlap = set(settings.tuning_seeds) & set(settings.report_seeds)
    if overlap or not settings.report_seeds:
        raise InputError(f"--report_seeds must name seeds that --tuning_seeds does not; both have {sorted(overlap)}.")
    rates = _tune(settings, decoder, rows, depths)
    reports = [Split(settings, decoder, rows, seed).report(depths, rates) for seed in settings.report_seeds]
    result = {
        "settings": asdict(settings),
        "layers": decoder.num_layers,
        "rows": len(rows),
        "learning_rates": rates,
        "table": _table([figures for figures, _ in reports], settings),
        "chosen": [choices for _, choices in reports],
    }
    result["hypotheses"] = _hypotheses([figures for figures, _ in reports], decoder.num_layers, settings)
    _save(result, Path(settings.output))
    return result


# --- fitting on one split -------------------------------------------------------------------------------------------


class Split:
    """One split of the rows, and everything fitted on it."""

    def __init__(self, settings: Settings, decoder: Decoder, rows: list[Row], seed: int):
        self.settings, self.decoder, self.seed = settings, decoder, seed
        self.splits = split_rows(rows, FRACTIONS, seed)
        self.vision = vision_processor(decoder.vision_tokens, settings.base)

    def loader(self, name: str, shuffle: bool = False) -> DataLoader:
        rows = sorted(self.splits[name], key=lambda row: (-row.length, row.seed))
        return DataLoader(
            rows,
            batch_size=self.settings.batch_size if shuffle else 4 * self.settings.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed),
            collate_fn=partial(collate, pad_token_id=0, vision=self.vision),
        )

    def closed_form(self, depths: list[int]) -> list[FittedDepth]:
        return list(
            fit_depths(
                self.decoder,
                depths,
                boundary=self.settings.boundary,
                ridges=self.settings.ridges,
                queries=self.settings.queries,
                fit_rows=self.loader("fit"),
                tune_rows=self.loader("tune"),
                validate=self.validate,
            )
        )

    def train(self, fitted: list[FittedDepth], jobs: Mapping[str, tuple[int | None, float]]) -> dict:
        """Train every depth from its best closed form; ``jobs``: by name, a rank (None: full) and a learning rate."""
        starts = {each.depth: each.options[each.best()] for each in fitted}
        trainings = {
            (depth, name): KVProjectionTraining(
                start.copy(),
                boundary=self.settings.boundary,
                kind="full" if rank is None else "lora",
                kind_arguments={} if rank is None else {"r": rank, "lora_alpha": 2 * rank},
                seed=self.seed,
                learning_rate=rate,
                temperature=self.settings.temperature,
            )
            for depth, start in starts.items()
            for name, (rank, rate) in jobs.items()
            if start.fitted_layers
        }
        if trainings:
            self.say(f"training {len(trainings)} projections for {self.settings.steps} steps")
            trainer = quiet_trainer(max_steps=self.settings.steps, max_epochs=-1)
            trainer.fit(JointTraining(list(trainings.values())), self.loader("fit", shuffle=True))
        exact = {(depth, name): start for depth, start in starts.items() if not start.fitted_layers for name in jobs}
        return exact | {key: each.trained() for key, each in trainings.items()}

    def measure(self, variants: Mapping[tuple[int, str], Any], split: str) -> Figures:
        names = {f"{depth} {kind}": (depth, kind) for depth, kind in variants}
        evaluation = Evaluation(
            self.decoder,
            {name: Variant(PruningPlan(key[0], self.settings.boundary), variants[key]) for name, key in names.items()},
        )
        self.validate(f"measuring {len(names)} variants on {split}", evaluation, self.loader(split))
        return {key: evaluation.rows(name) for name, key in names.items()}

    def report(self, depths: list[int], rates: Mapping[str, float]) -> tuple[Figures, dict]:
        """Every kind at every depth on ``verify``, and what closed form chose where."""
        fitted = self.closed_form(depths)
        variants = {}
        for each in fitted:
            variants[each.depth, "reuse"] = each.options["reuse", None]
            for objective in (*OBJECTIVES, "refit"):
                if each.fits(objective):
                    variants[each.depth, f"closed form: {objective}"] = each.options[each.best(objective)]
            variants[each.depth, "closed form"] = each.options[each.best()]
        if rates:
            jobs = {name: (rank, rates[name]) for name, rank in _trained_kinds(self.settings).items()}
            variants |= self.train(fitted, jobs)
        choices = {"seed": self.seed, **{str(each.depth): each.summary() for each in fitted}}
        return self.measure(variants, "verify"), choices

    def validate(self, what: str, module: lightning.LightningModule, rows: DataLoader) -> None:
        self.say(what)
        quiet_trainer().validate(module, rows, verbose=False)

    def say(self, what: str) -> None:
        print(f"seed {self.seed}: {what} ...", flush=True)


def _trained_kinds(settings: Settings) -> dict[str, int | None]:
    return {**{f"LoRA, rank {rank}": rank for rank in settings.ranks}, "full": None} if settings.steps else {}


def _tune(settings: Settings, decoder: Decoder, rows: list[Row], depths: list[int]) -> dict[str, float]:
    """The learning rate of each trained kind: least KL on ``search``, relative to its start, over depths and seeds."""
    kinds = _trained_kinds(settings)
    if len(settings.learning_rates) == 1:
        return dict.fromkeys(kinds, settings.learning_rates[0])
    if not kinds:
        return {}
    if not settings.tuning_seeds:
        raise InputError("--tuning_seeds must name a seed where --learning_rates has several, found none.")
    losses: dict[tuple[str, float], list[float]] = {}
    for seed in settings.tuning_seeds:
        split = Split(settings, decoder, rows, seed)
        fitted = [each for each in split.closed_form(depths) if each.depth < decoder.num_layers - 1]
        start = {(each.depth, "start"): each.options[each.best()] for each in fitted}
        for rate in settings.learning_rates:
            trained = split.train(fitted, {name: (rank, rate) for name, rank in kinds.items()})
            figures = split.measure(start | trained, "search")
            for depth, name in trained:
                before = figures[depth, "start"]["kl"].mean()
                relative = (figures[depth, name]["kl"].mean() / before.clamp(min=1e-9)).item()
                losses.setdefault((name, rate), []).append(relative)
    return {
        name: min(settings.learning_rates, key=lambda rate: np.log(losses[name, rate]).mean() if losses else 0)
        for name in kinds
    }


# --- rows -----------------------------------------------------------------------------------------------------------


def rows_of_study(settings: Settings, tokenizer, decoder: Decoder) -> list[Row]:
    if settings.running_text is None:
        data = CalibrationData(
            settings.calibration,
            tokenizer,
            context=context_length(decoder.model),
            end_tokens=end_tokens(decoder.model),
            limit=settings.limit,
            vision=vision_processor(decoder.vision_tokens, settings.base),
        )
        rows = data.read_rows()
        if any(row.response_ids is None for row in rows):
            raise InputError("the study needs rows with responses; rows without responses are for pop-fit.")
        return rows
    if len(settings.running_text) != 2 or min(settings.running_text) < 2:
        raise InputError(f"--running_text must be [prompt, response] in tokens, found {settings.running_text}.")
    prompt, response = settings.running_text
    text = "\n\n".join(example.get("text", "") for example, _ in read_examples(settings.calibration))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    step = prompt + response - len(start)
    rows = [
        Row(
            (*start, *ids[at : at + prompt - len(start)]),
            tuple(ids[at + prompt - len(start) : at + step]),
            f"token {at}",
        )
        for at in range(0, len(ids) - step + 1, step)
    ]
    return rows[: settings.limit]


# --- figures --------------------------------------------------------------------------------------------------------


def _table(figures: list[Figures], settings: Settings) -> list[dict]:
    """Per depth and kind: means over all rows of the report seeds, 95% intervals, and the mean of each seed."""
    table = []
    for depth, kind in sorted(figures[0], key=lambda each: -each[0]):  # stable: kinds keep their order
        measured = [each[depth, kind] for each in figures]
        entry: dict[str, Any] = {"depth": depth, "projection": kind}
        for metric in METRICS:
            entry[metric] = mean_of_seeds([(each["prompt"], each[metric]) for each in measured])
        entry["loss"] = mean_of_seeds([(each["prompt"], row_loss(each, settings.metric)) for each in measured])
        entry["removed"] = _removed(figures, depth, "reuse", kind)
        table.append(entry)
    return table


def mean_of_seeds(seeds: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    sums, counts = _by_prompt(seeds)
    found = _interval(lambda sums, counts, axis=-1: sums.sum(axis) / counts.sum(axis), sums, counts)
    return found | {"seeds": [values.double().mean().item() for _, values in seeds]}


def _removed(figures: list[Figures], depth: int, before: str, after: str) -> dict[str, float] | None:
    """The share of the KL under ``before`` that ``after`` removes; None where there is nothing to remove."""
    first, second = (
        _by_prompt([(each[depth, kind]["prompt"], each[depth, kind]["kl"]) for each in figures])[0]
        for kind in (before, after)
    )
    if first.mean() < 1e-7:
        return None
    return _interval(lambda first, second, axis=-1: 1 - second.sum(axis) / first.sum(axis), first, second)


def _by_prompt(seeds: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """A prompt's figures summed over its rows and the seeds that measured them, and how many: it is still one draw."""
    rows, where = torch.cat([row for row, _ in seeds]).unique(return_inverse=True)
    values = torch.cat([values.double() for _, values in seeds])
    sums = torch.zeros(len(rows), dtype=torch.float64).index_add(0, where, values)
    return sums.numpy(), where.bincount().double().numpy()


def _interval(statistic, *samples: np.ndarray) -> dict[str, float]:
    """A statistic of paired rows with its 95% percentile bootstrap interval over the prompts."""
    value = float(statistic(*samples))
    if len(samples[0]) == 1:
        return {"mean": value, "low": value, "high": value}
    found = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        n_resamples=2000,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {"mean": value, "low": float(found.low), "high": float(found.high)}


def _hypotheses(figures: list[Figures], layers: int, settings: Settings) -> dict:
    """The three questions, answered with intervals; ``holds`` is True or False only where the interval decides."""
    depths = sorted({depth for depth, _ in figures[0]})
    half = min(depths, key=lambda depth: (abs(depth - layers / 2), depth))
    kinds = _trained_kinds(settings)
    answers: dict[str, Any] = {"half depth": half}
    answers["closed form removes half of reuse's KL"] = _judge(_removed(figures, half, "reuse", "closed form"), 0.5)
    for kind in kinds:
        answers[f"training ({kind}) removes a quarter of the rest"] = _judge(
            _removed(figures, half, "closed form", kind), 0.25
        )
    deepest = {}
    for kind in ("reuse", "closed form", *kinds):
        per_seed = []
        for each in figures:
            passing = []
            for depth in sorted(depths, reverse=True):
                if row_loss(each[depth, kind], settings.metric).mean().item() > settings.budget:
                    break
                passing.append(depth)
            per_seed.append(min(passing, default=layers))
        deepest[kind] = per_seed
    answers[f"depth at a loss of {settings.budget:g} ({settings.metric}), per seed"] = deepest
    for kind in ("closed form", *kinds):
        gained = [(reuse - ours) / layers for reuse, ours in zip(deepest["reuse"], deepest[kind], strict=True)]
        answers[f"{kind}: a sixth of the layers more than reuse"] = {
            "mean": float(np.mean(gained)),
            "low": min(gained),
            "high": max(gained),
            "holds": min(gained) >= 1 / 6 or (None if max(gained) >= 1 / 6 else False),
        }
    return answers


def _judge(found: dict | None, wanted: float) -> dict | None:
    if found is None:
        return None
    return found | {"holds": found["low"] >= wanted or (None if found["high"] >= wanted else False)}


# --- what is written ------------------------------------------------------------------------------------------------


def render(result: dict) -> str:
    """The table and the answers as Markdown."""
    lines = [
        "| depth | projection | KL | reuse's KL removed | agreement | exact match | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["table"]:
        removed = "-" if row["removed"] is None or row["projection"] == "reuse" else _show(row["removed"], 3)
        cells = [row["depth"], row["projection"], _show(row["kl"], 5), removed]
        cells += [_show(row[key], 4) for key in ("agreement", "exact_match", "loss")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"learning rates: {result['learning_rates']}", ""]
    for question, answer in result["hypotheses"].items():
        if isinstance(answer, dict) and "holds" in answer:
            verdict = {True: "yes", False: "no", None: "not decided"}[answer["holds"]]
            answer = f"{verdict}: {_show(answer, 3)}"
        lines.append(f"- {question}: {answer}")
    return "\n".join(lines) + "\n"


def _show(figure: dict, digits: int) -> str:
    return f"{figure['mean']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _save(result: dict, output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "study.json", result)
        write_text(output / "study.md", render(result))
        write_whole(output / "study.png", lambda path: _plot(result, path))
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror}); choose another.") from error


def _plot(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(row["projection"] for row in result["table"]):
        rows = [row for row in result["table"] if row["projection"] == kind and row["kl"]["mean"] > 1e-7]
        depths, kl = [row["depth"] for row in rows], [row["kl"] for row in rows]
        (line,) = axes.plot(depths, [each["mean"] for each in kl], marker="o", label=kind)
        axes.fill_between(
            depths, [each["low"] for each in kl], [each["high"] for each in kl], color=line.get_color(), alpha=0.15
        )
    axes.set(xlabel=f"depth of {result['layers']}", ylabel="KL to the full model (nats per token)", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


# --- running --------------------------------------------------------------------------------------------------------


def quiet_trainer(**arguments) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **arguments,
    )


def main(argv: list[str] | None = None) -> int:
    """``python -m pop_lightning.studies.study``; returns the exit code."""
    from jsonargparse import ArgumentParser

    from pop_lightning.cli import run as guarded

    parser = ArgumentParser(prog="python -m pop_lightning.studies.study", description=__doc__)
    parser.add_class_arguments(Settings)

    def body() -> int:
        settings = Settings(**parser.parse_args(argv).as_dict())
        print(render(run(settings)))
        print(f"saved: {settings.output}/study.json, study.md, study.png")
        return 0

    return guarded("study", body)


if __name__ == "__main__":
    raise SystemExit(main())
