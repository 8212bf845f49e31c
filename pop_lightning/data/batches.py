"""Batches of rows: padding, each process's share, and the samplers that read every row once or resume a training.

Between ``rows.py`` and ``module.py`` in the data flow. The samplers keep Lightning from putting in its own, which
repeats rows until all processes have equally many.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pop_lightning.core import distributed
from pop_lightning.data.processor import VisionProcessor
from pop_lightning.data.rows import Row, hash63


def collate(
    rows: Sequence[Row], pad_token_id: int, vision: VisionProcessor | None = None, *, rank: int = 0, size: int = 1
) -> dict:
    """A batch in which every row's response starts at the same column, or one process's share of it.

    Prompts are padded on the left to the longest prompt P, responses on the right; a missing response is empty, so
    rows without responses give the left-padded prompts that ``generate`` expects.

    Every process's share has the same shape, so that all run the same operations, as sharded weights require. If there
    are too few rows for that, padding rows follow the real ones (:func:`real_rows`).

    Args:
        rank, size: the share holds every ``size``-th row from the ``rank``-th on.

    Returns:
        ``input_ids`` and ``attention_mask``, both long ``[batch, T]``; ``prompt_length``, the int P; ``row_seed`` and
        ``prompt_seed``, long ``[batch]``; ``origins``, where each real row comes from. ``attention_mask[:, P:]`` is the
        mask of the responses. If rows have images or videos, ``vision``: the tensors of all of them, in order, by the
        argument names of the model's forward.
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
        "origins": [row.origin for row in share],
    }
    if any(row.media for row in share):
        batch["vision"] = vision.tensors([(row.images, row.videos) for row in share])
    return batch


def real_rows(batch: Mapping) -> int:
    """Number of real (non-padding) rows of a batch; they come first."""
    return int(batch["attention_mask"].any(1).sum())


class Batches(Dataset):
    """Global batches (of all processes together) by number; :func:`collate` cuts out each process's share.

    Args:
        batch_size: rows of one process.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int):
        self.rows, self.batch_size = rows, batch_size

    @property
    def together(self) -> int:
        # Evaluated when a batch is read: a loader may be made before the process group is initialized.
        return self.batch_size * distributed.size()

    def __len__(self) -> int:
        return -(-len(self.rows) // self.together)

    def __getitem__(self, number: int) -> list[Row]:
        return list(self.rows[number * self.together : (number + 1) * self.together])


class TrainingBatches(Dataset):
    """Training batches by step number; each epoch has its own order.

    Args:
        batch_size: rows of all processes together.
    """

    def __init__(self, rows: Sequence[Row], batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._order = lru_cache(1)(self._order_of)

    def __len__(self) -> int:
        """Of one epoch."""
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, step: int) -> list[Row]:
        epoch, number = divmod(step, len(self))
        rows = self._order(epoch)[number * self.batch_size : (number + 1) * self.batch_size]
        return [self.rows[index] for index in rows]

    def _order_of(self, epoch: int) -> torch.Tensor:
        return torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(hash63(self.seed, epoch)))


class EveryBatch(DistributedSampler):
    """Every process reads every batch and keeps its share. Lightning does not replace a ``DistributedSampler``."""

    def __init__(self, batches: Batches):
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))


class Epochs(EveryBatch):
    """As many steps as an epoch has, from those read before.

    Lightning ends an epoch that it resumed, or limits (``limit_train_batches``), at its own count.

    Args:
        done: returns how many steps were read before; called when an epoch begins, after a checkpoint is restored.
    """

    def __init__(self, batches: TrainingBatches, done: Callable[[], int]):
        super().__init__(batches)
        self.done = done

    def __iter__(self) -> Iterator[int]:
        first = self.done()
        yield from range(first, first + len(self))


class ResumableLoader(DataLoader):
    """A loader that Lightning resumes in mid-epoch because it has a state; :class:`Epochs` finds the position."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        pass


class Steps(EveryBatch):
    """The steps from ``start`` on, without end."""

    def __init__(self, batches: TrainingBatches, start: int):
        super().__init__(batches)
        self.start = start

    def __len__(self) -> int:
        raise TypeError("a training's steps have no end")

    def __iter__(self) -> Iterator[int]:
        return count(self.start)
