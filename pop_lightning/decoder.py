"""How Hugging Face decoders are built: the only file that knows.

Everything above it (projections, prefill, gates, training) sees a :class:`Decoder`: its layers, the unweighted norm and
the key/value map of one layer, masks, and where a layer's branches meet the residual stream. A family is supported when
its layers have the parts named in :meth:`Decoder._parts` and the attach check in ``prefill.py`` holds; nothing here
asks for a family by name.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, StaticSlidingWindowLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from pop_lightning.errors import InputError


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
        kwargs: ``{layer: keyword arguments}`` that the model passed to each layer (rotary tables, position ids).
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    kwargs: dict[int, dict] = field(default_factory=dict)


class Decoder:
    """A view of a causal language model's decoder stack; it owns no weights and changes nothing.

    Args:
        model: a Transformers model with a language modelling head.

    Raises:
        InputError: the model is no decoder of the supported shape; the sentence names the class and what is missing.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError(f"{self.name} is an encoder-decoder; pruning the prefill needs a decoder-only model.")
        self.body = self._find_body(model)
        self.config = self.body.config
        self.layers: nn.ModuleList = self.body.layers
        self.norm: nn.Module = self.body.norm
        self.head: nn.Module = model.get_output_embeddings()
        if self.head is None:
            raise InputError(f"{self.name} has no language modelling head; load it with AutoModelForCausalLM.")
        self.num_layers = len(self.layers)
        for index in range(self.num_layers):
            self._parts(index)
        self.head_dim: int = self.attention(0).head_dim
        unknown = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if unknown:
            raise InputError(
                f"{self.name} is not supported: it has layers of type {', '.join(sorted(unknown))}; "
                f"full_attention and sliding_attention are known."
            )
        # The cache that Transformers itself would build knows which layer slides, and how far.
        self._windows = [getattr(layer, "sliding_window", None) for layer in self.new_cache().layers]
        if len(self._windows) != self.num_layers:
            # A plain dynamic cache grows its layers on first use: none of them slides.
            self._windows = [None] * self.num_layers

    def _find_body(self, model: PreTrainedModel) -> nn.Module:
        for module in model.modules():
            if isinstance(getattr(module, "layers", None), nn.ModuleList) and hasattr(module, "norm"):
                return module
        raise InputError(f"{self.name} is not supported: no decoder with `layers` and a final `norm` was found in it.")

    def _parts(self, index: int) -> None:
        layer = self.layers[index]
        missing = [part for part in ("input_layernorm", "self_attn", "mlp") if not hasattr(layer, part)]
        if not missing:
            missing = [
                f"self_attn.{part}" for part in ("k_proj", "v_proj", "head_dim") if not hasattr(layer.self_attn, part)
            ]
        if missing:
            raise InputError(
                f"{self.name} is not supported: layer {index} ({type(layer).__name__}) has no {', '.join(missing)}."
            )

    # --- the cache ------------------------------------------------------------------------------------------------

    def new_cache(self) -> Cache:
        """An empty dynamic cache laid out as Transformers would for this decoder."""
        return DynamicCache(config=self.config)

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, or None where it sees everything."""
        return self._windows[layer]

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
        norm, linear = self.layers[layer].input_layernorm, self.attention(layer).k_proj
        weight = linear.weight if _is_plain(linear) else norm.weight  # a quantised weight may have no such dtype
        device = getattr(getattr(norm, "_hf_hook", None), "execution_device", None)
        return torch.device(norm.weight.device if device is None else device), weight.dtype

    @property
    def mlp_dim(self) -> int:
        """Width of the feed-forward branch: what one layer's activations of a token are measured by."""
        return getattr(self.config, "intermediate_size", None) or self.config.hidden_size

    @property
    def kv_dim(self) -> int:
        """Width of one layer's keys (and values): key-value heads times head_dim."""
        return self.attention(0).k_proj.out_features

    def branches(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The modules whose outputs meet the residual stream: attention branch, feed-forward branch.

        Post-norm families (Gemma) add a branch after its post-norm, so there the post-norm is the branch's end.
        """
        block = self.layers[layer]
        if hasattr(block, "pre_feedforward_layernorm"):
            return block.post_attention_layernorm, block.post_feedforward_layernorm
        return block.self_attn, block.mlp

    def normalise(self, hidden: Tensor) -> Tensor:
        """The unweighted normalised hidden state n(h), ``[..., hidden]`` in the dtype of ``hidden``.

        Root-mean-square norm, or centred where the family uses LayerNorm; statistics in float32, as the models do.
        """
        norm = self.layers[0].input_layernorm
        x = hidden.float()
        if isinstance(norm, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._norm_eps)).to(hidden.dtype)

    @property
    def _norm_eps(self) -> float:
        norm = self.layers[0].input_layernorm
        return getattr(norm, "variance_epsilon", None) or norm.eps

    @torch.no_grad()
    def reuse_map(self, layer: int) -> AffineMap | None:
        """The layer's own keys and values as one map of n(h): W diag(w_LN), or None where weights are no plain tensors.

        The norm's weight is read by running the norm on a vector it only scales, so whether a family stores w or 1 + w
        makes no difference here.
        """
        attention, norm = self.attention(layer), self.layers[layer].input_layernorm
        linears = (attention.k_proj, attention.v_proj)
        if not all(map(_is_plain, linears)):
            return None
        if isinstance(norm, nn.LayerNorm):
            scale, shift = norm.weight.float(), None if norm.bias is None else norm.bias.float()
        else:
            ones = torch.ones(linears[0].in_features, device=norm.weight.device)
            scale, shift = norm(ones).float() * (1.0 + self._norm_eps) ** 0.5, None
        weight = torch.cat([linear.weight for linear in linears]).float()
        bias = None
        if linears[0].bias is not None:
            bias = torch.cat([linear.bias for linear in linears]).float()
        if shift is not None:
            bias = weight @ shift + (0.0 if bias is None else bias)
        return AffineMap(weight * scale, bias)

    def own_kv(self, layer: int, hidden: Tensor) -> Tensor:
        """``[k|v]`` of a layer before k_norm and RoPE, through its own modules: ``[batch, tokens, 2 kv_dim]``."""
        normed = self.layers[layer].input_layernorm(hidden)
        attention = self.attention(layer)
        return torch.cat([attention.k_proj(normed), attention.v_proj(normed)], dim=-1)

    def to_cache(self, layer: int, kv: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Turn ``[batch, tokens, 2 kv_dim]`` into cacheable keys and values ``[batch, heads, tokens, head_dim]``.

        Applies the family's k_norm, where it has one, and RoPE.
        """
        heads = kv.unflatten(-1, (2, -1, self.head_dim))
        keys, values = heads[..., 0, :, :].transpose(1, 2), heads[..., 1, :, :].transpose(1, 2)
        if (k_norm := getattr(self.attention(layer), "k_norm", None)) is not None:
            keys = k_norm(keys)
        return _rotate(keys, position_embeddings), values

    def normalises_keys(self, layer: int) -> bool:
        """Whether the family has a k_norm, after which the length of a key no longer matters."""
        return getattr(self.attention(layer), "k_norm", None) is not None

    def attention_weights(
        self,
        layer: int,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        columns: Tensor,
        keys: Tensor,
        attention_mask: Tensor,
    ) -> Tensor:
        """How a layer spreads the attention of some rows, recomputed from its q_proj, whatever kernel the model uses.

        Args:
            hidden: the layer's input at the asking tokens, ``[batch, rows, hidden]``.
            position_embeddings: their rotary tables, ``[batch, rows, head_dim]`` each.
            columns: where they stand in the sequence, ``[batch, rows]``: they see that far, and a window back.
            keys: of the whole sequence, as cached, ``[batch, kv_heads, tokens, head_dim]``.
            attention_mask: ``[batch, tokens]`` of 1 (token) and 0 (padding).

        Returns:
            ``[batch, kv_heads, queries per kv head, rows, tokens]``, float32.
        """
        attention = self.attention(layer)
        queries = attention.q_proj(self.layers[layer].input_layernorm(hidden))
        queries = queries.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if (q_norm := getattr(attention, "q_norm", None)) is not None:
            queries = q_norm(queries)
        queries = _rotate(queries, position_embeddings).unflatten(1, (keys.shape[1], -1))
        scores = torch.einsum("bghqd,bgtd->bghqt", queries, keys).float()
        scores = scores * getattr(attention, "scaling", self.head_dim**-0.5)
        if (cap := getattr(attention, "attn_logit_softcapping", None)) is not None:
            scores = torch.tanh(scores / cap) * cap
        tokens = torch.arange(keys.shape[2], device=columns.device)
        seen = (tokens <= columns[..., None]) & attention_mask[:, None].bool()
        if (window := self.window(layer)) is not None:
            seen &= tokens > columns[..., None] - window
        return scores.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min).softmax(-1)

    def run_layer(self, layer: int, hidden: Tensor, **kwargs) -> Tensor:
        output = self.layers[layer](hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm, head and, where the family has it, logit soft-cap: ``[..., hidden]`` to ``[..., vocabulary]``."""
        logits = self.head(self.norm(hidden))
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def response_logits(self, batch: dict) -> Tensor:
        """One plain pass over :func:`pop_lightning.data.collate`'s batch: logits at the loss positions t = N..T-1.

        Returns:
            ``[batch, response, vocabulary]``: column j predicts response token j.
        """
        ids, mask = batch["input_ids"], batch["attention_mask"]
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            logits_to_keep=ids.shape[1] - batch["prompt_length"] + 1,
        ).logits[:, :-1]

    # --- masks ----------------------------------------------------------------------------------------------------

    def mask(self, layer: int, hidden: Tensor, attention_mask: Tensor | None, cache: Cache) -> Tensor | None:
        """The mask for ``hidden``'s rows over what ``cache`` already holds for ``layer`` plus those rows themselves.

        Args:
            hidden: ``[batch, rows, hidden]``, only its shape, dtype and device count.
            attention_mask: ``[batch, cached + rows]`` of 1 (token) and 0 (padding), or None.
        """
        create = create_causal_mask if self.window(layer) is None else create_sliding_window_causal_mask
        return create(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=cache,
            layer_idx=layer,
        )

    def tail_mask(self, layer: int, mask, hidden: Tensor, past: int, cache: Cache):
        """What ``mask`` says of a prompt's last rows, over what ``cache`` holds for ``layer`` plus those rows.

        Args:
            mask: the mask that the model built for the whole prompt, in whatever form the attention implementation
                takes it: 4-D (sdpa, eager), :class:`BlockMask` (flex), 2-D padding (flash), or None.
            hidden: ``[batch, rows, hidden]``, the last rows; only its shape and device count.
            past: tokens in front of these rows, cached ones included.

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
            return mask[:, :, mask.shape[2] - rows :, mask.shape[3] - columns :]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask[:, -columns:]
        if isinstance(mask, BlockMask):
            return _last_block(mask, rows, columns)
        raise InputError(
            f"attn_implementation {implementation!r} builds masks of type {type(mask).__name__}, which cannot be cut "
            f"to the boundary tokens; use 'sdpa', 'eager', 'flex_attention' or 'flash_attention_2'."
        )

    # --- a whole pass ---------------------------------------------------------------------------------------------

    @contextmanager
    def tracing(self, layers: range | None = None):
        """Record the inputs of ``layers`` (all by default) and the last layer's output while the model runs."""
        trace = Trace()
        handles = []

        def record(index: int) -> Callable:
            def hook(module, args, kwargs):
                trace.hidden[index] = args[0] if args else kwargs["hidden_states"]
                trace.kwargs[index] = {k: v for k, v in kwargs.items() if k in ("position_embeddings", "position_ids")}

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
    """Whether a layer's weight can be read as numbers: not quantised (by module or by tensor), offloaded or sharded.

    An offloaded weight waits on the meta device for its hook; without one, the whole model is a shape (``dry_run.py``).
    """
    offloaded = linear.weight.is_meta and hasattr(linear, "_hf_hook")
    return type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, Tensor) and not offloaded


def position_ids(attention_mask: Tensor) -> Tensor:
    """Every token's position among its row's tokens, ``[batch, tokens]``; padding counts as position 0."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _last_block(mask: BlockMask, rows: int, columns: int) -> BlockMask:
    """The bottom right ``[rows, columns]`` of a block mask."""
    queries, keys = (length - kept for length, kept in zip(mask.seq_lengths, (rows, columns), strict=True))
    whole = mask.mask_mod

    def last(batch, head, query, key):
        return whole(batch, head, query + queries, key + keys)

    batch, heads = mask.shape[:2]
    return create_block_mask(last, batch, heads, rows, columns, device=mask.kv_num_blocks.device)


def _rotate(x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE in the half-split layout of Llama and its descendants; the attach check notices a family that differs."""
    cos, sin = (table.unsqueeze(1) for table in position_embeddings)
    half = x.shape[-1] // 2
    rotated = x * cos
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated
