"""The measured bound: only the work that no pruned prefill can avoid, timed next to the real prefill.

Time that a pruned prefill needs beyond it is overhead: hooks, norms and rotary tables of the projected keys, cache
copies, masks. The counted bound (``flops.py``) assumes that time is proportional to operations; this one is measured.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pop_lightning.generation.generator import StageAwareGenerator
from pop_lightning.models.masks import appendable, layer_mask
from pop_lightning.models.names import CACHE
from pop_lightning.pruning.salient import PROBES

_PRODUCT_BYTES = 1 << 29  # 512 MiB: a long prompt's keys and values of all layers may not fit in memory at once


class _Stop(Exception):
    """Raised before the first pruned layer to stop the plain model there."""


def unavoidable(generator: StageAwareGenerator, ids: Tensor) -> dict[str, Callable[[], object]]:
    """The steps of the bound for the prompts ``ids`` ``[batch, tokens]``, each a call to be timed.

    - ``shallow``: the plain model over the prompt, stopped before layer d.
    - ``projections``: only the products that compute the context's keys and values, one per visible span for all layers
      that share it, on random numbers of the right shapes.
    - ``probe``, with salient tokens: the prompt's last token through layers d..L-1 over a filled cache, which is what
      selecting them needs. What is done with its attention is overhead.
    - ``boundary``: the k boundary tokens and as many as are selected through layers d..L-1 over a filled cache, final
      norm and head. Here they are the last of the prompt: how many rows run is what costs, and where they are is not.

    Where nothing is pruned (depth L, or no context) the plain prefill is the bound, and the other steps do nothing.
    """
    plan, tokens = generator.plan, ids.shape[1]
    context, salient = plan.context_of(tokens), plan.salient_of(tokens)
    if not context or not len(plan.pruned(generator.decoder.num_layers)):
        return {
            "shallow": lambda: _plain(generator, ids, generator.decoder.new_cache()),
            "projections": lambda: None,
            "boundary": lambda: None,
        }
    products = _products(generator, tokens - PROBES if salient else context, len(ids), whole=bool(salient))
    probe = {"probe": _last_rows(generator, ids, tokens - PROBES, head=False)} if salient else {}
    return {
        "shallow": lambda: _shallow(generator, ids),
        "projections": lambda: [torch.mm(hidden, weight) for hidden, weight in products],
        **probe,
        "boundary": _last_rows(generator, ids, context - salient),
    }


@torch.no_grad()
def _plain(generator: StageAwareGenerator, ids: Tensor, cache: Cache) -> object:
    return generator.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE: cache})


def _shallow(generator: StageAwareGenerator, ids: Tensor) -> Cache:
    def stop(module, args):
        raise _Stop

    cache = generator.decoder.new_cache()
    handle = generator.decoder.layers[generator.plan.depth].register_forward_pre_hook(stop)
    try:
        _plain(generator, ids, cache)
    except _Stop:
        pass
    finally:
        handle.remove()
    return cache


def _products(
    generator: StageAwareGenerator, context: int, batch: int, whole: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Pairs ``[batch x seen, hidden]`` and ``[hidden, layers x 2 kv_dim]``, one per visible span and width.

    A span's layers are split where the product would exceed a bound in bytes. ``whole``: sliding layers need the whole
    context too, for salient tokens anywhere.
    """
    decoder, products = generator.decoder, []
    hidden = decoder.config.hidden_size
    like = {"dtype": generator.model.dtype, "device": generator.model.device}
    pruned = generator.plan.pruned(decoder.num_layers)
    spans = Counter(
        (context if whole else decoder.visible(layer, context), 2 * decoder.parts[layer].kv_dim) for layer in pruned
    )
    for (seen, width), layers in spans.items():
        rows = torch.randn(batch * seen, hidden, **like)
        together = max(1, _PRODUCT_BYTES // max(1, len(rows) * width * rows.itemsize))
        for start in range(0, layers, together):
            weight = torch.randn(min(together, layers - start) * width, hidden, **like)
            products.append((rows, weight.T))
    return products


@torch.no_grad()
def _last_rows(generator: StageAwareGenerator, ids: Tensor, first: int, *, head: bool = True) -> Callable[[], Tensor]:
    """The tokens ``first`` and up through the pruned layers over a cache of those before; with final norm and head."""
    decoder, depth = generator.decoder, generator.plan.depth
    pruned = generator.plan.pruned(decoder.num_layers)
    if generator.plan.boundary == 0:  # the last token stops at the depth: only norm and head are left
        last = torch.randn(len(ids), 1, decoder.config.hidden_size, dtype=generator.model.dtype, device=ids.device)
        return torch.no_grad()(lambda: decoder.logits(last))
    filled = decoder.new_cache()
    if first:
        filled = generator.prefill(ids[:, :first], last=False)[CACHE]
    with decoder.tracing(pruned) as trace:
        _plain(generator, ids[:, first:], appendable(filled))
    start = trace.hidden[depth]
    masks = {layer: layer_mask(decoder, layer, start, None, filled) for layer in pruned}

    @torch.no_grad()
    def last_rows() -> Tensor:
        cache, hidden = appendable(filled), start
        for layer in pruned:
            hidden = decoder.run_layer(
                layer, hidden, attention_mask=masks[layer], **{CACHE: cache}, **trace.kwargs[layer]
            )
        return decoder.logits(hidden[:, -1:]) if head else hidden

    return last_rows
