"""ImportanceScoring: how much each layer matters in prefill and in decode, from virtual gates.

I_l = E[(dL/dg_l)^2] at g = 1 with targets drawn from the model (arXiv 2602.03295, section 3): one forward and one
backward per batch give every layer and both stages. The pipeline orders depth candidates by it.
"""

import lightning
import torch
from torch import Tensor

from pop_lightning.decoder import Decoder, position_ids
from pop_lightning.gates import gated


class ImportanceScoring(lightning.LightningModule):
    """Score all layers for both stages; after ``fit``, :attr:`scores` holds ``[L, 2]`` (prefill, decode), float64.

    Batches are those of :func:`pop_lightning.data.collate`. Targets depend on (seed, row content) alone, so scores do
    not depend on batch size, padding or order.

    Args:
        decoder: the base; its weights stay frozen.
        boundary: how many of the last prompt tokens count as decode.
        seed: of the sampled targets.
    """

    def __init__(self, decoder: Decoder, boundary: int = 1, seed: int = 0):
        super().__init__()
        self.automatic_optimization = False
        self.decoder, self.boundary, self.seed = decoder, boundary, seed
        self.base = decoder.model  # registered, so that Lightning places it
        self.register_buffer("sums", torch.zeros(decoder.num_layers, 2, dtype=torch.float64), persistent=False)
        self.rows = 0

    def configure_optimizers(self):
        return None

    def on_fit_start(self):
        self.sums.zero_()
        self.rows = 0

    def training_step(self, batch: dict, batch_index: int) -> None:
        gates = torch.ones(len(batch["input_ids"]), self.decoder.num_layers, 2, device=self.device, requires_grad=True)
        self.manual_backward(self.loss(batch, gates))
        self.sums += gates.grad.double().pow(2).sum(0)
        self.rows += len(gates)

    def loss(self, batch: dict, gates: Tensor, targets: Tensor | None = None) -> Tensor:
        """-sum over t = N..T-1 of log p(yhat_{t+1} | x_1..x_t), over the rows; yhat is drawn unless given."""
        ids, mask, prompt = batch["input_ids"], batch["attention_mask"], batch["prompt_length"]
        context = max(0, prompt - self.boundary)
        with gated(self.decoder, gates, context):
            logits = self.decoder.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position_ids(mask),
                use_cache=False,
                logits_to_keep=ids.shape[1] - prompt + 1,
            ).logits[:, :-1]
        logp = logits.float().log_softmax(-1)
        if targets is None:
            targets = sample(logp.detach(), batch["row_seed"], self.seed)
        picked = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return -(picked * mask[:, prompt:]).sum()

    @property
    def scores(self) -> Tensor:
        return self.sums.cpu() / max(self.rows, 1)


def sample(logp: Tensor, row_seed: Tensor, seed: int) -> Tensor:
    """Draw a token from each distribution by inverting its cumulative sum: one uniform number per position.

    Args:
        logp: ``[batch, response, vocabulary]`` log-probabilities.
        row_seed: ``[batch]``, a hash of each row's content.

    Returns:
        ``[batch, response]`` token ids that depend on (seed, row content, position) alone.
    """
    batch, positions, vocabulary = logp.shape
    uniform = torch.empty(batch, positions, 1, dtype=torch.float64)
    for row in range(batch):
        generator = torch.Generator().manual_seed((int(row_seed[row]) ^ (seed * 0x9E3779B97F4A7C15)) & (2**63 - 1))
        uniform[row, :, 0] = torch.rand(positions, generator=generator, dtype=torch.float64)
    cumulative = logp.double().exp().cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.to(logp.device) * cumulative[..., -1:])
    return drawn.squeeze(-1).clamp(max=vocabulary - 1)
