"""Operations of one prefill, counted from the model's own shapes: what pruning saves before anything is timed.

The pipeline reports the count of a fit; the benchmark prints its ratio next to the measured one.
"""

from dataclasses import dataclass

from pop_lightning.core.plan import PruningPlan
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.sizes import linear_weights, linear_weights_outside
from pop_lightning.pruning.salient import PROBES


@dataclass(frozen=True)
class PrefillFlops:
    """Operations of one prompt's prefill, 2 per multiply-add; embeddings, norms and rotary tables are left out.

    Attributes:
        linear: the linear maps of the layers, over the tokens that run through them; of a mixture's experts only those
            that a token is routed to. Includes linear maps outside the layers, over all tokens.
        attention: scores and weighted values, over the pairs that causality and the layer's window leave. (PyTorch's
            own counter counts every pair of the dense product.)
        projections: the context's keys and values of the pruned layers.
        head: the language modeling head on the last token.
    """

    linear: int
    attention: int
    projections: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.projections + self.head


def count_prefill(decoder: Decoder, plan: PruningPlan, tokens: int) -> PrefillFlops:
    """Count the prefill of one prompt of ``tokens`` tokens; depth L is the plain model.

    Every linear map of a layer, except experts, is assumed to run on every token of the layer. For layers without
    queries and keys (recurrent ones below the depth) only the linear maps are counted. Salient tokens are counted as if
    they were the last of the context, where they see most.
    """
    linear, attention, projections = 2 * linear_weights_outside(decoder) * tokens, 0, 0
    context, salient = plan.context_of(tokens), plan.salient_of(tokens)
    again = min(PROBES, tokens) if salient else 0  # the probing tokens run twice
    for layer in range(decoder.num_layers):
        first = context - salient if layer >= plan.depth else 0
        twice = again if layer >= plan.depth else 0
        linear += 2 * linear_weights(decoder, layer) * (tokens - first + twice)
        if (parts := decoder.parts.get(layer)) is not None:
            pairs = visible_pairs(first, tokens, parts.window, parts.chunked)
            pairs += visible_pairs(tokens - twice, tokens, parts.window, parts.chunked)
            attention += 4 * parts.queries.count * pairs
        if layer >= plan.depth and context:
            # Salient tokens anywhere need keys in front of them, so a sliding layer's whole context is projected.
            projected = tokens - again if salient else decoder.visible(layer, context)
            projections += 4 * parts.kv_dim * decoder.config.hidden_size * projected
    return PrefillFlops(linear, attention, projections, 2 * decoder.head.in_features * decoder.head.out_features)


def prefill_flops(decoder: Decoder, plan: PruningPlan, tokens: int) -> int:
    """The sum of :func:`count_prefill`."""
    return count_prefill(decoder, plan, tokens).total


def turn_flops(decoder: Decoder, plan: PruningPlan, tokens: int, cached: int) -> int:
    """Operations of a prefill of ``tokens`` tokens, of which a cache holds the first ``cached``."""
    total = prefill_flops(decoder, plan, tokens)
    if not cached:
        return total
    before = count_prefill(decoder, PruningPlan(plan.depth, boundary=0), cached)
    return total - (before.total - before.head)


def speedup(decoder: Decoder, plan: PruningPlan, tokens: int) -> float:
    """The counted prefill speedup of one prompt: the plain model's operations over the pruned prefill's."""
    full = prefill_flops(decoder, PruningPlan(decoder.num_layers), tokens)
    return full / prefill_flops(decoder, plan, tokens)


def visible_pairs(first: int, tokens: int, window: int | None, chunked: bool = False) -> int:
    """Query-key pairs of the queries ``first .. tokens-1``: each sees itself and what its window leaves before it.

    ``chunked``: a query sees back to the start of its chunk of ``window`` tokens.
    """
    if chunked:
        before, end = (
            whole * window * (window + 1) // 2 + rest * (rest + 1) // 2
            for whole, rest in (divmod(n, window) for n in (first, tokens))
        )
        return end - before
    if window is None or window >= tokens:
        return (tokens * (tokens + 1) - first * (first + 1)) // 2
    growing = min(window, tokens)  # the first ``window`` queries see all that came before
    start = min(first, growing)
    return (growing * (growing + 1) - start * (start + 1)) // 2 + window * (tokens - max(first, growing))
