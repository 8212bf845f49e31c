"""Which tokens of an engine step are context: the one rule on which exactness rests.

Token ``index`` of a request is context if and only if ``index < plan.context_of(original prompt)``. Chunks, mixed
batches, speculation, preemption and prefix-cache hits change which tokens a step holds, but never this rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pop_lightning.core.plan import PruningPlan


@dataclass(frozen=True)
class Step:
    """The tokens of one engine step, row after row; a row's context comes before its kept tokens.

    Attributes:
        context: context tokens of each row, ``[rows]``.
        kept: the other tokens of each row, ``[rows]``: they run through all layers.
    """

    context: np.ndarray
    kept: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.context.sum() + self.kept.sum())

    @property
    def prunes(self) -> bool:
        return bool(self.context.any())

    @cached_property
    def is_context(self) -> np.ndarray:
        """``[tokens]``."""
        counts = np.stack([self.context, self.kept], axis=1).reshape(-1)
        return np.repeat(np.tile([True, False], len(self.context)), counts)

    @cached_property
    def context_tokens(self) -> np.ndarray:
        """Positions of the context tokens in the step."""
        return np.flatnonzero(self.is_context)

    @cached_property
    def kept_tokens(self) -> np.ndarray:
        """Positions of the kept tokens in the step."""
        return np.flatnonzero(~self.is_context)

    @cached_property
    def rows(self) -> np.ndarray:
        """The rows that have kept tokens; only these take part in the attention of pruned layers."""
        return np.flatnonzero(self.kept)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each of ``rows`` starts among the kept tokens, and their number at the end: ``[len(rows) + 1]``."""
        return np.concatenate([[0], np.cumsum(self.kept[self.rows])]).astype(np.int32)


def split(plan: PruningPlan, scheduled: Sequence[int], computed: Sequence[int], prompts: Sequence[int]) -> Step:
    """Divide the tokens of a step.

    Args:
        scheduled: how many tokens of each row the step computes.
        computed: how many tokens of each row have been computed before, in this or another request.
        prompts: the length of each row's original prompt, without generated tokens.
    """
    ends = np.array([plan.context_of(int(prompt)) for prompt in prompts], dtype=np.int64)
    scheduled = np.asarray(scheduled, dtype=np.int64)
    context = np.clip(ends - np.asarray(computed, dtype=np.int64), 0, scheduled)
    return Step(context, scheduled - context)


class Announced:
    """The step that the runner of this process is about to compute.

    The runner announces it before attention metadata is built; the model's forward takes it. Each engine of a process
    computes one step after the other, so one slot is enough.
    """

    def __init__(self):
        self.step: Step | None = None

    def announce(self, step: Step) -> None:
        self.step = step

    def take(self) -> Step | None:
        """The announced step, once; None in dummy runs and in a process without a live hook."""
        step, self.step = self.step, None
        return step

    @property
    def pruning(self) -> Step | None:
        """The announced step if it holds context."""
        return self.step if self.step is not None and self.step.prunes else None


announced = Announced()
