"""``pop-fit --check``: what a recipe takes before anything is loaded, and which key to change where it does not fit.

The base is built on the meta device, from its own config where that lies on this machine and from a bundled shape
otherwise; every stage runs dry over it (``stage_costs.py``). From there follow memory per device, operations, the
hardware that holds them and, where base and device are at hand, time. The hub is never asked, nothing is written.
``python -m pop_lightning.preflight`` prints the table of all bundled recipes that the README shows.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from pop_lightning import shapes
from pop_lightning.bundled import resolve_bundled
from pop_lightning.closed_form import GROUPINGS, Shape, group_bytes
from pop_lightning.data import CalibrationData
from pop_lightning.decoder import Decoder
from pop_lightning.depths import check_images, listed_boundaries, possible_boundaries, to_measure
from pop_lightning.errors import InputError
from pop_lightning.examples import check_exists, read_examples
from pop_lightning.fitting import quiet_lightning
from pop_lightning.flops import prefill_flops
from pop_lightning.memory import device_bytes
from pop_lightning.metrics import rows_needed, smallest_certifiable
from pop_lightning.models import load_model, load_tokenizer, local_folder, vision_processor
from pop_lightning.plan import PruningPlan
from pop_lightning.recipe import Recipe, bundled_recipes, parse
from pop_lightning.report import text_table
from pop_lightning.rows import Row
from pop_lightning.stage_costs import Cost, Steps, batch_of, closed_form_passes, costs, fits_closed_form, operations
from pop_lightning.strategies import DEEPSPEED
from pop_lightning.trainers import Trainers, check_keys, check_placement

FITS, DOES_NOT_FIT = 0, 2
# By the GB that a GPU is sold with: GiB that PyTorch finds on it, on the least of the common ones of that size.
CARDS = {24: 22, 40: 39, 48: 44, 80: 79, 141: 139}
USABLE = 0.94  # of a device's memory: the rest goes to the CUDA context, libraries and fragmentation
_GIB = 2**30
_SLOW_STEP = 2e12  # operations of a step that a CPU takes too long for, so that it is not timed there


# --- the base -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """The base's shape, and how much of it is known.

    Attributes:
        folder: where the base lies on this machine; None where it does not.
        shape: the bundled shape that stands for it; None where its own config was read.
        left_out: parameters that are loaded with it and take no part (a vision tower).
    """

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    attention: str
    folder: Path | None = None
    shape: str | None = None
    left_out: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> "Base":
        """Read the config that lies here, or take the bundled shape of that hub repository.

        Raises:
            InputError: there is neither; the sentence lists the shapes.
        """
        model, left_out, shape = recipe.model, 0, None
        folder = local_folder(model.base, model.revision)
        config = None if folder is None else _read_config(folder, model.base, model.trust_remote_code)
        if config is None:
            if (shape := shapes.of_base(model.base)) is None:
                known = ", ".join(each.base for each in shapes.SHAPES.values() if each.base)
                raise InputError(
                    f"model.base {model.base!r} is not on this machine, and no bundled shape stands for it: expected a "
                    f"folder, a base that was downloaded before, or one of {known}."
                )
            config, left_out, folder = shapes.SHAPES[shape].make(), shapes.SHAPES[shape].left_out, None
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        if model.dtype != "auto":
            dtype = getattr(torch, model.dtype)
        elif shape is not None:
            dtype = torch.bfloat16
        # Flash and flex kernels hold what sdpa's fused kernel holds, but for a mask of whole numbers.
        attention = "eager" if model.attn_implementation == "eager" else "sdpa"
        return cls(model.base, config, dtype or torch.float32, attention, folder, shape, left_out)

    @cached_property
    def decoder(self) -> Decoder:
        """On the meta device."""
        return Decoder(shapes.from_config(self.config, self.dtype, torch.device("meta"), self.attention))

    @cached_property
    def parameters(self) -> int:
        return sum(each.numel() for each in self.decoder.model.parameters()) + self.left_out

    @property
    def bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @cached_property
    def largest_part(self) -> int:
        """Bytes of the largest part that ZeRO-3 gathers at a time: a layer, the embedding or the head."""
        decoder = self.decoder
        parts = (*decoder.layers, decoder.head, decoder.model.get_input_embeddings())
        return max(sum(each.nbytes for each in part.parameters()) for part in parts)

    @property
    def context(self) -> int | None:
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def _end_tokens(folder: Path) -> set[int]:
    """What ends a response, as the generation config that lies beside the base says."""
    if not (folder / "generation_config.json").is_file():
        return set()
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def _read_config(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedConfig | None:
    if not (folder / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model.base {name!r} has a config.json that does not load: {str(error).splitlines()[0]}"
        ) from error


# --- the rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """How many rows each split has, and how long they are.

    Attributes:
        counts: by split.
        prompts: different prompts in the verify split, which is what a bound counts.
        longest: prompt and response tokens of the largest batch: memory is for that one.
        usual: the same of a mean batch, padding included: operations are for that one.
        median: prompt tokens that a wanted speedup is counted at.
        missing: rows that the full model still has to answer; None where that is not known.
        assumed: what is not known, as a sentence; None where the rows were read.
        data: where the rows were read.
    """

    counts: dict[str, int]
    prompts: int
    longest: tuple[int, int]
    usual: tuple[int, int]
    median: int
    missing: int | None
    assumed: str | None = None
    data: CalibrationData | None = None

    @classmethod
    def of(cls, recipe: Recipe, base: Base) -> "Rows":
        """Read the rows that lie on this machine; a data set of the hub is not looked up.

        Raises:
            InputError: the rows are there and do not fit.
        """
        settings = recipe.data
        sources = _sources(recipe)
        absent = next((source for source in sources if not Path(resolve_bundled(source)).exists()), None)
        tokenizer = None
        if base.folder is not None:
            tokenizer = load_tokenizer(
                str(base.folder), trust_remote_code=recipe.model.trust_remote_code, required=False
            )
        if absent is not None:
            total = settings.limit
            what = f"data.calibration {absent!r} is not on this machine"
            if total is None:
                needed = None if recipe.budget.speedup is not None else _needed(recipe)
                total = math.ceil((needed or 300) / settings.splits.verify)
                return cls._assumed(recipe, base, total, f"{what} and data.limit is not set: {total} rows are taken")
            return cls._assumed(recipe, base, total, f"{what}: data.limit of {total} rows is taken")
        if tokenizer is None:
            total = sum(len(read_examples(source, settings.split)) for source in sources)
            total = min(total, settings.limit or total)
            what = f"the base's tokenizer is not on this machine, so the {total} rows are counted and not measured"
            return cls._assumed(recipe, base, total, what)
        data = CalibrationData(
            settings.calibration,
            tokenizer,
            **recipe.data_arguments(),
            context=base.context,
            end_tokens=_end_tokens(base.folder),
            vision=vision_processor(
                base.decoder.vision_tokens, str(base.folder), trust_remote_code=recipe.model.trust_remote_code
            ),
        )
        data.setup()
        splits = {name: data.rows_of(name) for name in ("fit", "tune", "search", "verify")}
        rows = [row for each in splits.values() for row in each]
        unknown = settings.max_response_tokens
        lengths = sorted(
            ((len(row.prompt_ids), unknown if row.response_ids is None else len(row.response_ids)) for row in rows),
            key=sum,
            reverse=True,
        )
        batches = [lengths[i : i + settings.batch_size] for i in range(0, len(lengths), settings.batch_size)]
        widths = [(max(p for p, _ in batch), max(r for _, r in batch), len(batch)) for batch in batches]
        return cls(
            {name: len(each) for name, each in splits.items()},
            data.prompts_of("verify"),
            tuple(max(width[i] for width in widths) for i in (0, 1)),
            tuple(math.ceil(sum(width[i] * width[2] for width in widths) / len(rows)) for i in (0, 1)),
            int(data.report.prompt_tokens["median"]),
            sum(row.response_ids is None for row in rows),
            data=data,
        )

    @classmethod
    def _assumed(cls, recipe: Recipe, base: Base, total: int, why: str) -> "Rows":
        shares = asdict(recipe.data.splits)
        counts = {name: max(1, round(share * total)) for name, share in shares.items()}
        response = recipe.data.max_response_tokens
        prompt = min(recipe.data.max_prompt_tokens, max(1, (base.context or math.inf) - response))
        why = f"{why}, {prompt} + {response} tokens each, the most that the recipe lets in"
        return cls(counts, counts["verify"], (prompt, response), (prompt, response), prompt, None, why)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def read(self) -> list[Row]:
        """Those that were read; none where they are assumed."""
        return [] if self.data is None else list(self.data.rows())


def _sources(recipe: Recipe) -> list[str]:
    given = recipe.data.calibration
    return [given] if isinstance(given, str) else given


def _needed(recipe: Recipe) -> int | None:
    return rows_needed(recipe.budget.max_drop, recipe.budget.metric, recipe.budget.confidence)


# --- the machine ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What ``trainer`` asks for, and what of it is at hand.

    Attributes:
        gpu: the stages run on GPUs.
        devices: processes, each with a device of its own (on CPUs they share the memory).
        strategy: ``trainer.strategy`` as a name.
        bytes: memory of one device at hand; None where there is none of that kind.
        found: devices of that kind at hand.
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
        given = recipe.trainer
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        accelerator = str(given.get("accelerator") or "auto")
        gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and found > 0)
        devices = _count(given.get("devices"), found if gpu else 1) * int(given.get("num_nodes") or 1)
        if gpu:
            memory = min((device_bytes(torch.device("cuda", i)) for i in range(found)), default=None)
        else:
            memory = device_bytes(torch.device("cpu")) // devices
        spread = max(1, found) if gpu and recipe.model.device_map is not None else 1
        return cls(gpu, devices, given.get("strategy") or "auto", memory, found if gpu else 1, spread)

    @property
    def limit(self) -> float | None:
        return None if self.bytes is None else USABLE * self.bytes

    @property
    def at_hand(self) -> bool:
        """Whether all devices are here."""
        return self.bytes is not None and (not self.gpu or self.found >= self.devices)

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

    def stage(self, cost: Cost) -> int:
        """Bytes of a stage on one device, above the base."""
        if self.devices == 1:
            return cost.peak
        shared = cost.shared * (1 - 1 / self.devices) if "deepspeed" in self.strategy else 0
        return math.ceil(cost.peak - shared + cost.gradients)


def _count(devices, found: int) -> int:
    """``trainer.devices`` as a number."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([each for each in devices.split(",") if each.strip()])
    try:
        number = int(devices)
    except (TypeError, ValueError):
        number = -1  # auto, or not given
    return number if number > 0 else max(1, found)


# --- the estimate ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A recipe's stages on its machine; all of it follows from :func:`estimate`."""

    recipe: Recipe
    base: Base
    rows: Rows
    machine: Machine
    depths: list[int]
    stages: list[Cost]

    def bytes(self, stage: Cost) -> int:
        """Most bytes on one device during a stage."""
        return self.machine.weights(self.base) + self.machine.stage(stage)

    @property
    def largest(self) -> Cost:
        return max(self.stages, key=self.bytes)

    @property
    def needs(self) -> int:
        return self.bytes(self.largest)

    def rows_read(self, stage: Cost) -> int:
        """How many rows a stage reads, each time that it is read counted."""
        recipe = self.recipe
        if stage.rows == "importance":
            return min(recipe.importance.rows, self.rows.counts["fit"])
        if stage.rows == "responses":
            return self.rows.total if self.rows.missing is None else self.rows.missing
        if stage.rows == "steps":
            batch = recipe.projection.batch_size or recipe.data.batch_size
            accumulated = recipe.trainer.get("accumulate_grad_batches") or 1
            return recipe.projection.steps * batch * accumulated  # a batch of training is that of all devices together
        return self.rows.counts[stage.rows]

    def flops(self, stage: Cost) -> float:
        """Operations of a stage, all devices together."""
        return stage.flops * self.rows_read(stage) + stage.once


def estimate(recipe: Recipe, base: Base, rows: Rows, machine: Machine, *, only: str | None = None) -> Estimate:
    """Run every stage dry at the longest rows; operations are brought to the usual ones as those of one step are.

    Args:
        only: the name of a stage to run alone, with the others of its kind.

    Raises:
        InputError: the base is no decoder that can be pruned, or the recipe's depths or sums do not fit it.
    """
    decoder = base.decoder
    listed = listed_boundaries(recipe.budget, decoder, rows.read, rows.median)
    boundaries = possible_boundaries(recipe, listed)
    # Importance is not known yet and taken as equal.
    depths = to_measure(recipe, decoder, [1.0] * decoder.num_layers, boundaries, rows.median)
    responses = rows.missing != 0 and rows.data is not None
    prompt, response = rows.longest
    stages = costs(
        decoder,
        recipe,
        depths,
        prompt=prompt,
        response=response,
        boundaries=listed,
        responses=responses,
        gpu=machine.gpu,
        devices=machine.devices,
        only=only,
    )
    if rows.usual != rows.longest:
        longest, usual = (
            operations(
                decoder,
                recipe,
                depths,
                batch_of(recipe.data.batch_size, *lengths),
                responses=responses,
            )
            for lengths in (rows.longest, rows.usual)
        )
        stages = [replace(each, flops=each.flops * usual[each.pace] / longest[each.pace]) for each in stages]
    return Estimate(recipe, base, rows, machine, depths, stages)


# --- what to change -------------------------------------------------------------------------------------------------


def ways_out(found: Estimate, limit: float) -> Iterator[tuple[str, Estimate]]:
    """Changes of one key each after which every stage fits in ``limit`` bytes, the mildest value of each key.

    A whole dry run takes long where the base has many layers, so the largest stage goes first and alone, and a key
    whose last value does not help that stage is left.
    """
    rows = replace(found.rows, usual=found.rows.longest)  # memory alone is asked for

    def changed(recipe: Recipe, stage: str | None) -> Estimate | None:
        machine, base = Machine.of(recipe), replace(found.base, dtype=_dtype(recipe, found.base))
        if machine.weights(base) > limit:
            return None
        estimated = estimate(recipe, base, rows, machine, only=stage)
        return estimated if estimated.needs <= limit else None

    for values in filter(None, map(list, _changes(found, limit))):  # without those that have nothing to change
        with contextlib.suppress(InputError):  # the last value may be too far
            if changed(values[-1][1], found.largest.name) is None:
                continue
        for text, recipe in values:
            try:
                fits = changed(recipe, found.largest.name) and changed(recipe, None)
            except InputError:
                break  # too far: the closed form's sums, say, no longer fit in what is left to them
            if fits:
                yield text, fits
                break


def _dtype(recipe: Recipe, base: Base) -> torch.dtype:
    return base.dtype if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype)


def _changes(found: Estimate, limit: float) -> Iterator[Iterable[tuple[str, Recipe]]]:
    """Per key that the largest stage depends on, its values, the mildest first, each with the recipe that it makes."""
    recipe, stage = found.recipe, found.largest.name
    settings, rows = recipe.projection, recipe.data.batch_size
    if found.machine.weights(found.base) < limit:  # else nothing but the base's own share helps
        if stage.startswith("closed form"):
            halves = (settings.memory_gib / 2**power for power in range(1, 6))
            yield ((f"projection.memory_gib {gib:g}", _with(recipe, projection={"memory_gib": gib})) for gib in halves)
        if stage == "scoring":
            many = _halves(recipe.importance.rows_at_a_time(recipe.data))
            yield ((f"importance.batch_size {n}", _with(recipe, importance={"batch_size": n})) for n in many)
            if not recipe.importance.gradient_checkpointing:
                changed = _with(recipe, importance={"gradient_checkpointing": True})
                yield [("importance.gradient_checkpointing true", changed)]
        if stage == "training":
            if not settings.gradient_checkpointing:
                changed = _with(recipe, projection={"gradient_checkpointing": True})
                yield [("projection.gradient_checkpointing true", changed)]
            halves = _halves(settings.batch_size or rows)
            yield ((f"projection.batch_size {n}", _with(recipe, projection={"batch_size": n})) for n in halves)
        yield ((f"data.batch_size {n}", _with(recipe, data={"batch_size": n})) for n in _halves(rows))
        if not isinstance(recipe.budget.candidates, list) and recipe.budget.speedup is None:
            halves = _halves(len(found.depths))
            yield ((f"budget.candidates {n}", _with(recipe, budget={"candidates": n})) for n in halves)
    if found.base.dtype.itemsize > 2:
        yield [("model.dtype bfloat16", _with(recipe, model={"dtype": "bfloat16"}))]
    # Shards go with neither rows of images nor a base that is placed by hand.
    if found.machine.gpu and not found.base.decoder.vision_tokens and recipe.model.device_map is None:
        strategy, nodes = "deepspeed_stage_3", int(recipe.trainer.get("num_nodes") or 1)
        more = [n for n in (2, 4, 8, 16) if not found.machine.shards or n * nodes > found.machine.devices]
        if more:
            yield (
                (
                    f"trainer.strategy {strategy} with trainer.devices {devices}",
                    replace(recipe, trainer=recipe.trainer | {"strategy": strategy, "devices": devices}),
                )
                for devices in more
            )


def _halves(count: int) -> Iterator[int]:
    while count := count // 2:
        yield count


def _with(recipe: Recipe, **sections: dict) -> Recipe:
    return replace(recipe, **{name: replace(getattr(recipe, name), **change) for name, change in sections.items()})


def card_for(needed: float) -> int | None:
    """The smallest of the common GPUs that holds so many bytes, by its nominal GB; None where none does."""
    return next((card for card, there in CARDS.items() if USABLE * there * _GIB >= needed), None)


# --- time -----------------------------------------------------------------------------------------------------------


def pace(found: Estimate) -> dict[str, float] | str:
    """Seconds per operation of each kind of step, from a few real ones on the device; or why nothing was timed.

    Rows are the given ones where they were read and have responses, of the usual length otherwise.
    """
    machine, base, recipe = found.machine, found.base, found.recipe
    if machine.bytes is None:
        return "there is no GPU here: run this check where trainer.accelerator is at hand"
    if base.folder is None:
        return f"the weights of {base.name} are not on this machine: download the base first"
    if machine.devices > 1:
        return f"trainer.devices is {machine.devices}, and steps are timed in one process: set trainer.devices to 1"
    if machine.spread > 1:
        return f"model.device_map spreads the base over {machine.spread} GPUs, and steps are timed on one"
    if machine.shards:
        return f"trainer.strategy {machine.strategy} keeps the base in shards, and steps are timed on a whole one"
    sizes = list(dict.fromkeys((recipe.data.batch_size, recipe.importance.rows_at_a_time(recipe.data))))
    batches = [batch_of(size, *found.rows.usual) for size in sizes]
    if (data := found.rows.data) is not None and not found.rows.missing:
        rows = data.loader("fit").dataset
        middle = len(rows) // 2 // sizes[0] * sizes[0]  # images are read for the batches that are timed alone
        batches = [data.batch(rows[middle : middle + size]) for size in sizes]
    responses = any(stage.rows == "responses" for stage in found.stages)
    counted = operations(base.decoder, recipe, found.depths, *batches, responses=responses)
    if not machine.gpu and max(counted.values()) > _SLOW_STEP:
        return "one step takes a CPU too long to try it: set trainer.accelerator to gpu where there is one"
    try:
        model = load_model(
            str(base.folder),
            dtype=recipe.model.dtype,
            attn_implementation=recipe.model.attn_implementation,
            trust_remote_code=recipe.model.trust_remote_code,
        ).to(machine.device)
    except InputError as error:
        return f"the base does not load here: {error}".rstrip(".")
    steps = Steps(Decoder(model), recipe, found.depths, *batches).all(responses=responses)
    return {name: _seconds(step, machine.device) / counted[name] for name, step in steps.items()}


def _seconds(step, device: torch.device, repeats: int = 3) -> float:
    """The median of ``repeats`` steps after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# --- telling --------------------------------------------------------------------------------------------------------


def check(recipe: Recipe) -> int:
    """Print what the recipe takes; returns 0, or 2 where it cannot work as it is (the text says which key to change).

    Raises:
        InputError: base, rows or recipe do not fit together.
    """
    quiet_lightning()
    machine = Machine.of(recipe)
    _refuse(recipe, machine)
    base = Base.of(recipe)
    rows = Rows.of(recipe, base)
    listed = listed_boundaries(recipe.budget, base.decoder, rows.read, rows.median)
    check_images(recipe, base.decoder, rows.read, possible_boundaries(recipe, listed), machine.shards)
    found = estimate(recipe, base, rows, machine)
    too_much = machine.limit is not None and found.needs > machine.limit
    if too_much and not machine.gpu and (recipe.trainer.get("accelerator") or "auto") == "auto":
        # The recipe names no device, and this machine's CPU is not the one that it is meant for.
        found, too_much = estimate(recipe, base, rows, replace(machine, gpu=True, bytes=None, found=0)), False
    if found.machine.at_hand:
        Trainers(recipe)  # refuses what does not run on this machine
    paces = "it does not fit" if too_much else pace(found)
    print(_heading(found), end="\n\n")
    print(_table(found, paces), end="\n\n")
    certified, enough = _certifiable(found)
    fits, memory = _memory(found)
    for line in (memory, _images(found), _groupings(found), _trainings(found), certified, _time(found, paces)):
        if line:
            print(line)
    return FITS if fits and enough else DOES_NOT_FIT


def _refuse(recipe: Recipe, machine: Machine) -> None:
    """Raise what ``pop-fit`` would on any machine."""
    check_keys(recipe.trainer)
    if machine.devices > 1 or machine.strategy in ("ddp", *DEEPSPEED):
        check_placement(recipe)
    for source in _sources(recipe):
        check_exists(source)


def _heading(found: Estimate) -> str:
    base, rows = found.base, found.rows
    where = f"assumed: bundled shape {base.shape}, the base is not on this machine" if base.shape else "its own config"
    counts = ", ".join(f"{name} {count}" for name, count in rows.counts.items())
    lengths = f"longest batch {rows.longest[0]} + {rows.longest[1]} tokens, mean {rows.usual[0]} + {rows.usual[1]}"
    given, wanted = found.recipe.budget.candidates, found.recipe.budget.speedup
    if wanted is not None:
        placed = f" (the largest that reach budget.speedup {wanted:g} at {rows.median} prompt tokens)"
    elif isinstance(given, list) or given == "all":
        placed = ""
    else:
        placed = " (assumed: as for layers of equal importance; scoring will place them)"
    machine = found.machine
    kind = "GPU" if machine.gpu else "CPU"
    many = f"{machine.devices} {kind}s, trainer.strategy {machine.strategy}" if machine.devices > 1 else f"one {kind}"
    return "\n".join(
        (
            f"base: {base.name}, {base.decoder.num_layers} layers, {base.parameters / 1e9:.3g} billion parameters, "
            f"{_gib(base.bytes)} GiB in {str(base.dtype).removeprefix('torch.')} ({where})",
            f"rows: {counts} ({f'assumed: {rows.assumed}' if rows.assumed else lengths})",
            f"depths: {', '.join(map(str, found.depths))}{placed}",
            f"runs on: {many}",
        )
    )


def _table(found: Estimate, paces: dict[str, float] | str) -> str:
    timed = isinstance(paces, dict)
    header = ["stage", "rows", "operations", "base GiB", "kept GiB", "batch GiB", "in all GiB"]
    header += ["time"] if timed else []
    lines = []
    for stage in found.stages:
        weights, flops = found.machine.weights(found.base), found.flops(stage)
        above = found.bytes(stage) - weights
        kept = min(above, stage.kept)
        cells = (weights, kept, above - kept, weights + above)
        line = [stage.name, str(found.rows_read(stage)), f"{flops:.2e}", *map(_gib, cells)]
        lines.append([*line, _duration(flops * paces[stage.pace])] if timed else line)
    return text_table(header, lines, left=(0,))


def _memory(found: Estimate) -> tuple[bool, str]:
    """Whether the device at hand holds it, and the sentences that say so."""
    machine, stage = found.machine, found.largest
    text = f"memory: {_gib(found.needs)} GiB per device in its largest stage, {stage.name}"
    if machine.limit is None:
        card = card_for(found.needs)
        if card is not None:
            return True, f"{text}; no GPU is here to judge it by: it fits a GPU of {card} GB."
        largest = max(CARDS)
        options = _listed(found, USABLE * CARDS[largest] * _GIB)
        return True, f"{text}; no GPU is here, and none of {largest} GB would hold it: {options}."
    there = f"{_gib(machine.bytes)} GiB are there, of which {USABLE:.0%} can be counted on"
    if found.needs <= machine.limit:
        if machine.found < machine.devices and machine.gpu:
            return True, f"{text}; {there}: it fits, on {machine.devices} of them ({machine.found} found)."
        return True, f"{text}; {there}: it fits."
    return False, f"{text}; {there}: it does not fit: {_listed(found, machine.limit)}."


def _listed(found: Estimate, limit: float) -> str:
    some = itertools.islice(ways_out(found, limit), 2)
    options = [f"set {text} ({_gib(changed.needs)} GiB)" for text, changed in some]
    if options:
        return " or ".join(options)
    card = card_for(found.needs)
    where = f"a GPU of {card} GB (trainer.accelerator)" if card else "a smaller model.base"
    keys = "data.batch_size, data.max_prompt_tokens and budget.candidates"
    return f"no single key is enough; lower {keys} together, or take {where}"


def _images(found: Estimate) -> str | None:
    if not found.base.decoder.vision_tokens:
        return None
    return "images and videos: what the vision tower holds while it reads them is not counted, its weights are."


def _trainings(found: Estimate) -> str | None:
    """How often the budget asks for a training is known only once it measures."""
    if found.recipe.projection.kind not in ("lora", "full"):
        return None
    budget = found.recipe.budget
    if budget.speedup is not None:
        return (
            "training: counted once, at the deepest of these depths; budget.speedup decides the depth, and up to "
            f"{budget.extensions} rounds more come where they help."
        )
    return (
        f"training: counted once at each of {len(found.depths)} depths; the budget asks for it at the deepest that it "
        f"can keep, and for up to {budget.extensions} rounds more where they help."
    )


def _groupings(found: Estimate) -> str | None:
    """Which grouping the closed form gets, what the finer ones take, and its passes beside plain ones."""
    if not fits_closed_form(found.recipe):
        return None
    shape, settings = Shape.of(found.base.decoder), found.recipe.projection
    grouping, groups = closed_form_passes(found.base.decoder, found.recipe, found.depths)
    needed = {name: group_bytes(shape, found.depths, name, len(settings.ridge)) / _GIB for name in GROUPINGS}
    passes = f"{len(groups)} passes" if len(groups) > 1 else "one pass"
    text = (
        f"closed form: grouping {grouping} in {passes} over the fit rows, projection.memory_gib {settings.memory_gib:g}"
    )
    finer = [name for name in GROUPINGS if GROUPINGS.index(name) < GROUPINGS.index(grouping)]
    more = [f"{name} takes projection.memory_gib {math.ceil(needed[name] * 10) / 10:g}" for name in reversed(finer)]
    text = f"{text}; in one pass {', '.join(more)}." if more else f"{text}."
    plain = prefill_flops(found.base.decoder, PruningPlan(shape.layers), sum(found.rows.usual))
    ratios = [
        f"{stage.name.removeprefix('closed form: ')} {stage.flops / plain:.2f}x"
        for stage in found.stages
        if stage.rows == "fit"
    ]
    return f"{text} Counted beside one forward pass over the fit rows: {', '.join(ratios)}."


def _certifiable(found: Estimate) -> tuple[str, bool]:
    """The smallest drop that the verify rows can show, and whether the budget's is at least that."""
    recipe, rows = found.recipe, found.rows
    budget, prompts = recipe.budget, rows.prompts
    if budget.speedup is not None:
        return f"budget: a speedup of {budget.speedup:g} is wanted, under which the loss is no condition.", True
    least = smallest_certifiable(prompts, budget.metric, budget.confidence)
    label = " (assumed)" if rows.assumed else ""
    if least is None:
        return f"budget: {budget.metric} has no smallest drop that {prompts} verify rows{label} can certify.", True
    unit = f"{least:.2%} of {'answers' if budget.metric == 'exact_match' else 'tokens'}"
    how = f"at best, at {budget.confidence:.0%} confidence"
    text = f"budget: {prompts} verify rows{label} can certify a drop of {unit} {how}"
    needed = _needed(recipe)
    if needed is None or prompts >= needed:
        return f"{text}; budget.max_drop is {budget.max_drop}.", True
    share = needed / rows.total
    more = math.ceil(needed / recipe.data.splits.verify)
    keys = [f"data.splits.verify to at least {math.ceil(100 * share) / 100:g}"] if share < 0.9 else []
    keys += [f"budget.max_drop to {math.ceil(least * 1e4) / 1e4:g}", f"data.limit to {more} or more, with as many rows"]
    return f"{text}; budget.max_drop {budget.max_drop:g} needs {needed}: set {' or '.join(keys)}.", False


def _time(found: Estimate, paces: dict[str, float] | str) -> str:
    if isinstance(paces, str):
        return f"time: not measured, because {paces}."
    total = sum(found.flops(stage) * paces[stage.pace] for stage in found.stages)
    rates = ", ".join(f"{name} {1 / each / 1e12:.3g}" for name, each in paces.items())
    return f"time: about {_duration(total)} in all, from a few steps on {found.machine.device} (TFLOP/s: {rates})."


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}" if size >= _GIB / 10 else f"{size / _GIB:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


# --- all recipes ----------------------------------------------------------------------------------------------------


def hardware_table(names: Sequence[str]) -> str:
    """What each bundled recipe needs, as a Markdown table."""
    lines = ["| command | memory per device | largest stage | operations | hardware |", "|---|---|---|---|---|"]
    for name in names:
        recipe = parse(["--recipe", name]).recipe
        base, on_cpu = Base.of(recipe), recipe.trainer.get("accelerator") == "cpu"
        machine = replace(Machine.of(recipe), gpu=not on_cpu)
        found = estimate(recipe, base, Rows.of(recipe, base), machine)
        card = card_for(found.needs)
        what = f"GPU of {card} GB" if card else f"GPU above {max(CARDS)} GB"
        what = f"{machine.devices} x {what}" if machine.devices > 1 else f"one {what}"
        lines.append(
            f"| `pop-fit --recipe {name}` | {found.needs / _GIB:.1f} GiB | {found.largest.name} | "
            f"{sum(map(found.flops, found.stages)):.1e} | {'any CPU' if on_cpu else what} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(hardware_table(bundled_recipes()))
