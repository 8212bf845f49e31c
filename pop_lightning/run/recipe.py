"""The recipe: every choice of a ``pop-fit`` run as typed dataclasses, read from one YAML file and the command line.

The fields below are the only place that knows a key, its type, its range and its meaning: validation, ``--help``, the
JSON schema for editors (``--schema``) and every error message follow from them. Errors are :class:`InputError`, all
those of a recipe together, each with the key, what was found and what was expected.
"""

import argparse
import copy
import difflib
import importlib.resources
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from pop_lightning.core.errors import InputError, Key, raise_all, show
from pop_lightning.core.kinds import KINDS, SELECTORS
from pop_lightning.core.plan import Kept, in_order
from pop_lightning.evaluation.losses import METRICS, BudgetMetric, metric_named
from pop_lightning.run import trainer_arguments, yaml_text

# YAML has types of its own, so nothing is converted: true is not 1, and "2" is not 2.
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
AtLeast0 = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]
Tokens = Index | Share  # a number of prompt tokens, or a share of the prompt
_NO_PROBE = "needs a boundary of at least 1, whose last token selects the salient ones"
Flag = Annotated[bool, Field(strict=True)]
Words = Annotated[str, Field(pattern=r"\S")]
Place = Annotated[Words, AfterValidator(os.path.expanduser)]  # a path, or a name that is not one
TrainerArguments = trainer_arguments.typed()
_TOGETHER = "together"

section = partial(dataclass, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))


def _together(problem: str, key: str, found: str) -> PydanticCustomError:
    """An error of several values together, which pydantic collects with the others."""
    return PydanticCustomError(_TOGETHER, "{key} {problem}", {"problem": problem, "key": key, "found": found})


@section
class Model:
    """The base model and how it is loaded."""

    base: Place = Field(description="hub id, folder or bundled:NAME of the base model")
    revision: Words | None = Field(None, description="commit or tag of the hub repository; null: the newest")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as the checkpoint is stored"
    )
    attn_implementation: Words | None = Field(None, description="such as sdpa or eager; null: Transformers' choice")
    trust_remote_code: Flag = Field(False, description="run code that comes with the model")
    device_map: Words | dict | None = Field(None, description="null: one device, as trainer says; auto: several")


@section
class Splits:
    """Shares of the calibration rows; they sum to 1, and no row is in two of them."""

    fit: Share = Field(0.3, description="to score the layers and fit the projections")
    tune: Share = Field(0.1, description="to choose the ridge strength")
    search: Share = Field(0.2, description="to choose the depths to verify")
    verify: Share = Field(0.4, description="used once, for the certified bound")

    @model_validator(mode="after")
    def _sum(self):
        total = self.fit + self.tune + self.search + self.verify
        if abs(total - 1) > 1e-6:
            raise _together("must sum to 1 (fit + tune + search + verify)", "data.splits", f"{total:g}")
        return self


@section
class Data:
    """The calibration data and its lengths, in tokens."""

    calibration: Place | Annotated[list[Place], Field(min_length=1)] = Field(
        description="JSON Lines or text file, hub dataset or bundled:NAME/FILE; a list combines several"
    )
    split: Words | None = Field(None, description="split of a hub dataset; null: train")
    name: Words | None = Field(None, description="configuration of a hub dataset that has several")
    columns: dict[Words, Words] | None = Field(
        None, description="keys of the rows that have other names, as in {prompt: question, response: answer}"
    )
    max_prompt_tokens: Count = Field(2048, description="rows with a longer prompt are left out; plain text is cut")
    max_response_tokens: Count = Field(256, description="longer responses are cut")
    limit: Count | None = Field(None, description="number of rows to use, sampled by their content; null: all")
    batch_size: Count = Field(8, description="rows per forward pass; lower it first when memory runs out")
    allow_urls: Flag = Field(False, description="fetch images and videos that rows name by URL")
    splits: Splits = field(default_factory=Splits)

    @property
    def sources(self) -> list[str]:
        """``calibration`` as a list."""
        return [self.calibration] if isinstance(self.calibration, str) else self.calibration


@section
class Importance:
    """How the layers are scored."""

    rows: Count = Field(64, description="rows of the fit split to score on")
    batch_size: Count | None = Field(None, description="rows per backward pass; null: data.batch_size")
    gradient_checkpointing: Flag = Field(
        False, description="keep one layer's activations at a time, at about 1.5x the operations"
    )

    def rows_at_a_time(self, data: Data) -> int:
        """Of one process; its backward pass keeps more of a row than any other stage does."""
        return self.batch_size or data.batch_size


@section
class Lora:
    """The low-rank adapters of kind ``lora``, named as in peft."""

    r: Count = Field(16, description="rank")
    lora_alpha: Positive = Field(16.0, description="scale, divided by r")
    lora_dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = Field(0.0, description="dropout in training")
    use_rslora: Flag = Field(False, description="divide lora_alpha by sqrt(r) instead of r")


@section
class Projection:
    """Where the pruned layers' keys and values come from, and how those maps are fitted."""

    kind: Literal[*KINDS] = Field(
        "closed_form", description="reuse: nothing fitted; closed_form: regression; lora and full: trained"
    )
    ridge: Annotated[list[Positive], Field(min_length=1)] = Field(
        [0.0001, 0.001, 0.01, 0.1, 1.0],
        description="strengths to choose from on the tune split; a large one is close to reuse",
    )
    grouping: Literal["auto", "head", "layer", "none"] = Field(
        "auto",
        description="values fitted per head, per layer or for all tokens alike; auto: the finest that fits in one pass",
    )
    queries: Count = Field(
        24, description="boundary and response tokens per row whose attention weights the regression"
    )
    refit: Flag = Field(True, description="fit a second time, with the attention of the pruned model's queries")
    memory_gib: Positive = Field(
        8.0, description="limit for running sums and candidate maps; what does not fit is fitted in further passes"
    )
    start: Literal["closed_form", "reuse"] = Field("closed_form", description="where lora and full start")
    lora: Lora = field(default_factory=Lora)
    steps: Count = Field(100, description="training steps of lora and full")
    learning_rate: Positive = Field(1e-3, le=1e30, description="peak learning rate")
    temperature: Positive = Field(2.0, description="temperature of the distillation")
    warmup: Annotated[float, Field(strict=True, ge=0, le=1)] = Field(
        0.1, description="share of steps with a rising rate"
    )
    decay: Literal["cosine", "linear"] = Field("cosine", description="how the learning rate falls after that")
    weight_decay: AtLeast0 = Field(0.0, le=1e6, description="of AdamW")
    kv_match: AtLeast0 = Field(0.0, description="weight of the error of projected keys and values in the loss")
    hidden_match: AtLeast0 = Field(
        0.0, description="weight of the error of the pruned layers' hidden states in the loss"
    )
    gradient_checkpointing: Flag = Field(False, description="run the pruned layers again in the backward pass")
    batch_size: Count | None = Field(None, description="rows per training step; null: data.batch_size")
    checkpoint_every: Count = Field(50, description="steps between Lightning checkpoints, which --resume starts from")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)


@section
class Budget:
    """How much may be lost, or how fast it must be, and which depths are tried."""

    metric: Literal[*METRICS] = Field(
        "agreement", description="agreement: same next token; exact_match: same response; nll_increase: nats per token"
    )
    max_drop: AtLeast0 = Field(0.01, description="largest loss: an absolute fraction; for nll_increase nats")
    nll_cap: Positive = Field(
        1.0, description="nats per token at which the losses of nll_increase are clipped, which makes its bound valid"
    )
    speedup: Annotated[float, Field(strict=True, gt=1)] | None = Field(
        None, description="prefill speedup to reach with the smallest loss; max_drop is ignored then"
    )
    confidence: Annotated[float, Field(strict=True, gt=0.5, lt=1)] = Field(0.95, description="of the certified bound")
    min_pruned: Count = Field(2, description="nothing is exported if fewer layers can be pruned")
    candidates: Count | Annotated[list[Count], Field(min_length=1)] | Literal["all"] = Field(
        8, description="number of depths to try, chosen by importance; or a list of depths; or all"
    )
    boundaries: list[Tokens] = Field(
        [1, 4, 16, 64], description="boundaries to report loss and cost for, and to choose from if boundary is auto"
    )
    salient: Tokens | list[Tokens] = Field(
        [0, 0.05, 0.1, 0.2],
        description="values to choose from if salient is auto; 0 selects no tokens, for engines that cannot",
    )
    extensions: Index = Field(
        2, description="further rounds of `steps` that lora and full may train if they could change the choice"
    )

    @property
    def loss(self) -> BudgetMetric:
        """The metric, with its cap."""
        return metric_named(self.metric, self.nll_cap)

    @model_validator(mode="after")
    def _fraction(self):
        metric = self.loss
        if metric.rate and self.max_drop > 1:
            problem = f"is an absolute fraction, at most 1 for {self.metric}"
            raise _together(problem, "budget.max_drop", f"{self.max_drop:g}")
        if not metric.rate and self.max_drop >= metric.cap and self.speedup is None:
            problem = (
                f"must be below budget.nll_cap, {metric.cap:g}, where losses are clipped: it would promise nothing"
            )
            raise _together(problem, "budget.max_drop", f"{self.max_drop:g}")
        return self


@section
class Recipe:
    """Every choice of a run. ``trainer`` holds arguments of ``lightning.Trainer`` as plain data."""

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = Field(
        0, description="seed of splits, targets and training"
    )
    output: Place = Field("runs/pop", description="folder of the run")
    boundary: Tokens | Literal["auto"] = Field(
        1,
        description="prompt tokens at the end that run in full, a number or a share; auto: one of budget.boundaries",
    )
    salient: Tokens | Literal["auto"] = Field(
        0,
        description="context tokens that run in full as well, a number or a share; auto: one of budget.salient",
    )
    selector: Literal[*SELECTORS] = Field("attention", description="how the salient tokens are selected")
    depth: Count | None = Field(
        None,
        description="export this depth whatever its measured loss and bound; null: the budget decides",
    )
    model: Model
    data: Data
    importance: Importance = field(default_factory=Importance)
    projection: Projection = field(default_factory=Projection)
    budget: Budget = field(default_factory=Budget)
    trainer: TrainerArguments = field(default_factory=lambda: dict(trainer_arguments.DEFAULTS))

    @model_validator(mode="after")
    def _choices(self):
        if self.boundary == "auto" and not self.budget.boundaries:
            problem = "must name what boundary: auto chooses from"
            raise _together(problem, "budget.boundaries", "an empty list")
        if self.boundary == 0 and self.salient not in (0, "auto"):
            raise _together(_NO_PROBE, "salient", str(self.salient))
        if self.depth is not None and self.budget.speedup is not None:
            raise _together(
                "already fixes what budget.speedup would choose; set only one of them", "depth", str(self.depth)
            )
        return self

    @property
    def fit_boundary(self) -> int:
        """The boundary that layers are scored and projections are fitted at.

        Fitting does not wait for the choice of a boundary: k = 1 leaves the most context tokens to fit on, and what is
        a good key or value of a token does not depend on k.
        """
        return self.boundary if isinstance(self.boundary, int) else 1

    def kept(self, boundaries: Sequence[int | float]) -> list[Kept]:
        """What may run in full, the least first.

        A depth that is given leaves nothing to choose by: ``auto`` is the paper's choice then.

        Args:
            boundaries: those of ``budget.boundaries`` that the rows allow.

        Raises:
            InputError: salient tokens are asked for, and no boundary is left that could choose them.
        """

        def ways(value, paper: int, listed: Sequence[int | float]) -> Sequence[int | float]:
            if value != "auto":
                return [value]
            return listed if self.depth is None else [paper]

        budget = self.budget.salient if isinstance(self.budget.salient, list) else [self.budget.salient]
        pairs = {
            Kept(boundary, salient, self.selector) if salient else Kept(boundary)  # equal to what is read back
            for boundary in ways(self.boundary, 1, boundaries or [min(self.budget.boundaries)])
            for salient in ways(self.salient, 0, budget or [0])
            if boundary or not salient
        }
        if not pairs:
            raise InputError(_NO_PROBE, key="salient", found=self.salient)
        return in_order(pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, every value named; of ``trainer`` those that differ from Lightning's defaults."""
        return asdict(self)

    def to_yaml(self) -> str:
        return yaml_text.dump(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write a file that ``--recipe`` reads back as this recipe."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def data_arguments(self) -> dict[str, Any]:
        """The recipe's keyword arguments for ``CalibrationData``; the others follow from the base."""
        settings = asdict(self.data)
        del settings["calibration"]
        return settings | {"seed": self.seed}

    def trainer_arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``lightning.Trainer``; ``class_path`` entries are imported and become objects."""
        # A copy: jsonargparse puts the objects that it makes into the lists that it is given.
        return trainer_arguments.instantiate(copy.deepcopy(self.trainer), self.output)


# --- keys, types and descriptions, as the JSON schema has them --------------------------------------------------------


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, for editors."""
    return TypeAdapter(Recipe).json_schema()


@cache
def _keys() -> dict[str, dict]:
    """The schema of every key: ``data.limit``, and of every section: ``data``."""
    return dict(_walk(schema(), ""))


def _walk(node: dict, prefix: str) -> Iterator[tuple[str, dict]]:
    for name, inner in node["properties"].items():
        inner = schema()["$defs"][inner["$ref"].rpartition("/")[2]] if "$ref" in inner else inner
        yield f"{prefix}{name}", inner
        if "properties" in inner:
            yield from _walk(inner, f"{prefix}{name}.")


def _describe(node: dict) -> str:
    """A type and its range in words."""
    if "anyOf" in node:
        words = list(dict.fromkeys(map(_describe, node["anyOf"])))
        return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if "enum" in node or "const" in node:
        values = [str(value) for value in node.get("enum", [node.get("const")])]
        return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
    if "properties" in node:
        return f"a section with keys such as {', '.join(list(node['properties'])[:6])}"
    if node.get("type") == "array":
        return f"a {'non-empty ' if node.get('minItems') else ''}list (each {_describe(node.get('items', {}))})"
    names = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    names |= {"string": "non-empty text" if "pattern" in node else "text", "object": "a mapping"}
    limits = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {node[limit]}" for limit, word in limits.items() if limit in node]
    return " ".join(
        [names.get(node.get("type"), "a value that lightning.Trainer accepts"), " and ".join(bounds)]
    ).strip()


def _kinds(node: dict) -> set[str | None]:
    """The JSON types that a key accepts, fixed choices aside; {None} where any is."""
    return {each.get("type") for each in node.get("anyOf", [node]) if not ("enum" in each or "const" in each)}


def _closest(key: str) -> str | None:
    """The key, section or flag that a mistyped ``key`` may mean."""
    known = [*_keys(), *FLAGS]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:  # the right key in the wrong section, or in none
        ends = {each.rpartition(".")[2]: each for each in known}
        near = difflib.get_close_matches(key.rpartition(".")[2], list(ends), n=1, cutoff=0.75)
        close = [ends[each] for each in near]
    return close[0] if close else None


def _unknown(key: str, write: Callable[[str], str | Key] = Key) -> InputError:
    meant = _closest(key)
    hint = () if meant is None else (" (did you mean ", write(meant), "?)")
    return InputError(("unknown recipe key: ", write(key), *hint, "."))


# --- reading ----------------------------------------------------------------------------------------------------------


class Invocation(NamedTuple):
    """What a command line asks for."""

    recipe: Recipe
    resume: bool
    overwrite: bool
    check: bool
    verbose: bool
    push: str | None


def parse(argv: list[str] | None = None) -> Invocation:
    """Read ``--recipe``, then the ``--any.key value`` overrides.

    Raises:
        InputError: anything the user gave is missing, unknown, of the wrong type or out of range.
        SystemExit: code 0, after a flag that only prints or writes something, such as ``--help``.
    """
    flags, rest = _parser().parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if flags.list or flags.schema:
        print(_listing() if flags.list else json.dumps(schema(), indent=1))
        raise SystemExit(0)
    if flags.recipe is None:
        raise InputError(
            "no recipe was given",
            expected=f"--recipe with a YAML file or one of {_listed()}",
            advice="pop-fit --list describes them, pop-fit --recipe example --recipe_out my.yaml writes a template",
        )
    errors: list[InputError] = []
    overrides = list(_overrides(rest, errors))
    text = read(flags.recipe)
    recipe = build(_content(text, flags.recipe), overrides, errors)
    if flags.recipe_out is not None:
        _write_out(flags.recipe_out, recipe.to_yaml() if overrides else text)
        raise SystemExit(0)
    if flags.print_config:
        print(recipe.to_yaml(), end="")
        raise SystemExit(0)
    return Invocation(recipe, flags.resume, flags.overwrite, flags.check, flags.verbose, flags.push)


# Those that are not recipe keys: what follows the flag, where something does, and the help.
FLAGS = {
    "recipe": ("NAME_OR_PATH", "a YAML file, or one of the bundled recipes"),
    "check": (None, "report the memory, operations and time that the run needs, offline, and exit"),
    "resume": (None, "continue the run in `output`"),
    "overwrite": (None, "replace the run in `output`"),
    "verbose": (None, "print a line as each stage begins, in logs as well"),
    "push": ("USER/REPOSITORY", "publish the artifact and the report on the hub as well"),
    "print_config": (None, "print all values in use as YAML, and exit"),
    "recipe_out": ("FILE", "write the recipe to FILE, to start one of your own, and exit"),
    "list": (None, "list the bundled recipes, and exit"),
    "schema": (None, "print the JSON schema of recipes, for editors, and exit"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; see pop-fit --help.")

    def format_help(self) -> str:
        self.epilog = _key_help()
        return super().format_help()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "pop-fit",
        usage="pop-fit --recipe NAME_OR_PATH [--any.key VALUE ...] [--check | --resume | --overwrite]",
        description="Score the layers, fit the KV projections, choose a depth within the accuracy budget, and export "
        "an artifact.\nAny key of the recipe can be given as a flag, as in --budget.max_drop 0.02.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    exclusive = parser.add_mutually_exclusive_group()
    for name, (metavar, text) in FLAGS.items():
        group = exclusive if name in ("check", "resume", "overwrite") else parser
        group.add_argument(f"--{name}", help=text, **{"metavar": metavar} if metavar else {"action": "store_true"})
    parser.add_argument("--version", action="version", version=f"pop-fit {version('pop-lightning')}")
    return parser


def bundled_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = importlib.resources.files("pop_lightning.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _listed() -> str:
    return ", ".join(bundled_recipes())


def read(name: str) -> str:
    """The text of a recipe file, or of a bundled recipe by its name.

    Raises:
        InputError: there is neither, or it cannot be read.
    """
    stem = name.removeprefix("recipes/").removesuffix(".yaml")
    try:
        if name and (path := Path(name).expanduser()).is_file():
            return path.read_text(encoding="utf-8")
        if stem in bundled_recipes():
            return (importlib.resources.files("pop_lightning.recipes") / f"{stem}.yaml").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {name} is not valid YAML: {error}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"recipe {name!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    close = difflib.get_close_matches(stem, bundled_recipes(), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputError(
        f"--recipe {name!r} is neither a file nor a bundled recipe{hint}", expected=f"a YAML file or one of {_listed()}"
    )


def _content(text: str, name: str) -> dict[str, Any]:
    content = yaml_text.load(text, f"recipe {name}")
    if content is None:
        raise InputError(f"recipe {name} is empty: expected keys such as model.base and data.calibration.")
    if not isinstance(content, dict):
        raise InputError(f"recipe {name} must hold keys such as model.base, found {show(content)}.")
    return content


def _overrides(words: list[str], errors: list[InputError]) -> Iterator[tuple[str, Any]]:
    """The keys and values of a command line, in order; what is wrong with one is added to ``errors``."""
    rest = iter(words)
    ahead = next(rest, None)
    while ahead is not None:
        word, ahead = ahead, next(rest, None)
        if not word.startswith("--") or word == "--":
            raise InputError(f"unexpected {word!r}: expected --recipe, a flag, or --key value.")
        key, equals, text = word[2:].partition("=")
        if not equals and ahead is not None and not ahead.startswith("--"):
            equals, text, ahead = "=", ahead, next(rest, None)
        # What is inside an argument of the Trainer, as in trainer.logger.save_dir, its class checks.
        known = ".".join(key.split(".")[:2]) if key.startswith("trainer.") else key
        node = _keys().get(known)
        if node is None:
            errors.append(_unknown(key, "--{}".format))
        elif "properties" in node:
            example = next(each for each in _keys() if each.startswith(f"{key}."))
            errors.append(InputError(f"--{key} is a section: set one of its keys, such as --{example}."))
        elif not equals:
            errors.append(InputError(f"--{key} needs a value, found none: expected {_describe(node)}."))
        else:
            try:
                yield key, _value(key, text, _kinds(node) if key == known else {None})
            except InputError as error:
                errors.append(error)


def _value(key: str, text: str, kinds: set[str | None]) -> Any:
    """The value that YAML reads where the key accepts its kind; else the text as it is, where the key accepts text."""
    try:
        value = yaml_text.load(text, f"--{key}")
    except InputError:
        if "string" in kinds:
            return text
        raise
    kind = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
    if "string" not in kinds or kind.get(type(value)) in kinds:
        return value
    return value if isinstance(value, str) and text[:1] in ("'", '"') else text


def build(
    content: dict[str, Any], overrides: Iterable[tuple[str, Any]] = (), errors: Sequence[InputError] = ()
) -> Recipe:
    """The typed recipe from plain nested data, with ``overrides`` by dotted key.

    Raises:
        InputError: everything that is wrong with it, after ``errors``, which were found before.
    """
    content = copy.deepcopy(content)
    for key, value in overrides:
        _set(content, key.split("."), value)
    content = _without_empty_sections(content, "")
    for name, default in (("model", {}), ("data", {}), ("trainer", trainer_arguments.DEFAULTS)):
        given = content.get(name, {})
        content[name] = default | given if isinstance(given, dict) else given
    try:
        recipe = TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        errors = [*errors, *_translated(error, content)]
        raise_all(errors, "the recipe")
    raise_all(errors, "the recipe")
    return recipe


def _without_empty_sections(content: dict[str, Any], prefix: str) -> dict[str, Any]:
    kept = {}
    for name, value in content.items():
        is_section = "properties" in _keys().get(f"{prefix}{name}", {})
        if is_section and isinstance(value, dict):
            value = _without_empty_sections(value, f"{prefix}{name}.")
        if value is not None or not is_section:
            kept[name] = value
    return kept


def _set(content: dict[str, Any], parts: list[str], value: Any) -> None:
    *sections, last = parts
    for depth, part in enumerate(sections):
        inner = content.get(part)
        inner = {} if inner is None else inner
        if depth and parts[0] == "trainer":  # --trainer.logger CSVLogger --trainer.logger.name x
            inner = {"class_path": inner} if isinstance(inner, str) else inner
        if not isinstance(inner, dict):
            return  # the file has no section there, which is reported
        content[part] = inner
        named = "class_path" in inner and parts[depth + 1] not in ("class_path", "init_args", "dict_kwargs")
        content = inner.setdefault("init_args", {}) if named else inner
    content[last] = value


def _translated(error: ValidationError, content: dict[str, Any]) -> list[InputError]:
    """One error for each key that pydantic refuses: unknown ones, missing ones, then wrong values."""
    unknown, missing, together, places = [], [], [], {}
    for each in error.errors(include_url=False):
        path = ".".join(map(str, each["loc"]))
        if each["type"] in ("unexpected_keyword_argument", "extra_forbidden", "invalid_key"):
            unknown.append(path)
        elif each["type"] == "missing":
            missing.append(path)
        elif each["type"] == _TOGETHER:
            together.append(InputError(each["ctx"]["problem"], key=each["ctx"]["key"], found=each["ctx"]["found"]))
        else:  # a union reports each of its members; the numbers after the key are places in a list
            key = max((key for key in _keys() if f"{path}.".startswith(f"{key}.")), key=len)
            places.setdefault(key, []).extend(part for part in each["loc"] if isinstance(part, int))
    # A key or section that was mistyped, or is not a section, is reported once.
    covered = {_closest(path) for path in unknown} | {key for key in places if "properties" in _keys()[key]}
    missing = [path for path in missing if not {path, path.rpartition(".")[0]} & covered]
    required = [
        InputError("is required", key=path, expected=_keys()[path]["description"], found="nothing") for path in missing
    ]
    return [*map(_unknown, unknown), *required, *(_wrong(key, content, at) for key, at in places.items()), *together]


def _wrong(key: str, content: dict[str, Any], places: list[int]) -> InputError:
    node, value = _keys()[key], content
    for part in key.split("."):
        value = value[part]
    if isinstance(value, list) and places:
        node = next((each for each in node.get("anyOf", [node]) if each.get("type") == "array"), node).get("items", {})
        key, value = f"{key}[{places[0]}]", value[places[0]]
    return InputError(key=key, expected=_describe(node), found=show(value))


# --- what a flag prints or writes -------------------------------------------------------------------------------------


_KEY_HELP = """recipe keys:
{keys}
  trainer.NAME: an argument of lightning.Trainer
{trainer}

exit code: 0 exported (--check: the run can start); 2 bad usage, recipe or data; 3 no depth keeps the budget;
130 interrupted
"""


def _key_help() -> str:
    """Every key of a recipe with its meaning, type and default."""
    lines, trainer = [], []
    for key, node in _keys().items():
        if key.startswith("trainer."):
            trainer.append(key.removeprefix("trainer."))
        elif "properties" not in node:
            default = json.dumps(node["default"]).replace('"', "") if "default" in node else None
            what = "required" if default is None else f"default: {default}"
            lines.append(f"  {key}: {node['description']}")
            lines.append(textwrap.indent(textwrap.fill(f"{_describe(node)} ({what})", 110), " " * 6))
    names = textwrap.indent(textwrap.fill(", ".join(trainer), 110), " " * 4)
    return _KEY_HELP.format(keys="\n".join(lines), trainer=names)


def _listing() -> str:
    """The bundled recipes with the first line of each, which is a comment that says what it is for."""
    width = max(map(len, bundled_recipes()))
    heads = {name: read(name).partition("\n")[0].removeprefix("#").strip() for name in bundled_recipes()}
    return "\n".join(f"{name:<{width}}  {head}" for name, head in heads.items())


def _write_out(path: str, text: str) -> None:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(
            f"--recipe_out {path} already exists and is not overwritten: choose another file, or remove this one."
        ) from error
    except OSError as error:
        raise InputError(f"--recipe_out {path} cannot be written ({error.strerror}); choose another file.") from error
    print(f"recipe: {path}")
