"""Calibration data: from files, folders and datasets to tokenised rows in four disjoint splits.

First in the flow: importance, projection training, the choice of a depth and its verification all read their rows here.
Every row is a prompt (what prefill sees) and a response (what decode produces), and all randomness about a row comes
from its content, so the order of a file changes nothing.
"""

import gzip
import hashlib
import importlib.resources
import json
import statistics
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, count, groupby, zip_longest
from pathlib import Path

import lightning
import torch
from jinja2 import TemplateError
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pop_lightning import ranks
from pop_lightning.errors import InputError
from pop_lightning.files import write_json
from pop_lightning.images import KEYS as IMAGE_KEYS
from pop_lightning.images import RowImage, VisionProcessor

SPLITS = {"fit": 0.3, "tune": 0.1, "search": 0.2, "verify": 0.4}
SHAPES = '{"prompt", "response"}, {"messages"}, {"prompt"} or {"text"}'
MIN_TEXT_TOKENS = 8
_KEYS = ("messages", "prompt", "response", "text")
_CHAT_KEYS = ("tools", "chat_template_kwargs")  # beside "messages": what apply_chat_template takes besides them
_RENDERING = {"tools", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "chat_template"}
_BUNDLED = "bundled:"

_EMPTY_PROMPT = "empty prompt"
_EMPTY_RESPONSE = "empty response"
_LONG_PROMPT = "prompt longer than data.max_prompt_tokens"
_LONG_ROW = "longer than the model's context"
_SHORT_TEXT = f"text shorter than {MIN_TEXT_TOKENS} tokens"
_DUPLICATE = "duplicate"
_IMAGE_RESPONSE = "response with an image token"


@dataclass(frozen=True)
class Row:
    """One tokenised row; ``response_ids`` is None until the full model has generated it.

    ``origin`` says where the row stands, for messages: ``file.jsonl line 12``. Of ``images`` the prompt's ids hold a
    token for every feature; they are opened when a batch wants their tensors.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    origin: str
    images: tuple[RowImage, ...] = ()

    @property
    def prompt(self) -> tuple:
        """What the model is asked: token ids, and the images' digests where there are any."""
        return (self.prompt_ids, *(image.digest for image in self.images))

    @property
    def content(self) -> tuple:
        """What makes two rows the same row."""
        return (self.prompt, self.response_ids)

    @property
    def seed(self) -> int:
        """A 63-bit hash of the content: the same on every machine, in every process and for every file order."""
        return _hash63(*self.prompt, self.response_ids)

    @property
    def prompt_seed(self) -> int:
        """The same hash of the prompt alone: rows that share it are one draw of a prompt, not several."""
        return _hash63(*self.prompt)

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids or ())


@dataclass(frozen=True)
class DataReport:
    """What became of the data: usable rows, the others counted by reason, and lengths in tokens.

    ``unusable`` maps a reason to a count and ``first_unusable`` the same reason to the first origin; ``truncated``
    counts the rows that are used but were cut. ``response_tokens`` is None while every response is missing.
    """

    rows: int
    unusable: dict[str, int]
    first_unusable: dict[str, str]
    truncated: int
    prompt_tokens: dict[str, float] | None
    response_tokens: dict[str, float] | None

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.rows} rows"]
        for name, tokens in (("prompt", self.prompt_tokens), ("response", self.response_tokens)):
            if tokens:
                parts.append(f"{name} tokens {tokens['min']:g}/{tokens['median']:g}/{tokens['max']:g} (min/median/max)")
        if self.truncated:
            parts.append(f"{self.truncated} cut to fit")
        if self.unusable:
            parts.append(f"not used: {self._unusable()}")
        return ", ".join(parts)

    def _unusable(self) -> str:
        return "; ".join(f"{n} {reason} (first: {self.first_unusable[reason]})" for reason, n in self.unusable.items())


# --- reading ----------------------------------------------------------------------------------------------------------


def resolve_bundled(name: str) -> str:
    """The path behind ``bundled:NAME``, a file or folder installed with the library; any other name unchanged.

    Raises:
        InputError: nothing of that name is bundled; the message lists what is.
    """
    if not name.startswith(_BUNDLED):
        return name
    root = Path(str(importlib.resources.files("pop_lightning.checkpoints"))).resolve()
    inside = name.removeprefix(_BUNDLED)
    path = (root / inside).resolve()
    if inside and path.exists() and path.is_relative_to(root) and path != root:
        return str(path)
    entries = sorted(
        entry.relative_to(root).as_posix()
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(("_", "."))
        for entry in (folder, *folder.glob("*.jsonl"))
    )
    raise InputError(
        f"{name!r} is not bundled with pop_lightning; what is bundled: "
        f"{', '.join(_BUNDLED + entry for entry in entries) or 'nothing'}; change model.base or data.calibration."
    )


def check_exists(source: str | Path) -> None:
    """Raise :class:`InputError` for a file or folder that is not there; the id of a data set of the hub passes."""
    path = Path(resolve_bundled(str(source)))
    # No hub id looks like this: asking the hub would only cost its retries.
    named = _kind(path) in (".jsonl", ".json", ".txt") or path.suffix.lower() == ".gz"
    if not path.exists() and (named or len(path.parts) > 2 or path.is_absolute()):
        raise InputError(
            f"data.calibration {str(source)!r} does not exist: change data.calibration to a file that does."
        )


def _kind(path: Path) -> str:
    """The suffix in front of a ``.gz``."""
    return next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() != ".gz"), "")


def read_examples(source: str | Path, split: str | None = None) -> list[tuple[dict, str]]:
    """All examples of ``source`` with their origins, in file order, each checked to have one of the known shapes.

    Args:
        source: a ``.jsonl`` or ``.json`` file (JSON Lines; also ``.gz``), a ``.txt`` file (a blank line separates
            documents; also ``.gz``), ``bundled:NAME``, a folder written by ``datasets.save_to_disk``, or anything that
            ``datasets.load_dataset`` loads.
        split: the split of a dataset that has several, ``train`` unless given; files have none and ignore it.

    Raises:
        InputError: the source is missing, empty or unreadable, or an example has none of the known shapes.
    """
    path = Path(resolve_bundled(str(source)))
    kind = _kind(path)
    if path.is_file() and kind in (".jsonl", ".json"):
        examples = _read_json_lines(path)
    elif path.is_file() and kind == ".txt":
        examples = _read_text(path)
    elif path.is_file():
        raise InputError(
            f"data.calibration {str(source)!r} is a file of unknown kind: .jsonl, .json or .txt was expected."
        )
    else:
        check_exists(source)
        examples = _read_dataset(str(source), path, split)
    if not examples:
        raise InputError(f"data.calibration {str(source)!r} holds no rows: expected {SHAPES}.")
    return examples


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            yield from enumerate(file, start=1)
    except UnicodeDecodeError as error:
        raise InputError(f"data.calibration {str(path)!r} is not UTF-8 text: {error}.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data.calibration {str(path)!r} cannot be read: {error}.") from error


def _read_json_lines(path: Path) -> list[tuple[dict, str]]:
    examples = []
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"data.calibration {str(path)!r} line {number}"
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not JSON ({error.msg}): expected one object per line, {SHAPES}.") from error
        if not isinstance(example, dict):
            raise InputError(f"{where} is a JSON {type(example).__name__}, not an object: expected {SHAPES}.")
        shaped = _shape(example, where)
        if shaped.keys() & {"parts", "images"}:
            shaped["folder"] = path.parent  # relative paths of images start here
        examples.append((shaped, f"{path.name} line {number}"))
    return examples


def _read_text(path: Path) -> list[tuple[dict, str]]:
    examples = []
    for blank, group in groupby(_lines(path), key=lambda line: not line[1].strip()):
        if not blank:
            lines = list(group)
            text = "".join(line for _, line in lines).strip("\n")
            examples.append(({"text": text}, f"{path.name} line {lines[0][0]}"))
    return examples


def _read_dataset(source: str, path: Path, split: str | None) -> list[tuple[dict, str]]:
    import datasets  # pulls in pyarrow and pandas, which plain files do without

    wanted = split or "train"
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(str(path) if path.exists() else source, split=wanted)
    except Exception as error:  # every loader of `datasets` raises its own kind, all of them about the source
        raise InputError(
            f"data.calibration {source!r} (data.split {wanted!r}) is neither a file that exists nor a dataset that "
            f"loads: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    if isinstance(dataset, Mapping):
        if wanted not in dataset:
            raise InputError(
                f"data.calibration {source!r} has no split {wanted!r}: set data.split to one of {', '.join(dataset)}."
            )
        dataset = dataset[wanted]
    known = [key for key in _KEYS if key in dataset.column_names]
    if not known:
        raise InputError(
            f"data.calibration {source!r} has the columns {', '.join(dataset.column_names) or '(none)'}: "
            f"expected {SHAPES}."
        )
    name = path.name or source
    chat = [key for key in _CHAT_KEYS if key in dataset.column_names and "messages" in known]
    images = "images" in dataset.column_names
    if images:
        undecoded = dataset.select_columns(["images"])
        undecoded = undecoded.cast_column("images", _undecoded(undecoded.features["images"]))
    examples = []
    # Other columns may be images or audio, which are decoded when a row is read.
    for number, example in enumerate(dataset.select_columns(known + chat)):
        lazy = {"images": partial(_cells, undecoded, number)} if images else {}
        shaped = _shape(_without_nulls(example) | lazy, f"data.calibration {source!r} row {number}")
        examples.append((shaped, f"{name} row {number}"))
    return examples


def _undecoded(feature):
    """A feature of `datasets` whose images come as the bytes they are stored as."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, list):
        return [_undecoded(each) for each in feature]
    inner = getattr(feature, "feature", None)
    return feature if inner is None else type(feature)(_undecoded(inner))


def _cells(dataset, row: int) -> list[Callable]:
    """A dataset row's images, each to be read when it is wanted."""
    found = dataset[row]["images"]
    count = len(found) if isinstance(found, list) else int(found is not None)
    return [partial(_cell, dataset, row, index) for index in range(count)]


def _cell(dataset, row: int, index: int):
    found = dataset[row]["images"]
    return found[index] if isinstance(found, list) else found


def _without_nulls(value):
    """A table's rows share their keys at every depth: those that a row does not have are null there, and go."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _shape(example: dict, where: str) -> dict:
    """``example`` reduced to the keys of its shape; a key whose value is null counts as absent, as in a table.

    Images are kept apart from the text: under ``parts`` what each image part of the messages names (None where it
    names nothing), under ``images`` those that stand in a list beside the text, or a call that gives that list.
    """
    found = {key: value for key, value in example.items() if value is not None}
    images = found.get("images") or None
    if not (images is None or isinstance(images, list) or callable(images)):
        raise InputError(f'{where} has "images" of type {type(images).__name__}: a list was expected.')
    beside = {} if images is None else {"images": images}
    if "messages" in found:
        messages, parts = _messages(found["messages"], where)
        shown = {"parts": parts} if parts else {}
        return {"messages": messages} | _chat_arguments(found, where) | shown | beside
    keys = next((keys for keys in (("prompt", "response"), ("prompt",), ("text",)) if found.keys() >= set(keys)), None)
    if keys is None:
        named = ", ".join(repr(key) for key in example) or "none"
        raise InputError(f"{where} has the keys {named}: expected {SHAPES}; change the rows or data.calibration.")
    for key in keys:
        if not isinstance(found[key], str):
            raise InputError(f"{where} has a {key!r} of type {type(found[key]).__name__}: a string was expected.")
    return {key: found[key] for key in keys} | (beside if "prompt" in keys else {})


def _chat_arguments(found: dict, where: str) -> dict:
    """``tools`` and ``chat_template_kwargs`` of a row, each as it is or as JSON text, as tables often hold them."""
    given = {}
    for key, kind, what in zip(_CHAT_KEYS, (list, dict), ("a list of tools", "an object"), strict=True):
        value = found.get(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise InputError(f"{where} has a {key!r} that is not JSON ({error.msg}).") from error
        if value is None:
            continue
        if not isinstance(value, kind) or (kind is list and not all(isinstance(each, dict) for each in value)):
            raise InputError(f"{where} has a {key!r} of type {type(value).__name__}: {what} was expected.")
        given[key] = value
    taken = sorted(_RENDERING & given.get("chat_template_kwargs", {}).keys())
    if taken:
        raise InputError(
            f"{where} sets {', '.join(taken)} in 'chat_template_kwargs', which is for the template's own variables "
            "(such as enable_thinking)."
        )
    return given


def _messages(messages, where: str) -> tuple[list[dict], list]:
    """The messages as a chat template takes them, and what their image parts name, in order."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise InputError(f'{where} has "messages" that are not a list of objects with "role" and "content".')
    if not messages or messages[-1]["role"] != "assistant":
        last = repr(messages[-1]["role"]) if messages else "missing"
        raise InputError(f"{where}: the role of the last message is {last}, 'assistant' was expected (the response).")
    clean, images = [], []
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text"}] if isinstance(content, str) or content is None else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise InputError(f'{where} has a message whose "content" is neither a string nor a list of parts.')
        others = sorted({str(part.get("type")) for part in parts} - {"text", "image", "image_url"})
        if others:  # the tokenizer alone would drop them without a word
            raise InputError(f"{where} has message parts of type {', '.join(others)}: text and image are supported.")
        found = [part for part in parts if part["type"] != "text"]
        if found and message is messages[-1]:
            raise InputError(f"{where} has an image in its last message, the response: only prompts may hold images.")
        images += map(_named_image, found)
        clean.append({key: value for key, value in message.items() if value is not None})
        if isinstance(content, list):
            clean[-1]["content"] = [
                {key: value for key, value in part.items() if value is not None}
                if part["type"] == "text"
                else {"type": "image"}
                for part in parts
            ]
    return clean, images


def _named_image(part: dict):
    """What an image part names, or None; OpenAI's ``image_url`` parts are taken as Transformers takes them."""
    address = part.get("image_url")
    if part["type"] == "image_url":
        return {"url": address.get("url") if isinstance(address, dict) else address}
    return part if any(part.get(key) is not None for key in IMAGE_KEYS) else None


# --- tokenising -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokeniser:
    """From one example to ``(row, reason, truncated)``: exactly one of row and reason is None.

    ``vision`` is None where the model reads text alone.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt: int
    max_response: int
    context: int | None
    ends: frozenset[int] = frozenset()
    vision: VisionProcessor | None = None
    allow_urls: bool = False

    def __call__(self, example: dict, origin: str) -> tuple[Row | None, str | None, bool]:
        row, reason, truncated = self._row(example, origin)
        if row is not None and self.vision is not None:
            # Image tokens that no image stands behind would be given another's features.
            text = (*(() if row.images else row.prompt_ids), *(row.response_ids or ()))
            stray = next((token for token in self.vision.tokens if token in text), None)
            if stray is not None:
                raise InputError(
                    f"{origin} has the image token {self.tokenizer.convert_ids_to_tokens(stray)!r} in its text with no "
                    "image behind it: take it out, or give the row's images."
                )
        return row, reason, truncated

    def images(self, example: dict, origin: str) -> tuple[RowImage, ...]:
        """The example's images in the order of its text; each file is read once for its hash, and not kept."""
        listed, parts = example.get("images") or [], example.get("parts")
        listed = listed() if callable(listed) else listed
        bare = len(listed) if parts is None and "messages" not in example else (parts or []).count(None)
        if bare != len(listed):
            raise InputError(
                f'{origin} has {bare} image parts that name no image, and {len(listed)} entries in "images": expected '
                "one entry for each."
            )
        if parts is not None:
            rest = iter(listed)
            listed = [next(rest) if part is None else part for part in parts]
        return tuple(
            RowImage.of(given, f"{origin}, image {number}", folder=example.get("folder"), allow_urls=self.allow_urls)
            for number, given in enumerate(listed, start=1)
        )

    def _row(self, example: dict, origin: str) -> tuple[Row | None, str | None, bool]:
        if "text" in example:
            return self._text(example["text"], origin)
        images = self.images(example, origin)
        if images:
            self._check_vision(origin)
        if "messages" in example:
            prompt, response = self._chat(example, origin, images)
        else:
            prompt = self._with_specials(example["prompt"], images, origin)
            response = self._response(example["response"]) if "response" in example else None
        if not prompt:
            return None, _EMPTY_PROMPT, False
        if response is not None and not response:
            return None, _EMPTY_RESPONSE, False
        if len(prompt) > self.max_prompt:
            return None, _LONG_PROMPT, False
        # A response that is still to be generated may come out at the full length.
        length = len(prompt) + (self.max_response if response is None else min(self.max_response, len(response)))
        if self.context is not None and length > self.context:
            return None, _LONG_ROW, False
        truncated = response is not None and len(response) > self.max_response
        response = None if response is None else tuple(response[: self.max_response])
        return Row(tuple(prompt), response, origin, images), None, truncated

    def _check_vision(self, origin: str) -> None:
        if self.vision is None:
            raise InputError(
                f"{origin} has images, and the model reads text alone: change model.base to a model that reads images, "
                "or take the row out of data.calibration."
            )
        try:
            _ = self.vision.processor
        except InputError as error:
            raise InputError(f"{origin} has images, but {error}") from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _with_specials(self, text: str, images: tuple[RowImage, ...] = (), origin: str = "") -> list[int]:
        """Token ids with the tokenizer's own bos and the like, without an eos at the end; [] for a blank text."""
        bare = self._ids(text) if text.strip() else []
        if not bare:
            return []
        if images:
            ids = self.vision.encode(text, images, origin, special=True)
        else:
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        # An eos that the text itself ends on stays: it is part of what the user wrote.
        return ids[:-1] if eos is not None and ids[-1] == eos and bare[-1] != eos else ids

    def _response(self, text: str) -> list[int]:
        ids = self._ids(text) if text.strip() else []
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if ids and eos is not None and ids[-1] != eos else ids

    def _chat(self, example: dict, origin: str, images: tuple[RowImage, ...] = ()) -> tuple[list[int], list[int]]:
        """Prompt and response of a chat: what the template renders up to the generation prompt, and what follows it.

        Both are rendered by ``apply_chat_template`` with the row's own tools and template variables.
        """
        messages = example["messages"]
        if len(messages) == 1:
            return [], []
        # The tokenizer picks among named templates itself; the processor's goes with images, or where it alone has one.
        template = None
        if images or (self.vision is not None and not self.tokenizer.chat_template):
            template = self.vision.chat_template
        if not (template or self.tokenizer.chat_template):
            raise InputError(
                f'{origin} has "messages" but the tokenizer has no chat template: use a chat model in model.base, or '
                '{"prompt", "response"} rows in data.calibration.'
            )
        render = partial(
            self.tokenizer.apply_chat_template,
            chat_template=template,
            tools=example.get("tools"),
            tokenize=False,
            **example.get("chat_template_kwargs", {}),
        )
        try:
            prompt, full = render(messages[:-1], add_generation_prompt=True), render(messages)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{origin} cannot be rendered by the tokenizer's chat template ({error}): change that row's "
                '"messages" in data.calibration.'
            ) from error
        if not full.startswith(prompt):
            common = next((at for at, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(full))
            near = slice(max(0, common - 40), common + 40)
            raise InputError(
                f"{origin}: the chat template renders the prompt differently once the answer follows, so prompt and "
                f"response cannot be told apart (prompt alone: ...{prompt[near]!r}, with the answer: "
                f"...{full[near]!r}); set the template's variables in the row's \"chat_template_kwargs\" (such as "
                '{"enable_thinking": false}), give the answer its "reasoning_content", or give {"prompt", "response"} '
                "rows in data.calibration instead."
            )
        prompt_ids, full_ids = self._ids(prompt), self._ids(full)
        if not _has_content(messages[-1]):
            return prompt_ids, []
        response = full_ids[len(prompt_ids) :]
        if full_ids[: len(prompt_ids)] != prompt_ids:
            # The text splits but a token straddles the split: decode starts after the prompt's own tokens all the same.
            response = self._ids(full[len(prompt) :])
        if images:  # a placeholder is a token of its own, so expanding it moves no split
            prompt_ids = self.vision.encode(prompt, images, origin, special=False)
        # Templates go on behind a turn's end token (a line break, an end of text); decode stops at it.
        return prompt_ids, list(until_end(response, self.ends))

    def _text(self, text: str, origin: str) -> tuple[Row | None, str | None, bool]:
        ids = self._with_specials(text)
        length = min(len(ids), self.max_prompt + self.max_response, self.context or len(ids))
        if length < MIN_TEXT_TOKENS:
            return None, _SHORT_TEXT, False
        latest = min(length * 4 // 5, self.max_prompt)
        earliest = min((length + 1) // 2, latest)
        split = earliest + _hash63(text) % (latest - earliest + 1)
        response = ids[split : min(length, split + self.max_response)]
        return Row(tuple(ids[:split]), tuple(response), origin), None, split + len(response) < len(ids)


def _has_content(message: dict) -> bool:
    content = message.get("content", "")
    texts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    return any(text.strip() for text in texts) or bool(message.get("tool_calls") or message.get("reasoning_content"))


def until_end(tokens: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    """A response up to and with its first end token, where decode stops; what follows goes."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:stop])


def _hash63(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# --- batches ----------------------------------------------------------------------------------------------------------


def collate(
    rows: Sequence[Row], pad_token_id: int, vision: VisionProcessor | None = None, *, rank: int = 0, size: int = 1
) -> dict:
    """A batch in which every row's response starts at the same column, or one process's share of it.

    Prompts are padded on the left to the longest prompt P, responses on the right; a missing response is empty, so
    rows without responses give the left-padded prompts that ``generate`` takes.

    Every process's share has the same shape, so that all run the same operations, as weights in shards need. Where rows
    are missing for that, ghosts stand behind the real ones: rows that are padding alone (:func:`real_rows`).

    Args:
        rank, size: the share holds every ``size``-th row from the ``rank``-th on.

    Returns:
        ``input_ids`` and ``attention_mask``, both long ``[batch, T]``; ``prompt_length``, the int P; ``row_seed`` and
        ``prompt_seed``, long ``[batch]``. ``attention_mask[:, P:]`` is the mask of the responses. With images among the
        rows ``vision``: the tensors of all of them, in order, by the names that the model's forward gives them.
    """
    prompt_length = max(len(row.prompt_ids) for row in rows)
    total = prompt_length + max(len(row.response_ids or ()) for row in rows)
    share = rows[rank::size]
    input_ids = torch.full((-(-len(rows) // size), total), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    row_seed, prompt_seed = torch.zeros(2, len(input_ids), dtype=torch.long)
    for index, row in enumerate(share):
        span = slice(prompt_length - len(row.prompt_ids), prompt_length + len(row.response_ids or ()))
        input_ids[index, span] = torch.tensor(row.prompt_ids + (row.response_ids or ()), dtype=torch.long)
        attention_mask[index, span] = 1
        row_seed[index], prompt_seed[index] = row.seed, row.prompt_seed
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "prompt_length": prompt_length,
        "row_seed": row_seed,
        "prompt_seed": prompt_seed,
    }
    if any(row.images for row in share):
        batch["vision"] = vision.tensors([row.images for row in share])
    return batch


def real_rows(batch: Mapping) -> int:
    """How many rows of a batch are no ghosts; those come first."""
    return int(batch["attention_mask"].any(1).sum())


def split_rows(rows: Sequence[Row], fractions: Mapping[str, float], seed: int = 0) -> dict[str, list[Row]]:
    """Disjoint splits, the same for every order of ``rows``.

    Rows are ordered by a hash of ``seed`` and their prompt and cut where the fractions say. Rows that share a prompt
    stay together: no prompt that a projection was fitted on is verified on, and a response that is filled in later
    moves no row.

    Raises:
        InputError: there are fewer distinct prompts than splits.
    """
    key = {row.prompt: _hash63(seed, *row.prompt) for row in rows}
    ordered = sorted(rows, key=lambda row: (key[row.prompt], row.prompt, row.seed))
    groups = [list(group) for _, group in groupby(ordered, key=lambda row: row.prompt)]
    if len(groups) < len(fractions):
        raise InputError(
            f"found {len(rows)} usable rows with {len(groups)} distinct prompts, expected at least {len(fractions)}, "
            f"one for each of {', '.join(fractions)}: give more rows in data.calibration or raise data.limit "
            "(in a .txt file a blank line separates documents)."
        )
    splits, start, share, taken = {}, 0, 0.0, 0
    for index, (name, fraction) in enumerate(fractions.items()):
        left = len(fractions) - index - 1
        share += fraction
        end, target = start, len(groups) if left == 0 else round(share * len(rows))
        while end < len(groups) - left and (end == start or left == 0 or taken < target):
            taken += len(groups[end])
            end += 1
        splits[name] = [row for group in groups[start:end] for row in group]
        start = end
    return splits


class _TrainingSteps(IterableDataset):
    """Lists of rows, one per step, from step ``start`` on and without end."""

    def __init__(self, rows: list[Row], batch_size: int, seed: int, start: int):
        self.rows, self.batch_size, self.seed, self.start = rows, batch_size, seed, start

    def __iter__(self) -> Iterator[list[Row]]:
        per_epoch = -(-len(self.rows) // self.batch_size)
        for epoch in count(self.start // per_epoch):
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(_hash63(self.seed, epoch)))
            first = self.start % per_epoch if epoch == self.start // per_epoch else 0
            for step in range(first, per_epoch):
                yield [self.rows[index] for index in order[step * self.batch_size : (step + 1) * self.batch_size]]


class CalibrationData(lightning.LightningDataModule):
    """The calibration rows in four disjoint splits: ``fit``, ``tune``, ``search`` and ``verify``.

    Args:
        calibration: what :func:`read_examples` reads, or several of these.
        tokenizer: the base model's.
        split: the split of a dataset that has several.
        max_prompt_tokens: rows with a longer prompt are left out; a plain text is cut instead.
        max_response_tokens: longer responses are cut.
        context: the longest sequence of the model in tokens, None for no limit.
        end_tokens: what ends a response besides the tokenizer's eos, as the model's generation config says.
        limit: use this many rows, drawn by their content; of several sources as many of each, where they have them.
        batch_size: rows per batch.
        splits: the fraction of the rows for each of the four splits; they sum to 1.
        seed: another seed, other splits.
        vision: the base's processor; None for a model that reads text alone, where a row with images is refused.
        allow_urls: fetch images that rows name by URL.

    Raises:
        InputError: a setting does not fit; from :meth:`setup`, the data does not.
    """

    def __init__(
        self,
        calibration: str | Path | Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: str | None = None,
        max_prompt_tokens: int = 2048,
        max_response_tokens: int = 256,
        context: int | None = None,
        end_tokens: Collection[int] = (),
        limit: int | None = None,
        batch_size: int = 8,
        splits: Mapping[str, float] = SPLITS,
        seed: int = 0,
        vision: VisionProcessor | None = None,
        allow_urls: bool = False,
    ):
        super().__init__()
        _check_counts(
            {
                "data.max_prompt_tokens": max_prompt_tokens,
                "data.max_response_tokens": max_response_tokens,
                "data.limit": 1 if limit is None else limit,
                "data.batch_size": batch_size,
            }
        )
        sources = [calibration] if isinstance(calibration, (str, Path)) else calibration
        self.sources = [str(source) for source in sources]
        self.calibration, self.split, self.limit = ", ".join(self.sources), split, limit
        self.batch_size, self.seed = batch_size, seed
        self.fractions = _check_fractions(splits)
        self.max_response_tokens, self.context = max_response_tokens, context
        self.pad_token_id = next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
        )
        self.report: DataReport | None = None
        self.vision = vision
        self.ends = frozenset({tokenizer.eos_token_id, *end_tokens} - {None})
        self._tokenise = _Tokeniser(
            tokenizer,
            max_prompt_tokens,
            max_response_tokens,
            context,
            self.ends,
            vision=vision,
            allow_urls=allow_urls,
        )
        self._splits: dict[str, list[Row]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read, tokenise and split, once: Lightning calls this for every stage."""
        if not self._splits:
            self._splits = split_rows(self.read_rows(), self.fractions, self.seed)

    def read_rows(self, *, keep_duplicates: bool = False) -> list[Row]:
        """The usable rows in the file's order (a sample by content under ``limit``), unsplit; fills :attr:`report`.

        Duplicates are left out unless asked for: in two splits a row would be fitted on and verified on.

        Raises:
            InputError: nothing usable.
        """
        number = count()
        sources = [[(next(number), each) for each in read_examples(source, self.split)] for source in self.sources]
        if self.limit is not None:
            # A sample by content, not the head of the file, which is often sorted by topic or difficulty.
            for source in sources:
                source.sort(key=lambda item: self._order(*item[1]))
            sources = [filter(None, chain(*zip_longest(*sources)))]
        rows: list[Row] = []
        seen: set[tuple] = set()
        unusable: Counter[str] = Counter()
        first: dict[str, tuple[int, str]] = {}
        truncated = 0
        for position, (example, origin) in chain(*sources):
            if len(rows) == self.limit:
                break
            row, reason, cut = self._tokenise(example, origin)
            if row is not None and not keep_duplicates and row.content in seen:
                row, reason = None, _DUPLICATE
            if row is None:
                unusable[reason] += 1
                first[reason] = min(first.get(reason, (position, origin)), (position, origin))
                continue
            seen.add(row.content)
            rows.append(row)
            truncated += cut
        self.report = _report(
            rows, dict(unusable), {reason: origin for reason, (_, origin) in first.items()}, truncated
        )
        if not rows:
            raise InputError(
                f"data.calibration {self.calibration!r} has no usable row: {self.report._unusable()}; change the rows, "
                f"data.max_prompt_tokens ({self._tokenise.max_prompt}) or data.max_response_tokens "
                f"({self.max_response_tokens})."
            )
        return rows

    def _order(self, example: dict, origin: str) -> tuple:
        """Where an example stands in the order that ``limit`` samples by: what is written, then what images hold."""
        written = json.dumps(example, sort_keys=True, default=lambda unwritten: None)
        key = _hash63(self.seed, written)
        return (key, _ByImages(partial(self._tokenise.images, example, origin)))

    def rows(self) -> Iterator[Row]:
        """The rows of all splits."""
        self.setup()
        return chain.from_iterable(self._splits.values())

    def rows_of(self, name: str) -> list[Row]:
        """The rows of one split, in the order of their hash.

        Raises:
            InputError: there is no such split.
        """
        self.setup()
        if name not in self._splits:
            raise InputError(f"data.splits has no split {name!r}: expected one of {', '.join(self._splits)}.")
        return list(self._splits[name])

    def prompts_of(self, name: str) -> int:
        """How many different prompts the rows of one split have: the independent draws that a bound counts."""
        return len({row.prompt_seed for row in self.rows_of(name)})

    def loader(self, name: str, limit: int | None = None) -> DataLoader:
        """Batches of :func:`collate` over one split, every row once; each process gets its share of every batch.

        ``batch_size`` rows are one process's. The longest rows come first: little padding, and what does not fit in
        memory shows at once. ``limit`` takes the first rows of :meth:`rows_of`.

        Raises:
            InputError: a row's response is still missing.
        """
        rows = sorted(self._complete(name)[:limit], key=lambda row: (-row.length, row.seed))
        return DataLoader(rows, batch_size=self.batch_size * ranks.size(), collate_fn=self._share)

    def train_dataloader(self, batch_size: int | None = None, start: int = 0) -> DataLoader:
        """Batches of ``fit`` without end, each epoch in an order of its own; step ``start`` comes first.

        ``batch_size`` rows are those of all processes together, so that their number changes nothing. Which rows a step
        reads follows from the seed and the step's number alone, so that a resumed training goes on with the batches
        that it would have read.
        """
        steps = _TrainingSteps(self._complete("fit"), batch_size or self.batch_size, self.seed, start)
        return DataLoader(steps, batch_size=None, collate_fn=self._share)

    def _complete(self, name: str) -> list[Row]:
        rows = self.rows_of(name)
        missing = next((row for row in rows if row.response_ids is None), None)
        if missing is not None:
            raise InputError(
                f"{missing.origin} has no response yet: fill_responses generates it, or give "
                '{"prompt", "response"} rows in data.calibration.'
            )
        return rows

    def batch(self, rows: Sequence[Row]) -> dict:
        """:func:`collate` of some rows, all of them on this process; their images are read and prepared here.

        Raises:
            InputError: an image can no longer be read.
        """
        return collate(rows, self.pad_token_id, self.vision)

    @property
    def _share(self) -> Callable[[Sequence[Row]], dict]:
        """:func:`collate` for this process's share of a batch."""
        return partial(
            collate, pad_token_id=self.pad_token_id, vision=self.vision, rank=ranks.rank(), size=ranks.size()
        )

    @property
    def digest(self) -> str:
        """A hash of all rows, the same for every order of them; it changes when responses are filled in."""
        self.setup()
        seeds = sorted(row.seed for rows in self._splits.values() for row in rows)
        return hashlib.sha256(json.dumps(seeds).encode()).hexdigest()

    def missing_responses(self) -> bool:
        """Whether any row still waits for the full model's response."""
        self.setup()
        return any(row.response_ids is None for rows in self._splits.values() for row in rows)

    def fill_responses(
        self,
        generate: Callable[[list[Row]], list[tuple[int, ...]]],
        cache: str | Path,
        *,
        made_with: str = "",
    ) -> None:
        """Give every row without a response the one that ``generate`` returns, and keep them in ``cache``.

        Each process generates for its share of every batch.

        Args:
            generate: from a batch of rows to their response ids, without padding, in the same order.
            cache: a JSON file, the first process's; responses found there are not generated again. It is saved after
                every batch, so an interrupted run goes on where it stopped.
            made_with: what the responses depend on besides the prompt (model, decoding). A cache that was made with
                something else, or with another data.max_response_tokens, is started anew.

        Raises:
            InputError: a split has no row left, because the generated responses are empty.
        """
        self.setup()
        waiting = [row for rows in self._splits.values() for row in rows if row.response_ids is None]
        if not waiting:
            return
        cache = Path(cache)
        stamp = {"made_with": made_with, "max_response_tokens": self.max_response_tokens}
        responses = ranks.from_first(lambda: _read_cache(cache, stamp))
        todo = sorted(
            (row for row in waiting if str(row.seed) not in responses), key=lambda row: (-row.length, row.seed)
        )
        hidden = not todo or not ranks.is_first()
        with tqdm(total=len(todo), desc="responses of the full model", unit="row", disable=hidden) as bar:
            step = self.batch_size * ranks.size()
            for start in range(0, len(todo), step):
                batch = todo[start : start + step]
                # A process without a row of its own repeats one: all have to generate in step.
                share = batch[ranks.rank() :: ranks.size()]
                generated = ranks.gather(generate(share or batch[-1:])[: len(share)])
                for number, ids_of_rank in enumerate(generated):
                    for row, ids in zip(batch[number :: ranks.size()], ids_of_rank, strict=True):
                        responses[str(row.seed)] = [int(token) for token in ids]
                if ranks.is_first():
                    _write_cache(cache, {**stamp, "responses": responses})
                bar.update(len(batch))
        self._take(responses)

    def _take(self, responses: dict[str, list[int]]) -> None:
        unusable, first = Counter(self.report.unusable), dict(self.report.first_unusable)
        splits, seen, truncated = {}, set(), self.report.truncated
        for name, rows in self._splits.items():
            splits[name] = []
            # Given responses before generated ones: where the two agree, the given row is the one that stays.
            for row in sorted(rows, key=lambda row: row.response_ids is None):
                if row.response_ids is None:
                    ids = responses[str(row.seed)]
                    truncated += len(ids) > self.max_response_tokens
                    row = replace(row, response_ids=tuple(ids[: self.max_response_tokens]))
                reason = _DUPLICATE if row.content in seen else None if row.response_ids else _EMPTY_RESPONSE
                if self.vision is not None and set(self.vision.tokens) & set(row.response_ids):
                    reason = _IMAGE_RESPONSE  # a pass over the row would look for an image behind it
                if reason:
                    unusable[reason] += 1
                    first.setdefault(reason, row.origin)
                    continue
                seen.add(row.content)
                splits[name].append(row)
            splits[name].sort(key=lambda row: (_hash63(self.seed, *row.prompt), row.seed))
        self.report = _report([row for rows in splits.values() for row in rows], dict(unusable), first, truncated)
        empty = [name for name, rows in splits.items() if not rows]
        if empty:
            raise InputError(
                f"data.calibration {self.calibration!r} leaves no row in {', '.join(empty)} after generation: "
                f"{self.report._unusable()}; give more rows or data.splits with larger fractions there."
            )
        self._splits = splits


@dataclass(eq=False)
class _ByImages:
    """Sorts by the images' digests, and reads them only where two examples are written alike."""

    images: Callable[[], tuple[RowImage, ...]]

    def __lt__(self, other: "_ByImages") -> bool:
        return [image.digest for image in self.images()] < [image.digest for image in other.images()]


def _check_counts(counts: dict[str, int]) -> None:
    for key, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{key} must be a whole number of at least 1, found {value!r}.")


def _check_fractions(splits: Mapping[str, float]) -> dict[str, float]:
    """The fractions in the library's order, so that the order of a recipe's keys changes nothing."""
    if splits.keys() != SPLITS.keys():
        raise InputError(f"data.splits has {', '.join(splits) or 'no names'}: expected exactly {', '.join(SPLITS)}.")
    for name, value in splits.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise InputError(f"data.splits.{name} must be a fraction between 0 and 1, found {value!r}.")
    total = sum(splits.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"data.splits must sum to 1, found {total:g}: change the fractions of {', '.join(SPLITS)}.")
    return {name: float(splits[name]) for name in SPLITS}


def _report(rows: list[Row], unusable: dict[str, int], first: dict[str, str], truncated: int) -> DataReport:
    responses = [len(row.response_ids) for row in rows if row.response_ids is not None]
    return DataReport(
        rows=len(rows),
        unusable=unusable,
        first_unusable=first,
        truncated=truncated,
        prompt_tokens=_spread([len(row.prompt_ids) for row in rows]),
        response_tokens=_spread(responses),
    )


def _spread(lengths: list[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    return {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)}


def _read_cache(cache: Path, stamp: dict) -> dict[str, list[int]]:
    try:
        content = json.loads(cache.read_text())
        return dict(content["responses"]) if all(content[key] == value for key, value in stamp.items()) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # it can be made again


def _write_cache(cache: Path, content: dict) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_json(cache, content)
