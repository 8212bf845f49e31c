"""How a command of this package is written so that it can be pasted into the shell."""

import shlex
import shutil
import sys
from pathlib import Path


def script(name: str) -> str:
    """A command of this environment as a shell finds it: by name, or by path where it is not on the search path."""
    installed = Path(sys.executable).with_name(name)
    if shutil.which(name) or not installed.is_file():
        return name
    here = Path.cwd()
    return shlex.quote(str(installed.relative_to(here) if installed.is_relative_to(here) else installed))
