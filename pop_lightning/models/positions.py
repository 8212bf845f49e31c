"""Position ids: the position in the row and, for models that read images, rotary positions on several axes (M-RoPE)."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.core.errors import InputError
from pop_lightning.models.vision_tokens import VisionTokens


def position_ids(attention_mask: Tensor) -> Tensor:
    """Every token's position among its row's tokens, ``[batch, tokens]``; padding counts as position 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class Positions:
    """Makes a model's position ids: plain, or on the axes time, height and width (M-RoPE) for image tokens.

    Attributes:
        mrope: whether there are several axes.
    """

    def __init__(self, model: PreTrainedModel, vision: VisionTokens):
        self._rope = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
        self._vision = vision
        self.mrope = self._rope is not None

    def __call__(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        vision: Mapping[str, Tensor],
        cached: int = 0,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Every token's position, as the model's forward expects it.

        Args:
            input_ids: ``[batch, tokens]``: the whole sequence, or what follows ``cached`` tokens of it.
            attention_mask: ``[batch, cached + tokens]`` of the whole sequence.
            vision: with the grids of the images (``image_grid_thw``, ``video_grid_thw``), where there are any.
            cached: preceding tokens that a cache already holds.
            shift: their :meth:`shift`; by default what the model remembers from its last pass.

        Returns:
            ``[batch, cached + tokens]``; for M-RoPE ``[4, batch, cached + tokens]``: the place in the row, and the
            rotary positions in time, height and width.
        """
        text, rope = position_ids(attention_mask), self._rope
        if rope is None:
            return text
        if cached and shift is None:
            shift = rope.rope_deltas
            if shift is not None and len(shift) not in (1, len(text)):
                raise InputError(
                    f"past_key_values do not record the rotary positions of their images, and the model's last pass "
                    f"had {len(shift)} rows, not {len(text)}; fill the cache with this generator."
                )
        rotary = text if shift is None or not cached else text + shift.to(text.device)
        rotary = rotary.expand(3, -1, -1)
        grids = self._vision.grids(vision)
        if not grids or input_ids is None:
            return torch.cat([text[None], rotary])
        types = self._vision.types(input_ids)
        start = attention_mask.shape[1] - input_ids.shape[1]
        if cached > start and not self._vision.complete(types, grids):
            types, input_ids, start = types[:, cached - start :], input_ids[:, cached - start :], cached
        if not types.any():
            return torch.cat([text[None], rotary])
        mask = attention_mask[:, start:]
        # get_rope_index fails on an all-padding row, which a process has if the batch has fewer rows than processes.
        real = torch.where(mask.any(1, keepdim=True), mask, 1)
        names = inspect.signature(rope.get_rope_index).parameters.keys()
        names -= {"input_ids", "inputs_embeds", "attention_mask"}
        given = {name: vision[name] for name in names if vision.get(name) is not None} | {"mm_token_type_ids": types}
        seen, _ = rope.get_rope_index(input_ids, attention_mask=real, **given)
        if start:  # positions are relative to the first of these tokens, which follows the largest position before it
            before = rotary[:, :, :start].masked_fill(attention_mask[:, :start] == 0, -1)
            first = before.amax((0, 2)) + 1
            seen = seen + first[:, None]
        return torch.cat([text[None], torch.cat([rotary[:, :, :start], seen * mask], dim=-1)])

    def shift(self, positions: Tensor, attention_mask: Tensor) -> Tensor | None:
        """The rotary position of text that follows minus its place in the row, ``[batch, 1]``; None without M-RoPE.

        An image has fewer rotary positions than tokens, so the shift is zero or negative.
        """
        if positions.dim() != 3:
            return None
        return (positions[1:] * attention_mask).amax((0, 2))[:, None] + 1 - attention_mask.sum(-1, keepdim=True)

    def remember(self, shift: Tensor | None) -> None:
        """Store a pass's shift where the model's own forward would, for a caller that decodes step by step."""
        if shift is not None:
            self._rope.rope_deltas = shift
