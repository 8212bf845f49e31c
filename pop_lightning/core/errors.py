"""The exception for bad input. It names keys in a form that every front end can spell in its own way.

The library raises :class:`InputError` with the key of the recipe that a problem belongs to. Whoever knows how the user
gave that key renders the sentence: a command line as its flag, everything else as the recipe key.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """A recipe key inside a sentence, such as ``data.limit``; with ``value`` the setting ``data.allow_urls: true``."""

    name: str
    value: str | None = None


# A sentence or a piece of one. A sequence is joined without separators; an error inside it is rendered along.
Text = str | Key | Exception | Sequence["str | Key | Exception"]
# How the user writes a key; None if the front end cannot set it.
Spelling = Callable[[Key], str | None]


def as_recipe(key: Key) -> str:
    """The spelling of a recipe: ``data.limit``, or ``data.allow_urls: true``."""
    return key.name if key.value is None else f"{key.name}: {key.value}"


def as_flags(flags: Mapping[str, str]) -> Spelling:
    """The spelling of a command line that has a flag for some recipe keys: ``{"data.calibration": "--data"}``."""

    def spell(key: Key) -> str | None:
        flag = flags.get(key.name)
        return flag if flag is None or key.value in (None, "true") else f"{flag} {key.value}"

    return spell


# The variable in which pop-fit names itself (its process id) to the processes that it starts.
LAUNCHED_BY = "POP_LIGHTNING_LAUNCHED_BY"


class InputError(ValueError):
    """The user's input cannot be used; the message is one sentence on what to change.

    With fields it reads ``KEY PROBLEM: expected EXPECTED, found FOUND; ADVICE.``, without those that are not given.
    ``InputError("a whole sentence.")`` is rendered as it is; without a problem it reads ``KEY must be EXPECTED, found
    FOUND; ADVICE.``

    Args:
        problem: what is wrong; without a key a whole sentence.
        key: the recipe key that it concerns, such as ``data.batch_size``.
        found: what was given: words, or any other value, which is shown with ``repr`` and cut (see :func:`show`).
        expected: what would be valid.
        advice: what to do about it. Left out where it names a :class:`Key` that the front end cannot spell, since the
            user could not follow it there.

    ``problem``, ``expected`` and ``advice`` accept a :data:`Text`, so that they can name further keys, as in
    ``advice=("set ", Key("data.split"), " to train")``.
    """

    def __init__(
        self,
        problem: Text = "",
        *,
        key: str | None = None,
        found: Any = None,
        expected: Text | None = None,
        advice: Text | None = None,
    ):
        super().__init__(problem)
        self.problem, self.key, self.found, self.expected, self.advice = problem, key, found, expected, advice

    def render(self, spelling: Spelling = as_recipe) -> str:
        """The sentence, with every key as ``spelling`` writes it."""
        problem = _join(self.problem, spelling)
        fields = (self.key, self.found, self.expected, self.advice)
        if all(field is None for field in fields):
            return problem
        expected = None if self.expected is None else _join(self.expected, spelling)
        if not problem:
            problem, expected = f"must be {expected}", None
        sentence = problem if self.key is None else f"{_join(Key(self.key), spelling)} {problem}"
        if expected is not None:
            sentence += f": expected {expected}"
        if self.found is not None:
            sentence += f", found {self.found if isinstance(self.found, str) else show(self.found)}"
        if self.advice is not None and all(spelling(key) for key in _keys(self.advice)):
            sentence += f"; {_join(self.advice, spelling)}"
        return f"{sentence.removesuffix('.')}."

    def __str__(self) -> str:
        return self.render()


class SeveralErrors(InputError):
    """Several errors of one input, reported together: ``the recipe has 2 errors: (1) ...; (2) ...``."""

    def __init__(self, errors: Sequence[InputError], what: str):
        super().__init__(what)
        self.args = (errors, what)
        self.errors, self.what = list(errors), what

    def render(self, spelling: Spelling = as_recipe) -> str:
        parts = (
            f"({number}) {error.render(spelling).removesuffix('.')}" for number, error in enumerate(self.errors, 1)
        )
        return f"{self.what} has {len(self.errors)} errors: {'; '.join(parts)}."


def raise_all(errors: Sequence[InputError], what: str) -> None:
    """Raise the one error, or all of them together, as errors of ``what``; return where there are none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise SeveralErrors(errors, what)


def show(value: Any) -> str:
    """A value inside a sentence: its ``repr`` on one line, cut to 80 characters; ``null`` for None."""
    try:
        text = "null" if value is None else repr(value)
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        text = "a number of more than 4300 digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parts(text: Text) -> Sequence[str | Key | Exception]:
    return (text,) if isinstance(text, (str, Key, Exception)) else text


def _keys(text: Text) -> list[Key]:
    return [part for part in _parts(text) if isinstance(part, Key)]


def _join(text: Text, spelling: Spelling) -> str:
    written = []
    for part in _parts(text):
        if isinstance(part, Key):
            part = spelling(part) or as_recipe(part)
        elif isinstance(part, InputError):
            part = part.render(spelling)
        written.append(str(part))
    return "".join(written)


class Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which ends a run as Ctrl-C does, with exit code 143 instead of 130."""


def on_process(problem: str, number: int) -> str:
    """The sentence ``problem`` with the number of the process that met it, except for the first process."""
    return f"{problem.rstrip('.')} (on process {number})." if number else problem


def first_sentence(error: Exception) -> str:
    """The first line of another library's error, with a full stop; the error's type if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
