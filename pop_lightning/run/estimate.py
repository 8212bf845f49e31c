"""What a recipe takes on its machine: memory per device and operations of every stage, before anything is loaded.

The base is built on the meta device, from its own config where that lies on this machine and from a bundled shape
otherwise; every stage runs dry over it (``stage_costs.py``). The preflight asks here and says what follows. The hub is
never asked, nothing is written.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from pop_lightning.core.bundled import resolve_bundled
from pop_lightning.core.errors import InputError
from pop_lightning.core.memory import device_bytes
from pop_lightning.data.examples import read_examples
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.processor import vision_processor
from pop_lightning.data.rows import Row
from pop_lightning.evaluation.bounds import rows_needed
from pop_lightning.models import shapes
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import load_tokenizer, local_folder
from pop_lightning.run.depths import listed_boundaries, possible_boundaries, to_measure
from pop_lightning.run.recipe import Recipe
from pop_lightning.run.stage_costs import Cost, batch_of, costs, operations

USABLE = 0.94  # of a device's memory: the rest goes to the CUDA context, libraries and fragmentation


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
    attention: str | None
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
        attention = model.attn_implementation if model.attn_implementation in (None, "eager") else "sdpa"
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
        given = sources(recipe)
        absent = next((source for source in given if not Path(resolve_bundled(source)).exists()), None)
        tokenizer = None
        if base.folder is not None:
            tokenizer = load_tokenizer(
                str(base.folder), trust_remote_code=recipe.model.trust_remote_code, required=False
            )
        if absent is not None:
            total = settings.limit
            what = f"data.calibration {absent!r} is not on this machine"
            if total is None:
                needed = None if recipe.budget.speedup is not None else certifying_rows(recipe)
                total = math.ceil((needed or 300) / settings.splits.verify)
                return cls._assumed(recipe, base, total, f"{what} and data.limit is not set: {total} rows are taken")
            return cls._assumed(recipe, base, total, f"{what}: data.limit of {total} rows is taken")
        if tokenizer is None:
            total = sum(len(read_examples(source, settings.split)) for source in given)
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


def sources(recipe: Recipe) -> list[str]:
    """``data.calibration`` as a list."""
    given = recipe.data.calibration
    return [given] if isinstance(given, str) else given


def certifying_rows(recipe: Recipe) -> int | None:
    """How many verify rows certify the budget at best; None where it has no such number."""
    return rows_needed(recipe.budget.max_drop, recipe.budget.loss, recipe.budget.confidence)


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
