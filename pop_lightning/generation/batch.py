"""A file of rows in, JSON Lines of answers out: ``pop-generate data``, callable from Python as well."""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from pop_lightning.core.errors import InputError
from pop_lightning.core.files import check_writable, write_json, write_text
from pop_lightning.core.journal import Busy, Journal
from pop_lightning.data.batches import collate
from pop_lightning.data.examples import read_examples
from pop_lightning.data.module import CalibrationData
from pop_lightning.data.report import DataReport
from pop_lightning.data.rows import Row, hash63
from pop_lightning.evaluation.answers import exact_match, rouge_l, token_f1
from pop_lightning.generation import comparison, comparison_page
from pop_lightning.generation.base_identity import base_identity
from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.generation.stream import GREEDY, tokenizer_of
from pop_lightning.models.loading import context_length, end_tokens

TIMED_ROWS = 32  # rows whose TTFT a comparison measures
_AGAINST_REFERENCE = {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l}


def check_files(data: str, output: str | Path, *, compare: bool = False, overwrite: bool = False) -> None:
    """Check ``--data`` and ``--output`` before a model is loaded; creates the folder of ``output``.

    Raises:
        InputError: no row can be read, a file cannot be written, or it already exists.
    """
    read_examples(data)
    output = Path(output).expanduser()
    more = {"page": page_of(output), "figures": figures_of(output)} if compare else {}
    for what, path in more.items():
        if path == output:
            raise InputError(
                f"--output {output} is the name of the {what} of --compare; name a file that ends in .jsonl."
            )
        if path.resolve() == Path(data).expanduser().resolve():
            raise InputError(f"--compare would write its {what} over --data {data}; choose another --output.")
    for path in [output, *more.values()]:
        with _writing(path):
            if path.is_dir():
                raise InputError(f"--output {path} is a folder; name a file.")
            if path.exists() and not overwrite:
                raise InputError(f"--output {path} exists already; give --overwrite or another --output.")
            check_writable(path)


def page_of(output: Path) -> Path:
    """Where the page of a comparison is written."""
    return output.with_suffix(".html")


def figures_of(output: Path) -> Path:
    """Where the figures of a comparison are written as JSON."""
    return output.with_suffix(".json")


@contextmanager
def _writing(path: Path):
    try:
        yield
    except OSError as error:
        raise InputError(f"--output {path} cannot be written ({error.strerror}); choose another file.") from error


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
    seed: int | None = None,
    max_prompt_tokens: int | None = None,
    timed_rows: int = TIMED_ROWS,
    overwrite: bool = False,
    about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Generate for every row of a file and write them as JSON Lines; the file appears whole or not at all.

    Finished rows are kept in ``OUTPUT.partial`` until then: a call with the same arguments goes on after them.
    The longest prompts come first, so that memory runs out at once if it does.

    Args:
        data: as ``data.calibration``; a row's ``response``, where it has one, is the reference.
        compare: also run the unpruned model, measure the differences (:mod:`~pop_lightning.generation.comparison`)
            and write them as a page and as JSON next to ``output``.
        allow_urls: fetch images and videos that rows name by URL.
        limit: generate for that many usable rows, the first ones.
        sampling: arguments of ``generate`` such as ``do_sample`` and ``temperature``; greedy unless given.
        seed: of the sampling; every batch draws from its own seed.
        max_prompt_tokens: rows with a longer prompt are left out; by default the model's context minus
            ``max_new_tokens``. It may be larger, for models that are used beyond their nominal context.
        timed_rows: with ``compare``, rows whose TTFT is measured, spread evenly over the prompt lengths.
        overwrite: begin anew if the finished rows are of other arguments.
        about: what was run, for the page.

    Returns:
        ``rows``, ``unusable`` (rows left out, by reason), ``max_new_tokens``, ``references_cut`` (rows of the file
        whose reference is longer than that and is compared up to there); over the rows with a reference the means
        ``exact_match`` (the same text), ``token_f1`` and ``rouge_l``; with ``compare`` also ``compared``:
        :func:`comparison.summary`.

    Raises:
        InputError: no usable row, a file that cannot be written, finished rows of other arguments, or another process
            at work on the same output.
    """
    tokenizer = tokenizer_of(generator)
    rows, report = _read_rows(generator, tokenizer, data, max_new_tokens, allow_urls, max_prompt_tokens)
    settings = _settings(generator, rows) | {
        "--max_new_tokens": max_new_tokens,
        "--max_prompt_tokens": max_prompt_tokens,
        "--batch_size": batch_size,
        "--limit": limit,
        "--compare": compare,
        "--timed_rows": timed_rows if compare else None,
        "--seed": seed,
        **{f"--{name}": value for name, value in (sampling or {}).items()},
    }
    rows, output = rows[:limit], Path(output).expanduser()
    partial = output.with_name(f"{output.name}.partial")
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    with _journal(partial, settings, overwrite) as journal:
        answer = Answers(generator, tokenizer, max_new_tokens, compare=compare, sampling=sampling)
        _answer_all(answer, rows, journal, batch_size, seed, timed_rows if compare else 0)
        records = sorted(journal.records, key=lambda record: record["row"])
        summary: dict[str, Any] = {
            "rows": len(records),
            "unusable": report.unusable,
            "max_new_tokens": max_new_tokens,
            "references_cut": report.truncated,
        }
        for name in _AGAINST_REFERENCE:
            values = [record[name] for record in records if name in record]
            if values:
                summary[name] = sum(values) / len(values)
        if compare:
            summary["compared"] = comparison.summary(records)
        with _writing(output):
            if compare:
                page = comparison_page.render_page(summary, records, generator, about or {})
                write_text(page_of(output), page)
                write_json(figures_of(output), summary)
            write_text(output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            partial.unlink()
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


# --- what is finished -------------------------------------------------------------------------------------------------


def _settings(generator: StageAwareGenerator, rows: Sequence[Row]) -> dict[str, Any]:
    """What decides about the answers besides the arguments, by the flag that it comes from."""
    base = base_identity(generator.model, str(generator.name_or_path))
    return {
        "--data": hashlib.sha256(repr([row.seed for row in rows]).encode()).hexdigest(),
        "--artifact": f"{generator.plan.fingerprint} {generator.projections.fingerprint}",
        "--base": hashlib.sha256(json.dumps(base["fingerprint"], sort_keys=True).encode()).hexdigest(),
        "--dtype": str(generator.dtype).removeprefix("torch."),
        "--device": generator.device.type,
    }


@contextmanager
def _journal(path: Path, settings: dict[str, Any], overwrite: bool):
    """The finished rows of the same settings; none if nothing was begun."""
    with _writing(path):
        journal = Journal(path)
        try:
            journal.__enter__()
        except Busy:
            raise InputError(
                f"another process is writing to {path}; wait for it, or choose another --output."
            ) from None
    with journal:
        differ = _differences(journal.settings, settings)
        if differ and not overwrite:
            raise InputError(
                f"{path} was begun with other arguments: {'; '.join(differ)}. Give those to continue it, or "
                "--overwrite to begin anew."
            )
        if differ or journal.settings is None:
            with _writing(path):
                journal.begin(settings)
        yield journal


def _differences(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """The settings that differ, each as a piece of a sentence."""
    if before is None:
        return []
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = (each.get(name) for each in (before, now))
        if old == new:
            continue
        if name in ("--data", "--artifact", "--base"):
            found.append(f"{name} held other {'rows' if name == '--data' else 'weights'}")
        else:
            found.append(f"{name} was {'not given' if old in (None, False) else old}")
    return found


# --- answers ----------------------------------------------------------------------------------------------------------


def _answer_all(
    answer: "Answers", rows: Sequence[Row], journal: Journal, batch_size: int, seed: int | None, timed_rows: int
) -> None:
    """Add a record to the journal for every row that has none, a batch of similar lengths at a time."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].prompt_ids))
    timed = {order[round(at)] for at in torch.linspace(0, len(order) - 1, min(timed_rows, len(order))).tolist()}
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    finished = {record["row"] for record in journal.records}
    # A batch that was interrupted is answered again as a whole: what a row's answer is may depend on its batch.
    todo = [(number, places) for number, places in enumerate(batches) if not finished.issuperset(places)]
    journal.records = [record for record in journal.records if not any(record["row"] in each for _, each in todo)]
    cost = [len(row.prompt_ids) + answer.max_new_tokens for row in rows]
    done = sum(cost) - sum(cost[place] for _, places in todo for place in places)
    times = comparison.ROUNDS * sum(place in timed for _, places in todo for place in places)
    rounds = comparison.ROUNDS * len(timed)
    # In tokens rather than rows, because long prompts come first and need longest. None: shown on a terminal only.
    with (
        tqdm(total=sum(cost), initial=done, unit="token", unit_scale=True, desc="answers", disable=None) as bar,
        tqdm(total=rounds, initial=rounds - times, unit="round", desc="TTFT", disable=not times or None) as timing,
    ):
        answer.on_round = timing.update
        bar.set_postfix_str(f"{len(journal.records)}/{len(rows)} rows")
        for number, places in todo:
            if seed is not None:
                torch.manual_seed(hash63(seed, number))
            records = answer([rows[place] for place in places], [place in timed for place in places])
            with _writing(journal.path):
                journal.add([{"row": place} | record for place, record in zip(places, records, strict=True)])
            bar.set_postfix_str(f"{len(journal.records)}/{len(rows)} rows", refresh=False)
            bar.update(sum(cost[place] for place in places))


class Answers:
    """Answers batches of rows: one record a row, as plain data.

    Args:
        compare: let the full model answer as well, and measure the differences.
        sampling: arguments of ``generate``; greedy unless given.

    Attributes:
        on_round: called after every round of a row's TTFT, those of warm-up too.
    """

    def __init__(
        self,
        generator: StageAwareGenerator,
        tokenizer,
        max_new_tokens: int,
        *,
        compare: bool = False,
        sampling: Mapping[str, Any] | None = None,
    ):
        self.generator, self.tokenizer, self.compare = generator, tokenizer, compare
        self.max_new_tokens, self.sampling = max_new_tokens, sampling or GREEDY
        self.on_round: Callable[[], object] | None = None
        self.ends = {tokenizer.eos_token_id} | end_tokens(generator.model)

    def __call__(self, rows: Sequence[Row], timed: Sequence[bool] = ()) -> list[dict[str, Any]]:
        """``timed``: whether the TTFT of a row is measured as well; False unless given."""
        pad, vision = self.tokenizer.pad_token_id, self.generator.vision
        batch = collate([replace(row, response_ids=()) for row in rows], pad, vision)
        pruned = self.ids(batch)
        records = [self.record(row, ids) for row, ids in zip(rows, pruned, strict=True)]
        if not self.compare:
            return records
        full = self.ids(batch, full=True)
        forced = comparison.teacher_forced(self.generator, rows, pad)
        for at, (row, record) in enumerate(zip(rows, records, strict=True)):
            text = self.text(full[at])
            record["full_generated"] = text
            if row.response_ids:
                record |= {f"full_{name}": of(text, record["response"]) for name, of in _AGAINST_REFERENCE.items()}
            record |= comparison.answers(full[at], pruned[at], text, record["generated"]) | forced[at]
            if timed and timed[at]:
                record |= comparison.ttft(self.generator, row, pad, self.on_round)
        return records

    def ids(self, batch: dict, full: bool = False) -> list[list[int]]:
        """The new tokens of every row, up to its first end token."""
        with torch.no_grad(), self.generator.full_model() if full else nullcontext():
            output = self.generator.generate(
                **self.generator.decoder.inputs(batch),
                max_new_tokens=self.max_new_tokens,
                **self.sampling,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        tokens = output[:, batch["prompt_length"] :].tolist()
        return [list(itertools.takewhile(lambda token: token not in self.ends, row)) for row in tokens]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def record(self, row: Row, ids: Sequence[int]) -> dict[str, Any]:
        """What is known of one row from the pruned model only."""
        record: dict[str, Any] = {
            "origin": row.origin,
            "prompt": self.tokenizer.decode(row.prompt_ids, skip_special_tokens=True),
            "prompt_tokens": len(row.prompt_ids),
            "generated": self.text(ids),
        }
        if row.response_ids:
            record["response"] = self.text(row.response_ids)
            record |= {name: of(record["generated"], record["response"]) for name, of in _AGAINST_REFERENCE.items()}
        return record
