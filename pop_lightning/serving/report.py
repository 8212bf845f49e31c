"""What an engine reports about its pruned prefill: a line in the log every ten seconds while there is any."""

import time

from pop_lightning.serving import private
from pop_lightning.serving.steps import Step

EVERY = 10.0  # seconds


class Report:
    """Counts tokens by how far they ran."""

    def __init__(self, depth: int, layers: int):
        self.depth, self.layers = depth, layers
        self.context = self.kept = 0  # tokens of steps with context, since the start
        self._due = time.monotonic()

    def add(self, step: Step) -> None:
        self.context += int(step.context.sum())
        self.kept += int(step.kept.sum())
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + EVERY
            private.init_logger("vllm.pop_lightning").info("%s", self)

    def __str__(self) -> str:
        return (
            f"Pruned prefill: {self.context} context tokens ran through {self.depth} of {self.layers} layers; "
            f"{self.kept} tokens of the same steps ran through all."
        )
