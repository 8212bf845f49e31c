"""What an engine reports about its pruned prefill: counters, and a line in the log every ten seconds while it prunes.

The counters are ordinary ones of ``prometheus_client``, which vLLM uses for its own. ``pop-serve`` makes those of an
engine's process part of the server's ``/metrics``.
"""

import functools
import time

from pop_lightning.serving import private
from pop_lightning.serving.steps import Step

EVERY = 10.0  # seconds


@functools.cache
def counters() -> tuple:
    """Counters of context and of kept tokens; one pair per process, whatever the number of its engines."""
    from prometheus_client import Counter  # comes with vLLM

    return (
        Counter("pop:context_tokens", "Context tokens that ran through the layers below the artifact's depth only."),
        Counter("pop:kept_tokens", "Tokens of the same steps that ran through all layers."),
    )


class Report:
    """Counts tokens by how far they ran.

    Args:
        depth: of the plan, out of so many ``layers``.
        public: whether this process feeds the counters; one rank of an engine must, as all run the same tokens.
    """

    def __init__(self, depth: int, layers: int, *, public: bool):
        self.depth, self.layers = depth, layers
        self.counters = counters() if public else ()
        self.context = self.kept = 0  # tokens of steps with context, since the start
        self._due = time.monotonic()

    def add(self, step: Step) -> None:
        new = int(step.context.sum()), int(step.kept.sum())
        self.context += new[0]
        self.kept += new[1]
        for counter, tokens in zip(self.counters, new, strict=False):
            counter.inc(tokens)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY
            private.init_logger("vllm.pop_lightning").info("%s", self)

    def __str__(self) -> str:
        return (
            f"Pruned prefill: {self.context} context tokens ran through {self.depth} of {self.layers} layers; "
            f"{self.kept} tokens of the same steps ran through all."
        )
