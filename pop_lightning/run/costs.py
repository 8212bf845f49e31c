"""What each stage of a fit needs: bytes by a plain rule, and operations counted from the base's shape.

On top of the weights a stage holds what stays between its batches (projections, running sums, optimizer states) and one
batch: hidden states of the layers above the smallest depth, activations that a backward pass reads again, logits with
the copies that the loss makes of them. The check prints it, and runs the steps that are built here on a real base.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pop_lightning.core.plan import Choice, Kept, PruningPlan
from pop_lightning.data.module import collate
from pop_lightning.data.rows import Row
from pop_lightning.evaluation.evaluate import Evaluation, Variant, groups
from pop_lightning.evaluation.metrics import POSITIONS
from pop_lightning.fitting.importance import RESIDUALS, ImportanceScoring
from pop_lightning.fitting.kinds import trained_kind
from pop_lightning.fitting.regressions import ClosedFormFit, Shape, bytes_needed, objectives, passes
from pop_lightning.fitting.training import CHUNK_LOGITS, KVProjectionTraining
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.positions import position_ids
from pop_lightning.models.sizes import mlp_dim
from pop_lightning.pruning.flops import count_prefill
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.run.inputs import trains, untrained_kinds
from pop_lightning.run.recipe import Recipe

# Builds a stage's step over a base and a batch of ``collate``; calling the result runs the step.
Build = Callable[[Decoder, dict], Callable[[], object]]
Ways = dict[str, tuple[PruningPlan, dict]]  # by name a plan, and what else a Variant is made with
_FLOAT = 4


@dataclass(frozen=True)
class Batch:
    """Rows of a batch, and the tokens of each."""

    rows: int
    prompt: int
    response: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.response

    def collated(self, device: torch.device) -> dict:
        """Such a batch on a device; of several rows the last is shorter, as in real batches."""
        lengths = [self.prompt] * (self.rows - 1) + [max(1, self.prompt - (self.rows > 1))]
        batch = collate([Row((5,) * p, (5,) * self.response, f"row {n}") for n, p in enumerate(lengths)], 0)
        return batch | {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


@dataclass(frozen=True)
class Stage:
    """One stage. Bytes are those of one device, on top of the weights of the base.

    Attributes:
        name: as the check prints it.
        rows: that it reads, each time that it reads one counted.
        operations: per row, 2 per multiply-add.
        kept: bytes held between its batches.
        batch: bytes of one batch on top of that.
        build: its step on a real base.
        size: rows of that step.
        step: operations of the step per row, where they are not those of the stage.
        once: operations that do not depend on rows (the closed form's solutions).
        trained: bytes of the gradients; the optimizer holds twice as many.
    """

    name: str
    rows: int
    operations: float
    kept: int
    batch: int
    build: Build
    size: int
    step: float | None = None
    once: float = 0
    trained: int = 0

    @property
    def bytes(self) -> int:
        return self.kept + self.batch

    @property
    def flops(self) -> float:
        """Operations of the stage, all devices together."""
        return self.operations * self.rows + self.once

    @property
    def step_flops(self) -> float:
        return self.size * (self.step or self.operations)


class Layer:
    """Bytes of one layer's activations, per row; of the widest layer where they differ."""

    def __init__(self, decoder: Decoder, eager: bool):
        parts = max(decoder.parts.values(), key=lambda each: each.kv_dim)
        self.itemsize, self.eager = decoder.model.dtype.itemsize, eager
        self.hidden, self.mlp = decoder.config.hidden_size, mlp_dim(decoder.config)
        self.queries, self.kv, self.heads = parts.queries.count, parts.kv_dim, parts.heads
        self.masks = len({decoder.window(layer) for layer in decoder.parts})  # one per kind of layer
        self.normed = _FLOAT * (parts.k_norm is not None)  # such a norm keeps its input in float32
        named = decoder.layers[-1].named_parameters()
        self.norms = sum(name.endswith("norm.weight") and each.shape == (self.hidden,) for name, each in named)

    def seen(self, masked: bool) -> int:
        """Width of the keys that attention reads: where there is a mask they are repeated for every query head."""
        return self.queries if masked or self.eager else self.kv

    def saved(self, queries: int, keys: int, masked: bool = True) -> int:
        """What a layer keeps for its backward pass, of ``queries`` tokens that run through it and see ``keys``."""
        own = self.norms * self.hidden * _FLOAT + self.queries * self.normed + self.heads * _FLOAT
        own += (2 * self.queries + 3 * self.mlp) * self.itemsize
        # An eager softmax is in float32; a fused kernel reads the mask in the dtype of the queries.
        scores = self.heads * (_FLOAT if self.itemsize == _FLOAT else 6) if self.eager else self.itemsize * masked
        return queries * (own + keys * scores) + keys * (2 * self.seen(masked) * self.itemsize + self.kv * self.normed)

    def passing(self, tokens: int, masked: bool) -> int:
        """What is alive at one time while a layer runs and nothing is kept."""
        # The embeddings, the layer's input, the residual and its norm are held around the feed-forward branch.
        feed_forward = (3 * self.mlp + 4 * self.hidden) * self.itemsize
        scores = self.heads * 2 * _FLOAT if self.eager else self.itemsize * masked
        attention = 3 * self.hidden + 2 * (self.queries + self.kv + self.seen(masked))
        return tokens * (max(feed_forward, attention * self.itemsize + tokens * scores) + tokens * self.masks * masked)


class Costs:
    """The stages of a recipe over a base of which only the shapes are known.

    Args:
        decoder: over a model on the meta device, or a real one.
        depths: candidates, shallowest pruning first.
        boundaries: those of ``budget.boundaries`` that are measured.
        longest: the batch that memory is for.
        usual: the batch that operations are for.
        eager: attention writes its scores out.
        gpu: AdamW updates all parameters at once there; a CPU's bfloat16 product copies the head for every row.

    Attributes:
        grouping, passes: how the closed form groups its regressions, and the depths of each pass over the rows.

    Raises:
        InputError: the closed form's sums do not fit in ``projection.memory_gib``.
    """

    def __init__(
        self,
        decoder: Decoder,
        recipe: Recipe,
        depths: Sequence[int],
        boundaries: Sequence[int],
        longest: Batch,
        usual: Batch,
        *,
        eager: bool = False,
        gpu: bool = False,
    ):
        self.decoder, self.recipe, self.depths, self.boundaries = decoder, recipe, list(depths), list(boundaries)
        self.longest, self.usual, self.gpu = longest, usual, gpu
        self.layer, self.shape = Layer(decoder, eager), Shape.of(decoder)
        self.layers, self.vocabulary = decoder.num_layers, decoder.head.out_features
        settings = recipe.projection
        self.trains, self.kinds = trains(recipe), untrained_kinds(recipe)
        self.grouping, self.passes = "none", []
        if "closed_form" in self.kinds:
            self.grouping, self.passes = passes(self.shape, self.depths, settings.grouping, settings.memory_bytes)
        full = count_prefill(decoder, PruningPlan(self.layers), usual.tokens)
        self.linear, self.attention, self.head = full.linear, full.attention, full.head * usual.response

    def at(self, usual: Batch) -> "Costs":
        """The same with operations counted at other lengths."""
        given = self.decoder, self.recipe, self.depths, self.boundaries, self.longest, usual
        return Costs(*given, eager=self.layer.eager, gpu=self.gpu)

    # --- bytes of one batch -------------------------------------------------------------------------------------------

    def _logits(self, batch: Batch) -> int:
        """Elements of the logits at the loss positions."""
        return batch.rows * batch.response * self.vocabulary

    def _trace(self, batch: Batch, first: int) -> int:
        """Hidden states that a full pass leaves: the inputs of the layers ``first`` and up, and the last output."""
        return (self.layers - first + 1) * batch.rows * batch.tokens * self.layer.hidden * self.layer.itemsize

    def _passing(self, batch: Batch) -> int:
        layer = self.layer
        head = 0 if self.gpu or layer.itemsize == _FLOAT else self.vocabulary * layer.hidden * layer.itemsize
        masked = any(self._masked(batch, index) for index in range(self.layers))
        return batch.rows * max(layer.passing(batch.tokens, masked), head)

    def _masked(self, batch: Batch, layer: int) -> bool:
        """Whether attention is given a mask: for padding, and for a window that does not hold all tokens."""
        return batch.rows > 1 or self.decoder.visible(layer, batch.tokens) < batch.tokens - 1

    def _cache(self, batch: Batch) -> int:
        """Keys and values of one layer; one that slides keeps the memory of all tokens as well."""
        return batch.rows * batch.tokens * 2 * self.layer.kv * self.layer.itemsize

    def scoring_bytes(self, batch: Batch, checkpointing: bool) -> int:
        """Every layer's activations and branches; or every layer's input, and one layer's activations."""
        layer, tokens = self.layer, batch.tokens
        branches = 2 * tokens * layer.hidden * layer.itemsize
        saved = [
            batch.rows * (layer.saved(tokens, tokens, self._masked(batch, each)) + branches)
            for each in range(self.layers)
        ]
        # Logits, those of the real tokens, residuals and their product; the signs that a chunk of one row's residuals
        # is drawn from are whole numbers of 8 bytes.
        logits = self._logits(batch) * layer.itemsize
        loss = 3 * logits + max(logits, 28 * min(batch.response * self.vocabulary, RESIDUALS))
        if checkpointing:
            return self._trace(batch, 0) + max(loss, max(saved) + self._passing(batch))
        return sum(saved) + max(loss, self._passing(batch))

    def fit_bytes(self, batch: Batch, depths: Sequence[int]) -> int:
        """Inputs n(h_d) of every depth, of all rows and of the real tokens; one layer's targets and products."""
        layer, width, boundary = self.layer, self.layer.hidden + 1, self.recipe.fit_boundary
        context = batch.rows * max(0, batch.prompt - boundary)
        inputs = 2 * sum(depth < self.layers - 1 for depth in depths) * context * width
        asked = context * (width + 2 * layer.kv) + width * width * 3 // 2
        if self.grouping == "none":  # no queries are asked, so the pass ends where the context does
            batch = replace(batch, prompt=batch.prompt - boundary, response=0)
        else:
            queries = batch.rows * min(self.recipe.projection.queries, batch.response + boundary - 1)
            asked += queries * layer.heads * (batch.tokens + width) + batch.rows * batch.tokens * 4 * layer.kv
        return self._trace(batch, min(depths)) + max((inputs + asked) * _FLOAT, self._passing(batch))

    def evaluation_bytes(self, batch: Batch, first: int) -> int:
        """Logits of the full model and of one variant; of a chunk of them six float32 values per logit."""
        chunk = min(POSITIONS, batch.rows * batch.response) * self.vocabulary
        logits = 2 * self._logits(batch) * self.layer.itemsize + 6 * _FLOAT * chunk
        return self._trace(batch, first) + max(self._passing(batch), logits)

    def training_bytes(self, batch: Batch, depth: int) -> int:
        """A full pass without graph, and the pruned layers' activations with the loss of one chunk of positions."""
        layer, boundary = self.layer, self.recipe.fit_boundary
        context, tail = max(0, batch.prompt - boundary), batch.response + boundary - 1
        saved = []
        for index in range(depth, self.layers):
            seen = self.decoder.visible(index, context)
            own = layer.itemsize < _FLOAT and index > depth  # the map's input in the dtype of the masters
            saved.append(layer.saved(tail, tail + seen) + own * seen * layer.hidden * _FLOAT)
        kept = sum(saved)
        if self.recipe.projection.gradient_checkpointing:
            kept = max(saved) + len(saved) * tail * layer.hidden * layer.itemsize
        kept += context * layer.hidden * layer.itemsize
        loss = 5 * _FLOAT * min(batch.rows * batch.response * self.vocabulary, max(CHUNK_LOGITS, self.vocabulary))
        return self._trace(batch, depth) + max(self._passing(batch), batch.rows * kept + loss)

    # --- operations of one row ----------------------------------------------------------------------------------------

    def _rerun(self, plan: PruningPlan, visible: bool = True) -> tuple[float, float]:
        """The pruned layers on boundary and response tokens forward, and backward to the projections."""
        prompt, tokens = self.usual.prompt, self.usual.tokens - 1
        tail = plan.boundary_of(prompt) + plan.salient_of(prompt) + self.usual.response - 1
        some = 1 if plan.salient else 0  # makes the probing pass and whole projections count
        run, none = (
            count_prefill(self.decoder, each, tokens)
            for each in (PruningPlan(plan.depth, tail, some), PruningPlan(plan.depth, 0))
        )
        linear, attention = run.linear - none.linear, run.attention - none.attention
        projected = run.projections if visible else 0
        return linear + attention + projected, linear + 2.5 * attention + projected

    def _regressions(self, depths: Sequence[int], second: bool) -> float:
        """Gram and cross matrices of one pass over ``depths``, and what the queries read."""
        layer, boundary, width = self.layer, self.recipe.fit_boundary, self.layer.hidden + 1
        tokens, context = self.usual.tokens, max(0, self.usual.prompt - boundary)
        asked = layer.heads * min(self.recipe.projection.queries, self.usual.response + boundary - 1)
        outputs = layer.kv // (self.shape.kv_heads if self.grouping == "head" else 1)
        values = asked * width * (context + width + outputs)
        keys, plain = context * width * (width + layer.kv), context * width * 2 * layer.kv
        targets = tokens * 2 * layer.kv * layer.hidden + 2 * asked * tokens * layer.kv
        each = values if second else keys + values + plain
        if self.grouping == "none":
            each, targets = plain, context * 2 * layer.kv * layer.hidden
        above = [max(0, self.layers - 1 - depth) for depth in depths]
        grams = 0 if second else sum(count > 0 for count in above) * context * width**2
        return 2 * (max(above) * targets + sum(above) * each + grams)

    def _solutions(self, second: bool) -> float:
        """Cholesky factors and solutions of one layer at one strength."""
        width, values = self.layer.hidden + 1, self.shape.groups(self.grouping)
        factors = {"plain": 1, "attention": 1 + values}
        counts = [(values, 1)] if second else [(factors[name], 2) for name in objectives(self.grouping)]
        return sum(count * width**3 / 3 + 4 * parts * self.layer.kv * width**2 for count, parts in counts)

    # --- stages -------------------------------------------------------------------------------------------------------

    def stages(self, counts: dict[str, int], missing: int, devices: int = 1) -> Iterator[Stage]:
        """Every stage of a fit, in order.

        Args:
            counts: rows of each split.
            missing: rows that the full model has to answer first.
            devices: processes that share the rows of a training step.
        """
        recipe = self.recipe
        deepest, tried = min(self.depths), recipe.kept(self.boundaries)
        # A wanted speedup leaves one depth once the boundary is chosen; it is counted as the deepest.
        decided = self.depths if recipe.budget.speedup is None else [deepest]
        if missing:
            yield from self._responses(missing)
        yield self._scoring(min(recipe.importance.rows, counts["fit"]))
        if self.passes:
            yield self._closed_form_fit(counts["fit"])
            yield self._closed_form_choice(counts["tune"])
        yield self._evaluation("search", counts["search"], self._plans(self.depths, tried[:1]), len(self.kinds))
        if len(tried) > 1:  # at most: plans that cannot win are left out
            yield self._evaluation("search: plans", counts["search"], self._plans(self.depths, tried[1:]))
        if self.trains and (trained := [depth for depth in decided if depth < self.layers - 1]):
            yield self._training(trained, devices)
        yield self._evaluation("verify", counts["verify"], self._plans(decided, [tried[-1]]))
        if self.boundaries:
            compared = list(dict.fromkeys([*map(Kept, self.boundaries), tried[-1]]))
            yield self._evaluation("boundaries", counts["search"], self._plans([deepest], compared))
        plan, kinds = tried[-1].at(deepest), len(self.kinds) + self.trains
        ways = {f"kind {number}": (plan, {}) for number in range(kinds)} | {
            "layers removed": (plan, {"removed": tuple(plan.pruned(self.layers))}),
            "no boundary handling": (replace(plan, boundary=0, salient=0), {}),
            "no KV projection": (plan, {"context_visible": False}),
            "full model": (PruningPlan(self.layers), {}),
        }
        comparison = self._evaluation("comparison", counts["search"], ways)
        yield replace(comparison, kept=kinds * self._maps([deepest]))

    def _maps(self, depths: Sequence[int]) -> int:
        """Bytes of the projections of ``depths``."""
        return self.shape.map_bytes * sum(self.layers - depth for depth in depths)

    def _plans(self, depths: Sequence[int], tried: Sequence[Kept]) -> Ways:
        return {f"{depth} {kept}": (kept.at(depth), {}) for depth in depths for kept in tried}

    def _responses(self, rows: int) -> Iterator[Stage]:
        """The full model writes the responses: a prefill, then one token after another."""
        longest, prompts = self.longest, replace(self.longest, response=0)
        prefill = count_prefill(self.decoder, PruningPlan(self.layers), self.usual.prompt).total
        passing = self._passing(prompts)
        yield Stage(
            "responses: prompts", rows, prefill, self.layers * self._cache(prompts), passing, _prefill, longest.rows
        )
        decode = self.linear + self.attention + self.head - prefill
        token = decode / max(1, self.usual.response)
        one = self._cache(longest)
        held = most = kept = self.layers * one
        for layer in range(self.layers):
            # A layer's cache is copied while a token is appended, and one that slides keeps its window only; eager
            # attention repeats it for every query head.
            copied = one * min(longest.tokens, self.decoder.visible(layer, longest.tokens) + 1) // longest.tokens
            repeated = copied * self.layer.eager * self.layer.queries // self.layer.kv
            most, held = max(most, held + copied + repeated), held + copied - one
        yield Stage("responses: tokens", rows, decode, kept, most - kept, _decode, longest.rows, token)

    def _scoring(self, rows: int) -> Stage:
        checkpointing = self.recipe.importance.gradient_checkpointing
        batch = replace(self.longest, rows=self.recipe.importance.rows_at_a_time(self.recipe.data))
        operations = 2 * (self.linear + self.head) + 3.5 * self.attention
        operations += (self.linear + self.attention) * checkpointing
        needed, build = self.scoring_bytes(batch, checkpointing), partial(_score, recipe=self.recipe)
        return Stage("scoring", rows, operations, 0, needed, build, batch.rows)

    def _sums(self, depth: int) -> int:
        """Bytes of one depth's running sums, and of the maps that they are pulled toward."""
        return bytes_needed(self.shape, depth, self.grouping) + self._maps([depth])

    def _closed_form_fit(self, rows: int) -> Stage:
        """The passes over the fit rows. The second one's sums are those of the values only, so the first decides."""
        full, k = self.linear + self.attention, self.recipe.fit_boundary
        largest = max(self.passes, key=lambda group: sum(map(self._sums, group)))
        operations = sum(full + self._regressions(group, second=False) for group in self.passes)
        if self._refits:
            operations += sum(full + self._regressions(group, second=True) for group in self.passes)
            operations += sum(self._rerun(PruningPlan(d, k))[0] for d in self.depths if d < self.layers - 1)
        kept, needed = sum(map(self._sums, largest)), self.fit_bytes(self.longest, largest)
        build = partial(_fit, recipe=self.recipe, depths=largest, grouping=self.grouping)
        step = full + self._regressions(largest, second=False)
        return Stage("closed form: fit", rows, operations, kept, needed, build, self.longest.rows, step)

    @property
    def _refits(self) -> bool:
        return self.recipe.projection.refit and self.grouping != "none"

    def _closed_form_choice(self, rows: int) -> Stage:
        """Reuse at every depth and, where there is something to fit, every objective at every strength."""
        full, k = self.linear + self.attention + self.head, self.recipe.fit_boundary
        strengths, tried = len(self.recipe.projection.ridge), len(objectives(self.grouping))
        above = {depth: self.layers - 1 - depth for depth in self.depths}
        students = {depth: self._rerun(PruningPlan(depth, k))[0] + self.head for depth in self.depths}
        first = {depth: 1 + tried * strengths * (above[depth] > 0) for depth in self.depths}
        second = {depth: strengths * self._refits * (above[depth] > 0) for depth in self.depths}
        operations = len(self.passes) * (1 + self._refits) * full
        operations += sum((first[depth] + second[depth]) * students[depth] for depth in self.depths)
        solved = self._solutions(second=False) + (self._solutions(second=True) if self._refits else 0)
        made, measured = map(max, zip(*(self._options(group, first) for group in self.passes), strict=True))
        width = self.layer.hidden + 1
        made += 8 * width * (3 * width + 6 * self.layer.kv)  # a Gram matrix, its factor and solutions in float64
        needed = max(made, measured + self.evaluation_bytes(self.longest, min(self.depths)))
        return Stage(
            "closed form: choice",
            rows,
            operations,
            measured,
            needed - measured,
            partial(_evaluate, ways=self._plans(self.depths, [Kept(k)])),
            self.longest.rows,
            full + sum(students.values()),
            once=sum(above.values()) * strengths * solved,
        )

    def _options(self, group: Sequence[int], options: dict[int, int]) -> tuple[int, int]:
        """The most bytes held while options of ``group`` are made, and while they are measured.

        As many wait for a measurement as ``projection.memory_gib`` has room for next to the sums of the depths that are
        still to be solved; after it the best of each objective and reuse stay.
        """
        limit, stay = self.recipe.projection.memory_bytes, 1 + len(objectives(self.grouping))
        sums, found, waiting, made, measured = sum(map(self._sums, group)), 0, {}, 0, 0
        for depth in group:
            one = self._maps([depth])
            for _ in range(options[depth]):
                if waiting and sums + found + sum(waiting.values()) + one > limit:
                    measured = max(measured, sums + found + sum(waiting.values()))
                    found += sum(min(held, stay * self._maps([each])) for each, held in waiting.items())
                    waiting = {}
                waiting[depth] = waiting.get(depth, 0) + one
                made = max(made, sums + found + sum(waiting.values()))
            sums -= self._sums(depth)
        return made, max(measured, found + sum(waiting.values()))

    def _evaluation(self, name: str, rows: int, ways: Ways, kinds: int = 1) -> Stage:
        """A measurement on a split, in as many passes as hold the projections of its variants in memory."""
        choices = dict.fromkeys(Choice(plan.depth, str(kind)) for plan, _ in ways.values() for kind in range(kinds))
        measured = list(groups(self.decoder, list(choices), self.recipe.projection.memory_bytes))
        full, rerun = self.linear + self.attention + self.head, self.head * len(ways)
        for plan, flags in ways.values():
            if plan.depth < self.layers and not flags.get("removed"):
                rerun += self._rerun(plan, flags.get("context_visible", True))[0]
        held = max(self._maps([choice.depth for choice in each]) for each in measured)
        needed = self.evaluation_bytes(self.longest, min(plan.depth for plan, _ in ways.values()))
        operations, build = len(measured) * full + kinds * rerun, partial(_evaluate, ways=ways)
        return Stage(name, rows, operations, held, needed, build, self.longest.rows, full + rerun)

    def _training(self, depths: Sequence[int], devices: int) -> Stage:
        settings, depth, k = self.recipe.projection, min(depths), self.recipe.fit_boundary
        whole = settings.batch_size or self.recipe.data.batch_size  # of all devices together
        batch = replace(self.longest, rows=math.ceil(whole / devices))
        steps = []
        for each in depths:  # the teacher's pass and logits, the student's forward and backward, logits made again
            forward, backward = self._rerun(PruningPlan(each, k))
            again = forward * settings.gradient_checkpointing
            steps.append(self.linear + self.attention + 4 * self.head + forward + backward + again)
        layers, width = self.layers - depth - 1, self.layer.hidden + 1
        masters = layers * 2 * self.layer.kv * width * _FLOAT
        adapters = layers * settings.lora.r * (self.layer.hidden + 2 * self.layer.kv) * _FLOAT
        trained, added = (adapters, adapters) if settings.kind == "lora" else (masters, 0)
        # On a GPU AdamW goes through a temporary copy of all parameters, next to their gradients.
        needed = max(self.training_bytes(batch, depth), 2 * trained * self.gpu)
        return Stage(
            "training",
            settings.steps * whole * (self.recipe.trainer.get("accumulate_grad_batches") or 1),
            sum(steps),
            masters + added + self.shape.map_bytes + 2 * trained,
            needed,
            partial(_train, recipe=self.recipe, depth=depth),
            batch.rows,
            steps[depths.index(depth)],
            trained=trained,
        )


# --- steps on a real base ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _read(decoder: Decoder, ids: Tensor, mask: Tensor, cache: Cache) -> Cache:
    """Run tokens over a cache of those before them; ``mask`` is that of all."""
    places = position_ids(mask)[:, -ids.shape[1] :]
    given = {"attention_mask": mask, "position_ids": places, "past_key_values": cache, "use_cache": True}
    decoder.model(input_ids=ids, logits_to_keep=1, **given)
    return cache


def _prefill(decoder: Decoder, batch: dict) -> Callable[[], object]:
    ids, mask = (batch[name][:, : batch["prompt_length"]] for name in ("input_ids", "attention_mask"))
    return lambda: _read(decoder, ids, mask, decoder.new_cache())


def _decode(decoder: Decoder, batch: dict) -> Callable[[], object]:
    """One token for every row; each call reads one more."""
    mask, cache = batch["attention_mask"][:, :-1], decoder.new_cache()
    for layer, parts in decoder.parts.items():
        shape = len(mask), parts.kv_heads, mask.shape[1], parts.head_dim
        keys, values = torch.zeros(2, *shape, dtype=decoder.model.dtype, device=mask.device)
        cache.update(keys, values, layer)

    def step() -> None:
        longer = cache.get_seq_length() + 1 - mask.shape[1]
        _read(decoder, batch["input_ids"][:, -1:], torch.nn.functional.pad(mask, (0, longer), value=1), cache)

    return step


def _score(decoder: Decoder, batch: dict, recipe: Recipe) -> Callable[[], object]:
    checkpointing = recipe.importance.gradient_checkpointing
    module = ImportanceScoring(decoder, recipe.fit_boundary, gradient_checkpointing=checkpointing)
    return lambda: module.gradients(batch)


def _fit(decoder: Decoder, batch: dict, recipe: Recipe, depths: list[int], grouping: str) -> Callable[[], object]:
    given = {"grouping": grouping, "queries": recipe.projection.queries}
    module = ClosedFormFit(decoder, depths, recipe.fit_boundary, **given)
    return lambda: module.validation_step(batch, 0)


def _evaluate(decoder: Decoder, batch: dict, ways: Ways) -> Callable[[], object]:
    maps = {depth: KVProjections(decoder, depth) for depth in {plan.depth for plan, _ in ways.values()}}
    variants = {name: Variant(plan, maps[plan.depth], **flags) for name, (plan, flags) in ways.items()}
    module = Evaluation(decoder, variants)
    return torch.no_grad()(lambda: module.validation_step(batch, 0))


def _train(decoder: Decoder, batch: dict, recipe: Recipe, depth: int) -> Callable[[], object]:
    """A training step with its optimizer's; a learning rate of 0 leaves everything as it is."""
    settings = recipe.projection
    module = KVProjectionTraining(
        KVProjections(decoder, depth),
        boundary=recipe.fit_boundary,
        kind=settings.kind,
        kind_arguments=trained_kind(settings.kind).arguments(settings),
        temperature=settings.temperature,
        kv_match=settings.kv_match,
        hidden_match=settings.hidden_match,
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    optimizer = torch.optim.AdamW([module.parameter_group() | {"lr": 0.0}])

    def step() -> None:
        module.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
