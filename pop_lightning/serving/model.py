"""A model of vLLM with the pruned prefill: two stages of its own pipeline, run in one process.

``PopLlamaForCausalLM`` and its like are subclasses of vLLM's own models, made when they are asked for. A step without
context tokens runs the unmodified model, compiled and captured as vLLM likes. In a step with context, the layers below
the depth run as the first stage of a pipeline over all tokens and the others as its second stage over the kept ones, so
that embeddings, scalings, residuals and the final norm are the family's own.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import Kept
from pop_lightning.generation.artifact import read_artifact
from pop_lightning.serving import private, runner
from pop_lightning.serving.arguments import PREFIX, check_config
from pop_lightning.serving.attention import pruned_backend
from pop_lightning.serving.projections import Projections, PrunedLayer
from pop_lightning.serving.report import Report
from pop_lightning.serving.self_check import check_model
from pop_lightning.serving.steps import Step, announced


def __getattr__(name: str) -> type:
    """``PopLlamaForCausalLM``: vLLM's ``LlamaForCausalLM`` with the pruned prefill."""
    architecture = name.removeprefix(PREFIX)
    if architecture == name or architecture not in private.ModelRegistry.models:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return _pruned(architecture)


@functools.cache
def _pruned(architecture: str) -> type:
    model = private.ModelRegistry.models[architecture].load_model_cls()
    return type(f"{PREFIX}{architecture}", (PrunedModel, model), {"__module__": __name__})


class PrunedModel(nn.Module):
    """Mixed into a model class of vLLM; reads the artifact that the configuration names."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        private.probe(*((private.NAMES_V2,) if vllm_config.use_v2_model_runner else ()))
        check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.family = type(self).__name__.removeprefix(PREFIX)
        self.engine_config = vllm_config
        self.artifact = read_artifact(config.pop["artifact"])
        self.plan = self.artifact.plan
        if Kept.of(config.pop["plan"]).at(config.pop["plan"]["depth"]) != self.plan:
            raise InputError(f"the artifact {self.artifact.folder} has changed since the engine's arguments were made.")
        inner = getattr(self, "model", None)
        if not all(hasattr(inner, part) for part in ("layers", "start_layer", "end_layer")):
            raise InputError(f"{self.family} cannot be served pruned: it does not divide into pipeline stages.")
        self.pruned = [
            PrunedLayer(inner.layers[layer], layer, self.family) for layer in self.plan.pruned(len(inner.layers))
        ]
        for each in self.pruned:
            each.attn.attn_backend = pruned_backend(each.attn.attn_backend)
        self.projections: Projections | None = None
        self.report = Report(self.plan.depth, len(inner.layers), public=private.tensor_rank() == 0)
        runner.hook(v2=vllm_config.use_v2_model_runner)

    # --- loading --------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load the base, comparing its tensors with those that the artifact was made for, and build the projections."""
        config = self.engine_config.model_config
        check = self.artifact.checkpoint_check(config.model)
        loaded = super().load_weights(check.watch(weights))
        check.finish(quantized=self.engine_config.quant_config is not None)
        # What waits for its layers stays below what a feed-forward branch holds, which memory was profiled with.
        width = getattr(config.hf_config, "intermediate_size", None) or 4 * config.hf_config.hidden_size
        at_most = 2 * width // private.tensor_ranks()
        self.projections = Projections(self.pruned, self.artifact.state, config.get_total_num_kv_heads(), at_most)
        return loaded

    def get_model_state_cls(self) -> type:
        """The newer runner asks for the class that prepares a model's inputs."""
        return runner.model_state_class()

    def train(self, mode: bool = True) -> "PrunedModel":
        """vLLM ends loading with ``eval()``: then weights are as they will be used, and the model is checked."""
        result = super().train(mode)
        if not mode:
            if self.projections is None:
                raise InputError(
                    f"--load-format {self.engine_config.load_config.load_format} loads weights past the model, so that "
                    "the pruned prefill cannot be set up: leave it out."
                )
            check_model(self)
        return result

    # --- running --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        step = announced.take()
        if step is None:
            _check_dummy()
        if step is None or not step.prunes:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        self.report.add(step)
        return self._pruned_step(step, input_ids, positions, inputs_embeds)

    def _pruned_step(self, step: Step, input_ids: Tensor | None, positions: Tensor, embeds: Tensor | None) -> Tensor:
        """Both stages of one step; hidden states of context tokens are zeros, since no logits are made of them."""
        context = torch.from_numpy(step.context_tokens).to(positions.device)
        kept = torch.from_numpy(step.kept_tokens).to(positions.device)
        state = self.first_stage(input_ids, positions, embeds)
        hidden = context_hidden(state, context)
        slots = private.get_forward_context().slot_mapping
        for layer, kv in self.projections(hidden):
            keys, values = layer.cacheable(kv, positions[context])
            layer.write(keys, values, slots[layer.attn.layer_name][context])
        output = hidden.new_zeros(len(positions), hidden.shape[-1])
        if len(kept):
            with self._slots_of(kept):
                output[kept] = self.second_stage(state, positions, kept)
        return output

    def first_stage(self, input_ids: Tensor | None, positions: Tensor, embeds: Tensor | None = None) -> Any:
        """Layers below the depth over all tokens: what a pipeline's first rank sends on."""
        with self._stage(0, self.plan.depth, first=True):
            return self.model.forward(input_ids, positions, None, embeds)

    def second_stage(self, state: Any, positions: Tensor, kept: Tensor) -> Tensor:
        """The pruned layers and the final norm over ``kept`` tokens, ``[kept, hidden]``."""
        received = private.IntermediateTensors({name: each[kept] for name, each in state.tensors.items()})
        with self._stage(self.plan.depth, len(self.model.layers), first=False):
            return self.model.forward(None, positions[kept], received)

    @contextmanager
    def _stage(self, start: int, end: int, first: bool) -> Iterator[None]:
        """Inside, the inner model is one stage of a pipeline of two: layers ``start .. end-1``."""
        inner, state = self.model, private.parallel_state
        whole, group = (inner.start_layer, inner.end_layer), state._PP
        inner.start_layer, inner.end_layer = start, end
        state._PP = _Stage(group, first)
        try:
            yield
        finally:
            state._PP = group
            inner.start_layer, inner.end_layer = whole

    @contextmanager
    def _slots_of(self, kept: Tensor) -> Iterator[None]:
        """Inside, the slots of the pruned layers are those of the kept tokens."""
        context = private.get_forward_context()
        whole = context.slot_mapping
        names = [each.attn.layer_name for each in self.pruned]
        context.slot_mapping = whole | {name: whole[name][kept] for name in names}
        try:
            yield
        finally:
            context.slot_mapping = whole


class _Stage:
    """vLLM's pipeline group, seen from the first or the last of two ranks."""

    def __init__(self, group: Any, first: bool):
        self.group, self.is_first_rank, self.is_last_rank = group, first, not first

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)


def context_hidden(state: Any, tokens: Tensor) -> Tensor:
    """h_d of ``tokens``: what leaves a stage is the last branch's output and the residual stream it is added to."""
    return sum(each[tokens] for each in state.tensors.values())


def _check_dummy() -> None:
    """Without an announced step this must be a dummy run, which has no slots to write to.

    Raises:
        InputError: it is not: the runner in use has no hook, and the full model would be served.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # nothing may be read while a graph is captured, and no request is served either
    slots = private.get_forward_context().slot_mapping
    if isinstance(slots, dict) and any(bool((each >= 0).any()) for each in slots.values()):
        raise InputError(
            "this engine cannot prune: its model runner did not say which tokens of a step are context. Serve with "
            "vLLM's own model runner, or the base without the artifact."
        )
