"""What a pruned prefill costs, per row, and how much of that cost can be promised for rows not yet seen.

Teacher-forced logits of the pruned model (student) and the full model (teacher) become one number per row and metric;
a metric becomes a loss, averaged over the rows of a prompt; the losses become an upper confidence bound; fixed-sequence
testing turns the bounds of several depths into one choice. The budget callback and the pipeline call this file, the
report shows what it returned.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from pop_lightning.errors import InputError

METRICS = ("agreement", "nll_increase", "exact_match")
ROW_METRICS = ("kl", "agreement", "nll", "teacher_nll", "nll_increase", "exact_match", "teacher_exact_match")


def response_metrics(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor, *, chunk_size: int = 1024
) -> dict[str, Tensor]:
    """Compare the pruned model with the full one on each row's response.

    Args:
        logits: the pruned model's, `[batch, response, vocabulary]`; position r predicts `targets[:, r]`.
        teacher_logits: the full model's, same shape.
        targets: token ids `[batch, response]`; values outside the mask are never read (-100 is fine).
        mask: `[batch, response]`, nonzero where a response token is predicted.
        chunk_size: positions converted to float32 at a time; extra memory is a few times chunk_size * vocabulary * 4
            bytes instead of batch * response * vocabulary * 4.

    Returns:
        One float32 tensor `[batch]` per name, each a mean over the row's response positions:
        `kl` KL(teacher || student) in nats; `agreement` the share of positions where both argmaxes are equal;
        `nll` and `teacher_nll` in nats per response token, `nll_increase` their difference; `exact_match` and
        `teacher_exact_match` 1.0 where the argmax equals the target at every position. Given a correct prefix greedy
        decoding emits the argmax, so by induction this is the event that greedy decoding reproduces the response token
        for token, its end token included.

    Raises:
        InputError: shapes that do not fit, or a row without response positions.
    """
    if logits.shape != teacher_logits.shape or logits.shape[:2] != targets.shape or targets.shape != mask.shape:
        raise InputError(
            f"The shapes do not fit: logits {list(logits.shape)}, teacher_logits {list(teacher_logits.shape)}, "
            f"targets {list(targets.shape)}, mask {list(mask.shape)}; expected [B, R, V] twice, then [B, R] twice."
        )
    if chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}; it must be at least 1.")
    mask = mask.bool()
    counts = mask.sum(dim=1)
    if (counts == 0).any():
        row = int((counts == 0).nonzero()[0])
        raise InputError(f"Row {row} of the batch has no response position; leave out rows without a response.")

    # Values land in [B, R] and are summed per row: unlike index_add, that sums in the same order on any device.
    names = ("kl", "agreement", "nll", "teacher_nll", "hit", "teacher_hit")
    positions = {name: torch.zeros(mask.shape, device=logits.device) for name in names}
    rows, columns = mask.nonzero(as_tuple=True)
    for row, column in zip(rows.split(chunk_size), columns.split(chunk_size), strict=True):
        student = logits[row, column].float().log_softmax(-1)
        teacher = teacher_logits[row, column].float().log_softmax(-1)
        target = targets[row, column]
        probability = teacher.exp()
        # A vocabulary entry that the teacher rules out (-inf) adds nothing; 0 * inf would be nan.
        kl = torch.where(probability > 0, probability * (teacher - student), 0).sum(-1).clamp_min(0)
        guess, teacher_guess = student.argmax(-1), teacher.argmax(-1)
        values = {
            "kl": kl,
            "agreement": guess == teacher_guess,
            "nll": -student.gather(-1, target[:, None])[:, 0],
            "teacher_nll": -teacher.gather(-1, target[:, None])[:, 0],
            "hit": guess == target,
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


def row_loss(metrics: Mapping[str, Tensor], metric: str) -> Tensor:
    """Turn the metrics of `response_metrics` into the loss `[batch]` that the budget bounds.

    `agreement`: 1 - agreement, in [0, 1]. `exact_match`: 1 where the full model is right and the pruned one wrong, else
    0; its mean is at least the drop in exact match, because rows that pruning happens to repair are not credited.
    `nll_increase`: nats per response token, unbounded, negative where pruning helps.
    """
    _check_metric(metric)
    if metric == "agreement":
        return (1 - metrics["agreement"]).clamp(0, 1)
    if metric == "exact_match":
        return ((metrics["teacher_exact_match"] > 0.5) & (metrics["exact_match"] < 0.5)).float()
    return metrics["nll_increase"]


@dataclass(frozen=True)
class Losses:
    """One variant's losses over a split: one value per prompt, because rows of one prompt are one draw.

    Attributes:
        values: the mean of `row_loss` over the rows of each prompt, in an order that follows from the prompts alone.
        rows: how many rows there were; as many as values unless given.
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

    def bound(self, metric: str, confidence: float) -> float:
        """`upper_bound` of the mean."""
        return upper_bound(self.values, metric, confidence, averaged=self.averaged)

    def expected_bound(self, metric: str, confidence: float, prompts: int) -> float:
        """The bound that `prompts` other prompts give if they lose as these do: what a verify split may show.

        Rates: the bound at the same mean. `nll_increase`: this bound's distance from the mean shrinks (or grows) with
        the square root of the number of prompts.
        """
        bound = self.bound(metric, confidence)
        if metric == "nll_increase":
            return self.mean + (bound - self.mean) * math.sqrt(len(self.values) / prompts)
        total = min(self.mean, 1.0) * prompts
        if metric == "exact_match" and not self.averaged:
            return _clopper_pearson(min(prompts, math.ceil(total - 1e-7 * prompts)), prompts, confidence)
        return _hoeffding_bentkus(total, prompts, confidence)


def prompt_means(values: Tensor, prompts: Tensor) -> Tensor:
    """Means over each prompt's rows, float64 `[prompts]` in order of the seeds; both arguments are `[rows]`."""
    _, where, rows = prompts.cpu().unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(rows), dtype=torch.float64).index_add(0, where, values.cpu().double()) / rows


def prompt_losses(rows: Mapping[str, Tensor], metric: str) -> Losses:
    """The losses of `RowMetrics.compute`'s rows, averaged per prompt."""
    return Losses(tuple(prompt_means(row_loss(rows, metric), rows["prompt"]).tolist()), len(rows["prompt"]))


def summary(rows: Mapping[str, Tensor], metric: str, confidence: float, prompts: int) -> dict[str, float]:
    """What `RowMetrics.compute`'s rows come to, as plain data; every mean is one over prompts.

    Returns:
        `rows` and `prompts`; means `kl`, `agreement`, `nll_increase` and `exact_match`; `loss`, its `bound`, and
        `expected_bound`, the one that a verify split of `prompts` prompts would give if it lost the same.
    """
    losses = prompt_losses(rows, metric)
    means = {
        name: prompt_means(rows[name], rows["prompt"]).mean().item()
        for name in ("kl", "agreement", "nll_increase", "exact_match")
    }
    return {
        "rows": losses.rows,
        "prompts": len(losses.values),
        **means,
        "loss": losses.mean,
        "bound": losses.bound(metric, confidence),
        "expected_bound": losses.expected_bound(metric, confidence, prompts),
    }


def upper_bound(
    losses: Sequence[float], metric: str, confidence: float = 0.95, seed: int = 0, *, averaged: bool = False
) -> float:
    """One-sided upper confidence bound of the mean loss, for independent prompts drawn from the same source.

    - `exact_match` with one row per prompt (0/1 losses): Clopper and Pearson, Biometrika 1934. Exact: holds at every
      number of prompts.
    - `agreement`, and `exact_match` averaged over several rows of a prompt (losses in [0, 1]): Hoeffding-Bentkus (Bates
      et al., "Distribution-Free, Risk-Controlling Prediction Sets", 2021, section 3.1): the largest mean that the
      p-value does not reject. Holds at every number of prompts.
    - `nll_increase` (unbounded): BCa bootstrap (Efron 1987) as in `scipy.stats.bootstrap`, 9999 resamples. Holds
      asymptotically only: with few prompts or heavy tails the true confidence is lower than stated. Prompts that are
      all equal have nothing to resample and give their value; a single prompt gives infinity.

    Args:
        losses: one value per prompt.
        metric: one of `METRICS`.
        confidence: probability, over draws of the prompts, that the bound is at or above the true mean.
        seed: of the bootstrap's resampling; the two other bounds are not random.
        averaged: some prompt has several rows. It is how the rows are, not how the losses came out, that decides
            between the two bounds of `exact_match`: choosing by the losses would void both.

    Raises:
        InputError: no losses, a loss outside the metric's range or not a number, an unknown metric, or a confidence
            outside (0, 1).
    """
    _check_metric(metric)
    _check_confidence(confidence)
    values = np.asarray([float(loss) for loss in losses], dtype=np.float64)
    if values.size == 0:
        raise InputError("There are no rows to bound a loss with; give the verify split at least one row.")
    if not np.isfinite(values).all():
        raise InputError(
            f"A {metric} loss is not a finite number; check the model's logits on row {_first_bad(values)}."
        )
    if metric == "nll_increase":
        return _bootstrap(values, confidence, seed)
    if metric == "exact_match" and not averaged:
        if not np.isin(values, (0.0, 1.0)).all():
            raise InputError("exact_match losses of one row per prompt must be 0 or 1; use row_loss to make them.")
        return _clopper_pearson(int(values.sum()), values.size, confidence)
    if values.min() < 0 or values.max() > 1:
        raise InputError(f"{metric} losses must lie in [0, 1], found {values.min():g} to {values.max():g}.")
    return _hoeffding_bentkus(math.fsum(values), values.size, confidence)


def smallest_certifiable(prompts: int, metric: str, confidence: float = 0.95) -> float | None:
    """The smallest `max_drop` that so many prompts certify: the bound at zero loss, 1 - (1 - confidence)^(1/prompts).

    None for `nll_increase`, whose bootstrap bound has no such floor.
    """
    _check_metric(metric)
    _check_confidence(confidence)
    if metric == "nll_increase":
        return None
    return 1.0 if prompts < 1 else -math.expm1(math.log1p(-confidence) / prompts)


def rows_needed(max_drop: float, metric: str, confidence: float = 0.95) -> int | None:
    """The fewest verify rows, each of its own prompt, with which a lossless depth keeps `max_drop`: 299 for 1% at 95%.

    A depth that does lose something needs more. None for `nll_increase`, whose bootstrap bound has no such
    floor.

    Raises:
        InputError: a `max_drop` of zero or less for a rate, which no number of rows can certify.
    """
    _check_metric(metric)
    _check_confidence(confidence)
    if metric == "nll_increase":
        return None
    if max_drop <= 0:
        raise InputError(f"budget.max_drop is {max_drop:g}, which no number of rows can certify; give a positive drop.")
    if max_drop >= 1:
        return 1
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-max_drop)))


@dataclass(frozen=True)
class Verdict:
    """What the verify split said about one depth.

    Attributes:
        depth: layers that context tokens run through.
        value: mean loss over the prompts (a fraction, or nats per response token for `nll_increase`).
        bound: upper confidence bound of that mean.
        rows: number of rows.
        prompts: number of different prompts, which the bound counts.
        passed: whether the bound keeps the budget; None where no budget was a condition.
    """

    depth: int
    value: float
    bound: float
    rows: int
    prompts: int
    passed: bool | None


def fixed_sequence(
    depths: Sequence[int],
    losses: Mapping[int, Losses],
    metric: str,
    max_drop: float,
    confidence: float = 0.95,
) -> list[Verdict]:
    """Test depths from the shallowest pruning downward and stop at the first that fails.

    The order is fixed before the rows are seen, so every depth is tested at the full confidence without a correction:
    a false acceptance needs a false acceptance of the first depth whose true loss is above the budget (fixed-sequence
    testing; Angelopoulos et al., "Learn then Test", 2021, section 4). The chosen depth is the last that passed.

    Args:
        depths: the candidates, strictly falling: the shallowest pruning first.
        losses: per depth the losses on the verify split; a depth after the first failure is never looked up, so a lazy
            mapping measures only what is needed.
        metric, max_drop, confidence: the budget; `max_drop` is an absolute fraction, or nats per response token.

    Raises:
        InputError: depths out of order, or as for `upper_bound`.
    """
    if any(first <= second for first, second in pairwise(depths)):
        raise InputError(f"Candidate depths must fall strictly, found {list(depths)}; list the largest depth first.")
    verdicts: list[Verdict] = []
    for depth in depths:
        verdicts.append(judge(depth, losses[depth], metric, confidence, max_drop))
        if not verdicts[-1].passed:
            break
    return verdicts


def judge(depth: int, losses: Losses, metric: str, confidence: float, max_drop: float | None) -> Verdict:
    """One depth's verdict; without a `max_drop` nothing can fail."""
    bound = losses.bound(metric, confidence)
    passed = None if max_drop is None else bound <= max_drop
    return Verdict(depth, losses.mean, bound, losses.rows, len(losses.values), passed)


class RowMetrics(Metric):
    """Keep one value per row and name, over batches and ranks, in an order that depends on the rows alone.

    Args:
        names: what each `update` holds, for example `ROW_METRICS`.

    `compute` returns float32 tensors `[rows]` sorted by row seed (rows that share a seed by their values), so that
    batch size, shuffling and the number of ranks change nothing, and the rows' prompts, int64 `[rows]`, as `prompt`.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, names: Sequence[str] = ROW_METRICS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        self.add_state("row_seeds", default=[], dist_reduce_fx="cat")
        self.add_state("prompt_seeds", default=[], dist_reduce_fx="cat")
        for name in self.names:
            # The prefix keeps a name such as "device" apart from Metric's own attributes.
            self.add_state(f"value_{name}", default=[], dist_reduce_fx="cat")

    def update(self, values: Mapping[str, Tensor], row_seed: Tensor, prompt_seed: Tensor | None = None) -> None:
        """Add the rows of one batch: `[batch]` values per name, the rows' seeds and their prompts' `[batch]` (int64).

        Unless prompts are given, every row counts as a prompt of its own.
        """
        for name in self.names:
            if name not in values:
                raise InputError(f"The values of a batch lack '{name}'; found {sorted(values)}.")
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
        """Gather the ranks' rows; torchmetrics calls this before `compute`."""
        if not self._is_synced and not self.row_seeds:
            # A rank without rows would send torchmetrics' default, an empty float32 tensor, into a gather of int64.
            for seeds in (self.row_seeds, self.prompt_seeds):
                seeds.append(torch.zeros(0, dtype=torch.int64, device=self.device))
            for name in self.names:
                getattr(self, f"value_{name}").append(torch.zeros(0, dtype=torch.float32, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """All rows seen, per name a float32 tensor `[rows]`, and `prompt`; empty where there was none."""
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


def _clopper_pearson(errors: int, rows: int, confidence: float) -> float:
    if errors == rows:
        return 1.0
    return float(stats.beta.ppf(confidence, errors + 1, rows - errors))


def _hoeffding_bentkus(total: float, rows: int, confidence: float) -> float:
    """The bound where `rows` losses in [0, 1] sum to `total`."""
    low, high = min(total / rows, 1.0), 1.0
    if low == 1.0:
        return 1.0
    # The p-value falls in the mean: bisect for where it crosses 1 - confidence, and keep the rejected (upper) end.
    for _ in range(60):
        middle = (low + high) / 2
        if _hoeffding_bentkus_p(total, rows, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _hoeffding_bentkus_p(total: float, rows: int, mean: float) -> float:
    """p-value of "the true mean is at least `mean`" when `rows` losses in [0, 1] sum to `total`."""
    observed = min(total / rows, mean)
    if mean >= 1:
        return float(observed >= 1)
    entropy = (1 - observed) * math.log((1 - observed) / (1 - mean))
    if observed > 0:
        entropy += observed * math.log(observed / mean)
    hoeffding = math.exp(-rows * entropy)
    # Losses are float32: a sum such as 1.00000002 stands for 1 and must not round up to 2.
    bentkus = math.e * float(stats.binom.cdf(math.ceil(total - 1e-7 * rows), rows, mean))
    return min(1.0, hoeffding, bentkus)


def _bootstrap(values: np.ndarray, confidence: float, seed: int) -> float:
    if values.size == 1:
        return math.inf
    if values.min() == values.max():
        return float(values[0])

    def upper(method: str) -> float:
        with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            result = stats.bootstrap(
                (values,),
                np.mean,
                confidence_level=confidence,
                alternative="less",
                method=method,
                n_resamples=9999,
                batch=max(1, 2_000_000 // values.size),  # bounds the resampled array at 16 MB
                rng=np.random.default_rng(seed),
            )
        return float(result.confidence_interval.high)

    bound = upper("BCa")
    # Nearly constant data can leave BCa without an acceleration; the percentile bound is always defined.
    return bound if math.isfinite(bound) else upper("percentile")


def _first_bad(values: np.ndarray) -> int:
    return int(np.flatnonzero(~np.isfinite(values))[0])


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise InputError(f"budget.metric is '{metric}'; expected one of {', '.join(METRICS)}.")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"budget.confidence is {confidence}; expected a number between 0 and 1, such as 0.95.")
