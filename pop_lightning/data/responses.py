"""Responses of the full model to rows that have none: generated once, by all processes, and kept in a file."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pop_lightning.core import distributed
from pop_lightning.core.files import read_checked_json, write_checked_json
from pop_lightning.data.rows import Row


def generated_responses(
    rows: Sequence[Row],
    generate: Callable[[list[Row]], list[tuple[int, ...]]],
    cache: Path,
    stamp: Mapping[str, Any],
    batch_size: int,
) -> dict[str, list[int]]:
    """The response ids of ``rows`` by their seeds; each process generates for its share of every batch.

    Args:
        generate: from a batch of rows to their response ids, without padding, in the same order.
        cache: the first process's file, saved after every batch; responses in it are not generated again.
        stamp: what the responses depend on besides their prompts. A cache with another stamp is discarded.
        batch_size: rows per process.
    """
    responses = distributed.from_first(lambda: _read_cache(cache, stamp))
    todo = sorted((row for row in rows if str(row.seed) not in responses), key=lambda row: (-row.length, row.seed))
    hidden = not todo or not distributed.is_first() or None  # None: shown on a terminal only
    written, began = 0, time.perf_counter()
    with tqdm(total=len(todo), desc="responses of the full model", unit="row", disable=hidden) as bar:
        step = batch_size * distributed.size()
        for start in range(0, len(todo), step):
            batch = todo[start : start + step]
            # A process without a row repeats one: sharded weights need all processes to generate in step.
            share = batch[distributed.rank() :: distributed.size()]
            generated = distributed.gather(generate(share or batch[-1:])[: len(share)])
            for number, ids_of_rank in enumerate(generated):
                for row, ids in zip(batch[number :: distributed.size()], ids_of_rank, strict=True):
                    responses[str(row.seed)] = [int(token) for token in ids]
                    written += len(ids)
            bar.set_postfix_str(f"{written / (time.perf_counter() - began):,.0f} tokens/s", refresh=False)
            if distributed.is_first():
                _write_cache(cache, {**stamp, "responses": responses})
            bar.update(len(batch))
    return responses


def _read_cache(cache: Path, stamp: dict) -> dict[str, list[int]]:
    try:
        content = read_checked_json(cache)
        return dict(content["responses"]) if all(content[key] == value for key, value in stamp.items()) else {}
    except (KeyError, TypeError, ValueError):
        return {}  # unreadable or of another version: the responses are generated again


def _write_cache(cache: Path, content: dict) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_checked_json(cache, content)
