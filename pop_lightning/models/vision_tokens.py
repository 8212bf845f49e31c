"""Which tokens of a prompt are features of images and videos, and how they change a pass."""

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


class VisionTokens:
    """What a model's config and forward say about image and video tokens; all empty for a text model.

    Attributes:
        image, video: the token ids that a prompt repeats once per feature, or None.
        tokens: those of the two that exist.
        types_name: the name under which the model's forward expects :meth:`types`, or None.
        deepstack: the number of first layers to whose outputs the model adds image features, so that every image token
            has to run through them (DeepStack, https://arxiv.org/abs/2406.04334).
        see_ahead: whether an image's tokens attend to one another, later ones included. Gemma 3 and PaliGemma, which do
            this, pass :meth:`types` under another name than models that only derive positions from it; Gemma 4 says so
            in its config.
    """

    def __init__(self, model: PreTrainedModel, text: PreTrainedConfig):
        config = model.config
        self.image: int | None = getattr(config, "image_token_id", None)
        self.video: int | None = getattr(config, "video_token_id", None)
        self.tokens = tuple(token for token in (self.image, self.video) if token is not None)
        vision = getattr(config, "vision_config", None)
        self.deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
        self._features_per_merge = getattr(vision, "spatial_merge_size", 1) ** 2
        self.types_name = None
        if self.image is not None:
            names = inspect.signature(model.forward).parameters
            self.types_name = next((n for n in ("token_type_ids", "mm_token_type_ids") if n in names), None)
        named = getattr(text, "use_bidirectional_attention", None) == "vision"
        self.see_ahead = named or self.types_name == "token_type_ids"

    def types(self, input_ids: Tensor) -> Tensor:
        """1 at image tokens, 2 at video tokens, 0 elsewhere, as the processors number them."""
        types = (input_ids == self.image).long()
        return types if self.video is None else types + 2 * (input_ids == self.video)

    def on(self, device: torch.device, batch: Mapping, input_ids: Tensor) -> dict[str, Tensor]:
        """A batch's image tensors on a device, with :meth:`types` where the model expects them; ``{}`` without any."""
        given = {name: tensor.to(device) for name, tensor in (batch.get("vision") or {}).items()}
        if given and self.types_name is not None:
            given[self.types_name] = self.types(input_ids)
        return given

    def grids(self, given: Mapping) -> dict[str, Tensor]:
        """The grids of the images and videos among a forward's arguments, ``[images, 3]`` each."""
        return {name: given[name] for name in ("image_grid_thw", "video_grid_thw") if given.get(name) is not None}

    def complete(self, types: Tensor, grids: Mapping[str, Tensor]) -> bool:
        """Whether the grids describe every image and frame that these tokens hold, and not only the last ones."""
        features = sum(int(grid.prod(-1).sum()) // self._features_per_merge for grid in grids.values())
        return int((types > 0).sum()) == features

    def split_by(self, prompt: Sequence[int], boundary: int) -> bool:
        """Whether the boundary begins inside an image whose tokens attend to later ones: no context pass matches that.

        Args:
            prompt: token ids of one row, without padding after them.
        """
        if not self.see_ahead or not 0 < boundary < len(prompt):
            return False
        before, first = prompt[-boundary - 1], prompt[-boundary]
        return before == first and first in self.tokens
