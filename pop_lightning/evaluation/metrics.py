"""The quality that a pruned prefill loses: per row, per prompt, and over a split.

Teacher-forced logits of the pruned model (student) and the full model (teacher) give one number per row and metric; a
metric gives a loss, which is averaged over the rows of a prompt; the losses give an upper confidence bound.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pop_lightning.core.errors import InputError
from pop_lightning.evaluation.bounds import prompts_needed, upper_bound
from pop_lightning.evaluation.losses import BudgetMetric, metric_named

POSITIONS = 1024  # positions of a batch that are converted to float32 at a time
LOST_NATS = 100.0  # KL and NLL of a position where the pruned model's logits are not finite, and the cap of both
ROW_METRICS = ("kl", "agreement", "nll", "teacher_nll", "nll_increase", "exact_match", "teacher_exact_match")
SHOWN = ("kl", "agreement", "nll_increase", "exact_match")  # those whose means are logged and reported


def response_metrics(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor, *, chunk_size: int = POSITIONS
) -> dict[str, Tensor]:
    """Compare the pruned model with the full one on each row's response.

    Args:
        logits: the pruned model's, ``[batch, response, vocabulary]``; position r predicts ``targets[:, r]``.
        teacher_logits: the full model's, same shape.
        targets: token ids ``[batch, response]``; values outside the mask are never read (-100 is valid).
        mask: ``[batch, response]``, nonzero where a response token is predicted.
        chunk_size: positions converted to float32 at a time; extra memory is a few times chunk_size * vocabulary * 4
            bytes instead of batch * response * vocabulary * 4.

    Returns:
        One float32 tensor ``[batch]`` per name, each a mean over the row's response positions:
        ``kl`` KL(teacher || student) in nats; ``agreement`` the share of positions where both argmaxes are equal;
        ``nll`` and ``teacher_nll`` in nats per response token, ``nll_increase`` their difference; ``exact_match`` and
        ``teacher_exact_match`` 1.0 where the argmax equals the target at every position. Given a correct prefix greedy
        decoding emits the argmax, so by induction this is the event that greedy decoding reproduces the response token
        for token, its end token included. A position where the pruned model's logits are not finite counts as lost:
        no agreement, no match, ``LOST_NATS`` nats.

    Raises:
        InputError: shapes do not match, or a row has no response position.
    """
    if logits.shape != teacher_logits.shape or logits.shape[:2] != targets.shape or targets.shape != mask.shape:
        raise InputError(
            f"the shapes do not match: logits {list(logits.shape)}, teacher_logits {list(teacher_logits.shape)}, "
            f"targets {list(targets.shape)}, mask {list(mask.shape)}; expected [B, R, V] twice, then [B, R] twice."
        )
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}; it must be at least 1.")
    mask = mask.bool()
    counts = mask.sum(dim=1)
    if (counts == 0).any():
        row = int((counts == 0).nonzero()[0])
        raise InputError(f"row {row} of the batch has no response position; leave out rows without a response.")

    # Values land in [B, R] and are summed per row: unlike index_add, that sums in the same order on any device.
    names = ("kl", "agreement", "nll", "teacher_nll", "hit", "teacher_hit")
    # float32 by name: a Trainer of another precision changes the default.
    positions = {name: torch.zeros(mask.shape, dtype=torch.float32, device=logits.device) for name in names}
    rows, columns = mask.nonzero(as_tuple=True)
    for row, column in zip(rows.split(chunk_size), columns.split(chunk_size), strict=True):
        student = logits[row, column].float()
        broken = ~student.amax(-1).isfinite()  # NaN, +inf, or only -inf: no token can be chosen
        student = student.log_softmax(-1)
        teacher = teacher_logits[row, column].float().log_softmax(-1)
        target = targets[row, column]
        probability = teacher.exp()
        # A vocabulary entry that the teacher excludes (-inf) adds nothing; 0 * inf would be nan.
        kl = torch.where(probability > 0, probability * (teacher - student), 0).sum(-1).clamp_min(0)
        guess, teacher_guess = student.argmax(-1), teacher.argmax(-1)
        values = {
            "kl": torch.where(broken, LOST_NATS, kl).clamp_max(LOST_NATS),
            "agreement": (guess == teacher_guess) & ~broken,
            "nll": torch.where(broken, LOST_NATS, -student.gather(-1, target[:, None])[:, 0]).clamp_max(LOST_NATS),
            "teacher_nll": -teacher.gather(-1, target[:, None])[:, 0],
            "hit": (guess == target) & ~broken,
            "teacher_hit": teacher_guess == target,
        }
        for name, value in values.items():
            positions[name][row, column] = value.float()

    mean = {name: value.sum(dim=1) / counts for name, value in positions.items()}
    return {
        "kl": mean["kl"],
        "agreement": mean["agreement"],
        "nll": mean["nll"],
        "teacher_nll": mean["teacher_nll"],
        "nll_increase": mean["nll"] - mean["teacher_nll"],
        "exact_match": (mean["hit"] == 1).float(),
        "teacher_exact_match": (mean["teacher_hit"] == 1).float(),
    }


def row_loss(metrics: Mapping[str, Tensor], metric: str | BudgetMetric) -> Tensor:
    """The loss ``[batch]`` that the budget bounds, from the metrics of ``response_metrics``; see ``losses.py``."""
    return metric_named(metric).loss(metrics)


@dataclass(frozen=True)
class Losses:
    """One variant's losses over a split: one value per prompt, because the rows of one prompt are not independent.

    Attributes:
        values: the mean of ``row_loss`` over the rows of each prompt, in an order that depends on the prompts only.
        rows: number of rows; as many as values unless given.
    """

    values: Sequence[float]
    rows: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", len(self.values) if self.rows is None else self.rows)

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def averaged(self) -> bool:
        """Whether some prompt has several rows, so that its loss of a 0/1 metric can lie between 0 and 1."""
        return self.rows > len(self.values)

    def bound(self, metric: str | BudgetMetric, confidence: float, prompts: int | None = None) -> float:
        """``upper_bound`` of the mean; with ``prompts``, a forecast for this number of prompts with the same losses."""
        return upper_bound(self.values, metric, confidence, averaged=self.averaged, draws=prompts)

    def needed(self, metric: str | BudgetMetric, max_drop: float, confidence: float) -> int | None:
        """``prompts_needed`` with the same losses."""
        return prompts_needed(self.values, metric, max_drop, confidence, averaged=self.averaged)

    def clipped(self, cap: float) -> float:
        """The share of prompts whose loss is above ``cap``."""
        return sum(value > cap for value in self.values) / len(self.values)


def prompt_means(values: Tensor, prompts: Tensor) -> Tensor:
    """Means over each prompt's rows, float64 ``[prompts]`` by prompt seed; both arguments are ``[rows]``."""
    _, where, rows = prompts.cpu().unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(rows), dtype=torch.float64).index_add(0, where, values.cpu().double()) / rows


def prompt_losses(rows: Mapping[str, Tensor], metric: str | BudgetMetric) -> Losses:
    """The losses of ``RowMetrics.compute``'s rows, averaged per prompt."""
    return Losses(tuple(prompt_means(row_loss(rows, metric), rows["prompt"]).tolist()), len(rows["prompt"]))


def summary(
    rows: Mapping[str, Tensor], metric: str | BudgetMetric, confidence: float, prompts: int
) -> dict[str, float]:
    """Summary of ``RowMetrics.compute``'s rows, as plain data; every mean is over prompts.

    Returns:
        ``rows`` and ``prompts``; means ``kl``, ``agreement``, ``nll_increase`` and ``exact_match``; ``loss``, its
        ``bound``, and ``expected_bound``, the one that a verify split of ``prompts`` prompts would give with the same
        losses.
    """
    losses = prompt_losses(rows, metric)
    means = {name: prompt_means(rows[name], rows["prompt"]).mean().item() for name in SHOWN}
    return {
        "rows": losses.rows,
        "prompts": len(losses.values),
        **means,
        "loss": losses.mean,
        "bound": losses.bound(metric, confidence),
        "expected_bound": losses.bound(metric, confidence, prompts),
    }


class RowMetrics(Metric):
    """Keep one value per row and name, over batches and ranks, in an order that depends on the rows only.

    Args:
        names: of the values in each ``update``, for example ``ROW_METRICS``.

    ``compute`` returns float32 tensors ``[rows]`` sorted by row seed (rows that share a seed by their values), so that
    batch size, shuffling and the number of ranks change nothing; and the rows' prompts, int64 ``[rows]``, as
    ``prompt``.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, names: Sequence[str] = ROW_METRICS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("row_seeds", default=[], dist_reduce_fx="cat")
        self.add_state("prompt_seeds", default=[], dist_reduce_fx="cat")
        for name in self.names:
            # The prefix avoids a clash between a name such as "device" and Metric's own attributes.
            self.add_state(f"value_{name}", default=[], dist_reduce_fx="cat")

    def update(self, values: Mapping[str, Tensor], row_seed: Tensor, prompt_seed: Tensor | None = None) -> None:
        """Add the rows of one batch: ``[batch]`` values per name, the seeds of the rows and of their prompts (int64).

        Unless prompt seeds are given, every row counts as its own prompt.
        """
        for name in self.names:
            if name not in values:
                raise InputError(f"the values of a batch do not include '{name}'; found {sorted(values)}.")
            if values[name].shape != row_seed.shape or row_seed.ndim != 1:
                raise InputError(
                    f"'{name}' has shape {list(values[name].shape)} and row_seed {list(row_seed.shape)}; "
                    "both must be [batch]."
                )
        self.row_seeds.append(row_seed.detach().to(self.device, torch.int64))
        prompt_seed = row_seed if prompt_seed is None else prompt_seed
        self.prompt_seeds.append(prompt_seed.detach().to(self.device, torch.int64))
        for name in self.names:
            getattr(self, f"value_{name}").append(values[name].detach().to(self.device, torch.float32))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the ranks' rows; torchmetrics calls this before ``compute``."""
        if not self._is_synced and not self.row_seeds:
            # A rank without rows would send torchmetrics' default, an empty float32 tensor, into a gather of int64.
            for seeds in (self.row_seeds, self.prompt_seeds):
                seeds.append(torch.zeros(0, dtype=torch.int64, device=self.device))
            for name in self.names:
                getattr(self, f"value_{name}").append(torch.zeros(0, dtype=torch.float32, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """A float32 tensor ``[rows]`` of all rows per name, and ``prompt``; empty tensors if there were no rows."""

        if isinstance(self.row_seeds, list) and not self.row_seeds:
            empty = {name: torch.zeros(0, dtype=torch.float32, device=self.device) for name in self.names}
            return empty | {"prompt": torch.zeros(0, dtype=torch.int64, device=self.device)}
        values = {name: dim_zero_cat(getattr(self, f"value_{name}")) for name in self.names}
        seeds, prompts = dim_zero_cat(self.row_seeds), dim_zero_cat(self.prompt_seeds)
        order = torch.arange(seeds.numel(), device=seeds.device)
        # Stable sorts from the least to the most significant key make a lexicographic order.
        for key in (*reversed(values.values()), seeds):
            order = order[key[order].argsort(stable=True)]
        return {name: value[order] for name, value in values.items()} | {"prompt": prompts[order]}
