"""``pop-generate``: run an exported artifact on a prompt or a file, or hold it against the unpruned model."""

import argparse
import json
import sys

from pop_lightning.cli import run
from pop_lightning.errors import InputError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message + "; see pop-generate --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("pop-generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--artifact", required=True, help="the artifact/ folder that pop-fit wrote")
    parser.add_argument("--base", help="hub id or folder of the base model (default: the one the artifact names)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="generate from this text, streaming, and print the TTFT")
    what.add_argument("--data", help="generate for every row of a JSON Lines file")
    parser.add_argument("--output", help="with --data: the JSON Lines file to write")
    parser.add_argument("--compare", action="store_true", help="with --data: run the unpruned model as well")
    parser.add_argument("--full", action="store_true", help="with --prompt: generate with the unpruned model")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run ``pop-generate`` with ``argv`` (the process's own unless given); returns the exit code."""

    def body() -> int:
        arguments = _parser().parse_args(argv)
        if (arguments.data is None) != (arguments.output is None):
            raise InputError("--data and --output go together; found only one of them.")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(arguments, name) < 1:
                raise InputError(f"--{name} must be at least 1, found {getattr(arguments, name)}.")
        from pop_lightning import StageAwareGenerator
        from pop_lightning.text import generate_file, stream

        load = {"trust_remote_code": True} if arguments.trust_remote_code else {}
        generator = StageAwareGenerator.from_artifact(arguments.artifact, arguments.base, **load)
        if arguments.prompt is not None:
            first = None
            pieces = stream(generator, arguments.prompt, max_new_tokens=arguments.max_new_tokens, full=arguments.full)
            for piece, seconds in pieces:
                first = seconds if first is None else first
                print(piece, end="", flush=True)
            print()
            if first is not None:
                print(f"TTFT: {1000 * first:.1f} ms", file=sys.stderr)
            return 0
        summary = generate_file(
            generator,
            arguments.data,
            arguments.output,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            compare=arguments.compare,
        )
        print(json.dumps(summary, indent=1))
        return 0

    return run("pop-generate", body)


def entry() -> None:
    """The console script."""
    sys.exit(main())
