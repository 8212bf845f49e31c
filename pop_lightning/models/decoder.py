"""A uniform view of Hugging Face decoders: the layers, the unweighted norm and the key/value map of one layer.

Everything built on it (projections, prefill, gates, training) uses a :class:`Decoder`. What differs between families is
written down per layer in a :class:`LayerParts` (``layer_parts.py``, the file to change for a new family) when a model
is attached; the attach check in ``pruning/attach_check.py`` verifies what was read on the model itself.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.models.layer_parts import (
    FEED_FORWARD,
    PER_TOKEN,
    RECURRENT,
    LayerParts,
    Tables,
    layer_parts,
    part_name,
)
from pop_lightning.models.positions import Positions
from pop_lightning.models.vision_tokens import VisionTokens

# Of weights that can be read as numbers; quantizations store others, some of them in plain parameters.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AffineMap:
    """``y = weight @ n + bias`` on the normalized hidden state n(h); weight ``[2 kv_dim, hidden]``, float32."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class Trace:
    """The recorded state of one full forward pass, from which the pruned layers can be rerun.

    Attributes:
        hidden: ``{layer: [batch, tokens, hidden]}``, each traced layer's input; key ``L`` is the last layer's output.
        kwargs: ``{layer: keyword arguments}`` that the model passed to each layer, those with a value for each
            token: rotary tables, position ids, per-layer inputs (:func:`of_tokens` cuts them).
        masks: ``{layer: mask}`` as the model built it, where it was asked for.
        selectable: which tokens may be salient, ``[batch, tokens]``, where not all may.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    kwargs: dict[int, dict] = field(default_factory=dict)
    masks: dict[int, Tensor | BlockMask | None] = field(default_factory=dict)
    selectable: Tensor | None = None


class Decoder:
    """A view of a causal language model's decoder stack; it owns no weights and changes nothing.

    For a model that also reads images it is the text decoder; ``vision`` has what images change in a pass.

    Args:
        model: a Transformers model with a language modeling head.

    Raises:
        InputError: the model is not a supported decoder, or cannot be pruned at any depth; the sentence names
            the class and the reason.

    Attributes:
        parts: ``{layer: LayerParts}`` of the layers that can be pruned.
        vision: which tokens are image features; ``vision_tokens`` are their ids.
        positions: makes the position ids of a batch.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.name = type(getattr(model, "_orig_mod", model)).__name__  # torch.compile wraps
        if getattr(model.config, "is_encoder_decoder", False):
            raise InputError(f"{self.name} is an encoder-decoder; pruning the prefill needs a decoder-only model.")
        self.body, self.norm = self._find_body(model)
        self.config = self.body.config
        self.layers: nn.ModuleList = self.body.layers
        self.head: nn.Module = model.get_output_embeddings()
        if self.head is None:
            raise InputError(f"{self.name} has no language modeling head; load it with AutoModelForCausalLM.")
        self.num_layers = len(self.layers)
        # Transformers' own cache knows which layers have a sliding window, and of what size.
        windows = [getattr(layer, "sliding_window", None) for layer in self.new_cache().layers]
        if len(windows) != self.num_layers:
            # A plain dynamic cache creates its layers on first use; none has a sliding window.
            windows = [None] * self.num_layers
        kinds = getattr(self.config, "layer_types", None) or [None] * self.num_layers
        read = [layer_parts(*each) for each in zip(self.layers, kinds, windows, strict=True)]
        self.parts = {layer: parts for layer, parts in enumerate(read) if isinstance(parts, LayerParts)}
        self._refused = {layer: reason for layer, reason in enumerate(read) if isinstance(reason, str)}
        self.vision = VisionTokens(model, self.config)
        self.vision_tokens = self.vision.tokens
        self.positions = Positions(model, self.vision)
        if self.num_layers - 1 in self._refused:
            raise InputError(
                f"{self.name} cannot be pruned at any depth, because every depth prunes its last layer: "
                f"{self._reason(self.num_layers - 1)}."
            )

    @property
    def smallest_depth(self) -> int:
        """The smallest depth above DeepStack whose pruned layers all have their own keys and values to project."""
        return max(1, max(self._refused, default=-1) + 1, self.vision.deepstack)

    def check_depth(self, depth: int) -> None:
        """Raise :class:`InputError` where the model cannot be pruned at ``depth``, with the smallest one allowed."""
        if depth < self.vision.deepstack:
            raise InputError(
                f"{self.name} cannot be pruned at depth {depth}: to the first {self.vision.deepstack} layers it adds "
                f"image features (DeepStack); the smallest depth allowed is {self.smallest_depth}."
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
        for module in model.get_decoder().modules():  # only of the text decoder: a vision tower may look the same
            norm = part_name(module, ("norm", "final_layernorm", "final_norm", "embedding_norm", "norm_f"))
            if isinstance(getattr(module, "layers", None), nn.ModuleList) and norm and hasattr(module, "config"):
                return module, getattr(module, norm)
        raise InputError(f"{self.name} is not supported: no decoder with `layers` and a final `norm` was found in it.")

    def new_cache(self) -> Cache:
        """An empty dynamic cache laid out as Transformers would for this decoder."""
        return DynamicCache(config=self.config)

    def window(self, layer: int) -> int | None:
        """Sliding window (or chunk) of a layer in tokens, or None if it sees everything."""
        return self.parts[layer].window if layer in self.parts else None

    def visible(self, layer: int, context: int) -> int:
        """How many of the last ``context`` tokens a layer can still see once a token follows them."""
        window = self.window(layer)
        return context if window is None else min(context, window - 1)

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
        """A layer's compute device and dtype; its weights may be elsewhere (offloading)."""
        linear = self.parts[layer].keys.linear
        anchor = self.parts[layer].norm.module or linear
        device = getattr(getattr(anchor, "_hf_hook", None), "execution_device", None)
        dtype = linear.weight.dtype if _is_plain(linear) else self.model.dtype  # a quantized weight has another one
        return torch.device(anchor.weight.device if device is None else device), dtype

    @property
    def kv_dim(self) -> int:
        """Width of the widest layer's keys (and values), which memory bounds are computed from."""
        return max(parts.kv_dim for parts in self.parts.values())

    def branches(self, layer: int) -> tuple[nn.Module, ...]:
        """The modules whose outputs meet the residual stream: attention branch, feed-forward branch, and any other.

        In families with post-norms (Gemma, GLM-4, OLMo 2) the post-norm is the end of a branch.

        Raises:
            InputError: a layer has another structure.
        """
        block = self.layers[layer]
        if hasattr(block, "post_feedforward_layernorm"):
            ends = ["post_attention_layernorm", "post_feedforward_layernorm"]
        elif hasattr(block, "post_self_attn_layernorm"):
            ends = ["post_self_attn_layernorm", "post_mlp_layernorm"]
        else:
            ends = [part_name(block, ("self_attn", *RECURRENT)), part_name(block, FEED_FORWARD)]
        if hasattr(block, "post_per_layer_input_norm"):
            ends.append("post_per_layer_input_norm")
        found = tuple(getattr(block, end, None) for end in ends if end is not None)
        if len(found) < 2 or None in found:
            raise InputError(
                f"{self.name} cannot be scored: the modules through which layer {layer} ({type(block).__name__}) adds "
                f"to its residual stream were not found."
            )
        return found

    def normalize(self, hidden: Tensor) -> Tensor:
        """The unweighted normalized hidden state n(h), ``[..., hidden]``; layers differ only in the weights.

        Post-norm families project h itself, so that n(h) is h there.
        """
        return self.parts[self.num_layers - 1].norm.unweighted(hidden)

    @torch.no_grad()
    def reuse_map(self, layer: int) -> AffineMap | None:
        """The layer's own keys and values as one map of n(h): W diag(w_LN).

        None where the weights cannot be read as numbers (quantized, offloaded).
        """
        parts = self.parts[layer]
        rows = (parts.keys, parts.values)
        if not all(_is_plain(each.linear) for each in rows):
            return None
        modules = [parts.keys.linear, parts.values.linear, *([parts.norm.module] if parts.norm.module else [])]
        with distributed.gathered(parameter for module in modules for parameter in module.parameters()):
            weight = torch.cat([each.linear.weight[each.span] for each in rows]).float()
            bias = None
            if parts.keys.linear.bias is not None:
                bias = torch.cat([each.linear.bias[each.span] for each in rows]).float()
            if (shift := parts.norm.shift()) is not None:
                bias = weight @ shift + (0.0 if bias is None else bias)
            return AffineMap(weight * parts.norm.scale(), bias)

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

        Applies the layer's key norm, value norm and RoPE, as far as it has them.
        """
        parts = self.parts[layer]
        heads = kv.unflatten(-1, (2, -1, parts.head_dim))
        keys, values = heads[..., 0, :, :].transpose(1, 2), heads[..., 1, :, :].transpose(1, 2)
        if parts.v_norm is not None:
            values = parts.v_norm(values)
        return parts.place(keys, parts.k_norm, position_embeddings), values

    def arguments(self, layer: int, args: tuple, kwargs: dict) -> dict:
        """The arguments that a model passes to one of its layers, all by name."""
        return dict(zip(self._argument_names(layer), args, strict=False)) | kwargs

    def _argument_names(self, layer: int) -> tuple[str, ...]:
        block = getattr(self.layers[layer], "_orig_mod", self.layers[layer])  # torch.compile wraps
        return _argument_names(type(block))

    def run_layer(self, layer: int, hidden: Tensor, **kwargs) -> Tensor:
        if "shared_kv_states" in self._argument_names(layer):
            kwargs = {"shared_kv_states": {}} | kwargs  # Gemma 4 of Transformers 5.24 writes to it at each call
        output = self.layers[layer](hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm, head and the family's scaling of logits: ``[..., hidden]`` to ``[..., vocabulary]``."""
        logits = self.head(self.norm(hidden))
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / scaling
        if (scale := getattr(self.config, "logit_scale", None)) is not None:
            logits = logits * scale
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

    def inputs(self, batch: Mapping) -> dict[str, Tensor]:
        """The model's own arguments for a batch, on the model's device: every pass over rows starts here.

        Args:
            batch: ``input_ids`` and ``attention_mask`` ``[batch, tokens]``; ``vision``, where there are images: the
                tensors of the model's processor (``pixel_values``, ``image_grid_thw`` and so on).

        Returns:
            ``input_ids``, ``attention_mask``, ``position_ids``, and with images their tensors and token types.
            ``forward`` and ``generate`` both accept them.

        Raises:
            InputError: a token has no embedding.
        """
        device = self.model.device
        self._check_embedded(batch["input_ids"])
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        vision = self.vision.on(device, batch, ids)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": self.positions(ids, mask, vision), **vision}

    def _check_embedded(self, ids: Tensor) -> None:
        """Raise if a token has no embedding: the lookup itself would fail with an obscure error, or none on a GPU."""
        rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        if rows is None or ids.device.type != "cpu" or not ids.numel():  # on a GPU the host would have to wait
            return
        beyond = ids[(ids >= rows) & ~torch.isin(ids, torch.tensor(self.vision_tokens, dtype=ids.dtype))]
        if len(beyond):
            raise InputError(
                f"token {int(beyond[0])} has no embedding in {self.name}, which has {rows}: it was added to the "
                f"tokenizer and not to the model; call model.resize_token_embeddings(len(tokenizer)), or leave the "
                f"token out of the text."
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
    """Whether a layer's weight can be read as numbers (in shards: once gathered): not quantized, not offloaded."""
    weight = getattr(linear, "weight", None)  # packed ones have other names
    if type(linear) is not nn.Linear or type(weight) not in (nn.Parameter, Tensor):
        return False
    if hasattr(linear, "quantization_scheme"):  # of compressed-tensors: its forward may round inputs as well
        return False
    # An offloaded weight waits on the meta device for its hook.
    return not weight.is_meta and weight.dtype in PLAIN_DTYPES


@functools.cache
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]
