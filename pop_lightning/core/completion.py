"""Scripts with which a shell completes flags and their values, which shtab writes from a command's argparse parser."""

import argparse
from collections.abc import Callable, Sequence
from shlex import quote
from typing import Any

SHELLS = ("bash", "zsh")
# What the shell completes where the help has this placeholder.
_KIND = {"FILE": "file", "DIR": "directory", "MODEL": "directory", "ARTIFACT": "directory"}


def add_flag(
    parser: argparse.ArgumentParser,
    *flags: str,
    whole: Callable[[], argparse.ArgumentParser] | None = None,
) -> None:
    """Add ``--print_completion SHELL``, which prints the script and exits.

    Args:
        flags: other spellings of the flag.
        whole: a parser that also declares what ``parser`` accepts without declaring it.
    """

    class Print(argparse.Action):
        def __call__(self, parser, namespace, shell, option_string=None):
            print(script(parser if whole is None else whole(), shell))
            parser.exit()

    text = f"print a script that completes flags in {' or '.join(SHELLS)}, and exit"
    parser.add_argument("--print_completion", *flags, action=Print, choices=SHELLS, metavar="SHELL", help=text)


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of ``SHELLS``. Placeholders such as ``FILE`` are completed by names of files or folders."""
    import shtab

    for each in _parsers(parser):
        for action in each._actions:  # argparse has no public list of them
            kind = _KIND.get(action.metavar)
            if kind is not None and not hasattr(action, "complete"):
                action.complete = shtab.CHOICE_FUNCTIONS[kind]
    return shtab.complete(parser, shell)


def names_or_files(names: Sequence[str]) -> dict[str, Any]:
    """A value for ``action.complete``: one of ``names``, or a file."""
    words = " ".join(names)
    body = f'  compgen -W {quote(words)} -- "$1"\n  compgen -f -- "$1"'
    return {
        "bash": "_pop_names_or_files",
        "zsh": f"{{_alternative 'names\\:name\\:({words})' 'files\\:file\\:_files'}}",
        "preamble": {"bash": f"_pop_names_or_files() {{\n{body}\n}}"},
    }


def _parsers(parser: argparse.ArgumentParser):
    """``parser`` and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _parsers(each)
