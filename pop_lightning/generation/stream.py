"""Text as it is generated, from one prompt: ``pop-generate prompt``, callable from Python as well."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from threading import Thread
from typing import Any

from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from pop_lightning.core.errors import InputError
from pop_lightning.data.batches import collate
from pop_lightning.data.images import RowImage
from pop_lightning.data.rows import Row
from pop_lightning.data.videos import RowVideo
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models.loading import context_length

GREEDY = {"do_sample": False}


def stream(
    generator: StageAwareGenerator,
    prompt: str,
    *,
    max_new_tokens: int,
    images: Sequence = (),
    videos: Sequence = (),
    allow_urls: bool = False,
    full: bool = False,
    sampling: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, float]]:
    """Generate from one prompt; yields pieces of text, each with the TTFT: seconds from call to first token.

    Args:
        images: shown before the prompt, in a user's turn of the base's chat template: paths, bytes, PIL images or, with
            ``allow_urls``, URLs. Without images and videos the prompt is used as it is.
        videos: shown after the images: paths, bytes, lists of frames, or URLs.
        full: generate with the unpruned model.
        sampling: arguments of ``generate`` such as ``do_sample`` and ``temperature``; greedy unless given.

    Raises:
        InputError: no tokenizer, an empty prompt where the base has no BOS token, a prompt that is not valid Unicode,
            an image or a video that cannot be read or that the base cannot read, or a prompt that leaves no room in the
            model's context.
    """
    check_prompt(prompt)
    tokenizer = tokenizer_of(generator)
    row = _row(generator, tokenizer, prompt, images, videos, allow_urls)
    _check_length(generator, len(row.prompt_ids), max_new_tokens, "--prompt")
    inputs = generator.decoder.inputs(collate([row], tokenizer.pad_token_id, generator.vision))

    def generate(streamer: TextIteratorStreamer) -> Any:
        with generator.full_model() if full else nullcontext():
            return generator.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                **(sampling or GREEDY),
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id,
            )

    text = TextStream(tokenizer, generate)
    with closing(iter(text)) as pieces:
        for piece in pieces:
            yield piece, text.ttft


class TextStream:
    """Iterates over the text that ``generate`` writes in a thread of its own.

    Args:
        generate: from the streamer to its result.

    Attributes:
        ttft: seconds from the beginning to the first token; None before it.
        output: what ``generate`` returned, at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generate: Callable[[TextIteratorStreamer], Any]):
        self._streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._generate = generate
        self._start = 0.0
        self.output: Any = None

    @property
    def ttft(self) -> float | None:
        first = self._streamer.first_token
        return None if first is None else first - self._start

    def __iter__(self) -> Iterator[str]:
        failure: list[BaseException] = []

        def generate() -> None:
            try:
                self.output = self._generate(self._streamer)
            except BaseException as error:
                failure.append(error)
                self._streamer.end()

        self._start = time.perf_counter()
        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from filter(None, self._streamer)
        finally:
            self._streamer.abandoned = True  # a thread still running when Python exits would abort the process
            thread.join()
        if failure:
            raise failure[0]


def _row(generator, tokenizer, prompt: str, images: Sequence, videos: Sequence, allow_urls: bool) -> Row:
    if not images and not videos:
        ids = tokenizer(prompt)["input_ids"]
        return Row(tuple(ids or _start(generator, tokenizer)), (), "--prompt")
    flag = "--video" if videos else "--image"
    if generator.vision is None:
        raise InputError(f"{flag} was given, but the base ({generator.decoder.name}) reads only text.")
    shown = [
        tuple(of(each, f"{flag} {number}", allow_urls=allow_urls) for number, each in enumerate(given, 1))
        for of, flag, given in ((RowImage.of, "--image", images), (RowVideo.of, "--video", videos))
    ]
    try:
        generator.vision.check(*shown)
    except InputError as error:
        raise InputError((f"{flag} was given, but ", error)) from error
    return Row(tuple(generator.vision.ask(prompt, *shown, "--prompt")), (), "--prompt", *shown)


class _TimedStreamer(TextIteratorStreamer):
    """Records the time of the first token, which precedes the first whole word, and stops when no longer read."""

    first_token: float | None = None
    abandoned = False  # nobody reads on

    def put(self, value) -> None:
        if self.abandoned:
            raise RuntimeError("the reader of the stream is gone")
        if self.first_token is None and not self.next_tokens_are_prompt:
            self.first_token = time.perf_counter()
        super().put(value)


def _start(generator: StageAwareGenerator, tokenizer) -> list[int]:
    """The tokens that generation starts from without a prompt."""
    for token in (tokenizer.bos_token_id, generator.generation_config.bos_token_id):
        if token is not None:
            return [token]
    raise InputError("--prompt is empty, and the base has no BOS token to start from: give some text.")


def check_prompt(prompt: str) -> None:
    """Raise :class:`InputError` for a ``--prompt`` that is not text, because no tokenizer reads it."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"--prompt is not valid Unicode at character {error.start + 1} (half of a surrogate pair, such as a cut "
            "emoji, or bytes that are not UTF-8): remove it."
        ) from error


def tokenizer_of(generator: StageAwareGenerator):
    """Its tokenizer, or :class:`InputError`."""
    if generator.tokenizer is None:
        raise InputError("the base has no tokenizer, which text needs; save one in its folder or give --base with one.")
    return generator.tokenizer


def _check_length(generator: StageAwareGenerator, prompt: int, new: int, flag: str) -> None:
    context = context_length(generator.model)
    if context is not None and prompt + new > context:
        raise InputError(
            f"{flag} has {prompt} tokens; with --max_new_tokens {new} the model's context of {context} is too short."
        )
