"""Hooks into vLLM's model runners: before a step is prepared, they say which of its tokens are context.

The runner that CPUs use (V1) is wrapped at two methods. The newer one (V2) has an official way, a model state of the
model's own, and is wrapped at one. A step with context never replays a graph: it is dispatched as eager. Hooks act on
pruned models only, and are installed once per process, by the model that needs them.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from pop_lightning.core.errors import InputError
from pop_lightning.serving import private
from pop_lightning.serving.steps import announced, split


def hook(v2: bool) -> None:
    """Install the hooks of one runner; a second call changes nothing."""
    if v2:
        private.wrap("v2_gather", _announce_v2)
    else:
        private.wrap("v1_prepare", _announce_v1)
        private.wrap("v1_dispatch", _dispatch_v1)


def _plan(runner: Any) -> Any:
    """The plan of the runner's model, or None for a model without one."""
    return getattr(runner.get_model(), "plan", None) if hasattr(runner.get_model(), "projections") else None


# --- V1 ---------------------------------------------------------------------------------------------------------------


def _announce_v1(prepare: Callable, runner: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
    result = prepare(runner, scheduler_output, num_scheduled_tokens)
    if (plan := _plan(runner)) is not None:
        batch, rows = runner.input_batch, slice(runner.input_batch.num_reqs)
        step = split(plan, num_scheduled_tokens, batch.num_computed_tokens_cpu[rows], batch.num_prompt_tokens[rows])
        announced.announce(step)
    return result


def _dispatch_v1(dispatch: Callable, runner: Any, *args, force_eager: bool = False, **kwargs) -> Any:
    return dispatch(runner, *args, force_eager=force_eager or announced.pruning is not None, **kwargs)


# --- V2: read in vLLM's source, and not run: it needs Triton ----------------------------------------------------------


def _announce_v2(gather: Callable, runner: Any, scheduler_output: Any, dummy_run: bool) -> Any:
    batch, uniform = gather(runner, scheduler_output, dummy_run)
    if batch is None or (plan := _plan(runner)) is None:
        return batch, uniform
    prompts = getattr(runner.model_state, "prompts", None)
    if prompts is None:
        raise InputError("this engine cannot prune: its model runner did not ask the model for its model state.")
    requests = batch.idx_mapping_np
    computed = batch.num_computed_prefill_tokens_np
    # Only prompts hold context. Of a row that has passed its own, computed tokens count up to the prompt's end.
    computed = np.where(batch.is_prefilling_np, computed, prompts[requests])
    step = split(plan, batch.num_scheduled_tokens, computed, prompts[requests])
    announced.announce(step)
    # Without a uniform number of tokens per row, a step with a prompt replays no decode graph.
    return batch, None if step.prunes else uniform


@functools.cache
def model_state_class() -> type:
    """The default model state of the newer runner, with the length of every request's own prompt."""

    class PromptLengths(private.ModelStateV2):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.prompts = np.zeros(self.max_num_reqs, dtype=np.int64)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.prompts[req_index] = new_req_data.prompt_len

        def prepare_attn(self, input_batch: Any, cudagraph_mode: Any, *args, **kwargs) -> dict:
            if announced.pruning is not None and cudagraph_mode.name == "FULL":
                raise RuntimeError("a step with context tokens was dispatched to a graph of whole steps")
            return super().prepare_attn(input_batch, cudagraph_mode, *args, **kwargs)

    return PromptLengths
