"""The ``trainer`` section of a recipe: the arguments of ``lightning.Trainer``, by name and type and as objects.

Names and types are read from Lightning's source file instead of its module, whose import costs seconds that ``--help``,
``--print_config`` and a mistyped key need not wait for.
"""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import ConfigDict, Strict
from typing_extensions import TypedDict

from pop_lightning.core.errors import InputError, first_sentence, show

DEFAULTS = {"accelerator": "auto", "devices": 1, "logger": False}
# YAML has types of its own: nothing is converted, so that true is not 1 and "2" is not 2.
_TYPES: dict[str, Any] = {
    **{kind.__name__: Annotated[kind, Strict()] for kind in (int, float, bool)},
    **{"str": str, "list": list, "dict": dict, "Optional": Optional, "Union": Union, "Literal": Literal, "None": None},
}


def typed() -> type:
    """A ``TypedDict`` of the arguments. Those that take objects have type ``Any``: only Lightning can check them."""
    source = Path(importlib.util.find_spec("lightning").origin).parent / "pytorch" / "trainer" / "trainer.py"
    trainer = next(
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "Trainer"
    )
    init = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    arguments = {each.arg: _type(each.annotation) for each in init.args.args[1:] + init.args.kwonlyargs}
    kind = TypedDict("Trainer", arguments, total=False)
    kind.__pydantic_config__ = ConfigDict(extra="forbid")
    return kind


def _type(annotation: ast.expr | None) -> Any:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else {""}
    plain = names <= _TYPES.keys() and not any(isinstance(node, ast.Attribute) for node in ast.walk(annotation))
    return eval(ast.unparse(annotation), dict(_TYPES)) if plain else Any


def instantiate(trainer: dict[str, Any], output: str) -> dict[str, Any]:
    """Keyword arguments for ``lightning.Trainer``: classes that ``trainer`` names are imported and made.

    A logger that needs a ``save_dir`` and has none writes to ``output``, as Lightning's own default does.

    Raises:
        InputError: a class cannot be imported, is of another kind, or does not accept an argument.
    """
    import lightning
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(lightning.Trainer, "trainer", instantiate=False)
    parser.set_defaults({f"trainer.{key}": value for key, value in DEFAULTS.items()})
    if "logger" in trainer:
        logger = trainer["logger"]
        placed = [_placed(each, output) for each in logger] if isinstance(logger, list) else _placed(logger, output)
        trainer = trainer | {"logger": placed}
    try:
        return parser.instantiate(parser.parse_object({"trainer": trainer})).trainer.as_dict()
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # of jsonargparse, or of whatever the named class raises when it is made
        raise _refused(trainer, error) from error


def _refused(trainer: dict[str, Any], error: Exception) -> InputError:
    """The sentence in jsonargparse's report, or in what the named class raised when it was made."""
    text = " ".join(str(error).split())
    found = re.search(r'Parser key "trainer\.(\w+)', text)
    key = f"trainer.{found[1]}" if found else "trainer"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            advice = "install its package, or put the folder of a module of your own on PYTHONPATH"
            return InputError(
                f"names a class that cannot be imported: {first_sentence(cause).rstrip('.')}", key=key, advice=advice
            )
        cause = cause.__cause__
    if found is None:
        return InputError(f"the trainer section cannot be used: {first_sentence(error)}")
    value = trainer.get(found[1])
    if missing := re.search(r"module '([^']+)' has no attribute '([^']+)'", text):
        return InputError(f"names {missing[1]}.{missing[2]}, but the module {missing[1]} has no {missing[2]}", key=key)
    inside = re.search(r"class_path '([^']+)':\s+(?:Option '([^']+)' is not accepted|Parser key \"([^\"]+)\")", text)
    if inside:
        what = f"does not have the argument {inside[2]}" if inside[2] else f"does not accept this {inside[3]}"
        return InputError(f"names {inside[1]}, which {what}", key=key, found=show(value))
    kind = inspect.signature(importlib.import_module("lightning").Trainer).parameters[found[1]].annotation
    names = re.sub(r"[\w.]+\.(?=\w)|, NoneType", "", str(kind))
    return InputError("is not accepted by lightning.Trainer", key=key, expected=names, found=show(value))


def _placed(logger: Any, output: str) -> Any:
    entry = {"class_path": logger} if isinstance(logger, str) else logger
    if not isinstance(entry, dict) or not _needs_save_dir(entry.get("class_path")):
        return logger
    return entry | {"init_args": {"save_dir": output} | (entry.get("init_args") or {})}


def _needs_save_dir(class_path: Any) -> bool:
    module, _, name = str(class_path).rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "lightning.pytorch.loggers"), name)
        parameter = inspect.signature(kind).parameters.get("save_dir")
    except (ImportError, AttributeError, TypeError, ValueError):  # jsonargparse reports what is wrong with it
        return False
    return parameter is not None and parameter.default is inspect.Parameter.empty
