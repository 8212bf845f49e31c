"""A conversation with a generator: history, the cache reused between turns, and what each turn's prefill cost.

``pop-generate chat`` is this with a terminal around it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.data.images import RowImage
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.generation.stream import GREEDY, TextStream, tokenizer_of
from pop_lightning.models.loading import context_length
from pop_lightning.models.names import CACHE
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
            times the ratio of counted operations. None for an empty answer, and where the turn brought images, since
            the vision tower's operations are not counted.
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
        images: all that its messages show, in order.
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
        self.images: list[RowImage] = []
        self._forget()

    def use(self, *, full: bool) -> None:
        """Let the plain or the pruned model answer from here on; it reads the conversation anew."""
        if full != self.full:
            self._forget()
        self.full = full

    def _forget(self) -> None:
        self._cache: Cache | None = None
        self._held: list[int] = []
        self._seen: list[RowImage] = []  # whose tokens are in the cache
        self._prompt = 0  # tokens of the last prompt in the cache

    def open(self, image: Any, where: str = "the image", *, allow_urls: bool = False) -> RowImage:
        """An image that :meth:`ask` can show: a path, bytes, a PIL image or, with ``allow_urls``, a URL.

        Raises:
            InputError: the model reads no images, or this one cannot be read; the message begins with ``where``.
        """
        if self.generator.vision is None:
            raise InputError(f"{where} cannot be shown: the base ({self.generator.decoder.name}) reads only text.")
        opened = RowImage.of(image, where, allow_urls=allow_urls)
        opened.open()  # now, while the user can name another one
        self.generator.vision.check([opened], [])
        return opened

    def ask(self, text: str, images: Sequence[RowImage] = ()) -> Iterator[str]:
        """Pieces of the answer to ``text``, as they are generated.

        If it is not read to its end, the turn is left out of the conversation.

        Args:
            images: from :meth:`open`, shown before the text.

        Raises:
            InputError: the conversation leaves no room for an answer in the model's context, or the model's processor
                refuses an image.
        """
        said = [*({"type": "image"} for _ in images), {"type": "text", "text": text}] if images else text
        asked, shown = [*self.messages, {"role": "user", "content": said}], [*self.images, *images]
        ids = self._read(asked, shown)
        context = context_length(self.generator.model)
        if context is not None and len(ids) + self.max_new_tokens > context:
            raise InputError(
                f"the conversation has {len(ids)} tokens; with an answer of up to {self.max_new_tokens} the model's "
                f"context of {context} is too short: begin a new one, or give a smaller --max_new_tokens."
            )
        cached = self._reuse(ids, shown)
        new = shown[len(self._seen) :]
        cache, self._cache = self._cache, None  # until the answer has ended: what is cut short holds part of it
        stream = TextStream(self.tokenizer, lambda streamer: self._generate(ids, new, cache, streamer))
        with closing(iter(stream)) as pieces:
            yield from pieces
        answer = stream.output[0, len(ids) :].tolist()
        content = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.messages, self.images = [*asked, {"role": "assistant", "content": content}], shown
        self._cache, self._seen, self._prompt = cache, list(shown), len(ids)
        self._held = [*ids, *answer][: cache.get_seq_length()]
        self.turn = self._cost(len(ids), cached, stream.ttft, bool(new))

    def _read(self, messages: list[dict], images: list[RowImage]) -> list[int]:
        """The token ids of a conversation up to where the answer starts."""
        if not images:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        vision = self.generator.vision
        rendered = self.tokenizer.apply_chat_template(
            messages, chat_template=vision.chat_template, add_generation_prompt=True, tokenize=False
        )
        return vision.encode(rendered, images, (), "the conversation", special=False)

    def _generate(self, ids: list[int], images: list[RowImage], cache: Cache, streamer) -> torch.Tensor:
        """The answer; ``images`` are those whose tokens the cache lacks."""
        tokens = torch.tensor([ids], device=self.generator.device)
        batch = {"vision": self.generator.vision.tensors([(images, ())])} if images else {}
        with self.generator.full_model() if self.full else nullcontext():
            return self.generator.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                **self.generator.decoder.vision.on(tokens.device, batch, tokens),
                **{CACHE: cache},
                max_new_tokens=self.max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
                return_dict_in_generate=True,  # which also records on the cache how many positions images used
                **self.sampling,
            ).sequences

    def _reuse(self, ids: list[int], images: list[RowImage]) -> int:
        """Make the cache hold a beginning of ``ids``, at most all but the last; returns its length.

        All images have the same tokens, so their content is compared as well. They are in prompts, of which the cache
        holds all or nothing.
        """
        pairs = zip(self._held, ids[:-1], strict=False)
        common = next((at for at, (held, new) in enumerate(pairs) if held != new), min(len(self._held), len(ids) - 1))
        same = images[: len(self._seen)] == self._seen
        if self._cache is not None and same and common >= self._prompt and self._crop(common):
            return common
        self._forget()
        self._cache = self.generator.decoder.new_cache()
        return 0

    def _crop(self, tokens: int) -> bool:
        """Cut the cache to ``tokens``; False where that is not possible (a window that has moved on)."""
        if tokens == len(self._held):
            return True
        try:
            self._cache.crop(tokens - len(self._held))  # less than 0: how many to take off
        except (ValueError, RuntimeError, NotImplementedError):
            return False
        return self._cache.get_seq_length() == tokens

    def _cost(self, tokens: int, cached: int, ttft: float | None, read_images: bool) -> Turn:
        decoder, plan = self.generator.decoder, self.generator.plan
        plain = turn_flops(decoder, PruningPlan(decoder.num_layers), tokens, cached)
        ratio = plain / turn_flops(decoder, plan, tokens, cached)
        known = ttft is not None and not read_images  # the vision tower is in the time and not in the count
        other = None if not known else ttft / ratio if self.full else ttft * ratio
        return Turn(tokens, cached, ttft, not self.full, other)
