"""``pop-fit --check``: what a recipe takes before anything is loaded, and which key to change where it does not fit.

Memory per device and operations are those of ``estimate.py``; from there follow the hardware that holds them and, where
base and device are at hand, time. ``python -m pop_lightning.run.preflight`` prints the table of all recipes that
the README shows.
"""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.core.quiet import quiet_lightning
from pop_lightning.core.tables import text_table
from pop_lightning.data.examples import check_exists
from pop_lightning.evaluation.bounds import largest_certified_loss, smallest_certifiable
from pop_lightning.fitting.kinds import kind
from pop_lightning.fitting.regressions import GROUPINGS, Shape, held_bytes
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import load_model
from pop_lightning.pruning.flops import prefill_flops
from pop_lightning.run.depths import check_images, closed_form_passes, listed_boundaries, possible_boundaries
from pop_lightning.run.estimate import USABLE, Base, Estimate, Machine, Rows, certifying_rows, estimate, sources
from pop_lightning.run.recipe import Recipe, bundled_recipes, parse
from pop_lightning.run.stage_costs import Steps, batch_of, fits_closed_form, operations
from pop_lightning.run.strategies import DEEPSPEED
from pop_lightning.run.trainers import Trainers, check_keys, check_placement

FITS, DOES_NOT_FIT = 0, 2
# By the GB that a GPU is sold with: GiB that PyTorch finds on it, on the least of the common ones of that size.
CARDS = {24: 22, 40: 39, 48: 44, 80: 79, 141: 139}
_GIB = 2**30
_SLOW_STEP = 2e12  # operations of a step that a CPU takes too long for, so that it is not timed there


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
        rows = data.loader("fit").dataset.rows
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
    for source in sources(recipe):
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
    if not kind(found.recipe.projection.kind).trains:
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
    grouping, groups = closed_form_passes(found.recipe, found.base.decoder, found.depths)
    needed = {name: held_bytes(shape, found.depths, name) / _GIB for name in GROUPINGS}
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
    least = smallest_certifiable(prompts, budget.loss, budget.confidence)
    label = " (assumed)" if rows.assumed else ""
    unit = budget.loss.amount(least)
    how = f"at best, at {budget.confidence:.0%} confidence"
    text = f"budget: {prompts} verify rows{label} can certify a drop of {unit} {how}"
    needed = certifying_rows(recipe)
    if needed is None or prompts >= needed:
        loss = largest_certified_loss(prompts, budget.loss, budget.max_drop, budget.confidence)
        spread = "" if budget.loss.binary else " at least, and more where it is spread over many"
        return (
            f"{text}, and budget.max_drop {budget.max_drop:g} for a mean loss of {budget.loss.amount(loss)}{spread}.",
            True,
        )
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
