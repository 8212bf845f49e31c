"""StageAwareGenerator: a Transformers model whose prefill is pruned and whose everything else is as it was."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from pop_lightning.decoder import Decoder, position_ids
from pop_lightning.errors import InputError
from pop_lightning.plan import PruningPlan
from pop_lightning.prefill import StageAwarePrefill, check_decoder
from pop_lightning.projections import KVProjections

_PLAN = "_pop_plan"


class StageAwareGenerator:
    """Generate with a pruned prefill (arXiv 2602.03295): the model itself is never changed.

    Args:
        model: a Transformers causal language model.
        plan: depth and boundary.
        projections: key/value projections for the pruned layers; the layers' own (reuse) unless given.
        tokenizer: kept for callers that want it; generation takes token ids.

    Raises:
        InputError: the plan does not fit the model, or the model is of an unsupported build (named, with the reason).
    """

    def __init__(
        self, model: PreTrainedModel, plan: PruningPlan, projections: KVProjections | None = None, tokenizer=None
    ):
        decoder = projections.decoder if projections is not None else Decoder(model)
        plan.check(decoder.num_layers)
        if projections is not None and projections.depth != plan.depth:
            raise InputError(f"the projections were made for depth {projections.depth}, the plan says {plan.depth}.")
        check_decoder(decoder)
        self.model = model
        self.plan = plan
        self.tokenizer = tokenizer
        self.decoder = decoder
        self.projections = projections if projections is not None else KVProjections(decoder, plan.depth)
        self._prefill = StageAwarePrefill(self.projections, plan)
        self._pruning = True

    @classmethod
    def from_artifact(
        cls, path: str | Path, base: str | PreTrainedModel | None = None, **load
    ) -> "StageAwareGenerator":
        """Load what ``pop-fit`` exported.

        Args:
            path: the ``artifact/`` folder.
            base: hub id, folder or loaded model; the base that the artifact names unless given.
            load: keyword arguments for ``from_pretrained`` of the base (dtype, device_map, attn_implementation, ...).

        Raises:
            InputError: the artifact is damaged, or was made for another base.
        """
        from pop_lightning.artifact import check_base, read_artifact
        from pop_lightning.models import load_model, load_tokenizer

        artifact = read_artifact(path)
        tokenizer = None
        if base is None or isinstance(base, (str, Path)):
            name = artifact.config["base"]["id"] if base is None else str(base)
            revision = artifact.config["base"].get("revision") if base is None else load.pop("revision", None)
            tokenizer = load_tokenizer(name, revision=revision, required=False)
            base = load_model(name, revision=revision, **load)
        check_base(artifact, base)
        decoder = Decoder(base)
        projections = KVProjections.from_state(decoder, artifact.plan.depth, artifact.kind, artifact.state)
        return cls(base, artifact.plan, projections, tokenizer)

    @contextmanager
    def full_model(self):
        """Pruning off: inside, ``generate`` and ``prefill`` are the plain model's."""
        before, self._pruning = self._pruning, False
        try:
            yield self
        finally:
            self._pruning = before

    def generate(self, inputs: Tensor | None = None, **kwargs):
        """Hugging Face ``generate``: the same arguments, the same return value."""
        if not self._pruning:
            return self.model.generate(inputs, **kwargs)
        if kwargs.get("use_cache") is False:
            raise InputError("pruned generation keeps the context in a cache; found use_cache=False.")
        cache = kwargs.get("past_key_values")
        with self._guard(cache), self._prefill.attached(self._prompt_length(inputs, kwargs, cache)):
            output = self.model.generate(inputs, **kwargs)
        if isinstance(getattr(output, "past_key_values", None), Cache):
            self._mark(output.past_key_values)
        return output

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        last: bool = True,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """One prefill.

        Args:
            input_ids: ``[batch, tokens]``, the uncached tokens of the prompt, left-padded.
            attention_mask: ``[batch, cached + tokens]``.
            past_key_values: a cache to extend; a new one unless given.
            last: False makes every token context (a shared prefix, a chunk of a longer prompt).

        Returns:
            ``logits`` ``[batch, 1, vocabulary]`` of the last token and the filled ``past_key_values``. With
            ``last=False`` the logits are those of a last token that stopped at the depth: not for sampling.
        """
        tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        cache = past_key_values if past_key_values is not None else self.decoder.new_cache()
        total = int(cache.get_seq_length()) + tokens.shape[1]
        if attention_mask is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = position_ids(attention_mask)[:, -tokens.shape[1] :]
        call = {"input_ids": input_ids, "attention_mask": attention_mask, "past_key_values": cache, "use_cache": True}
        if not self._pruning:
            return self.model(**call, logits_to_keep=1, **kwargs)
        with self._guard(cache), self._prefill.attached(total, last=last):
            output = self.model(**call, logits_to_keep=1, **kwargs)
        self._mark(output.past_key_values)
        return output

    def _prompt_length(self, inputs: Tensor | None, kwargs: dict, cache: Cache | None) -> int:
        """Tokens of the prompt, cached ones included, as ``generate`` will count them."""
        prompt = kwargs.get("inputs_embeds")
        if prompt is None:
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is None:
            raise InputError("generate needs a prompt: input_ids or inputs_embeds.")
        cached = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        # As in generate: ids as long as the mask are the whole sequence, shorter ones are what follows the cache.
        whole = mask is None or mask.shape[1] == prompt.shape[1] or cached == 0
        return prompt.shape[1] if whole else cached + prompt.shape[1]

    @contextmanager
    def _guard(self, cache: Cache | None):
        """Refuse a cache that was filled under another plan: its context would not be what this plan projects."""
        mark = getattr(cache, _PLAN, None)
        if mark is not None and mark != self.plan.fingerprint:
            raise InputError(
                "past_key_values were filled under another pruning plan; prefill them with this generator."
            )
        yield

    def _mark(self, cache: Cache) -> None:
        setattr(cache, _PLAN, self.plan.fingerprint)
