"""Disjoint splits of rows, by prompt."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from pop_lightning.core.errors import InputError
from pop_lightning.data.rows import Row, hash63

SPLITS = {"fit": 0.3, "tune": 0.1, "search": 0.2, "verify": 0.4}


def split_rows(rows: Sequence[Row], fractions: Mapping[str, float], seed: int = 0) -> dict[str, list[Row]]:
    """Disjoint splits, the same for every order of ``rows``.

    Rows are ordered by a hash of ``seed`` and their prompt and cut where the fractions say. Rows that share a prompt
    stay together, so that no prompt is used for both fitting and verification, and a response that is filled in later
    does not move its row.

    Raises:
        InputError: there are fewer distinct prompts than splits.
    """
    key = {row.prompt: hash63(seed, *row.prompt) for row in rows}
    ordered = sorted(rows, key=lambda row: (key[row.prompt], row.prompt, row.seed))
    groups = [list(group) for _, group in groupby(ordered, key=lambda row: row.prompt)]
    if len(groups) < len(fractions):
        raise InputError(
            f"found {len(rows)} usable rows with {len(groups)} distinct prompts, expected at least {len(fractions)}, "
            f"one for each of {', '.join(fractions)}: give more rows in data.calibration or raise data.limit "
            "(in a .txt file a blank line separates documents)."
        )
    splits, start, share, taken = {}, 0, 0.0, 0
    for index, (name, fraction) in enumerate(fractions.items()):
        left = len(fractions) - index - 1
        share += fraction
        end, target = start, len(groups) if left == 0 else round(share * len(rows))
        while end < len(groups) - left and (end == start or left == 0 or taken < target):
            taken += len(groups[end])
            end += 1
        splits[name] = [row for group in groups[start:end] for row in group]
        start = end
    return splits


def check_fractions(splits: Mapping[str, float]) -> dict[str, float]:
    """The fractions in the library's order, so that the order of a recipe's keys changes nothing."""
    if splits.keys() != SPLITS.keys():
        raise InputError(f"data.splits has {', '.join(splits) or 'no names'}: expected exactly {', '.join(SPLITS)}.")
    for name, value in splits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(f"data.splits.{name} must be a fraction between 0 and 1, found {value!r}.")
    total = sum(splits.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"data.splits must sum to 1, found {total:g}: change the fractions of {', '.join(SPLITS)}.")
    return {name: float(splits[name]) for name in SPLITS}
