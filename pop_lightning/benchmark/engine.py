"""Times vLLM on a base and on its artifact, side by side: ``python -m pop_lightning.benchmark.engine --help``.

Both engines run in processes of their own and answer the same prompts in turn, so that what slows the machine down for
a while slows both. Requests arrive one after the other, or at random times with a given rate. The counted bound is that
of the prompts' prefill (``flops.py``); under load, queueing makes the measured ratio of TTFT larger.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pop_lightning.benchmark.benchmark import a_third_pruned, describe_machine, load
from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.core.tables import text_table
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.pruning.flops import speedup
from pop_lightning.serving import engine_args, private

LENGTHS, RATES, REQUESTS, REPEATS, DECODE_TOKENS = (1024,), (0.0,), 4, 5, 32
NAMES = ("full", "pruned")


def run(
    generator: StageAwareGenerator,
    *,
    lengths: Sequence[int] = LENGTHS,
    rates: Sequence[float] = RATES,
    requests: int = REQUESTS,
    repeats: int = REPEATS,
    decode_tokens: int = DECODE_TOKENS,
    enforce_eager: bool = False,
) -> dict[str, Any]:
    """Measure every combination of prompt length and rate.

    Args:
        generator: its model and plan are served; both are written to a temporary folder.
        lengths: prompt lengths in tokens; random tokens.
        rates: requests per second, drawn as a Poisson process; 0: one request at a time.
        requests: requests per round.
        repeats: rounds per point, each once with either engine after one round of warm-up.
        decode_tokens: tokens that every request generates.
        enforce_eager: neither compile the models nor capture graphs.

    Returns:
        Plain data. Of a point, ``full`` and ``pruned`` hold ``ttft_ms`` (median), ``tpot_ms`` (median over requests of
        the mean time per token after the first) and ``itl_p95_ms`` (95th percentile of the times between tokens);
        ``ratio`` is the median over rounds of the median TTFT full / pruned, with ``ratios`` of all rounds; ``counted``
        the bound.

    Raises:
        InputError: vLLM is missing, or does not load the model.
    """
    private.probe(private.NAMES_SERVER, private.NAMES_BENCHMARK)
    if min(lengths, default=0) < 2 or min(rates, default=-1) < 0 or min(requests, repeats) < 1 or decode_tokens < 2:
        raise InputError("lengths and tokens to decode must be at least 2, rates at least 0, rounds at least 1.")
    with tempfile.TemporaryDirectory() as folder:
        generator.model.save_pretrained(Path(folder) / "base")
        generator.save_pretrained(Path(folder) / "artifact", base=str(Path(folder) / "base"))
        options = {"max_model_len": max(lengths) + decode_tokens, "enforce_eager": enforce_eager}
        measured = asyncio.run(_measure(folder, generator, options, lengths, rates, requests, repeats, decode_tokens))
    plan = generator.plan
    return {
        "plan": {"depth": plan.depth, "layers": generator.decoder.num_layers, "boundary": plan.boundary},
        "machine": describe_machine(generator.model.device) | {"cores": os.cpu_count()},
        "vllm": " ".join(private.installed() or ("vllm",)),
        "settings": {
            "requests": requests,
            "repeats": repeats,
            "decode_tokens": decode_tokens,
            "enforce_eager": enforce_eager,
        },
        "points": measured,
    }


async def _measure(
    folder: str,
    generator: StageAwareGenerator,
    options: dict[str, Any],
    lengths: Sequence[int],
    rates: Sequence[float],
    requests: int,
    repeats: int,
    decode_tokens: int,
) -> list[dict[str, Any]]:
    options = options | {
        "dtype": str(generator.model.dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    arguments = {"full": {"model": f"{folder}/base", **options}, "pruned": engine_args(f"{folder}/artifact", **options)}
    engines: dict[str, Any] = {}
    points = []
    try:
        for name in NAMES:
            engines[name] = private.AsyncLLM.from_engine_args(private.EngineArgs(**arguments[name]))
        vocabulary = generator.decoder.config.vocab_size
        for length in lengths:
            for rate in rates:
                rounds: dict[str, list[list[list[float]]]] = {name: [] for name in NAMES}
                for number in range(repeats + 1):
                    for name in NAMES if number % 2 else NAMES[::-1]:
                        found = await _round(engines[name], number, length, rate, requests, decode_tokens, vocabulary)
                        if number:  # the first one warms up
                            rounds[name].append(found)
                points.append(_point(generator, length, rate, rounds))
    finally:
        for engine in engines.values():
            engine.shutdown()
    return points


async def _round(
    engine: Any, number: int, length: int, rate: float, requests: int, decode_tokens: int, vocabulary: int
) -> list[list[float]]:
    """Seconds from each request's start to each of its tokens."""
    draws = random.Random(number)
    prompts = [[draws.randrange(3, vocabulary) for _ in range(length)] for _ in range(requests)]
    if not rate:
        return [await _request(engine, f"{number}-{i}", prompt, decode_tokens) for i, prompt in enumerate(prompts)]
    running = []
    for i, prompt in enumerate(prompts):
        running.append(asyncio.create_task(_request(engine, f"{number}-{i}", prompt, decode_tokens)))
        await asyncio.sleep(draws.expovariate(rate))
    return await asyncio.gather(*running)


async def _request(engine: Any, name: str, prompt: list[int], decode_tokens: int) -> list[float]:
    sampling = private.SamplingParams(
        temperature=0, max_tokens=decode_tokens, ignore_eos=True, detokenize=False, output_kind=private.OutputKind.DELTA
    )
    start, times = time.perf_counter(), []
    async for output in engine.generate({"prompt_token_ids": prompt}, sampling, name):
        now = time.perf_counter() - start
        times += [now] * len(output.outputs[0].token_ids)
    return times


def _point(generator: StageAwareGenerator, length: int, rate: float, rounds: dict[str, list]) -> dict[str, Any]:
    point: dict[str, Any] = {"prompt_tokens": length, "rate": rate}
    for name in NAMES:
        requests = [times for each in rounds[name] for times in each]
        between = [1000 * (b - a) for times in requests for a, b in pairwise(times)]
        point[name] = {
            "ttft_ms": statistics.median(1000 * times[0] for times in requests),
            "tpot_ms": statistics.median(1000 * (times[-1] - times[0]) / (len(times) - 1) for times in requests),
            "itl_p95_ms": statistics.quantiles(between, n=20, method="inclusive")[-1],
        }
    medians = {name: [statistics.median(times[0] for times in each) for each in rounds[name]] for name in NAMES}
    ratios = [full / pruned for full, pruned in zip(medians["full"], medians["pruned"], strict=True)]
    counted = speedup(generator.decoder, generator.plan, length)
    return point | {"ratio": statistics.median(ratios), "ratios": ratios, "counted": counted}


def table(result: dict[str, Any]) -> str:
    """The engine and machine, and a table with one line per point."""
    plan, settings, machine = result["plan"], result["settings"], result["machine"]
    rows = [
        [
            str(point["prompt_tokens"]),
            f"{point['rate']:g}" if point["rate"] else "one at a time",
            *(f"{point['full'][key]:.1f}, {point['pruned'][key]:.1f}" for key in ("ttft_ms", "tpot_ms", "itl_p95_ms")),
            f"{point['ratio']:.3f} [{min(point['ratios']):.3f}, {max(point['ratios']):.3f}]",
            f"{point['counted']:.3f}",
        ]
        for point in result["points"]
    ]
    titles = ["tokens", "requests/s", "TTFT ms", "TPOT ms", "p95 between tokens ms", "TTFT ratio", "counted bound"]
    return (
        f"{result['vllm']}, torch {machine['versions']['torch']}, {machine['device']}, {machine['cores']} cores; depth "
        f"{plan['depth']} of {plan['layers']}, boundary {plan['boundary']}; {settings['requests']} requests of "
        f"{settings['decode_tokens']} tokens in each of {settings['repeats']} rounds"
        f"{', eager' if settings['enforce_eager'] else ''}\n\n"
        f"{text_table(titles, rows, left=())}\nPairs are full, pruned; in brackets the smallest and largest ratio of a "
        "round.\n"
    )


def _numbers(kind: type):
    return lambda text: [kind(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m pop_lightning.benchmark.engine", description=__doc__.split(":")[0])
    parser.add_argument("--artifact", metavar="DIR", help="the artifact/ folder that pop-fit wrote")
    parser.add_argument("--base", metavar="MODEL", help="hub id or folder of its base, or of a model to prune")
    parser.add_argument("--shape", help="a named shape with random weights, such as cpu_small")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--depth", type=int, help="without an artifact (default: a third pruned)")
    parser.add_argument("--lengths", type=_numbers(int), default=LENGTHS, help="prompt lengths (default: 1024)")
    parser.add_argument("--rates", type=_numbers(float), default=RATES, help="requests per second; 0: one at a time")
    for name, value in (("requests", REQUESTS), ("repeats", REPEATS), ("decode_tokens", DECODE_TOKENS)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"(default: {value})")
    parser.add_argument("--enforce_eager", action="store_true", help="neither compile the models nor capture graphs")
    given = parser.parse_args(argv)

    try:
        target = load(artifact=given.artifact, base=given.base, shape=given.shape, dtype=given.dtype)
        if not isinstance(target, StageAwareGenerator):
            layers = target.config.get_text_config().num_hidden_layers
            target = StageAwareGenerator(target, PruningPlan(given.depth or a_third_pruned(layers)))
        names = ("lengths", "rates", "requests", "repeats", "decode_tokens", "enforce_eager")
        print(table(run(target, **{name: getattr(given, name) for name in names})), end="")
    except InputError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
