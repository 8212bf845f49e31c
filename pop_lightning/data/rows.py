"""From examples to rows: the token ids of a prompt and its response, and the images and videos of the prompt.

The step between ``examples.py``, which reads, and ``module.py``, which splits and batches. All randomness of a row is
derived from its content, so the order of a file changes nothing.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pop_lightning.core.errors import InputError, Key
from pop_lightning.data.images import IMAGE, RowImage
from pop_lightning.data.media import Medium
from pop_lightning.data.processor import VisionProcessor
from pop_lightning.data.videos import TIMING, VIDEO, RowVideo

MIN_TEXT_TOKENS = 8  # a shorter text leaves too little for both a prompt and a response
_EMPTY_PROMPT = "empty prompt"
EMPTY_RESPONSE = "empty response"
_LONG_PROMPT = "prompt longer than max_prompt_tokens"
_LONG_ROW = "longer than the model's context"
_SHORT_TEXT = f"text shorter than {MIN_TEXT_TOKENS} tokens"


@dataclass(frozen=True)
class Row:
    """One tokenized row; ``response_ids`` is None until the full model has generated it.

    ``origin`` says where the row comes from, for messages: ``file.jsonl line 12``. The prompt has one token per feature
    of ``images`` and ``videos``, which are opened when a batch needs their tensors.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    origin: str
    images: tuple[RowImage, ...] = ()
    videos: tuple[RowVideo, ...] = ()

    @property
    def media(self) -> tuple[RowImage | RowVideo, ...]:
        """The images, then the videos."""
        return self.images + self.videos

    @property
    def prompt(self) -> tuple:
        """The identity of the prompt: token ids, and the digests of its images and videos."""
        return (self.prompt_ids, *(each.digest for each in self.media))

    @property
    def content(self) -> tuple:
        """The identity of the row: rows with equal content are duplicates."""
        return (self.prompt, self.response_ids)

    @property
    def seed(self) -> int:
        """A 63-bit hash of the content: the same on every machine, in every process and for every file order."""
        return hash63(*self.prompt, self.response_ids)

    @property
    def prompt_seed(self) -> int:
        """The same hash of only the prompt: rows that share it count as one independent draw, not several."""
        return hash63(*self.prompt)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids or ())


@dataclass(frozen=True)
class RowTokenizer:
    """Turns one example into ``(row, reason, limit)``: exactly one of row and reason is None.

    ``limit`` names what a row was cut to; None where all of it is used.

    ``vision`` is None for a model that reads only text.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt: int
    max_response: int
    context: int | None
    ends: frozenset[int] = frozenset()
    vision: VisionProcessor | None = None
    allow_urls: bool = False

    def __call__(self, example: dict, origin: str) -> tuple[Row | None, str | None, str | None]:
        row, reason, limit = self._row(example, origin)
        if row is not None and self.vision is not None:
            # Such tokens without an image or video of their own would get the features of another.
            text = (*(() if row.media else row.prompt_ids), *(row.response_ids or ()))
            stray = next((token for token in self.vision.tokens if token in text), None)
            if stray is not None:
                kind = "image" if stray == self.vision.tokens[0] else "video"
                raise InputError(
                    f"{origin} has the {kind} token {self.tokenizer.convert_ids_to_tokens(stray)!r} in its text with "
                    f"no {kind} for it: remove it, or give the row's {kind}s."
                )
        return row, reason, limit

    def media(self, example: dict, origin: str) -> tuple[tuple[RowImage, ...], tuple[RowVideo, ...]]:
        """Its images and its videos, each in the order of the text; a file is read once, for its hash, and not kept."""
        images = self._media(IMAGE, RowImage.of, example, origin)
        return images, self._media(VIDEO, RowVideo.of, example, origin)

    def _media(self, medium: Medium, of: Callable, example: dict, origin: str) -> tuple:
        kind, listed = medium.name, example.get(f"{medium.name}s") or []
        listed = listed() if callable(listed) else listed
        if "messages" in example:
            parts = [part for part in example.get("parts", ()) if part["type"] == kind]
            bare = sum(not medium.named(part) for part in parts)
            if bare != len(listed):
                raise InputError(
                    f'{origin} has {bare} {kind} parts that name no {kind}, and {len(listed)} entries in "{kind}s": '
                    "expected one entry for each."
                )
            rest = iter(listed)
            listed = [part if medium.named(part) else _filled(part, next(rest)) for part in parts]
        return tuple(
            of(given, f"{origin}, {kind} {number}", folder=example.get("folder"), allow_urls=self.allow_urls)
            for number, given in enumerate(listed, start=1)
        )

    def _row(self, example: dict, origin: str) -> tuple[Row | None, str | None, str | None]:
        if "text" in example:
            return self._text(example["text"], origin)
        images, videos = self.media(example, origin)
        if images or videos:
            self._check_vision(images, videos, origin)
        if "messages" in example:
            prompt, response = self._chat(example, origin, images, videos)
        else:
            prompt = self._with_specials(example["prompt"], images, videos, origin)
            response = self._response(example["response"]) if "response" in example else None
        if not prompt:
            return None, _EMPTY_PROMPT, None
        if response is not None and not response:
            return None, EMPTY_RESPONSE, None
        if len(prompt) > self.max_prompt:
            return None, _LONG_PROMPT, None
        # A response that is still to be generated may come out at the full length.
        length = len(prompt) + (self.max_response if response is None else min(self.max_response, len(response)))
        if self.context is not None and length > self.context:
            return None, _LONG_ROW, None
        cut = response is not None and len(response) > self.max_response
        limit = response_limit(self.max_response) if cut else None
        response = None if response is None else tuple(response[: self.max_response])
        return Row(tuple(prompt), response, origin, images, videos), None, limit

    def _check_vision(self, images: tuple[RowImage, ...], videos: tuple[RowVideo, ...], origin: str) -> None:
        kind = "videos" if videos else "images"
        if self.vision is None:
            raise InputError(
                f"{origin} has {kind}, and the model reads text only",
                advice=(
                    *("change ", Key("model.base"), f" to a model that reads {kind}, or take the row out of "),
                    Key("data.calibration"),
                ),
            )
        try:
            self.vision.check(images, videos)
        except InputError as error:
            raise InputError((f"{origin} has {kind}, but ", error)) from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _with_specials(
        self, text: str, images: tuple[RowImage, ...] = (), videos: tuple[RowVideo, ...] = (), origin: str = ""
    ) -> list[int]:
        """Token ids with the tokenizer's own bos and the like, without an eos at the end; [] for a blank text."""
        bare = self._ids(text) if text.strip() else []
        if not bare:
            return []
        if images or videos:
            ids = self.vision.encode(text, images, videos, origin, special=True)
        else:
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if bos is not None and bare[0] == bos and ids[:2] == [bos, bos]:
            ids = ids[1:]  # the text already begins with one, as a rendered chat does
        # An eos at the end of the text itself is kept: the user wrote it.
        return ids[:-1] if eos is not None and ids[-1] == eos and bare[-1] != eos else ids

    def _response(self, text: str) -> list[int]:
        ids = self._ids(text) if text.strip() else []
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if ids and eos is not None and ids[-1] != eos else ids

    def _chat(
        self, example: dict, origin: str, images: tuple[RowImage, ...], videos: tuple[RowVideo, ...]
    ) -> tuple[list[int], list[int] | None]:
        """Prompt and response of a chat: what the template renders up to the generation prompt, and what follows it.

        The response of a chat that ends with a question is None: the full model answers it.

        Both are rendered by ``apply_chat_template`` with the row's own tools and template variables.
        """
        messages = example["messages"]
        answered = messages[-1]["role"] == "assistant"
        if answered and len(messages) == 1:
            return [], []
        # The tokenizer picks among named templates itself; the processor's template is used for images and videos, or
        # if only the processor has one.
        template = None
        if images or videos or (self.vision is not None and not self.tokenizer.chat_template):
            template = self.vision.chat_template
        if not (template or self.tokenizer.chat_template):
            raise InputError(
                f'{origin} has "messages" but the tokenizer has no chat template',
                advice=(
                    *("use a chat model in ", Key("model.base"), ', or {"prompt", "response"} rows in '),
                    Key("data.calibration"),
                ),
            )
        render = partial(
            self.tokenizer.apply_chat_template,
            chat_template=template,
            tools=example.get("tools"),
            tokenize=False,
            **example.get("chat_template_kwargs", {}),
        )
        try:
            prompt = render(messages[:-1] if answered else messages, add_generation_prompt=True)
            full = render(messages) if answered else prompt
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{origin} cannot be rendered by the tokenizer's chat template ({error})",
                advice=('change that row\'s "messages" in ', Key("data.calibration")),
            ) from error
        if not full.startswith(prompt):
            common = next((at for at, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
            near = slice(max(0, common - 40), common + 40)
            raise InputError(
                f"{origin}: the chat template renders the prompt differently once the answer follows, so prompt and "
                f"response cannot be separated (prompt only: ...{prompt[near]!r}, with the answer: "
                f"...{full[near]!r})",
                advice=(
                    "set the template's variables in the row's \"chat_template_kwargs\" (such as "
                    '{"enable_thinking": false}), give the answer its "reasoning_content", or give '
                    '{"prompt", "response"} rows in ',
                    Key("data.calibration"),
                    " instead",
                ),
            )
        if not answered:
            shown = images or videos
            return self.vision.encode(prompt, images, videos, origin, special=False) if shown else self._ids(
                prompt
            ), None
        prompt_ids, full_ids = self._ids(prompt), self._ids(full)
        if not _has_content(messages[-1]):
            return prompt_ids, []
        response = full_ids[len(prompt_ids) :]
        if full_ids[: len(prompt_ids)] != prompt_ids:
            # A token straddles the split of the text: tokenize the response separately, as decode starts after the
            # prompt's own tokens.
            response = self._ids(full[len(prompt) :])
        if images or videos:  # a placeholder is a token of its own, so expanding it does not move the split
            prompt_ids = self.vision.encode(prompt, images, videos, origin, special=False)
        # Templates add text after a turn's end token (a line break, an end of text), at which decode stops.
        return prompt_ids, list(until_end(response, self.ends))

    def _text(self, text: str, origin: str) -> tuple[Row | None, str | None, str | None]:
        ids, most = self._with_specials(text), self.max_prompt + self.max_response
        length = min(len(ids), most, self.context or len(ids))
        if length < MIN_TEXT_TOKENS:
            return None, _SHORT_TEXT, None
        latest = min(length * 4 // 5, self.max_prompt)
        earliest = min((length + 1) // 2, latest)
        split = earliest + hash63(text) % (latest - earliest + 1)
        end = min(length, split + self.max_response)
        limit = None
        if end < len(ids):
            limit = response_limit(self.max_response)
            if length == most:
                limit = f"max_prompt_tokens ({self.max_prompt}) and {limit}"
            elif end == self.context:
                limit = f"the model's {self.context} tokens"
        return Row(tuple(ids[:split]), tuple(ids[split:end]), origin), None, limit


def _filled(part: dict, entry):
    """The entry of the list for a part that names no source, with the timing keys of the part."""
    timing = {key: part[key] for key in TIMING if part.get(key) is not None}
    return {**timing, VIDEO.name: entry} if timing and part["type"] == VIDEO.name else entry


def _has_content(message: dict) -> bool:
    content = message.get("content", "")
    texts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    return any(text.strip() for text in texts) or bool(message.get("tool_calls") or message.get("reasoning_content"))


def until_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """A response up to and with its first end token, where decode stops."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def response_limit(tokens: int) -> str:
    """What a response of more than ``tokens`` tokens is cut to, for :class:`~pop_lightning.data.report.DataReport`."""
    return f"max_response_tokens ({tokens})"


def hash63(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
