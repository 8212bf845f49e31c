"""The recipe: every choice of a ``pop-fit`` run as typed dataclasses, read from one YAML file and the command line.

jsonargparse does the typing, and Lightning's Trainer adds its own arguments under ``trainer``; what is wrong with a
recipe is always told in one sentence (:class:`InputError`) that names the key, what was found and what was expected.
"""

import contextlib
import difflib
import importlib
import importlib.resources
import inspect
import io
import json
import math
import re
import sys
import textwrap
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import yaml
from jsonargparse import ArgumentParser

from pop_lightning.core.errors import InputError

USAGE = """usage: pop-fit --recipe NAME_OR_PATH [--any.key VALUE ...] [--print_config | --check]
               [--resume | --overwrite]

Score the layers, fit the KV projections, pick the depth that keeps the accuracy budget, and export an artifact.

  --recipe NAME_OR_PATH  a YAML file, or a recipe that comes with the package:
                         {bundled}
  --any.key VALUE        one key of the recipe, changed for this run, as in --budget.max_drop 0.02
  --print_config         print every value that would be used, as YAML, and stop
  --check                say what memory, operations and time the run takes and whether it fits, offline, and stop
  --resume               go on with the run in `output` where it stopped
  --overwrite            replace the run in `output`

keys (default):
{keys}
  trainer.NAME: lightning.Trainer's own arguments
{trainer}

exit code: 0 exported (--check: nothing speaks against it); 2 bad usage, recipe or data; 3 no depth keeps the budget
"""


@dataclass
class Model:
    """The base: hub id, folder or ``bundled:NAME``, and how it is loaded."""

    base: str = ""  # required; parse() says so in a sentence
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None  # Transformers' own choice
    trust_remote_code: bool = False
    device_map: str | dict | None = None


@dataclass
class Splits:
    """Which share of the calibration rows serves which step; no row serves two."""

    fit: float = 0.3
    tune: float = 0.1
    search: float = 0.2
    verify: float = 0.4


@dataclass
class Data:
    """The calibration data and its lengths, in tokens."""

    calibration: str | list[str] = ""  # required
    split: str | None = None
    max_prompt_tokens: int = 2048
    max_response_tokens: int = 256
    limit: int | None = None
    batch_size: int = 8
    allow_urls: bool = False  # fetch the images and videos that rows name by URL
    splits: Splits = field(default_factory=Splits)


@dataclass
class Importance:
    """How many calibration rows the layers are scored on, and how many of them at a time."""

    rows: int = 64
    batch_size: int | None = None
    gradient_checkpointing: bool = False

    def rows_at_a_time(self, data: Data) -> int:
        """Of one process; its backward pass keeps more of a row than any other stage does."""
        return self.batch_size or data.batch_size


@dataclass
class Lora:
    """The low-rank adapters of kind ``lora``, named as peft names them."""

    r: int = 16
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False


@dataclass
class Projection:
    """Where the pruned layers' keys and values come from, and how those maps are fitted."""

    kind: Literal["reuse", "closed_form", "lora", "full"] = "closed_form"
    ridge: list[float] = field(default_factory=lambda: [0.0001, 0.001, 0.01, 0.1, 1.0])
    grouping: Literal["auto", "head", "layer", "none"] = "auto"
    queries: int = 24
    refit: bool = True
    memory_gib: float = 8.0
    start: Literal["closed_form", "reuse"] = "closed_form"
    lora: Lora = field(default_factory=Lora)
    steps: int = 100
    learning_rate: float = 1e-3
    temperature: float = 2.0
    warmup: float = 0.1
    decay: Literal["cosine", "linear"] = "cosine"
    weight_decay: float = 0.0
    kv_match: float = 0.0
    hidden_match: float = 0.0
    gradient_checkpointing: bool = False
    batch_size: int | None = None
    checkpoint_every: int = 50

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)


@dataclass
class Budget:
    """How much may be lost or how fast it has to be, how sure that has to be, and what is tried."""

    metric: Literal["agreement", "nll_increase", "exact_match"] = "agreement"
    max_drop: float = 0.01
    speedup: float | None = None
    confidence: float = 0.95
    min_pruned: int = 2
    candidates: int | list[int] | Literal["all"] = 8
    boundaries: list[int] = field(default_factory=lambda: [1, 4, 16, 64])
    extensions: int = 2


@dataclass
class Recipe:
    """Every choice of a run. ``trainer`` holds the arguments of ``lightning.Trainer`` as plain data."""

    seed: int = 0
    output: str = "runs/pop"
    boundary: int | Literal["auto"] = 1
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    importance: Importance = field(default_factory=Importance)
    projection: Projection = field(default_factory=Projection)
    budget: Budget = field(default_factory=Budget)
    trainer: dict[str, Any] = field(default_factory=lambda: dict(TRAINER_DEFAULTS))

    @property
    def fit_boundary(self) -> int:
        """The boundary that layers are scored and projections are fitted at.

        Fitting does not wait for the choice of a boundary: k = 1 leaves the most context tokens to fit on, and what is
        a good key or value of a token does not depend on k.
        """
        return 1 if self.boundary == "auto" else self.boundary

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, every value named."""
        return asdict(self)

    def to_yaml(self) -> str:
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write a file that ``--recipe`` reads back as this recipe."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def data_arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``CalibrationData`` that the recipe says; the others follow from the base."""
        settings = asdict(self.data)
        del settings["calibration"]
        return settings | {"seed": self.seed}

    def trainer_arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``lightning.Trainer``; ``class_path`` entries become objects."""
        parser = _parser()
        config = parser.parse_object({"trainer": _with_save_dir(self.trainer, self.output)})
        return parser.instantiate(config).trainer.as_dict()


REQUIRED = ("model.base", "data.calibration")
TRAINER_DEFAULTS = {"accelerator": "auto", "devices": 1, "logger": False}


class Invocation(NamedTuple):
    """What a command line asks for."""

    recipe: Recipe
    resume: bool
    overwrite: bool
    check: bool


def parse(argv: list[str] | None = None) -> Invocation:
    """Read ``--recipe``, then the ``--any.key value`` overrides.

    Raises:
        InputError: anything the user gave is missing, unknown, of the wrong type or out of range.
        SystemExit: code 0, after ``--print_config`` or ``--help``.
    """
    problems: list[str] = []
    name, overrides, flags = _split(sys.argv[1:] if argv is None else list(argv), problems)
    if "help" in flags:
        print(usage(), end="")
        raise SystemExit(0)
    if name is None:
        raise InputError(
            "no recipe was given: expected --recipe with a YAML file or one of the bundled recipes "
            f"({', '.join(bundled_recipes())})."
        )
    if {"resume", "overwrite"} <= flags:
        raise InputError("--resume and --overwrite were both given: expected at most one of them.")
    if "check" in flags and flags & {"resume", "overwrite"}:
        raise InputError("--check writes nothing: leave --resume and --overwrite out.")
    recipe = _build(_read(name, problems), overrides, problems)
    if "print_config" in flags:
        print(recipe.to_yaml(), end="")
        raise SystemExit(0)
    return Invocation(recipe, "resume" in flags, "overwrite" in flags, "check" in flags)


def usage() -> str:
    """The text of ``--help``, every key of a recipe included."""
    defaults = Recipe().to_dict()
    own = {key: hint for key, hint in _keys().items() if not key.startswith("trainer.")}
    width = max(map(len, own))
    lines = []
    for key, hint in own.items():
        default = "required" if key in REQUIRED else json.dumps(_look_up(defaults, key)).replace('"', "")
        lines.append(f"  {key:<{width}}  {_describe(hint)} ({default})")
    trainer = ", ".join(key.removeprefix("trainer.") for key in _keys() if key.startswith("trainer."))
    trainer = textwrap.fill(trainer, 110, initial_indent="    ", subsequent_indent="    ")
    bundled = textwrap.fill(", ".join(bundled_recipes()), 110, subsequent_indent=" " * 25, initial_indent=" " * 25)
    return USAGE.format(bundled=bundled.strip(), keys="\n".join(lines), trainer=trainer)


def bundled_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = importlib.resources.files("pop_lightning.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _problems(recipe: Recipe) -> list[str]:
    model, data, projection, budget = recipe.model, recipe.data, recipe.projection, recipe.budget
    splits, problems = asdict(data.splits), []
    sources = [data.calibration] if isinstance(data.calibration, str) else data.calibration
    for key, text, what in (
        ("model.base", model.base, "a hub id, a folder or bundled:NAME"),
        *(
            ("data.calibration", source, "a JSON Lines or text file, a hub data set or bundled:NAME/FILE")
            for source in sources or [""]
        ),
        ("output", recipe.output, "a folder"),
        ("model.attn_implementation", model.attn_implementation, "a name such as sdpa, or null"),
    ):
        if text is not None and not text.strip():
            problems.append(f"{key} is required: expected {what}, found nothing")
    least = {
        "seed": (recipe.seed, 0),
        "boundary": (None if recipe.boundary == "auto" else recipe.boundary, 0),
        "data.max_prompt_tokens": (data.max_prompt_tokens, 1),
        "data.max_response_tokens": (data.max_response_tokens, 1),
        "data.limit": (data.limit, 1),
        "data.batch_size": (data.batch_size, 1),
        "importance.rows": (recipe.importance.rows, 1),
        "importance.batch_size": (recipe.importance.batch_size, 1),
        "projection.steps": (projection.steps, 1),
        "projection.batch_size": (projection.batch_size, 1),
        "projection.weight_decay": (projection.weight_decay, 0),
        "projection.queries": (projection.queries, 1),
        "projection.checkpoint_every": (projection.checkpoint_every, 1),
        "projection.kv_match": (projection.kv_match, 0),
        "projection.hidden_match": (projection.hidden_match, 0),
        "projection.lora.r": (projection.lora.r, 1),
        "budget.max_drop": (budget.max_drop, 0),
        "budget.min_pruned": (budget.min_pruned, 1),
        "budget.extensions": (budget.extensions, 0),
        **{f"budget.boundaries[{index}]": (k, 0) for index, k in enumerate(budget.boundaries)},
    }
    for key, (value, bound) in least.items():
        if value is not None and not (math.isfinite(value) and value >= bound):
            problems.append(f"{key} must be at least {bound}, found {value}")
    positive = {
        "projection.learning_rate": projection.learning_rate,
        "projection.temperature": projection.temperature,
        "projection.memory_gib": projection.memory_gib,
        "projection.lora.lora_alpha": projection.lora.lora_alpha,
        **{f"data.splits.{name}": share for name, share in splits.items()},
        **{f"projection.ridge[{index}]": ridge for index, ridge in enumerate(projection.ridge)},
    }
    for key, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            problems.append(f"{key} must be above 0, found {value}")
    if budget.speedup is not None and not (math.isfinite(budget.speedup) and budget.speedup > 1):
        problems.append(f"budget.speedup must be a ratio above 1, or null, found {budget.speedup}")
    if recipe.boundary == "auto" and not budget.boundaries:
        problems.append("budget.boundaries must name what boundary: auto chooses from, found an empty list")
    if recipe.seed >= 2**32:
        problems.append(f"seed must be below 2**32, found {recipe.seed}")
    if not 0 <= projection.warmup <= 1:
        problems.append(f"projection.warmup must be a share of the steps in 0..1, found {projection.warmup}")
    if not 0 <= projection.lora.lora_dropout < 1:
        problems.append(f"projection.lora.lora_dropout must lie in 0..1, found {projection.lora.lora_dropout}")
    if budget.metric != "nll_increase" and budget.max_drop > 1:
        problems.append(
            f"budget.max_drop is an absolute fraction, at most 1 for {budget.metric}, found {budget.max_drop}"
        )
    total = sum(splits.values())
    if abs(total - 1) > 1e-6:
        problems.append(f"data.splits must sum to 1 (fit + tune + search + verify), found {total:g}")
    if not 0.5 < budget.confidence < 1:
        problems.append(f"budget.confidence must lie between 0.5 and 1, found {budget.confidence}")
    if not projection.ridge:
        problems.append("projection.ridge must name at least one strength, found an empty list")
    if isinstance(budget.candidates, list):
        if not budget.candidates:
            problems.append("budget.candidates must name at least one depth, found an empty list")
        elif min(budget.candidates) < 1:
            problems.append(f"budget.candidates must hold depths of at least 1, found {min(budget.candidates)}")
    elif budget.candidates != "all" and budget.candidates < 1:
        problems.append(f"budget.candidates must be at least 1, a list of depths or all, found {budget.candidates}")
    return problems


def _raise(problems: list[str]) -> None:
    """One sentence for one problem, one that counts and numbers them for several."""
    if len(problems) == 1:
        raise InputError(f"{problems[0]}.")
    if problems:
        numbered = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        raise InputError(f"the recipe has {len(problems)} errors: {numbered}.")


def _split(argv: list[str], problems: list[str]) -> tuple[str | None, list[tuple[str, str]], set[str]]:
    """The recipe's name, the overrides in order, and the flags; unknown keys are added to ``problems``."""
    name, overrides, flags = None, [], set()
    words = iter(range(len(argv)))
    for index in words:
        word = argv[index]
        if word in ("-h", "--help", "--print_config", "--check", "--resume", "--overwrite"):
            flags.add("help" if word == "-h" else word[2:])
            continue
        if not word.startswith("--") or word == "--":
            raise InputError(f"found {word!r} on the command line: expected --recipe, a flag, or --key value.")
        key, equals, value = word[2:].partition("=")
        if key in ("help", "print_config", "check", "resume", "overwrite"):
            raise InputError(f"--{key} takes no value, found {value!r}.")
        problem = None if key == "recipe" else _key_problem(key, "--")
        if problem:
            problems.append(problem)
            if not equals and index + 1 < len(argv) and not argv[index + 1].startswith("--"):
                next(words)
            continue
        if not equals:
            if index + 1 == len(argv) or argv[index + 1].startswith("--"):
                raise InputError(f"--{key} needs a value, found none: expected --{key} {_expected(key)}.")
            value = argv[next(words)]
        if key == "recipe":
            name = value
        else:
            overrides.append((key, value))
    return name, overrides, flags


def _read(name: str, problems: list[str]) -> dict[str, Any]:
    """The file's content without unknown keys, which are added to ``problems``."""
    stem = name.removeprefix("recipes/").removesuffix(".yaml")
    if name and Path(name).is_file():
        where = Path(name)
    elif stem in bundled_recipes():
        where = importlib.resources.files("pop_lightning.recipes") / f"{stem}.yaml"
    else:
        raise InputError(
            f"--recipe {name!r} is neither a file nor a bundled recipe: expected a YAML file or one of "
            f"{', '.join(bundled_recipes())}{_suggest(stem, bundled_recipes())}."
        )
    try:
        content = yaml.load(where.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it is no UTF-8 text that YAML allows"
        raise InputError(f"recipe {name} is not YAML{at}: {problem}.") from error
    except OSError as error:
        raise InputError(f"recipe {name} cannot be read: {error.strerror}.") from error
    if content is None:
        raise InputError(f"recipe {name} is empty: expected keys such as model.base and data.calibration.")
    if not isinstance(content, dict):
        raise InputError(f"recipe {name} must hold keys such as model.base, found {_show(content)}.")
    return _check_section(content, "", problems)


def _check_section(content: dict, prefix: str, problems: list[str]) -> dict[str, Any]:
    """``content`` without empty sections and unknown keys."""
    checked = {}
    for key, value in content.items():
        path = f"{prefix}{key}"
        inside = [known for known in _keys() if known.startswith(f"{path}.")]
        if not inside:
            problem = _key_problem(path, "")
            if problem:
                problems.append(problem)
            else:
                checked[key] = value
        elif isinstance(value, dict):
            checked[key] = _check_section(value, f"{path}.", problems)
        elif value is not None:
            names = ", ".join(dict.fromkeys(known[len(path) + 1 :].split(".")[0] for known in inside))
            if len(names) > 100:
                names = names[:100].rpartition(",")[0]
            problems.append(f"{path} must be a section with keys such as {names}, found {_show(value)}")
    return checked


def _build(content: dict[str, Any], overrides: list[tuple[str, str]], problems: list[str]) -> Recipe:
    """The typed recipe; everything that is wrong with it, ``problems`` of its keys first, is told at once."""
    output = str(dict(overrides).get("output", content.get("output", Recipe.output)))
    if isinstance(content.get("trainer"), dict):
        content = content | {"trainer": _with_save_dir(content["trainer"], output)}
    overrides = _logger_placed(overrides, output)
    try:
        plain = _parse(content, overrides)
    except InputError as error:
        # jsonargparse stops at the first value that does not fit: each is tried alone, over the defaults.
        given = {key for key, _ in overrides}
        alone = [
            (_nest(key, value), [])
            for key, value in _flat(content)
            if not any(f"{key}.".startswith(f"{each}.") for each in given)
        ]
        alone += [
            ({}, [each for each in overrides if _top(each[0]) == top]) for top in dict.fromkeys(_top(k) for k in given)
        ]
        values = []
        for one, words in alone:
            try:
                _parse(one, words)
            except InputError as problem:
                values.append(str(problem).rstrip("."))
        _raise([*problems, *(dict.fromkeys(values) if values else [str(error).rstrip(".")])])
        raise
    # jsonargparse lets null pass for every type.
    _raise([*problems, *_nulls(plain)] if _nulls(plain) else [])
    recipe = _construct(Recipe, plain)
    # A required key that is missing because it was mistyped, or its section was, is told once.
    told = [
        each for each in _problems(recipe) if not (" is required: " in each and _covered(each.split()[0], problems))
    ]
    _raise([*problems, *told])
    return recipe


def _nulls(plain: dict[str, Any]) -> list[str]:
    return [
        f"{key} must be {_describe(hint)}, found null"
        for key, hint in _keys().items()
        if not key.startswith("trainer.") and type(None) not in typing.get_args(hint) and _look_up(plain, key) is None
    ]


def _covered(key: str, problems: list[str]) -> bool:
    section = key.split(".")[0]
    meant = (f"did you mean {key}?", f"did you mean {section}?")
    return any(each.startswith(f"{section} must be a section") or any(m in each for m in meant) for each in problems)


def _parse(content: dict[str, Any], overrides: list[tuple[str, str]]) -> dict[str, Any]:
    parser = _parser()
    try:
        with _quiet_stderr():
            config = parser.parse_object(content)
            if overrides:
                config = parser.parse_args([f"--{key}={value}" for key, value in overrides], namespace=config)
            return json.loads(parser.dump(config, format="json", skip_unset=False))
    except (Exception, SystemExit) as error:  # whatever jsonargparse raises, the user is told in one sentence
        if isinstance(error, (MemoryError, RecursionError)):
            raise
        found = re.search(r'Parser key "([^"]+)"|argument --([\w.]+)', str(error))
        key = (found[1] or found[2]) if found else None
        if key not in _keys():
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"the recipe does not fit: {reason[:300].rstrip('.')}.") from error
        value = dict(overrides).get(key, _look_up(content, key))
        inside = re.search(
            r"class_path '([^']+)':\s+(?:Option '([^']+)' is not accepted|Parser key \"([^\"]+)\")", str(error)
        )
        if inside:
            what = f"takes no {inside[2]}" if inside[2] else f"does not take the {inside[3]} that was given"
            raise InputError(f"{key}: {inside[1]} {what}.") from error
        raise InputError(f"{key} must be {_expected(key)}, found {_show(value)}.") from error


def _top(key: str) -> str:
    """The argument that an override belongs to: ``trainer.logger`` for ``trainer.logger.save_dir``."""
    known = key.removesuffix("+")
    return ".".join(known.split(".")[:2]) if known.startswith("trainer.") else known


def _flat(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for name, value in content.items():
        key = f"{prefix}{name}"
        pairs += [(key, value)] if key in _keys() or not isinstance(value, dict) else _flat(value, f"{key}.")
    return pairs


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _with_save_dir(trainer: dict[str, Any], output: str) -> dict[str, Any]:
    """``trainer`` with a logger that names no folder writing below ``output``, as Lightning's own default does."""
    logger = trainer.get("logger")
    entries = [_placed(each, output) for each in (logger if isinstance(logger, list) else [logger])]
    return trainer | {"logger": entries if isinstance(logger, list) else entries[0]} if "logger" in trainer else trainer


def _placed(logger: Any, output: str) -> Any:
    entry = {"class_path": logger} if isinstance(logger, str) else logger
    if not isinstance(entry, dict) or not _needs_save_dir(entry.get("class_path")):
        return logger
    return entry | {"init_args": {"save_dir": output} | (entry.get("init_args") or {})}


def _logger_placed(overrides: list[tuple[str, str]], output: str) -> list[tuple[str, str]]:
    """``--trainer.logger CLASS`` with its folder, which a ``--trainer.logger.save_dir`` further on replaces."""
    return [
        (key, json.dumps(_placed(value, output)) if key == "trainer.logger" and _needs_save_dir(value) else value)
        for key, value in overrides
    ]


def _needs_save_dir(class_path: Any) -> bool:
    module, _, name = str(class_path).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "lightning.pytorch.loggers"), name)
        parameter = inspect.signature(kind).parameters.get("save_dir")
    except (ImportError, AttributeError, TypeError, ValueError):  # jsonargparse says what is wrong with it
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty


@contextlib.contextmanager
def _quiet_stderr():
    """jsonargparse and argparse print usage before they raise; the user gets the sentence alone."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _construct(kind: type, content: dict[str, Any]):
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            entry.name: _construct(hints[entry.name], content[entry.name])
            if is_dataclass(hints[entry.name])
            else content[entry.name]
            for entry in fields(kind)
        }
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    hints = typing.get_type_hints(Recipe)
    for entry in fields(Recipe):
        if entry.name == "trainer":
            parser.add_class_arguments(lightning.Trainer, "trainer", instantiate=False)
        elif is_dataclass(hints[entry.name]):
            parser.add_class_arguments(hints[entry.name], entry.name, instantiate=False)
        else:
            parser.add_argument(f"--{entry.name}", type=hints[entry.name], default=entry.default)
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})
    return parser


def _keys() -> dict[str, Any]:
    """Every key of a recipe and its type."""
    if not _KEYS:
        _KEYS.update(_leaves(Recipe, ""))
    return _KEYS


_KEYS: dict[str, Any] = {}


def _leaves(kind: type, prefix: str) -> dict[str, Any]:
    leaves = {}
    for name, hint in typing.get_type_hints(kind).items():
        if f"{prefix}{name}" == "trainer":
            parameters = list(inspect.signature(lightning.Trainer).parameters.values())
            leaves.update({f"trainer.{each.name}": each.annotation for each in parameters})
        elif is_dataclass(hint):
            leaves.update(_leaves(hint, f"{prefix}{name}."))
        else:
            leaves[f"{prefix}{name}"] = hint
    return leaves


def _key_problem(key: str, dashes: str) -> str | None:
    """What is wrong with a key, or None; ``dashes`` stand before it where the user writes them."""
    known = key.removesuffix("+")
    if known.startswith("trainer."):  # below an argument of the Trainer, jsonargparse knows more
        known = ".".join(known.split(".")[:2])
    if known in _keys() and not key.endswith(".help"):
        return None
    inside = [each for each in _keys() if each.startswith(f"{known}.")]
    if inside:
        return f"{dashes}{key} is a section: set one of its keys, such as {dashes}{inside[0]}"
    sections = {each.rpartition(".")[0] for each in _keys()} - {""} if not dashes else set()
    return f"{dashes}{key} is no recipe key{_suggest(known, [*_keys(), *sorted(sections)], dashes)}"


def _suggest(name: str, known: list[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:  # the right key in the wrong section, or in none
        last = name.split(".")[-1]
        ends = {each.split(".")[-1]: each for each in known}
        close = [ends[each] for each in difflib.get_close_matches(last, list(ends), n=1, cutoff=0.75)]
    return f" (did you mean {dashes}{close[0]}?)" if close else ""


def _expected(key: str) -> str:
    return "NAME_OR_PATH" if key == "recipe" else _describe(_keys().get(key))


def _describe(hint: Any) -> str:
    simple = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if hint in (dict, list):
        return "a mapping" if hint is dict else "a list"
    if hint in simple:
        return simple[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(each) for each in arguments))
    if origin is list:
        return {int: "a list of whole numbers", float: "a list of numbers"}.get(arguments[0], "a list")
    if origin is not None:
        name = getattr(origin, "__name__", str(origin)).lower()
        return "a list" if name == "iterable" else f"a {name}"
    return f"a {hint.__name__}" if inspect.isclass(hint) else "a value that lightning.Trainer takes"


def _look_up(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-3`` is a number and whose doubled key is an error."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1 and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value} stands there twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that :class:`_Loader` would read as a number: a revision may be called 1e3."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )
