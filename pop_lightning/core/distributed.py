"""What one process of a run needs to know about the others; with a single process every function is a no-op.

Data, statistics, training and the pipeline use it. ``run/launch.py`` starts the processes, ``run/strategies.py`` says
what they shard.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pop_lightning.core.errors import InputError, on_process

T = TypeVar("T")


class ReportedByFirst(InputError):
    """An :class:`InputError` that the first process reports, raised on the others so that all stop together."""


def rank() -> int:
    return dist.get_rank() if _several() else 0


def size() -> int:
    return dist.get_world_size() if _several() else 1


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    if _several():
        dist.barrier()


def gather(value: T) -> list[T]:
    """Every process's value (anything that pickles), in the order of ranks, on every process."""
    if not _several():
        return [value]
    values: list = [None] * size()
    dist.all_gather_object(values, value)
    return values


def total(value: Tensor) -> Tensor:
    """The sum over all processes, on every one of them; no gradient flows through it, ``value`` stays as it is."""
    return add_up(value.detach().clone()) if _several() else value.detach()


def add_up(tensor: Tensor) -> Tensor:
    """Replace ``tensor`` by its sum over all processes, bitwise the same on every process; returns it."""
    if _several():
        dist.all_reduce(tensor)
    return tensor


def counts(number: int, device: torch.device) -> list[int]:
    """Every process's ``number``; cheaper than :func:`gather` inside a training step."""
    if not _several():
        return [number]
    mine = torch.tensor([number], device=device)
    everyones = [torch.empty_like(mine) for _ in range(size())]
    dist.all_gather(everyones, mine)
    return torch.cat(everyones).tolist()


def from_first(compute: Callable[[], T]) -> T:
    """Run ``compute`` on the first process only; every process returns its value, which must pickle.

    Raises:
        InputError: on every process, where the first one raised it.
    """
    if not _several():
        return compute()
    outcome: list = [None, None]
    error = None
    if is_first():
        try:
            outcome[0] = compute()
        except InputError as raised:
            error, outcome[1] = raised, str(raised)
    dist.broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise ReportedByFirst(outcome[1])
    return outcome[0]


def first_then_others(compute: Callable[[], T]) -> T:
    """Run ``compute`` on the first process, then on the others, which find what it downloaded or cached.

    Raises:
        InputError: on every process, where one of them raised it: another node may lack what the first one has.
    """
    result: list = []
    from_first(lambda: result.append(compute()))
    problem = None
    if not result:
        try:
            result.append(compute())
        except InputError as error:
            problem = str(error)
    stop_together(problem)
    return result[0]


def stop_together(problem: str | None) -> None:
    """Raise :class:`InputError` on every process where one has a ``problem``; the first one reports it."""
    problems = gather(problem)
    failed = next((rank for rank, text in enumerate(problems) if text is not None), None)
    if failed is not None:
        text = on_process(problems[failed], failed)
        raise InputError(text) if is_first() else ReportedByFirst(text)


# --- parameters that DeepSpeed ZeRO-3 keeps in shards ---------------------------------------------------------------


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter in shards, so that it reads as empty outside :func:`gathered`."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, as if it were in one piece."""
    return torch.Size(parameter.ds_shape) if is_sharded(parameter) else parameter.shape


@contextmanager
def gathered(parameters: Iterable[Tensor | None]):
    """Inside, the parameters are whole and can be read; every process must enter together.

    Plain parameters pass through. Calling a module does not need this: ZeRO-3 gathers in its own hooks.
    """
    sharded = [parameter for parameter in parameters if parameter is not None and is_sharded(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
