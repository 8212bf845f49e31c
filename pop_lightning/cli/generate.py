"""``pop-generate``: run an exported artifact on a prompt, a file or standard tasks, or measure the speedup of pruning.

A command of its own is a :class:`Command` in ``COMMANDS``: its flags, and what runs with them.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from pop_lightning.cli import importing, run
from pop_lightning.core import completion
from pop_lightning.core.errors import InputError, as_flags
from pop_lightning.core.quiet import quiet_bars

# The recipe keys that the library names in its errors and that are flags here.
FLAGS = as_flags(
    {
        "data.calibration": "--data",
        "data.allow_urls": "--allow_urls",
        "data.max_prompt_tokens": "--max_prompt_tokens",
        "data.max_response_tokens": "--max_new_tokens",
        "model.base": "--base",
    }
)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise InputError(f"{message}; see {self.prog} --help.")

    @property
    def flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.lstrip("+-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, found {text!r}")
        return int(text)

    return read


def _number(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            limits = f"of at least {least:g}" if most == float("inf") else f"in {least:g}..{most:g}"
            raise argparse.ArgumentTypeError(f"expected a number {limits}, found {text!r}")
        return value

    return read


def _part(text: str) -> int | float:
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number or a share below 1, found {text!r}") from None


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas between them, found {text!r}") from None


def _parts(text: str) -> list[int | float]:
    return [_part(part) for part in text.split(",")]


def _add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--artifact", metavar="DIR", required=required, help="the artifact/ folder that pop-fit wrote, or a hub id"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of an artifact on the hub")
    parser.add_argument("--base", metavar="MODEL", help="hub id or folder of the base (default: as the artifact says)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base model")


def _add_generation(parser: argparse.ArgumentParser, *, longest: int = 64) -> None:
    parser.add_argument(
        "--max_new_tokens",
        type=_whole(1),
        default=longest,
        metavar="N",
        help=f"longest answer, in tokens (default: {longest})",
    )
    parser.add_argument("--allow_urls", action="store_true", help="fetch images and videos that are named by URL")
    sampling = parser.add_argument_group("sampling (default: greedy)")
    sampling.add_argument("--temperature", type=_number(0, float("inf")), metavar="T", help="0 is greedy (default: 1)")
    sampling.add_argument("--top_p", type=_number(0, 1), metavar="P", help="from the most likely tokens of this mass")
    sampling.add_argument("--top_k", type=_whole(1), metavar="K", help="from the K most likely tokens")
    sampling.add_argument("--seed", type=_whole(0), metavar="N", help="the same seed draws the same tokens")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of ``generate`` that sample, with every other filter off; None for greedy decoding."""
    temperature, top_p, top_k = arguments.temperature, arguments.top_p, arguments.top_k
    if temperature == 0 or (temperature, top_p, top_k) == (None, None, None):
        if arguments.seed is not None:
            raise InputError("--seed has no effect on greedy decoding: add --temperature, --top_p or --top_k.")
        return None
    return {
        "do_sample": True,
        "temperature": 1.0 if temperature is None else temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": top_k or 0,
    }


def _generator(arguments: argparse.Namespace, check: Callable[[], None]):
    """The loaded artifact on its device; ``check`` comes first, before anything costs time."""
    with importing():
        from pop_lightning import StageAwareGenerator
        from pop_lightning.core.memory import memory_advice
        from pop_lightning.models.loading import check_dtype, choose_device

    quiet_bars()
    check_dtype(arguments.dtype)
    device = choose_device(arguments.device)
    check()
    with memory_advice("choose a narrower --dtype or another --device"):
        generator = StageAwareGenerator.from_artifact(
            arguments.artifact,
            arguments.base,
            revision=arguments.revision,
            dtype=arguments.dtype or "auto",
            trust_remote_code=arguments.trust_remote_code,
        )
        return generator.to(device)


def _seed(arguments: argparse.Namespace) -> None:
    import torch

    torch.seed() if arguments.seed is None else torch.manual_seed(arguments.seed)


# --- prompt -----------------------------------------------------------------------------------------------------------


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="TEXT", default=argparse.SUPPRESS, help="the prompt")
    parser.add_argument("--prompt", metavar="TEXT", default=argparse.SUPPRESS, help="the prompt, as a flag")
    _add_model(parser, required=True)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="show an image first; repeatable")
    parser.add_argument("--video", action="append", default=[], metavar="FILE", help="show a video first; repeatable")
    parser.add_argument("--full", action="store_true", help="generate with the unpruned model")
    _add_generation(parser)


def _prompt(arguments: argparse.Namespace) -> int:
    if "prompt" not in arguments:
        raise InputError("--prompt is required: expected the text to generate from.")
    if arguments.allow_urls and not (arguments.image or arguments.video):
        raise InputError("--allow_urls needs --image or --video; found neither.")
    sampling = _sampling(arguments)
    with importing():
        from pop_lightning.core.memory import memory_advice
        from pop_lightning.generation.stream import check_prompt, stream

    generator = _generator(arguments, lambda: check_prompt(arguments.prompt))
    _seed(arguments)
    first = None
    with memory_advice("give a shorter prompt, choose a narrower --dtype or another --device"):
        pieces = stream(
            generator,
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            images=arguments.image,
            videos=arguments.video,
            allow_urls=arguments.allow_urls,
            full=arguments.full,
            sampling=sampling,
        )
        with closing(pieces):
            for piece, seconds in pieces:
                first = seconds
                print(piece, end="", flush=True)
    print()
    if first is None:
        print("(an empty answer: the model ended it with its first token)", file=sys.stderr)
    else:
        print(f"TTFT: {1000 * first:.1f} ms", file=sys.stderr)
    return 0


# --- chat -------------------------------------------------------------------------------------------------------------


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, required=True)
    parser.add_argument("--system", metavar="TEXT", help="the system's message")
    parser.add_argument("--full", action="store_true", help="begin with the plain model")
    _add_generation(parser, longest=512)


def _chat(arguments: argparse.Namespace) -> int:
    sampling = _sampling(arguments)
    with importing():
        from pop_lightning.cli.chat import converse
        from pop_lightning.core.memory import memory_advice
        from pop_lightning.generation.chat import Chat

    generator = _generator(arguments, lambda: None)
    _seed(arguments)
    chat = Chat(generator, system=arguments.system, max_new_tokens=arguments.max_new_tokens, sampling=sampling)
    chat.use(full=arguments.full)
    with memory_advice("begin a new conversation, choose a narrower --dtype or another --device"):
        converse(chat, FLAGS, allow_urls=arguments.allow_urls)
    return 0


# --- data -------------------------------------------------------------------------------------------------------------


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="FILE", default=argparse.SUPPRESS, help="JSON Lines file of rows")
    parser.add_argument("--data", metavar="FILE", default=argparse.SUPPRESS, help="the file of rows, as a flag")
    parser.add_argument("--output", metavar="FILE", required=True, help="the JSON Lines file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    _add_model(parser, required=True)
    parser.add_argument(
        "--compare", action="store_true", help="run the unpruned model as well, and write a page of the differences"
    )
    parser.add_argument(
        "--timed_rows", type=_whole(0), default=32, metavar="N", help="rows whose TTFT --compare measures (default: 32)"
    )
    parser.add_argument("--limit", type=_whole(1), metavar="N", help="generate for the first N usable rows only")
    parser.add_argument(
        "--max_prompt_tokens",
        type=_whole(1),
        metavar="N",
        help="leave out rows with a longer prompt (default: what fits in the model's context)",
    )
    parser.add_argument(
        "--batch_size", type=_whole(1), default=8, metavar="N", help="rows per batch (default: 8); seeds depend on it"
    )
    _add_generation(parser)


def _data(arguments: argparse.Namespace) -> int:
    if "data" not in arguments:
        raise InputError("--data is required: expected the JSON Lines file to generate for.")
    sampling = _sampling(arguments)
    if sampling and arguments.compare:
        raise InputError("--compare compares greedy answers: leave --temperature, --top_p and --top_k out.")
    with importing():
        from pop_lightning.core.memory import memory_advice
        from pop_lightning.core.pages import circumstances
        from pop_lightning.generation import comparison_page
        from pop_lightning.generation.batch import check_files, figures_of, generate_file, page_of

    given = vars(arguments)
    generator = _generator(
        arguments, lambda: check_files(**{name: given[name] for name in ("data", "output", "compare", "overwrite")})
    )
    _seed(arguments)
    passed = ("data", "output", "max_new_tokens", "batch_size", "compare", "allow_urls", "limit", "seed")
    passed += ("max_prompt_tokens", "timed_rows", "overwrite")
    about = {"artifact": arguments.artifact, "data": arguments.data}
    with memory_advice("lower --batch_size, choose a narrower --dtype or another --device"):
        summary = generate_file(
            generator,
            **{name: given[name] for name in passed},
            sampling=sampling,
            about=about | circumstances("pop-generate", "generate_file in Python"),
        )
    # A person at a terminal reads the tables; a script reads JSON from standard output.
    tables_only = arguments.compare and sys.stdout.isatty()
    if not tables_only:
        print(json.dumps(summary, indent=1), flush=True)
    if arguments.compare:
        output = Path(arguments.output).expanduser()
        shown = f"{comparison_page.text(summary)}page: {page_of(output)}\nfigures: {figures_of(output)}"
        print(f"\n{shown}", file=sys.stdout if tables_only else sys.stderr)
    return 0


# --- bench ------------------------------------------------------------------------------------------------------------

_MEASURE = ("lengths", "batches", "depths", "boundary", "salient", "repeats", "decode_tokens")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, required=False)
    parser.add_argument("--shape", help="measure a named shape with random weights, such as cpu_small or llama3_1_8b")
    parser.add_argument("--output", metavar="DIR", help="folder for the results; its own files are replaced")
    add = parser.add_argument_group("what is measured", argument_default=argparse.SUPPRESS).add_argument
    add(
        "--lengths",
        type=_numbers,
        help="prompt lengths in tokens, as in 128,512,2048 (default: the artifact's median prompt, or 128,512,1024)",
    )
    add("--batches", type=_numbers, help="prompts per batch, as in 1,8 (default: 1)")
    add("--depths", type=_numbers, help="depths, as in 16,20,24 (default: a third pruned)")
    add("--boundary", type=_part, help="last prompt tokens that run in full: a number, or a share as 0.05 (default: 1)")
    add("--salient", type=_part, help="context tokens that run in full: a number, or a share as 0.05 (default: 0)")
    add("--repeats", type=int, help="timed rounds per point (default: 9)")
    add("--decode_tokens", type=int, help="decode steps timed per point; 0: none (default: 32)")


def _bench(arguments: argparse.Namespace) -> int:
    with importing():
        from pop_lightning.benchmark import benchmark
        from pop_lightning.benchmark import report as benchmark_report
        from pop_lightning.core.pages import circumstances

    given, folder = vars(arguments), None
    if arguments.output is not None:
        folder = benchmark_report.make_folder(arguments.output)
    target = benchmark.load(
        artifact=arguments.artifact,
        revision=arguments.revision,
        base=arguments.base,
        shape=arguments.shape,
        dtype=arguments.dtype,
        device=arguments.device,
        trust_remote_code=arguments.trust_remote_code,
    )
    result = benchmark.run(
        target,
        name=arguments.shape or arguments.artifact or arguments.base,
        progress=True,
        on_point=None if folder is None else lambda result: benchmark_report.write(result, folder),
        **{name: given[name] for name in _MEASURE if name in given},
    )
    print(benchmark_report.table(result), end="")
    if folder is not None:
        benchmark_report.write_page(result, folder, circumstances("pop-generate", "benchmark.run in Python"))
        print(f"benchmark: {folder}")
    return 0


# --- eval -------------------------------------------------------------------------------------------------------------


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, required=True)
    parser.add_argument(
        "--tasks", metavar="A,B", required=True, help="tasks, groups or tags of lm-eval; needle: retrieval"
    )
    parser.add_argument("--include_path", metavar="DIR", help="folder with tasks of your own (YAML files)")
    parser.add_argument("--limit", type=_whole(1), metavar="N", help="only the first N documents of every task")
    parser.add_argument("--num_fewshot", type=_whole(0), metavar="N", help="examples before every question")
    parser.add_argument("--batch_size", default="8", metavar="N", help="prompts per batch, or auto (default: 8)")
    parser.add_argument("--max_length", type=_whole(2), metavar="N", help="cut prompts to fit (default: the context)")
    parser.add_argument("--lengths", type=_numbers, metavar="N,M", help="prompt lengths for needle and RULER's tasks")
    parser.add_argument("--gen_kwargs", metavar="K=V,...", help="change how answers are generated: max_gen_toks=32")
    parser.add_argument("--apply_chat_template", action="store_true", help="write prompts with the chat template")
    parser.add_argument("--system_instruction", metavar="TEXT", help="begin every prompt with this")
    parser.add_argument("--seed", type=_whole(0), metavar="N", help="of all that is random (default: lm-eval's seeds)")
    parser.add_argument("--output", metavar="DIR", help="folder for the results, as lm-eval writes them")
    parser.add_argument("--log_samples", action="store_true", help="write every prompt and answer to --output")
    parser.add_argument("--confirm_run_unsafe_code", action="store_true", help="run code that the model writes")


def _eval(arguments: argparse.Namespace) -> int:
    if arguments.log_samples and arguments.output is None:
        raise InputError("--log_samples needs --output: expected a folder to write them to.")
    if not (arguments.batch_size.isdecimal() and int(arguments.batch_size)) and arguments.batch_size != "auto":
        raise InputError(f"--batch_size must be a whole number of at least 1, or auto, found {arguments.batch_size!r}.")
    names = [name for name in arguments.tasks.split(",") if name]
    if not names:
        raise InputError("--tasks names no task: expected names with commas between them.")
    with importing():
        from pop_lightning.core.files import check_output_folder
        from pop_lightning.core.memory import memory_advice
        from pop_lightning.core.pages import circumstances

        try:
            from pop_lightning.harness import compare, needle
        except ModuleNotFoundError as error:
            raise InputError(f"--tasks needs {error.name}: pip install 'pop-lightning[eval]'.") from error

    tasks = compare.Tasks(names, arguments.include_path, arguments.lengths)
    passed = ("limit", "num_fewshot", "batch_size", "max_length", "gen_kwargs", "apply_chat_template")
    passed += ("system_instruction", "seed", "output", "log_samples", "confirm_run_unsafe_code")
    given = vars(arguments)

    def check() -> None:
        tasks.check_limit(arguments.limit)
        check_output_folder(arguments.output)

    generator = _generator(arguments, check)
    with memory_advice("lower --batch_size, choose a narrower --dtype or another --device"):
        found, results = compare.compare(
            generator,
            tasks,
            **{name: given[name] for name in passed},
            about={"artifact": arguments.artifact} | circumstances("pop-generate", "harness.compare in Python"),
        )
    print(compare.table(found), end="")
    if cells := needle.cells(results):
        print(f"{needle.grid_table(cells).text()}\n{needle.NOTE}")
    if arguments.output is not None:
        print(f"results: {arguments.output}")
    return 0


# --- ablate -----------------------------------------------------------------------------------------------------------

_ABLATE = ("depth", "boundary", "salient", "train_steps", "shares", "boundaries", "salients")
_ABLATE += ("tokens", "batch", "repeats")


def _add_ablate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, required=False)
    parser.add_argument("--data", metavar="FILE", required=True, help="rows to fit on and to measure on")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the results; its own are replaced")
    parser.add_argument("--limit", type=_whole(1), metavar="N", help="use that many rows")
    parser.add_argument("--batch_size", type=_whole(1), default=8, metavar="N", help="rows per batch (default: 8)")
    parser.add_argument("--max_prompt_tokens", type=_whole(1), default=2048, metavar="N", help="longest prompt")
    parser.add_argument("--max_new_tokens", type=_whole(1), default=256, metavar="N", help="longest response")
    parser.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="of the split of the rows (default: 0)")
    add = parser.add_argument_group("what is measured", argument_default=argparse.SUPPRESS).add_argument
    add("--depth", type=_whole(1), metavar="N", help="of the comparison (default: a third of the layers pruned)")
    add("--boundary", type=_part, metavar="K", help="last prompt tokens that run in full (default: 1)")
    add("--salient", type=_part, metavar="K", help="context tokens that run in full, in one row (default: 0.05)")
    add("--train_steps", type=_whole(0), metavar="N", help="train lora and full for N steps (default: 0, not at all)")
    add("--shares", type=_numbers, metavar="P,Q", help="percent of the layers to prune (default: 20,25,33,40,50,60)")
    add("--boundaries", type=_parts, metavar="K,L", help="of the frontier (default: 1,16)")
    add("--salients", type=_parts, metavar="K,L", help="of the frontier (default: 0,0.05)")
    add("--tokens", type=_whole(2), metavar="N", help="prompt length of timed prefills (default: the rows' median)")
    add("--batch", type=_whole(1), metavar="N", help="prompts of a timed prefill (default: 1)")
    add("--repeats", type=_whole(1), metavar="N", help="timed rounds per plan (default: 9)")


def _ablate(arguments: argparse.Namespace) -> int:
    if (arguments.artifact is None) == (arguments.base is None):
        found = "neither" if arguments.base is None else "both"
        raise InputError(f"expected --base MODEL or --artifact DIR, whose base is measured; found {found}.")
    with importing():
        from pop_lightning.ablation import command

    given = vars(arguments)
    result = command.ablate(
        settings={name: given[name] for name in _ABLATE if name in given},
        **{name: given[name] for name in ("artifact", "base", "dtype", "device", "trust_remote_code")},
        **{name: given[name] for name in ("data", "output", "limit", "batch_size", "seed")},
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_response_tokens=arguments.max_new_tokens,
    )
    print(result, end="")
    return 0


# --- commands ---------------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """One command of ``pop-generate``."""

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "prompt": Command("generate from a prompt, streaming, and print the TTFT", _add_prompt, _prompt),
    "chat": Command("talk with the model, each turn with its TTFT", _add_chat, _chat),
    "data": Command("generate for every row of a file, and compare with references", _add_data, _data),
    "eval": Command("run lm-eval's tasks with the full and the pruned model", _add_eval, _eval),
    "ablate": Command("the paper's tables for any model, and accuracy against measured speed", _add_ablate, _ablate),
    "bench": Command("time plain and pruned prefill side by side", _add_bench, _bench),
}
# The flag that chose what to do before there were commands, which scripts still use.
_CHOSEN_BY = {"--prompt": "prompt", "--data": "data", "--tasks": "eval", "--benchmark": "bench"}


def _translated(words: list[str]) -> list[str]:
    """``--artifact DIR --prompt TEXT`` as ``prompt --artifact DIR --prompt TEXT``; a command stays as it is."""
    if not words or not words[0].startswith("-"):
        return words
    named = [name for name in (word.partition("=")[0] for word in words) if name in _CHOSEN_BY]
    if not named:
        return words
    command = "bench" if "--benchmark" in named else _CHOSEN_BY[named[0]]
    return [command, *(word for word in words if word != "--benchmark")]


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser("pop-generate", description="Run an exported artifact, or measure the speedup of pruning.")
    parser.add_argument("--version", action="version", version=f"pop-generate {version('pop-lightning')}")
    completion.add_flag(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inside = {}
    for name, command in COMMANDS.items():
        inside[name] = commands.add_parser(
            name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}."
        )
        command.add_flags(inside[name])
    return parser, inside


def _check_flags(words: list[str], parser: _Parser, commands: dict[str, _Parser]) -> None:
    """Name a flag that does not exist, before whatever is missing without it.

    Raises:
        InputError: with the command that the flag belongs to, or the flag that may be meant.
    """
    every: dict[str, list[str]] = {}
    for command, each in commands.items():
        for flag in each.flags:
            every.setdefault(flag, []).append(command)
    chosen = commands.get(words[0]) if words else None
    known = [*parser.flags, *every] if chosen is None else chosen.flags
    for word in takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0]
        if name.startswith("--") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else ""
            if name in every:
                hint = f"belongs to {parser.prog} {' and '.join(', '.join(every[name]).rsplit(', ', 1))}"
            raise InputError(f"unknown flag of {(chosen or parser).prog}: {name}{f' ({hint})' if hint else ''}.")
    if chosen is None and words and words[0].partition("=")[0] in every and words[0] not in parser.flags:
        raise InputError(f"no command was given: expected one of {', '.join(commands)}; see pop-generate --help.")


def main(argv: list[str] | None = None) -> int:
    """Run ``pop-generate`` with ``argv`` (the process's own unless given); returns the exit code."""

    def body() -> int:
        parser, commands = _parsers()
        words = _translated(sys.argv[1:] if argv is None else list(argv))
        _check_flags(words, parser, commands)
        arguments = parser.parse_args(words)
        return COMMANDS[arguments.command].run(arguments)

    return run("pop-generate", body, FLAGS)


def entry() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
