"""The stages of ``pop-fit`` in order: load, score, fit projections, search, verify and export, report.

The modules and callbacks measure and decide; this file says what follows from their decisions. What a stage leaves
behind is kept by ``run_folder.py``, so that a run can be killed anywhere and resumed.
"""

import json
from dataclasses import asdict
from importlib.metadata import version

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pop_lightning.artifact import base_identity
from pop_lightning.benchmark import measure_ttft
from pop_lightning.callbacks import AccuracyBudget, ExportArtifact
from pop_lightning.data import CalibrationData, Row, until_end
from pop_lightning.decoder import Decoder
from pop_lightning.depths import candidates
from pop_lightning.errors import InputError
from pop_lightning.evaluate import Evaluation, Variant
from pop_lightning.files import write_json
from pop_lightning.fitting import Distillation, closed_form, quiet_lightning
from pop_lightning.flops import prefill_flops
from pop_lightning.generator import StageAwareGenerator
from pop_lightning.importance import ImportanceScoring
from pop_lightning.metrics import row_loss, rows_needed, smallest_certifiable, upper_bound
from pop_lightning.models import context_length, end_tokens, load_model, load_tokenizer, vision_processor
from pop_lightning.plan import PruningPlan
from pop_lightning.prefill import check_decoder
from pop_lightning.projections import KVProjections
from pop_lightning.recipe import Recipe
from pop_lightning.report import print_table, write_report
from pop_lightning.run_folder import RunFolder
from pop_lightning.trainers import Trainers

EXPORTED, NOTHING_QUALIFIES = 0, 3


def fit(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> int:
    """Run every stage; returns the exit code (0 exported, 3 no depth keeps the budget).

    Raises:
        InputError: recipe, data, base or output folder do not fit.
        KeyboardInterrupt: Ctrl-C, also where Lightning caught it first.
    """
    quiet_lightning()
    folder = RunFolder(recipe, resume=resume, overwrite=overwrite)
    with folder.undone_on_bad_input():
        return _Run(recipe, folder).run()


class _Run:
    def __init__(self, recipe: Recipe, folder: RunFolder):
        self.recipe, self.folder = recipe, folder
        self.budget = AccuracyBudget(
            recipe.budget.metric, recipe.budget.max_drop, recipe.budget.confidence, recipe.budget.min_pruned
        )

    def run(self) -> int:
        if metrics := self.folder.read("metrics.json"):
            print(print_table(metrics))
            return EXPORTED if metrics["depth"] is not None else NOTHING_QUALIFIES
        self._load()
        self.folder.settle()
        importance = self.folder.once("importance.json", self._score)
        depths = candidates(self.recipe.budget, importance["prefill"], self.decoder)
        projections = self._fit_projections(depths)
        search = self.folder.once("state/search.json", lambda: self._search(projections))
        self.budget.sequence, self.budget.decisions = search["sequence"], search["decisions"]
        metrics = self._verify(projections, search, importance)
        write_report(metrics, importance, self.folder / "report.html")
        write_json(self.folder / "metrics.json", metrics)  # last: it says that the run is complete
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
        self.trainers = Trainers(recipe, self.folder.root)
        lightning.seed_everything(recipe.seed, verbose=False)
        self.tokenizer = load_tokenizer(
            model.base, revision=model.revision, trust_remote_code=model.trust_remote_code, required=True
        )
        self.model = load_model(
            model.base,
            revision=model.revision,
            dtype=model.dtype,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            device_map=model.device_map,
        )
        self._place()
        self.decoder = Decoder(self.model)
        check_decoder(self.decoder)
        self.data = CalibrationData(
            data.calibration,
            self.tokenizer,
            split=data.split,
            max_prompt_tokens=data.max_prompt_tokens,
            max_response_tokens=data.max_response_tokens,
            context=context_length(self.model),
            end_tokens=end_tokens(self.model),
            limit=data.limit,
            batch_size=data.batch_size,
            splits=asdict(data.splits),
            seed=recipe.seed,
            vision=vision_processor(
                self.decoder.vision_tokens,
                model.base,
                revision=model.revision,
                trust_remote_code=model.trust_remote_code,
            ),
            allow_urls=data.allow_urls,
        )
        self.data.setup()
        self.base = base_identity(self.model, model.base, model.revision)
        base = self.base["fingerprint"]
        stored = self.folder.once("state/data.json", lambda: {"digest": self.data.digest, "base": base})
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

    def _place(self, *projections: KVProjections) -> None:
        """Put the base where the trainer runs; after each stage Lightning leaves it on the CPU."""
        if self.recipe.model.device_map is None:
            for each in (self.model, *projections):
                each.to(self.trainers.device)

    def _respond(self, rows: list[Row]) -> list[tuple[int, ...]]:
        batch = self.data.batch(rows)
        prompt = batch["prompt_length"]
        output = self.model.generate(
            **self.decoder.inputs(batch),
            max_new_tokens=self.recipe.data.max_response_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )[:, prompt:].tolist()
        ends = end_tokens(self.model)
        return [until_end(tokens, ends) for tokens in output]

    def _check_rows(self) -> None:
        budget, boundary = self.recipe.budget, self.recipe.boundary
        for name in ("fit", "tune", "search", "verify"):
            for row in self.data.rows_of(name):
                if row.images and self.decoder.splits_image(row.prompt_ids, boundary):
                    raise InputError(
                        f"boundary {boundary} begins inside an image of {row.origin}, whose tokens attend to one "
                        "another: choose a boundary that ends before the image or holds all of it."
                    )
        rows = len(self.data.rows_of("verify"))
        needed = rows_needed(budget.max_drop, budget.metric, budget.confidence)
        if needed is not None and rows < needed:
            least = smallest_certifiable(rows, budget.metric, budget.confidence)
            certifies = "" if least is None else f" (they can show a drop of {least:.4f} at best)"
            raise InputError(
                f"budget.max_drop {budget.max_drop:g} at confidence {budget.confidence:g} needs {needed} rows in the "
                f"verify split, found {rows}{certifies}; give more rows or raise data.splits.verify or budget.max_drop."
            )

    # --- score ----------------------------------------------------------------------------------------------------

    def _score(self) -> dict:
        scoring = ImportanceScoring(self.decoder, self.recipe.boundary, self.recipe.seed)
        loader = self.data.loader("fit", limit=self.recipe.importance.rows)
        # Scoring steps no optimiser: what belongs to training is refused there by Lightning.
        alone = {"max_epochs": 1, "accumulate_grad_batches": 1, "gradient_clip_val": None}
        self.trainers.make("scoring layers", **alone).fit(scoring, loader)
        prefill, decode = scoring.scores.T.tolist()
        return {
            "layers": self.decoder.num_layers,
            "rows": scoring.rows,
            "seed": self.recipe.seed,
            "boundary": self.recipe.boundary,
            "prefill": prefill,
            "decode": decode,
        }

    # --- fit projections ------------------------------------------------------------------------------------------

    def _fit_projections(self, depths: list[int]) -> dict[tuple[int, str], KVProjections]:
        """Projections by (depth, kind): reuse, and the kinds up to the recipe's."""
        kind = self.recipe.projection.kind
        found = {(depth, "reuse"): KVProjections(self.decoder, depth) for depth in depths}
        trained = kind in ("lora", "full")
        start = self.recipe.projection.start if trained else kind
        if start == "closed_form":
            found |= {(depth, start): each for depth, each in self._closed_form(depths).items()}
        if trained:
            for depth in depths:
                found[depth, kind] = self._train(depth, found[depth, start])
        return found

    def _closed_form(self, depths: list[int]) -> dict[int, KVProjections]:
        """Closed form for every depth, each choice about it made on the tune split; reuse is one of the choices."""
        settings = self.recipe.projection
        if self.folder.read("state/ridge.json"):
            return {depth: self.folder.read_projections(self.decoder, depth, "closed_form") for depth in depths}
        chosen, ridges = {}, {}
        for fitted in closed_form(
            self.decoder,
            depths,
            boundary=self.recipe.boundary,
            ridges=settings.ridge,
            grouping=settings.grouping,
            queries=settings.queries,
            refit=settings.refit,
            memory=int(settings.memory_gib * 2**30),
            fit_rows=self.data.loader("fit"),
            tune_rows=self.data.loader("tune"),
            validate=lambda what, module, rows: self.trainers.make(what).validate(module, rows, verbose=False),
        ):
            chosen[fitted.depth] = fitted.options[fitted.best()]
            ridges[fitted.depth] = fitted.summary()
            self.folder.write_projections(chosen[fitted.depth])
        write_json(self.folder / "state/ridge.json", ridges)
        return chosen

    def _train(self, depth: int, start: KVProjections) -> KVProjections:
        settings = self.recipe.projection
        kind = settings.kind
        if self.folder.has_projections(depth, kind):
            return self.folder.read_projections(self.decoder, depth, kind)
        distillation = Distillation(
            start,
            PruningPlan(depth, self.recipe.boundary),
            lora_arguments=asdict(settings.lora) if kind == "lora" else None,
            seed=self.recipe.seed,
            temperature=settings.temperature,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            warmup=settings.warmup,
            decay=settings.decay,
            kv_match=settings.kv_match,
            hidden_match=settings.hidden_match,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        if distillation.module is not None:
            folder = self.folder / "checkpoints" / f"{kind}-depth{depth}"
            keep = ModelCheckpoint(folder, save_last=True, every_n_train_steps=settings.checkpoint_every, save_top_k=0)
            last = folder / "last.ckpt"
            start = torch.load(last, weights_only=True)["global_step"] if last.is_file() else 0
            trainer = self.trainers.make(
                f"training depth {depth}" + (f" from step {start}" if start else ""),
                keep,
                max_steps=settings.steps,
                max_epochs=-1,
                enable_checkpointing=True,
            )
            batches = start * (self.recipe.trainer.get("accumulate_grad_batches") or 1)  # a step reads several
            loader = self.data.train_dataloader(settings.batch_size, batches)
            trainer.fit(distillation.module, loader, ckpt_path=last if start else None, weights_only=True)
        projections = distillation.finish(self.folder / "adapters" / f"depth{depth}")
        self.folder.write_projections(projections)
        return projections

    # --- search and verify ----------------------------------------------------------------------------------------

    def _search(self, projections: dict[tuple[int, str], KVProjections]) -> dict:
        """Measure every depth and kind on the search split; the budget narrows the depths of the recipe's kind."""
        boundary, kind = self.recipe.boundary, self.recipe.projection.kind
        variants = {
            f"{depth} {name}": Variant(PruningPlan(depth, boundary), each)
            for (depth, name), each in projections.items()
        }
        evaluation = Evaluation(self.decoder, variants)
        self.budget.watch("search", {depth: f"{depth} {kind}" for depth, name in projections if name == kind})
        self.trainers.make("searching", self.budget).validate(evaluation, self.data.loader("search"), verbose=False)
        ridges = self.folder.read("state/ridge.json")
        curve = []
        for depth, name in sorted(projections, key=lambda each: -each[0]):
            rows = evaluation.rows(f"{depth} {name}")
            losses = row_loss(rows, self.budget.metric).tolist()
            entry = {"depth": depth, "projection": name, "rows": len(losses)}
            entry |= {key: rows[key].mean().item() for key in ("kl", "agreement", "nll_increase", "exact_match")}
            entry["loss"] = sum(losses) / len(losses)
            entry["bound"] = upper_bound(losses, self.budget.metric, self.budget.confidence)
            if name == "closed_form":
                # No ridge: reuse did best on tune.
                entry |= {key: ridges[str(depth)][key] for key in ("objective", "ridge")}
            curve.append(entry)
        return {"curve": curve, "sequence": self.budget.sequence, "decisions": self.budget.decisions}

    def _verify(self, projections: dict[tuple[int, str], KVProjections], search: dict, importance: dict) -> dict:
        """Open the verify split once, export what it lets through, and measure what the report compares."""
        recipe, kind, layers = self.recipe, self.recipe.projection.kind, self.decoder.num_layers
        measured = {"curve": search["curve"]}
        if self.budget.sequence:
            variants = {
                str(depth): Variant(PruningPlan(depth, recipe.boundary), projections[depth, kind])
                for depth in self.budget.sequence
            }
            evaluation = Evaluation(self.decoder, variants)
            export = ExportArtifact(self.folder / "artifact", self.budget, self.base, recipe.to_dict(), measured)
            self.budget.watch("verify", {depth: str(depth) for depth in self.budget.sequence})
            self.trainers.make("verifying", self.budget, export).validate(
                evaluation, self.data.loader("verify"), verbose=False
            )
        depth = self.budget.depth
        deepest = depth if depth is not None else min(d for d, _ in projections)
        plan = PruningPlan(deepest, recipe.boundary)
        tokens = int(self.data.report.prompt_tokens["median"])
        full, pruned = (prefill_flops(self.decoder, each, tokens) for each in (PruningPlan(layers), plan))
        self._place(projections[deepest, kind])
        generator = StageAwareGenerator(self.model, plan, projections[deepest, kind])
        return {
            "format": 1,
            "depth": depth,
            "layers": layers,
            "boundary": recipe.boundary,
            "projection": kind,
            "budget": {k: v for k, v in asdict(recipe.budget).items() if k != "candidates"},
            "rows": {name: len(self.data.rows_of(name)) for name in ("fit", "tune", "search", "verify")}
            | {"unusable": dict(self.data.report.unusable)},
            "smallest_certifiable_drop": smallest_certifiable(
                len(self.data.rows_of("verify")), recipe.budget.metric, recipe.budget.confidence
            ),
            "verified": measured.get("verified"),
            "verification": [asdict(verdict) for verdict in self.budget.verdicts],
            "curve": search["curve"],
            "decisions": self.budget.decisions,
            "comparison": self._compare(deepest, projections),
            "arithmetic": {
                "prompt_tokens": tokens,
                "full_flops": full,
                "pruned_flops": pruned,
                "saved": 1 - pruned / full,
                "ratio": full / pruned,
            },
            "ttft": measure_ttft(generator, tokens),
            "versions": {name: version(name) for name in ("pop-lightning", "torch", "transformers", "lightning")},
            "device": str(self.model.device),
        }

    def _compare(self, depth: int, projections: dict[tuple[int, str], KVProjections]) -> list[dict]:
        """The same depth pruned in every way, on the search split (the verify split is for the one test)."""
        plan = PruningPlan(depth, self.recipe.boundary)
        kind = self.recipe.projection.kind
        best, reuse = projections[depth, kind], projections[depth, "reuse"]
        table = {
            "full model": ("no pruning", Variant(PruningPlan(self.decoder.num_layers), reuse)),
            **{
                f"POP, {name}": (f"prefill pruned, {name.replace('_', ' ')} projections", Variant(plan, each))
                for (d, name), each in projections.items()
                if d == depth
            },
            "layers removed": (
                "the same layers removed in both stages, as older pruning does",
                Variant(plan, reuse, remove_layers=True),
            ),
            "no boundary handling": (
                "the last prompt token is pruned like the context",
                Variant(PruningPlan(depth, 0), best),
            ),
            "no KV projection": ("the pruned layers see no context", Variant(plan, reuse, context_visible=False)),
        }
        evaluation = Evaluation(self.decoder, {name: variant for name, (_, variant) in table.items()})
        self.trainers.make("comparing").validate(evaluation, self.data.loader("search"), verbose=False)
        rows = []
        for name, (what, variant) in table.items():
            means = {key: value.mean().item() for key, value in evaluation.rows(name).items()}
            rows.append(
                {"name": name, "what": what, "depth": variant.plan.depth, "rows": len(evaluation.rows(name)["kl"])}
            )
            rows[-1] |= {key: means[key] for key in ("exact_match", "agreement", "kl")}
        return rows
