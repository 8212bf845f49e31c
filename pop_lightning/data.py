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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, groupby
from pathlib import Path

import lightning
import torch
from jinja2 import TemplateError
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pop_lightning.errors import InputError
from pop_lightning.files import write_json

SPLITS = {"fit": 0.3, "tune": 0.1, "search": 0.2, "verify": 0.4}
SHAPES = '{"prompt", "response"}, {"messages"}, {"prompt"} or {"text"}'
MIN_TEXT_TOKENS = 8
_KEYS = ("messages", "prompt", "response", "text")
_BUNDLED = "bundled:"

_EMPTY_PROMPT = "empty prompt"
_EMPTY_RESPONSE = "empty response"
_LONG_PROMPT = "prompt longer than data.max_prompt_tokens"
_LONG_ROW = "longer than the model's context"
_SHORT_TEXT = f"text shorter than {MIN_TEXT_TOKENS} tokens"
_DUPLICATE = "duplicate"


@dataclass(frozen=True)
class Row:
    """One tokenised row; ``response_ids`` is None until the full model has generated it.

    ``origin`` says where the row stands, for messages: ``file.jsonl line 12``.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    origin: str

    @property
    def seed(self) -> int:
        """A 63-bit hash of the token ids: the same on every machine, in every process and for every file order."""
        return _hash63(self.prompt_ids, self.response_ids)

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
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if path.is_file() and kind in (".jsonl", ".json"):
        examples = _read_json_lines(path)
    elif path.is_file() and kind == ".txt":
        examples = _read_text(path)
    elif path.is_file():
        raise InputError(
            f"data.calibration {str(source)!r} is a file of unknown kind: .jsonl, .json or .txt was expected."
        )
    elif not path.exists() and (
        # No hub id looks like this: asking the hub would only cost its retries.
        kind in (".jsonl", ".json", ".txt") or suffixes[-1:] == [".gz"] or len(path.parts) > 2 or path.is_absolute()
    ):
        raise InputError(
            f"data.calibration {str(source)!r} does not exist: change data.calibration to a file that does."
        )
    else:
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
        examples.append((_shape(example, where), f"{path.name} line {number}"))
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
    # Other columns may be images or audio, which are decoded when a row is read.
    return [
        (_shape(dict(example), f"data.calibration {source!r} row {number}"), f"{name} row {number}")
        for number, example in enumerate(dataset.select_columns(known))
    ]


def _shape(example: dict, where: str) -> dict:
    """``example`` reduced to the keys of its shape; a key whose value is null counts as absent, as in a table."""
    found = {key: value for key, value in example.items() if value is not None}
    if "messages" in found:
        return {"messages": _messages(found["messages"], where)}
    keys = next((keys for keys in (("prompt", "response"), ("prompt",), ("text",)) if found.keys() >= set(keys)), None)
    if keys is None:
        named = ", ".join(repr(key) for key in example) or "none"
        raise InputError(f"{where} has the keys {named}: expected {SHAPES}; change the rows or data.calibration.")
    for key in keys:
        if not isinstance(found[key], str):
            raise InputError(f"{where} has a {key!r} of type {type(found[key]).__name__}: a string was expected.")
    return {key: found[key] for key in keys}


def _messages(messages, where: str) -> list[dict]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise InputError(f'{where} has "messages" that are not a list of objects with "role" and "content".')
    if not messages or messages[-1]["role"] != "assistant":
        last = repr(messages[-1]["role"]) if messages else "missing"
        raise InputError(f"{where}: the role of the last message is {last}, 'assistant' was expected (the response).")
    for message in messages:
        content = message.get("content")
        parts = [{"type": "text"}] if isinstance(content, str) or content is None else content
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise InputError(f'{where} has a message whose "content" is neither a string nor a list of parts.')
        others = sorted({str(part.get("type")) for part in parts} - {"text"})
        if others:  # the tokenizer alone would drop them without a word
            raise InputError(f"{where} has message parts of type {', '.join(others)}: only text is supported.")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


# --- tokenising -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokeniser:
    """From one example to ``(row, reason, truncated)``: exactly one of row and reason is None."""

    tokenizer: PreTrainedTokenizerBase
    max_prompt: int
    max_response: int
    context: int | None

    def __call__(self, example: dict, origin: str) -> tuple[Row | None, str | None, bool]:
        if "text" in example:
            return self._text(example["text"], origin)
        if "messages" in example:
            prompt, response = self._chat(example["messages"], origin)
        else:
            prompt = self._with_specials(example["prompt"])
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
        return Row(tuple(prompt), response, origin), None, truncated

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _with_specials(self, text: str) -> list[int]:
        """Token ids with the tokenizer's own bos and the like, without an eos at the end; [] for a blank text."""
        bare = self._ids(text) if text.strip() else []
        if not bare:
            return []
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        eos = self.tokenizer.eos_token_id
        # An eos that the text itself ends on stays: it is part of what the user wrote.
        return ids[:-1] if eos is not None and ids[-1] == eos and bare[-1] != eos else ids

    def _response(self, text: str) -> list[int]:
        ids = self._ids(text) if text.strip() else []
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if ids and eos is not None and ids[-1] != eos else ids

    def _chat(self, messages: list[dict], origin: str) -> tuple[list[int], list[int]]:
        if len(messages) == 1:
            return [], []
        if not self.tokenizer.chat_template:
            raise InputError(
                f'{origin} has "messages" but the tokenizer has no chat template: use a chat model in model.base, or '
                '{"prompt", "response"} rows in data.calibration.'
            )
        try:
            prompt = self.tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
            full = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
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
                f'...{full[near]!r}); give {{"prompt", "response"}} rows in data.calibration instead.'
            )
        # Templates put a line break behind the end token of a turn; decode stops at the token and never writes it.
        full = prompt + full[len(prompt) :].rstrip()
        prompt_ids, full_ids = self._ids(prompt), self._ids(full)
        if not _has_content(messages[-1]):
            return prompt_ids, []
        if full_ids[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, full_ids[len(prompt_ids) :]
        # The text splits but a token straddles the split: decode starts after the prompt's own tokens all the same.
        return prompt_ids, self._ids(full[len(prompt) :])

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
    return any(text.strip() for text in texts) or bool(message.get("tool_calls"))


def _hash63(*parts) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# --- batches ----------------------------------------------------------------------------------------------------------


def collate(rows: Sequence[Row], pad_token_id: int) -> dict:
    """A batch in which every row's response starts at the same column.

    Prompts are padded on the left to the longest prompt P, responses on the right; a missing response is empty, so
    rows without responses give the left-padded prompts that ``generate`` takes.

    Returns:
        ``input_ids`` and ``attention_mask``, both long ``[batch, T]``; ``prompt_length``, the int P; ``row_seed``, long
        ``[batch]``. ``attention_mask[:, P:]`` is the mask of the responses.
    """
    prompt_length = max(len(row.prompt_ids) for row in rows)
    total = prompt_length + max(len(row.response_ids or ()) for row in rows)
    input_ids = torch.full((len(rows), total), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        span = slice(prompt_length - len(row.prompt_ids), prompt_length + len(row.response_ids or ()))
        input_ids[index, span] = torch.tensor(row.prompt_ids + (row.response_ids or ()), dtype=torch.long)
        attention_mask[index, span] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "prompt_length": prompt_length,
        "row_seed": torch.tensor([row.seed for row in rows], dtype=torch.long),
    }


def split_rows(rows: Sequence[Row], fractions: Mapping[str, float], seed: int = 0) -> dict[str, list[Row]]:
    """Disjoint splits, the same for every order of ``rows``.

    Rows are ordered by a hash of ``seed`` and their prompt and cut where the fractions say. Rows that share a prompt
    stay together: no prompt that a projection was fitted on is verified on, and a response that is filled in later
    moves no row.

    Raises:
        InputError: there are fewer distinct prompts than splits.
    """
    key = {row.prompt_ids: _hash63(seed, row.prompt_ids) for row in rows}
    ordered = sorted(rows, key=lambda row: (key[row.prompt_ids], row.prompt_ids, row.seed))
    groups = [list(group) for _, group in groupby(ordered, key=lambda row: row.prompt_ids)]
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
        calibration: what :func:`read_examples` reads.
        tokenizer: the base model's.
        split: the split of a dataset that has several.
        max_prompt_tokens: rows with a longer prompt are left out; a plain text is cut instead.
        max_response_tokens: longer responses are cut.
        context: the longest sequence of the model in tokens, None for no limit.
        limit: use this many rows, drawn by their content.
        batch_size: rows per batch.
        splits: the fraction of the rows for each of the four splits; they sum to 1.
        seed: another seed, other splits.

    Raises:
        InputError: a setting does not fit; from :meth:`setup`, the data does not.
    """

    def __init__(
        self,
        calibration: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: str | None = None,
        max_prompt_tokens: int = 2048,
        max_response_tokens: int = 256,
        context: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        splits: Mapping[str, float] = SPLITS,
        seed: int = 0,
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
        self.calibration, self.split, self.limit = str(calibration), split, limit
        self.batch_size, self.seed = batch_size, seed
        self.fractions = _check_fractions(splits)
        self.max_response_tokens, self.context = max_response_tokens, context
        self.pad_token_id = next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
        )
        self.report: DataReport | None = None
        self._tokenise = _Tokeniser(tokenizer, max_prompt_tokens, max_response_tokens, context)
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
        examples = list(enumerate(read_examples(self.calibration, self.split)))
        if self.limit is not None:
            # A sample by content, not the head of the file, which is often sorted by topic or difficulty.
            examples.sort(key=lambda item: _hash63(self.seed, json.dumps(item[1][0], sort_keys=True)))
        rows: list[Row] = []
        seen: set[tuple] = set()
        unusable: Counter[str] = Counter()
        first: dict[str, tuple[int, str]] = {}
        truncated = 0
        for position, (example, origin) in examples:
            if len(rows) == self.limit:
                break
            row, reason, cut = self._tokenise(example, origin)
            if row is not None and not keep_duplicates and (row.prompt_ids, row.response_ids) in seen:
                row, reason = None, _DUPLICATE
            if row is None:
                unusable[reason] += 1
                first[reason] = min(first.get(reason, (position, origin)), (position, origin))
                continue
            seen.add((row.prompt_ids, row.response_ids))
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

    def rows_of(self, name: str) -> list[Row]:
        """The rows of one split, in the order of their hash.

        Raises:
            InputError: there is no such split.
        """
        self.setup()
        if name not in self._splits:
            raise InputError(f"data.splits has no split {name!r}: expected one of {', '.join(self._splits)}.")
        return list(self._splits[name])

    def loader(self, name: str, limit: int | None = None) -> DataLoader:
        """Batches of :func:`collate` over one split, every row once.

        The longest rows come first: little padding, and what does not fit in memory shows at once. ``limit`` takes the
        first rows of :meth:`rows_of`.

        Raises:
            InputError: a row's response is still missing.
        """
        rows = sorted(self._complete(name)[:limit], key=lambda row: (-row.length, row.seed))
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=self._collate)

    def train_dataloader(self, batch_size: int | None = None, start: int = 0) -> DataLoader:
        """Batches of ``fit`` without end, each epoch in an order of its own; step ``start`` comes first.

        Which rows a step reads follows from the seed and the step's number alone, so that a resumed training goes on
        with the batches that it would have read.
        """
        steps = _TrainingSteps(self._complete("fit"), batch_size or self.batch_size, self.seed, start)
        return DataLoader(steps, batch_size=None, collate_fn=self._collate)

    def _complete(self, name: str) -> list[Row]:
        rows = self.rows_of(name)
        missing = next((row for row in rows if row.response_ids is None), None)
        if missing is not None:
            raise InputError(
                f"{missing.origin} has no response yet: fill_responses generates it, or give "
                '{"prompt", "response"} rows in data.calibration.'
            )
        return rows

    @property
    def _collate(self) -> Callable[[list[Row]], dict]:
        return partial(collate, pad_token_id=self.pad_token_id)

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

        Args:
            generate: from a batch of rows to their response ids, without padding, in the same order.
            cache: a JSON file; responses found there are not generated again. It is saved after every batch, so an
                interrupted run goes on where it stopped.
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
        responses = _read_cache(cache, stamp)
        todo = sorted(
            (row for row in waiting if str(row.seed) not in responses), key=lambda row: (-row.length, row.seed)
        )
        with tqdm(total=len(todo), desc="responses of the full model", unit="row", disable=not todo) as bar:
            for start in range(0, len(todo), self.batch_size):
                batch = todo[start : start + self.batch_size]
                generated = generate(batch)
                for row, ids in zip(batch, generated, strict=True):
                    responses[str(row.seed)] = [int(token) for token in ids]
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
                content = (row.prompt_ids, row.response_ids)
                reason = _DUPLICATE if content in seen else None if row.response_ids else _EMPTY_RESPONSE
                if reason:
                    unusable[reason] += 1
                    first.setdefault(reason, row.origin)
                    continue
                seen.add(content)
                splits[name].append(row)
            splits[name].sort(key=lambda row: (_hash63(self.seed, row.prompt_ids), row.seed))
        self.report = _report([row for rows in splits.values() for row in rows], dict(unusable), first, truncated)
        empty = [name for name, rows in splits.items() if not rows]
        if empty:
            raise InputError(
                f"data.calibration {self.calibration!r} leaves no row in {', '.join(empty)} after generation: "
                f"{self.report._unusable()}; give more rows or data.splits with larger fractions there."
            )
        self._splits = splits


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
