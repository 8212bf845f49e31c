"""Defects that a served engine may have, put in on purpose: the tests must notice each."""

import numpy as np


def chunk_end_is_boundary() -> None:
    """The last tokens of each chunk run in full, as SwiftKV and vLLM's fast prefill do."""
    from pop_lightning.serving import runner
    from pop_lightning.serving.steps import split

    def wrong(plan, scheduled, computed, prompts):
        ends = np.minimum(np.asarray(prompts), np.asarray(computed) + np.asarray(scheduled))
        return split(plan, scheduled, computed, ends)

    runner.split = wrong


def no_hash_key() -> None:
    """Blocks are shared whatever their request's context was."""
    from pop_lightning.serving import plugin

    plugin.keyed_hasher = lambda plan, make, size, hash_block: make(size, hash_block)


def whole_slots() -> None:
    """Kept tokens are written to the slots of the step's first tokens."""
    from contextlib import nullcontext

    from pop_lightning.serving.model import PrunedModel

    PrunedModel._slots_of = lambda self, kept: nullcontext()


def no_hook() -> None:
    """No runner says which tokens are context."""
    from pop_lightning.serving import runner

    runner.hook = lambda v2: None


def take_away(name: str) -> None:
    """Remove one of ``private.NAMES`` from vLLM, as another version might."""
    from pop_lightning.serving import private

    module, _, path = private.NAMES[name].partition("(")[0].partition(":")
    private.NAMES[name] = f"{module}:{path}_that_is_gone"


def probe_without_each() -> dict[str, str | None]:
    """What the probe says with each name taken away, one at a time."""
    from pop_lightning.core.errors import InputError
    from pop_lightning.serving import private

    private.probe()
    names, said = dict(private.NAMES), {}
    for name in names:
        take_away(name)
        try:
            private.probe()
            said[name] = None
        except InputError as error:
            said[name] = str(error)
        private.NAMES.update(names)
    return said
