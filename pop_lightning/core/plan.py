"""What is pruned: pure data, validated. Every other part of the library is given a plan and asks it nothing else."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pop_lightning.core.errors import InputError
from pop_lightning.core.kinds import SELECTORS

USUAL = 1000  # prompt tokens at which numbers and shares of tokens are compared


@dataclass(frozen=True)
class PruningPlan:
    """Prefill-Only Pruning of one model (arXiv 2602.03295, section 3), with salient context tokens.

    Args:
        depth: context tokens run through layers ``0 .. depth-1`` only; decode always runs every layer.
        boundary: how many of the last prompt tokens run in full: a number, or a share of the prompt as a float below 1.
            1 is the paper's boundary handling, 0 its ablation (the last prompt token stops at ``depth`` too); at or
            above the prompt's length nothing is pruned.
        salient: how many context tokens run in full as well, wherever they are: a number, or a share of the prompt as
            a float below 1. 0 is the paper.
        selector: what chooses them, one of ``SELECTORS``.

    Raises:
        InputError: a value out of its range.
    """

    depth: int
    boundary: int | float = 1
    salient: int | float = 0
    selector: str = "attention"

    def __post_init__(self):
        if isinstance(self.depth, bool) or not isinstance(self.depth, int):
            raise InputError(f"depth must be a whole number, found {self.depth!r}.")
        if self.depth < 1:
            raise InputError(f"depth must be at least 1, found {self.depth}.")
        for name in ("boundary", "salient"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InputError(f"{name} must be a whole number or a share of the prompt, found {value!r}.")
            if isinstance(value, float) and not 0 < value < 1:
                raise InputError(f"{name} as a share of the prompt must lie between 0 and 1, found {value!r}.")
            if value < 0:
                raise InputError(f"{name} must be at least 0, found {value}.")
        if self.selector not in SELECTORS:
            raise InputError(f"unknown selector: {self.selector!r}; expected one of {', '.join(SELECTORS)}.")
        if self.salient and not self.boundary:
            raise InputError(f"salient {self.salient} needs a boundary of at least 1, found 0.")

    def check(self, layers: int) -> None:
        """Raise :class:`InputError` where a model of ``layers`` layers cannot be pruned like this."""
        if self.depth > layers:
            raise InputError(f"depth must lie in 1..{layers} for a model of {layers} layers, found {self.depth}.")

    @property
    def kept(self) -> "Kept":
        return Kept(self.boundary, self.salient, self.selector)

    def pruned(self, layers: int) -> range:
        """The pruned layers ``depth .. layers-1``."""
        return range(self.depth, layers)

    def boundary_of(self, prompt: int) -> int:
        """How many of the last tokens of a prompt of ``prompt`` tokens run in full."""
        return number_of(self.boundary, prompt)

    def context_of(self, prompt: int) -> int:
        """How many tokens of a prompt of ``prompt`` tokens are context."""
        return max(0, prompt - self.boundary_of(prompt))

    def salient_of(self, prompt: int) -> int:
        """How many context tokens of a prompt of ``prompt`` tokens run in full as well."""
        return min(number_of(self.salient, prompt), self.context_of(prompt))

    @property
    def fingerprint(self) -> str:
        """A short hash that caches carry, so that a cache made under another plan is recognized."""
        salient = f" salient={self.salient} selector={self.selector}" if self.salient else ""
        return hashlib.sha256(f"pop depth={self.depth} boundary={self.boundary}{salient}".encode()).hexdigest()[:16]


class Kept(NamedTuple):
    """Which prompt tokens run in full: the plan without its depth. What the fields mean: :class:`PruningPlan`."""

    boundary: int | float = 1
    salient: int | float = 0
    selector: str = "attention"

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Kept":
        """From an entry of the curve in ``metrics.json``, or of a plan in ``pop_config.json``."""
        return cls(**{name: entry[name] for name in cls._fields if name in entry})

    def at(self, depth: int) -> PruningPlan:
        return PruningPlan(depth, *self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; without salient tokens there is nothing to say about them."""
        return self._asdict() if self.salient else {"boundary": self.boundary}

    def __str__(self) -> str:
        return f"boundary {self.boundary}" + (f", salient {self.salient}" if self.salient else "")


class Choice(NamedTuple):
    """Projections that were fitted: at which depth, of which kind, after how many training steps."""

    depth: int
    projection: str
    steps: int = 0

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Choice":
        """From an entry of the curve in ``metrics.json``."""
        return cls(entry["depth"], entry["projection"], entry.get("steps", 0))

    def __str__(self) -> str:
        return f"{self.depth} ({self.projection}{f', {self.steps} steps' if self.steps else ''})"


def in_order(several: Iterable[Kept]) -> list[Kept]:
    """The fewest salient tokens first, and of equals the shortest boundary."""
    return sorted(several, key=lambda kept: (number_of(kept.salient, USUAL), number_of(kept.boundary, USUAL)))


def in_words(value: int | float) -> str:
    """A number of tokens, or a share of the prompt: `1 prompt token`, `5% of the prompt`."""
    if isinstance(value, float):
        return f"{100 * value:.3g}% of the prompt"
    return f"{value:,} prompt token{'s' * (value != 1)}"


def number_of(value: int | float, tokens: int) -> int:
    """``value`` itself, or the share of ``tokens`` that it is, rounded up."""
    return math.ceil(value * tokens - 1e-9) if isinstance(value, float) else value
