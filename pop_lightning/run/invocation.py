"""What a command line asks for: a recipe from one YAML file and ``--any.key`` overrides, and the flags of ``pop-fit``.

Errors are :class:`InputError`, all those of a recipe together, each with the key, what was found and what was expected.
Keys, types and meanings are those of the JSON schema of ``recipe.py``.
"""

import argparse
import copy
import difflib
import importlib.resources
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from pop_lightning.core import completion
from pop_lightning.core.errors import InputError, Key, raise_all, show
from pop_lightning.run import trainer_arguments, yaml_text
from pop_lightning.run.recipe import TOGETHER, Recipe


class Invocation(NamedTuple):
    """What a command line asks for: the recipe, and values of ``FLAGS`` by their names."""

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
    return Invocation(recipe, *(getattr(flags, name) for name in Invocation._fields[1:]))


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
    completion.add_flag(parser, whole=_completed)
    return parser


_PLACES = {"model.base": "MODEL", "data.calibration": "FILE", "output": "DIR"}


def _completed() -> argparse.ArgumentParser:
    """The parser with every key of the recipe as a flag, for completion."""
    parser = _parser()
    for action in parser._actions:
        if action.dest == "recipe":
            action.complete = completion.names_or_files(bundled_recipes())
    for key, node in _keys().items():
        if "properties" not in node:
            text = node.get("description", "an argument of lightning.Trainer").replace("%", "%%")
            parser.add_argument(f"--{key}", choices=_choices(node) or None, metavar=_PLACES.get(key), help=text)
    return parser


def _choices(node: dict) -> list[str]:
    """The values that a key can have, if they can be listed."""
    if "anyOf" in node:
        return [value for each in node["anyOf"] for value in _choices(each)]
    if node.get("type") == "boolean":
        return ["true", "false"]
    return [str(value) for value in node.get("enum", [node["const"]] if "const" in node else [])]


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
        elif each["type"] == TOGETHER:
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
