"""The stage-aware prefill: context tokens stop at the plan's depth, boundary tokens and decode run every layer.

Two ways into the pruned layers share the functions below. Generation attaches pre-hooks to the pruned layers of an
unchanged model (:class:`StageAwarePrefill`); training and evaluation rerun the pruned layers alone over a recorded full
pass (:func:`student_logits`), because the layers below the depth are the same in both.
"""

import weakref
from contextlib import contextmanager

import torch
import torch.utils.checkpoint
from torch import Tensor
from transformers.cache_utils import Cache

from pop_lightning.decoder import Decoder, Trace
from pop_lightning.errors import InputError
from pop_lightning.plan import PruningPlan
from pop_lightning.projections import KVProjections


def visible_context(decoder: Decoder, layer: int, context: int) -> int:
    """How many of the last ``context`` tokens a layer can still see once a token follows them."""
    window = decoder.window(layer)
    return context if window is None else min(context, window - 1)


def fill_context(
    projections: KVProjections,
    layer: int,
    hidden: Tensor,
    normed: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cache: Cache,
) -> None:
    """Project the context into one pruned layer's cache.

    A sliding layer gets projections only for the tokens that it can still see; the skipped ones go in as zeros, which
    it drops at once, so that the cache's lengths advance as in a plain prefill.

    Args:
        hidden: h_d of the context, ``[batch, context, hidden]``; ``normed``: n(h_d), same shape.
        position_embeddings: the layer's rotary tables for the context, ``[batch or 1, context, head_dim]`` each.
    """
    decoder = projections.decoder
    skipped = hidden.shape[1] - visible_context(decoder, layer, hidden.shape[1])
    tables = tuple(table[:, skipped:] for table in position_embeddings)
    keys, values = decoder.to_cache(layer, projections(layer, hidden[:, skipped:], normed[:, skipped:]), tables)
    if skipped:
        pad = (0, 0, skipped, 0)
        keys, values = torch.nn.functional.pad(keys, pad), torch.nn.functional.pad(values, pad)
    cache.update(keys, values, layer)


class StageAwarePrefill:
    """Pre-hooks on the pruned layers of a model; :meth:`attached` owns them and always removes them.

    The split follows from positions alone: tokens before ``prompt_length - boundary`` are context, the rest run in
    full. So the first forward of a generation may hold the prompt, a chunk of it, what follows a cached prefix, or the
    prompt with candidate tokens behind it, and later forwards are untouched.
    """

    def __init__(self, projections: KVProjections, plan: PruningPlan):
        plan.check(projections.decoder.num_layers)
        self.projections = projections
        self.decoder = projections.decoder
        self.plan = plan

    @contextmanager
    def attached(self, prompt_length: int, last: bool = True):
        """Prune every forward until ``prompt_length`` tokens (cached ones included) have been read.

        Args:
            prompt_length: tokens of the prompt, cached prefix and left padding included.
            last: False where more of the prompt will follow: every token is context and no logits are wanted.
        """
        handles: list = []
        context_end = prompt_length - (self.plan.boundary if last else 0)
        run = _Run(self, prompt_length, context_end, handles)
        try:
            for layer in self.plan.pruned(self.decoder.num_layers):
                hook = run.split if layer == self.plan.depth else run.follow
                handles.append(
                    self.decoder.layers[layer].register_forward_pre_hook(
                        lambda module, args, kwargs, hook=hook, layer=layer: hook(layer, args, kwargs), with_kwargs=True
                    )
                )
            handles.append(self.decoder.norm.register_forward_pre_hook(run.finish))
            yield
        finally:
            run.release()


class _Run:
    """One prefill in flight: what the hooks hand to one another."""

    def __init__(self, prefill: StageAwarePrefill, prompt_length: int, context_end: int, handles: list):
        self.prefill, self.prompt_length, self.context_end = prefill, prompt_length, context_end
        self.handles = handles
        self.context: Tensor | None = None
        self.normed: Tensor | None = None
        self.keep = 0
        self.done = False

    def split(self, layer: int, args: tuple, kwargs: dict):
        """At the first pruned layer: keep the context aside, pass the boundary tokens on."""
        hidden = args[0] if args else kwargs.pop("hidden_states")
        cache = kwargs.get("past_key_values")
        if cache is None:
            raise InputError("pruned generation keeps the context in a cache; found use_cache=False.")
        past, rows = int(cache.get_seq_length(layer)), hidden.shape[1]
        self.done = past + rows >= self.prompt_length
        self.keep = min(rows, max(0, past + rows - self.context_end))
        self.context = None
        if self.keep == rows:
            return (hidden, *args[1:]), kwargs
        self.context = hidden[:, : rows - self.keep]
        self.normed = self.prefill.decoder.normalise(self.context)
        # Attention cannot be run on no rows: where every token is context, the last one goes on as a placeholder.
        return self.follow(layer, (hidden[:, rows - max(self.keep, 1) :], *args[1:]), kwargs)

    def follow(self, layer: int, args: tuple, kwargs: dict):
        """At every pruned layer: fill the layer's cache with the context, cut the arguments to the boundary tokens."""
        if self.context is None:
            return None
        hidden = args[0] if args else kwargs.pop("hidden_states")
        context = self.context.shape[1]
        cache, tables = kwargs["past_key_values"], kwargs["position_embeddings"]
        fill_context(
            self.prefill.projections, layer, self.context, self.normed, tuple(t[:, :context] for t in tables), cache
        )
        rows = hidden.shape[1]
        kwargs = dict(kwargs)
        kwargs["position_embeddings"] = tuple(table[:, -rows:] for table in tables)
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][..., -rows:]
        if self.keep:
            kwargs["attention_mask"] = self._boundary_mask(layer, hidden, kwargs.get("attention_mask"), cache)
        else:
            # The placeholder sees itself alone and leaves no key behind: its projected one is in the cache already.
            kwargs["attention_mask"] = kwargs["past_key_values"] = None
        return (hidden, *args[1:]), kwargs

    def _boundary_mask(self, layer: int, hidden: Tensor, mask: Tensor | None, cache: Cache) -> Tensor | None:
        if mask is None:
            # None meant "causal from the top left" over the whole prompt; the boundary rows sit at the bottom right.
            return self.prefill.decoder.mask(layer, hidden, None, cache)
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            implementation = self.prefill.decoder.config._attn_implementation
            raise InputError(
                f"attn_implementation {implementation!r} builds no 4-D mask that can be split; use 'sdpa' or 'eager'."
            )
        columns, _ = cache.get_mask_sizes(hidden.shape[1], layer)
        return mask[:, :, mask.shape[2] - hidden.shape[1] :, mask.shape[3] - columns :]

    def finish(self, module, args):
        """Before the final norm: where the last prompt token was context, its h_d takes its place; then hooks go."""
        hidden = args[0]
        if self.context is not None and not self.keep:
            hidden = self.context[:, -1:]
        elif self.context is not None and self.prefill.plan.boundary == 0:
            hidden = torch.cat([self.context[:, -1:], hidden], dim=1)
        self.context = self.normed = None
        if self.done:
            self.release()
        return (hidden, *args[1:])

    def release(self):
        while self.handles:
            self.handles.pop().remove()


def student_logits(
    projections: KVProjections,
    plan: PruningPlan,
    trace: Trace,
    attention_mask: Tensor,
    prompt_length: int,
    *,
    context_visible: bool = True,
) -> Tensor:
    """The pruned model's logits at the loss positions; arguments as for :func:`student_hidden`.

    Returns:
        ``[batch, response, vocabulary]``: column j predicts response token j (positions t = N..T-1).
    """
    hidden = student_hidden(projections, plan, trace, attention_mask, prompt_length, context_visible=context_visible)
    return projections.decoder.logits(hidden)


def student_hidden(
    projections: KVProjections,
    plan: PruningPlan,
    trace: Trace,
    attention_mask: Tensor,
    prompt_length: int,
    *,
    context_visible: bool = True,
    checkpoint: bool = False,
) -> Tensor:
    """What the pruned model hands to its final norm, rerunning only the pruned layers over a recorded full pass.

    Args:
        trace: a full pass over ``[prompt | response]`` with the prompts left-padded and the responses right-padded, so
            that the split stands at the same column for all rows.
        attention_mask: ``[batch, tokens]``.
        prompt_length: the padded prompts' width.
        context_visible: False hides the context from the pruned layers (the "no KV projection" ablation).
        checkpoint: keep only each layer's input for the backward pass and run the layer again there.

    Returns:
        ``[batch, response, hidden]``: column j leads to response token j (positions t = N..T-1).
    """
    decoder, depth = projections.decoder, plan.depth
    tokens = attention_mask.shape[1] - 1  # the last token predicts nothing
    context = max(0, prompt_length - plan.boundary)
    source = trace.hidden[depth][:, :tokens]
    hidden, mask = source[:, context:], attention_mask[:, :tokens]
    if not context_visible:
        mask = torch.cat([torch.zeros_like(mask[:, :context]), mask[:, context:]], dim=1)
    normed = decoder.normalise(source[:, :context])

    def run(layer: int, hidden: Tensor) -> Tensor:
        # A cache of its own, so that a layer can be run twice.
        cache, kwargs = decoder.new_cache(), trace.kwargs[layer]
        tables = kwargs["position_embeddings"]
        if context:
            past = tuple(table[:, :context] for table in tables)
            fill_context(projections, layer, source[:, :context], normed, past, cache)
        return decoder.run_layer(
            layer,
            hidden,
            attention_mask=decoder.mask(layer, hidden, mask, cache),
            position_embeddings=tuple(table[:, context:tokens] for table in tables),
            position_ids=kwargs["position_ids"][..., context:tokens],
            past_key_values=cache,
        )

    if hidden.shape[1]:
        for layer in plan.pruned(decoder.num_layers):
            if checkpoint:
                hidden = torch.utils.checkpoint.checkpoint(run, layer, hidden, use_reentrant=False)
            else:
                hidden = run(layer, hidden)
    if context == prompt_length:  # boundary 0: the last prompt token stopped at depth d
        return torch.cat([source[:, context - 1 : context], hidden], dim=1)
    return hidden[:, prompt_length - 1 - context :]


# --- the attach check -----------------------------------------------------------------------------------------------

_checked: "weakref.WeakSet" = weakref.WeakSet()


@torch.no_grad()
def check_decoder(decoder: Decoder) -> None:
    """Refuse a model that this file would prune wrongly, by name and with what differed.

    Two facts must hold on random tokens longer than one window: projecting each layer's true input reproduces the cache
    that the plain model filled, and at depth L-1 the pruned prefill gives the plain model's logits. Once per model.

    Raises:
        InputError: naming the class and the first difference.
    """
    if decoder.model in _checked:
        return
    window = max((decoder.window(layer) or 0 for layer in range(decoder.num_layers)), default=0)
    length = min(max(16, window + 8), getattr(decoder.config, "max_position_embeddings", 1 << 20))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.config.vocab_size, (1, length), generator=generator).to(decoder.model.device)
    training = decoder.model.training
    decoder.model.eval()
    try:
        cache = decoder.new_cache()
        with decoder.tracing() as trace:
            plain = decoder.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for layer in range(decoder.num_layers):
            reuse = decoder.reuse_map(layer)
            hidden = trace.hidden[layer]
            if reuse is None:
                kv = decoder.own_kv(layer, hidden)
            else:
                weight = reuse.weight.to(hidden.dtype)
                bias = None if reuse.bias is None else reuse.bias.to(hidden.dtype)
                kv = torch.nn.functional.linear(decoder.normalise(hidden), weight, bias)
            keys, values = decoder.to_cache(layer, kv, trace.kwargs[layer]["position_embeddings"])
            held = cache.layers[layer].keys.shape[-2]
            for name, ours, theirs in (
                ("keys", keys, cache.layers[layer].keys),
                ("values", values, cache.layers[layer].values),
            ):
                error = _relative(ours[:, :, -held:], theirs)
                if not error <= _tolerance(theirs.dtype):
                    raise InputError(
                        f"{decoder.name} is not supported: projecting the true input of layer {layer} "
                        f"({type(decoder.layers[layer]).__name__}) does not give its cached {name} "
                        f"(relative error {error:.1e})."
                    )
        depth = decoder.num_layers - 1
        if depth >= 1:
            plan = PruningPlan(depth)
            prefill = StageAwarePrefill(KVProjections(decoder, depth), plan)
            with prefill.attached(length):
                pruned = decoder.model(
                    input_ids=ids, past_key_values=decoder.new_cache(), use_cache=True, logits_to_keep=1
                ).logits
            worst = _relative(pruned, plain)
            if not worst <= _tolerance(plain.dtype):
                raise InputError(
                    f"{decoder.name} is not supported: with only its last layer pruned, which loses nothing, its "
                    f"logits move by {worst:.1e} (relative)."
                )
    finally:
        decoder.model.train(training)
    _checked.add(decoder.model)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    scale = theirs.float().abs().max().clamp(min=1e-30)
    return ((ours.float() - theirs.float()).abs().max() / scale).item()


def _tolerance(dtype: torch.dtype) -> float:
    """1e-5 in float32; in half precision two right ways differ by a few roundings of the largest element."""
    return 1e-5 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps
