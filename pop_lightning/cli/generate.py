"""``pop-generate``: run an exported artifact on a prompt or a file, or measure what pruning buys."""

import argparse
import difflib
import json
import sys

from pop_lightning.cli import importing, run
from pop_lightning.core.errors import InputError, as_flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(message + "; see pop-generate --help.")

    def check_names(self, words: list[str]) -> None:
        """Name an option that does not exist, before what is missing without it is asked for."""
        known = list(self._option_string_actions)
        for word in words:
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise InputError(f"{name} is no option" + (f" (did you mean {near[0]}?)." if near else "; see --help."))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, found {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("pop-generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--artifact", help="the artifact/ folder that pop-fit wrote")
    parser.add_argument("--base", help="hub id or folder of the base model (default: the one the artifact names)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="generate from this text, streaming, and print the TTFT")
    what.add_argument("--data", help="generate for every row of a JSON Lines file")
    what.add_argument("--benchmark", action="store_true", help="time plain and pruned prefill side by side")
    parser.add_argument("--image", action="append", help="with --prompt: an image file to show first; may be repeated")
    parser.add_argument("--video", action="append", help="with --prompt: a video file to show first; may be repeated")
    parser.add_argument("--allow_urls", action="store_true", help="fetch images and videos that are named by URL")
    parser.add_argument("--output", help="with --data: the JSON Lines file to write; with --benchmark: a folder")
    parser.add_argument("--compare", action="store_true", help="with --data: run the unpruned model as well")
    parser.add_argument("--full", action="store_true", help="with --prompt: generate with the unpruned model")
    parser.add_argument("--overwrite", action="store_true", help="with --data: replace the file --output names")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer, in tokens (default: 64)")
    parser.add_argument("--batch_size", type=int, default=8, help="with --data: rows per batch (default: 8)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")
    bench = parser.add_argument_group("with --benchmark", argument_default=argparse.SUPPRESS)
    bench.add_argument("--shape", help="measure a named shape with random weights, such as cpu_small or llama3_1_8b")
    bench.add_argument("--lengths", type=_numbers, help="prompt lengths in tokens, as in 128,512,2048")
    bench.add_argument("--batches", type=_numbers, help="prompts per batch, as in 1,8 (default: 1)")
    bench.add_argument("--depths", type=_numbers, help="depths, as in 16,20,24 (default: a third pruned)")
    bench.add_argument("--boundary", type=int, help="last prompt tokens that run in full (default: 1)")
    bench.add_argument("--repeats", type=int, help="timed rounds per point (default: 9)")
    bench.add_argument(
        "--decode_tokens", type=int, help="decode steps timed per point; 0 leaves them out (default: 32)"
    )
    return parser


# The recipe keys that the library names in its errors and that are flags here.
FLAGS = as_flags({"data.calibration": "--data", "data.allow_urls": "--allow_urls", "model.base": "--base"})
_MEASURE = ("lengths", "batches", "depths", "boundary", "repeats", "decode_tokens")


def main(argv: list[str] | None = None) -> int:
    """Run ``pop-generate`` with ``argv`` (the process's own unless given); returns the exit code."""

    def body() -> int:
        parser, words = _parser(), sys.argv[1:] if argv is None else argv
        parser.check_names(words)
        arguments = parser.parse_args(words)
        if arguments.benchmark:
            return _benchmark(arguments)
        for name in ("shape", *_MEASURE):
            if name in arguments:
                raise InputError(f"--{name} belongs to --benchmark, which was not given.")
        if arguments.artifact is None:
            raise InputError("--artifact is required: expected the artifact/ folder that pop-fit wrote.")
        return _generate(arguments)

    return run("pop-generate", body, FLAGS)


def _benchmark(arguments: argparse.Namespace) -> int:
    for name in ("compare", "full"):
        if getattr(arguments, name):
            raise InputError(f"--{name} does not go with --benchmark, which always measures both.")
    for name in ("image", "video", "allow_urls"):
        if getattr(arguments, name):
            raise InputError(f"--{name} does not go with --benchmark, which measures prompts of text.")
    if arguments.overwrite:
        raise InputError("--overwrite goes with --data; --benchmark replaces its own files in --output.")
    with importing():
        from pop_lightning.benchmark import benchmark
        from pop_lightning.benchmark import report as benchmark_report

    given, folder = vars(arguments), None
    if arguments.output is not None:
        folder = benchmark_report.make_folder(arguments.output)
    target = benchmark.load(
        artifact=arguments.artifact,
        base=arguments.base,
        shape=given.get("shape"),
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    result = benchmark.run(
        target,
        name=given.get("shape") or arguments.artifact or arguments.base,
        progress=True,
        on_point=None if folder is None else lambda result: benchmark_report.write(result, folder),
        **{name: given[name] for name in _MEASURE if name in given},
    )
    print(benchmark_report.table(result), end="")
    if folder is not None:
        print(f"benchmark: {folder}")
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    if arguments.prompt is not None and arguments.output is not None:
        raise InputError("--output goes with --data; with --prompt, the answer is printed.")
    if arguments.data is not None and arguments.output is None:
        raise InputError("--data needs --output: the JSON Lines file to write.")
    if arguments.prompt is not None and arguments.overwrite:
        raise InputError("--overwrite goes with --data and --output; with --prompt, the answer is printed.")
    if arguments.prompt is not None and arguments.allow_urls and not (arguments.image or arguments.video):
        raise InputError("--allow_urls goes with --image, --video or --data; found none of them.")
    if arguments.data is not None and arguments.full:
        raise InputError("--full goes with --prompt; with --data, --compare runs the unpruned model as well.")
    for name in ("image", "video"):
        if arguments.data is not None and getattr(arguments, name):
            raise InputError(f"--{name} goes with --prompt; with --data, rows name their {name}s themselves.")
    if arguments.prompt is not None and arguments.compare:
        raise InputError("--compare goes with --data; with --prompt, --full runs the unpruned model.")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be at least 1, found {getattr(arguments, name)}.")
    with importing():
        from pop_lightning.core.memory import memory_advice
        from pop_lightning.generation.batch import check_files, check_prompt
        from pop_lightning.models.loading import check_dtype, choose_device

    check_dtype(arguments.dtype)
    device = choose_device(arguments.device)
    if arguments.prompt is not None:
        check_prompt(arguments.prompt)
    else:
        check_files(arguments.data, arguments.output, overwrite=arguments.overwrite)
    with memory_advice("lower --batch_size, choose a narrower --dtype or another --device"):
        return _answer(arguments, device)


def _answer(arguments: argparse.Namespace, device) -> int:
    from pop_lightning import StageAwareGenerator
    from pop_lightning.generation.batch import generate_file, stream

    generator = StageAwareGenerator.from_artifact(
        arguments.artifact,
        arguments.base,
        dtype=arguments.dtype or "auto",
        trust_remote_code=arguments.trust_remote_code,
    ).to(device)
    if arguments.prompt is not None:
        first = None
        pieces = stream(
            generator,
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            images=arguments.image or (),
            videos=arguments.video or (),
            allow_urls=arguments.allow_urls,
            full=arguments.full,
        )
        for piece, seconds in pieces:
            first = seconds
            print(piece, end="", flush=True)
        print()
        if first is None:
            print("(an empty answer: the model ended it with its first token)", file=sys.stderr)
        else:
            print(f"TTFT: {1000 * first:.1f} ms", file=sys.stderr)
        return 0
    summary = generate_file(
        generator,
        arguments.data,
        arguments.output,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        compare=arguments.compare,
        allow_urls=arguments.allow_urls,
    )
    print(json.dumps(summary, indent=1))
    return 0


def entry() -> None:
    """The console script."""
    sys.exit(main())
