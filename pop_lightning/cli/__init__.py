"""The command line: thin, no logic of its own. Bad input becomes one sentence on stderr and exit code 2."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager

from pop_lightning.core.errors import InputError, on_process


def run(program: str, body: Callable[[], int | None]) -> int:
    """Run ``body`` and turn its outcome into an exit code: 0 or its own, 2 for bad input, 130 for Ctrl-C.

    Of the processes that torchrun or SLURM started, one on each node tells what was wrong, since another node may lack
    what the first one has; what is wrong on all of them before they have joined is said once per node.
    """
    try:
        return body() or 0
    except InputError as error:
        number, tells = _process()
        if tells:
            print(f"{program}: error: {on_process(str(error), number)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help and --print_config
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        raise


def _process() -> tuple[int, bool]:
    """The number of this process and whether it tells its errors, as the variables of whoever started it have it."""
    given = os.environ
    if "RANK" in given:  # torchrun
        return int(given["RANK"]), given.get("LOCAL_RANK", "0") == "0"
    if "LOCAL_RANK" in given:  # pop-fit itself, which had found nothing wrong, so this process alone knows
        return int(given["LOCAL_RANK"]), True
    return int(given.get("SLURM_PROCID", "0")), given.get("SLURM_LOCALID", "0") == "0"


@contextmanager
def importing():
    """Around the seconds in which libraries load: Ctrl-C ends the process at once, as the system would.

    Nothing has begun that would have to be undone, and an import that is cut short can raise anything.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
