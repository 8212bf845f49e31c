"""A conversation with a generator: history, the cache reused between turns, and what each turn's prefill cost.

``pop-generate chat`` is this with a terminal around it.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.generation.stream import GREEDY, TextStream, tokenizer_of
from pop_lightning.models.loading import context_length
from pop_lightning.pruning.flops import turn_flops


@dataclass(frozen=True)
class Turn:
    """What a turn read, and how long its first token took.

    Attributes:
        tokens: of the conversation up to the answer.
        cached: of them those that the cache held from earlier turns.
        ttft: seconds until the first token; None for an empty answer.
        pruned: whether the prefill was pruned.
        other: estimated seconds that the other model, plain or pruned, would have taken with the same cache: ``ttft``
            times the ratio of counted operations.
    """

    tokens: int
    cached: int
    ttft: float | None
    pruned: bool
    other: float | None


class Chat:
    """One conversation.

    A cache is reused as far as the new conversation begins with the tokens that it holds. It is dropped where that ends
    inside an earlier prompt (a template that rewrites history), and where :attr:`full` changes, so that no answer of
    the plain model rests on a pruned context.

    Args:
        generator: with a tokenizer that has a chat template.
        system: the system's message, if any.
        max_new_tokens: longest answer.
        sampling: arguments of ``generate`` such as ``temperature``; greedy unless given.

    Attributes:
        messages: the conversation, as chat templates take it.
        full: whether the plain model answers.
        turn: of the last answer.

    Raises:
        InputError: there is no tokenizer, or it has no chat template.
    """

    def __init__(
        self,
        generator: StageAwareGenerator,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Mapping[str, Any] | None = None,
    ):
        self.generator, self.tokenizer = generator, tokenizer_of(generator)
        if not self.tokenizer.chat_template:
            raise InputError("a chat needs a chat template, and the base's tokenizer has none: use a chat model.")
        self.max_new_tokens, self.sampling = max_new_tokens, dict(sampling or GREEDY)
        self.full, self.turn = False, None
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation."""
        self.messages = list(self._system)
        self._forget()

    def use(self, *, full: bool) -> None:
        """Let the plain or the pruned model answer from here on; it reads the conversation anew."""
        if full != self.full:
            self._forget()
        self.full = full

    def _forget(self) -> None:
        self._cache: Cache | None = None
        self._held: list[int] = []
        self._prompt = 0  # tokens of the last prompt in the cache

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer to ``text``, as they are generated.

        If it is not read to its end, the turn is left out of the conversation.

        Raises:
            InputError: the conversation leaves no room for an answer in the model's context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        context = context_length(self.generator.model)
        if context is not None and len(ids) + self.max_new_tokens > context:
            raise InputError(
                f"the conversation has {len(ids)} tokens; with an answer of up to {self.max_new_tokens} the model's "
                f"context of {context} is too short: begin a new one, or give a smaller --max_new_tokens."
            )
        cached = self._reuse(ids)
        cache, self._cache = self._cache, None  # until the answer has ended: what is cut short holds part of it
        stream = TextStream(self.tokenizer, lambda streamer: self._generate(ids, cache, streamer))
        with closing(iter(stream)) as pieces:
            yield from pieces
        answer = stream.output[0, len(ids) :].tolist()
        content = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": content}]
        self._cache, self._prompt = cache, len(ids)
        self._held = [*ids, *answer][: cache.get_seq_length()]
        self.turn = self._cost(len(ids), cached, stream.ttft)

    def _generate(self, ids: list[int], cache: Cache, streamer) -> torch.Tensor:
        tokens = torch.tensor([ids], device=self.generator.device)
        with self.generator.full_model() if self.full else nullcontext():
            return self.generator.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
                **self.sampling,
            )

    def _reuse(self, ids: list[int]) -> int:
        """Make the cache hold a beginning of ``ids``, at most all but the last; returns its length."""
        pairs = zip(self._held, ids[:-1], strict=False)
        common = next((at for at, (held, new) in enumerate(pairs) if held != new), min(len(self._held), len(ids) - 1))
        if self._cache is not None and common >= self._prompt and self._crop(common):
            return common
        self._forget()
        self._cache = self.generator.decoder.new_cache()
        return 0

    def _crop(self, tokens: int) -> bool:
        """Cut the cache to ``tokens``; False where that is not possible (a window that has moved on)."""
        if tokens == len(self._held):
            return True
        try:
            self._cache.crop(tokens)
        except (ValueError, RuntimeError, NotImplementedError):
            return False
        return self._cache.get_seq_length() == tokens

    def _cost(self, tokens: int, cached: int, ttft: float | None) -> Turn:
        decoder, plan = self.generator.decoder, self.generator.plan
        plain = turn_flops(decoder, PruningPlan(decoder.num_layers), tokens, cached)
        ratio = plain / turn_flops(decoder, plan, tokens, cached)
        other = None if ttft is None else ttft / ratio if self.full else ttft * ratio
        return Turn(tokens, cached, ttft, not self.full, other)
