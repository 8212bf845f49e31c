"""Tables 3 and 4 of arXiv 2602.03295 for any model, with baselines and a frontier of accuracy against measured speed.

``pop-generate ablate`` calls :func:`run`. Projections are fitted on the rows' ``fit`` split and chosen on ``tune``;
every figure comes from one pass over ``verify``, which nothing was fitted or chosen on, so that all ways to prune see
the same rows. Prefill is timed afterwards, every plan in turn with the full model. ``report.py`` shows the result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import lightning
import torch
from tqdm import tqdm

from pop_lightning.benchmark.benchmark import REPEATS, a_third_pruned, describe_machine, measure_ttft
from pop_lightning.core.errors import InputError
from pop_lightning.core.kinds import KINDS
from pop_lightning.core.memory import memory_advice
from pop_lightning.core.plan import Kept, PruningPlan, in_order, number_of
from pop_lightning.core.quiet import quiet_lightning
from pop_lightning.data.module import CalibrationData
from pop_lightning.evaluation.ablations import Compared, comparison, other_layers
from pop_lightning.evaluation.evaluate import Evaluation, Variant
from pop_lightning.evaluation.metrics import prompt_means
from pop_lightning.evaluation.paired import paired_interval, sameness_interval
from pop_lightning.fitting.influence import BlockInfluence
from pop_lightning.fitting.kinds import kind as kind_named
from pop_lightning.fitting.kinds import trained_kind
from pop_lightning.fitting.training import JointTraining, KVProjectionTraining
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import context_length
from pop_lightning.pruning.attach_check import check_decoder
from pop_lightning.pruning.flops import speedup
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.pruning.salient import check_salient
from pop_lightning.run.depths import check_split
from pop_lightning.run.inputs import respond
from pop_lightning.run.recipe import Projection
from pop_lightning.run.trainers import Trainer

JSON, PAGE, RESPONSES = "ablation.json", "ablation.html", "responses.json"
CONFIDENCE = 0.95
UNTRAINED = tuple(name for name in KINDS if not kind_named(name).trains)
MAIN = "closed_form"  # whose projections the variants without a kind in their name have
MINUS_MAIN = f"kl_minus_{MAIN}"  # of every other row of Table 3: its KL minus that of POP with these projections
FITTING = Projection()  # a recipe's defaults

Point = tuple[str, int, Kept]  # kind of projections, depth, and what runs in full


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Args:
        depth: of the comparison (Table 3); a third of the layers pruned unless given.
        boundary: last prompt tokens that run in full in the comparison and the shares (Tables 3 and 4).
        salient: context tokens that run in full in the comparison's row with salient tokens; 0 leaves the row out.
        train_steps: training steps of every trained kind, at the comparison's depth; 0 trains none.
        shares: of the layers to prune, in percent (Table 4).
        boundaries, salients: the frontier has every pair of them at every depth of the shares.
        tokens: prompt length of the timed prefills; the rows' median unless given.
        batch: prompts of a timed prefill.
        repeats: timed rounds per plan.

    Raises:
        InputError: a value out of its range.
    """

    depth: int | None = None
    boundary: int | float = 1
    salient: int | float = 0.05
    train_steps: int = 0
    shares: Sequence[int] = (20, 25, 33, 40, 50, 60)
    boundaries: Sequence[int | float] = (1, 16)
    salients: Sequence[int | float] = (0, 0.05)
    tokens: int | None = None
    batch: int = 1
    repeats: int = REPEATS

    def __post_init__(self):
        for share in self.shares:
            if not 0 < share < 100:
                raise InputError(f"--shares must hold percentages between 1 and 99, found {share}.")
        if not self.boundary:
            raise InputError("--boundary must be at least 1: without boundary handling is one of the ablations.")
        for kept in (Kept(self.boundary, self.salient), *self.kept):
            kept.at(1)  # refuses what is out of range

    @property
    def kept(self) -> list[Kept]:
        """What may run in full on the frontier, the least first; the one of the tables included."""
        return in_order({Kept(self.boundary), *(Kept(*each) for each in product(self.boundaries, self.salients))})


def run(decoder: Decoder, data: CalibrationData, settings: Settings, folder: Path) -> dict[str, Any]:
    """Fit, measure and time everything.

    Args:
        folder: keeps the full model's responses to rows that have none.

    Returns:
        Plain data: ``table3``, ``table4`` and ``frontier`` (entries of :func:`_figures` with what they are of),
        ``influence`` of every layer, ``notes`` on what could not be measured, and what was run on what, with which
        ``settings``.

    Raises:
        InputError: model, rows and settings do not go together, or memory ran out.
    """
    quiet_lightning()
    check_decoder(decoder)
    notes: list[str] = []
    depth, shares = _depths(decoder, settings, notes)
    data.setup()
    if data.missing_responses():
        made_with = f"{decoder.model.name_or_path} {data.max_response_tokens}"
        data.fill_responses(lambda rows: respond(decoder, data, rows), folder / RESPONSES, made_with=made_with)
    if data.prompts_of("verify") < 2:
        raise InputError(
            "--data leaves fewer than 2 different prompts to measure: give more rows, or a larger --limit."
        )
    if number_of(settings.boundary, _longest(data)) >= _longest(data):
        raise InputError(f"--boundary {settings.boundary} leaves no context in the rows' prompts: give a smaller one.")
    tokens = _tokens(decoder, data, settings)
    with memory_advice("lower --batch_size, choose a narrower --dtype or another --device"):
        bench = _Bench(decoder, data, settings, depth, sorted({depth, *shares.values()}, reverse=True), notes)
        table, points = bench.measure()
    timed = _timed(decoder, points, bench.projections, tokens, settings)
    frontier = [
        {"projection": kind, "depth": at, **kept.to_dict()}
        | {"counted": speedup(decoder, kept.at(at), tokens), "ttft": timed[at, kept]}
        | figures
        for (kind, at, kept), figures in points.items()
    ]
    paper = [entry for entry in frontier if Kept.of(entry) == Kept(settings.boundary)]
    by_depth: dict[int, list[int]] = {}
    for share, at in shares.items():
        by_depth.setdefault(at, []).append(share)
    return {
        "format": 1,
        "model": {"class": decoder.name, "dtype": str(decoder.model.dtype).removeprefix("torch.")},
        "machine": describe_machine(decoder.model.device),
        "layers": decoder.num_layers,
        "depth": depth,
        "settings": asdict(settings) | _inputs(decoder, data),
        "confidence": CONFIDENCE,
        "rows": {name: len(data.rows_of(name)) for name in ("fit", "tune", "verify")},
        "prompts": data.prompts_of("verify"),
        "data": data.report.to_dict(),
        "prompt_tokens": tokens,
        "influence": bench.influence,
        "table3": table,
        "table4": [{"shares": by_depth[entry["depth"]]} | entry for entry in paper if entry["depth"] in by_depth],
        "frontier": frontier,
        "notes": notes,
    }


def _inputs(decoder: Decoder, data: CalibrationData) -> dict[str, Any]:
    """What identifies the model and the rows, and how the rows were read and projections trained."""
    return {
        "model": decoder.model.name_or_path,
        "revision": getattr(decoder.config, "_commit_hash", None),
        "data": data.calibration,
        "rows": data.report.rows,
        "rows_sha256": data.digest,
        "limit": data.limit,
        "seed": data.seed,
        "batch_size": data.batch_size,
        "max_response_tokens": data.max_response_tokens,
        "learning_rate": FITTING.learning_rate,
        "lora": asdict(FITTING.lora),
    }


def _depths(decoder: Decoder, settings: Settings, notes: list[str]) -> tuple[int, dict[int, int]]:
    """The depth of the comparison, and the depth of every share that the model can be pruned at."""
    layers = decoder.num_layers
    depth = a_third_pruned(layers) if settings.depth is None else settings.depth
    if not 1 <= depth < layers:
        raise InputError(f"--depth must lie in 1..{layers - 1} for this model of {layers} layers, found {depth}.")
    decoder.check_depth(depth)
    shares = {}
    for share in settings.shares:
        at = layers - max(1, int(share * layers / 100 + 0.5))
        if at < decoder.smallest_depth:
            notes.append(f"{share}% pruned: needs depth {at}, and this model's smallest is {decoder.smallest_depth}.")
        else:
            shares[share] = at
    return depth, shares


def _longest(data: CalibrationData) -> int:
    """Tokens of the longest measured prompt."""
    return max(len(row.prompt_ids) for row in data.rows_of("verify"))


def _tokens(decoder: Decoder, data: CalibrationData, settings: Settings) -> int:
    tokens = settings.tokens or int(data.report.prompt_tokens["median"])
    context = context_length(decoder.model)
    if context is not None and tokens > context:
        raise InputError(f"--tokens {tokens} is more than the model's context of {context} tokens.")
    return tokens


class _Bench:
    """Fits projections at some depths and measures everything on ``verify``.

    Args:
        depths: of the frontier, the comparison's ``depth`` among them.
        notes: gets a sentence about everything that this model cannot do.
    """

    def __init__(
        self,
        decoder: Decoder,
        data: CalibrationData,
        settings: Settings,
        depth: int,
        depths: list[int],
        notes: list[str],
    ):
        self.decoder, self.data, self.settings, self.notes = decoder, data, settings, notes
        self.depth, self.depths = depth, depths
        self.influence: list[float] | None = None
        self.projections = {("reuse", at): KVProjections(decoder, at) for at in depths}

    def measure(self) -> tuple[list[dict[str, Any]], dict[Point, dict[str, Any]]]:
        """The rows of the comparison, and figures by point of the frontier."""
        self._fit()
        if self.settings.train_steps:
            self._train()
        possible = [(at, kept) for at in self.depths for kept in self._possible(at)]
        points = {
            (kind, at, kept): Variant(kept.at(at), self.projections[kind, at])
            for kind in UNTRAINED
            for at, kept in possible
        }
        compared = self._compared()
        variants = {f"table {name}": each.variant for name, each in compared.items()}
        variants |= {str(point): variant for point, variant in points.items()}
        evaluation = Evaluation(self.decoder, variants)
        self._validate(f"measuring {len(variants)} ways to prune", evaluation, "verify")
        main = f"POP, {MAIN}"
        table = [
            {"name": name, "what": each.what, "projection": each.variant.projections.kind}
            | {"depth": each.variant.plan.depth, **each.variant.plan.kept.to_dict()}
            | {"removed": each.variant.removed, "skipped": each.variant.skipped}
            | _figures(evaluation, f"table {name}")
            | {MINUS_MAIN: None if name == main else _difference(evaluation, f"table {main}", f"table {name}")}
            for name, each in compared.items()
        ]
        return table, {point: _figures(evaluation, str(point)) for point in points}

    def _compared(self) -> dict[str, Compared]:
        """The comparison at one depth, without what this model cannot do."""
        settings, plan = self.settings, PruningPlan(self.depth, self.settings.boundary)
        kinds = [name for name in KINDS if (name, self.depth) in self.projections]
        fitted = {name: Variant(plan, self.projections[name, self.depth]) for name in kinds}
        trained = {
            name: replace(each, steps=settings.train_steps) for name, each in fitted.items() if name not in UNTRAINED
        }
        best, compared = fitted[MAIN], comparison(fitted | trained, fitted[MAIN])
        if settings.salient and self._runs(salient := replace(plan, salient=settings.salient)):
            what = f"as POP, {MAIN}, and the context tokens that the prompt's end attends to most run in full"
            compared[f"POP, {MAIN}, salient"] = Compared(what, replace(best, plan=salient))
        for name, each in self._other_layers(fitted["reuse"]).items():
            try:
                self.decoder.check_depth(each.variant.first)
            except InputError as error:
                self.notes.append(f"{name} is left out: {error}")
            else:
                compared[name] = each
        # What prunes with the whole method comes first.
        return dict(sorted(compared.items(), key=lambda each: _lacks_a_part(each[1].variant)))

    def _other_layers(self, reuse: Variant) -> dict[str, Compared]:
        module = BlockInfluence(self.decoder)
        self._validate("block influence of every layer", module, "fit")
        self.influence = module.influence.tolist()
        return other_layers(reuse, self.influence)

    def _possible(self, depth: int) -> Iterator[Kept]:
        """What may run in full at one depth, of the settings' choices."""
        longest = _longest(self.data)
        yield from (
            kept
            for kept in self.settings.kept
            if number_of(kept.boundary, longest) < longest and self._runs(kept.at(depth))
        )

    def _runs(self, plan: PruningPlan) -> bool:
        """Whether the model can run this plan on these rows; else a note says why not."""
        try:
            check_salient(self.decoder, plan, ragged=isinstance(plan.boundary, float))
            check_split(self.decoder, self.data.rows_of("verify"), plan.boundary)
        except InputError as error:
            self.notes.append(f"{plan.kept} at depth {plan.depth} is left out: {error}")
            return False
        return True

    # --- fitting ------------------------------------------------------------------------------------------------

    def _fit(self) -> None:
        for name in UNTRAINED:
            for fitted in kind_named(name).fit(
                self.decoder,
                self.depths,
                FITTING,
                boundary=1,
                fit_rows=self.data.loader("fit"),
                tune_rows=self.data.loader("tune"),
                validate=lambda title, module, rows: self._trainer(title).validate(module, rows, verbose=False),
            ):
                self.projections[name, fitted.depth] = fitted.projections

    def _train(self) -> None:
        """Every trained kind at the comparison's depth, together on the same batches."""
        start, names = self.projections[MAIN, self.depth], [name for name in KINDS if name not in UNTRAINED]
        if not start.fitted_layers:
            self.notes.append(f"{', '.join(names)}: at depth {self.depth} projections are exact, nothing is trained.")
            return
        trainings = {
            name: KVProjectionTraining(
                start.copy(),
                boundary=self.settings.boundary,
                kind=name,
                kind_arguments=trained_kind(name).arguments(FITTING),
                learning_rate=FITTING.learning_rate,
            )
            for name in names
        }
        steps = self.settings.train_steps
        trainer = self._trainer(f"training {' and '.join(names)}", max_steps=steps, max_epochs=-1)
        trainer.fit(JointTraining(list(trainings.values())), self.data.training_steps())
        self.projections |= {(name, self.depth): each.trained() for name, each in trainings.items()}

    def _validate(self, title: str, module: lightning.LightningModule, split: str) -> None:
        self._trainer(title).validate(module, self.data.loader(split), verbose=False)

    def _trainer(self, title: str, **arguments) -> Trainer:
        device = self.decoder.model.device
        return Trainer(
            lightning.Trainer(
                accelerator="gpu" if device.type == "cuda" else "cpu",
                devices=[device.index or 0] if device.type == "cuda" else 1,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                inference_mode=False,  # what is fitted in one pass is trained in another
                callbacks=[_Progress(title)],
                **arguments,
            )
        )


class _Progress(lightning.Callback):
    """A bar with the time that is left, for one pass over rows or one training."""

    def __init__(self, title: str):
        self.title, self.bar = title, None

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.bar = tqdm(total=sum(trainer.num_val_batches), desc=self.title, unit="batch")

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.bar = tqdm(total=trainer.max_steps, desc=self.title, unit="step")

    def _step(self, *_) -> None:
        self.bar.update()

    def _close(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    on_validation_batch_end = on_train_batch_end = _step
    on_validation_end = on_train_end = on_exception = _close


def _lacks_a_part(variant: Variant) -> bool:
    return variant.is_ablation or not variant.plan.boundary


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(evaluation: Evaluation, name: str) -> dict[str, dict[str, Any]]:
    """By metric: the full model's mean over prompts, the variant's, their difference and its paired interval."""
    rows = evaluation.rows(name)
    values = {key: prompt_means(each, rows["prompt"]).numpy() for key, each in rows.items() if key != "prompt"}
    zeros = torch.zeros(len(values["kl"])).numpy()
    pairs = {
        "exact_match": (values["teacher_exact_match"], values["exact_match"], True),
        "nll": (values["teacher_nll"], values["nll"], False),
        "kl": (zeros, values["kl"], False),
    }
    found = {
        metric: {"full": float(full.mean()), "value": float(pruned.mean())}
        | paired_interval(full, pruned, CONFIDENCE, rate=rate)._asdict()
        for metric, (full, pruned, rate) in pairs.items()
    }
    agreement = values["agreement"]  # of the full model with itself it is 1, so nothing can be gained
    same = sameness_interval(agreement.tolist(), CONFIDENCE)._asdict()
    return found | {"agreement": {"full": 1.0, "value": float(agreement.mean())} | same}


def _difference(evaluation: Evaluation, first: str, second: str) -> dict[str, Any]:
    """KL of the second variant minus that of the first, with its interval, paired by prompt."""
    means = [prompt_means(rows["kl"], rows["prompt"]).numpy() for rows in map(evaluation.rows, (first, second))]
    return paired_interval(*means, CONFIDENCE, rate=False)._asdict()


def _timed(
    decoder: Decoder,
    points: Sequence[Point],
    projections: dict[tuple[str, int], KVProjections],
    tokens: int,
    settings: Settings,
) -> dict[tuple[int, Kept], dict[str, Any]]:
    """TTFT of every plan in turn with the full model's; kinds of projections cost the same."""
    plans, timed = list(dict.fromkeys((at, kept) for _, at, kept in points)), {}
    for at, kept in tqdm(plans, desc="timing prefill", unit="plan"):
        generator = StageAwareGenerator(decoder.model, kept.at(at), projections[MAIN, at])
        with memory_advice(f"a prefill of {settings.batch} x {tokens} tokens: lower --batch or --tokens"):
            timed[at, kept] = measure_ttft(generator, tokens, batch=settings.batch, repeats=settings.repeats)
    return timed
