"""YAML as recipes use it: stricter than PyYAML where that hides a mistake, and one sentence for whatever is wrong."""

import re
from typing import Any

import yaml

from pop_lightning.core.errors import InputError

DEEPEST = 50  # levels; a recipe has 4, and Python's own limit would be a RecursionError far from the cause
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_SURROGATE = re.compile("[\ud800-\udfff]")


def load(text: str, what: str) -> Any:
    """The plain data in ``text``.

    Raises:
        InputError: it is not YAML, has a duplicate key, nests too deeply, or holds a value that cannot be read.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # besides YAMLError, whatever int(), date() and the like raise for a tagged value
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise InputError(
            f"{what} is not valid YAML{where}: {' '.join(problem.split()) or 'a value of no kind'}."
        ) from error


def dump(content: Any) -> str:
    """Text that :func:`load` and any other YAML reader read back as ``content``."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """``1e-3`` is a number, a date is text, and a duplicate key, half a character or a cycle is an error."""

    def __init__(self, stream):
        super().__init__(stream)
        self._open: list[str | None] = []  # the anchors of the nodes around the current one

    def compose_node(self, parent, index):
        event = self.peek_event()
        if len(self._open) == DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEEPEST} levels", event.start_mark)
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent) and anchor in self._open:
            raise yaml.composer.ComposerError(None, None, f"*{anchor} refers to what it is inside", event.start_mark)
        self._open.append(anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        return node

    def construct_scalar(self, node):
        if isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
            raise yaml.constructor.ConstructorError(
                None, None, "half a character (a lone surrogate), which no file can hold", node.start_mark
            )
        return super().construct_scalar(node)

    def construct_yaml_int(self, node):
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**63:  # Python refuses to print one of more than 4,300 digits
            raise yaml.constructor.ConstructorError(None, None, "a whole number beyond 64 bits", node.start_mark)
        return value

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key: {key.value}", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# A revision may be called 2026-01-01, and nothing in a recipe is a date.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes the text that :class:`_Loader` would read as a number: a revision may be called 1e3."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
