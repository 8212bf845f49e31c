"""BlockInfluence: how much every layer changes its input, by which ShortGPT chooses the layers that it removes.

BI_l = 1 - E[cos(x_l, x_{l+1})], where x_l is a token's input of layer l and x_{l+1} its output (Men et al., "ShortGPT:
Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853, section 2.3).
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.models.decoder import Decoder
from pop_lightning.pruning.module import DecoderModule
from pop_lightning.pruning.passes import teacher_trace


class BlockInfluence(DecoderModule):
    """After ``Trainer.validate``, :attr:`influence` holds one value for each layer, float64, over all tokens.

    The values are logged as ``block_influence/LAYER``.

    Args:
        model: the base: a hub id or folder, a Transformers model, or a decoder.
    """

    split = "fit"

    def __init__(self, model: str | Path | PreTrainedModel | Decoder):
        super().__init__(model)
        self.influence: torch.Tensor | None = None
        self._sums: torch.Tensor | None = None  # over tokens, one for each layer, and the number of tokens

    def on_validation_start(self) -> None:
        self.refuse_repeated_rows()
        self._sums = torch.zeros(self.decoder.num_layers + 1, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict, batch_index: int) -> None:
        hidden, layers = teacher_trace(self.decoder, batch, 0).hidden, self.decoder.num_layers
        real = batch["attention_mask"].bool()
        for layer in range(layers):
            before, after = (hidden[each].to(hidden[layers].device)[real].float() for each in (layer, layer + 1))
            self._sums[layer] += torch.cosine_similarity(before, after, dim=-1).double().sum().to(self._sums)
        self._sums[-1] += real.sum().to(self._sums)

    def on_validation_epoch_end(self) -> None:
        sums = distributed.total(self._sums)
        self.influence = 1 - (sums[:-1] / sums[-1]).cpu()
        self.log_dict(
            {f"block_influence/{layer}": value for layer, value in enumerate(self.influence.float())}, sync_dist=True
        )
