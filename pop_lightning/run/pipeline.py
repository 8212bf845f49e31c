"""The stages of ``pop-fit`` in order: load, score, fit projections, search, verify and export, report.

Modules and callbacks measure and decide; this file acts on their decisions. What a stage returns is kept by
``folder.py``, so that a run can be killed anywhere and resumed.
"""

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pop_lightning.benchmark.benchmark import measure_ttft
from pop_lightning.callbacks import AccuracyBudget, ExportArtifact
from pop_lightning.callbacks.export_artifact import export
from pop_lightning.core import distributed
from pop_lightning.core.commands import script
from pop_lightning.core.errors import InputError
from pop_lightning.core.memory import memory_advice
from pop_lightning.core.notebook import show
from pop_lightning.core.plan import Choice, Kept, PruningPlan, in_order
from pop_lightning.core.quiet import quiet_lightning
from pop_lightning.data.examples import check_source
from pop_lightning.evaluation import search as selection
from pop_lightning.evaluation.ablations import comparison
from pop_lightning.evaluation.evaluate import Evaluation, Variant, groups
from pop_lightning.evaluation.search import Measured, Training
from pop_lightning.evaluation.verdicts import Verdict
from pop_lightning.fitting.kinds import kind as kind_named
from pop_lightning.fitting.selectors import SelectorFit
from pop_lightning.generation import hub
from pop_lightning.generation.artifact import read_artifact
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.pruning.flops import prefill_flops
from pop_lightning.pruning.selectors import selector_named
from pop_lightning.run import depths as candidates
from pop_lightning.run.examples import examples
from pop_lightning.run.folder import RunFolder, file_name
from pop_lightning.run.inputs import (
    RESUME,
    Run,
    about,
    load,
    scoring_module,
    start_kind,
    training_module,
    trains,
    untrained_kinds,
    versions,
)
from pop_lightning.run.progress import Progress
from pop_lightning.run.recipe import Recipe
from pop_lightning.run.report import summary, write_report
from pop_lightning.run.trainers import Trainers

EXPORTED, NOTHING_QUALIFIES = 0, 3
LOADING, IMPORTANCE, FITTING, SEARCH, VERIFICATION, REPORT = STAGES = (
    "loading",
    "importance",
    "fitting",
    "search",
    "verification",
    "report",
)


def fit(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, verbose: bool = False, push: str | None = None
) -> int:
    """Run every stage; returns the exit code (0 exported, 3 no depth keeps the budget).

    Args:
        resume: continue the run in ``recipe.output``.
        overwrite: replace it.
        verbose: print a line when a part of a stage begins, also where that is not a terminal.
        push: a repository of the hub where artifact and report are published as well.

    Of a run that starts processes of its own also 2 (bad input, printed by the process that found it) and 1 (a process
    failed).

    Raises:
        InputError: recipe, data, base or output folder do not fit.
        KeyboardInterrupt: Ctrl-C, also where Lightning caught it first.
    """
    quiet_lightning()
    if push is not None:
        hub.check_push(push)
    progress = Progress(stages(recipe), verbose)
    trainers = Trainers(recipe, progress)
    if trainers.starts_processes:
        flags = {"--resume": resume, "--overwrite": overwrite, "--verbose": verbose}
        asked = [flag for flag, given in flags.items() if given]
        return trainers.start(*asked, *(["--push", push] if push is not None else []))
    with trainers.processes():
        # Before the minutes that a large base may need to load; one node may lack what another one has.
        distributed.first_then_others(lambda: [check_source(source) for source in recipe.data.sources])
        folder = RunFolder(recipe, resume=resume, overwrite=overwrite)
        with folder.at_work():
            with progress.stage(LOADING):
                progress.say("loading the base and the rows")
                run = load(recipe, folder, trainers)
            with trainers.logs():
                code = run_stages(run)
            if push is not None and code == EXPORTED:
                publish(run, push)
            return code


def publish(run: Run, repository: str) -> None:
    """Publish the artifact and the report on the hub."""

    def publish() -> str:
        return hub.push(run.folder / "artifact", repository, files={"report.html": run.folder / "report.html"})

    with run.trainers.progress.stage(REPORT):
        print(f"published: {distributed.from_first(publish)}")
    if Path(run.base["id"]).is_absolute():
        print(f"note: the card names the base {run.base['id']}, a folder of this machine; others give theirs as base")


def stages(recipe: Recipe) -> list[str]:
    """Names of the stages of a run, in order."""
    return [name for name in STAGES if name != FITTING or _fits(recipe)]


def _fits(recipe: Recipe) -> bool:
    """Whether something is fitted: projections, or a selector."""
    return start_kind(recipe) != "reuse" or (recipe.salient != 0 and selector_named(recipe.selector).fitted)


@dataclass(frozen=True)
class Found:
    """Result of the search.

    Attributes:
        curve: one entry per depth and kind, shallowest pruning first.
        sequence: what to verify, shallowest pruning first.
        kept: the tokens that run in full.
        decisions: one readable line each.
        plans: everything that was measured, with all choices of tokens that run in full; those that were only screened
            on fewer rows.
    """

    curve: list[dict]
    kept: Kept
    sequence: list[Choice]
    decisions: list[str]
    plans: list[dict]


def run_stages(run: Run) -> int:
    """All stages after loading, those that have not ended yet; returns the exit code."""
    recipe, folder = run.recipe, run.folder
    metrics = folder.read("metrics.json")
    importance = folder.read("importance.json")
    if metrics and importance and (metrics["depth"] is None or _exported(run, metrics)):
        print(f"the run in {folder} had already ended")
    else:
        at = run.trainers.progress.stage
        with at(IMPORTANCE):
            importance = folder.once("importance.json", lambda: score(run))
            run.trainers.log_recipe()  # not earlier: where scoring fails, the folder is left as it was
        depths = candidates.to_measure(recipe, run.decoder, importance["prefill"], run.kept, run.tokens)
        if _fits(recipe):
            with at(FITTING):
                fit_untrained(run, depths)
                fit_selectors(run, depths)
        with at(SEARCH):
            found = search(run, depths)
        with at(VERIFICATION):
            budget = verify(run, found)
        with at(REPORT):
            metrics = folder.once("metrics.json", lambda: summarize(run, found, budget, importance))
            run.trainers.log_results(metrics, importance)
    if distributed.is_first() and not (folder / "report.html").is_file():
        write_report(metrics, importance, folder / "report.html")
    show(summary(metrics))
    print(f"total time: {run.trainers.progress.total()}")
    print(f"report: {folder / 'report.html'}")
    if metrics["depth"] is None:
        return NOTHING_QUALIFIES
    artifact = folder / "artifact"
    print(f"artifact: {artifact}")
    print(f'next: {script("pop-generate")} prompt --artifact {shlex.quote(str(artifact))} --prompt "..."')
    return EXPORTED


# --- score and fit ----------------------------------------------------------------------------------------------------


def score(run: Run) -> dict:
    """Importance of every layer in both stages, as plain data."""
    recipe, settings = run.recipe, run.recipe.importance
    scoring = scoring_module(recipe, run.decoder)
    rows = settings.rows_at_a_time(recipe.data)
    with memory_advice(f"lower importance.batch_size ({rows}) or set importance.gradient_checkpointing, {RESUME}"):
        run.trainers.make("scoring layers").validate(
            scoring, run.data.loader("fit", settings.rows, rows), verbose=False
        )
    prefill, decode = scoring.scores.T.tolist()
    return {
        "layers": run.decoder.num_layers,
        "rows": scoring.rows,
        "seed": recipe.seed,
        "boundary": recipe.fit_boundary,
        "prefill": prefill,
        "decode": decode,
    }


def fit_untrained(run: Run, depths: list[int]) -> None:
    """The kind that needs no training at every depth, each choice about it made on the tune split."""
    recipe, settings, start = run.recipe, run.recipe.projection, start_kind(run.recipe)
    kept = {depth: run.folder.has_projections(Choice(depth, start)) for depth in depths}
    if all(kept.values()) and run.folder.read("state/fitted.json"):
        return
    fitted_how = {}
    needed = f"projection.memory_gib ({settings.memory_gib:g}) or data.batch_size ({recipe.data.batch_size})"
    with memory_advice(f"lower {needed}, {RESUME}"):
        for fitted in kind_named(start).fit(
            run.decoder,
            depths,
            settings,
            boundary=recipe.fit_boundary,
            fit_rows=run.data.loader("fit"),
            tune_rows=run.data.loader("tune"),
            validate=lambda what, module, rows: run.trainers.make(what).validate(module, rows, verbose=False),
        ):
            fitted_how[fitted.depth] = fitted.how
            if not kept[fitted.depth]:  # else a run that stopped before fitted.json had the same
                run.folder.write_projections(Choice(fitted.depth, start), fitted.projections)
            del fitted  # not held through the next pass
    if fitted_how:
        run.folder.write("state/fitted.json", fitted_how)


def fit_selectors(run: Run, depths: list[int]) -> None:
    """The selector of every depth, where one may be used that is fitted."""
    if not any(kept.salient and selector_named(kept.selector).fitted for kept in run.kept):
        return
    recipe = run.recipe
    missing = [depth for depth in depths if not run.folder.has_selector(depth)]
    for group in groups(
        run.decoder, [Choice(depth, start_kind(recipe)) for depth in missing], recipe.projection.memory_bytes
    ):
        projections = {choice.depth: run.folder.read_projections(run.decoder, choice) for choice in group}
        fit = SelectorFit(projections, recipe.fit_boundary)
        with memory_advice(f"lower data.batch_size ({recipe.data.batch_size}), {RESUME}"):
            run.trainers.make(f"fitting selectors at depth {', '.join(map(str, projections))}").validate(
                fit, run.data.loader("fit"), verbose=False
            )
        for depth in projections:
            run.folder.write_selector(depth, fit.solve(depth).selector)


def train(run: Run, choice: Choice, kept: Kept) -> None:
    """Train up to ``choice.steps``, from where the last round or an interrupted run left off."""
    recipe, settings, folder = run.recipe, run.recipe.projection, run.folder
    depth, kind, steps = choice
    if folder.has_projections(choice):
        return
    start = run.variant(Choice(depth, start_kind(recipe)), kept).projections
    if not start.fitted_layers:  # its projections are exact
        folder.write_projections(choice, start)
        return
    training = training_module(recipe, start, kept)
    batch = settings.batch_size or recipe.data.batch_size
    smaller = f"projection.batch_size ({batch}), with trainer.accumulate_grad_batches for what it loses"
    with memory_advice(f"set projection.gradient_checkpointing {RESUME}, or --overwrite with a smaller {smaller}"):
        run.trainers.train(
            f"training depth {depth} for {steps} steps",
            training,
            lambda first: run.data.training_steps(settings.batch_size, first),
            steps=steps,
            rounds=steps // settings.steps,
            checkpoints=folder / "checkpoints" / f"{kind}-depth{depth}",
            every=settings.checkpoint_every,
        )
    adapters = folder / "adapters" / f"depth{depth}-steps{steps}"
    folder.write_projections(choice, training.trained(adapters if distributed.is_first() else None))


# --- search -----------------------------------------------------------------------------------------------------------


def search(run: Run, depths: list[int]) -> Found:
    """Measure on the search split, choose which tokens run in full, and train what the budget asks for."""
    recipe, settings = run.recipe, run.recipe.projection
    decisions: list[str] = []

    def say(line: str) -> None:
        decisions.append(line)
        print(line, flush=True)

    budget = selection.Budget(candidates.condition(recipe), recipe.budget.loss, say)
    kinds, ways = untrained_kinds(recipe), run.kept
    if len(ways) < len(recipe.kept(run.listed_boundaries)):
        say(f"search: plans with salient tokens are left out: {candidates.cannot_select(recipe, run.decoder)}")
    reached = None
    if recipe.budget.speedup is not None:
        reached = candidates.reaching(recipe.budget, run.decoder, ways, run.tokens)
    every = [(Choice(depth, kind), ways[0]) for depth in depths for kind in kinds]
    plans, screened = measure(run, "searching", every, "state/search.json"), []
    if len(ways) == 1:
        kept = ways[0]
    elif reached is not None:
        asked = [(Choice(depth, kind), kept) for kept, depth in reached.items() if kept != ways[0] for kind in kinds]
        plans += measure(run, "searching plans", asked, "state/search-plans.json")
        kept = _kept_of_least_loss(run, plans, reached, budget)
    else:
        kept, further, screened = _kept_within_budget(run, plans, depths, budget)
        plans += further
        known = {(entry["depth"], entry["projection"]) for entry in plans if Kept.of(entry) == kept}
        rest = [(choice, kept) for choice, _ in every if (choice.depth, choice.projection) not in known]
        if rest:
            plans += measure(run, f"searching with {kept}", rest, "state/search-kept.json")
    curve = [entry for entry in plans if Kept.of(entry) == kept]
    if reached is not None:
        curve = [entry for entry in curve if entry["depth"] == reached[kept]]

    def train_and_measure(choice: Choice) -> Measured:
        train(run, choice, kept)
        (entry,) = measure(run, "searching", [(choice, kept)], f"state/search-{file_name(choice)}.json")
        curve.append(entry)
        return Measured.of(entry)

    training = Training(settings.kind, settings.steps, recipe.budget.extensions) if trains(recipe) else None
    measured = [Measured.of(entry) for entry in curve if _may_be_exported(run, entry)]
    sequence = selection.finish(selection.settle(measured, budget, training), train_and_measure)
    known = {(entry["depth"], Kept.of(entry)) for entry in plans}
    plans += [entry for entry in screened if (entry["depth"], Kept.of(entry)) not in known]
    return Found(_one_round_each(curve, budget), kept, sequence, decisions, plans)


def _may_be_exported(run: Run, entry: dict) -> bool:
    """Whether an untrained entry of the curve may be exported or trained on: all where the loss is not limited."""
    if candidates.condition(run.recipe) is None:
        return True
    enough = run.decoder.num_layers - entry["depth"] >= run.recipe.budget.min_pruned
    return enough and entry["projection"] == start_kind(run.recipe)


def _kept_of_least_loss(run: Run, plans: list[dict], reached: dict[Kept, int], budget: selection.Budget) -> Kept:
    measured: dict[Kept, list[Measured]] = {}
    for entry in plans:
        if reached.get(Kept.of(entry)) == entry["depth"]:
            measured.setdefault(Kept.of(entry), []).append(Measured.of(entry))
    speedups = {kept: run.speedup(reached[kept], kept) for kept in measured}
    return selection.kept_of_least_loss(measured, speedups, budget)


def _kept_within_budget(
    run: Run, plans: list[dict], depths: list[int], budget: selection.Budget
) -> tuple[Kept, list[dict], list[dict]]:
    """Carry out :func:`~pop_lightning.evaluation.search.fastest_plan`.

    Args:
        plans: what was measured with the fewest tokens in full.

    Returns:
        The tokens in full; further measurements on all rows, and those on a part of them.
    """
    further, screened = [], []
    worth = [depth for depth in depths if run.decoder.num_layers - depth >= run.recipe.budget.min_pruned]
    if not worth:
        budget.say(f"search: no depth prunes {run.recipe.budget.min_pruned} layers: {run.kept[0]} is chosen")
        return run.kept[0], further, screened
    fewest = [Measured.of(entry) for entry in plans if _may_be_exported(run, entry)]
    speedups = {(depth, kept): run.speedup(depth, kept) for kept in run.kept for depth in worth}
    rows = selection.screening_rows(len(run.data.rows_of("search")), budget)
    requests, measured = selection.fastest_plan(fewest, speedups, rows is not None, budget), None
    for number in itertools.count(1):
        try:
            request = requests.send(measured)
        except StopIteration as end:
            return end.value, further, screened
        asked = [(Choice(depth, start_kind(run.recipe)), kept) for depth, kept in request.plans]
        what, limit = ("screening plans", rows) if request.screen else ("searching plans", None)
        entries = measure(run, what, asked, f"state/search-plans{number}.json", limit)
        (screened if request.screen else further).extend(entries)
        measured = {(entry["depth"], Kept.of(entry)): Measured.of(entry) for entry in entries}


def measure(
    run: Run, what: str, asked: Sequence[tuple[Choice, Kept]], file: str | None = None, limit: int | None = None
) -> list[dict]:
    """Curve entries of choices with what runs in full, on the search split; kept in ``file``.

    ``limit`` is the number of rows to measure on; all unless given.

    They are measured anew where the file answers another question: a budget may be changed until the verify split is
    opened, and refits nothing.
    """
    budget, prompts = run.recipe.budget, run.data.prompts_of("verify")

    def compute() -> dict:
        fitted_how, curve = run.folder.read("state/fitted.json"), []
        choices = list(dict.fromkeys(choice for choice, _ in asked))
        for group in groups(run.decoder, choices, run.recipe.projection.memory_bytes):
            variants = {}
            for choice in group:
                ways = [kept for each, kept in asked if each == choice]
                # With salient tokens if any has them: projections with a fitted selector serve all.
                variant = run.variant(choice, max(ways, key=lambda kept: bool(kept.salient)))
                for kept in ways:
                    variants[f"{choice}, {kept}"] = replace(variant, plan=kept.at(choice.depth))
            depths = ", ".join(dict.fromkeys(str(choice.depth) for choice in group))
            for entry in evaluate(run, f"{what} at depth {depths}", variants, limit).values():
                for key in kind_named(entry["projection"]).chosen:
                    entry[key] = fitted_how[str(entry["depth"])][key]
                curve.append(entry)
        return {"curve": curve}

    if file is None:
        return compute()["curve"]
    question = {"asked": asked, "prompts": prompts, "limit": limit}
    question |= {"metric": budget.metric, "cap": budget.loss.cap, "confidence": budget.confidence}
    return run.folder.once(file, compute, question)["curve"]


def evaluate(run: Run, what: str, variants: dict[str, Variant], limit: int | None = None) -> dict[str, dict]:
    """:meth:`Evaluation.entries` of ``variants`` on the search split, or on ``limit`` of its rows."""
    budget = run.recipe.budget
    evaluation = Evaluation(run.decoder, variants)
    with memory_advice(f"lower data.batch_size ({run.recipe.data.batch_size}), {RESUME}"):
        run.trainers.make(what).validate(evaluation, run.data.loader("search", limit), verbose=False)
    return evaluation.entries(budget.loss, budget.confidence, run.data.prompts_of("verify"))


def _one_round_each(curve: list[dict], budget: selection.Budget) -> list[dict]:
    """One entry per depth and kind, shallowest pruning first: of a training's rounds the best."""
    grouped: dict[tuple[int, str], list[dict]] = {}
    for entry in curve:
        grouped.setdefault((-entry["depth"], entry["projection"]), []).append(entry)
    kept = []
    for _, entries in sorted(grouped.items()):
        rounds = [{name: entry[name] for name in ("steps", "loss", "kl")} for entry in entries if "steps" in entry]
        measured = [Measured.of(entry) for entry in entries]
        best = entries[measured.index(budget.best(measured))]
        kept.append(best | ({"rounds": rounds} if rounds else {}))
    return kept


# --- verify -----------------------------------------------------------------------------------------------------------


def verify(run: Run, found: Found) -> AccuracyBudget:
    """Open the verify split once, and export the depth that it certifies."""
    recipe, settings = run.recipe, run.recipe.budget
    budget = AccuracyBudget(
        settings.loss,
        candidates.condition(recipe),
        settings.confidence,
        settings.min_pruned,
        sequence=[str(choice) for choice in found.sequence],
    )
    measured: dict = {"curve": found.curve, "prompt_tokens": run.tokens}
    if settings.speedup is not None:
        counted = run.speedup(found.sequence[0].depth, found.kept)
        measured["speedup"] = {"wanted": settings.speedup, "counted": counted, "prompt_tokens": run.tokens}
    exported = {"base": run.base, "recipe": recipe.to_dict(), "measured": measured}
    callback = ExportArtifact(run.folder / "artifact", budget, **exported)
    stored = run.folder.once("state/verify.json", lambda: _open_verify(run, found, budget, callback))
    if not budget.verdicts:  # they are those of the run that was resumed
        budget.verdicts = [Verdict(**verdict) for verdict in stored["verdicts"]]
        budget.conclude()
    chosen = next((choice for choice in found.sequence if str(choice) == budget.chosen), None)
    metrics = {"depth": budget.depth, "verified": budget.promise()} | found.kept.to_dict()
    if chosen is not None and not _exported(run, metrics) and distributed.is_first():
        print(f"the artifact in {run.folder / 'artifact'} is missing or damaged: it is written again", flush=True)
        exported["measured"] = measured | {"verified": budget.promise()}
        export(run.folder / "artifact", run.variant(chosen, found.kept), **exported)
    return budget


def _open_verify(run: Run, found: Found, budget: AccuracyBudget, callback: ExportArtifact) -> dict:
    for group in groups(run.decoder, found.sequence, run.recipe.projection.memory_bytes):
        if not budget.verified:
            evaluation = Evaluation(run.decoder, {str(choice): run.variant(choice, found.kept) for choice in group})
            with memory_advice(f"lower data.batch_size ({run.recipe.data.batch_size}), {RESUME}"):
                run.trainers.make("verifying", budget, callback).test(
                    evaluation, run.data.loader("verify"), verbose=False
                )
    return {"verdicts": [asdict(verdict) for verdict in budget.verdicts]}


def _exported(run: Run, metrics: dict) -> bool:
    """Whether the artifact of a run that came to ``metrics`` is there and whole."""

    def read() -> bool:
        try:
            artifact = read_artifact(run.folder / "artifact")
        except InputError:
            return False
        same = artifact.config.get("measured", {}).get("verified") == metrics["verified"]
        return same and artifact.plan == Kept.of(metrics).at(metrics["depth"])

    return distributed.from_first(read)


# --- report -----------------------------------------------------------------------------------------------------------


def summarize(run: Run, found: Found, budget: AccuracyBudget, importance: dict) -> dict:
    """The contents of ``metrics.json``, and the report that shows them."""
    recipe, prompts, used = run.recipe, run.data.prompts_of, {choice.depth: choice for choice in found.sequence}
    shown = used[budget.depth] if budget.depth is not None else nearest(run, found.curve)
    metrics = {
        "format": 1,
        "depth": budget.depth,
        "layers": run.decoder.num_layers,
        **found.kept.to_dict(),
        "projection": shown.projection,
        "budget": {key: value for key, value in recipe.to_dict()["budget"].items() if key != "candidates"}
        | {"depth": recipe.depth},
        "rows": {name: len(run.data.rows_of(name)) for name in ("fit", "tune", "search", "verify")}
        | {"unusable": dict(run.data.report.unusable)},
        "prompts": {name: prompts(name) for name in ("search", "verify")},
        "smallest_certifiable_drop": run.certifiable.smallest,
        "largest_certified_loss": run.certifiable.largest_loss,
        "verified": budget.promise(),
        "verification": [
            asdict(verdict) | {"projection": used[verdict.depth].projection} for verdict in budget.verdicts
        ],
        "curve": found.curve,
        "plans": measured_plans(run, found),
        "boundaries": compare_boundaries(run, shown, found),
        "decisions": found.decisions + budget.decisions,
        "comparison": compare(run, shown, found),
        "arithmetic": arithmetic(run, found.kept.at(shown.depth)),
        **latency_and_examples(run, shown, found),
        "about": about(run),
        "versions": versions(),
        "device": str(run.decoder.model.device),
    }
    if distributed.is_first():
        write_report(metrics, importance, run.folder / "report.html")
    return metrics


def measured_plans(run: Run, found: Found) -> list[dict]:
    """What the search measured of each plan, with its counted speedup."""
    names = ("depth", "projection", "boundary", "salient", "loss", "kl")
    return [
        {name: entry[name] for name in names if name in entry}
        | {"speedup": run.speedup(entry["depth"], Kept.of(entry))}
        for entry in found.plans
    ]


def compare_boundaries(run: Run, shown: Choice, found: Found) -> list[dict]:
    """The same depth with every listed boundary, on the search split; empty if the recipe lists none."""
    if not run.listed_boundaries:
        return []
    rows, compared = len(run.data.rows_of("search")), in_order({*map(Kept, run.listed_boundaries), found.kept})
    # What the search has measured, unless it was only screened.
    known = {Kept.of(each): each for each in found.plans if Choice.of(each) == shown and each["rows"] == rows}
    missing = [(shown, kept) for kept in compared if kept not in known]
    if missing:
        known |= {Kept.of(each): each for each in measure(run, "comparing boundaries", missing)}
    return [known[kept] | {"speedup": run.speedup(shown.depth, kept)} for kept in compared]


def arithmetic(run: Run, plan: PruningPlan) -> dict:
    """Counted operations of the prefill of a prompt of median length."""
    unpruned = PruningPlan(run.decoder.num_layers)
    full, pruned = (prefill_flops(run.decoder, each, run.tokens) for each in (unpruned, plan))
    return {
        "depth": plan.depth,
        "prompt_tokens": run.tokens,
        "full_flops": full,
        "pruned_flops": pruned,
        "saved": 1 - pruned / full,
        "ratio": full / pruned,
    }


def latency_and_examples(run: Run, shown: Choice, found: Found) -> dict:
    """The measured TTFT, and answers of both models; None on a base in shards.

    Such a base spends its time gathering weights, which is not the latency of a served model.
    """
    if run.trainers.shards_base:
        return {"ttft": None, "examples": None}
    run.trainers.progress.say("timing the prefill")
    projections = run.variant(shown, found.kept).projections
    generator = StageAwareGenerator(
        run.decoder.model, found.kept.at(shown.depth), projections, run.data.tokenizer, run.data.vision
    )
    # The first process only: the others would compete.
    return {
        "ttft": distributed.from_first(lambda: measure_ttft(generator, run.tokens)),
        "examples": distributed.from_first(lambda: examples(run, generator)),
    }


def nearest(run: Run, curve: list[dict]) -> Choice:
    """If nothing qualifies: the smallest loss among the depths that prune enough layers; of equals the shallowest."""
    enough = [e for e in curve if run.decoder.num_layers - e["depth"] >= run.recipe.budget.min_pruned] or curve
    return Choice.of(selection.least(enough, lambda each: each["loss"], lambda each: each["kl"]))


def compare(run: Run, shown: Choice, found: Found) -> list[dict]:
    """The same depth pruned in every way, on the search split (the verify split is for the one test)."""
    measured = [Choice.of(entry) for entry in found.curve if entry["depth"] == shown.depth]
    fitted = {choice.projection: run.variant(choice, found.kept) for choice in measured}
    table = comparison(fitted, fitted[shown.projection])
    entries = evaluate(run, "comparing", {name: each.variant for name, each in table.items()})
    return [
        {"name": name, "what": each.what, "depth": each.variant.plan.depth}
        | {key: entries[name][key] for key in ("rows", "exact_match", "agreement", "kl")}
        for name, each in table.items()
    ]
