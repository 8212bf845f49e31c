"""What a run of ``pop-fit`` starts from: the base on its device, the rows with their responses, and what they allow."""

import json
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import lightning

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.core.memory import memory_advice
from pop_lightning.core.pages import circumstances
from pop_lightning.core.plan import Choice, Kept
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.processor import vision_processor
from pop_lightning.data.rows import Row, until_end
from pop_lightning.evaluation.bounds import Certifiable, certifiable
from pop_lightning.evaluation.evaluate import Variant
from pop_lightning.fitting.importance import ImportanceScoring
from pop_lightning.fitting.kinds import kind as kind_named
from pop_lightning.fitting.kinds import trained_kind
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.generation.base_identity import base_identity
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import context_length, end_tokens, load_model, load_tokenizer, plain_generate
from pop_lightning.pruning.attach_check import check_decoder
from pop_lightning.pruning.flops import speedup
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.pruning.selectors import selector_named
from pop_lightning.run import depths as candidates
from pop_lightning.run.folder import RunFolder
from pop_lightning.run.recipe import Recipe
from pop_lightning.run.trainers import Trainers

RESUME = "and give --resume, which continues from what is finished"


@dataclass(frozen=True)
class Run:
    """What every stage works with; of several processes each has its own, and ``folder`` writes on the first only.

    Attributes:
        base: identity of the base model.
        kept: what may run in full, the least first; one unless the recipe leaves it to the search.
    """

    recipe: Recipe
    folder: RunFolder
    trainers: Trainers
    decoder: Decoder
    data: CalibrationData
    base: dict[str, Any]

    @property
    def tokens(self) -> int:
        """The prompt length that operations are counted at: the rows' median."""
        return int(self.data.report.prompt_tokens["median"])

    @property
    def listed_boundaries(self) -> list[int | float]:
        return candidates.listed_boundaries(self.recipe.budget, self.decoder, self.data.rows(), self.tokens)

    @property
    def kept(self) -> list[Kept]:
        return candidates.ways(self.recipe, self.decoder, self.listed_boundaries)

    @property
    def certifiable(self) -> Certifiable:
        """What the verify split can show for the budget."""
        budget, prompts = self.recipe.budget, self.data.prompts_of("verify")
        several = len(self.data.rows_of("verify")) > prompts
        return certifiable(prompts, budget.loss, budget.max_drop, budget.confidence, averaged=several)

    def speedup(self, depth: int, kept: Kept) -> float:
        """The counted prefill speedup at the median prompt."""
        return speedup(self.decoder, kept.at(depth), self.tokens)

    def variant(self, choice: Choice, kept: Kept) -> Variant:
        projections = self.folder.read_projections(self.decoder, choice)
        if kept.salient and selector_named(kept.selector).fitted:
            projections.use_selector(self.folder.read_selector(choice.depth))
        return Variant(kept.at(choice.depth), projections, steps=choice.steps)


def load(recipe: Recipe, folder: RunFolder, trainers: Trainers) -> Run:
    """The base and the rows, responses included, checked against each other and against a run to be resumed."""
    model, data = recipe.model, recipe.data
    lightning.seed_everything(recipe.seed, verbose=False)
    source = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    tokenizer = distributed.first_then_others(lambda: load_tokenizer(model.base, required=True, **source))
    with memory_advice(f"choose a narrower model.dtype, or more devices with model.device_map, {RESUME}"):
        base = trainers.load(
            lambda: load_model(
                model.base,
                dtype=model.dtype,
                attn_implementation=model.attn_implementation,
                device_map=model.device_map,
                **source,
            )
        )
    decoder = Decoder(base)
    check_decoder(decoder)
    calibration = CalibrationData(
        data.calibration,
        tokenizer,
        **recipe.data_arguments(),
        context=context_length(base),
        end_tokens=end_tokens(base),
        vision=vision_processor(decoder.vision_tokens, model.base, **source),
    )
    distributed.first_then_others(calibration.setup)
    run = Run(recipe, folder, trainers, decoder, calibration, base_identity(base, model.base, model.revision))
    check_same_input(run)
    check_rows(run)  # before hours of generation
    if calibration.missing_responses():
        made_with = json.dumps([recipe.to_dict()["model"], data.max_response_tokens])
        with memory_advice(f"lower data.batch_size ({data.batch_size}) or data.max_response_tokens, {RESUME}"):
            calibration.fill_responses(
                lambda rows: respond(decoder, calibration, rows), folder.state / "responses.json", made_with=made_with
            )
    print(f"data: {calibration.report}")
    check_rows(run)
    if line := candidates.without_context(recipe, run.kept, run.tokens):
        print(line)
    if candidates.condition(recipe) is not None:
        print(f"budget: {run.certifiable}")
    folder.settle()
    return run


def check_same_input(run: Run) -> None:
    """Refuse to resume a run on other rows or another base; their content counts, not where they are."""
    now = {"digest": run.data.digest, "base": run.base["fingerprint"], "versions": versions()}
    if not run.folder.read("state/data.json") and run.folder.has_results():
        raise InputError(
            f"output {run.folder} has results, but state/data.json, which names their base and rows, cannot be "
            "read (it is missing or damaged): --overwrite it."
        )
    stored = run.folder.once("state/data.json", lambda: now)
    for package, before in stored["versions"].items():
        if before != (current := version(package)):
            print(f"note: this run was started with {package} {before} and continues with {current}")
    for name, key, what in (("base", "model.base", "weights"), ("digest", "data.calibration", "rows")):
        if stored[name] != now[name]:
            section, field = key.split(".")
            given = getattr(getattr(run.recipe, section), field)
            raise InputError(
                f"{key} {given!r} has other {what} than when the run in output {run.folder} was started: resume it "
                f"with the same {'base' if what == 'weights' else what}, or --overwrite it."
            )


def check_rows(run: Run) -> None:
    """Refuse a budget or boundary that the rows do not allow, and sums that do not fit in memory, before scoring."""
    recipe, decoder, kept = run.recipe, run.decoder, run.kept
    candidates.check_context(recipe, kept, int(run.data.report.prompt_tokens["max"]))
    # The deepest candidate is the same for every importance, and needs most.
    depths = candidates.to_measure(recipe, decoder, [1.0] * decoder.num_layers, kept, run.tokens)
    kind_named(start_kind(recipe)).passes(decoder, depths, recipe.projection)
    candidates.check_images(
        recipe, decoder, run.data.rows(), {each.boundary for each in kept}, run.trainers.shards_base
    )
    candidates.check_target(recipe, decoder, kept, run.tokens, run.certifiable)


def respond(decoder: Decoder, data: CalibrationData, rows: list[Row]) -> list[tuple[int, ...]]:
    """The full model's own responses."""
    batch = data.batch(rows)
    output = plain_generate(decoder.model)(
        **decoder.inputs(batch),
        max_new_tokens=data.max_response_tokens,
        do_sample=False,
        pad_token_id=data.pad_token_id,
    )[:, batch["prompt_length"] :].tolist()
    return [until_end(tokens, data.ends) for tokens in output]


def trains(recipe: Recipe) -> bool:
    """Whether the recipe's kind is trained."""
    return kind_named(recipe.projection.kind).trains


def start_kind(recipe: Recipe) -> str:
    """The recipe's kind without training: what is measured everywhere, and where training starts."""
    return kind_named(recipe.projection.kind).starts_from(recipe.projection)


def untrained_kinds(recipe: Recipe) -> list[str]:
    """What is measured at every depth."""
    return list(dict.fromkeys(("reuse", start_kind(recipe))))


def scoring_module(recipe: Recipe, decoder: Decoder) -> ImportanceScoring:
    """The module that scores the layers."""
    checkpointing = recipe.importance.gradient_checkpointing
    return ImportanceScoring(decoder, recipe.fit_boundary, recipe.seed, gradient_checkpointing=checkpointing)


def training_module(recipe: Recipe, start: KVProjections, kept: Kept) -> KVProjectionTraining:
    """The module that trains ``start`` as the recipe's kind."""
    settings = recipe.projection
    return KVProjectionTraining(
        start,
        **kept._asdict(),
        kind=settings.kind,
        kind_arguments=trained_kind(settings.kind).arguments(settings),
        seed=recipe.seed,
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


def about(run: Run) -> dict[str, str]:
    """What the run is of, and how it was started; for the report."""
    model, rows = run.recipe.model, run.data.report.rows
    dtype = str(run.decoder.model.dtype).removeprefix("torch.")
    return {
        "model": f"{model.base} ({run.base['class']}, {run.decoder.num_layers} layers, {dtype})",
        "data": f"{run.data.calibration} ({rows:,} usable rows)",
        **circumstances("pop-fit", shlex.join(["pop-fit", "--recipe", str(run.folder / "recipe.yaml")])),
    }


def versions() -> dict[str, str]:
    """Of the libraries that results depend on."""
    return {name: version(name) for name in ("pop-lightning", "torch", "transformers", "lightning")}
