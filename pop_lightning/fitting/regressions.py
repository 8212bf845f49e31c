"""The regressions of the closed form: from n(h_d) to the keys and values of the full model, in passes over rows.

For depth d and layer l, a correction D is added to reuse: least squares on context tokens, with a ridge that pulls D to
zero, so that a large ridge gives reuse. The quality depends on which errors count. Two objectives share one pass;
``closed_form.py`` selects among them, their ridges and reuse by held-out KL:

- ``plain``: all tokens equally, ``sum_t |y_t - W' n_t|^2`` with y_t the keys and values before k_norm and RoPE.
- ``attention``: the output of the layer's attention. Values: ``sum_q |sum_t a_qt (v_t - W' n_t)|^2`` over the queries q
  of boundary and response tokens, with the full model's attention a. Keys: ``sum_t w_t |k_t - W' n_t|^2`` with
  ``w_t = sum_q a_qt^2 |v_t - o_q|^2``, the squared first-order effect of an error in one logit on the output o_q.

:class:`ValueRefit` is a second pass, which fits the values again for the attention of the pruned model's own queries.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError, Key
from pop_lightning.core.plan import PruningPlan
from pop_lightning.fitting.finite import check_maps
from pop_lightning.models.attention import attention_weights, seen_from
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.layer_parts import Tables, cut, each_table
from pop_lightning.pruning.module import DecoderModule
from pop_lightning.pruning.passes import student_logits, teacher_trace
from pop_lightning.pruning.projections import KVProjections

OBJECTIVES = ("plain", "attention")
GROUPINGS = ("head", "layer", "none")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that determine memory and operations; those of its widest layers if layers differ."""

    hidden: int
    layers: int
    kv_dim: int
    heads: int
    kv_heads: int
    itemsize: int  # bytes per weight of the base, and so of the projections

    @classmethod
    def of(cls, decoder: Decoder) -> "Shape":
        widest = max(decoder.parts.values(), key=lambda parts: parts.kv_dim)
        kv_heads, heads = (max(getattr(p, n) for p in decoder.parts.values()) for n in ("kv_heads", "heads"))
        itemsize = decoder.model.dtype.itemsize
        return cls(decoder.config.hidden_size, decoder.num_layers, widest.kv_dim, heads, kv_heads, itemsize)

    @property
    def map_bytes(self) -> int:
        """Size of one layer's projection."""
        return 2 * self.kv_dim * (self.hidden + 1) * self.itemsize

    def groups(self, grouping: str) -> int:
        """The largest number of separate value regressions of a layer under ``attention``."""
        return _groups(self.kv_heads, grouping)


def _groups(kv_heads: int, grouping: str) -> int:
    return {"head": kv_heads, "layer": 1, "none": 0}[grouping]


def objectives(grouping: str) -> tuple[str, ...]:
    """The objectives that are fitted: without groups only ``plain``."""
    return ("plain",) if grouping == "none" else OBJECTIVES


def bytes_needed(shape: Shape, depth: int, grouping: str) -> int:
    """Bytes of one depth's running sums: triangles of ``[hidden+1, hidden+1]`` Gram matrices, and cross matrices, in
    float64.
    """
    width, layers = shape.hidden + 1, max(0, shape.layers - depth - 1)
    grams = 1 if layers else 0
    if grouping != "none":
        grams += layers * (1 + shape.groups(grouping))
    return 8 * width * (grams * (width + 1) // 2) + 8 * width * len(objectives(grouping)) * layers * 2 * shape.kv_dim


def held_bytes(shape: Shape, depths: Sequence[int], grouping: str) -> int:
    """Peak bytes of a pass over ``depths`` and the choice that follows: for all of them the sums and the reuse maps;
    for one depth the best option of each objective, reuse, and the option being measured.

    The options that a depth keeps are smaller than the sums that it frees once they are made.
    """
    layers = [shape.layers - depth for depth in depths]
    options = len(objectives(grouping)) + 2
    maps = shape.map_bytes * (sum(layers) + options * max(layers))
    return maps + sum(bytes_needed(shape, depth, grouping) for depth in depths)


def passes(shape: Shape, depths: Sequence[int], grouping: str, limit: int) -> tuple[str, list[list[int]]]:
    """``depths`` in order, in groups that fit in ``limit`` bytes: one forward pass over the rows per group.

    Returns:
        The grouping and the groups. ``auto`` becomes the finest grouping that fits all depths in one pass, or ``none``.

    Raises:
        InputError: a single depth does not fit.
    """

    def fits(group: Sequence[int], grouping: str) -> bool:
        return held_bytes(shape, group, grouping) <= limit

    if grouping == "auto":
        grouping = next((name for name in GROUPINGS if fits(depths, name)), "none")
    groups: list[list[int]] = []
    for depth in depths:
        if not fits([depth], grouping):
            coarser = "" if grouping == "none" else ", or set projection.grouping to a coarser one"
            raise InputError(
                f"closed form needs {held_bytes(shape, [depth], grouping) / 2**30:.3g} GiB of running sums "
                f"and options at depth {depth}, above projection.memory_gib of {limit / 2**30:.3g}; raise it{coarser}."
            )
        if not groups or not fits([*groups[-1], depth], grouping):
            groups.append([])
        groups[-1].append(depth)
    return grouping, groups


class _Regressions(DecoderModule):
    """State of both passes: the running sums of every depth, and the reuse maps that solutions are pulled toward."""

    split = "fit"

    def __init__(
        self,
        model: str | PreTrainedModel | Decoder,
        depths: Iterable[int],
        boundary: int = 1,
        *,
        grouping: str = "head",
        queries: int = 24,
    ):
        super().__init__(model)
        self.depths, self.boundary, self.grouping, self.queries = list(depths), boundary, grouping, queries
        self.reuse = {depth: _plain_tensors(KVProjections(self.decoder, depth)) for depth in self.depths}
        self.sums = _Sums()

    def on_validation_epoch_end(self) -> None:
        self.sums.add_up()
        self.sums.check()

    def prior(self, depth: int, layer: int) -> Tensor:
        """``[W' | b']`` of reuse, ``[2 kv_dim, hidden + 1]``, float64."""
        weight, bias = self.reuse[depth].affine(layer)
        return torch.cat([weight, bias.unsqueeze(-1)], 1).double()

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes + sum(projections.nbytes for projections in self.reuse.values())

    def drop(self, depth: int) -> None:
        """Free the sums and reuse maps of a depth."""
        self.sums.drop(depth)
        del self.reuse[depth]


class ClosedFormFit(_Regressions):
    """Collect the sums of the regressions in one ``validate`` pass; then :meth:`solve` returns projections.

    Sums are kept in float64, products are float32; :func:`bytes_needed` gives their memory.

    Args:
        depths: candidate depths (at L-1 reuse is exact and nothing is fitted).
        boundary: number of last prompt tokens that run in full and so need no projection.
        grouping: of the ``attention`` objective: ``head`` fits the values of each key-value head for its own queries,
            ``layer`` all heads of a layer for all of the layer's queries; ``none`` collects ``plain`` only.
        queries: number of boundary and response tokens per row that serve as queries, evenly spread.

    Raises:
        InputError: the base's weights are not plain tensors.
    """

    @torch.no_grad()
    def validation_step(self, batch: dict, batch_index: int) -> None:
        context = batch["prompt_length"] - self.boundary
        if context <= 0:  # of the widest prompt of all processes, so all of them return
            return
        # Attention is causal, so without queries the pass ends with the context, unless that could cut an image.
        attends = self.grouping != "none"
        end = batch["input_ids"].shape[1] if attends or batch.get("vision") else context
        layers = range(min(self.depths) + 1, self.decoder.num_layers)
        full = _FullPass(self.decoder, batch, context, end, min(self.depths))
        real = full.mask[:, :context].bool()
        fitted = [depth for depth in self.depths if depth + 1 in layers]
        normed = {depth: _with_one(self.decoder.normalize(full.hidden(depth)[:, :context])) for depth in fitted}
        inputs = {depth: n[real] for depth, n in normed.items()}
        for layer in layers:
            kv = full.kv(layer)
            targets = kv[:, :context][real].float()
            depths = [depth for depth in fitted if depth < layer]
            for depth in depths:
                self.sums.add_cross(Sum("plain", depth), layer, targets, inputs[depth])
            if attends:
                attention = _Attention(full, layer, kv, self.queries)
                key_weights = attention.key_weights(kv)[real]
                output = attention.output(slice(context), self.grouping == "layer")
                for depth in depths:
                    self._add_keys(depth, layer, inputs[depth], targets, key_weights)
                    _add_values(self.sums, depth, layer, attention, self.grouping, normed[depth], output)
        for depth, n in inputs.items():
            self.sums.add_gram(Sum("plain", depth), n, n)

    def _add_keys(self, depth: int, layer: int, n: Tensor, targets: Tensor, weights: Tensor) -> None:
        weighted = n * weights.unsqueeze(-1)
        name = Sum("keys", depth, layer)
        self.sums.add_gram(name, weighted, n)
        self.sums.add_cross(name, layer, targets[:, : self.decoder.parts[layer].kv_dim], weighted)

    def solve(self, depth: int, ridge: float, objective: str = "plain") -> KVProjections:
        """Projections of one depth for one objective; the sums are not changed.

        Args:
            ridge: in units of the Gram's mean diagonal.
        """
        projections = nothing_fitted(self.decoder, depth)
        for layer in projections.fitted_layers:
            prior = self.prior(depth, layer)
            if objective == "attention":
                kv_dim = self.decoder.parts[layer].kv_dim
                keys = self.sums.solve(Sum("keys", depth, layer), layer, prior[:kv_dim], ridge)
                groups = _groups(self.decoder.parts[layer].kv_heads, self.grouping)
                fitted = torch.cat([keys, _solve_values(self.sums, depth, layer, prior[kv_dim:], groups, ridge)])
            else:
                fitted = self.sums.solve(Sum("plain", depth), layer, prior, ridge)
            projections.replace({layer: (fitted[:, :-1].float(), fitted[:, -1].float())}, "closed_form")
        return _checked(projections, ridge)


class ValueRefit(_Regressions):
    """The second pass: fit the values again, for the attention of the pruned model's own queries.

    The pruned model's queries and keys differ slightly from the full model's, and so does its attention a'. Keys are
    kept; the values of layer l are fitted so that its attention output equals the full model's o_q:
    ``sum_q |o_q - sum_s a'_qs v_s - sum_t a'_qt W' n_t|^2`` over tokens s after the context and t of the context. One
    ``validate`` pass over the rows fits all layers at once (fitting them one after the other gave the same KL).

    Args:
        starts: by depth, the projections to start from.
        boundary: as for :class:`ClosedFormFit`.
        options: ``grouping`` and ``queries``, as for :class:`ClosedFormFit`.
    """

    def __init__(self, starts: Mapping[int, KVProjections], boundary: int = 1, **options):
        super().__init__(next(iter(starts.values())).decoder, starts, boundary, **options)
        self.starts = dict(starts)

    @torch.no_grad()
    def validation_step(self, batch: dict, batch_index: int) -> None:
        decoder, context, end = self.decoder, batch["prompt_length"] - self.boundary, batch["input_ids"].shape[1]
        if context <= 0:
            return
        full = _FullPass(decoder, batch, context, end, min(self.starts))
        every_head = self.grouping == "layer"
        outputs = {
            layer: _Attention(full, layer, full.kv(layer), self.queries).output(every_head=every_head)
            for layer in range(min(self.starts) + 1, decoder.num_layers)
        }
        for depth, start in self.starts.items():
            with decoder.tracing(range(depth, decoder.num_layers)) as pruned:
                student_logits(start, PruningPlan(depth, self.boundary), full.trace, full.mask, batch["prompt_length"])
            hidden = full.hidden(depth)[:, :context]
            n = decoder.normalize(hidden)
            for layer in start.fitted_layers:
                if layer not in pruned.hidden:
                    continue  # boundary 0 and responses of one token: nothing runs above the depth
                decoded = pruned.hidden[layer]
                kv = torch.cat([start(layer, hidden, n), decoder.own_kv(layer, decoded)], 1)
                # The last token predicts nothing: it is not rerun, and no query sees it.
                attention = _Attention(full, layer, kv, self.queries, decoded)
                rest = outputs[layer] - attention.output(slice(context, None), every_head)
                _add_values(self.sums, depth, layer, attention, self.grouping, _with_one(n), rest)

    def solve(self, depth: int, ridge: float) -> KVProjections:
        """The start with its values refitted; the ridge pulls toward reuse, as in the first pass."""
        start = self.starts[depth]
        projections = nothing_fitted(self.decoder, depth)
        for layer in start.fitted_layers:
            kv_dim = self.decoder.parts[layer].kv_dim
            groups = _groups(self.decoder.parts[layer].kv_heads, self.grouping)
            keys, shift = start.affine(layer)
            prior = self.prior(depth, layer)[kv_dim:]
            values = _solve_values(self.sums, depth, layer, prior, groups, ridge).to(keys)
            fitted = torch.cat([keys[:kv_dim], values[:, :-1]]), torch.cat([shift[:kv_dim], values[:, -1]])
            projections.replace({layer: fitted}, "closed_form")
        return _checked(projections, ridge)


def nothing_fitted(decoder: Decoder, depth: int) -> KVProjections:
    """Kind ``closed_form`` with the maps of reuse, which it keeps where no fit is better."""
    return KVProjections(decoder, depth).replace({}, "closed_form")


def _checked(projections: KVProjections, ridge: float) -> KVProjections:
    smaller = ("raise ", Key("projection.ridge"), f" ({ridge:g}) or choose another ", Key("model.dtype"))
    check_maps(projections, "the closed form", smaller)
    return projections


class _FullPass:
    """One pass of the full model: the inputs of the layers, and the positions of the queries."""

    def __init__(self, decoder: Decoder, batch: dict, context: int, end: int, first: int):
        self.decoder, self.context = decoder, context
        self.mask = batch["attention_mask"][:, :end]
        self.query_mask = self.mask[:, context:].bool()
        if decoder.vision.see_ahead and batch.get("vision"):
            # The attention of image tokens is not causal, and decode has no such queries.
            ids, image = batch["input_ids"][:, context:end], torch.tensor(decoder.vision_tokens)
            self.query_mask = self.query_mask & ~torch.isin(ids, image.to(ids.device))
        rows = batch | {"input_ids": batch["input_ids"][:, :end], "attention_mask": self.mask}
        self.trace = teacher_trace(decoder, rows, first)

    def hidden(self, layer: int) -> Tensor:
        return self.trace.hidden[layer]

    def kv(self, layer: int) -> Tensor:
        return self.decoder.own_kv(layer, self.hidden(layer))

    def tables(self, layer: int) -> Tables | None:
        """The layer's rotary tables, ``[batch, tokens, ...]``."""
        return each_table(
            self.trace.kwargs[layer].get("position_embeddings"), lambda t: t.expand(len(self.mask), -1, -1)
        )

    def columns(self, wanted: int) -> tuple[Tensor, Tensor]:
        """Up to ``wanted`` queries per row, evenly spread: their columns ``[batch, queries]``, and which are valid.

        They are after the context and before the row's last token, which predicts nothing. The selection depends on
        the row only, not on the batch.
        """
        followed = torch.nn.functional.pad(self.mask[:, self.context + 1 :], (0, 1)).bool()
        queries = self.query_mask & followed
        # Query columns first, in order: a prompt that is shorter than the boundary has padding before them.
        order = self.context + queries.int().argsort(dim=-1, descending=True, stable=True)
        count = queries.sum(-1)
        selected = count.clamp(max=wanted)
        steps = torch.arange(int(selected.max()), device=self.mask.device)
        places = steps * count[:, None] // selected.clamp(min=1)[:, None]
        valid = steps < selected[:, None]
        return order.gather(1, places.where(valid, 0)), valid


class _Attention:
    """The attention of one layer's queries: weights ``[batch, kv_heads, queries per kv head, queries, tokens]``.

    Args:
        kv: keys and values of the tokens, before k_norm and RoPE.
        queries: the largest number of queries per row.
        decoded: hidden states of the tokens after the context, for the queries; the full model's unless given.
    """

    def __init__(self, full: _FullPass, layer: int, kv: Tensor, queries: int, decoded: Tensor | None = None):
        decoder, self.context = full.decoder, full.context
        columns, valid = full.columns(queries)
        source, offset = (full.hidden(layer), 0) if decoded is None else (decoded, self.context)
        tables, tokens = full.tables(layer), kv.shape[1]
        keys, values = decoder.to_cache(layer, kv, cut(tables, slice(tokens)))
        self.weights = (
            attention_weights(
                decoder,
                layer,
                _take(source, (columns - offset).clamp(max=source.shape[1] - 1)),
                each_table(tables, lambda table: _take(table, columns)),
                columns,
                keys,
                seen_from(decoder.parts[layer], columns, full.mask[:, :tokens]),
            )
            * valid[:, None, None, :, None]
        )
        self.values = values.float()
        self.parts = decoder.parts[layer]
        self.lengths = None
        if self.parts.v_norm is not None:
            own = kv[..., self.parts.kv_dim :].float().unflatten(-1, (self.parts.kv_heads, -1))
            self.lengths = own.square().mean(-1).clamp(min=1e-12).sqrt().transpose(1, 2)

    @property
    def of_context(self) -> Tensor:
        return self.weights[..., : self.context]

    def pooling(self, groups: int) -> Tensor:
        """The weights of the value regression's inputs: the factor of a value before its norm.

        Without a value norm, the attention. A value norm divides a value by its length, which is treated as a constant
        (averaged over the heads if one group is fitted for all of them).
        """
        if self.lengths is None:
            return self.of_context
        lengths = self.lengths[..., : self.context]
        lengths = lengths.mean(1, keepdim=True) if groups == 1 else lengths
        return self.of_context / lengths[:, :, None, None]

    def output(self, tokens: slice = slice(None), every_head: bool = False) -> Tensor:
        """The attention's output from some of the tokens, before W_O.

        Returns:
            ``[batch, kv_heads, queries per kv head, queries, head_dim]``, each query head over its own values; with
            ``every_head`` ``[..., kv_dim]``, each query head over the values of all heads.
        """
        if every_head:
            output = torch.einsum("bghqt,bktd->bghqkd", self.weights[..., tokens], self.values[:, :, tokens])
            return output.flatten(4)
        return torch.einsum("bghqt,bgtd->bghqd", self.weights[..., tokens], self.values[:, :, tokens])

    def key_weights(self, kv: Tensor) -> Tensor:
        """sum_q a_qt^2 |v_t - o_q|^2 over the layer's queries, ``[batch, context]``.

        In families that normalize keys, an error counts relative to the length of its key.
        """
        values, squared = self.values[:, :, : self.context], self.of_context.square()
        output = self.output()
        # |v - o|^2 = |v|^2 - 2 v.o + |o|^2, each summed over the queries first, without a tensor of all differences.
        weights = squared.sum((2, 3)) * values.square().sum(-1)
        weights = weights - 2 * (torch.einsum("bghqt,bghqd->bgtd", squared, output) * values).sum(-1)
        weights = weights + torch.einsum("bghqt,bghq->bgt", squared, output.square().sum(-1))
        if self.parts.k_norm is not None:
            keys = kv[:, : self.context].float().unflatten(-1, (2, weights.shape[1], -1))[:, :, 0]
            weights = weights / self.parts.key_lengths(keys).squeeze(-1).clamp(min=1e-6).transpose(1, 2)
        return weights.sum(1).clamp(min=0)


def _add_values(
    sums: "_Sums", depth: int, layer: int, attention: _Attention, grouping: str, normed: Tensor, wanted: Tensor
) -> None:
    """Add the pooled regressions of one (depth, layer): inputs ``sum_t a_qt n_t``, targets ``wanted``.

    Args:
        normed: n(h_d) with a one appended, ``[batch, context, hidden + 1]``.
        wanted: the output that the context should give, from :meth:`_Attention.output`; with ``every_head`` if one
            group is fitted for all heads.
    """
    groups = _groups(attention.parts.kv_heads, grouping)
    for group, (weights, targets) in enumerate(
        zip(attention.pooling(groups).chunk(groups, 1), wanted.chunk(groups, 1), strict=True)
    ):
        pooled = torch.einsum("bghqt,btn->bghqn", weights, normed).flatten(0, 3)
        name = Sum("values", depth, layer, group)
        sums.add_gram(name, pooled, pooled)
        sums.add_cross(name, layer, targets.flatten(0, 3), pooled)


def _solve_values(sums: "_Sums", depth: int, layer: int, reuse: Tensor, groups: int, ridge: float) -> Tensor:
    parts = enumerate(reuse.chunk(groups))
    return torch.cat([sums.solve(Sum("values", depth, layer, group), layer, part, ridge) for group, part in parts])


class Sum(NamedTuple):
    """The name of a regression's sums.

    Attributes:
        of: ``plain``, or ``keys`` or ``values`` of the ``attention`` objective.
        depth: of the inputs.
        layer: that is fitted; None if all layers share a Gram matrix.
        group: of key-value heads that share a regression.
    """

    of: str
    depth: int
    layer: int | None = None
    group: int | None = None


class _Sums:
    """Running Gram and cross matrices by name, float64, and the ridge solution toward a prior.

    Gram matrices are symmetric, so only the lower triangle is kept, row by row.
    """

    def __init__(self):
        self.gram: dict[Sum, Tensor] = {}
        self.cross: dict[tuple[Sum, int], Tensor] = {}
        self._triangles: dict[torch.device, Tensor] = {}

    def add_gram(self, name: Sum, left: Tensor, right: Tensor) -> None:
        product = left.T @ right
        _add(self.gram, name, product.view(-1)[self._triangle(product)])

    def _triangle(self, like: Tensor) -> Tensor:
        """Flat indices of the lower triangle; all matrices have the same width."""
        if like.device not in self._triangles:
            rows, columns = torch.tril_indices(*like.shape, device=like.device)
            self._triangles[like.device] = rows * len(like) + columns
        return self._triangles[like.device]

    def add_cross(self, name: Sum, layer: int, targets: Tensor, inputs: Tensor) -> None:
        """Add the products of targets ``[tokens, outputs]`` and inputs ``[tokens, hidden + 1]``."""
        _add(self.cross, (name, layer), targets.T @ inputs)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in (*self.gram.values(), *self.cross.values()))

    def drop(self, depth: int) -> None:
        """Free the sums of one depth."""
        self.gram = {name: matrix for name, matrix in self.gram.items() if name.depth != depth}
        self.cross = {(name, layer): matrix for (name, layer), matrix in self.cross.items() if name.depth != depth}

    def add_up(self) -> None:
        """Add the sums of all processes, in place; every process has the same names in the same order."""
        for matrix in (*self.gram.values(), *self.cross.values()):
            distributed.add_up(matrix)

    def check(self) -> None:
        """Reject sums that are not finite: float32 products overflow where keys or values are huge (about 1e19).

        Raises:
            InputError: naming the first one.
        """
        named = [(name, name.layer, matrix) for name, matrix in self.gram.items()]
        named += [(name, layer, matrix) for (name, layer), matrix in self.cross.items()]
        for name, layer, matrix in named:
            if matrix.is_meta or matrix.sum().isfinite():  # adding up keeps inf and NaN, and allocates nothing
                continue
            coarser = () if name.of == "plain" else ("set ", Key("projection.grouping"), " to none or ")
            of_layer = "all layers" if layer is None else f"layer {layer}"
            raise InputError(
                f"the closed form: the running sums of {name.of} for {of_layer} at depth {name.depth} are not finite",
                advice=(*coarser, "set ", Key("projection.kind"), " to reuse"),
            )

    def solve(self, name: Sum, layer: int, prior: Tensor, ridge: float) -> Tensor:
        """argmin over W of sum |y - W x|^2 + ridge * mean diagonal * |W - prior|^2, ``[outputs, hidden + 1]``.

        Raises:
            InputError: the ridge is too small for the rows, which leave the Gram matrix singular.
        """
        if name not in self.gram:
            return prior
        prior = prior.to(self.gram[name].device)
        gram = prior.new_zeros(prior.shape[1], prior.shape[1])
        gram.view(-1)[self._triangle(gram)] = self.gram[name]
        gram += gram.tril(-1).T
        scale = gram.diagonal().mean()
        if not scale > 0:
            return prior
        residual = self.cross[name, layer] - prior @ gram
        gram.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed.is_meta and failed:
            raise InputError(
                f"the closed form: the regression of layer {layer} at depth {name.depth} has no unique solution on "
                f"these rows with a ridge of {ridge:g}",
                advice=("raise ", Key("projection.ridge"), " or give more rows"),
            )
        return prior + torch.cholesky_solve(residual.T, factor).T


def _add(sums: dict, key, value: Tensor) -> None:
    if key in sums:
        sums[key].add_(value)  # in place, because a Gram matrix can be 100 MB
    else:
        sums[key] = value.double()


def _with_one(normed: Tensor) -> Tensor:
    normed = normed.float()
    return torch.cat([normed, torch.ones_like(normed[..., :1])], -1)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """``x[b, columns[b]]``: ``[batch, tokens, features]`` to ``[batch, queries, features]``."""
    return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _plain_tensors(projections: KVProjections) -> KVProjections:
    for layer in projections.fitted_layers:
        if str(layer) not in projections.maps:
            raise InputError(
                f"closed form starts from the weights of layer {layer}, which are not plain tensors (quantized or "
                "offloaded): load the base unquantized (model.dtype, model.device_map) or set projection.kind to reuse."
            )
    return projections
