"""``pop-fit --check``: what a recipe needs before anything is loaded, and which key to change where it does not fit.

Memory of a stage is a plain rule: the weights of the base, what the stage keeps between batches (projections, the bound
of the running sums, optimizer states), and the hidden states, activations and logits of one batch. Operations are
counted from the base's shape. Where base and device are available, one real step of each stage gives its measured peak
and its time. Offline; nothing is written. ``python -m pop_lightning.run.check`` prints the table of all recipes.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.core.errors import InputError
from pop_lightning.core.memory import device_bytes, peak_bytes
from pop_lightning.core.numbers import millions
from pop_lightning.core.plan import Kept, PruningPlan
from pop_lightning.core.quiet import quiet_lightning
from pop_lightning.core.tables import text_table
from pop_lightning.data.examples import check_source, read_examples
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.processor import vision_processor
from pop_lightning.data.report import DataReport
from pop_lightning.data.rows import Row
from pop_lightning.evaluation.bounds import certifiable, rows_needed
from pop_lightning.fitting.regressions import GROUPINGS, held_bytes
from pop_lightning.models import shapes
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import (
    context_length,
    end_tokens,
    load_config,
    load_model,
    load_tokenizer,
    local_folder,
    stored_dtype,
)
from pop_lightning.pruning.flops import prefill_flops
from pop_lightning.run.costs import Batch, Costs, Stage
from pop_lightning.run.depths import (
    check_context,
    check_images,
    condition,
    listed_boundaries,
    reaching,
    to_measure,
    ways,
    without_context,
)
from pop_lightning.run.invocation import build, bundled_recipes, parse
from pop_lightning.run.recipe import Recipe
from pop_lightning.run.strategies import DEEPSPEED
from pop_lightning.run.trainers import Trainers, check_keys, check_placement

FITS, DOES_NOT_FIT = 0, 2
USABLE = 0.94  # of a device's memory: the CUDA context, libraries and fragmentation need the rest
# By the GB that a GPU is sold with: GiB that PyTorch finds on it, on the least of the common ones of that size.
CARDS = {24: 22, 40: 39, 48: 44, 80: 79, 141: 139}
_GIB = 2**30
_BAR = "{l_bar}{bar}| [{elapsed}]"  # stages differ too much for a time that is left
_SLOW_STEP = 2e12  # operations of a step that is too slow to try on a CPU


class Base:
    """The base's shape: of its own config where that is on this machine, of a bundled shape otherwise.

    Attributes:
        folder: where the base is on this machine; None where it is not.
        shape: the bundled shape that is used; None where the base's own config was read.
        decoder: on the meta device, so without memory.
        parameters: number of them, with those that are loaded and not used (a vision tower).

    Raises:
        InputError: neither the config nor a shape is there, or the config does not load.
    """

    def __init__(self, recipe: Recipe):
        model = recipe.model
        self.name, self.shape, left_out, dtype = model.base, None, 0, model.dtype
        self.folder = local_folder(model.base, model.revision)
        if self.folder is not None and (self.folder / "config.json").is_file():
            given = {"trust_remote_code": model.trust_remote_code}
            config, dtype = load_config(str(self.folder), **given), stored_dtype(str(self.folder), dtype, **given)
        elif (name := shapes.of_base(model.base)) is not None:
            self.folder, self.shape, shape = None, name, shapes.SHAPES[name]
            config, left_out = shape.make(), shape.left_out
            dtype = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        else:
            known = ", ".join(each.base for each in shapes.SHAPES.values() if each.base)
            raise InputError(
                f"{model.base!r} is not on this machine, and no bundled shape has its dimensions",
                key="model.base",
                expected=f"a folder, a base that was downloaded before, or one of {known}",
            )
        # Flash and flex kernels hold what sdpa's fused kernel holds, except for a mask of whole numbers.
        attention = model.attn_implementation if model.attn_implementation in (None, "eager") else "sdpa"
        self.decoder = Decoder(shapes.from_config(config, dtype, torch.device("meta"), attention))
        if self.folder is not None and (self.folder / "generation_config.json").is_file():
            self.decoder.model.generation_config = GenerationConfig.from_pretrained(self.folder)
        self.dtype = self.decoder.model.dtype
        self.parameters = sum(each.numel() for each in self.decoder.model.parameters()) + left_out
        self.bytes = self.parameters * self.dtype.itemsize

    @cached_property
    def largest_part(self) -> int:
        """Bytes of the largest part that ZeRO-3 gathers at a time: a layer, the embedding or the head."""
        parts = (*self.decoder.layers, self.decoder.head, self.decoder.model.get_input_embeddings())
        return max(sum(each.nbytes for each in part.parameters()) for part in parts)


@dataclass(frozen=True)
class Rows:
    """How many rows each split has, and how long they are.

    Attributes:
        counts: by split.
        prompts: different prompts in the verify split, which is what a bound counts.
        longest: prompt and response tokens of the largest batch: memory is for that one.
        usual: the same of a mean batch, padding included: operations are for that one.
        median: prompt tokens that a requested speedup is counted at.
        missing: rows that the full model still has to answer; 0 where that is not known.
        assumed: what is not known, as a sentence; None where the rows were read.
        media: rows with images or videos.
        report: of the rows that were read, with those that are not used; None where they were not read.
    """

    counts: dict[str, int]
    prompts: int
    longest: tuple[int, int]
    usual: tuple[int, int]
    median: int
    missing: int = 0
    assumed: str | None = None
    media: Sequence[Row] = ()
    report: DataReport | None = None

    @classmethod
    def of(cls, recipe: Recipe, base: Base) -> "Rows":
        """Read the rows that are on this machine; a data set of the hub is not looked up.

        Raises:
            InputError: the rows are there and do not fit.
        """
        settings, limit, trust = recipe.data, recipe.data.limit, recipe.model.trust_remote_code
        absent = next((source for source in settings.sources if not Path(resolve_bundled(source)).exists()), None)
        if absent is not None:
            needed = 300
            if condition(recipe) is not None:
                needed = rows_needed(recipe.budget.max_drop, recipe.budget.loss, recipe.budget.confidence)
            total = limit or math.ceil(needed / settings.splits.verify)
            used = f"data.limit of {limit} rows is used" if limit else f"{total} rows are used"
            return cls._assumed(recipe, base, total, f"data.calibration {absent!r} is not on this machine: {used}")
        tokenizer = base.folder and load_tokenizer(str(base.folder), trust_remote_code=trust, required=False)
        if tokenizer is None:
            read = {"name": settings.name, "columns": settings.columns}
            total = sum(len(read_examples(source, settings.split, **read)) for source in settings.sources)
            total = min(total, limit or total)
            what = f"the base's tokenizer is not on this machine, so the {total} rows are counted and not measured"
            return cls._assumed(recipe, base, total, what)
        data = CalibrationData(
            settings.calibration,
            tokenizer,
            **recipe.data_arguments(),
            context=context_length(base.decoder.model),
            end_tokens=end_tokens(base.decoder.model),
            vision=vision_processor(base.decoder.vision_tokens, str(base.folder), trust_remote_code=trust),
        )
        data.setup()
        rows, size, unknown = list(data.rows()), settings.batch_size, settings.max_response_tokens
        lengths = [(len(r.prompt_ids), unknown if r.response_ids is None else len(r.response_ids)) for r in rows]
        lengths.sort(key=sum, reverse=True)
        batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        widths = [(max(p for p, _ in batch), max(r for _, r in batch), len(batch)) for batch in batches]
        return cls(
            {name: len(data.rows_of(name)) for name in ("fit", "tune", "search", "verify")},
            data.prompts_of("verify"),
            tuple(max(width[i] for width in widths) for i in (0, 1)),
            tuple(math.ceil(sum(width[i] * width[2] for width in widths) / len(rows)) for i in (0, 1)),
            int(data.report.prompt_tokens["median"]),
            sum(row.response_ids is None for row in rows),
            media=[row for row in rows if row.media],
            report=data.report,
        )

    @classmethod
    def _assumed(cls, recipe: Recipe, base: Base, total: int, why: str) -> "Rows":
        counts = {name: max(1, round(share * total)) for name, share in asdict(recipe.data.splits).items()}
        response = recipe.data.max_response_tokens
        room = max(1, (context_length(base.decoder.model) or math.inf) - response)
        prompt = min(recipe.data.max_prompt_tokens, room)
        why = f"{why}, {prompt} + {response} tokens each, the most that the recipe allows"
        return cls(counts, counts["verify"], (prompt, response), (prompt, response), prompt, assumed=why)


@dataclass(frozen=True)
class Machine:
    """What ``trainer`` asks for, and what of it this machine has.

    Attributes:
        gpu: the stages run on GPUs.
        devices: processes, each with a device of its own (on CPUs they share the memory).
        strategy: ``trainer.strategy`` as a name.
        bytes: memory of one device; None where this machine has none of that kind.
        found: devices of that kind on this machine.
        spread: devices that ``model.device_map`` spreads the base over.
    """

    gpu: bool
    devices: int
    strategy: str
    bytes: int | None
    found: int
    spread: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> "Machine":
        given, found = recipe.trainer, torch.cuda.device_count() if torch.cuda.is_available() else 0
        accelerator = str(given.get("accelerator") or "auto")
        gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and found > 0)
        devices = _count(given.get("devices"), found if gpu else 1) * int(given.get("num_nodes") or 1)
        memory = device_bytes(torch.device("cpu")) // devices
        if gpu:
            memory = min((device_bytes(torch.device("cuda", i)) for i in range(found)), default=None)
        spread = max(1, found) if gpu and recipe.model.device_map is not None else 1
        return cls(gpu, devices, given.get("strategy") or "auto", memory, found if gpu else 1, spread)

    @property
    def limit(self) -> float:
        return math.inf if self.bytes is None else USABLE * self.bytes

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.gpu else torch.device("cpu")

    @property
    def shards(self) -> bool:
        """Whether the base is kept in shards (ZeRO-3)."""
        return "stage_3" in self.strategy

    def weights(self, base: Base) -> int:
        """Bytes of the base on one device."""
        if not self.shards:
            return math.ceil(base.bytes / self.spread)
        return base.largest_part + (0 if "offload" in self.strategy else math.ceil(base.bytes / self.devices))

    def stage(self, stage: Stage) -> int:
        """Bytes of a stage on one device, above the base: DeepSpeed spreads gradients and optimizer states."""
        if self.devices == 1:
            return stage.bytes
        shared = 3 * stage.trained * (1 - 1 / self.devices) if "deepspeed" in self.strategy else 0
        return math.ceil(stage.bytes - shared + stage.trained)  # a second copy of the gradients is sent


def _count(devices: Any, found: int) -> int:
    """``trainer.devices`` as a number; all of them for auto, -1 or nothing."""
    if isinstance(devices, str) and "," in devices:
        devices = [each for each in devices.split(",") if each.strip()]
    if isinstance(devices, list):
        return len(devices)
    return (int(devices) if str(devices).isdecimal() else 0) or max(1, found)


@dataclass(frozen=True)
class Estimate:
    """A recipe's stages on its machine, and what may run in full; all of it follows from :func:`estimate`."""

    recipe: Recipe
    base: Base
    rows: Rows
    machine: Machine
    costs: Costs
    stages: list[Stage]
    kept: list[Kept]

    def bytes(self, stage: Stage) -> int:
        """Most bytes on one device during a stage."""
        return self.machine.weights(self.base) + self.machine.stage(stage)

    @property
    def largest(self) -> Stage:
        return max(self.stages, key=self.bytes)

    @property
    def needs(self) -> int:
        return self.bytes(self.largest)


def estimate(recipe: Recipe, base: Base, rows: Rows, machine: Machine) -> Estimate:
    """Every stage's bytes at the longest rows and operations at the usual ones.

    Raises:
        InputError: the base is not a decoder that can be pruned, or the recipe's depths or sums do not fit it.
    """
    decoder, size = base.decoder, recipe.data.batch_size
    listed = listed_boundaries(recipe.budget, decoder, rows.media, rows.median)
    kept = ways(recipe, decoder, listed)
    check_context(recipe, kept, rows.longest[0])
    check_images(recipe, decoder, rows.media, {each.boundary for each in kept}, machine.shards)
    # Importance is not known yet, so it is assumed to be equal.
    depths = to_measure(recipe, decoder, [1.0] * decoder.num_layers, kept, rows.median)
    reached = reaching(recipe.budget, decoder, kept, rows.median) if recipe.budget.speedup is not None else None
    batches = Batch(size, *rows.longest), Batch(size, *rows.usual)
    costs = Costs(decoder, recipe, depths, listed, *batches, machine.gpu, reached)
    stages = list(costs.stages(rows.counts, rows.missing, machine.devices))
    return Estimate(recipe, base, rows, machine, costs, stages, kept)


def ways_out(found: Estimate, limit: float) -> Iterator[tuple[str, Estimate]]:
    """Changes of one key each, the mildest value of it, after which every stage fits in ``limit`` bytes."""
    for values in changes(found):
        for change in values:
            recipe = build(found.recipe.to_dict(), change.items())
            base = Base(recipe) if "model.dtype" in change else found.base
            try:
                changed = estimate(recipe, base, found.rows, Machine.of(recipe))
            except InputError:
                break  # too far: the closed form's sums, say, no longer fit in what is left to them
            if changed.needs <= limit:
                yield " with ".join(f"{key} {str(value).lower()}" for key, value in change.items()), changed
                break


def changes(found: Estimate) -> Iterator[list[dict[str, Any]]]:
    """For each key that the largest stage depends on, its values, the mildest first."""
    recipe, stage = found.recipe, found.largest.name
    projection, rows = recipe.projection, recipe.data.batch_size

    def halves(key: str, count: int) -> list[dict[str, Any]]:
        return [{key: count >> power} for power in range(1, count.bit_length())]

    if stage.startswith("closed form"):
        yield [{"projection.memory_gib": projection.memory_gib / 2**power} for power in range(1, 6)]
    if stage == "scoring":
        yield halves("importance.batch_size", recipe.importance.rows_at_a_time(recipe.data))
        yield [] if recipe.importance.gradient_checkpointing else [{"importance.gradient_checkpointing": True}]
    if stage == "training":
        yield [] if projection.gradient_checkpointing else [{"projection.gradient_checkpointing": True}]
        yield halves("projection.batch_size", projection.batch_size or rows)
    yield halves("data.batch_size", rows)
    if not isinstance(recipe.budget.candidates, list) and recipe.budget.speedup is None:
        yield halves("budget.candidates", len(found.costs.depths))
    if found.base.dtype.itemsize > 2:
        yield [{"model.dtype": "bfloat16"}]
    # Shards cannot be combined with rows of images, or with a base that is placed by hand.
    if found.machine.gpu and not found.base.decoder.vision_tokens and recipe.model.device_map is None:
        used = found.machine.devices // int(recipe.trainer.get("num_nodes") or 1) if found.machine.shards else 1
        strategy = {"trainer.strategy": "deepspeed_stage_3"}
        yield [strategy | {"trainer.devices": count} for count in (2, 4, 8, 16) if count > used]


def card_for(needed: float) -> int | None:
    """The smallest of the common GPUs that holds so many bytes, by its nominal GB; None where none does."""
    return next((card for card, there in CARDS.items() if USABLE * there * _GIB >= needed), None)


def measure(found: Estimate) -> dict[str, tuple[int, float]] | str:
    """By stage, bytes and seconds of one real step at the longest rows; or why nothing was run."""
    machine, base, model, costs = found.machine, found.base, found.recipe.model, found.costs
    if machine.bytes is None:
        return "there is no GPU here: run this check on a machine that has trainer.accelerator"
    if base.folder is None:
        return f"the weights of {base.name} are not on this machine: download the base first"
    if machine.devices > 1:
        return f"trainer.devices is {machine.devices}, and steps run in one process: set trainer.devices to 1"
    if machine.spread > 1:
        return f"model.device_map spreads the base over {machine.spread} GPUs, and steps run on one"
    if machine.shards:
        return f"trainer.strategy {machine.strategy} keeps the base in shards, and steps run on a whole one"
    if not machine.gpu and max(each.step_flops for each in found.stages) > _SLOW_STEP:
        return "one step is too slow to try on a CPU: set trainer.accelerator to gpu where there is one"
    given = {"attn_implementation": model.attn_implementation, "trust_remote_code": model.trust_remote_code}
    try:
        decoder = Decoder(load_model(str(base.folder), dtype=model.dtype, **given).to(machine.device))
    except InputError as error:
        return f"the base does not load here: {error}".rstrip(".")
    decoder.model.eval().requires_grad_(False)
    measured, many = {}, len(found.stages)
    longest = replace(costs, usual=costs.longest).stages(found.rows.counts, found.rows.missing)
    with tqdm(zip(found.stages, longest, strict=True), total=many, bar_format=_BAR, disable=None, leave=False) as bar:
        for number, (stage, same) in enumerate(bar, 1):
            bar.set_description(f"one step of stage {number} of {many}: {stage.name}")
            step = stage.build(decoder, replace(costs.longest, rows=stage.size).collated(machine.device))
            step()  # makes the running sums and the optimizer states, which stay
            peak = peak_bytes(step, machine.device)
            start = time.perf_counter()
            step()
            if machine.gpu:
                torch.cuda.synchronize(machine.device)
            measured[stage.name] = peak, (time.perf_counter() - start) * stage.flops / same.step_flops
            del step
    return measured


# --- printing -------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> int:
    """Print what the recipe needs; returns 0, or 2 where it cannot work as it is (the text says which key to change).

    Raises:
        InputError: base, rows or recipe do not fit together.
    """
    quiet_lightning()
    machine = Machine.of(recipe)
    check_keys(recipe.trainer)  # what `pop-fit` would refuse on any machine
    if machine.devices > 1 or machine.strategy in ("ddp", *DEEPSPEED):
        check_placement(recipe)
    for source in recipe.data.sources:
        check_source(source)
    base = Base(recipe)
    found = estimate(recipe, base, Rows.of(recipe, base), machine)
    too_much = found.needs > machine.limit
    if too_much and not machine.gpu and (recipe.trainer.get("accelerator") or "auto") == "auto":
        # The recipe names no device, and this machine's CPU is not the one that it is meant for.
        found, too_much = estimate(recipe, base, found.rows, replace(machine, gpu=True, bytes=None, found=0)), False
    machine = found.machine
    if machine.bytes is not None and (not machine.gpu or machine.found >= machine.devices):
        Trainers(recipe)  # refuses what does not run on this machine
    measured = "it does not fit" if too_much else measure(found)
    certified, enough = _certifiable(found)
    notes = [_memory(found), *_remarks(found), certified, _time(found, measured)]
    print(_heading(found), _table(found, measured), "\n".join(notes), sep="\n\n")
    return DOES_NOT_FIT if too_much or not enough else FITS


def _heading(found: Estimate) -> str:
    base, rows, machine, budget = found.base, found.rows, found.machine, found.recipe.budget
    where = f"assumed: bundled shape {base.shape}, the base is not on this machine" if base.shape else "its own config"
    lengths = f"longest batch {rows.longest[0]} + {rows.longest[1]} tokens, mean {rows.usual[0]} + {rows.usual[1]}"
    placed = " (assumed: as for layers of equal importance; scoring will place them)"
    if budget.speedup is not None:
        placed = f" (the largest that reach budget.speedup {budget.speedup:g} at {rows.median} prompt tokens)"
    elif isinstance(budget.candidates, list) or budget.candidates == "all":
        placed = ""
    kind = "GPU" if machine.gpu else "CPU"
    data = f"data: {rows.report}\n" if rows.report else ""
    many = f"{machine.devices} {kind}s, trainer.strategy {machine.strategy}" if machine.devices > 1 else f"one {kind}"
    return (
        f"base: {base.name}, {base.decoder.num_layers} layers, {millions(base.parameters)} parameters, "
        f"{_gib(base.bytes)} GiB in {str(base.dtype).removeprefix('torch.')} ({where})\n"
        f"rows: {', '.join(f'{name} {count}' for name, count in rows.counts.items())} "
        f"({f'assumed: {rows.assumed}' if rows.assumed else lengths})\n"
        f"{data}"
        f"depths: {', '.join(map(str, found.costs.depths))}{placed}\n"
        f"runs on: {many}"
    )


def _table(found: Estimate, measured: dict[str, tuple[int, float]] | str) -> str:
    header = ["stage", "rows", "operations", "base GiB", "kept GiB", "batch GiB", "in all GiB"]
    lines, weights = [], found.machine.weights(found.base)
    for stage in found.stages:
        above = found.machine.stage(stage)
        kept = min(above, stage.kept)
        sizes = map(_gib, (weights, kept, above - kept, weights + above))
        lines.append([stage.name, str(stage.rows), f"{stage.flops:.2e}", *sizes])
        if not isinstance(measured, str):
            peak, seconds = measured[stage.name]
            lines[-1] += [_gib(weights + kept + peak), _duration(seconds)]
    return text_table(header + ([] if isinstance(measured, str) else ["measured GiB", "time"]), lines, left=(0,))


def _memory(found: Estimate) -> str:
    machine = found.machine
    text = f"memory: {_gib(found.needs)} GiB per device in its largest stage, {found.largest.name}"
    if machine.bytes is None:
        if (card := card_for(found.needs)) is not None:
            return f"{text}; there is no GPU here to compare with: it fits a GPU of {card} GB."
        largest = max(CARDS)
        options = _options(found, USABLE * CARDS[largest] * _GIB)
        return f"{text}; there is no GPU here, and one of {largest} GB would not hold it: {options}."
    text += f"; the device has {_gib(machine.bytes)} GiB, of which {USABLE:.0%} is usable"
    if found.needs > machine.limit:
        return f"{text}: it does not fit: {_options(found, machine.limit)}."
    if machine.found < machine.devices and machine.gpu:
        return f"{text}: it fits, on {machine.devices} of them ({machine.found} found)."
    return f"{text}: it fits."


def _options(found: Estimate, limit: float) -> str:
    some = islice(ways_out(found, limit), 2)
    if options := [f"set {text} ({_gib(changed.needs)} GiB)" for text, changed in some]:
        return " or ".join(options)
    card = card_for(found.needs)
    where = f"a GPU of {card} GB (trainer.accelerator)" if card else "a smaller model.base"
    return (
        "no single key is enough; lower data.batch_size, data.max_prompt_tokens and budget.candidates together, or "
        f"use {where}"
    )


def _remarks(found: Estimate) -> Iterator[str]:
    """What the figures leave open: boundaries, images, groupings, how much the budget measures and trains."""
    costs, budget, limit = found.costs, found.recipe.budget, found.recipe.projection.memory_gib
    if line := without_context(found.recipe, found.kept, found.rows.median):
        yield f"{line}."
    if found.base.decoder.vision_tokens:
        yield "images and videos: the vision tower's weights are counted, its activations are not."
    if costs.passes:
        passes = f"{len(costs.passes)} passes" if len(costs.passes) > 1 else "one pass"
        text = f"closed form: grouping {costs.grouping} in {passes} over the fit rows, projection.memory_gib {limit:g}"
        finer = GROUPINGS[: GROUPINGS.index(costs.grouping)]
        needed = {n: math.ceil(10 * held_bytes(costs.shape, costs.depths, n) / _GIB) / 10 for n in reversed(finer)}
        if needed:
            text += "; in one pass " + ", ".join(
                f"{n} needs projection.memory_gib {gib:g}" for n, gib in needed.items()
            )
        plain = prefill_flops(found.base.decoder, PruningPlan(costs.layers), costs.usual.tokens)
        fit = next(stage.operations for stage in found.stages if stage.name == "closed form: fit")
        yield f"{text}. Its operations are {fit / plain:.2f}x those of one forward pass over the fit rows."
    if any(stage.name == "search: plans" for stage in found.stages) and budget.speedup is None:
        yield (
            "search of plans: counted at most, as if none kept the budget; with numbers for boundary and salient the "
            "search is over depths only."
        )
    if costs.trains:
        depths = "the deepest" if budget.speedup is not None else f"each of {len(costs.depths)} depths"
        yield (
            f"training: counted once, at {depths}; the budget decides which depths are trained, and for up to "
            f"{budget.extensions} more rounds."
        )


def _certifiable(found: Estimate) -> tuple[str, bool]:
    """What the verify rows can show, and whether that is enough for the budget."""
    recipe, rows, budget = found.recipe, found.rows, found.recipe.budget
    if condition(recipe) is None:
        given = f"a speedup of {budget.speedup:g}" if recipe.depth is None else f"depth {recipe.depth}"
        return f"budget: {given} is requested, so the loss is not limited.", True
    averaged = rows.counts["verify"] > rows.prompts
    shown = certifiable(rows.prompts, budget.loss, budget.max_drop, budget.confidence, averaged=averaged)
    text, needed = f"budget: {shown}{', of assumed rows' if rows.assumed else ''}", shown.needed
    if rows.prompts >= needed:
        return f"{text}.", True
    more = math.ceil(needed / recipe.data.splits.verify * rows.counts["verify"] / rows.prompts)  # rows share prompts
    options = [f"give {more} rows or more"]
    if recipe.data.limit is not None and recipe.data.limit < more:
        options[0] += f" and set data.limit to as many (it is {recipe.data.limit})"
    least, likely = (math.ceil(factor * shown.smallest * 1e4) / 1e4 for factor in (1, 2))
    if likely < budget.loss.cap:
        options.append(f"set budget.max_drop to {likely:g} ({least:g} can be reached only if nothing is lost)")
    if splits := _splits(asdict(recipe.data.splits), rows, needed):
        options.append(f"give {splits}")
    return f"{text}; budget.max_drop {budget.max_drop:g} needs {needed}: {', or '.join(options)}.", False


def _splits(shares: dict[str, float], rows: Rows, needed: int) -> str | None:
    """Flags of ``data.splits`` with ``needed`` verify prompts; None if the others would lose more than half their rows.

    Args:
        shares: the recipe's.
    """
    prompts = sum(rows.counts.values()) * rows.prompts / rows.counts["verify"]
    verify, others = math.ceil(100 * needed / prompts) / 100, 1 - shares["verify"]
    left = 1 - verify
    if left < others / 2:
        return None
    shares = {name: round(share * left / others, 3) for name, share in shares.items()} | {"verify": verify}
    shares["fit"] = round(1 - sum(share for name, share in shares.items() if name != "fit"), 3)
    return (
        " ".join(f"--data.splits.{name} {share:g}" for name, share in shares.items()) if all(shares.values()) else None
    )


def _time(found: Estimate, measured: dict[str, tuple[int, float]] | str) -> str:
    if isinstance(measured, str):
        return f"time: not measured, because {measured}."
    total = sum(seconds for _, seconds in measured.values())
    return f"time: about {_duration(total)} in all, from one step of each stage on {found.machine.device}."


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}" if size >= _GIB / 10 else f"{size / _GIB:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def hardware_table(names: Sequence[str]) -> str:
    """What each bundled recipe needs, as a Markdown table."""
    lines = ["| command | memory per device | largest stage | operations | hardware |", "|---|---|---|---|---|"]
    for name in names:
        recipe = parse(["--recipe", name]).recipe
        base, on_cpu = Base(recipe), recipe.trainer.get("accelerator") == "cpu"
        machine = replace(Machine.of(recipe), gpu=not on_cpu)
        found = estimate(recipe, base, Rows.of(recipe, base), machine)
        card = card_for(found.needs)
        what = f"GPU of {card} GB" if card else f"GPU above {max(CARDS)} GB"
        what = f"{machine.devices} x {what}" if machine.devices > 1 else f"one {what}"
        lines.append(
            f"| `pop-fit --recipe {name}` | {found.needs / _GIB:.1f} GiB | {found.largest.name} | "
            f"{sum(stage.flops for stage in found.stages):.1e} | {'any CPU' if on_cpu else what} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(hardware_table(bundled_recipes()))
