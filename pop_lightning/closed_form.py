"""ClosedFormFit: projections by ridge regression from n(h_d), for several depths in passes of the full model alone.

For depth d and layer l the target is what the full model puts in its cache, y = W_l n(h_l) + b_l, before k_norm and
RoPE. The fit adds to reuse a correction D of least squares on context tokens:
sum_t |y_t - P_reuse n_t - D [n_t; 1]|^2 + ridge * mean diagonal of the Gram * |D|^2, so that a large ridge is reuse.
"""

import lightning
import torch
from torch import Tensor

from pop_lightning.decoder import Decoder, position_ids
from pop_lightning.projections import KVProjections


class ClosedFormFit(lightning.LightningModule):
    """Collect the sums of the regression in one ``validate`` pass; then :meth:`solve` gives projections.

    Sums are kept in float64; products are float32. Memory: per depth one ``[hidden+1, hidden+1]`` Gram, per (depth,
    layer) one ``[2 kv_dim, hidden+1]`` cross matrix; :meth:`bytes_needed` states it.

    Args:
        depths: candidate depths, all below L-1 (at L-1 reuse is exact and there is nothing to fit).
        boundary: the last prompt tokens that run in full and so need no projection.
    """

    def __init__(self, decoder: Decoder, depths: list[int], boundary: int = 1):
        super().__init__()
        self.decoder, self.depths, self.boundary = decoder, list(depths), boundary
        self.base = decoder.model
        self.reuse = {depth: KVProjections(decoder, depth) for depth in self.depths}
        self.gram: dict[int, Tensor] = {}
        self.cross: dict[tuple[int, int], Tensor] = {}
        self.tokens = 0

    @staticmethod
    def bytes_needed(decoder: Decoder, depth: int) -> int:
        """Memory of one depth's running sums, in bytes."""
        width = decoder.config.hidden_size + 1
        return 8 * width * (width + 2 * decoder.kv_dim * max(0, decoder.num_layers - depth - 1))

    def validation_step(self, batch: dict, batch_index: int) -> None:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        context = max(0, batch["prompt_length"] - self.boundary)
        # Causal: what follows the context cannot change it, so the pass stops there.
        ids, mask = ids[:, :context], mask[:, :context]
        with self.decoder.tracing(range(min(self.depths), self.decoder.num_layers)) as trace:
            self.decoder.model(
                input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False, logits_to_keep=1
            )
        real = mask.bool()
        self.tokens += int(real.sum())
        hidden = {layer: h[real] for layer, h in trace.hidden.items() if layer < self.decoder.num_layers}
        normed = {layer: self.decoder.normalise(h) for layer, h in hidden.items()}
        for depth in self.depths:
            n = normed[depth].float()
            n = torch.cat([n, torch.ones_like(n[:, :1])], dim=1)
            _add(self.gram, depth, n.T @ n)
            for layer in self.reuse[depth].fitted_layers:
                projection = self.reuse[depth]
                residual = projection(layer, hidden[layer], normed[layer]) - projection(
                    layer, hidden[depth], normed[depth]
                )
                _add(self.cross, (depth, layer), residual.float().T @ n)

    def solve(self, depth: int, ridge: float) -> KVProjections:
        """Projections of one depth at one ridge strength; the sums are left as they are."""
        gram = self.gram[depth]
        regular = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        layers = self.reuse[depth].fitted_layers
        maps = {}
        if len(layers):
            factor = torch.linalg.cholesky(regular)
            for layer in layers:
                correction = torch.cholesky_solve(self.cross[depth, layer].T, factor).T
                weight, bias = self.reuse[depth].affine(layer)
                maps[layer] = (weight + correction[:, :-1].to(weight), bias + correction[:, -1].to(bias))
        return KVProjections(self.decoder, depth).replace(maps, "closed_form")


def _add(sums: dict, key, value: Tensor) -> None:
    sums[key] = sums[key] + value.double() if key in sums else value.double()
