"""StageAwareGenerator: a Transformers model whose prefill is pruned; everything else is unchanged.

It holds a base, a plan and projections, and runs Transformers' own ``generate``. Hooks are attached to the pruned
layers until the prompt has been read (``prefill.py``); decode steps run without them. Supported: sampling,
beams, several return sequences, logits processors, guidance, stopping criteria, streamers, assisted and prompt-lookup
decoding, chunked prefill, prefixes, second turns, ``inputs_embeds``, images and videos; dynamic, static, sliding and
quantized caches; compiled models (the prefill runs uncompiled, decode compiled); offloaded and quantized bases; sdpa,
eager, flash and flex attention; several threads at once. Where pruning is visible:

- ``output_hidden_states``, ``output_attentions``: the prefill's entries above the depth have a row per boundary token,
  ``[batch, boundary, ...]``, because the others do not exist; refused with ``boundary=0`` and with assisted decoding.
- Salient tokens: refused with ``output_hidden_states`` and ``output_attentions``, with flash attention, and for layers
  that scale queries by their position (Llama 4's without RoPE). :attr:`StageAwareGenerator.selected` has the tokens
  that were selected. Of a prompt that is read in parts (chunks, second turns), each part selects its share among its
  own tokens; a prefix (``prefill(last=False)``) selects as a prompt does. Images whose tokens attend to later ones
  (Gemma) are not selected.
- A boundary or a number of salient tokens that is a share of the prompt counts each row's own tokens, padding left out.
  As a boundary over rows of different lengths it is refused where salient tokens are.
- ``past_key_values``: a cache carries its plan and the identity of its projections; one of another plan or of other
  projections is refused, one of the plain model is accepted. A filled one is refused for assisted decoding, and so
  is one that holds the whole prompt. It can be cropped down to the end of the prompt, but not inside it.
- M-RoPE: a cache records how many positions its images used, so a second turn continues its own conversation, whatever
  the model ran in between.
- ``pixel_values``: where images attend to their own later tokens (Gemma), a boundary that begins inside one is refused.
- A forward without a cache (``generator(input_ids)``) is refused: it does not say where its prompt ends. With a
  filled cache it is a decode step. So lm-eval's ``HFLM(generator)`` measures generation tasks and refuses
  log-likelihood ones, which ``harness.model.PopLM`` runs; ``HFLM(generator.model)`` and
  ``pipeline(..., model=generator.model)`` run the unpruned model.
- A base that changed after the projections were made (adapters, training): reused projections follow it, fitted ones
  are refused.
- ``guidance_scale``: the unconditional branch is prefilled by the plain model.
- Refused by name before the first token: ``use_cache=False``, offloaded and paged caches, ``token_healing``, the model
  as its own assistant, ``assistant_early_exit``, ``use_mtp``, ``speculation_type="dflash"``, flex attention together
  with a compiled model or ``prefill_chunk_size``.
"""

import threading
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.data.processor import VisionProcessor
from pop_lightning.generation.base_watch import BaseWatch
from pop_lightning.generation.refusals import refuse_unsupported
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.loading import end_tokens, plain_generate
from pop_lightning.models.names import CACHE, name_cache
from pop_lightning.pruning.attach_check import check_decoder
from pop_lightning.pruning.prefill import StageAwarePrefill
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.pruning.salient import depends_on_padding

_MARK = "_pop_mark"  # on a cache: who filled it
_SHIFT = "_pop_rotary_shift"  # on a cache: Positions.shift of what it holds


class StageAwareGenerator:
    """Generate with a pruned prefill (arXiv 2602.03295): the model itself is never changed.

    Args:
        model: a Transformers causal language model.
        plan: depth, boundary and salient tokens.
        projections: key/value projections for the pruned layers; the layers' own (reuse) unless given.
        tokenizer, vision: kept for callers; generation itself works on token ids and image tensors.

    Attributes:
        artifact_folder: of the artifact that it was loaded from; None where there is none, or the base changed since.

    Raises:
        InputError: the plan does not fit the model, or the model is not supported (the message gives the reason).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: PruningPlan,
        projections: KVProjections | None = None,
        tokenizer=None,
        vision: VisionProcessor | None = None,
    ):
        decoder = projections.decoder if projections is not None else Decoder(model)
        plan.check(decoder.num_layers)
        decoder.check_depth(plan.depth)
        if projections is not None and projections.depth != plan.depth:
            raise InputError(f"the projections were made for depth {projections.depth}, the plan says {plan.depth}.")
        check_decoder(decoder)
        self.model = model
        self.plan = plan
        self.tokenizer, self.vision = tokenizer, vision
        self.artifact_folder: Path | None = None
        self._use(projections if projections is not None else KVProjections(decoder, plan.depth))
        self._thread = threading.local()

    def _use(self, projections: KVProjections) -> None:
        self.decoder, self.projections = projections.decoder, projections
        projections.stack()  # now, so that the first prefill does not pay for it in time or memory
        self._prefill = StageAwarePrefill(projections, self.plan)
        self._mark = f"{self.plan.fingerprint} {projections.fingerprint}"
        self._watch = BaseWatch(self.decoder, self.plan.pruned(self.decoder.num_layers))

    def __repr__(self) -> str:
        plan, layers = self.plan, self.decoder.num_layers
        kept = f", salient {plan.salient} ({plan.selector})" if plan.salient else ""
        return (
            f"StageAwareGenerator({self.decoder.name}, depth {plan.depth} of {layers}, boundary {plan.boundary}{kept})"
        )

    def _follow_base(self) -> None:
        """Adapt to changes of the base since the last call: it may have been moved, cast, adapted or trained.

        Raises:
            InputError: its keys and values changed, and the projections were fitted to the old ones.
        """
        self.projections.place()
        if not self._watch.changed():
            return
        if self.projections.replaced:
            raise InputError(
                "the base's keys and values changed (an adapter or new weights) after its projections were fitted: "
                "make a new generator with projections that are fitted to the changed base, or restore the base."
            )
        self._use(KVProjections(Decoder(self.model), self.plan.depth))
        self.artifact_folder = None

    @classmethod
    def from_artifact(
        cls,
        path: str | Path,
        base: str | PreTrainedModel | None = None,
        *,
        revision: str | None = None,
        base_revision: str | None = None,
        **load,
    ) -> "StageAwareGenerator":
        """Load what ``pop-fit`` exported.

        Args:
            path: the ``artifact/`` folder, or a repository of the hub such as ``user/llama-pop``.
            base: hub id, folder or loaded model; the base that the artifact names unless given.
            revision: branch, tag or commit of the artifact's repository.
            base_revision: of the base's repository; the commit that the artifact names unless given.
            load: keyword arguments for ``from_pretrained`` of the base (dtype, device_map, attn_implementation,
                quantization_config, ...).

        Raises:
            InputError: the artifact is damaged, or was made for another base.
        """
        from pop_lightning.data.processor import vision_processor
        from pop_lightning.generation.artifact import read_artifact
        from pop_lightning.generation.hub import fetch
        from pop_lightning.models.loading import load_model, load_tokenizer

        artifact = read_artifact(fetch(path, revision))
        tokenizer = name = None
        if base is None or isinstance(base, (str, Path)):
            name = artifact.config["base"]["id"] if base is None else str(Path(base).expanduser())
            if base is None and Path(name).is_absolute() and not Path(name).is_dir():
                raise InputError(
                    f"the base of the artifact {artifact.folder} is no longer at {name}; give its current "
                    "folder, or its hub id (--base)."
                )
            if base is None and base_revision is None:
                base_revision = artifact.config["base"].get("revision")
            trusted = load.get("trust_remote_code", False)
            tokenizer = load_tokenizer(name, revision=base_revision, trust_remote_code=trusted, required=False)
            try:
                loaded = load_model(name, revision=base_revision, **load)
            except InputError as error:
                if base is not None:
                    raise
                moved = (
                    f"the base of the artifact {artifact.folder} cannot be loaded; if it is elsewhere, give --base ("
                )
                raise InputError((moved, error, ")")) from error
            base = loaded
        artifact.check_base(base)
        decoder = Decoder(base)
        projections = KVProjections.from_state(decoder, artifact.plan.depth, artifact.kind, artifact.state)
        vision = None
        if name is not None:
            vision = vision_processor(decoder.vision_tokens, name, revision=base_revision, trust_remote_code=trusted)
        generator = cls(base, artifact.plan, projections, tokenizer, vision)
        generator.artifact_folder = artifact.folder
        return generator

    def to(self, *args, **kwargs) -> "StageAwareGenerator":
        """Move or cast the model, as ``model.to`` does, and its projections with it; returns self."""
        self.model.to(*args, **kwargs)
        self.projections.place().stack()
        return self

    def save_pretrained(self, folder: str | Path, base: str | None = None) -> None:
        """Write plan and projections as an artifact that :meth:`from_artifact` loads; base weights are not copied.

        No measured figures are written: those of a loaded artifact are only valid for its own weights and dtype.

        Args:
            folder: becomes the artifact.
            base: hub id or folder of the base; by default the name under which the model was loaded.

        Raises:
            InputError: the base has no name, it has an adapter that is not merged, or the folder cannot be written.
        """
        from pop_lightning.generation.artifact import write_artifact
        from pop_lightning.generation.base_identity import base_identity

        name = base or self.name_or_path
        if not name:
            raise InputError(
                "an artifact names its base, and this model was not loaded from a hub id or a folder: save it "
                "(model.save_pretrained) and give its folder as base."
            )
        self._follow_base()
        write_artifact(
            folder,
            plan=self.plan,
            kind=self.projections.kind,
            state=self.projections.fitted_state(),
            base=base_identity(self.model, str(name)),
        )

    def push_to_hub(
        self,
        repository: str,
        *,
        base: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Publish plan and projections on the hub, with a model card; base weights are not copied.

        A generator that was loaded from an artifact publishes that one, with what was certified; every other one what
        :meth:`save_pretrained` writes.

        Args:
            repository: ``user/name``; made unless it exists.
            base: hub id of the base, where it is not the name under which the model was loaded.
            revision: branch, made unless it exists.
            private: of a repository that is made.
            message: of the commit.
            token: of the account; the one that is logged in unless given.

        Returns:
            The address of the commit.

        Raises:
            InputError: the hub cannot be reached or refuses, or as :meth:`save_pretrained` does.
        """
        from pop_lightning.generation.hub import push

        options = {"revision": revision, "private": private, "message": message, "token": token}
        self._follow_base()
        if base is None and self.artifact_folder is not None:
            return push(self.artifact_folder, repository, **options)
        with TemporaryDirectory(prefix="pop-artifact-") as temporary:
            folder = Path(temporary) / "artifact"
            self.save_pretrained(folder, base)
            return push(folder, repository, **options)

    # --- what a Transformers pipeline and lm-eval's HFLM read of a model ------------------------------------------

    def __call__(self, input_ids: Tensor | None = None, **kwargs) -> CausalLMOutputWithPast:
        """One forward of the model over tokens that follow a filled cache (decode steps run every layer).

        Raises:
            InputError: no cache is filled: such a forward does not say where its prompt ends, so it can neither be
                pruned nor be taken for a measurement of the pruned model.
        """
        kwargs = name_cache(kwargs)
        if self._pruning and not _held(kwargs.get(CACHE)):
            raise InputError(
                "a forward without a filled cache does not say where its prompt ends, so it cannot be pruned "
                "(log-likelihood tasks of lm-eval run such forwards): use generate or prefill, or full_model() for "
                "the plain model."
            )
        return self.model(input_ids, **kwargs)

    def can_generate(self) -> bool:
        return True

    def eval(self) -> "StageAwareGenerator":
        self.model.eval()
        return self

    def tie_weights(self) -> None:
        self.model.tie_weights()

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def name_or_path(self) -> str:
        return self.model.name_or_path

    @property
    def hf_device_map(self) -> dict:
        """Where accelerate placed the model; as on the model, there is no such attribute if it did not."""
        return self.model.hf_device_map

    @property
    def input_modalities(self):
        return self.model.input_modalities

    @property
    def output_modalities(self):
        return self.model.output_modalities

    @contextmanager
    def full_model(self):
        """Pruning off on this thread: inside, ``generate`` and ``prefill`` run the plain model."""
        before = self._pruning
        self._thread.pruning = False
        try:
            yield self
        finally:
            self._thread.pruning = before

    @property
    def selected(self) -> Tensor | None:
        """The salient tokens of this thread's last prefill: positions in the padded prompt, ``[batch, salient]``."""
        return getattr(self._thread, "selected", None)

    @property
    def _pruning(self) -> bool:
        return getattr(self._thread, "pruning", True)

    def generate(self, inputs: Tensor | None = None, **kwargs):
        """Hugging Face ``generate``: the same arguments, the same return value.

        Raises:
            InputError: before the first token, for a feature that this module's docstring lists as refused.
        """
        kwargs = name_cache(kwargs)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if not self._pruning:
            shift = self._place_tokens(ids, kwargs, _held(kwargs.get(CACHE))) if self.decoder.positions.mrope else None
            return self._leave(plain_generate(self.model)(inputs, **kwargs), shift)
        self._follow_base()
        if kwargs.get("use_cache") is None and self.model.generation_config.use_cache is False:
            kwargs["use_cache"] = True  # saved by training with gradient checkpointing, not requested by the caller
        padding = self._padding(ids, kwargs)
        refuse_unsupported(self.model, self.decoder, self.plan, lambda name: self._setting(kwargs, name), padding)
        cache = kwargs.get(CACHE)
        cached = self._claim(cache)
        length = self._prompt_length(inputs, kwargs, cached)
        chunked = self._setting(kwargs, "prefill_chunk_size") is not None
        self._check_boundary(ids, kwargs, length, padding)
        shift = self._place_tokens(ids, kwargs, cached) if self.decoder.positions.mrope else None
        with self._prefill.attached(length, cached=cached, compiled=chunked, padding=padding) as run:
            output = plain_generate(self.model)(inputs, **kwargs)
        self._thread.selected = run.selected
        if isinstance(getattr(output, CACHE, None), Cache):
            self._claim(output[CACHE])
        return self._leave(output, shift)

    def _leave(self, output, shift: Tensor | None):
        """Store the shift for a later turn on the cache that ``generate`` returned, one row per sequence."""
        cache = getattr(output, CACHE, None)
        if isinstance(cache, Cache) and shift is not None:
            setattr(cache, _SHIFT, shift.repeat_interleave(len(output.sequences) // len(shift), 0))
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
            past_key_values: a cache to extend (``cache`` in newer versions of Transformers); a new one unless given.
            last: False makes every token context (a shared prefix, a chunk of a longer prompt).

        Returns:
            ``logits`` ``[batch, 1, vocabulary]`` of the last token and the filled ``past_key_values`` (``cache``). With
            ``last=False`` the logits are those of a last token that stopped at the depth: not for sampling.
        """
        kwargs = name_cache(kwargs | {"past_key_values": past_key_values})
        given_cache = kwargs.pop(CACHE, None)
        tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if tokens is None or not tokens.shape[1]:
            raise InputError("prefill needs at least one token: input_ids or inputs_embeds.")
        cache = given_cache if given_cache is not None else self.decoder.new_cache()
        if self._pruning:
            self._follow_base()
            padding = self._padding(None, {"attention_mask": attention_mask})
            given = kwargs | {CACHE: cache}
            refuse_unsupported(self.model, self.decoder, self.plan, given.get, padding if last else None)
        cached = self._claim(given_cache) if self._pruning else _held(given_cache)
        length = cached + tokens.shape[1]
        if self._pruning and last:
            self._check_boundary(input_ids, kwargs, length, padding)
        if attention_mask is None and self.decoder.positions.mrope:
            attention_mask = tokens.new_ones(len(tokens), length, dtype=torch.long)
        call = {"input_ids": input_ids, "attention_mask": attention_mask, CACHE: cache, "use_cache": True}
        call |= kwargs
        shift = self._place_tokens(input_ids, call, cached)
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"][..., -tokens.shape[1] :]
        if not self._pruning:
            output = self.model(**call, logits_to_keep=1)
        else:
            with self._prefill.attached(length, cached=cached, last=last, padding=padding) as run:
                output = self.model(**call, logits_to_keep=1)
            self._thread.selected = run.selected
            self._claim(cache)
        setattr(cache, _SHIFT, shift)
        self.decoder.positions.remember(shift)
        return output

    def _place_tokens(self, ids: Tensor | None, call: dict, cached: int) -> Tensor | None:
        """Put every token's position into ``call``, and the mask it is computed from, unless the caller gave them.

        M-RoPE models would otherwise use what they remember of their last pass, which may be of another conversation.
        Returns the shift for a later turn.
        """
        mask = call.get("attention_mask")
        if mask is None and ids is not None and self.decoder.positions.mrope:
            mask = call["attention_mask"] = self._mask_of(ids, call)
        if not isinstance(mask, Tensor) or mask.dim() != 2 or call.get("position_ids") is not None:
            return None
        shift = getattr(call.get(CACHE), _SHIFT, None)
        call["position_ids"] = self.decoder.positions(ids, mask, call, cached, shift)
        return self.decoder.positions.shift(call["position_ids"], mask)

    def _mask_of(self, ids: Tensor, call: dict) -> Tensor:
        """The mask that ``generate`` derives from token ids: pad tokens are padding unless they also end a response."""
        pad = self._setting(call, "pad_token_id")
        if pad is None or pad in end_tokens(self.model):
            return torch.ones_like(ids)
        return (ids != pad).long()

    def _padding(self, ids: Tensor | None, call: dict) -> Tensor | None:
        """Padding tokens in front of each row, ``[batch]``, if there are any and the plan has shares of the prompt."""
        if not depends_on_padding(self.plan):
            return None
        mask = call.get("attention_mask")
        if mask is None and ids is not None:
            mask = self._mask_of(ids, call)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        padding = (mask == 0).sum(-1)
        return padding if padding.any() else None

    def _check_boundary(self, ids: Tensor | None, kwargs: dict, length: int, padding: Tensor | None) -> None:
        """Raise if the boundary begins inside an image that cannot be split between context and boundary.

        Args:
            length: of the prompt, cached tokens and padding included.
            padding: :meth:`_padding`.
        """
        if ids is None or not self.decoder.vision.see_ahead or kwargs.get("pixel_values") is None:
            return
        # Only the two tokens around the split go to the host, so the copy does not grow with the prompt.
        lengths = [length] * len(ids) if padding is None else (length - padding).tolist()
        boundaries = [self.plan.boundary_of(each) for each in lengths]
        firsts = torch.tensor([[min(max(ids.shape[1] - k, 1), ids.shape[1] - 1)] for k in boundaries])
        pairs = ids.gather(1, (firsts + torch.tensor([-1, 0])).clamp(min=0).to(ids.device)).tolist()
        for row, (k, pair) in enumerate(zip(boundaries, pairs, strict=True)):
            if 0 < k < ids.shape[1] and self.decoder.vision.split_by(pair, 1):
                raise InputError(
                    f"boundary {k} begins inside an image of prompt {row + 1} of the batch, whose "
                    f"tokens attend to one another; choose a boundary that ends before the image or holds all of it."
                )

    def _prompt_length(self, inputs: Tensor | None, kwargs: dict, cached: int) -> int:
        """Tokens of the prompt, cached ones included, as ``generate`` will count them."""
        prompt = kwargs.get("inputs_embeds")
        if prompt is None:
            prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is None:
            return 1  # generate starts from only the BOS token
        if not prompt.shape[1] and not cached:
            raise InputError("the prompt is empty: generation needs at least one token, such as the BOS token.")
        mask = kwargs.get("attention_mask")
        # As in generate: a prompt as long as the mask is the whole sequence, a shorter one is what follows the cache.
        whole = mask is None or mask.shape[1] == prompt.shape[1] or not cached
        if whole and prompt.shape[1] <= cached:
            raise InputError(
                f"past_key_values already hold {cached} tokens and the prompt has {prompt.shape[1]}; pass the whole "
                f"sequence with at least one token more, or its new tokens with the whole sequence's attention_mask."
            )
        return prompt.shape[1] if whole else cached + prompt.shape[1]

    def _claim(self, cache: Cache | None) -> int:
        """Put this generator's mark on a cache; returns how many tokens it holds.

        A cache that another plan or other projections filled is refused: its context differs from what these
        produce. One that the plain model filled is accepted: its keys and values are exact.
        """
        if cache is None:
            return 0
        held = _held(cache)
        mark = getattr(cache, _MARK, None)
        if held and mark is not None and mark != self._mark:
            what = "other projections" if mark.split()[0] == self.plan.fingerprint else "another pruning plan"
            raise InputError(f"past_key_values were filled under {what}; prefill them with this generator.")
        setattr(cache, _MARK, self._mark)
        return held

    def _setting(self, kwargs: dict, name: str):
        """A generation setting as ``generate`` will see it: argument, ``generation_config``, the model's own."""
        for source in (kwargs.get("generation_config"), self.model.generation_config):
            kwargs = {name: getattr(source, name, None)} | {k: v for k, v in kwargs.items() if v is not None}
        return kwargs[name]


# Transformers' table of classes for the text-generation pipeline, which logs an error for every other class.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("pop_lightning", StageAwareGenerator.__name__)


def _held(cache: Cache | None) -> int:
    return 0 if cache is None else int(cache.get_seq_length())
