"""Calibration data: rows in the shapes people have, tokenised once, split into four disjoint parts.

Everything after it (scoring, fitting, search, verification) sees the batches of :func:`collate` and nothing else.
"""

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pop_lightning.errors import InputError

SPLITS = {"fit": 0.3, "tune": 0.1, "search": 0.2, "verify": 0.4}
SHAPES = '{"prompt", "response"}, {"messages"}, {"prompt"} or {"text"}'


@dataclass(frozen=True)
class Row:
    """One tokenised example; ``response_ids`` is None until the full model has written the response."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...] | None
    origin: str

    @property
    def seed(self) -> int:
        """A hash of the content, below 2^63: randomness derived from it ignores order and batching."""
        text = f"{self.prompt_ids}|{self.response_ids}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass
class DataReport:
    """What was read: usable rows, the others by reason with the first of each, and lengths in tokens."""

    rows: int = 0
    unusable: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    truncated: int = 0
    prompt_tokens: dict[str, int] = field(default_factory=dict)
    response_tokens: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, origin: str) -> None:
        self.unusable[reason] += 1
        self.first.setdefault(reason, origin)

    def __str__(self) -> str:
        text = f"{self.rows} usable rows"
        if self.prompt_tokens:
            text += "; prompts {min}..{max} tokens (median {median})".format(**self.prompt_tokens)
        if self.response_tokens:
            text += "; responses {min}..{max} tokens (median {median})".format(**self.response_tokens)
        if self.truncated:
            text += f"; {self.truncated} responses cut to length"
        for reason, count in self.unusable.items():
            text += f"; {count} not used: {reason} (first: {self.first[reason]})"
        return text


def resolve_bundled(name: str) -> str:
    """The path behind ``bundled:NAME``; any other name comes back unchanged.

    Raises:
        InputError: nothing of that name is bundled.
    """
    if not str(name).startswith("bundled:"):
        return str(name)
    import pop_lightning.checkpoints

    root = Path(pop_lightning.checkpoints.__file__).parent
    path = root / name.removeprefix("bundled:")
    if not path.exists():
        known = ", ".join(f"bundled:{p.name}" for p in sorted(root.iterdir()) if (p / "config.json").exists())
        raise InputError(f"{name} is not bundled; bundled models: {known or 'none'}.")
    return str(path)


def read_examples(source: str, split: str | None = None) -> list[tuple[dict, str]]:
    """Read raw examples, each with where it came from ("file.jsonl line 12").

    JSON Lines (also gzipped), ``.txt`` (a blank line between documents), a folder written by ``save_to_disk``, or any
    name that ``datasets.load_dataset`` knows.

    Raises:
        InputError: the file is missing, empty, or a line of it is no JSON object of a known shape.
    """
    name = resolve_bundled(source)
    path = Path(name)
    suffixes = [s for s in path.suffixes if s != ".gz"]
    if suffixes and suffixes[-1] in (".jsonl", ".json", ".txt"):
        if not path.is_file():
            raise InputError(f"data.calibration: no file {source}; expected JSON Lines or .txt.")
        try:
            with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f:
                text = f.read()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data.calibration: {source} cannot be read as UTF-8 text ({error}).") from error
        examples = _text_documents(text, path.name) if suffixes[-1] == ".txt" else _json_lines(text, path.name)
    else:
        examples = _dataset(name, source, split)
    if not examples:
        raise InputError(f"data.calibration: {source} holds no rows; expected {SHAPES}.")
    return examples


def _text_documents(text: str, name: str) -> list[tuple[dict, str]]:
    documents, line = [], 1
    for block in text.split("\n\n"):
        if block.strip():
            documents.append(
                (
                    {"text": block.strip()},
                    f"{name} line {line + block.count(chr(10), 0, len(block) - len(block.lstrip()))}",
                )
            )
        line += block.count("\n") + 2
    return documents


def _json_lines(text: str, name: str) -> list[tuple[dict, str]]:
    examples = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        origin = f"{name} line {number}"
        try:
            example = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"data.calibration: {origin} is not JSON ({error.msg}); expected one object a line."
            ) from error
        _check_shape(example, origin)
        examples.append((example, origin))
    return examples


def _dataset(name: str, source: str, split: str | None) -> list[tuple[dict, str]]:
    import datasets

    try:
        if Path(name).is_dir():
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[split or "train"]
        else:
            loaded = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises many kinds; all of them mean the same to the user
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(
            f"data.calibration: {source} is no .jsonl or .txt file, and as a dataset (data.split: {split or 'train'}) it "
            f"does not load: {first}."
        ) from error
    examples = [(dict(example), f"{source} row {index}") for index, example in enumerate(loaded)]
    for example, origin in examples[:1]:
        _check_shape(example, origin)
    return examples


def _check_shape(example, origin: str) -> None:
    if not isinstance(example, dict):
        raise InputError(f"data.calibration: {origin} is a {type(example).__name__}; expected an object: {SHAPES}.")
    if not {"prompt", "messages", "text"} & set(example):
        raise InputError(f"data.calibration: {origin} has the keys {sorted(example)}; expected {SHAPES}.")
    for key in ("prompt", "response", "text"):
        if key in example and not isinstance(example[key], str):
            raise InputError(
                f"data.calibration: {origin}: {key} must be a string, found {type(example[key]).__name__}."
            )
    if "messages" in example and not (isinstance(example["messages"], list) and example["messages"]):
        raise InputError(
            f"data.calibration: {origin}: messages must be a list of turns that ends with the assistant's."
        )


def tokenise_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """A prompt's ids with the tokenizer's own special tokens, without an end token that it may append."""
    ids = list(tokenizer(prompt)["input_ids"])
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return tuple(ids)


class _Tokeniser:
    """Turns raw examples into rows, counting what cannot be used."""

    def __init__(self, tokenizer, max_prompt: int, max_response: int, context: int | None, report: DataReport):
        self.tokenizer, self.report = tokenizer, report
        self.max_prompt, self.max_response, self.context = max_prompt, max_response, context

    def __call__(self, example: dict, origin: str) -> Row | None:
        if "text" in example and "prompt" not in example and "messages" not in example:
            return self._text(example["text"], origin)
        if "messages" in example:
            prompt, response = self._chat(example["messages"], origin)
        else:
            if not example["prompt"].strip():
                return self.report.drop("empty prompt", origin)
            prompt = tokenise_prompt(self.tokenizer, example["prompt"])
            response = None
            if "response" in example:
                if not example["response"].strip():
                    return self.report.drop("empty response", origin)
                response = (*self._plain(example["response"]), *self._end())
        return self.fit(Row(prompt, response, origin))

    def fit(self, row: Row) -> Row | None:
        """Hold a row against the limits; None (and counted) where it cannot be used."""
        if not row.prompt_ids:
            return self.report.drop("empty prompt", row.origin)
        if row.response_ids is not None and not row.response_ids:
            return self.report.drop("empty response", row.origin)
        if len(row.prompt_ids) > self.max_prompt:
            return self.report.drop(f"prompt longer than data.max_prompt_tokens {self.max_prompt}", row.origin)
        if row.response_ids is not None and len(row.response_ids) > self.max_response:
            self.report.truncated += 1
            row = replace(row, response_ids=row.response_ids[: self.max_response])
        length = len(row.prompt_ids) + (self.max_response if row.response_ids is None else len(row.response_ids))
        if self.context is not None and length > self.context:
            return self.report.drop(f"longer than the model's context of {self.context} tokens", row.origin)
        return row

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _end(self) -> tuple[int, ...]:
        return () if self.tokenizer.eos_token_id is None else (self.tokenizer.eos_token_id,)

    def _chat(self, messages: list[dict], origin: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"data.calibration: {origin} holds messages, but the tokenizer has no chat template; use prompt/response "
                f"rows or a model with a template."
            )
        if messages[-1].get("role") != "assistant":
            raise InputError(
                f"data.calibration: {origin}: the last message must be the assistant's (the response), "
                f"found role {messages[-1].get('role')!r}."
            )
        render = self.tokenizer.apply_chat_template
        prompt = render(messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        whole = render(messages, tokenize=True, return_dict=True)["input_ids"]
        if whole[: len(prompt)] != prompt:
            decode = self.tokenizer.decode
            raise InputError(
                f"data.calibration: {origin}: the chat template does not render the prompt as the start of the "
                f"conversation; prompt ends {decode(prompt)[-60:]!r}, conversation {decode(whole)[-120:]!r}."
            )
        return tuple(prompt), tuple(whole[len(prompt) :])

    def _text(self, text: str, origin: str) -> Row | None:
        ids = tokenise_prompt(self.tokenizer, text)
        limit = self.max_prompt + self.max_response
        ids = ids[: limit if self.context is None else min(limit, self.context)]
        if len(ids) < 8:
            return self.report.drop("text shorter than 8 tokens", origin)
        # Between half and four fifths is prompt: drawn from the row's own hash, so that no order or seed moves it.
        share = 0.5 + 0.3 * int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        cut = min(max(int(len(ids) * share), len(ids) - self.max_response), self.max_prompt)
        return self.fit(Row(ids[:cut], ids[cut:], origin))


class CalibrationData(lightning.LightningDataModule):
    """Calibration rows in four disjoint splits: fit (projections), tune (ridge), search, verify.

    Args:
        calibration: see :func:`read_examples`; ``split`` is the dataset's own split, where there is one.
        max_prompt_tokens, max_response_tokens: longer prompts are not used, longer responses are cut.
        context: the model's context length in tokens, where known.
        limit: use at most this many rows.
        splits: the share of each split; a row's place follows from (seed, its content).

    Raises:
        InputError: from :meth:`setup`, where nothing usable is found.
    """

    def __init__(
        self,
        calibration: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        split: str | None = None,
        max_prompt_tokens: int = 2048,
        max_response_tokens: int = 256,
        context: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        splits: dict[str, float] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.calibration, self.tokenizer, self.split = calibration, tokenizer, split
        self.limit, self.batch_size, self.seed = limit, batch_size, seed
        self.splits = dict(splits or SPLITS)
        if (
            set(self.splits) != set(SPLITS)
            or abs(sum(self.splits.values()) - 1) > 1e-6
            or min(self.splits.values()) <= 0
        ):
            raise InputError(
                f"data.splits must give {', '.join(SPLITS)} shares above 0 that sum to 1, found {self.splits}."
            )
        self.report = DataReport()
        self._tokenise = _Tokeniser(tokenizer, max_prompt_tokens, max_response_tokens, context, self.report)
        self.rows: list[Row] = []

    def setup(self, stage: str | None = None) -> None:
        if self.rows:
            return
        seen: set[int] = set()
        for example, origin in read_examples(self.calibration, self.split):
            if self.limit is not None and len(self.rows) >= self.limit:
                break
            row = self._tokenise(example, origin)
            if row is None:
                continue
            if row.seed in seen:  # the same row in two splits would make them overlap
                self.report.drop("repeats another row", origin)
                continue
            seen.add(row.seed)
            self.rows.append(row)
        self._settle()

    def _settle(self) -> None:
        self.report.rows = len(self.rows)
        if len(self.rows) < len(SPLITS):
            raise InputError(
                f"data.calibration: {len(self.rows)} usable rows, at least {len(SPLITS)} are needed ({self.report})."
            )
        self.report.prompt_tokens = _lengths([len(row.prompt_ids) for row in self.rows])
        self.report.response_tokens = _lengths([len(row.response_ids) for row in self.rows if row.response_ids])
        key = lambda row: hashlib.sha256(f"{self.seed}/{row.prompt_ids}".encode()).digest()  # noqa: E731
        ordered = sorted(self.rows, key=key)
        spare = len(ordered) - len(SPLITS)
        self._parts, start, share = {}, 0, 0.0
        for place, name in enumerate(SPLITS, 1):
            share += self.splits[name]
            end = len(ordered) if place == len(SPLITS) else place + round(spare * share)
            self._parts[name] = ordered[start:end]
            start = end

    def rows_of(self, name: str) -> list[Row]:
        self.setup()
        return self._parts[name]

    def loader(self, name: str, *, limit: int | None = None, batch_size: int | None = None, shuffle: bool = False):
        """Batches of one split: by length to limit padding, or shuffled by the seed for training."""
        rows = self.rows_of(name)[:limit]
        if not shuffle:
            rows = sorted(rows, key=lambda row: (len(row.prompt_ids), row.seed))
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else (self.tokenizer.eos_token_id or 0)
        return DataLoader(
            rows,
            batch_size=batch_size or self.batch_size,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(self.seed) if shuffle else None,
            collate_fn=lambda batch: collate(batch, pad),
        )

    def missing_responses(self) -> bool:
        self.setup()
        return any(row.response_ids is None for row in self.rows)

    def fill_responses(self, generate: Callable[[list[Row]], list[tuple[int, ...]]], cache: Path) -> None:
        """Let the full model write the responses of prompt-only rows, once: they are kept in ``cache`` (JSON)."""
        self.setup()
        known = json.loads(cache.read_text()) if cache.is_file() else {}
        missing = sorted(
            (row for row in self.rows if row.response_ids is None and str(row.seed) not in known),
            key=lambda row: len(row.prompt_ids),
        )
        for start in tqdm(
            range(0, len(missing), self.batch_size), desc="responses of the full model", disable=not missing
        ):
            rows = missing[start : start + self.batch_size]
            known |= {str(row.seed): list(ids) for row, ids in zip(rows, generate(rows), strict=True)}
        if missing:
            temporary = cache.with_name(cache.name + ".tmp")
            temporary.write_text(json.dumps(known))
            os.replace(temporary, cache)
        filled = []
        for row in self.rows:
            if row.response_ids is None:
                row = self._tokenise.fit(replace(row, response_ids=tuple(known[str(row.seed)])))
            if row is not None:
                filled.append(row)
        self.rows = filled
        self._settle()


def collate(rows: Sequence[Row], pad_token_id: int) -> dict:
    """A batch in which every prompt ends at the same column: prompts left-padded, responses right-padded.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[batch, tokens]``, ``prompt_length`` (the padded prompts' width, an int)
        and ``row_seed`` ``[batch]``.
    """
    prompt = max(len(row.prompt_ids) for row in rows)
    response = max(len(row.response_ids) for row in rows)
    ids = torch.full((len(rows), prompt + response), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        start, end = prompt - len(row.prompt_ids), prompt + len(row.response_ids)
        ids[index, start:end] = torch.tensor(row.prompt_ids + row.response_ids)
        mask[index, start:end] = 1
    seeds = torch.tensor([row.seed for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "prompt_length": prompt, "row_seed": seeds}


def _lengths(lengths: list[int]) -> dict[str, int]:
    if not lengths:
        return {}
    return {"min": min(lengths), "median": sorted(lengths)[len(lengths) // 2], "max": max(lengths)}
