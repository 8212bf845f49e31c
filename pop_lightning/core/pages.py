"""Pages for the browser: what they share is ``page.html.jinja``, which the template of every page extends.

A page is one file without scripts or outside resources that a person may send to another. It is readable on a phone,
light and dark; tables (:class:`~pop_lightning.core.tables.Table`) scroll in a box of their own and can be copied, and
plots (:func:`~pop_lightning.core.plots.picture`) follow the reader's color scheme.
"""

import shlex
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def render(
    package: str,
    template: str,
    *,
    title: str,
    about: Mapping[str, str],
    filters: Mapping[str, Callable] | None = None,
    **values: Any,
) -> str:
    """A page from ``template`` in ``package``, which extends ``page.html.jinja``; every string is escaped.

    Args:
        title: of the browser's tab.
        about: what was run on what, as in :func:`circumstances`; the page ends with it.
        filters: for the template.
        values: for the template.
    """
    loader = ChoiceLoader([PackageLoader(package, ""), PackageLoader("pop_lightning.core", "")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(title=title, about=about, **values)


def circumstances(program: str, otherwise: str) -> dict[str, str]:
    """When and how: the time with its zone, and the command.

    Args:
        program: the console script, such as ``pop-fit``.
        otherwise: a command that does the same, for a process that was not started with ``program``.
    """
    started = Path(sys.argv[0]).name == program
    command = shlex.join([program, *sys.argv[1:]]) if started else otherwise
    return {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "command": command}
