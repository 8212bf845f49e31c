"""Text in, text out with a loaded artifact: the functions of ``pop-generate``, callable from Python as well."""

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from tqdm import tqdm
from transformers import TextIteratorStreamer

from pop_lightning.core.errors import InputError
from pop_lightning.core.files import check_writable, write_text
from pop_lightning.data.examples import read_examples
from pop_lightning.data.images import RowImage
from pop_lightning.data.module import CalibrationData, DataReport, collate
from pop_lightning.data.rows import Row
from pop_lightning.data.videos import RowVideo
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models.loading import context_length, end_tokens

_GREEDY = {"do_sample": False}


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
    tokenizer = _tokenizer(generator)
    row = _row(generator, tokenizer, prompt, images, videos, allow_urls)
    _check_length(generator, len(row.prompt_ids), max_new_tokens, "--prompt")
    inputs = generator.decoder.inputs(collate([row], tokenizer.pad_token_id, generator.vision))
    streamer = _TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            with generator.full_model() if full else nullcontext():
                generator.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    **(sampling or _GREEDY),
                    streamer=streamer,
                    pad_token_id=tokenizer.pad_token_id,
                )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    start = time.perf_counter()
    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece, streamer.first_token - start
    finally:
        streamer.abandoned = True  # a thread still running when Python exits would abort the process
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


def check_files(data: str, output: str | Path, *, overwrite: bool = False) -> None:
    """Check ``--data`` and ``--output`` before a model is loaded; creates the folder of ``output``.

    Raises:
        InputError: no row can be read, ``output`` cannot be written, or it already exists.
    """
    read_examples(data)
    output = Path(output).expanduser()
    with _writing(output):
        if output.is_dir():
            raise InputError(f"--output {output} is a folder; name a file.")
        if output.exists() and not overwrite:
            raise InputError(f"--output {output} exists already; give --overwrite or another --output.")
        check_writable(output)


@contextmanager
def _writing(output: Path):
    try:
        yield
    except OSError as error:
        raise InputError(f"--output {output} cannot be written ({error.strerror}); choose another file.") from error


def generate_file(
    generator: StageAwareGenerator,
    data: str,
    output: str | Path,
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    compare: bool = False,
    allow_urls: bool = False,
    limit: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    max_prompt_tokens: int | None = None,
) -> dict:
    """Generate for every row of a file and write them as JSON Lines; the file appears whole or not at all.

    Args:
        data: as ``data.calibration``; a row's ``response``, where it has one, is the reference.
        compare: also run the unpruned model and report how often both agree.
        allow_urls: fetch images and videos that rows name by URL.
        limit: generate for that many usable rows, the first ones.
        sampling: arguments of ``generate`` such as ``do_sample`` and ``temperature``; greedy unless given.
        max_prompt_tokens: rows with a longer prompt are left out; by default the model's context minus
            ``max_new_tokens``. It may be larger, for models that are used beyond their nominal context.

    Returns:
        ``rows``, ``unusable`` (rows left out, by reason), ``references_cut`` (rows whose reference is longer than
        ``max_new_tokens`` and is compared up to there) and, over the rows that have them, ``exact_match`` (text equals
        the reference), with ``compare`` also ``full_exact_match``, ``same_text`` (share of rows where both models wrote
        the same) and ``agreement`` (share of the full model's tokens that the pruned model wrote too, up to the first
        difference).
    """
    tokenizer = _tokenizer(generator)
    rows, report = _read_rows(generator, tokenizer, data, max_new_tokens, allow_urls, max_prompt_tokens)
    rows, output = rows[:limit], Path(output).expanduser()
    results: dict[int, dict] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].prompt_ids))
    for start in tqdm(range(0, len(order), batch_size), desc="generating", unit="batch"):
        places = order[start : start + batch_size]
        asked = [replace(rows[i], response_ids=()) for i in places]
        batch = collate(asked, tokenizer.pad_token_id, generator.vision)
        ids = {"pruned": _generate(generator, tokenizer, batch, max_new_tokens, sampling)}
        if compare:
            with generator.full_model():
                ids["full"] = _generate(generator, tokenizer, batch, max_new_tokens, sampling)
        for line, place in enumerate(places):
            results[place] = _result(tokenizer, rows[place], {name: each[line] for name, each in ids.items()})
    records = [results[place] for place in range(len(rows))]
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    names = ("exact_match", "full_exact_match", "same_text", "agreement")
    summary: dict = {"rows": len(records), "unusable": report.unusable, "references_cut": report.truncated}
    for name in names:
        values = [record[name] for record in records if name in record]
        if values:
            summary[name] = sum(values) / len(values)
    return summary


def _read_rows(
    generator, tokenizer, data: str, max_new_tokens: int, allow_urls: bool, max_prompt_tokens: int | None
) -> tuple[list[Row], DataReport]:
    context = context_length(generator.model) if max_prompt_tokens is None else None
    if context is not None and max_new_tokens >= context:
        raise InputError(
            f"--max_new_tokens {max_new_tokens} leaves no room for a prompt in the model's context of {context}."
        )
    reader = CalibrationData(
        data,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens or (context or 1 << 20) - max_new_tokens,
        max_response_tokens=max_new_tokens,
        context=context,
        end_tokens=end_tokens(generator.model),
        vision=generator.vision,
        allow_urls=allow_urls,
    )
    return reader.read_rows(keep_duplicates=True), reader.report


def _generate(generator, tokenizer, batch: dict, max_new_tokens: int, sampling) -> list[list[int]]:
    with torch.no_grad():
        output = generator.generate(
            **generator.decoder.inputs(batch),
            max_new_tokens=max_new_tokens,
            **(sampling or _GREEDY),
            pad_token_id=tokenizer.pad_token_id,
        )
    tokens = output[:, batch["prompt_length"] :].tolist()
    ends = {tokenizer.eos_token_id} | end_tokens(generator.model)
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in tokens]


def _result(tokenizer, row: Row, ids: dict[str, list[int]]) -> dict:
    text = {name: tokenizer.decode(each, skip_special_tokens=True).strip() for name, each in ids.items()}
    record = {"prompt": tokenizer.decode(row.prompt_ids, skip_special_tokens=True), "generated": text["pruned"]}
    if row.response_ids:
        record["response"] = tokenizer.decode(row.response_ids, skip_special_tokens=True).strip()
        record["exact_match"] = record["response"] == text["pruned"]
    if "full" in text:
        record["full_generated"] = text["full"]
        if row.response_ids:
            record["full_exact_match"] = record["response"] == text["full"]
        record["same_text"] = text["full"] == text["pruned"]
        same = 0
        for ours, theirs in zip(ids["pruned"], ids["full"], strict=False):
            if ours != theirs:
                break
            same += 1
        record["agreement"] = same / max(len(ids["pruned"]), len(ids["full"]), 1) if any(ids.values()) else 1.0
    return record


def _tokenizer(generator: StageAwareGenerator):
    if generator.tokenizer is None:
        raise InputError("the base has no tokenizer, which text needs; save one in its folder or give --base with one.")
    return generator.tokenizer


def _check_length(generator: StageAwareGenerator, prompt: int, new: int, flag: str) -> None:
    context = context_length(generator.model)
    if context is not None and prompt + new > context:
        raise InputError(
            f"{flag} has {prompt} tokens; with --max_new_tokens {new} the model's context of {context} is too short."
        )
