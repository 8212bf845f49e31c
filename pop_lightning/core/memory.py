"""The memory of a device, the peak memory of one call, and advice for when memory runs out."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

from pop_lightning.core.errors import InputError


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Run ``call`` once and return the peak bytes of tensors alive at once, its result included.

    On CUDA the allocator records the peak. On a CPU the profiler records every allocation and release of PyTorch's
    allocator, including scratch inside an operator but not what oneDNN or the C library allocate. Recording slows the
    call down: never time it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own library writes its progress to stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as record:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Addr"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    live: dict[int, int] = {}
    held = peak = 0
    for _, address, size in changes:
        # Memory allocated before the call does not count, so neither does its release.
        held += size if size > 0 else -live.pop(address, 0)
        if size > 0:
            live[address] = size
        peak = max(peak, held)
    return peak


def device_bytes(device: torch.device) -> int:
    """Total memory of a device; for a CPU, that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def memory_advice(advice: str):
    """Turn running out of memory into a sentence that says what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On a CPU, and in libraries called on a GPU, only the text of a RuntimeError shows it.
        words = ("can't allocate memory", "bad_alloc", "ALLOC_FAILED", "out of memory")
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)
        if not full:
            raise
        raise InputError(f"memory ran out; {advice}.") from error
