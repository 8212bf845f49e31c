"""The stage-aware prefill: context tokens stop at the plan's depth, boundary tokens and decode run every layer.

Two ways into the pruned layers share the functions below. Generation attaches pre-hooks to the pruned layers of an
unchanged model (:class:`StageAwarePrefill`); training and evaluation rerun only the pruned layers over a recorded full
pass (``passes.py``), because the layers below the depth are the same in both.
"""

import threading
from contextlib import contextmanager

import torch
import torch.utils.checkpoint
from torch import Tensor
from transformers.cache_utils import Cache

from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.layer_parts import Tables, cut, of_tokens
from pop_lightning.models.masks import append, tail_mask
from pop_lightning.models.sizes import mlp_dim
from pop_lightning.pruning.projections import KVProjections, Stack


class ContextProjector:
    """Keys and values of one context for all pruned layers, computed in as few products as memory allows.

    Layers that see the same span share one product (:meth:`KVProjections.stack`), and a sliding layer's product covers
    only the last window-1 tokens. The products that wait for their layers never hold more than ``2 mlp_dim`` numbers
    per context token, over all spans, unless a single layer needs more: less than a plain feed-forward branch holds
    (gate, up and their product), so the prefill's peak memory stays below the plain model's.

    Args:
        hidden: h_d of the context, ``[batch, context, hidden]``.
    """

    def __init__(self, projections: KVProjections, hidden: Tensor):
        self.projections, self.decoder = projections, projections.decoder
        stacks = projections.stack()
        self.place = {layer: (stack, i) for stack in stacks for i, layer in enumerate(stack.layers)}
        self.length = hidden.shape[1]
        self.at_once = self._share(stacks)
        self.normed = self.decoder.normalize(hidden) if stacks else None
        # Stacked layers need only n(h); h itself is kept for the others.
        others = set(range(projections.depth, self.decoder.num_layers)) - set(self.place)
        self.hidden = hidden if others else None
        self.waiting: dict[int, Tensor] = {}

    def take(self, layer: int) -> Tensor:
        """``[k|v]`` of a layer before k_norm and RoPE, ``[batch, visible context, 2 kv_dim]``; call once per layer."""
        skipped = self.length - self.decoder.visible(layer, self.length)
        if layer not in self.place:
            return self.projections(layer, self.hidden[:, skipped:])
        if layer not in self.waiting:
            self._project(*self.place[layer], skipped)
        return self.waiting.pop(layer)

    def _share(self, stacks: tuple[Stack, ...]) -> dict[tuple[int, ...], int]:
        """How many layers of each stack may wait at once: all, or an even share of the bound, smallest first."""
        need = {stack.layers: stack.height * self.decoder.visible(stack.layers[0], self.length) for stack in stacks}
        left, counts = 2 * mlp_dim(self.decoder.config) * self.length, {}
        for layers in sorted(need, key=lambda layers: need[layers] * len(layers)):
            share = left // (len(need) - len(counts))
            counts[layers] = min(len(layers), max(1, share // max(1, need[layers])))
            left -= counts[layers] * need[layers]
        return counts

    def _project(self, stack: Stack, first: int, skipped: int) -> None:
        count = min(len(stack.layers) - first, self.at_once[stack.layers])
        weight, bias = stack.rows(first, count)
        # Flattened, because a slice along the tokens would otherwise be multiplied one row of the batch at a time.
        normed = self.normed[:, skipped:].flatten(0, 1).to(weight)
        product = torch.nn.functional.linear(normed, weight, bias).to(self.normed.dtype)
        product = product.unflatten(0, (-1, self.length - skipped))
        self.waiting |= zip(stack.layers[first : first + count], product.split(stack.height, dim=-1), strict=True)


def cache_context(
    decoder: Decoder, layer: int, kv: Tensor, position_embeddings: Tables | None, context: int, cache: Cache
) -> None:
    """Put the context's ``[k|v]`` into one pruned layer's cache.

    Args:
        kv: ``[batch, visible context, 2 kv_dim]``.
        position_embeddings: the layer's rotary tables from the first context token on, ``[batch or 1, tokens, ...]``.
        context: the number of context tokens.
    """
    skipped = context - kv.shape[1]
    keys, values = decoder.to_cache(layer, kv, cut(position_embeddings, slice(skipped, context), device=kv.device))
    append(cache, layer, keys, values, skipped)


class StageAwarePrefill:
    """Pre-hooks on the pruned layers of a model; :meth:`attached` owns them and always removes them.

    The split depends only on positions: tokens before ``prompt_length - boundary`` are context, the rest run in
    full. So the first forward of a generation may hold the prompt, a chunk of it, what follows a cached prefix, or the
    prompt followed by candidate tokens. The hooks are removed in the forward that reads the prompt's end, so decode
    steps have none. They act only on the thread that attached them, so several threads can prefill one model.
    """

    def __init__(self, projections: KVProjections, plan: PruningPlan):
        plan.check(projections.decoder.num_layers)
        self.projections = projections
        self.decoder = projections.decoder
        self.plan = plan

    @contextmanager
    def attached(self, prompt_length: int, *, cached: int = 0, last: bool = True, compiled: bool = False):
        """Prune every forward of this thread until ``prompt_length`` tokens have been read.

        Args:
            prompt_length: tokens of the prompt, cached prefix and left padding included.
            cached: how many of them the cache already holds.
            last: False if more of the prompt will follow: every token is context and no logits are needed.
            compiled: the caller will run the prompt through ``torch.compile``; a compiled model is detected anyway.
        """
        run = _Run(self, prompt_length, prompt_length - (self.plan.boundary if last else 0), cached)
        try:
            if compiled or self.decoder.compiled:
                run.handles.append(_compiler.pause())
            run.attach()
            yield
        finally:
            run.release()


class _Run:
    """The state of one running prefill, shared by its hooks."""

    def __init__(self, prefill: StageAwarePrefill, prompt_length: int, context_end: int, seen: int):
        self.decoder, self.projections, self.plan = prefill.decoder, prefill.projections, prefill.plan
        self.prompt_length, self.context_end = prompt_length, context_end
        self.seen = seen  # tokens read so far: counted here, because a static cache counts them only on the device
        self.keep = self.logits = 0
        self.context: ContextProjector | None = None
        self.last: Tensor | None = None
        self.handles: list = []

    def attach(self):
        for layer in self.plan.pruned(self.decoder.num_layers):
            hook = self.split if layer == self.plan.depth else self.follow
            self._hook(
                self.decoder.layers[layer], lambda args, kwargs, hook=hook, layer=layer: hook(layer, args, kwargs)
            )
        self._hook(self.decoder.norm, self.finish)
        self._hook(self.decoder.model, self.start)
        self._hook(self.decoder.head, self.head)

    def _hook(self, module, act):
        thread = threading.get_ident()

        def hook(module, args, kwargs=None):
            # Another thread may run the model meanwhile and call this hook half registered, without kwargs.
            return act(args, kwargs) if threading.get_ident() == thread else None

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def release(self):
        while self.handles:
            self.handles.pop().remove()

    def start(self, args: tuple, kwargs: dict):
        """Before the forward: how many rows of logits are requested (0 for all)."""
        wanted = kwargs.get("logits_to_keep")
        self.logits = wanted if isinstance(wanted, int) else 0

    def split(self, layer: int, args: tuple, kwargs: dict):
        """At the first pruned layer: set the context aside and pass on the boundary tokens."""
        kwargs = self.decoder.arguments(layer, args, kwargs)
        hidden = kwargs.pop("hidden_states")
        if kwargs.get("past_key_values") is None:
            raise InputError("pruned generation keeps the context in a cache; found use_cache=False.")
        rows = hidden.shape[1]
        self.seen += rows
        self.keep = min(rows, max(0, self.seen - self.context_end))
        if self.keep == rows:
            return (hidden,), kwargs
        context = hidden[:, : rows - self.keep]
        self.context = ContextProjector(self.projections, context)
        if not self.keep or self.plan.boundary == 0:
            self.last = context[:, -1:].clone()
        # Attention needs at least one row: if every token is context, the last one goes on as a placeholder. It is
        # copied, because without a norm first a view would be multiplied one row of the batch at a time.
        tail = hidden[:, rows - max(self.keep, 1) :].clone(memory_format=torch.contiguous_format)
        return self.follow(layer, (tail,), kwargs)

    def follow(self, layer: int, args: tuple, kwargs: dict):
        """At every pruned layer: fill the layer's cache with the context, cut the arguments to the boundary tokens."""
        if self.context is None:
            return None
        kwargs = self.decoder.arguments(layer, args, kwargs)
        hidden, cache = kwargs.pop("hidden_states"), kwargs["past_key_values"]
        rows, context = hidden.shape[1], self.context.length
        cache_context(self.decoder, layer, self.context.take(layer), kwargs.get("position_embeddings"), context, cache)
        kwargs = of_tokens(kwargs, slice(-rows, None))
        if self.keep:
            mask = kwargs.get("attention_mask")
            kwargs["attention_mask"] = tail_mask(self.decoder, layer, mask, hidden, self.seen - rows, cache)
        else:
            # The placeholder attends only to itself and caches no key: its projected one is already in the cache.
            kwargs["attention_mask"] = kwargs["past_key_values"] = None
        return (hidden,), kwargs

    def finish(self, args: tuple, kwargs: dict):
        """Before the final norm: if the last prompt token was context, put back its h_d."""
        hidden = args[0]
        if self.last is not None:
            last = self.last.to(hidden.device)
            hidden = torch.cat([last, hidden], dim=1) if self.keep else last
        self.context = self.last = None
        return (hidden, *args[1:]), kwargs

    def head(self, args: tuple, kwargs: dict):
        """Before the head: pass only rows whose logits are requested; remove the hooks once the prompt is read.

        The model may not slice the rows itself: Gemma 4 takes fewer rows than tokens for the requested ones.
        """
        if self.seen >= self.prompt_length:
            self.release()
        return (args[0][:, -self.logits :], *args[1:]), kwargs


class _Compiler:
    """Turns torch.compile off while hooks are attached, because code compiled without them would skip them.

    The stance is global to the process, so threads share it: the first prefill sets it, the last one restores it.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.users = 0
        self.stance = None

    def pause(self) -> "_Compiler":
        with self.lock:
            if not self.users:
                self.stance = torch.compiler.set_stance("force_eager")
            self.users += 1
        return self

    def remove(self) -> None:
        """End one pause; named like the method of hook handles."""
        with self.lock:
            self.users -= 1
            if not self.users:
                self.stance.__exit__(None, None, None)


_compiler = _Compiler()
