"""How Hugging Face decoders are built: the only file that knows.

Everything above it (projections, prefill, gates, training) sees a :class:`Decoder`: its layers, the unweighted norm and
the key/value map of one layer, masks, and where a layer's branches meet the residual stream. What differs between
families is written down per layer in a :class:`LayerParts`, read by :func:`layer_parts` when a model is attached: that
function is the place to add a family. Nothing here asks for a family by name; the attach check in ``prefill.py`` tries
what was read on the model itself.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.models.layer_parts import (
    FEED_FORWARD,
    PER_TOKEN,
    RECURRENT,
    LayerParts,
    Tables,
    _part,
    layer_parts,
)


@dataclass(frozen=True)
class AffineMap:
    """``y = weight @ n + bias`` on the normalised hidden state n(h); weight ``[2 kv_dim, hidden]``, float32."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class Trace:
    """What one full forward pass leaves behind for the pruned layers to be rerun on.

    Attributes:
        hidden: ``{layer: [batch, tokens, hidden]}``, each traced layer's input; key ``L`` is the last one's output.
        kwargs: ``{layer: keyword arguments}`` that the model passed to each layer, those that tell something of each
            token: rotary tables, position ids, per-layer inputs (:func:`of_tokens` cuts them).
        masks: ``{layer: mask}`` as the model built it, where it was asked for.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    kwargs: dict[int, dict] = field(default_factory=dict)
    masks: dict[int, Tensor | BlockMask | None] = field(default_factory=dict)


# --- what one layer is made of ----------------------------------------------------------------------------------------


# --- the whole decoder ------------------------------------------------------------------------------------------------


class Decoder:
    """A view of a causal language model's decoder stack; it owns no weights and changes nothing.

    Of a model that reads images as well it is the text decoder; what images change about a pass is in the part
    "images" below.

    Args:
        model: a Transformers model with a language modelling head.

    Raises:
        InputError: the model is no decoder of the supported shape, or no depth could prune it; the sentence names the
            class and the reason.

    Attributes:
        parts: ``{layer: LayerParts}`` of the layers that can be pruned.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError(f"{self.name} is an encoder-decoder; pruning the prefill needs a decoder-only model.")
        self.body, self.norm = self._find_body(model)
        self.config = self.body.config
        self.layers: nn.ModuleList = self.body.layers
        self.head: nn.Module = model.get_output_embeddings()
        if self.head is None:
            raise InputError(f"{self.name} has no language modelling head; load it with AutoModelForCausalLM.")
        self.num_layers = len(self.layers)
        # The cache that Transformers itself would build knows which layer slides, and how far.
        windows = [getattr(layer, "sliding_window", None) for layer in self.new_cache().layers]
        if len(windows) != self.num_layers:
            # A plain dynamic cache grows its layers on first use: none of them slides.
            windows = [None] * self.num_layers
        kinds = getattr(self.config, "layer_types", None) or [None] * self.num_layers
        read = [layer_parts(*each) for each in zip(self.layers, kinds, windows, strict=True)]
        self.parts = {layer: parts for layer, parts in enumerate(read) if isinstance(parts, LayerParts)}
        self._refused = {layer: reason for layer, reason in enumerate(read) if isinstance(reason, str)}
        # What gives image tokens rotary positions of several axes (M-RoPE), and how the model's forward calls the
        # tensor that says which tokens they are.
        self._rope = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
        self._types_name = None
        if self.image_token is not None:
            parameters = inspect.signature(model.forward).parameters
            names = ("token_type_ids", "mm_token_type_ids")
            self._types_name = next((name for name in names if name in parameters), None)
        if self.num_layers - 1 in self._refused:
            raise InputError(
                f"{self.name} cannot be pruned at any depth, because every depth prunes its last layer: "
                f"{self._reason(self.num_layers - 1)}."
            )

    @property
    def smallest_depth(self) -> int:
        """The smallest depth whose pruned layers all have keys and values of their own to project, above DeepStack."""
        return max(1, max(self._refused, default=-1) + 1, self._deepstack)

    def check_depth(self, depth: int) -> None:
        """Raise :class:`InputError` where the model cannot be pruned at ``depth``, with the smallest one allowed."""
        if depth < self._deepstack:
            raise InputError(
                f"{self.name} cannot be pruned at depth {depth}: to the first {self._deepstack} layers it adds image "
                f"features (DeepStack); the smallest depth allowed is {self.smallest_depth}."
            )
        refused = [layer for layer in self._refused if layer >= depth]
        if refused:
            raise InputError(
                f"{self.name} cannot be pruned at depth {depth}: {self._reason(refused[0])}; set the depth to "
                f"{self.smallest_depth} or more (of {self.num_layers} layers)."
            )

    def _reason(self, layer: int) -> str:
        return f"layer {layer} ({type(self.layers[layer]).__name__}) cannot be projected, {self._refused[layer]}"

    def _find_body(self, model: PreTrainedModel) -> tuple[nn.Module, nn.Module]:
        for module in model.get_decoder().modules():  # of the text alone: a vision tower may look the same
            norm = _part(module, ("norm", "final_layernorm", "final_norm", "embedding_norm", "norm_f"))
            if isinstance(getattr(module, "layers", None), nn.ModuleList) and norm and hasattr(module, "config"):
                return module, getattr(module, norm)
        raise InputError(f"{self.name} is not supported: no decoder with `layers` and a final `norm` was found in it.")

    # --- the cache ------------------------------------------------------------------------------------------------

    def new_cache(self) -> Cache:
        """An empty dynamic cache laid out as Transformers would for this decoder."""
        return DynamicCache(config=self.config)

    def window(self, layer: int) -> int | None:
        """Sliding window (or chunk) of a layer in tokens, or None where it sees everything."""
        return self.parts[layer].window if layer in self.parts else None

    def visible(self, layer: int, context: int) -> int:
        """How many of the last ``context`` tokens a layer can still see once a token follows them."""
        window = self.window(layer)
        return context if window is None else min(context, window - 1)

    def append(self, cache: Cache, layer: int, keys: Tensor, values: Tensor, skipped: int = 0) -> None:
        """Put keys and values ``[batch, heads, tokens, head_dim]`` into a layer's cache, behind ``skipped`` tokens.

        The skipped tokens are those that no later token of the layer can see (:meth:`visible`). A cache layer that
        slides drops them anyway and is only told their number; a static one takes a column of zeros with it, because it
        holds a whole window and not window-1. Every other cache layer gets zeros, which the layer's mask hides.
        """
        held = cache.layers[layer] if layer < len(cache.layers) else None  # plain dynamic caches grow their layers
        length, zeros = None, skipped
        if skipped and isinstance(held, DynamicSlidingWindowLayer):
            length, zeros = "cumulative_length", 0
        elif skipped and isinstance(held, StaticSlidingWindowLayer):
            length, zeros = "cumulative_length_int", 1
        if zeros:
            keys, values = (nn.functional.pad(tensor, (0, 0, zeros, 0)) for tensor in (keys, values))
        cache.update(keys, values, layer)
        if length is not None:
            setattr(held, length, getattr(held, length) + skipped - zeros)

    @property
    def compiled(self) -> bool:
        """Whether the model, or a part of it that holds a layer, runs through ``torch.compile``."""
        return any(
            module._compiled_call_impl is not None
            or hasattr(module, "_orig_mod")
            or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
            for module in (self.model, self.body, *self.layers)
        )

    # --- one layer ------------------------------------------------------------------------------------------------

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].self_attn

    def placement(self, layer: int) -> tuple[torch.device, torch.dtype]:
        """Where a layer computes, and in what dtype; its weights may wait elsewhere (offloading)."""
        norm, linear = self.parts[layer].norm, self.parts[layer].keys.linear
        weight = linear.weight if _is_plain(linear) else norm.weight  # a quantised weight may have no such dtype
        device = getattr(getattr(norm, "_hf_hook", None), "execution_device", None)
        return torch.device(norm.weight.device if device is None else device), weight.dtype

    @property
    def mlp_dim(self) -> int:
        """Width of the feed-forward branch that a token takes: what one layer's activations of it are measured by."""
        config = self.config
        dense = getattr(config, "intermediate_size", None) or config.hidden_size
        expert, active = getattr(config, "moe_intermediate_size", None), _active_experts(config)
        return min(dense, expert * active) if expert and active else dense

    @property
    def kv_dim(self) -> int:
        """Width of the widest layer's keys (and values): what memory is bounded by."""
        return max(parts.kv_dim for parts in self.parts.values())

    def branches(self, layer: int) -> tuple[nn.Module, ...]:
        """The modules whose outputs meet the residual stream: attention branch, feed-forward branch, and any other.

        Families with post-norms (Gemma, GLM-4) add a branch after its post-norm, which is the branch's end there.

        Raises:
            InputError: a layer is built otherwise.
        """
        block = self.layers[layer]
        if hasattr(block, "post_feedforward_layernorm"):
            ends = ["post_attention_layernorm", "post_feedforward_layernorm"]
        elif hasattr(block, "post_self_attn_layernorm"):
            ends = ["post_self_attn_layernorm", "post_mlp_layernorm"]
        else:
            ends = [_part(block, ("self_attn", *RECURRENT)), _part(block, FEED_FORWARD)]
        if hasattr(block, "post_per_layer_input_norm"):
            ends.append("post_per_layer_input_norm")
        found = tuple(getattr(block, end, None) for end in ends if end is not None)
        if len(found) < 2 or None in found:
            raise InputError(
                f"{self.name} cannot be scored: what layer {layer} ({type(block).__name__}) adds to its residual "
                f"stream was not found."
            )
        return found

    def linear_weights(self, layer: int) -> int:
        """How many weights of a layer's linear maps one token is multiplied with; of experts only those that run."""
        total = 0
        for module in self.layers[layer].modules():
            own = list(module.parameters(recurse=False))
            shapes = [distributed.whole_shape(weight) for weight in own]
            stacked = [shape[1:].numel() for shape in shapes if len(shape) == 3]
            if stacked and hasattr(module, "num_experts"):
                # Experts that are not told which tokens are theirs run on all tokens (Llama 4).
                routed = "top_k_index" in inspect.signature(module.forward).parameters
                total += sum(stacked) * (_active_experts(self.config) if routed else module.num_experts)
            else:
                total += sum(shape.numel() for shape in shapes if len(shape) == 2)
        return total

    @property
    def linear_weights_below(self) -> int:
        """The same of linear maps that stand before the first layer and run on every token (per-layer inputs)."""
        inside = set(self.layers.modules())
        outside = (module for module in self.body.modules() if module not in inside)
        return sum(distributed.whole_shape(each.weight).numel() for each in outside if isinstance(each, nn.Linear))

    def normalise(self, hidden: Tensor) -> Tensor:
        """The unweighted normalised hidden state n(h), ``[..., hidden]`` in the dtype of ``hidden``.

        Root-mean-square norm, or centred where the family uses LayerNorm; statistics in float32, as the models do.
        """
        norm = self._any_norm
        x = hidden.float()
        if isinstance(norm, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._norm_eps)).to(hidden.dtype)

    @property
    def _any_norm(self) -> nn.Module:
        """All layers normalise alike but for the weights."""
        return self.parts[self.num_layers - 1].norm

    @property
    def _norm_eps(self) -> float:
        return getattr(self._any_norm, "variance_epsilon", None) or self._any_norm.eps

    @torch.no_grad()
    def reuse_map(self, layer: int) -> AffineMap | None:
        """The layer's own keys and values as one map of n(h): W diag(w_LN), or None where weights are no plain tensors.

        The norm's weight is read by running the norm on a vector it only scales, so whether a family stores w or 1 + w
        makes no difference here.
        """
        parts, norm = self.parts[layer], self.parts[layer].norm
        rows = (parts.keys, parts.values)
        if not all(_is_plain(each.linear) for each in rows):
            return None
        centred = isinstance(norm, nn.LayerNorm)
        if not centred:
            ones = torch.ones(self.config.hidden_size, device=norm.weight.device)
            scale, shift = norm(ones).float() * (1.0 + self._norm_eps) ** 0.5, None
        modules = (parts.keys.linear, parts.values.linear, norm)
        with distributed.gathered(parameter for module in modules for parameter in module.parameters()):
            if centred:
                scale, shift = norm.weight.float(), None if norm.bias is None else norm.bias.float()
            weight = torch.cat([each.linear.weight[each.span] for each in rows]).float()
            bias = None
            if parts.keys.linear.bias is not None:
                bias = torch.cat([each.linear.bias[each.span] for each in rows]).float()
            if shift is not None:
                bias = weight @ shift + (0.0 if bias is None else bias)
            return AffineMap(weight * scale, bias)

    def own_kv(self, layer: int, hidden: Tensor) -> Tensor:
        """``[k|v]`` of a layer before its norms and RoPE, through its own modules: ``[batch, tokens, 2 kv_dim]``."""
        parts = self.parts[layer]
        normed = parts.norm(hidden)
        if parts.keys.linear is not parts.values.linear:
            return torch.cat([parts.keys(normed), parts.values(normed)], dim=-1)
        output = parts.keys.linear(normed)
        return torch.cat([output[..., parts.keys.span], output[..., parts.values.span]], dim=-1)

    def to_cache(self, layer: int, kv: Tensor, position_embeddings: Tables | None) -> tuple[Tensor, Tensor]:
        """Turn ``[batch, tokens, 2 kv_dim]`` into cacheable keys and values ``[batch, heads, tokens, head_dim]``.

        Applies what the layer has of key norm, value norm and RoPE.
        """
        parts = self.parts[layer]
        heads = kv.unflatten(-1, (2, -1, parts.head_dim))
        keys, values = heads[..., 0, :, :].transpose(1, 2), heads[..., 1, :, :].transpose(1, 2)
        if parts.v_norm is not None:
            values = parts.v_norm(values)
        return parts.place(keys, parts.k_norm, position_embeddings), values

    def attention_weights(
        self,
        layer: int,
        hidden: Tensor,
        position_embeddings: Tables | None,
        columns: Tensor,
        keys: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """How a layer spreads the attention of some rows, recomputed from its queries, whatever kernel the model uses.

        Args:
            hidden: the layer's input at the asking tokens, ``[batch, rows, hidden]``.
            position_embeddings: their rotary tables, ``[batch, rows, head_dim]`` each.
            columns: where they stand in the sequence, ``[batch, rows]``: they see that far, and a window back.
            keys: of the whole sequence, as cached, ``[batch, kv_heads, tokens, head_dim]``.
            attention_mask: ``[batch, tokens]`` of 1 (token) and 0 (padding).

        Returns:
            ``[batch, kv_heads, queries per kv head, rows, tokens]``, float32.
        """
        attention, parts = self.attention(layer), self.parts[layer]
        queries = parts.queries(parts.norm(hidden)).unflatten(-1, (-1, parts.head_dim)).transpose(1, 2)
        queries = parts.place(queries, parts.q_norm, position_embeddings)
        if parts.query_scale is not None:
            queries = (queries * parts.query_scale(columns)[:, None, :, None]).to(queries.dtype)
        queries = queries.unflatten(1, (keys.shape[1], -1))
        scores = torch.einsum("bghqd,bgtd->bghqt", queries, keys).float()
        scores = scores * getattr(attention, "scaling", parts.head_dim**-0.5)
        if (cap := getattr(attention, "attn_logit_softcapping", None)) is not None:
            scores = torch.tanh(scores / cap) * cap
        tokens = torch.arange(keys.shape[2], device=columns.device)
        seen = (tokens <= columns[..., None]) & attention_mask[:, None].bool()
        if parts.chunked:
            first = (attention_mask.cumsum(-1) == 0).sum(-1)  # chunks are counted from a row's first token
            chunk, own = (tokens - first[:, None]) // parts.window, (columns - first[:, None]) // parts.window
            seen &= chunk[:, None] == own[..., None]
        elif parts.window is not None:
            seen &= tokens > columns[..., None] - parts.window
        return scores.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min).softmax(-1)

    def arguments(self, layer: int, args: tuple, kwargs: dict) -> dict:
        """What a model passes to one of its layers, by name, whether it stood in ``args`` or ``kwargs``."""
        block = getattr(self.layers[layer], "_orig_mod", self.layers[layer])  # torch.compile wraps
        return dict(zip(_argument_names(type(block)), args, strict=False)) | kwargs

    def run_layer(self, layer: int, hidden: Tensor, **kwargs) -> Tensor:
        output = self.layers[layer](hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm, head and what the family does to logits behind it: ``[..., hidden]`` to ``[..., vocabulary]``."""
        logits = self.head(self.norm(hidden))
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / scaling
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def response_logits(self, batch: dict) -> Tensor:
        """One plain pass over ``collate``'s batch: logits at the loss positions t = N..T-1.

        Returns:
            ``[batch, response, vocabulary]``: column j predicts response token j.
        """
        kept = batch["input_ids"].shape[1] - batch["prompt_length"] + 1
        return self.model(**self.inputs(batch), use_cache=False, logits_to_keep=kept).logits[:, :-1]

    # --- what a pass is given, images -----------------------------------------------------------------------------

    def inputs(self, batch: Mapping) -> dict[str, Tensor]:
        """The model's own arguments for a batch, on the model's device: every pass over rows starts here.

        Args:
            batch: ``input_ids`` and ``attention_mask`` ``[batch, tokens]``; ``vision``, where there are images: the
                tensors of the model's processor (``pixel_values``, ``image_grid_thw`` and so on).

        Returns:
            ``input_ids``, ``attention_mask``, ``position_ids``, and with images their tensors and which tokens they
            stand at. ``forward`` and ``generate`` both take them.
        """
        device = self.model.device
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        vision = {name: tensor.to(device) for name, tensor in (batch.get("vision") or {}).items()}
        if vision and self._types_name is not None:
            vision[self._types_name] = self._token_types(ids)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": self.positions(ids, mask, vision), **vision}

    @property
    def image_token(self) -> int | None:
        """The token that stands once for every feature of an image; None where the model reads text alone."""
        return getattr(self.model.config, "image_token_id", None)

    @property
    def vision_tokens(self) -> tuple[int, ...]:
        """The tokens that stand for features of images and of videos; none where the model reads text alone."""
        tokens = (self.image_token, getattr(self.model.config, "video_token_id", None))
        return tuple(token for token in tokens if token is not None)

    @property
    def _deepstack(self) -> int:
        """To how many of its first layers' outputs the model adds features of the images, which every token of an
        image has to pass (DeepStack, https://arxiv.org/abs/2406.04334)."""
        vision = getattr(self.model.config, "vision_config", None)
        return len(getattr(vision, "deepstack_visual_indexes", None) or ())

    @property
    def images_see_ahead(self) -> bool:
        """Whether an image's tokens attend among themselves, later ones included.

        Gemma 3 and PaliGemma, which do, call the tensor that says which they are otherwise than models that only give
        them positions; Gemma 4 names it in its config.
        """
        named = getattr(self.config, "use_bidirectional_attention", None) == "vision"
        return named or self._types_name == "token_type_ids"

    def splits_image(self, prompt: Sequence[int], boundary: int) -> bool:
        """Whether the boundary begins inside an image whose tokens attend to later ones: no context pass equals that.

        Args:
            prompt: token ids of one row, without padding behind them.
        """
        if not self.images_see_ahead or not 0 < boundary < len(prompt):
            return False
        before, first = prompt[-boundary - 1], prompt[-boundary]
        return before == first and first in self.vision_tokens

    def _token_types(self, input_ids: Tensor) -> Tensor:
        """1 at image tokens, 2 at video tokens, 0 elsewhere, as the processors number them."""
        types = (input_ids == self.image_token).long()
        video = getattr(self.model.config, "video_token_id", None)
        return types if video is None else types + 2 * (input_ids == video)

    @property
    def mrope(self) -> bool:
        """Whether rotary positions have several axes (M-RoPE), so that an image's tokens stand in a grid."""
        return self._rope is not None

    def positions(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        vision: Mapping[str, Tensor],
        cached: int = 0,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Every token's position, as the model's forward takes it.

        Args:
            input_ids: ``[batch, tokens]``: the whole sequence, or what follows ``cached`` tokens of it.
            attention_mask: ``[batch, cached + tokens]`` of the whole sequence.
            vision: with the grids of the images (``image_grid_thw``, ``video_grid_thw``), where there are any.
            cached: tokens in front that a cache holds already.
            shift: their :meth:`rotary_shift`; what the model remembers of its last pass unless given.

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
                    f"past_key_values do not say where their images left the rotary positions, and the model's last "
                    f"pass was of {len(shift)} rows, not of {len(text)}; fill the cache with this generator."
                )
        rotary = text if shift is None or not cached else text + shift.to(text.device)
        rotary = rotary.expand(3, -1, -1)
        grids = {name: vision[name] for name in ("image_grid_thw", "video_grid_thw") if vision.get(name) is not None}
        if not grids or input_ids is None:
            return torch.cat([text[None], rotary])
        types = self._token_types(input_ids)
        start = attention_mask.shape[1] - input_ids.shape[1]
        if cached > start and not self._all_of(types, grids):
            types, input_ids, start = types[:, cached - start :], input_ids[:, cached - start :], cached
        if not types.any():
            return torch.cat([text[None], rotary])
        mask = attention_mask[:, start:]
        # The model's function takes no row of padding alone, which stands where a process has no row of its own.
        taken = torch.where(mask.any(1, keepdim=True), mask, 1)
        names = inspect.signature(rope.get_rope_index).parameters.keys() - {
            "input_ids",
            "inputs_embeds",
            "attention_mask",
        }
        given = {name: vision[name] for name in names if vision.get(name) is not None} | {"mm_token_type_ids": types}
        seen, _ = rope.get_rope_index(input_ids, attention_mask=taken, **given)
        if start:  # they are counted from these tokens' first, which follows the largest position before it
            before = rotary[:, :, :start].masked_fill(attention_mask[:, :start] == 0, -1)
            first = before.amax((0, 2)) + 1
            seen = seen + first[:, None]
        return torch.cat([text[None], torch.cat([rotary[:, :, :start], seen * mask], dim=-1)])

    def _all_of(self, types: Tensor, grids: Mapping[str, Tensor]) -> bool:
        """Whether the grids describe every image and frame that these tokens hold, and not the last ones alone."""
        merged = self.model.config.vision_config.spatial_merge_size**2
        return int((types > 0).sum()) == sum(int(grid.prod(-1).sum()) // merged for grid in grids.values())

    def rotary_shift(self, positions: Tensor, attention_mask: Tensor) -> Tensor | None:
        """How far text that follows stands from its place in the row, ``[batch, 1]``; None without M-RoPE.

        An image takes less rotary positions than tokens, so the shift is zero or negative.
        """
        if positions.dim() != 3:
            return None
        return (positions[1:] * attention_mask).amax((0, 2))[:, None] + 1 - attention_mask.sum(-1, keepdim=True)

    def remember(self, shift: Tensor | None) -> None:
        """Leave a pass's shift where the model's own forward would, for a caller that decodes by hand."""
        if shift is not None:
            self._rope.rope_deltas = shift

    # --- masks ----------------------------------------------------------------------------------------------------

    def mask(self, layer: int, hidden: Tensor, attention_mask: Tensor | None, cache: Cache) -> Tensor | None:
        """The mask for ``hidden``'s rows over what ``cache`` already holds for ``layer`` plus those rows themselves.

        Args:
            hidden: ``[batch, rows, hidden]``, only its shape, dtype and device count.
            attention_mask: ``[batch, cached + rows]`` of 1 (token) and 0 (padding), or None.
        """
        parts = self.parts[layer]
        create = create_chunked_causal_mask if parts.chunked else create_sliding_window_causal_mask
        if parts.window is None:
            create = create_causal_mask
        return create(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=cache,
            layer_idx=layer,
        )

    def tail_mask(self, layer: int, mask, hidden: Tensor, past: int, cache: Cache, behind: int = 0):
        """What ``mask`` says of a prompt's last rows, over what ``cache`` holds for ``layer`` plus those rows.

        Args:
            mask: the mask that the model built for the whole prompt, in whatever form the attention implementation
                takes it: 4-D (sdpa, eager), :class:`BlockMask` (flex), 2-D padding (flash), or None.
            hidden: ``[batch, rows, hidden]``, the last rows; only its shape and device count.
            past: tokens in front of these rows, cached ones included.
            behind: tokens of the mask that follow these rows and are left out.

        Raises:
            InputError: a mask of another form; the sentence names the implementation.
        """
        rows = hidden.shape[1]
        columns, offset = cache.get_mask_sizes(rows, layer)
        implementation = self.config._attn_implementation
        if mask is None:
            # None meant "causal from the top left" over the whole prompt; these rows sit at the bottom right.
            if "flash" in implementation or (rows == 1 and not cache.layers[layer].is_compileable):
                return None
            queries = torch.arange(past, past + rows, device=hidden.device).unsqueeze(-1)
            keys = torch.arange(offset, offset + columns, device=hidden.device)
            return (keys <= queries).expand(hidden.shape[0], 1, rows, columns)
        if isinstance(mask, Tensor) and mask.dim() == 4:
            last, end = (length - behind for length in mask.shape[2:])
            return mask[:, :, last - rows : last, end - columns : end]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            end = mask.shape[1] - behind
            return mask[:, end - columns : end]
        if isinstance(mask, BlockMask):
            return _last_block(mask, rows, columns, behind)
        raise InputError(
            f"attn_implementation {implementation!r} builds masks of type {type(mask).__name__}, which cannot be cut "
            f"to the boundary tokens; use 'sdpa', 'eager', 'flex_attention' or 'flash_attention_2'."
        )

    # --- a whole pass ---------------------------------------------------------------------------------------------

    @contextmanager
    def tracing(self, layers: range | None = None, masks: bool = False):
        """Record the inputs of ``layers`` (all by default) and the last layer's output while the model runs.

        ``masks`` records the masks as well, which the model builds once per kind of layer.
        """
        trace = Trace()
        handles = []

        def record(index: int) -> Callable:
            def hook(module, args, kwargs):
                given = self.arguments(index, args, kwargs)
                trace.hidden[index] = given["hidden_states"]
                trace.kwargs[index] = {name: given[name] for name in PER_TOKEN if name in given}
                if masks:
                    trace.masks[index] = given.get("attention_mask")

            return hook

        def record_last(module, args, output):
            trace.hidden[self.num_layers] = output[0] if isinstance(output, tuple) else output

        try:
            for index in layers if layers is not None else range(self.num_layers):
                handles.append(self.layers[index].register_forward_pre_hook(record(index), with_kwargs=True))
            handles.append(self.layers[-1].register_forward_hook(record_last))
            yield trace
        finally:
            for handle in handles:
                handle.remove()


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer's weight can be read as numbers (in shards: once gathered): not quantised, not offloaded.

    An offloaded weight waits on the meta device for its hook; without one, the whole model is a shape (``dry_run.py``).
    """
    offloaded = linear.weight.is_meta and hasattr(linear, "_hf_hook")
    return type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor) and not offloaded


def position_ids(attention_mask: Tensor) -> Tensor:
    """Every token's position among its row's tokens, ``[batch, tokens]``; padding counts as position 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _last_block(mask: BlockMask, rows: int, columns: int, behind: int) -> BlockMask:
    """The bottom right ``[rows, columns]`` of a block mask whose last ``behind`` tokens are left out."""
    queries, keys = (length - behind - kept for length, kept in zip(mask.seq_lengths, (rows, columns), strict=True))
    whole = mask.mask_mod

    def last(batch, head, query, key):
        return whole(batch, head, query + queries, key + keys)

    batch, heads = mask.shape[:2]
    return create_block_mask(last, batch, heads, rows, columns, device=mask.kv_num_blocks.device)


@functools.cache
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _active_experts(config) -> int | None:
    """How many experts of a mixture a token takes, or None where the config names no number."""
    return next((n for name in ("num_experts_per_tok", "top_k_experts") if (n := getattr(config, name, None))), None)
