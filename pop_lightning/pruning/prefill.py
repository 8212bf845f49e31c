"""The stage-aware prefill: context tokens stop at the plan's depth; boundary tokens, salient ones and decode run on.

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
from pop_lightning.models.names import CACHE
from pop_lightning.models.sizes import mlp_dim
from pop_lightning.pruning.projections import KVProjections, Stack
from pop_lightning.pruning.salient import (
    PrunedLayers,
    Selection,
    check_salient,
    check_selector,
    context_ends,
    rows_of,
    scratch,
)


class ContextProjector:
    """Keys and values of one context for all pruned layers, computed in as few products as memory allows.

    Layers that see the same span share one product (:meth:`KVProjections.stack`), and a sliding layer's product covers
    only the last window-1 tokens. The products that wait for their layers never hold more than ``2 mlp_dim`` numbers
    per context token, over all spans, unless a single layer needs more: less than a plain feed-forward branch holds
    (gate, up and their product), so the prefill's peak memory stays below the plain model's.

    Args:
        hidden: h_d of the context, ``[batch, context, hidden]``.
        whole: project the whole context for sliding layers too, as salient tokens need.
    """

    def __init__(self, projections: KVProjections, hidden: Tensor, whole: bool = False):
        self.projections, self.decoder, self.whole = projections, projections.decoder, whole
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
        skipped = self.length - self._visible(layer)
        if layer not in self.place:
            return self.projections(layer, self.hidden[:, skipped:])
        if layer not in self.waiting:
            self._project(*self.place[layer], skipped)
        return self.waiting.pop(layer)

    def _visible(self, layer: int) -> int:
        return self.length if self.whole else self.decoder.visible(layer, self.length)

    def _share(self, stacks: tuple[Stack, ...]) -> dict[tuple[int, ...], int]:
        """How many layers of each stack may wait at once: all, or an even share of the bound, smallest first."""
        need = {stack.layers: stack.height * self._visible(stack.layers[0]) for stack in stacks}
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
        check_salient(projections.decoder, plan)
        check_selector(plan, projections.selector)
        self.projections = projections
        self.decoder = projections.decoder
        self.plan = plan

    @contextmanager
    def attached(
        self,
        prompt_length: int,
        *,
        cached: int = 0,
        last: bool = True,
        compiled: bool = False,
        padding: Tensor | None = None,
    ):
        """Prune every forward of this thread until ``prompt_length`` tokens have been read.

        Args:
            prompt_length: tokens of the prompt, cached prefix and left padding included.
            cached: how many of them the cache already holds.
            last: False if more of the prompt will follow: every token is context and no logits are needed.
            compiled: the caller will run the prompt through ``torch.compile``; a compiled model is detected anyway.
            padding: padding tokens in front of each row, ``[batch]``, which shares of the prompt do not count.

        Yields:
            The running prefill, whose ``selected`` will be the salient tokens.
        """
        context_end = self.plan.context_of(prompt_length) if last else prompt_length
        ends = context_ends(self.plan, prompt_length, padding) if last else None
        # Again: the attention implementation may have been changed.
        check_salient(self.decoder, self.plan, ragged=ends is not None)
        if self.plan.salient or ends is not None:
            run = _SalientRun(self, prompt_length, context_end, cached, padding, ends)
        else:
            run = _Run(self, prompt_length, context_end, cached)
        try:
            if compiled or self.decoder.compiled:
                run.handles.append(_compiler.pause())
            run.attach()
            yield run
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
        self.selected: Tensor | None = None  # positions of the salient tokens, [batch, salient]
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
        if kwargs.get(CACHE) is None:
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
        hidden, cache = kwargs.pop("hidden_states"), kwargs[CACHE]
        rows, context = hidden.shape[1], self.context.length
        cache_context(self.decoder, layer, self.context.take(layer), kwargs.get("position_embeddings"), context, cache)
        kwargs = of_tokens(kwargs, slice(-rows, None))
        if self.keep:
            mask = kwargs.get("attention_mask")
            kwargs["attention_mask"] = tail_mask(self.decoder, layer, mask, hidden, self.seen - rows, cache)
        else:
            # The placeholder attends only to itself and caches no key: its projected one is already in the cache.
            kwargs["attention_mask"] = kwargs[CACHE] = None
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


class _SalientRun(_Run):
    """A prefill with salient tokens.

    The model's own loop over the pruned layers runs only the probing tokens, on copies of the cache, and records what
    each layer is given. Before the final norm the selected tokens and the boundary run through the pruned layers
    again and fill the cache. It also serves a boundary that is a share of the prompt over rows of different lengths,
    with no token selected: the last ``context_end`` columns run for all rows, and those that are context of a shorter
    row keep their projected keys and values.

    Args:
        padding: padding tokens in front of each row, ``[batch]``, or None.
        ends: tokens of each row before its boundary, padding included, ``[batch]``, if rows differ.
    """

    def __init__(self, prefill, prompt_length, context_end, seen, padding: Tensor | None, ends: Tensor | None):
        super().__init__(prefill, prompt_length, context_end, seen)
        self.padding, self.ends = padding, ends
        self.selection: Selection | None = None
        self.allowed: Tensor | None = None
        self.cache: Cache | None = None
        self.probed: tuple = ()
        self.filling = False

    def start(self, args: tuple, kwargs: dict):
        super().start(args, kwargs)
        vision = self.decoder.vision
        if not vision.see_ahead:
            return
        # An image whose tokens attend to later ones could run in full only as a whole, so none of them is selected.
        ids, types = kwargs.get("input_ids", args[0] if args else None), kwargs.get(vision.types_name)
        if ids is not None:
            types = vision.types(ids)
        self.allowed = None if types is None else types == 0

    def split(self, layer: int, args: tuple, kwargs: dict):
        """At the first pruned layer: set the whole pass aside and pass on the probing tokens."""
        if self.filling:
            return None
        given = self.decoder.arguments(layer, args, kwargs)
        hidden, cache = given.pop("hidden_states"), given.get(CACHE)
        tokens, past = hidden.shape[1], self.seen
        keep = min(tokens, max(0, past + tokens - self.context_end))
        if cache is None or (keep == tokens and self.ends is None):
            return super().split(layer, args, kwargs)
        self.seen, self.keep, self.cache = past + tokens, keep, cache
        read = tokens - max(0, self.seen - self.prompt_length)  # candidate tokens may follow the prompt
        layers = PrunedLayers(self.decoder, hidden, past)
        padding, ends = (
            None if each is None else each.to(hidden.device).repeat_interleave(len(hidden) // len(each))  # beams
            for each in (self.padding, self.ends)
        )
        ends = None if ends is None else ends - past
        weight = self.projections.selector
        self.selection = Selection(layers, self.plan, tokens - keep, read, self.prompt_length, padding, ends, weight)
        # The probing tokens run in full if they are boundary; of a part of the prompt they are context as well.
        ending = keep and self.seen >= self.prompt_length
        projected = hidden[:, : tokens - self.selection.probes.shape[1]] if ending else hidden
        self.context = ContextProjector(self.projections, projected, whole=True)
        return self.probe(layer, rows_of(hidden, self.selection.probes), given)

    def follow(self, layer: int, args: tuple, kwargs: dict):
        """At every other pruned layer: score what was read in the layer before, and go on with the probing tokens."""
        if self.filling or self.selection is None:
            return None
        given = self.decoder.arguments(layer, args, kwargs)
        self.selection.watch(*self.probed)
        return self.probe(layer, given.pop("hidden_states"), given)

    def probe(self, layer: int, hidden: Tensor, given: dict):
        kv = self.context.take(layer)
        tables = cut(given.get("position_embeddings"), slice(kv.shape[1]), device=kv.device)
        layers = self.selection.layers
        layers.add(layer, given, given.get("attention_mask"), self.decoder.to_cache(layer, kv, tables))
        cache = scratch(self.cache, layer)
        offset = 0 if cache is None else cache.get_mask_sizes(layers.hidden.shape[1], layer)[1]
        arguments = layers.arguments(layer, self.selection.probes, cache)
        self.probed = layer, hidden, arguments, offset
        return (hidden,), arguments

    def finish(self, args: tuple, kwargs: dict):
        """Before the final norm: select, and run the selected tokens and the boundary in full."""
        if self.selection is None:
            return super().finish(args, kwargs)
        self.selection.watch(*self.probed)
        layers = self.selection.layers
        selected, kept = self.selection.choose(self.allowed)
        tokens = layers.hidden.shape[1]
        rest = torch.arange(tokens - self.keep, tokens, device=selected.device).expand(len(selected), -1)
        # The probing pass has recorded everything; what it holds is not needed while the cache is filled.
        last = layers.hidden[:, -1:].clone()
        self.context, self.probed, self.selection = None, (), None
        self.filling = True
        hidden = layers.run(torch.cat([selected, rest], dim=1), self.cache, kept)[:, selected.shape[1] :]
        self.filling, self.cache = False, None
        self.selected = selected + layers.past if self.plan.salient else None
        return (hidden if self.keep else last.to(hidden.device), *args[1:]), kwargs


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
