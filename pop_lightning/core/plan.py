"""What is pruned: pure data, validated. Every other part of the library is given a plan and asks it nothing else."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pop_lightning.core.errors import InputError


@dataclass(frozen=True)
class PruningPlan:
    """Prefill-Only Pruning of one model (arXiv 2602.03295, section 3).

    Args:
        depth: context tokens run through layers ``0 .. depth-1`` only; decode always runs every layer.
        boundary: how many of the last prompt tokens run in full. 1 is the paper's boundary handling, 0 its ablation
            (the last prompt token stops at ``depth`` too); at or above the prompt's length nothing is pruned.
    """

    depth: int
    boundary: int = 1

    def __post_init__(self):
        for name, least in (("depth", 1), ("boundary", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} must be a whole number, found {value!r}.")
            if value < least:
                raise InputError(f"{name} must be at least {least}, found {value}.")

    def check(self, layers: int) -> None:
        """Raise :class:`InputError` where a model of ``layers`` layers cannot be pruned like this."""
        if self.depth > layers:
            raise InputError(f"depth must lie in 1..{layers} for a model of {layers} layers, found {self.depth}.")

    def pruned(self, layers: int) -> range:
        """The pruned layers ``depth .. layers-1``."""
        return range(self.depth, layers)

    @property
    def fingerprint(self) -> str:
        """A short hash that caches carry, so that a cache made under another plan is recognized."""
        return hashlib.sha256(f"pop depth={self.depth} boundary={self.boundary}".encode()).hexdigest()[:16]


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
