"""Calibration data: rows in four disjoint splits, their batches, and the responses that are generated once.

The last step of the data flow, after ``examples.py`` and ``rows.py``: importance, projection training, the choice of a
depth and its verification all get their batches here.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, zip_longest
from pathlib import Path

import lightning
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError, Key
from pop_lightning.data.batches import Batches, Epochs, EveryBatch, ResumableLoader, Steps, TrainingBatches, collate
from pop_lightning.data.examples import given_examples, read_examples
from pop_lightning.data.processor import VisionProcessor
from pop_lightning.data.report import DataReport
from pop_lightning.data.responses import generated_responses
from pop_lightning.data.rows import EMPTY_RESPONSE, Row, RowTokenizer, hash63, response_limit
from pop_lightning.data.splits import SPLITS, check_fractions, split_rows
from pop_lightning.models.loading import load_tokenizer

_DUPLICATE = "duplicate"
_BROKEN = "rows that cannot be read"
MOST_BROKEN = 0.1  # a larger share of such rows means that the source is wrong, not single rows
_VISION_RESPONSE = "response with an image or video token"


class CalibrationData(lightning.LightningDataModule):
    """The calibration rows in four disjoint splits: ``fit``, ``tune``, ``search`` and ``verify``.

    Args:
        calibration: what :func:`read_examples` reads, or several of these; or the rows themselves: a list of
            dictionaries, or a ``datasets.Dataset``.
        tokenizer: the base model's, or the base's hub id or folder.
        split, name, columns: as for :func:`read_examples`.
        max_prompt_tokens: rows with a longer prompt are left out; a plain text is cut instead.
        max_response_tokens: longer responses are cut.
        context: the longest sequence of the model in tokens, None for no limit.
        end_tokens: what ends a response in addition to the tokenizer's eos, from the model's generation config.
        limit: use this many rows, drawn by their content; of several sources as many of each, where they have them.
        batch_size: rows per batch.
        splits: the fraction of the rows for each of the four splits; they sum to 1.
        seed: determines the splits, the sample under ``limit`` and the order of training.
        vision: the base's processor; None for a text model, for which rows with images or videos are rejected.
        allow_urls: fetch images and videos that rows name by URL.

    Raises:
        InputError: a setting is invalid; from :meth:`setup`, the data is.
    """

    def __init__(
        self,
        calibration: str | Path | Sequence[str | Path] | Sequence[Mapping],
        tokenizer: PreTrainedTokenizerBase | str,
        *,
        split: str | None = None,
        name: str | None = None,
        columns: Mapping[str, str] | None = None,
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
        tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        _check_counts(
            {
                "data.max_prompt_tokens": max_prompt_tokens,
                "data.max_response_tokens": max_response_tokens,
                "data.limit": 1 if limit is None else limit,
                "data.batch_size": batch_size,
            }
        )
        sources = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
        self._given = sources if any(isinstance(each, Mapping) for each in sources) else None
        self.sources = [] if self._given else [str(source) for source in sources]
        self.calibration = "rows in memory" if self._given else ", ".join(self.sources)
        self.split, self.limit = split, limit
        self.name, self.columns = name, columns
        self.batch_size, self.seed = batch_size, seed
        self.fractions = check_fractions(splits)
        self.max_response_tokens, self.context = max_response_tokens, context
        self.pad_token_id = next(
            (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0
        )
        self.report: DataReport | None = None
        self.vision = vision
        self.tokenizer = tokenizer
        self.ends = frozenset({tokenizer.eos_token_id, *end_tokens} - {None})
        self._tokenize = RowTokenizer(
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
        """Read, tokenize and split, once: Lightning calls this for every stage."""
        if not self._splits:
            self._splits = split_rows(self.read_rows(), self.fractions, self.seed)

    def read_rows(self, *, keep_duplicates: bool = False) -> list[Row]:
        """The usable rows in the file's order (a sample by content under ``limit``), unsplit; fills :attr:`report`.

        Duplicates are left out by default: in two splits, a row would be both fitted on and verified on.

        Raises:
            InputError: nothing usable.
        """
        number = count()
        if self._given:
            read = [given_examples(self._given, self.columns)]
        else:
            read = [read_examples(each, self.split, name=self.name, columns=self.columns) for each in self.sources]
        sources = [[(next(number), each) for each in examples] for examples in read]
        if self.limit is not None:
            # A sample by content, not the head of the file, which is often sorted by topic or difficulty.
            for source in sources:
                source.sort(key=lambda item: self._order(*item[1]))
            sources = [filter(None, chain(*zip_longest(*sources)))]
        rows: list[Row] = []
        seen: set[tuple] = set()
        unusable: Counter[str] = Counter()
        first: dict[str, tuple[int, str]] = {}
        cut: Counter[str] = Counter()
        tried, problem = 0, None
        ignored: Counter[str] = Counter()
        for position, (example, origin) in chain(*sources):
            if len(rows) == self.limit:
                break
            tried += 1
            ignored.update(example.get("ignored", ()))
            try:
                if "error" in example:
                    raise example["error"]
                row, reason, limit = self._tokenize(example, origin)
            except InputError as error:
                problem = problem or error
                row, reason, limit, origin = None, _BROKEN, None, str(error).rstrip(".")
            if row is not None and not keep_duplicates and row.content in seen:
                row, reason = None, _DUPLICATE
            if row is None:
                unusable[reason] += 1
                first[reason] = min(first.get(reason, (position, origin)), (position, origin))
                continue
            seen.add(row.content)
            rows.append(row)
            if limit is not None:
                cut[limit] += 1
        if unusable[_BROKEN] > MOST_BROKEN * tried:
            raise problem
        origins = {reason: origin for reason, (_, origin) in first.items()}
        self.report = DataReport.of(rows, dict(unusable), origins, dict(cut), dict(ignored))
        if not rows:
            raise InputError(
                f"{self.calibration!r} has no usable row: {self.report.left_out}",
                key="data.calibration",
                advice=(
                    *("change the rows, ", Key("data.max_prompt_tokens"), f" ({self._tokenize.max_prompt}) or "),
                    *(Key("data.max_response_tokens"), f" ({self.max_response_tokens})"),
                ),
            )
        return rows

    def _order(self, example: dict, origin: str) -> tuple:
        """The sort key by which ``limit`` samples: a hash of the text, then the images and videos."""
        read = {key: value for key, value in example.items() if key != "ignored"}
        written = json.dumps(read, sort_keys=True, default=lambda unwritten: None)
        key = hash63(self.seed, written)
        return (key, _ByMedia(partial(self._tokenize.media, example, origin)))

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

    def loader(self, name: str, limit: int | None = None, batch_size: int | None = None) -> DataLoader:
        """Batches of :func:`collate` over one split, every row once; each process gets its share of every batch.

        ``batch_size`` rows (the module's own by default) are per process. The longest rows come first, for little
        padding and so that running out of memory shows at once. ``limit`` keeps only the first rows of :meth:`rows_of`.

        Raises:
            InputError: a row's response is still missing.
        """
        rows = sorted(self._complete(name)[:limit], key=lambda row: (-row.length, row.seed))
        batches = Batches(rows, batch_size or self.batch_size)
        return DataLoader(batches, batch_size=None, sampler=EveryBatch(batches), collate_fn=self._share)

    def val_dataloader(self) -> DataLoader:
        """The split in the ``split`` attribute of the trainer's module; ``search`` if it has none."""
        return self.loader(getattr(getattr(self.trainer, "lightning_module", None), "split", "search"))

    def test_dataloader(self) -> DataLoader:
        """The ``verify`` split."""
        return self.loader("verify")

    def train_dataloader(self) -> DataLoader:
        """Batches of ``fit``, one epoch at a time, each in its own order.

        ``batch_size`` counts the rows of all processes together, so that the number of processes changes nothing. The
        rows of a step depend only on the seed and the step number, so that a resumed training continues with the
        batches that it would have read.
        """
        batches = TrainingBatches(self._complete("fit"), self.batch_size, self.seed)

        def done() -> int:
            return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.total.ready

        return ResumableLoader(batches, batch_size=None, sampler=Epochs(batches, done), collate_fn=self._share)

    def training_steps(self, batch_size: int | None = None, start: int = 0) -> DataLoader:
        """The batches of :meth:`train_dataloader` from step ``start`` on, without end."""
        batches = TrainingBatches(self._complete("fit"), batch_size or self.batch_size, self.seed)
        return DataLoader(batches, batch_size=None, sampler=Steps(batches, start), collate_fn=self._share)

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
        """:func:`collate` of some rows, all of them on this process; their images and videos are read here.

        Raises:
            InputError: an image or a video can no longer be read.
        """
        return collate(rows, self.pad_token_id, self.vision)

    def _share(self, rows: Sequence[Row]) -> dict:
        """:func:`collate` for this process's share of a batch."""
        return collate(rows, self.pad_token_id, self.vision, rank=distributed.rank(), size=distributed.size())

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
            cache: a JSON file, the first process's; responses in it are not generated again. It is saved after every
                batch, so an interrupted run continues where it stopped.
            made_with: what the responses depend on besides the prompt (model, decoding). A cache that was made with
                something else, or with another data.max_response_tokens, is discarded.

        Raises:
            InputError: a split has no row left, because the generated responses are empty.
        """
        self.setup()
        waiting = [row for rows in self._splits.values() for row in rows if row.response_ids is None]
        if not waiting:
            return
        stamp = {"made_with": made_with, "max_response_tokens": self.max_response_tokens}
        self._take(generated_responses(waiting, generate, Path(cache), stamp, self.batch_size))

    def _take(self, responses: dict[str, list[int]]) -> None:
        unusable, first = Counter(self.report.unusable), dict(self.report.first_unusable)
        splits, seen, cut = {}, set(), Counter(self.report.cut)
        for name, rows in self._splits.items():
            splits[name] = []
            # Given responses before generated ones, so that of two equal rows the given one is kept.
            for row in sorted(rows, key=lambda row: row.response_ids is None):
                if row.response_ids is None:
                    ids = responses[str(row.seed)]
                    if len(ids) > self.max_response_tokens:
                        cut[response_limit(self.max_response_tokens)] += 1
                    row = replace(row, response_ids=tuple(ids[: self.max_response_tokens]))
                reason = _DUPLICATE if row.content in seen else None if row.response_ids else EMPTY_RESPONSE
                if self.vision is not None and set(self.vision.tokens) & set(row.response_ids):
                    reason = _VISION_RESPONSE  # a pass over the row would look for its image
                if reason:
                    unusable[reason] += 1
                    first.setdefault(reason, row.origin)
                    continue
                seen.add(row.content)
                splits[name].append(row)
            splits[name].sort(key=lambda row: (hash63(self.seed, *row.prompt), row.seed))
        kept = [row for rows in splits.values() for row in rows]
        self.report = DataReport.of(kept, dict(unusable), first, dict(cut), self.report.ignored)
        empty = [name for name, rows in splits.items() if not rows]
        if empty:
            raise InputError(
                f"data.calibration {self.calibration!r} leaves no row in {', '.join(empty)} after generation: "
                f"{self.report.left_out}; give more rows or data.splits with larger fractions there."
            )
        self._splits = splits


@dataclass(eq=False)
class _ByMedia:
    """Sorts by the digests of images and videos, which are read only if the text of two examples is the same."""

    media: Callable[[], tuple[Sequence, Sequence]]

    def __lt__(self, other: "_ByMedia") -> bool:
        return self._digests() < other._digests()

    def _digests(self) -> list[list[str]]:
        return [[each.digest for each in kind] for kind in self.media()]


def _check_counts(counts: dict[str, int]) -> None:
    for key, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{key} must be a whole number of at least 1, found {value!r}.")
