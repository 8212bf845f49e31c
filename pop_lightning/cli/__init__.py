"""The command line: thin, no logic of its own. Bad input becomes one sentence on stderr and exit code 2."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager

from pop_lightning.core.errors import LAUNCHED_BY, InputError, Spelling, Terminated, as_recipe, on_process

BROKEN_PIPE = 141  # as a shell reports a process that SIGPIPE ended: 128 + 13
GRACE = 10  # seconds until SIGTERM is raised again


def run(program: str, body: Callable[[], int | None], spelling: Spelling = as_recipe, stopped: str = "") -> int:
    """Run ``body`` and turn its outcome into an exit code.

    0 or the body's own; 2 for bad input; 130 for Ctrl-C, 143 for SIGTERM; 141 where the reader of standard output is
    gone, as in ``pop-generate ... | head``, of which nothing is printed. Errors name keys as ``spelling`` writes them,
    and ``stopped`` says what to do after a signal.

    Of the processes that torchrun or SLURM started, one on each node reports an error, since another node may lack
    what the first one has; an error of all of them before they have joined is printed once per node.
    """
    try:
        code = _outcome(program, body, spelling, stopped)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # What is still buffered would raise once more when Python flushes at its end.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return BROKEN_PIPE


def _outcome(program: str, body: Callable[[], int | None], spelling: Spelling, stopped: str) -> int:
    try:
        return _terminable(body) or 0
    except InputError as error:
        number, reports = _process()
        if reports:
            print(f"{program}: error: {on_process(error.render(spelling), number)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        if LAUNCHED_BY not in os.environ and _process()[0] == 0:
            print(f"{program}: {word}{f'; {stopped}' if stopped else ''}", file=sys.stderr)
        return code
    except SystemExit as stop:  # --help and --print_config
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        raise


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    ends = select.poll()
    try:
        ends.register(sys.stdout.fileno(), 0)
    except (OSError, ValueError):  # not a file of this process, as in a notebook
        return False
    return bool(ends.poll(0))


def _process() -> tuple[int, bool]:
    """The number of this process and whether it reports errors, from the variables of whoever started it."""
    given = os.environ
    if "RANK" in given:  # torchrun, or pop-fit itself: it had found nothing wrong, so only this process knows
        return int(given["RANK"]), given.get("LOCAL_RANK", "0") == "0" or LAUNCHED_BY in given
    return int(given.get("SLURM_PROCID", "0")), given.get("SLURM_LOCALID", "0") == "0"


def importing():
    """Around the seconds in which libraries load: Ctrl-C and SIGTERM end the process at once, as the system would.

    Nothing has begun that would have to be undone, and an import that is cut short can raise anything. Torch reads its
    log level when it loads: its C++ warnings, such as the profiler's of memory that a measured call did not allocate,
    mean nothing to a user.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return _handling({signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL})


def _terminable(body: Callable[[], int | None]) -> int | None:
    """Run ``body``, in which SIGTERM raises :class:`Terminated` in the main thread.

    It is raised again after :data:`GRACE` seconds, in case that a destructor or a library swallows it. What a library
    makes of it counts as it: an extension module whose import is cut short raises ImportError, for one.
    """
    arrived = False

    def terminate(*_) -> None:
        nonlocal arrived
        arrived = True
        signal.alarm(GRACE)
        raise Terminated

    try:
        with _handling({signal.SIGTERM: terminate, signal.SIGALRM: terminate}):
            return body()
    except Exception as error:
        if arrived:
            raise Terminated from error
        raise


@contextmanager
def _handling(handlers: dict):
    """Inside, signals are handled by ``handlers``; in another thread than the main one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)
