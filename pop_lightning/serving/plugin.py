"""The entry point ``vllm.general_plugins``, called in every process of every vLLM in this environment.

It costs an ordinary engine nothing: pruned models are registered by name, and what is wrapped asks for a plan first.
"""

import logging
from collections.abc import Callable
from typing import Any

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.serving import private
from pop_lightning.serving.arguments import PREFIX, check_config, plan_of
from pop_lightning.serving.prefix_cache import keyed_hasher


def register() -> None:
    """Register a pruned class for every model that generates, and wrap what must know the plan.

    A version of vLLM without one of the names stays usable for ordinary models; loading an artifact refuses it.
    """
    try:
        models = private.ModelRegistry.models
        for name in [each for each in models if each.endswith("ForCausalLM") and not each.startswith(PREFIX)]:
            _register(f"{PREFIX}{name}", private.config_checks.get(name, private.ConfigCheck))
        private.wrap("engine_start", _note_plan)
        private.wrap("block_hasher", _make_hasher)
        private.wrap("process_inputs", _process)
        private.wrap("beam_search", _check_beam_search)
    except InputError as error:
        logging.getLogger("vllm.pop_lightning").debug("%s", error)


def _register(name: str, checks: type) -> None:
    class PrunedConfigCheck(checks):
        """vLLM's own check of an architecture's configuration, then that of the pruned prefill."""

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            check_config(vllm_config)

    private.ModelRegistry.register_model(name, f"pop_lightning.serving.model:{name}")
    private.config_checks[name] = PrunedConfigCheck


# The plan of the engine that is starting in this process: an engine sets up its caches, then makes its block hasher.
_starting: list[PruningPlan | None] = [None]


def _note_plan(start: Callable, engine: Any, vllm_config: Any) -> Any:
    _starting[0] = plan_of(vllm_config)
    return start(engine, vllm_config)


def _make_hasher(make: Callable, hash_block_size: int, caching_hash_fn: Callable) -> Callable:
    plan = _starting[0]
    if plan is None:
        return make(hash_block_size, caching_hash_fn)
    return keyed_hasher(plan, make, hash_block_size, caching_hash_fn)


def _process(process: Callable, processor: Any, request_id: str, prompt: Any, params: Any, *args, **kwargs) -> Any:
    """Refuse requests that an engine with the pruned prefill cannot answer."""
    if plan_of(processor.vllm_config) is not None:
        if any(getattr(params, name, None) is not None for name in ("prompt_logprobs", "prompt_logprob_token_ids")):
            raise private.RequestError(
                "prompt_logprobs (and echo with logprobs) need every prompt token at the last layer, which the pruned "
                "prefill does not compute: leave it out, or serve the base."
            )
        if kwargs.get("resumable"):
            raise private.RequestError(
                "a prompt that grows while it is answered (streaming input) is not served with the pruned prefill, "
                "since its last token is not known: send it as one request."
            )
    return process(processor, request_id, prompt, params, *args, **kwargs)


def _check_beam_search(begin: Callable, processor: Any, params: Any) -> Any:
    """Refuse beam search: vLLM makes each of its steps a request whose prompt holds the tokens generated so far."""
    if isinstance(params, private.BeamSearchParams) and plan_of(processor.vllm_config) is not None:
        raise private.RequestError(
            "beam search is not served with the pruned prefill, which would take generated tokens for context: sample "
            "instead, or serve the base."
        )
    return begin(processor, params)
