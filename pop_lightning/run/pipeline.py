"""The stages of ``pop-fit`` in order: load, score, fit projections, search, verify and export, report.

The modules and callbacks measure and decide; this file says what follows from their decisions. What a stage leaves
behind is kept by ``run_folder.py``, so that a run can be killed anywhere and resumed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version

import lightning

from pop_lightning.benchmark.benchmark import measure_ttft
from pop_lightning.callbacks import AccuracyBudget, ExportArtifact
from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import Choice, PruningPlan
from pop_lightning.core.quiet import quiet_lightning
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.processor import vision_processor
from pop_lightning.data.rows import Row, until_end
from pop_lightning.evaluation.bounds import rows_needed, smallest_certifiable
from pop_lightning.evaluation.evaluate import Evaluation, Variant, groups
from pop_lightning.evaluation.search import Training
from pop_lightning.evaluation.verdicts import Verdict
from pop_lightning.fitting.importance import ImportanceScoring
from pop_lightning.fitting.kinds import kind as kind_named
from pop_lightning.fitting.kinds import trained_kind
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.generation.base_identity import base_identity
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import context_length, end_tokens, load_model, load_tokenizer
from pop_lightning.pruning.attach_check import check_decoder
from pop_lightning.pruning.flops import prefill_flops, speedup
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.run.depths import (
    check_images,
    listed_boundaries,
    possible_boundaries,
    reaching,
    to_measure,
)
from pop_lightning.run.folder import RunFolder, file_name
from pop_lightning.run.recipe import Recipe
from pop_lightning.run.report import print_table, write_report
from pop_lightning.run.trainers import Trainers

EXPORTED, NOTHING_QUALIFIES = 0, 3


def fit(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> int:
    """Run every stage; returns the exit code (0 exported, 3 no depth keeps the budget).

    Of a run that starts processes of its own also 2 (bad input, printed by the process that found it) and 1 (a process
    failed).

    Raises:
        InputError: recipe, data, base or output folder do not fit.
        KeyboardInterrupt: Ctrl-C, also where Lightning caught it first.
    """
    quiet_lightning()
    trainers = Trainers(recipe)
    if trainers.starts_processes:
        return trainers.start(*["--resume"] * resume, *["--overwrite"] * overwrite)
    with trainers.processes():
        folder = RunFolder(recipe, resume=resume, overwrite=overwrite)
        with folder.undone_on_bad_input():
            return _Run(recipe, folder, trainers).run()


class _Run:
    """One run; of several processes each goes through the same steps, and ``folder`` writes on the first alone."""

    def __init__(self, recipe: Recipe, folder: RunFolder, trainers: Trainers):
        self.recipe, self.folder, self.trainers = recipe, folder, trainers

    def run(self) -> int:
        if metrics := self.folder.read("metrics.json"):
            print(f"the run in {self.folder} had ended already")
            return self._end(metrics)
        self._load()
        self.folder.settle()
        importance = self.folder.once("importance.json", self._score)
        depths = to_measure(self.recipe, self.decoder, importance["prefill"], self._boundaries, self.tokens)
        self._fit(depths)
        curve = self._search(depths)
        self._verify(curve)
        metrics = self._metrics(curve)
        if distributed.is_first():
            write_report(metrics, importance, self.folder / "report.html")
        self.folder.write("metrics.json", metrics)  # last: it says that the run is complete
        return self._end(metrics)

    def _end(self, metrics: dict) -> int:
        print(print_table(metrics))
        print(f"report: {self.folder / 'report.html'}")
        if metrics["depth"] is None:
            return NOTHING_QUALIFIES
        print(f"artifact: {self.folder / 'artifact'}")
        return EXPORTED

    # --- load -----------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        recipe = self.recipe
        model, data = recipe.model, recipe.data
        lightning.seed_everything(recipe.seed, verbose=False)
        self.tokenizer = distributed.first_then_others(
            lambda: load_tokenizer(
                model.base, revision=model.revision, trust_remote_code=model.trust_remote_code, required=True
            )
        )
        self.model = self.trainers.load(
            lambda: load_model(
                model.base,
                revision=model.revision,
                dtype=model.dtype,
                attn_implementation=model.attn_implementation,
                trust_remote_code=model.trust_remote_code,
                device_map=model.device_map,
            )
        )
        self.decoder = Decoder(self.model)
        check_decoder(self.decoder)
        self.data = CalibrationData(
            data.calibration,
            self.tokenizer,
            **recipe.data_arguments(),
            context=context_length(self.model),
            end_tokens=end_tokens(self.model),
            vision=vision_processor(
                self.decoder.vision_tokens,
                model.base,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
            ),
        )
        distributed.first_then_others(self.data.setup)
        self.base = base_identity(self.model, model.base, model.revision)
        base = self.base["fingerprint"]
        stored = self.folder.once(
            "state/data.json", lambda: {"digest": self.data.digest, "base": base, "versions": _versions()}
        )
        for package, before in stored["versions"].items():
            if before != (now := version(package)):
                print(f"note: this run was started with {package} {before} and goes on with {now}")
        if stored["base"] != base:
            raise InputError(
                f"model.base {model.base!r} has other weights than when the run in output {self.folder} was started: "
                "resume it with the same base, or --overwrite it."
            )
        if stored["digest"] != self.data.digest:
            raise InputError(
                f"data.calibration {data.calibration!r} holds other rows than when the run in output {self.folder} was "
                "started: resume it with the same rows, or --overwrite it."
            )
        self._check_rows()  # before hours of generation
        if self.data.missing_responses():
            made_with = json.dumps([asdict(model), data.max_response_tokens])
            self.data.fill_responses(self._respond, self.folder.state / "responses.json", made_with=made_with)
        print(f"data: {self.data.report}")
        self._check_rows()
        budget = recipe.budget
        self.budget = AccuracyBudget(
            budget.metric,
            budget.max_drop,
            budget.confidence,
            budget.min_pruned,
            speedup=budget.speedup,
            verify_prompts=self.data.prompts_of("verify"),
        )

    def _respond(self, rows: list[Row]) -> list[tuple[int, ...]]:
        batch = self.data.batch(rows)
        prompt = batch["prompt_length"]
        output = self.model.generate(
            **self.decoder.inputs(batch),
            max_new_tokens=self.recipe.data.max_response_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )[:, prompt:].tolist()
        return [until_end(tokens, self.data.ends) for tokens in output]

    def _check_rows(self) -> None:
        """Refuse what the rows cannot give, or memory cannot hold, whatever scoring finds."""
        budget = self.recipe.budget
        # The deepest candidate is the same for every importance, and takes most.
        depths = to_measure(self.recipe, self.decoder, [1.0] * self.decoder.num_layers, self._boundaries, self.tokens)
        kind_named(self._start).passes(self.decoder, depths, self.recipe.projection)
        check_images(self.recipe, self.decoder, self.data.rows(), self._boundaries, self.trainers.shards_base)
        if budget.speedup is not None:
            reaching(budget, self.decoder, self._boundaries, self.tokens)
            return
        prompts = self.data.prompts_of("verify")
        needed = rows_needed(budget.max_drop, budget.metric, budget.confidence)
        if needed is not None and prompts < needed:
            least = smallest_certifiable(prompts, budget.metric, budget.confidence)
            certifies = "" if least is None else f" (they can show a drop of {least:.4f} at best)"
            raise InputError(
                f"budget.max_drop {budget.max_drop:g} at confidence {budget.confidence:g} needs {needed} different "
                f"prompts in the verify split, found {prompts}{certifies}; give more rows or raise data.splits.verify "
                "or budget.max_drop."
            )

    @property
    def tokens(self) -> int:
        """The prompt length that operations are counted at: the rows' median."""
        return int(self.data.report.prompt_tokens["median"])

    @property
    def _boundaries(self) -> list[int]:
        """What ``boundary`` may become."""
        return possible_boundaries(self.recipe, self._listed_boundaries)

    @property
    def _listed_boundaries(self) -> list[int]:
        return listed_boundaries(self.recipe.budget, self.decoder, self.data.rows(), self.tokens)

    # --- score ----------------------------------------------------------------------------------------------------

    def _score(self) -> dict:
        settings = self.recipe.importance
        scoring = ImportanceScoring(
            self.decoder,
            self.recipe.fit_boundary,
            self.recipe.seed,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        loader = self.data.loader("fit", settings.rows, settings.rows_at_a_time(self.recipe.data))
        self.trainers.make("scoring layers").validate(scoring, loader, verbose=False)
        prefill, decode = scoring.scores.T.tolist()
        return {
            "layers": self.decoder.num_layers,
            "rows": scoring.rows,
            "seed": self.recipe.seed,
            "boundary": self.recipe.fit_boundary,
            "prefill": prefill,
            "decode": decode,
        }

    # --- fit projections ------------------------------------------------------------------------------------------

    @property
    def _trains(self) -> bool:
        return kind_named(self.recipe.projection.kind).trains

    @property
    def _start(self) -> str:
        """The recipe's kind without training: what is measured everywhere, and where training starts."""
        return kind_named(self.recipe.projection.kind).starts_from(self.recipe.projection)

    @property
    def _untrained(self) -> list[str]:
        return list(dict.fromkeys(("reuse", self._start)))

    def _projections(self, choice: Choice) -> KVProjections:
        return self.folder.read_projections(self.decoder, choice)

    def _fit(self, depths: list[int]) -> None:
        """The kind that needs no training at every depth, each choice about it made on the tune split."""
        if self.folder.read("state/ridge.json"):
            return
        ridges = {}
        for fitted in kind_named(self._start).fit(
            self.decoder,
            depths,
            self.recipe.projection,
            boundary=self.recipe.fit_boundary,
            fit_rows=self.data.loader("fit"),
            tune_rows=self.data.loader("tune"),
            validate=lambda what, module, rows: self.trainers.make(what).validate(module, rows, verbose=False),
        ):
            ridges[fitted.depth] = fitted.how
            self.folder.write_projections(Choice(fitted.depth, self._start), fitted.projections)
            del fitted  # not held through the next pass
        if ridges:
            self.folder.write("state/ridge.json", ridges)

    def _train(self, choice: Choice) -> None:
        """Train up to ``choice.steps``, from where the last round or an interrupted run left off."""
        settings = self.recipe.projection
        depth, kind, steps = choice
        if self.folder.has_projections(choice):
            return
        start = self._projections(Choice(depth, self._start))
        if not start.fitted_layers:  # its projections are exact
            self.folder.write_projections(choice, start)
            return
        training = KVProjectionTraining(
            start,
            boundary=self.boundary,
            kind=kind,
            kind_arguments=trained_kind(kind).arguments(settings),
            seed=self.recipe.seed,
            temperature=settings.temperature,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup,
            decay=settings.decay,
            round_steps=settings.steps,
            kv_match=settings.kv_match,
            hidden_match=settings.hidden_match,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        self.trainers.train(
            f"training depth {depth} for {steps} steps",
            training,
            lambda first: self.data.training_steps(settings.batch_size, first),
            steps=steps,
            rounds=steps // settings.steps,
            checkpoints=self.folder / "checkpoints" / f"{kind}-depth{depth}",
            every=settings.checkpoint_every,
        )
        adapters = self.folder / "adapters" / f"depth{depth}-steps{steps}"
        self.folder.write_projections(choice, training.trained(adapters if distributed.is_first() else None))

    # --- search ---------------------------------------------------------------------------------------------------

    def _search(self, depths: list[int]) -> list[dict]:
        """Measure on the search split, choose the boundary, and train what the budget asks for; returns the curve."""
        choices = [Choice(depth, kind) for depth in depths for kind in self._untrained]
        measured = self.folder.once(
            "state/search.json", lambda: {"curve": self._measure("searching", choices, self._boundaries)}
        )["curve"]
        self.boundary = self._boundaries[0]
        if self.recipe.boundary == "auto":
            self.boundary = self._choose_boundary(measured, depths)
        curve = [entry for entry in measured if entry["boundary"] == self.boundary]
        if self.recipe.budget.speedup is not None:
            depth = reaching(self.recipe.budget, self.decoder, [self.boundary], self.tokens)[self.boundary]
            curve = [entry for entry in curve if entry["depth"] == depth]
        settings = self.recipe.projection
        training = Training(settings.kind, settings.steps, self.recipe.budget.extensions) if self._trains else None
        self.budget.search(curve, self._start, self.decoder.num_layers, training)
        told = self._tell(0)
        while (proposal := self.budget.propose()) is not None:
            self._train(proposal.choice)
            (entry,) = self.folder.once(
                f"state/search-{file_name(proposal.choice)}.json",
                lambda choice=proposal.choice: {"curve": self._measure("searching", [choice], [self.boundary])},
            )["curve"]
            curve.append(entry)
            self.budget.record(entry)
            told = self._tell(told)
        return self._one_round_each(curve)

    def _one_round_each(self, curve: list[dict]) -> list[dict]:
        """One entry per depth and kind, shallowest pruning first: of a training's rounds the best."""
        grouped: dict[tuple[int, str], list[dict]] = {}
        for entry in curve:
            grouped.setdefault((-entry["depth"], entry["projection"]), []).append(entry)
        kept = []
        for _, entries in sorted(grouped.items()):
            rounds = [{name: entry[name] for name in ("steps", "loss", "kl")} for entry in entries if "steps" in entry]
            kept.append(self.budget.best(entries) | ({"rounds": rounds} if rounds else {}))
        return kept

    def _tell(self, told: int) -> int:
        """Print the decisions that were not printed yet."""
        for line in self.budget.decisions[told:]:
            print(line, flush=True)
        return len(self.budget.decisions)

    def _choose_boundary(self, measured: list[dict], depths: list[int]) -> int:
        wanted = [(depth, k) for depth in depths for k in self._boundaries]
        if self.recipe.budget.speedup is not None:
            found = reaching(self.recipe.budget, self.decoder, self._boundaries, self.tokens)
            wanted = [(depth, k) for k, depth in found.items()]
        speedups = {(depth, k): self._speedup(depth, k) for depth, k in wanted}
        return self.budget.choose_boundary(measured, self._start, speedups, self.decoder.num_layers)

    def _speedup(self, depth: int, boundary: int) -> float:
        return speedup(self.decoder, PruningPlan(depth, boundary), self.tokens)

    def _measure(self, what: str, choices: Sequence[Choice], boundaries: Sequence[int]) -> list[dict]:
        """Curve entries of ``choices`` at each boundary, on the search split."""
        ridges = self.folder.read("state/ridge.json")
        entries = []
        for group in groups(self.decoder, choices, self.recipe.projection.memory_bytes):
            variants = {}
            for choice in group:
                projections = self._projections(choice)
                variants |= {(choice, k): Variant(PruningPlan(choice.depth, k), projections) for k in boundaries}
            names = {key: f"{key[0]}, boundary {key[1]}" for key in variants}
            self.budget.watch("search", names.values())
            evaluation = Evaluation(self.decoder, {names[key]: variant for key, variant in variants.items()})
            depths = ", ".join(dict.fromkeys(str(choice.depth) for choice in group))
            self.trainers.make(f"{what} at depth {depths}", self.budget).validate(
                evaluation, self.data.loader("search"), verbose=False
            )
            for choice, k in variants:
                entry = {"depth": choice.depth, "projection": choice.projection, "boundary": k}
                if choice.steps:
                    entry["steps"] = choice.steps
                entry |= self.budget.measured[names[choice, k]]
                for key in kind_named(choice.projection).chosen:
                    entry[key] = ridges[str(choice.depth)][key]
                entries.append(entry)
        return entries

    # --- verify ---------------------------------------------------------------------------------------------------

    def _verify(self, curve: list[dict]) -> None:
        """Open the verify split once, and export what it lets through."""
        stored = self.folder.once("state/verify.json", lambda: self._open_verify(curve))
        self.budget.verdicts = [Verdict(**verdict) for verdict in stored["verdicts"]]
        told = len(self.budget.decisions)
        self.budget.conclude(self.decoder.num_layers)
        self._tell(told)

    def _open_verify(self, curve: list[dict]) -> dict:
        measured: dict = {"curve": curve}
        if (wanted := self.recipe.budget.speedup) is not None:
            counted = self._speedup(self.budget.sequence[0].depth, self.boundary)
            measured["speedup"] = {"wanted": wanted, "counted": counted, "prompt_tokens": self.tokens}
        export = ExportArtifact(self.folder / "artifact", self.budget, self.base, self.recipe.to_dict(), measured)
        for group in groups(self.decoder, self.budget.sequence, self.recipe.projection.memory_bytes):
            if self.budget.verified:
                break
            names = {choice.depth: str(choice.depth) for choice in group}
            variants = {
                names[choice.depth]: Variant(PruningPlan(choice.depth, self.boundary), self._projections(choice))
                for choice in group
            }
            self.budget.watch("verify", names)
            self.trainers.make("verifying", self.budget, export).validate(
                Evaluation(self.decoder, variants), self.data.loader("verify"), verbose=False
            )
        return {"verdicts": [asdict(verdict) for verdict in self.budget.verdicts]}

    # --- report ---------------------------------------------------------------------------------------------------

    def _metrics(self, curve: list[dict]) -> dict:
        recipe, layers, tokens = self.recipe, self.decoder.num_layers, self.tokens
        shown = self.budget.choice or self._nearest(curve)
        plan = PruningPlan(shown.depth, self.boundary)
        full, pruned = (prefill_flops(self.decoder, each, tokens) for each in (PruningPlan(layers), plan))
        listed = self._listed_boundaries
        compared = sorted({*listed, self.boundary}) if listed else []
        boundaries = self._measure("comparing boundaries", [shown], compared) if compared else []
        comparison = self._compare(shown, curve)
        generator = StageAwareGenerator(self.model, plan, self._projections(shown))
        used = {choice.depth: choice for choice in self.budget.sequence}
        return {
            "format": 1,
            "depth": self.budget.depth,
            "layers": layers,
            "boundary": self.boundary,
            "projection": shown.projection,
            "budget": {k: v for k, v in asdict(recipe.budget).items() if k != "candidates"},
            "rows": {name: len(self.data.rows_of(name)) for name in ("fit", "tune", "search", "verify")}
            | {"unusable": dict(self.data.report.unusable)},
            "prompts": {name: self.data.prompts_of(name) for name in ("search", "verify")},
            "smallest_certifiable_drop": smallest_certifiable(
                self.data.prompts_of("verify"), recipe.budget.metric, recipe.budget.confidence
            ),
            "verified": self.budget.promise(),
            "verification": [
                asdict(verdict) | {"projection": used[verdict.depth].projection} for verdict in self.budget.verdicts
            ],
            "curve": curve,
            "boundaries": [entry | {"speedup": self._speedup(shown.depth, entry["boundary"])} for entry in boundaries],
            "decisions": self.budget.decisions,
            "comparison": comparison,
            "arithmetic": {
                "depth": shown.depth,
                "prompt_tokens": tokens,
                "full_flops": full,
                "pruned_flops": pruned,
                "saved": 1 - pruned / full,
                "ratio": full / pruned,
            },
            # A base in shards spends its time in gathering them, which says nothing about a served model.
            "ttft": None
            if self.trainers.shards_base
            else distributed.from_first(lambda: measure_ttft(generator, tokens)),  # alone: the others would compete
            "versions": _versions(),
            "device": str(self.model.device),
        }

    def _nearest(self, curve: list[dict]) -> Choice:
        """Where nothing qualifies: what lost least among the depths that would have been worth an artifact."""
        worth = [e for e in curve if self.decoder.num_layers - e["depth"] >= self.recipe.budget.min_pruned] or curve
        return Choice.of(min(worth, key=lambda each: (each["loss"], each["kl"])))

    def _compare(self, shown: Choice, curve: list[dict]) -> list[dict]:
        """The same depth pruned in every way, on the search split (the verify split is for the one test)."""
        plan = PruningPlan(shown.depth, self.boundary)
        measured = [e for e in curve if e["depth"] == shown.depth]
        fitted = {e["projection"]: self._projections(Choice.of(e)) for e in measured}
        best, reuse = fitted[shown.projection], fitted["reuse"]
        table = {
            "full model": ("no pruning", Variant(PruningPlan(self.decoder.num_layers), reuse)),
            **{
                f"POP, {name}": (f"prefill pruned, {name.replace('_', ' ')} projections", Variant(plan, each))
                for name, each in fitted.items()
            },
            "layers removed": (
                "the same layers removed in both stages, as older pruning does",
                Variant(plan, reuse, remove_layers=True),
            ),
            "no boundary handling": (
                "the last prompt token is pruned like the context",
                Variant(replace(plan, boundary=0), best),
            ),
            "no KV projection": ("the pruned layers see no context", Variant(plan, reuse, context_visible=False)),
        }
        evaluation = Evaluation(self.decoder, {name: variant for name, (_, variant) in table.items()})
        self.budget.watch("search", table)
        self.trainers.make("comparing", self.budget).validate(evaluation, self.data.loader("search"), verbose=False)
        return [
            {"name": name, "what": what, "depth": variant.plan.depth}
            | {key: self.budget.measured[name][key] for key in ("rows", "exact_match", "agreement", "kl")}
            for name, (what, variant) in table.items()
        ]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("pop-lightning", "torch", "transformers", "lightning")}
