"""ImportanceScoring: how much each layer matters in prefill and in decode, from virtual gates.

I_l = E[(dL/dg_l)^2] at g = 1 with targets drawn from the model (arXiv 2602.03295, section 3): one forward and one
backward per batch give every layer and both stages. The pipeline orders depth candidates by it.
"""

import lightning
import torch
from torch import Tensor

from pop_lightning.core import distributed
from pop_lightning.data.module import real_rows
from pop_lightning.fitting.gates import gate_gradients, probed
from pop_lightning.models.decoder import Decoder, Trace
from pop_lightning.pruning.passes import teacher_trace


class ImportanceScoring(lightning.LightningModule):
    """Score all layers for both stages; after ``validate``, :attr:`scores` holds ``[L, 2]``, float64.

    Batches are those of ``collate``. Targets depend on (seed, row content) alone, so scores do
    not depend on batch size, padding, order or the number of processes. Nothing is trained, so it is a ``validate``
    pass, of a ``Trainer(inference_mode=False)``: gradients flow through the activations.

    Args:
        decoder: the base; its weights stay frozen.
        boundary: how many of the last prompt tokens count as decode.
        seed: of the sampled targets.
        gradient_checkpointing: keep each layer's input alone for the backward pass and run the layer again there: the
            activations of one layer live at a time, for half as many operations again.
    """

    def __init__(self, decoder: Decoder, boundary: int = 1, seed: int = 0, gradient_checkpointing: bool = False):
        super().__init__()
        self.decoder, self.boundary, self.seed = decoder, boundary, seed
        self.gradient_checkpointing = gradient_checkpointing
        self.register_buffer("sums", torch.zeros(decoder.num_layers, 2, dtype=torch.float64), persistent=False)
        self.rows = 0

    def on_validation_start(self) -> None:
        self.sums.zero_()
        self.rows = 0

    def validation_step(self, batch: dict, batch_index: int) -> None:
        # The square is taken per row, before any sum over rows or processes.
        self.sums += self.gradients(batch).double().pow(2).sum(0)
        self.rows += real_rows(batch)

    def on_validation_epoch_end(self) -> None:
        distributed.add_up(self.sums)
        self.rows = sum(distributed.counts(self.rows, self.sums.device))

    def gradients(self, batch: dict, targets: Tensor | None = None) -> Tensor:
        """dL/dg of every row, layer and stage at g = 1, ``[batch, L, 2]`` (prefill, decode), float32."""
        rows, context = len(batch["input_ids"]), max(0, batch["prompt_length"] - self.boundary)
        trace = teacher_trace(self.decoder, batch, 0, masks=True) if self.gradient_checkpointing else None
        with torch.enable_grad(), probed(self.decoder, rows, context) as found:
            if trace is None:
                self.loss(batch, targets).backward()
            else:
                self._backward_by_layer(trace, batch, targets)
        return gate_gradients(found, self.decoder.num_layers)

    def loss(self, batch: dict, targets: Tensor | None = None) -> Tensor:
        """-sum over t = N..T-1 of log p(yhat_{t+1} | x_1..x_t), over the rows; yhat is drawn unless given."""
        return self._loss(self.decoder.response_logits(batch), batch, targets)

    def _backward_by_layer(self, trace: Trace, batch: dict, targets: Tensor | None) -> None:
        """The backward pass of :meth:`loss`, down from the head, over layers that run again from their inputs.

        Whatever a family adds between two layers (DeepStack) depends on no gate, so a layer's output and the next
        one's input share their gradient.
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
        if targets is None:
            targets = sample(logits.detach(), real, batch["row_seed"], self.seed)
        return torch.nn.functional.cross_entropy(logits[real].float(), targets[real], reduction="sum")

    @property
    def scores(self) -> Tensor:
        return self.sums.cpu() / max(self.rows, 1)


def sample(logits: Tensor, real: Tensor, row_seed: Tensor, seed: int) -> Tensor:
    """Draw a token from each position's distribution by inverting its cumulative sum: one uniform number per position.

    Args:
        logits: ``[batch, response, vocabulary]``.
        real: ``[batch, response]``, True where a token is to be drawn.
        row_seed: ``[batch]``, a hash of each row's content.

    Returns:
        ``[batch, response]`` token ids that depend on (seed, row content, position) alone; 0 where not real.
    """
    batch, positions, vocabulary = logits.shape
    uniform = torch.empty(batch, positions, dtype=torch.float64)
    for row in range(batch):
        generator = torch.Generator().manual_seed((int(row_seed[row]) ^ (seed * 0x9E3779B97F4A7C15)) & (2**63 - 1))
        uniform[row] = torch.rand(positions, generator=generator, dtype=torch.float64)
    uniform = uniform.to(logits.device)
    targets = torch.zeros_like(real, dtype=torch.long)
    # A row at a time: float64 sums over a vocabulary are large.
    for row in range(batch):
        kept = real[row]
        cumulative = logits[row][kept].float().softmax(-1).double().cumsum(-1)
        wanted = uniform[row][kept, None] * cumulative[:, -1:]
        targets[row, kept] = torch.searchsorted(cumulative, wanted).squeeze(-1).clamp(max=vocabulary - 1)
    return targets
