"""The command line: thin, no logic of its own. Bad input becomes one sentence on stderr and exit code 2."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager

from pop_lightning.errors import InputError


def run(program: str, body: Callable[[], int | None]) -> int:
    """Run ``body`` and turn its outcome into an exit code: 0 or its own, 2 for bad input, 130 for Ctrl-C."""
    try:
        return body() or 0
    except InputError as error:
        # torchrun and SLURM start many, all with the same command line.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help and --print_config
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        raise


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
