"""The command line: thin, no logic of its own. Bad input becomes one sentence on stderr and exit code 2."""

import os
import sys
from collections.abc import Callable

from pop_lightning.errors import InputError


def run(program: str, body: Callable[[], int | None]) -> int:
    """Run ``body`` and turn its outcome into an exit code: 0 or its own, 2 for bad input, 130 for Ctrl-C."""
    try:
        return body() or 0
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":  # torchrun starts many, all with the same command line
            print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help and --print_config
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        raise
