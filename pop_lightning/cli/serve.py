"""``pop-serve``: vLLM's OpenAI server on an artifact's base, with the pruned prefill."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from pop_lightning.cli import importing, run
from pop_lightning.core import completion
from pop_lightning.core.errors import InputError, first_sentence

METRICS = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "pop-serve",
        usage="pop-serve ARTIFACT [--base MODEL] [options of vLLM's server ...]",
        description="Serve an artifact over HTTP with vLLM. Every option of `vllm serve` may follow.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pop-serve {version('pop-lightning')}")
    completion.add_flag(parser, "--print-completion")
    parser.add_argument("artifact", metavar="ARTIFACT", help="the artifact/ folder that pop-fit wrote, or its hub id")
    parser.add_argument("--artifact-revision", metavar="NAME", help="branch, tag or commit of an artifact on the hub")
    parser.add_argument("--base", metavar="MODEL", help="hub id or folder of the base (default: as the artifact says)")
    return parser


def _words(own: argparse.Namespace, others: list[str]) -> list[str]:
    """The words for vLLM's own command line.

    Raises:
        InputError: the artifact cannot be served, or an option contradicts it.
    """
    from pop_lightning.serving import engine_args

    given, others = _overrides(others)
    if any(word.partition("=")[0] == "--model" for word in others):
        raise InputError("--model has no effect: the artifact names its base; --base gives another place of it.")
    arguments = engine_args(
        own.artifact,
        own.base,
        artifact_revision=own.artifact_revision,
        hf_overrides=given,
        trust_remote_code="--trust-remote-code" in others,
    )
    words = [arguments["model"], "--hf-overrides", json.dumps(arguments["hf_overrides"]), *others]
    if "revision" in arguments and not any(word.partition("=")[0] == "--revision" for word in others):
        words += ["--revision", arguments["revision"]]
    return words


def _overrides(words: list[str]) -> tuple[dict, list[str]]:
    """The value of ``--hf-overrides``, and the other words."""
    value, rest = None, []
    remaining = iter(words)
    for word in remaining:
        if word.replace("_", "-") == "--hf-overrides":
            value = next(remaining, "")
        elif word.replace("_", "-").startswith("--hf-overrides="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    try:
        found = {} if value is None else json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"--hf-overrides must be a JSON object, found {value!r}.")
    return found, rest


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """Inside, counters of the engine's process are part of the server's ``/metrics``.

    They reach it through a folder that must be named before anything imports prometheus_client. vLLM does the same
    where it has several API servers.
    """
    if METRICS in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="pop-serve-") as folder:
        os.environ[METRICS] = folder
        try:
            yield
        finally:
            del os.environ[METRICS]


def _serve(words: list[str]) -> None:
    """Run vLLM's server until a signal ends it.

    Raises:
        InputError: vLLM's configuration has something that the pruned prefill does not work with.
    """
    from pop_lightning.serving import private

    private.probe(private.NAMES_SERVER)
    parser = private.make_arg_parser(private.ArgumentParser(prog="pop-serve"))
    arguments = parser.parse_args(words)
    arguments.model = arguments.model_tag
    private.configure_logging(arguments)
    private.validate_arguments(arguments)
    try:  # here, where it is one sentence, before it fails in a process of the engine
        private.EngineArgs.from_cli_args(arguments).create_engine_config()
    except ValueError as error:
        raise _reason(error) from error
    private.serve(arguments)


def _reason(error: ValueError) -> InputError:
    """The error that pydantic wraps, where vLLM's configuration is rejected."""
    for each in getattr(error, "errors", list)():
        if isinstance(inner := each.get("ctx", {}).get("error"), InputError):
            return inner
    return InputError(f"vLLM rejects these options: {first_sentence(error)}")


def main(argv: list[str] | None = None) -> int:
    """Run ``pop-serve`` with ``argv`` (the process's own unless given); returns the exit code."""

    def body() -> None:
        own, others = _parser().parse_known_args(argv)
        with importing():
            from pop_lightning.serving import private
        private.check_installed()
        words = _words(own, others)
        with _shared_metrics():
            _serve(words)

    return run("pop-serve", body)


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
