"""ImportanceScoring: the importance of every layer in prefill and in decode, from virtual gates.

I_l = E[(dL/dg_l)^2] at g = 1 with targets drawn from the model (arXiv 2602.03295, section 3): one forward and one
backward per batch give all layers and both stages. Depth candidates are placed by these scores.

The gradient is linear in the residuals e_y - p of the positions, so the expectation depends only on their covariance.
Where the model is confident, nearly every drawn target is the most likely token, and the estimate depends on the few
that are not. Therefore residuals with the same mean and covariance, diag(p) - p p^T, are drawn to which every token
contributes (:func:`draw_residuals`).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.data.batches import real_rows
from pop_lightning.fitting.gates import gate_gradients, probed
from pop_lightning.models.decoder import Decoder, Trace
from pop_lightning.pruning.module import DecoderModule, outside_inference, resting
from pop_lightning.pruning.passes import refuse_broken, teacher_trace

RESIDUALS = 2**24  # entries of the residuals that are computed at a time
_BITS = 32  # random bits, and so signs, per drawn integer


class ImportanceScoring(DecoderModule):
    """Score all layers for both stages; after ``Trainer.validate``, :attr:`scores` holds ``[L, 2]``, float64.

    Batches are those of ``collate``; ``validate`` reads the rows of the ``fit`` split. The random numbers depend on
    (seed, row content) only, so scores do not depend on batch size, padding, order or the number of processes. The
    scores are logged as ``prefill_importance/LAYER`` and ``decode_importance/LAYER``.

    Args:
        model: the base: a hub id or folder, a Transformers model, or a decoder; its weights get no gradient.
        boundary: number of last prompt tokens that count as decode.
        seed: of the random numbers.
        gradient_checkpointing: keep only the inputs of the layers and run every layer again in the backward pass:
            the activations of one layer in memory at a time, for 50% more operations.

    Attributes:
        rows: number of scored rows.

    Raises:
        InputError: from :attr:`scores` and :meth:`candidates`, nothing was scored yet.
    """

    split = "fit"

    def __init__(
        self,
        model: str | Path | PreTrainedModel | Decoder,
        boundary: int = 1,
        seed: int = 0,
        gradient_checkpointing: bool = False,
    ):
        model = str(model) if isinstance(model, Path) else model  # a name, which checkpoints can hold
        super().__init__(model)
        self.save_hyperparameters(ignore=() if isinstance(model, str) else "model")
        self.boundary, self.seed = boundary, seed
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("sums", torch.zeros(self.decoder.num_layers, 2, dtype=torch.float64))
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))

    def on_validation_start(self) -> None:
        self.refuse_repeated_rows()
        # Anew, because a Trainer of another precision has cast the buffer.
        self.sums = torch.zeros_like(self.sums, dtype=torch.float64)
        self.counted.zero_()

    def validation_step(self, batch: dict, batch_index: int) -> None:
        # Squared per row, before any sum over rows or processes.
        gradients = self.gradients(batch)
        finite = gradients.isfinite().flatten(1).all(1)
        refuse_broken(finite, batch, "gate gradients", self.decoder.model.dtype)
        self.sums += gradients.double().pow(2).sum(0)
        self.counted += real_rows(batch)

    def on_validation_epoch_end(self) -> None:
        distributed.add_up(self.sums)
        distributed.add_up(self.counted)
        for stage, scores in zip(("prefill", "decode"), self.scores.T.float(), strict=True):
            named = {f"{stage}_importance/{layer}": score for layer, score in enumerate(scores)}
            self.log_dict(named, sync_dist=True)

    @property
    def rows(self) -> int:
        return int(self.counted)

    @property
    def scores(self) -> Tensor:
        if not self.rows:
            raise InputError("nothing was scored yet: run trainer.validate(scoring, ...) first.")
        return self.sums.cpu() / self.rows

    def candidates(self, number: int, min_pruned: int = 2) -> list[int]:
        """:func:`candidates` placed by the prefill scores of this model."""
        prefill = self.scores[:, 0].tolist()
        return candidates(prefill, number, smallest=self.decoder.smallest_depth, min_pruned=min_pruned)

    def gradients(self, batch: dict, targets: Tensor | None = None) -> Tensor:
        """dL/dg of every row, layer and stage at g = 1, ``[batch, L, 2]`` (prefill, decode), float32.

        Args:
            targets: ``[batch, response]`` tokens for yhat; unless given, residuals are drawn.
        """
        # Trainer.validate runs in inference mode by default, and autograd cannot save tensors from it.
        with torch.inference_mode(False), torch.enable_grad(), resting(self.decoder.model):
            batch = outside_inference(batch)
            rows, context = len(batch["input_ids"]), max(0, batch["prompt_length"] - self.boundary)
            trace = teacher_trace(self.decoder, batch, 0, masks=True) if self.gradient_checkpointing else None
            with probed(self.decoder, rows, context) as gradients:
                if trace is None:
                    self.loss(batch, targets).backward()
                else:
                    self._backward_by_layer(trace, batch, targets)
            return gate_gradients(gradients, self.decoder.num_layers)

    def loss(self, batch: dict, targets: Tensor | None = None) -> Tensor:
        """-sum over t = N..T-1 of log p(yhat_{t+1} | x_1..x_t), over the rows.

        Without ``targets`` only its gradient is meaningful: that of drawn residuals.
        """
        return self._loss(self.decoder.response_logits(batch), batch, targets)

    def _backward_by_layer(self, trace: Trace, batch: dict, targets: Tensor | None) -> None:
        """The backward pass of :meth:`loss`, from the head down, over layers that run again from their inputs.

        What some families add between two layers (DeepStack) does not depend on a gate, so a layer's output and the
        next layer's input have the same gradient.
        """
        hidden = trace.hidden.pop(self.decoder.num_layers).requires_grad_()
        logits = self.decoder.logits(hidden[:, batch["prompt_length"] - 1 : -1])
        self._loss(logits, batch, targets).backward()
        del logits
        for layer in reversed(range(self.decoder.num_layers)):
            above, hidden = hidden.grad, trace.hidden.pop(layer).requires_grad_()
            output = self.decoder.run_layer(layer, hidden, attention_mask=trace.masks[layer], **trace.kwargs[layer])
            output.backward(above)

    def _loss(self, logits: Tensor, batch: dict, targets: Tensor | None) -> Tensor:
        real = batch["attention_mask"][:, batch["prompt_length"] :].bool()
        if targets is not None:
            return torch.nn.functional.cross_entropy(logits[real].float(), targets[real], reduction="sum")
        residuals = draw_residuals(logits.detach()[real], real.sum(1), batch["row_seed"], self.seed)
        return (logits[real] * residuals).sum()


def draw_residuals(logits: Tensor, lengths: Tensor, row_seed: Tensor, seed: int) -> Tensor:
    """Random residuals with mean zero and the covariance of ``e_y - p``, y drawn from the model: diag(p) - p p^T.

    Args:
        logits: ``[positions, vocabulary]`` of all rows, one row after the other.
        lengths: ``[rows]``, number of positions per row.
        row_seed: ``[rows]``, a hash of each row's content.

    Returns:
        ``[positions, vocabulary]`` in the dtype of ``logits``. The signs depend on (seed, row content, position) only.
    """
    residuals, vocabulary, start = torch.empty_like(logits), logits.shape[1], 0
    bits, step = torch.arange(_BITS, device=logits.device), max(1, RESIDUALS // vocabulary)
    for length, content in zip(lengths.tolist(), row_seed.tolist(), strict=True):
        generator = torch.Generator().manual_seed((content ^ (seed * 0x9E3779B97F4A7C15)) & (2**63 - 1))
        for first in range(start, start + length, step):
            here = slice(first, min(first + step, start + length))
            # Drawn on the CPU, for the same numbers on every device; one word of random bits gives many signs.
            shape = (here.stop - first, -(-vocabulary // _BITS), 1)
            words = torch.randint(2**_BITS, shape, generator=generator).to(logits.device)
            signs = (words >> bits & 1).flatten(1)[:, :vocabulary] * 2 - 1
            residuals[here] = _residuals(logits[here].float(), signs)
        start += length
    return residuals


def _residuals(logits: Tensor, signs: Tensor) -> Tensor:
    """diag(sqrt(p)) H signs, with H the reflection of sqrt(p) onto the axis of the likeliest token, whose sign is 0.

    diag(sqrt(p)) signs would have the covariance diag(p); the zero sign removes the direction of pp^T. With only two
    possible tokens, as where the model is nearly certain, a single sign remains, and its square is exact.
    """
    p = logits.softmax(-1)
    likeliest = p.argmax(-1, keepdim=True)
    root = p.gather(-1, likeliest).sqrt()
    p = p.scatter(-1, likeliest, 0.0)
    drawn = p.sqrt() * signs
    total = drawn.sum(-1, keepdim=True)
    # (1 + sqrt(p_k)) / (1 - p_k) is 1 / (1 - sqrt(p_k)) without the difference of nearly equal numbers.
    shrunk = drawn - p * total * (1 + root) / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    return shrunk.scatter(-1, likeliest, root * total)


def candidates(importance: Sequence[float], number: int, *, smallest: int = 1, min_pruned: int = 2) -> list[int]:
    """Depths to measure, shallowest pruning first, denser where the removed importance rises fast.

    They are spaced evenly in the logarithm of the removed importance, the summed prefill importance of the pruned
    layers, plus their depth on the same scale.

    Args:
        importance: prefill importance, one value per layer.
        number: of depths; all depths if there are fewer.
        smallest: the smallest depth that the model allows.
        min_pruned: the fewest pruned layers.
    """
    depths = list(range(len(importance) - min_pruned, smallest - 1, -1))
    if number >= len(depths):
        return depths
    removed = torch.tensor([sum(importance[depth:]) for depth in depths], dtype=torch.float64)
    # Depth counts as much as importance, so that a jump of importance at one layer cannot attract all candidates.
    level = removed.clamp(min=1e-30).log()
    level = (level - level[0]).clamp(min=0) / (level[-1] - level[0]).clamp(min=1e-12)
    level = level + torch.linspace(0, 1, len(depths), dtype=torch.float64)
    chosen = {int((level - share * level[-1]).abs().argmin()) for share in torch.linspace(0, 1, number).tolist()}
    return [depths[index] for index in sorted(chosen)]
