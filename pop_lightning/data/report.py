"""What the rows of a data set are: how many are used, why others are not, and their lengths."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from pop_lightning.core.errors import show
from pop_lightning.data.rows import Row


@dataclass(frozen=True)
class DataReport:
    """A summary of the data: usable rows, the others counted by reason, and lengths in tokens.

    ``unusable`` maps a reason to a count and ``first_unusable`` the same reason to the first origin; ``cut`` counts the
    rows that are used but were cut, by what they were cut to; ``ignored`` maps each key that is not read to the rows
    that have it. ``response_tokens`` is None while every response is missing.
    """

    rows: int
    unusable: dict[str, int]
    first_unusable: dict[str, str]
    cut: dict[str, int]
    prompt_tokens: dict[str, float] | None
    response_tokens: dict[str, float] | None
    ignored: dict[str, int]

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        unusable: dict[str, int],
        first: dict[str, str],
        cut: dict[str, int],
        ignored: dict[str, int],
    ) -> Self:
        """The report of the rows that are used; ``first`` has the first origin of each reason."""
        responses = [len(row.response_ids) for row in rows if row.response_ids is not None]
        return cls(
            rows=len(rows),
            unusable=unusable,
            first_unusable=first,
            cut=cut,
            prompt_tokens=_spread([len(row.prompt_ids) for row in rows]),
            response_tokens=_spread(responses),
            ignored=ignored,
        )

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.rows} rows"]
        for name, tokens in (("prompt", self.prompt_tokens), ("response", self.response_tokens)):
            if tokens:
                parts.append(f"{name} tokens {tokens['min']:g}/{tokens['median']:g}/{tokens['max']:g} (min/median/max)")
        parts += [f"{count} cut to {limit}" for limit, count in self.cut.items()]
        if self.unusable:
            parts.append(f"not used: {self.left_out}")
        if self.ignored:
            parts.append(
                "keys that are not used: "
                + ", ".join(f"{show(key)[1:-1]} ({n} rows)" for key, n in self.ignored.items())
            )
        return ", ".join(parts)

    @property
    def truncated(self) -> int:
        """Number of rows that were cut."""
        return sum(self.cut.values())

    @property
    def left_out(self) -> str:
        """The reasons why rows are not used, each with its count and its first row."""
        return "; ".join(f"{n} {reason} (first: {self.first_unusable[reason]})" for reason, n in self.unusable.items())


def _spread(lengths: list[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    return {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)}
