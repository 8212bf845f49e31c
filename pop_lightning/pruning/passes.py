"""Passes over recorded rows: one full pass as the teacher, and only the pruned layers as the student.

Teacher and student share everything below the depth, so training and teacher-forced evaluation rerun only the pruned
layers on the recorded state of one full pass."""

from collections.abc import Callable, Collection

import torch
import torch.utils.checkpoint
from torch import Tensor
from transformers.cache_utils import Cache

from pop_lightning.core.errors import InputError, Key
from pop_lightning.core.plan import PruningPlan
from pop_lightning.models.decoder import Decoder, Trace
from pop_lightning.models.layer_parts import cut, of_tokens
from pop_lightning.models.masks import layer_mask, tail_mask
from pop_lightning.models.names import CACHE
from pop_lightning.pruning.prefill import cache_context
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.pruning.salient import (
    PROBES,
    PrunedLayers,
    Selection,
    check_salient,
    check_selector,
    context_ends,
    depends_on_padding,
    rows_of,
)


@torch.no_grad()
def teacher_trace(decoder: Decoder, batch: dict, first: int, masks: bool = False) -> Trace:
    """One full pass: the inputs of layers ``first`` and up and, under key L, the input of the final norm.

    ``masks`` records the model's own masks whatever the rows hold, so that whole layers can be run again.
    """
    # If image tokens attend to later ones, a boundary that holds an image needs the model's own masks.
    masks = masks or (decoder.vision.see_ahead and bool(batch.get("vision")))
    with decoder.tracing(range(first, decoder.num_layers), masks) as trace:
        decoder.model(**decoder.inputs(batch), use_cache=False, logits_to_keep=1)
    if decoder.vision.see_ahead and batch.get("vision"):
        trace.selectable = decoder.vision.types(batch["input_ids"]) == 0
    last = trace.hidden[decoder.num_layers]
    # The last hidden state is enough: an overflow in any layer stays in the residual stream as inf or NaN.
    finite = last.abs().amax(-1).isfinite() | ~batch["attention_mask"].bool()
    refuse_broken(finite.all(1), batch, "hidden states", last.dtype)
    return trace


@torch.no_grad()
def teacher_pass(decoder: Decoder, batch: dict, first: int) -> tuple[Trace, Tensor]:
    """:func:`teacher_trace`, and the logits at the loss positions ``[batch, response, vocabulary]``."""
    trace = teacher_trace(decoder, batch, first)
    logits = decoder.logits(at_loss_positions(decoder, trace, batch["prompt_length"]))
    real = batch["attention_mask"][:, batch["prompt_length"] :].bool()
    finite = (logits.amax(-1).isfinite() | ~real).all(1)
    refuse_broken(finite, batch, "logits", logits.dtype)
    return trace, logits


def refuse_broken(finite: Tensor, batch: dict, what: str, dtype: torch.dtype) -> None:
    """Reject rows on which the base itself computes NaN or inf, which cannot be compared with or learned from.

    Args:
        finite: ``[batch]``, whether all values of a row are finite; padding rows count as finite.
        what: the name of these values, for the message.

    Raises:
        InputError: a row is not finite; the message names the origin of the first one.
    """
    if finite.is_meta or finite.all():  # a base without storage has shapes only
        return
    row = int((~finite).nonzero()[0])
    where = batch["origins"][row] if "origins" in batch else f"row {row + 1} of a batch"
    raise InputError(
        f"the base's {what} on {where} are not finite (computed in {str(dtype).removeprefix('torch.')})",
        advice=(
            "float16 overflows where bfloat16 and float32 do not: change ",
            Key("model.dtype"),
            ", or leave the row out",
        ),
    )


def at_loss_positions(decoder: Decoder, trace: Trace, prompt: int) -> Tensor:
    """The last layer's outputs that predict the response, ``[batch, response, hidden]``, of prompts ``prompt`` wide."""
    return trace.hidden[decoder.num_layers][:, prompt - 1 : -1]


def student_logits(
    projections: KVProjections,
    plan: PruningPlan,
    trace: Trace,
    attention_mask: Tensor,
    prompt_length: int,
    *,
    context_visible: bool = True,
    scores: Tensor | None = None,
) -> Tensor:
    """The pruned model's logits at the loss positions; arguments as for :func:`student_hidden`.

    Returns:
        ``[batch, response, vocabulary]``: column j predicts response token j (positions t = N..T-1).
    """
    hidden = student_hidden(
        projections, plan, trace, attention_mask, prompt_length, context_visible=context_visible, scores=scores
    )
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
    scores: Tensor | None = None,
) -> Tensor:
    """The input of the pruned model's final norm, from rerunning only the pruned layers over a recorded full pass.

    Args:
        trace: a full pass over ``[prompt | response]`` with the prompts left-padded and the responses right-padded, so
            that the split is at the same column in all rows.
        attention_mask: ``[batch, tokens]``.
        prompt_length: the padded prompts' width.
        context_visible: False hides the context from the pruned layers (the "no KV projection" ablation).
        checkpoint: keep only each layer's input for the backward pass and run the layer again there.
        scores: of the context tokens, ``[batch, context]``, in place of the selector's (to compare with it).

    Returns:
        ``[batch, response, hidden]``: column j leads to response token j (positions t = N..T-1).
    """
    decoder, depth = projections.decoder, plan.depth
    tokens = attention_mask.shape[1] - 1  # the last token predicts nothing
    context = plan.context_of(prompt_length)
    if context and context_visible:
        padding = _padding(plan, attention_mask, prompt_length)
        ends = context_ends(plan, prompt_length, padding)
        if plan.salient or ends is not None:
            return _salient_hidden(
                projections, plan, trace, attention_mask, prompt_length, checkpoint, padding, ends, scores
            )
    source = trace.hidden[depth][:, :tokens]
    hidden, mask = source[:, context:], attention_mask[:, 0 if context_visible else context : tokens]
    normed = decoder.normalize(source[:, :context])

    def run(layer: int, hidden: Tensor) -> Tensor:
        # Its own cache, so that gradient checkpointing can run the layer twice.
        cache, kwargs = decoder.new_cache(), trace.kwargs[layer]
        if context and context_visible:
            visible = slice(context - decoder.visible(layer, context), context)
            kv = projections(layer, source[:, visible], normed[:, visible])
            cache_context(decoder, layer, kv, kwargs.get("position_embeddings"), context, cache)
        return decoder.run_layer(
            layer,
            hidden,
            attention_mask=_mask(decoder, layer, trace, hidden, context, mask, cache),
            **{CACHE: cache},
            **of_tokens(kwargs, slice(context, tokens)),
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


def hidden_without_layers(
    decoder: Decoder,
    plan: PruningPlan,
    trace: Trace,
    attention_mask: Tensor,
    prompt_length: int,
    *,
    removed: Collection[int] = (),
    skipped: Collection[int] = (),
) -> Tensor:
    """The input of the final norm if some layers are left out, from rerunning the layers from the first of them on.

    Args:
        plan: only its boundary is read.
        trace: a full pass that was recorded from the first of these layers on.
        removed: layers that no token runs through.
        skipped: layers that context tokens do not run through; their keys and values are those of the layer's own
            weights for what would have entered it. Of the last layers this is the pruned model with reused
            projections.

    Returns:
        ``[batch, response, hidden]``: column j leads to response token j (positions t = N..T-1).
    """
    tokens, first = attention_mask.shape[1] - 1, min((*removed, *skipped))
    hidden, mask = trace.hidden[first][:, :tokens], attention_mask[:, :tokens]
    ends = context_ends(plan, prompt_length, _padding(plan, attention_mask, prompt_length))
    if ends is None:
        ends = torch.tensor([plan.context_of(prompt_length)], device=hidden.device)
    context = (torch.arange(tokens, device=hidden.device) < ends[:, None])[..., None]
    for layer in range(first, decoder.num_layers):
        if layer in removed:
            continue
        cache = decoder.new_cache()
        output = decoder.run_layer(
            layer,
            hidden,
            attention_mask=_mask(decoder, layer, trace, hidden, 0, mask, cache),
            **{CACHE: cache},
            **of_tokens(trace.kwargs[layer], slice(tokens)),
        )
        hidden = torch.where(context, hidden, output) if layer in skipped else output
    return hidden[:, prompt_length - 1 :]


def _mask(decoder: Decoder, layer: int, trace: Trace, hidden: Tensor, past: int, mask: Tensor, cache: Cache):
    """A layer's mask for the tokens after the first ``past`` of a recorded pass, but for its last token."""
    if (whole := trace.masks.get(layer)) is not None:
        return tail_mask(decoder, layer, whole, hidden, past, cache, following=1)
    return layer_mask(decoder, layer, hidden, mask, cache)


def _padding(plan: PruningPlan, attention_mask: Tensor, prompt_length: int) -> Tensor | None:
    """Padding tokens in front of each row, ``[batch]``, if there are any and the plan has shares of the prompt."""
    if not depends_on_padding(plan):
        return None
    padding = (attention_mask[:, :prompt_length] == 0).sum(-1)
    return padding if padding.any() else None


def _salient_hidden(
    projections: KVProjections,
    plan: PruningPlan,
    trace: Trace,
    attention_mask: Tensor,
    prompt_length: int,
    checkpoint: bool,
    padding: Tensor | None,
    ends: Tensor | None,
    scores: Tensor | None,
) -> Tensor:
    """:func:`student_hidden` of a plan with salient tokens: a probing pass selects them, and they run as well."""
    decoder, tokens, context = projections.decoder, attention_mask.shape[1] - 1, plan.context_of(prompt_length)
    check_salient(decoder, plan, ragged=ends is not None)
    if scores is None:
        check_selector(plan, projections.selector)
    probing = plan.salient and scores is None
    selection = probe(projections, plan, trace, attention_mask, prompt_length, padding, ends, probing=probing)
    selected, kept = selection.choose(_selectable(trace, attention_mask, scores, prompt_length), scores)
    rest = torch.arange(context, tokens, device=selected.device).expand(len(selected), -1)
    run_layer = _checkpointed(decoder) if checkpoint else None
    hidden = selection.layers.run(torch.cat([selected, rest], dim=1), kept=kept, run_layer=run_layer)
    return hidden[:, selected.shape[1] + prompt_length - 1 - context :]


def probe(
    projections: KVProjections,
    plan: PruningPlan,
    trace: Trace,
    attention_mask: Tensor,
    prompt_length: int,
    padding: Tensor | None = None,
    ends: Tensor | None = None,
    *,
    probing: bool = True,
) -> Selection:
    """The pruned layers of a recorded full pass, ready to run some tokens, and what the probing token attends to.

    Args:
        padding, ends: ``padding`` and ``row_ends`` of :class:`~pop_lightning.pruning.salient.Selection`.
        probing: False leaves the probing pass out.
    """
    decoder, tokens, context = projections.decoder, attention_mask.shape[1] - 1, plan.context_of(prompt_length)
    source = trace.hidden[plan.depth][:, :tokens]
    layers = PrunedLayers(decoder, source)
    weight = projections.selector
    selection = Selection(layers, plan, context, prompt_length, prompt_length, padding, ends, weight)
    probes = selection.probes[:, : min(PROBES, prompt_length)]
    before = source[:, : prompt_length - probes.shape[1]]
    normed, hidden, masks = decoder.normalize(before), rows_of(source, probes), {}
    for layer in plan.pruned(decoder.num_layers):
        kwargs = of_tokens(trace.kwargs[layer], slice(tokens))
        mask = trace.masks.get(layer)
        if mask is None:
            kind = decoder.window(layer), decoder.parts[layer].chunked
            if kind not in masks:
                masks[kind] = layer_mask(decoder, layer, source, attention_mask[:, :tokens], decoder.new_cache())
            mask = masks[kind]
        tables = cut(kwargs.get("position_embeddings"), slice(before.shape[1]))
        layers.add(layer, kwargs, mask, decoder.to_cache(layer, projections(layer, before, normed), tables))
        if not probing:
            continue
        with torch.no_grad():
            arguments = layers.arguments(layer, probes, None, prompt_length)
            following = decoder.run_layer(layer, hidden, **arguments)
        selection.watch(layer, hidden, arguments)
        hidden = following
    return selection


def _selectable(trace: Trace, attention_mask: Tensor, scores: Tensor | None, prompt: int) -> Tensor | None:
    """Which tokens may be selected. A probing pass sees the padding; given scores do not."""
    if scores is None:
        return trace.selectable
    real = attention_mask[:, :prompt].bool()
    return real if trace.selectable is None else real & trace.selectable[:, :prompt]


def _checkpointed(decoder: Decoder) -> Callable:
    """``Decoder.run_layer`` that keeps only a layer's input for the backward pass."""

    def run(layer: int, hidden: Tensor, **kwargs) -> Tensor:
        return torch.utils.checkpoint.checkpoint(decoder.run_layer, layer, hidden, use_reentrant=False, **kwargs)

    return run
