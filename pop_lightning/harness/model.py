"""``pop``: a pruned model as lm-eval sees one, with both stages in every kind of request.

:class:`PopLM` is lm-eval's own ``hf`` model (tokenization, BOS, chat templates, truncation, stop sequences) around a
:class:`~pop_lightning.StageAwareGenerator`. What differs is how requests run:

- ``generate_until``: the generator's ``generate``, so the prompt is pruned and the answer is decoded in full.
- ``loglikelihood`` and ``multiple_choice``: the context is the prompt. It is prefilled once, pruned, for all
  continuations that share it; they run in full over copies of its cache, as decoded tokens do. The ``hf`` model scores
  context and continuation in one forward, which could only prune both or neither.
- ``loglikelihood_rolling``: a text without a prompt has nothing to prune, so the full model scores it.
"""

import logging
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache

from pop_lightning.core.errors import InputError
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models.loading import check_dtype, choose_device
from pop_lightning.models.masks import appendable
from pop_lightning.models.names import CACHE

# Arguments of the ``hf`` model that mean the same here.
SETTINGS = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
)
# A request: its (context, continuation) as text, or None in loglikelihood_rolling, and both as token ids.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
logger = logging.getLogger(__name__)


@register_model("pop")
class PopLM(HFLM):
    """An artifact, or a generator that is already loaded, for ``lm_eval.simple_evaluate`` and lm-eval's command.

    Args:
        artifact: the ``artifact/`` folder that ``pop-fit`` wrote.
        base: hub id or folder of its base; the one that the artifact names unless given.
        generator: use this one instead of an artifact.
        full: run the unpruned model, in the same way (one prefill for the continuations of a context).
        device, dtype, trust_remote_code: how the base is loaded.
        batch_size: prompts per batch, and continuations per batch; ``auto`` as for the ``hf`` model.
        settings: the arguments of the ``hf`` model in :data:`SETTINGS`.

    Raises:
        InputError: neither or both of ``artifact`` and ``generator``, an unknown argument, a base without a tokenizer,
            or one that reads images, which lm-eval's text tasks do not measure.
    """

    def __init__(
        self,
        artifact: str | None = None,
        base: str | None = None,
        *,
        generator: StageAwareGenerator | None = None,
        full: bool = False,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        trust_remote_code: bool = False,
        **settings: Any,
    ):
        if unknown := sorted(set(settings) - set(SETTINGS)):
            raise InputError(f"unknown argument of the pop model: {unknown[0]}.")
        if (artifact is None) == (generator is None):
            given = "neither" if artifact is None else "both"
            raise InputError(f"the pop model needs an artifact (artifact=DIR) or a generator; {given} is given.")
        if generator is None:
            check_dtype(None if dtype == "auto" else dtype)
            if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
                device = None  # lm-eval's command passes cuda:0 by default, and hf falls back as well
            generator = StageAwareGenerator.from_artifact(
                artifact, base, dtype=dtype, trust_remote_code=trust_remote_code
            ).to(choose_device(device))
        if generator.decoder.vision_tokens:
            raise InputError(
                f"{type(generator.model).__name__} reads images, and its tasks need lm-eval's multimodal models, which "
                f"do not run a pruned prefill: expected a text model."
            )
        if generator.tokenizer is None:
            raise InputError("the base has no tokenizer, which lm-eval's tasks need; save one in its folder.")
        self.generator, self.full = generator, full
        with _quiet("lm_eval.models.huggingface"):  # it warns of any model that is given loaded
            super().__init__(
                pretrained=generator,
                backend="causal",
                tokenizer=generator.tokenizer,
                batch_size=batch_size,
                **settings,
            )
        generator.eval()

    def _stages(self):
        """The context in which requests run: the generator's own stages, or the full model."""
        return self.generator.full_model() if self.full else nullcontext()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """One forward without a cache: rolling windows, and the trials of ``batch_size=auto``."""
        with self.generator.full_model():
            return super()._model_call(inps, attn_mask, labels)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            new = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if new >= self.max_length:
                raise InputError(
                    f"task {request.task_name} generates up to {new} tokens, and the model's context is "
                    f"{self.max_length}: lower the task's max_gen_toks (--gen_kwargs max_gen_toks=N)."
                )
        with self._stages():
            return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The sum of each continuation's log-probabilities, and whether greedy decoding would produce it."""
        if all(text is None for text, _, _ in requests):  # windows of loglikelihood_rolling, as HFLM marks them
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        size = self._detect_batch_size() if self.batch_size == "auto" else int(self.batch_size)
        prompts: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            prompts.setdefault(self._prompt(context, continuation), []).append(index)
        longest_first = sorted(prompts, key=lambda prompt: (-len(prompt), prompt))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="Running loglikelihood requests") as progress:
            for start in range(0, len(prompts), size):
                batch = longest_first[start : start + size]
                pairs = [(row, index) for row, prompt in enumerate(batch) for index in prompts[prompt]]
                scored = self._score(batch, [(row, requests[index][2]) for row, index in pairs], size)
                for (_, index), answer in zip(pairs, scored, strict=True):
                    answers[index] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                progress.update(len(pairs))
        return answers

    def _prompt(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What is prefilled: the context, cut from the left to what the ``hf`` model would keep of it."""
        if not continuation or len(continuation) > self.max_length:
            raise InputError(
                f"a continuation has {len(continuation)} tokens: expected 1 to {self.max_length}, the model's context."
            )
        kept = context[-(self.max_length + 1 - len(continuation)) :]
        if len(kept) < len(context):
            logger.warning("a context of %d tokens is cut to its last %d.", len(context), len(kept))
        return tuple(kept)

    @torch.no_grad()
    def _score(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[tuple[int, list[int]]], size: int
    ) -> list[tuple[float, bool]]:
        """Prefill a batch of prompts once, then score continuations, given with the row of their prompt."""
        with self._stages():
            ids, mask = self._padded(prompts, "left")
            prefilled = self.generator.prefill(ids, attention_mask=mask)
            first = self._log_probabilities(prefilled.logits[:, -1:])
            # The last token of a continuation is predicted but never read: choices of one token need no further pass,
            # and choices that differ in their last token share one.
            readers: dict[tuple[int, tuple[int, ...]], list[int]] = {}
            for index, (row, tokens) in enumerate(continuations):
                readers.setdefault((row, tuple(tokens[:-1])), []).append(index)
            answers: list[tuple[float, bool]] = [(0.0, False)] * len(continuations)
            longest_first = sorted(readers, key=lambda reader: (-len(reader[1]), reader))
            for start in range(0, len(readers), size):
                part = longest_first[start : start + size]
                nothing_read = [first[0, :0]] * len(part)  # longest first: then none of the others reads anything
                later = self._continue(prefilled[CACHE], mask, part) if part[0][1] else nothing_read
                for (row, read), steps in zip(part, later, strict=True):
                    steps = torch.cat([first[row], steps[: len(read)]])
                    for index in readers[row, read]:
                        answers[index] = _answer(steps, continuations[index][1])
            return answers

    def _continue(self, cache: Cache, mask: Tensor, part: Sequence[tuple[int, Sequence[int]]]) -> Sequence[Tensor]:
        """Read tokens after the prompts of the given rows; the cache itself stays as it is.

        Returns:
            for each of ``part`` the log-probabilities of what follows each token, ``[tokens, vocabulary]``.
        """
        rows = torch.tensor([row for row, _ in part])  # not on a device: the layers may be on several
        # Padding comes after the tokens that are scored, which cannot see it.
        ids, _ = self._padded([tokens for _, tokens in part], "right")
        positions = mask[rows].sum(-1, keepdim=True) + torch.arange(ids.shape[1], device=mask.device)
        output = self.generator(
            ids,
            attention_mask=torch.cat([mask[rows], torch.ones_like(ids)], dim=-1),
            position_ids=positions,
            **{CACHE: rows_of_cache(cache, rows)},
        )
        return self._log_probabilities(output.logits)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        return F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)

    def _padded(self, sequences: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Token ids and their mask, ``[sequences, tokens]``."""
        rows = {"input_ids": [list(each) for each in sequences]}
        batch = self.tokenizer.pad(rows, padding_side=side, return_tensors="pt")
        return batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)

    def get_model_info(self) -> dict:
        """What lm-eval writes into the ``config`` of its results."""
        model, plan = self.generator.model, self.generator.plan
        pruning = {"full": True} if self.full else {**asdict(plan), "projections": self.generator.projections.kind}
        return {"model_num_parameters": model.num_parameters(), "model_dtype": model.dtype, "pop": pruning}


@contextmanager
def _quiet(name: str):
    """Inside, the logger of that name reports errors only."""
    named = logging.getLogger(name)
    level = named.level
    named.setLevel(logging.ERROR)
    try:
        yield
    finally:
        named.setLevel(level)


def rows_of_cache(cache: Cache, rows: Tensor) -> Cache:
    """A cache of the given rows, in which each may occur several times; ``cache`` stays as it is."""
    chosen = appendable(cache)
    chosen.batch_select_indices(rows)  # every layer makes new tensors
    return chosen


def _answer(steps: Tensor, tokens: list[int]) -> tuple[float, bool]:
    """The log-probability of ``tokens`` and whether each is the most likely; ``steps`` ``[tokens, vocabulary]``."""
    target = torch.tensor(tokens, device=steps.device)
    return float(steps.gather(1, target[:, None]).sum()), bool((steps.argmax(-1) == target).all())
