"""Times plain and pruned prefill side by side, and compares the speedup with its bounds.

``pop-generate bench`` calls :func:`load` and :func:`run`; the pipeline calls :func:`measure_ttft`. Every ratio
comes from passes that alternate in one run after warm-up, on a synchronized device. Two bounds are
reported with it: the *counted* one divides operations (``flops.py``), the *measured* one times the work that cannot be
avoided (``bound.py``). ``report.py`` formats the result.
"""

import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from pop_lightning.benchmark.bound import unavoidable
from pop_lightning.core.clock import WARMUP, alternate, lap, median_ratio, spread
from pop_lightning.core.errors import InputError
from pop_lightning.core.memory import memory_advice, peak_bytes
from pop_lightning.core.numbers import count
from pop_lightning.core.plan import PruningPlan
from pop_lightning.generation.artifact import read_artifact
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models import shapes
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import check_dtype, choose_device, context_length, load_model
from pop_lightning.models.names import CACHE
from pop_lightning.pruning.flops import prefill_flops

LENGTHS, BATCHES, REPEATS, DECODE_TOKENS = (128, 512, 1024), (1,), 9, 32


# --- what is measured -----------------------------------------------------------------------------------------------


def load(
    *,
    artifact: str | None = None,
    revision: str | None = None,
    base: str | None = None,
    shape: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> StageAwareGenerator | PreTrainedModel:
    """What ``--benchmark`` runs on: an artifact's generator, a base model, or a shape with random weights.

    Args:
        artifact: the ``artifact/`` folder of ``pop-fit``, or a hub id; ``base`` then says where its base is.
        revision: of an artifact on the hub.
        base: hub id or folder.
        shape: a name in ``shapes.SHAPES``; cannot be combined with the others.
        dtype: one of ``models.DTYPES``; by default as stored; for a shape bfloat16 on a GPU and float32 on a CPU.
        device: ``cpu``, ``cuda`` or ``cuda:N``; by default a GPU if there is one.

    Raises:
        InputError: the arguments do not go together, or nothing loads from them.
    """
    if shape is not None and (artifact is not None or base is not None):
        raise InputError("--shape makes a model with random weights; drop --artifact and --base, or --shape.")
    if shape is None and artifact is None and base is None:
        raise InputError("nothing to measure was given: expected --artifact DIR, --base MODEL or --shape NAME.")
    check_dtype(dtype)
    place = choose_device(device)
    with memory_advice("choose a smaller model, a narrower --dtype or another --device"):
        if shape is not None:
            dtype = dtype or ("bfloat16" if place.type == "cuda" else "float32")
            return shapes.build(shape, dtype=getattr(torch, dtype), device=place)
        load = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
        if artifact is None:
            return load_model(base, **load).to(place)
        return StageAwareGenerator.from_artifact(artifact, base, revision=revision, **load).to(place)


def a_third_pruned(layers: int) -> int:
    """The depth that prunes the last third of the layers, as the paper's main tables do (Llama 8B: 22 of 32)."""
    return layers - layers // 3


# --- the grid -------------------------------------------------------------------------------------------------------


def run(
    target: StageAwareGenerator | PreTrainedModel,
    *,
    lengths: Sequence[int] | None = None,
    batches: Sequence[int] = BATCHES,
    depths: Sequence[int] | None = None,
    boundary: int | float | None = None,
    salient: int | float | None = None,
    repeats: int = REPEATS,
    decode_tokens: int = DECODE_TOKENS,
    name: str | None = None,
    progress: bool = False,
    on_point: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure every combination of depth, batch and length.

    Args:
        target: a generator, whose own plan and projections are measured, or a model, pruned with reused projections.
        lengths: prompt lengths in tokens; random tokens, no padding. Unless given, the median prompt that an artifact
            was made with where it says so, else :data:`LENGTHS`, each cut to what the model's context has room for.
        batches: prompts per batch.
        depths: for a model; a third pruned unless given.
        boundary, salient: for a model, numbers or shares of the prompt; 1 and 0 unless given.
        repeats: timed rounds per point, each of one plain pass, one pruned pass and one pass of the measured bound.
        decode_tokens: decode steps timed per point; 0 leaves decode out.
        name: the name of the model in the result.
        progress: show a progress bar on stderr.
        on_point: called with the result so far after every point, so that a long run can be saved as it goes.

    Returns:
        Plain data: ``model``, ``machine``, ``settings`` and ``points``. ``settings`` has ``default_lengths``, why these
        were measured, or None where they were given. Of a point, ``full`` and ``pruned`` hold ``ttft_ms`` (``median``,
        ``p90``, ``all``), ``tokens_per_s``, ``flops`` of the batch, ``tflops_per_s`` and ``peak_bytes`` above the
        weights; ``ratio`` is the median over rounds of full / pruned; ``bound`` holds the same ratio for the
        ``measured`` and ``counted`` bound, the measured one's ``ms`` and its ``parts_ms``; ``of_measured_bound`` is the
        median over rounds of bound / pruned; ``decode`` the median ms per token over the cache of a plain and of a
        pruned prefill and the relative ``change`` from one median to the other; ``projection_bytes`` what the
        projections hold in addition to the model's weights.

    Raises:
        InputError: an argument is out of range, or memory ran out (the points before that were given to ``on_point``).
    """
    plans = _plans(target, depths, boundary, salient)
    model = target.model if isinstance(target, StageAwareGenerator) else target
    context, steps = context_length(model), decode_tokens + WARMUP if decode_tokens else 0
    chosen = None
    if lengths is None:
        lengths, chosen = _default_lengths(target, context, steps)
    _check(context, steps, lengths, batches, repeats, decode_tokens)
    result: dict[str, Any] = {
        "format": 1,
        "model": _describe_model(target, name),
        "machine": describe_machine(model.device),
        "settings": {
            "boundary": plans[0].boundary,
            "salient": plans[0].salient,
            "default_lengths": chosen,
            "repeats": repeats,
            "warmup": WARMUP,
            "decode": decode_tokens,
        },
        "points": [],
    }
    points, hidden = len(plans) * len(batches) * len(lengths), not progress or None  # None: shown on a terminal only
    bar = tqdm(total=points, desc="benchmark", unit="point", disable=hidden)
    with bar:
        for plan in plans:
            with memory_advice("choose a smaller model or a narrower --dtype"):
                generator = target if isinstance(target, StageAwareGenerator) else StageAwareGenerator(target, plan)
            for batch in batches:
                for tokens in lengths:
                    bar.set_postfix_str(f"depth {plan.depth}, batch {batch}, {tokens} tokens")
                    with memory_advice(f"batch {batch} of {tokens} tokens: lower --batches or --lengths"):
                        point = measure(generator, tokens, batch, repeats=repeats, decode_tokens=decode_tokens)
                    result["points"].append(point)
                    if on_point is not None:
                        on_point(result)
                    bar.update()
    return result


def _plans(
    target, depths: Sequence[int] | None, boundary: int | float | None, salient: int | float | None
) -> list[PruningPlan]:
    if isinstance(target, StageAwareGenerator):
        if (depths, boundary, salient) != (None, None, None):
            raise InputError(
                "the artifact sets depth, boundary and salient; drop --depths, --boundary and --salient, or use --base."
            )
        return [target.plan]
    decoder = Decoder(target)
    layers = decoder.num_layers
    plans = [
        PruningPlan(depth, 1 if boundary is None else boundary, salient or 0)
        for depth in ([a_third_pruned(layers)] if depths is None else depths)
    ]
    for plan in plans:
        if plan.depth > layers:
            raise InputError(f"--depths must lie in 1..{layers} for this model of {layers} layers, found {plan.depth}.")
        decoder.check_depth(plan.depth)
    if not plans:
        raise InputError("--depths must name at least one depth, found none.")
    return plans


def _default_lengths(
    target: StageAwareGenerator | PreTrainedModel, context: int | None, steps: int
) -> tuple[list[int], str]:
    """The lengths to measure where none are given, and why, for the report."""
    room = None if context is None else max(1, context - steps)
    folder = target.artifact_folder if isinstance(target, StageAwareGenerator) else None
    median = None if folder is None else read_artifact(folder).prompt_tokens
    wanted = LENGTHS if median is None else (median,)
    # Cut rather than left out: at the shortest one a long boundary is most of the prompt, and nothing is saved.
    lengths = sorted({each if room is None else min(each, room) for each in wanted})
    why = "the default lengths" if median is None else "the median prompt that the artifact was made with"
    if lengths != sorted(wanted):
        why += f", cut to what the context of {context} tokens has room for"
    *most, last = lengths
    listed = f"{', '.join(map(str, most))} and {last} tokens" if most else count(last, "token")
    return lengths, f"{listed}: {why} (--lengths measures others)"


def _check(context: int | None, steps: int, lengths, batches, repeats: int, decode_tokens: int) -> None:
    for flag, values in (("--lengths", lengths), ("--batches", batches)):
        if not values or min(values) < 1:
            found = min(values) if values else "none"
            raise InputError(f"{flag} must hold numbers of at least 1, found {found}.")
    for flag, value, least in (("--repeats", repeats, 1), ("--decode_tokens", decode_tokens, 0)):
        if value < least:
            raise InputError(f"{flag} must be at least {least}, found {value}.")
    if context is not None and max(lengths) + steps > context:
        decoded = f"the {decode_tokens} tokens of --decode_tokens and {WARMUP} that warm up before them"
        sum_of = f"; with {decoded} it is" if steps else ","
        raise InputError(f"--lengths holds {max(lengths)}{sum_of} more than the model's context of {context} tokens.")


# --- one point ------------------------------------------------------------------------------------------------------


def measure(
    generator: StageAwareGenerator, tokens: int, batch: int = 1, *, repeats: int = REPEATS, decode_tokens: int = 0
) -> dict[str, Any]:
    """One point of the grid; the return value is described in :func:`run`."""
    device, decoder, plan = generator.model.device, generator.decoder, generator.plan
    ids = _random_prompts(generator, tokens, batch)
    passes = _passes(generator, ids)
    steps = unavoidable(generator, ids)
    laps = alternate({**passes, "bound": steps}, device, repeats)
    parts = zip(*(parts for _, parts in laps["bound"]), strict=True)
    parts = dict(zip(steps, map(statistics.median, parts), strict=True))
    del steps  # frees its cache and weights before memory is measured
    flops = {
        "full": batch * prefill_flops(decoder, PruningPlan(decoder.num_layers), tokens),
        "pruned": batch * prefill_flops(decoder, plan, tokens),
    }
    total = {name: [sum_ms for sum_ms, _ in each] for name, each in laps.items()}
    point: dict[str, Any] = {
        "prompt_tokens": tokens,
        "batch": batch,
        "depth": plan.depth,
        "layers": decoder.num_layers,
        "boundary": plan.boundary,
        "salient": plan.salient,
    }
    for name in ("full", "pruned"):
        median = statistics.median(total[name])
        point[name] = {
            "ttft_ms": spread(total[name]),
            "tokens_per_s": 1000 * batch * tokens / median,
            "flops": flops[name],
            "tflops_per_s": flops[name] / median / 1e9,
            "peak_bytes": peak_bytes(passes[name]["prefill"], device),
        }
    point |= {
        "ratio": median_ratio(total["full"], total["pruned"]),
        "bound": {
            "measured": median_ratio(total["full"], total["bound"]),
            "counted": flops["full"] / flops["pruned"],
            "ms": spread(total["bound"]),
            "parts_ms": parts,
        },
        "of_measured_bound": median_ratio(total["bound"], total["pruned"]),
        "projection_bytes": _projection_bytes(generator),
    }
    if decode_tokens:
        point["decode"] = _decode(generator, passes, ids, decode_tokens)
    return point


def measure_ttft(generator: StageAwareGenerator, tokens: int, *, batch: int = 1, repeats: int = REPEATS) -> dict:
    """Time of one prefill, plain and pruned alternating after warm-up: medians and p90 in milliseconds, and a ratio."""
    device = generator.model.device
    laps = alternate(_passes(generator, _random_prompts(generator, tokens, batch)), device, repeats)
    full, pruned = ([total for total, _ in laps[name]] for name in ("full", "pruned"))
    spreads = spread(full), spread(pruned)
    machine = describe_machine(device)
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return {
        "prompt_tokens": tokens,
        "batch": batch,
        "full_ms": spreads[0]["median"],
        "full_p90_ms": spreads[0]["p90"],
        "pruned_ms": spreads[1]["median"],
        "pruned_p90_ms": spreads[1]["p90"],
        "ratio": median_ratio(full, pruned),
        "repeats": repeats,
        "device": machine["device"] if device.type == "cuda" else f"CPU, {threads}",
    }


def _random_prompts(generator: StageAwareGenerator, tokens: int, batch: int) -> Tensor:
    random = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, generator.decoder.config.vocab_size, (batch, tokens), generator=random)
    return ids.to(generator.model.device)


def _passes(generator: StageAwareGenerator, ids: Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    def full():
        with generator.full_model():
            return generator.prefill(ids)

    return {"full": {"prefill": full}, "pruned": {"prefill": lambda: generator.prefill(ids)}}


def _projection_bytes(generator: StageAwareGenerator) -> int:
    """Bytes of the projections' own tensors, those shared with the model's weights left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in generator.model.parameters()}
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(generator.projections)}
    return sum(size for pointer, size in own.items() if pointer not in known)


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


# --- decode ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _decode(generator: StageAwareGenerator, passes, ids: Tensor, tokens: int) -> dict[str, Any]:
    """Milliseconds per token over the cache of a plain and of a pruned prefill.

    The two alternate token by token and read the same random tokens, so that a busy machine slows both down equally.
    Only the model's forward is timed; ``generate`` adds the same overhead to both.
    """
    device = generator.model.device
    caches = {name: passes[name]["prefill"]()[CACHE] for name in ("full", "pruned")}
    random = torch.Generator().manual_seed(0)
    read = torch.randint(0, generator.decoder.config.vocab_size, (WARMUP + tokens, len(ids), 1), generator=random)
    steps: dict[str, list[float]] = {name: [] for name in caches}
    for index, token in enumerate(read.to(device)):
        for name in ("full", "pruned") if index % 2 == 0 else ("pruned", "full"):

            def step(token=token, cache=caches[name]):
                return generator.model(input_ids=token, use_cache=True, **{CACHE: cache})

            total, _ = lap([step], device)
            if index >= WARMUP:
                steps[name].append(total)
    full, pruned = (statistics.median(steps[name]) for name in ("full", "pruned"))
    return {
        "full_ms_per_token": full,
        "pruned_ms_per_token": pruned,
        "change": pruned / full - 1,
        "full_ms": steps["full"],
        "pruned_ms": steps["pruned"],
    }


# --- circumstances --------------------------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions under which a figure was measured."""
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("pop-lightning", "torch", "transformers")},
            "cuda": torch.version.cuda,
        },
    }


def _describe_model(target: StageAwareGenerator | PreTrainedModel, name: str | None) -> dict[str, Any]:
    model = target.model if isinstance(target, StageAwareGenerator) else target
    return {
        "name": name or model.name_or_path or type(model).__name__,
        "class": type(model).__name__,
        "layers": Decoder(model).num_layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(p.numel() * p.itemsize for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
        "projection": target.projections.kind if isinstance(target, StageAwareGenerator) else "reuse",
    }
