"""Times several things against each other: in turn, after warm-up, on a synchronized device."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

WARMUP = 2  # rounds before those that are timed
NOISY = 0.2  # a p90 this share above the median makes a ratio of medians unreliable


def alternate(
    runs: Mapping[str, Mapping[str, Callable[[], object]]],
    device: torch.device,
    repeats: int,
    warmup: int = WARMUP,
    on_round: Callable[[], object] | None = None,
) -> dict[str, list[tuple[float, list[float]]]]:
    """Time ``runs``, each a row of steps, in turn after warm-up: ``{run: [(total ms, [ms per step]) per round]}``.

    Who goes first changes from round to round, so that no run always follows the same other one. ``on_round`` is called
    after every round, those of warm-up too, while nothing is timed.
    """
    names = list(runs)
    laps: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in names}
    for index in range(warmup + repeats):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            one = lap(list(runs[name].values()), device)
            if index >= warmup:
                laps[name].append(one)
        if on_round is not None:
            on_round()
    return laps


def lap(steps: Sequence[Callable[[], object]], device: torch.device) -> tuple[float, list[float]]:
    """Wall time of all steps, and of each; on a GPU a step's share is read from events, with no wait between steps."""
    kept = []  # keep results until the clock has stopped, so that freeing a prefill's cache is not timed
    synchronize(device)
    marks = [_mark(device)]
    start = time.perf_counter()
    for step in steps:
        kept.append(step())
        marks.append(_mark(device))
    synchronize(device)
    total = 1000 * (time.perf_counter() - start)
    return total, [_between(before, after) for before, after in pairwise(marks)]


def _mark(device: torch.device):
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(before, after) -> float:
    return 1000 * (after - before) if isinstance(before, float) else before.elapsed_time(after)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, Any]:
    p90 = statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
    return {"median": statistics.median(values), "p90": p90, "all": values}


def noise(spreads: Mapping[str, Mapping[str, float]]) -> str:
    """A sentence where times vary so much that their ratios are unreliable, on those that vary most; else empty.

    Args:
        spreads: ``median`` and ``p90``, as in :func:`spread`, by the name of what was timed: ``the full prefill``.
    """
    above = {name: each["p90"] / each["median"] - 1 for name, each in spreads.items()}
    name = max(above, key=above.__getitem__, default=None)
    if name is None or above[name] <= NOISY:
        return ""
    return f"The times are noisy: {name}'s p90 lies {above[name]:.0%} above its median."


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios round by round, so that what slows down a whole round cancels out."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
