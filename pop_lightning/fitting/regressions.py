"""The regressions of the closed form: from n(h_d) to what the full model caches, in passes over rows.

For depth d and layer l the fit adds to reuse a correction D by least squares on context tokens, with a ridge that pulls
D to zero, so that a large ridge is reuse. What counts as an error decides how good it is; two objectives share one
pass, and ``closed_form.py`` picks among them, their ridges and reuse by held-out KL:

- ``plain``: every token alike, ``sum_t |y_t - W' n_t|^2`` with y_t the keys and values before k_norm and RoPE.
- ``attention``: what a layer's attention gives out. Values: ``sum_q |sum_t a_qt (v_t - W' n_t)|^2`` over the queries q
  of boundary and response tokens, with the full model's attention a. Keys: ``sum_t w_t |k_t - W' n_t|^2`` with
  ``w_t = sum_q a_qt^2 |v_t - o_q|^2``, which is how far, to first order, an error in one logit moves the output o_q.

:class:`ValueRefit` is the second pass: values again, for the attention that the pruned model's own queries pay.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError
from pop_lightning.core.plan import PruningPlan
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
    """The numbers of a decoder that memory and operations follow from; of its widest layers where layers differ."""

    hidden: int
    layers: int
    kv_dim: int
    heads: int
    kv_heads: int
    itemsize: int  # bytes of a weight of the base, and so of a fitted one

    @classmethod
    def of(cls, decoder: Decoder) -> "Shape":
        widest = max(decoder.parts.values(), key=lambda parts: parts.kv_dim)
        kv_heads, heads = (max(getattr(p, n) for p in decoder.parts.values()) for n in ("kv_heads", "heads"))
        itemsize = decoder.model.dtype.itemsize
        return cls(decoder.config.hidden_size, decoder.num_layers, widest.kv_dim, heads, kv_heads, itemsize)

    @property
    def map_bytes(self) -> int:
        """Of one layer's projection."""
        return 2 * self.kv_dim * (self.hidden + 1) * self.itemsize

    def groups(self, grouping: str) -> int:
        """How many separate regressions the values of one layer make under ``attention``, at most."""
        return _groups(self.kv_heads, grouping)


def _groups(kv_heads: int, grouping: str) -> int:
    return {"head": kv_heads, "layer": 1, "none": 0}[grouping]


def objectives(grouping: str) -> tuple[str, ...]:
    """Which objectives have sums: without groups nothing asks for attention, which leaves ``plain``."""
    return ("plain",) if grouping == "none" else OBJECTIVES


def bytes_needed(shape: Shape, depth: int, grouping: str) -> int:
    """Memory of one depth's running sums, in bytes: triangles of ``[hidden+1, hidden+1]`` Gram matrices, and cross
    matrices, float64.
    """
    width, layers = shape.hidden + 1, max(0, shape.layers - depth - 1)
    grams = 1 if layers else 0
    if grouping != "none":
        grams += layers * (1 + shape.groups(grouping))
    return 8 * width * (grams * (width + 1) // 2) + 8 * width * len(objectives(grouping)) * layers * 2 * shape.kv_dim


def held_bytes(shape: Shape, depths: Sequence[int], grouping: str) -> int:
    """The most that a pass over ``depths`` and the choice that follows have to hold: of all of them the sums and the
    maps that they are pulled toward; of one depth the best option of each objective, reuse, and one that is tried.

    What a depth keeps is smaller than what it frees once its options are made.
    """
    layers = [shape.layers - depth for depth in depths]
    options = len(objectives(grouping)) + 2
    maps = shape.map_bytes * (sum(layers) + options * max(layers))
    return maps + sum(bytes_needed(shape, depth, grouping) for depth in depths)


def passes(shape: Shape, depths: Sequence[int], grouping: str, limit: int) -> tuple[str, list[list[int]]]:
    """``depths`` in groups that each fit in ``limit`` bytes, in order: one forward pass over the rows per group.

    ``grouping`` ``auto`` becomes the finest with which all of them fit in one pass, or ``none``; it is returned too.

    Raises:
        InputError: a single depth does not fit.
    """

    def fits(group: Sequence[int], grouping: str) -> bool:
        return held_bytes(shape, group, grouping) <= limit

    if grouping == "auto":
        grouping = next((each for each in GROUPINGS if fits(depths, each)), "none")
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
    """What both passes hold for every depth: running sums, and the reuse maps that solutions are pulled toward."""

    split = "fit"

    def __init__(
        self,
        model: str | PreTrainedModel | Decoder,
        depths: Iterable[int],
        boundary: int,
        grouping: str,
        queries: int,
    ):
        super().__init__(model)
        self.boundary, self.grouping, self.queries = boundary, grouping, queries
        self.reuse = {depth: _plain_tensors(KVProjections(self.decoder, depth)) for depth in depths}
        self.sums = _Sums()

    def on_validation_epoch_end(self) -> None:
        self.sums.add_up()

    def prior(self, depth: int, layer: int) -> Tensor:
        """``[W' | b']`` of reuse, ``[2 kv_dim, hidden + 1]``, float64."""
        weight, bias = self.reuse[depth].affine(layer)
        return torch.cat([weight, bias.unsqueeze(-1)], 1).double()

    @property
    def nbytes(self) -> int:
        return self.sums.nbytes + sum(each.nbytes for each in self.reuse.values())

    def drop(self, depth: int) -> None:
        """Give back what is held for a depth that is solved."""
        self.sums.drop(depth)
        del self.reuse[depth]


class ClosedFormFit(_Regressions):
    """Collect the sums of the regressions in one ``validate`` pass; then :meth:`solve` gives projections.

    Sums are kept in float64, products are float32; :func:`bytes_needed` states their memory.

    Args:
        depths: candidate depths (at L-1 reuse is exact and there is nothing to fit).
        boundary: the last prompt tokens that run in full and so need no projection.
        grouping: of the ``attention`` objective: ``head`` fits the values of each key-value head for its own queries,
            ``layer`` all heads of a layer for all of the layer's queries; ``none`` collects ``plain`` alone.
        queries: how many boundary and response tokens per row are asked, evenly spread.

    Raises:
        InputError: the base's weights are no plain tensors.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | Decoder,
        depths: Sequence[int],
        boundary: int = 1,
        *,
        grouping: str = "head",
        queries: int = 24,
    ):
        super().__init__(model, depths, boundary, grouping, queries)
        self.depths = list(depths)

    @torch.no_grad()
    def validation_step(self, batch: dict, batch_index: int) -> None:
        context = batch["prompt_length"] - self.boundary
        if context <= 0:  # of the widest prompt of all processes, so all of them return
            return
        # Causal: what follows the context cannot change it, so where nothing is asked the pass stops there. An image
        # is read whole, wherever the context ends.
        asking = self.grouping != "none"
        end = batch["input_ids"].shape[1] if asking or batch.get("vision") else context
        layers = range(min(self.depths) + 1, self.decoder.num_layers)
        seen = _Full(self.decoder, batch, context, end, min(self.depths))
        real = seen.mask[:, :context].bool()
        fitted = [depth for depth in self.depths if depth + 1 in layers]
        normed = {depth: _with_one(self.decoder.normalize(seen.hidden(depth)[:, :context])) for depth in fitted}
        inputs = {depth: n[real] for depth, n in normed.items()}
        for layer in layers:
            kv = seen.kv(layer)
            targets = kv[:, :context][real].float()
            asked = _Asked(seen, layer, kv, self.queries) if asking else None
            depths = [depth for depth in fitted if depth < layer]
            for depth in depths:
                self.sums.add_cross(Sum("plain", depth), layer, targets, inputs[depth])
            if asked is not None:
                key_weights, read = asked.key_weights(kv)[real], asked.read(slice(context), self.grouping == "layer")
                for depth in depths:
                    self._add_keys(depth, layer, inputs[depth], targets, key_weights)
                    _add_values(self.sums, depth, layer, asked, self.grouping, normed[depth], read)
        for depth, n in inputs.items():
            self.sums.add_gram(Sum("plain", depth), n, n)

    def _add_keys(self, depth: int, layer: int, n: Tensor, targets: Tensor, weights: Tensor) -> None:
        weighted = n * weights.unsqueeze(-1)
        name = Sum("keys", depth, layer)
        self.sums.add_gram(name, weighted, n)
        self.sums.add_cross(name, layer, targets[:, : self.decoder.parts[layer].kv_dim], weighted)

    def solve(self, depth: int, ridge: float, objective: str = "plain") -> KVProjections:
        """Projections of one depth for one objective at one ridge strength; the sums are left as they are.

        ``ridge`` is in units of the Gram's mean diagonal.
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
        return projections


class ValueRefit(_Regressions):
    """The second pass: refit the values for the attention that the pruned model's own queries pay.

    The pruned model's queries and keys differ a little from the full model's, so its attention does too. Keys stay;
    the values of layer l are fitted so that the pruned model's attention gives out what the full model's did there:
    ``sum_q |o_q - (what q reads after the context) - sum_t a'_qt W' n_t|^2`` with the pruned model's a'. One
    ``validate`` pass over the rows, all layers at once (fitting them one after the other gave the same KL).

    Args:
        starts: by depth, the projections to start from.
        boundary, grouping, queries: as for :class:`ClosedFormFit`.
    """

    def __init__(
        self,
        starts: Mapping[int, KVProjections],
        boundary: int = 1,
        *,
        grouping: str = "head",
        queries: int = 24,
    ):
        super().__init__(next(iter(starts.values())).decoder, starts, boundary, grouping, queries)
        self.starts = dict(starts)

    @torch.no_grad()
    def validation_step(self, batch: dict, batch_index: int) -> None:
        decoder, context, end = self.decoder, batch["prompt_length"] - self.boundary, batch["input_ids"].shape[1]
        if context <= 0:
            return
        seen = _Full(decoder, batch, context, end, min(self.starts))
        every = self.grouping == "layer"
        wanted = {
            layer: _Asked(seen, layer, seen.kv(layer), self.queries).read(every_head=every)
            for layer in range(min(self.starts) + 1, decoder.num_layers)
        }
        for depth, start in self.starts.items():
            with decoder.tracing(range(depth, decoder.num_layers)) as pruned:
                student_logits(start, PruningPlan(depth, self.boundary), seen.trace, seen.mask, batch["prompt_length"])
            hidden = seen.hidden(depth)[:, :context]
            n = decoder.normalize(hidden)
            for layer in start.fitted_layers:
                if layer not in pruned.hidden:
                    continue  # boundary 0 and responses of one token: nothing runs above the depth
                rows = pruned.hidden[layer]
                own = decoder.own_kv(layer, rows)
                kv = torch.cat([start(layer, hidden, n), own], 1)
                # The last token predicts nothing: it is not rerun, and no query sees it.
                asked = _Asked(seen, layer, kv, self.queries, rows)
                rest = wanted[layer] - asked.read(slice(context, None), every)
                _add_values(self.sums, depth, layer, asked, self.grouping, _with_one(n), rest)

    def solve(self, depth: int, ridge: float) -> KVProjections:
        """The start with its values refitted at one ridge strength (toward reuse, as in the first pass)."""
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
        return projections


def nothing_fitted(decoder: Decoder, depth: int) -> KVProjections:
    """A closed form before anything is fitted: reuse, which it stays where no fit is better."""
    return KVProjections(decoder, depth).replace({}, "closed_form")


class _Full:
    """One full pass: the inputs of the layers, and the queries' places."""

    def __init__(self, decoder: Decoder, batch: dict, context: int, end: int, first: int):
        self.decoder, self.context = decoder, context
        self.mask = batch["attention_mask"][:, :end]
        self.asking = self.mask[:, context:].bool()
        if decoder.vision.see_ahead and batch.get("vision"):
            # Their attention is not causal, and is not what decode asks.
            ids, image = batch["input_ids"][:, context:end], torch.tensor(decoder.vision_tokens)
            self.asking = self.asking & ~torch.isin(ids, image.to(ids.device))
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
        """Up to ``wanted`` asking tokens per row, evenly spread: columns ``[batch, queries]``, and which are real.

        They lie after the context and before the row's last token, which predicts nothing. A row's choice depends
        on the row alone, whatever it is batched with.
        """
        behind = self.mask[:, self.context :]
        followed = torch.nn.functional.pad(behind[:, 1:], (0, 1)).bool()
        asking = self.asking & followed
        # Columns that ask come first, in order: a prompt within the boundary is padded in front of them too.
        order = self.context + asking.int().argsort(dim=-1, descending=True, stable=True)
        count = asking.sum(-1)
        taken = count.clamp(max=wanted)
        steps = torch.arange(int(taken.max()), device=self.mask.device)
        places = steps * count[:, None] // taken.clamp(min=1)[:, None]
        valid = steps < taken[:, None]
        return order.gather(1, places.where(valid, 0)), valid


class _Asked:
    """What one layer's queries read: attention weights ``[batch, kv_heads, queries per kv head, queries, tokens]``."""

    def __init__(self, seen: _Full, layer: int, kv: Tensor, queries: int, behind: Tensor | None = None):
        decoder, self.context = seen.decoder, seen.context
        columns, valid = seen.columns(queries)
        source, offset = (seen.hidden(layer), 0) if behind is None else (behind, self.context)
        tables, tokens = seen.tables(layer), kv.shape[1]
        keys, values = decoder.to_cache(layer, kv, cut(tables, slice(tokens)))
        self.weights = (
            attention_weights(
                decoder,
                layer,
                _take(source, (columns - offset).clamp(max=source.shape[1] - 1)),
                each_table(tables, lambda table: _take(table, columns)),
                columns,
                keys,
                seen_from(decoder.parts[layer], columns, seen.mask[:, :tokens]),
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
        """The weights that inputs of the value regression are summed with: what multiplies a value before its norm.

        Without a value norm the attention. With one, a value is divided by its length there, which is taken as given
        (its mean over the heads where one group is fitted for all of them).
        """
        if self.lengths is None:
            return self.of_context
        lengths = self.lengths[..., : self.context]
        lengths = lengths.mean(1, keepdim=True) if groups == 1 else lengths
        return self.of_context / lengths[:, :, None, None]

    def read(self, tokens: slice = slice(None), every_head: bool = False) -> Tensor:
        """What the attention reads from some of the tokens, before W_O.

        Returns:
            ``[batch, kv_heads, queries per kv head, queries, head_dim]``: each query head reads its own values; or
            ``[..., kv_dim]`` under ``every_head``: what it would read from the values of all heads.
        """
        if every_head:
            reads = torch.einsum("bghqt,bktd->bghqkd", self.weights[..., tokens], self.values[:, :, tokens])
            return reads.flatten(4)
        return torch.einsum("bghqt,bgtd->bghqd", self.weights[..., tokens], self.values[:, :, tokens])

    def key_weights(self, kv: Tensor) -> Tensor:
        """sum_q a_qt^2 |v_t - o_q|^2 over the layer's queries, ``[batch, context]``.

        Where the family normalizes keys an error counts relative to its key's length.
        """
        values, squared = self.values[:, :, : self.context], self.of_context.square()
        output = self.read()
        # |v - o|^2 = |v|^2 - 2 v.o + |o|^2, each summed over the queries before the tokens are looked at.
        weights = squared.sum((2, 3)) * values.square().sum(-1)
        weights = weights - 2 * (torch.einsum("bghqt,bghqd->bgtd", squared, output) * values).sum(-1)
        weights = weights + torch.einsum("bghqt,bghq->bgt", squared, output.square().sum(-1))
        if self.parts.k_norm is not None:
            keys = kv[:, : self.context].float().unflatten(-1, (2, weights.shape[1], -1))[:, :, 0]
            weights = weights / self.parts.key_lengths(keys).squeeze(-1).clamp(min=1e-6).transpose(1, 2)
        return weights.sum(1).clamp(min=0)


def _add_values(
    sums: "_Sums", depth: int, layer: int, asked: _Asked, grouping: str, normed: Tensor, wanted: Tensor
) -> None:
    """Add the pooled regressions of one (depth, layer): inputs ``sum_t a_qt n_t``, targets ``wanted``.

    Args:
        normed: n(h_d) with a one appended, ``[batch, context, hidden + 1]``.
        wanted: what is to be read from the context, as :meth:`_Asked.read` gives it, for every head where there is one
            group for all of them.
    """
    groups = _groups(asked.parts.kv_heads, grouping)
    for group, (weights, targets) in enumerate(
        zip(asked.pooling(groups).chunk(groups, 1), wanted.chunk(groups, 1), strict=True)
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
        of: ``plain``, or of the ``attention`` objective ``keys`` or ``values``.
        depth: where the inputs come from.
        layer: whose regression it is; None where all layers share a Gram matrix.
        group: of key-value heads that share a regression.
    """

    of: str
    depth: int
    layer: int | None = None
    group: int | None = None


class _Sums:
    """Running Gram and cross matrices by name, float64, and the ridge solution toward a prior.

    Gram matrices are symmetric: of each the lower triangle is kept, row after row.
    """

    def __init__(self):
        self.gram: dict[Sum, Tensor] = {}
        self.cross: dict[tuple[Sum, int], Tensor] = {}
        self._triangles: dict[torch.device, Tensor] = {}

    def add_gram(self, name: Sum, left: Tensor, right: Tensor) -> None:
        product = left.T @ right
        _add(self.gram, name, product.view(-1)[self._triangle(product)])

    def _triangle(self, like: Tensor) -> Tensor:
        """Where the lower triangle of a matrix lies; all of them are of one width."""
        if like.device not in self._triangles:
            rows, columns = torch.tril_indices(*like.shape, device=like.device)
            self._triangles[like.device] = rows * len(like) + columns
        return self._triangles[like.device]

    def add_cross(self, name: Sum, layer: int, targets: Tensor, inputs: Tensor) -> None:
        """Targets ``[tokens, outputs]`` against inputs ``[tokens, hidden + 1]``."""
        _add(self.cross, (name, layer), targets.T @ inputs)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self.gram.values(), *self.cross.values()))

    def drop(self, depth: int) -> None:
        """Free the sums of one depth."""
        self.gram = {name: each for name, each in self.gram.items() if name.depth != depth}
        self.cross = {(name, layer): each for (name, layer), each in self.cross.items() if name.depth != depth}

    def add_up(self) -> None:
        """Make them the sums over the rows of all processes, in place; every process has the same names in order."""
        for each in (*self.gram.values(), *self.cross.values()):
            distributed.add_up(each)

    def solve(self, name: Sum, layer: int, prior: Tensor, ridge: float) -> Tensor:
        """argmin over W of sum |y - W x|^2 + ridge * mean diagonal * |W - prior|^2, ``[outputs, hidden + 1]``."""
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
        return prior + torch.cholesky_solve(residual.T, torch.linalg.cholesky(gram)).T


def _add(sums: dict, key, value: Tensor) -> None:
    if key in sums:
        sums[key].add_(value)  # in float64; in place, because a Gram matrix may be 100 MB
    else:
        sums[key] = value.double()


def _with_one(normed: Tensor) -> Tensor:
    normed = normed.float()
    return torch.cat([normed, torch.ones_like(normed[..., :1])], -1)


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """``x[b, columns[b]]``: ``[batch, tokens, features]`` to ``[batch, queries, features]``."""
    return x.gather(1, columns.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _plain_tensors(projections: KVProjections) -> KVProjections:
    missing: Iterable[int] = (layer for layer in projections.fitted_layers if str(layer) not in projections.maps)
    if (layer := next(iter(missing), None)) is not None:
        raise InputError(
            f"the weights of layer {layer} are no plain tensors (quantized or offloaded), and closed form starts from "
            "them; load the base unquantized (model.dtype, model.device_map) or set projection.kind to reuse."
        )
    return projections
