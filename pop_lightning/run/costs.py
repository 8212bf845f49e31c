"""What each stage of a fit needs: bytes by a plain rule, and operations counted from the base's shape.

On top of the base's weights a stage holds what stays between its batches (projections, running sums, optimizer states)
and one batch: hidden states of the layers above the smallest depth, activations that a backward pass reads again, and
logits with the copies that the loss makes of them. The check prints this, and runs the steps that are built here.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from pop_lightning.core.plan import Choice, Kept, PruningPlan
from pop_lightning.data.batches import collate
from pop_lightning.data.rows import Row
from pop_lightning.evaluation.evaluate import Evaluation, Variant, groups
from pop_lightning.evaluation.metrics import POSITIONS
from pop_lightning.evaluation.search import FINALISTS, TOGETHER, Budget, screening_rows
from pop_lightning.fitting.importance import RESIDUALS
from pop_lightning.fitting.kinds import trained_kind
from pop_lightning.fitting.regressions import ClosedFormFit, Shape, bytes_needed, objectives, passes
from pop_lightning.fitting.selectors import SelectorFit
from pop_lightning.fitting.training import CHUNK_LOGITS
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.names import CACHE
from pop_lightning.models.positions import position_ids
from pop_lightning.models.sizes import mlp_dim
from pop_lightning.pruning.flops import count_prefill, speedup
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.pruning.salient import watched
from pop_lightning.pruning.selectors import learned, selector_named
from pop_lightning.run.depths import condition, ways
from pop_lightning.run.inputs import scoring_module, training_module, trains, untrained_kinds
from pop_lightning.run.recipe import Recipe

_FLOAT, _DOUBLE = 4, 8  # bytes


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
        rows: number of rows read, each time counted.
        operations: per row, 2 per multiply-add.
        kept: bytes held between its batches.
        batch: bytes of one batch on top of that.
        build: makes the stage's step from a real base and a batch of ``collate``; calling the result runs the step.
        size: rows of that step.
        step: operations of the step per row, where they are not those of the stage.
        trained: bytes of the gradients; the optimizer holds twice as many.
    """

    name: str
    rows: int
    operations: float
    kept: int
    batch: int
    build: Callable[[Decoder, dict], Callable[[], object]]
    size: int
    step: float | None = None
    trained: int = 0

    @property
    def bytes(self) -> int:
        return self.kept + self.batch

    @property
    def flops(self) -> float:
        """Operations of the stage, all devices together."""
        return self.operations * self.rows

    @property
    def step_flops(self) -> float:
        return self.size * (self.step or self.operations)


class Layer:
    """Bytes of one layer's activations, per row; of the widest layer where they differ."""

    def __init__(self, decoder: Decoder):
        parts = max(decoder.parts.values(), key=lambda each: each.kv_dim)
        self.itemsize = decoder.model.dtype.itemsize
        self.eager = decoder.config._attn_implementation == "eager"
        self.hidden, self.mlp = decoder.config.hidden_size, mlp_dim(decoder.config)
        self.queries, self.kv, self.heads = parts.queries.count, parts.kv_dim, parts.heads
        named = decoder.layers[-1].named_parameters()
        self.norms = sum(name.endswith("norm.weight") and each.shape == (self.hidden,) for name, each in named)

    def seen(self, masked: bool) -> int:
        """Width of the keys that attention reads: where there is a mask they are repeated for every query head."""
        return self.queries if masked or self.eager else self.kv

    def saved(self, queries: int, keys: int, masked: bool = True) -> int:
        """What a layer keeps for its backward pass, of ``queries`` tokens that run through it and see ``keys``."""
        own = self.norms * self.hidden * _FLOAT + (2 * self.queries + 3 * self.mlp) * self.itemsize
        # An eager softmax is in float32; a fused kernel reads the mask in the dtype of the queries.
        scores = self.heads * (_FLOAT if self.itemsize == _FLOAT else 6) if self.eager else self.itemsize * masked
        return queries * (own + keys * scores) + keys * 2 * self.seen(masked) * self.itemsize

    def passing(self, tokens: int, masked: bool) -> int:
        """What is alive at one time while a layer runs and nothing is kept: its attention or its feed-forward part."""
        scores = self.heads * 2 * _FLOAT if self.eager else self.itemsize * masked
        attention = (3 * self.hidden + 2 * (self.queries + self.kv + self.seen(masked))) * self.itemsize
        feed_forward = (3 * self.mlp + 4 * self.hidden) * self.itemsize
        return tokens * (max(feed_forward, attention + tokens * scores) + tokens * masked)


@dataclass
class Costs:
    """The stages of a recipe over a base of which only the shapes are known.

    Args:
        decoder: over a model on the meta device, or a real one.
        depths: candidates, shallowest pruning first.
        boundaries: those of ``budget.boundaries`` that are measured.
        longest: the batch that memory is for.
        usual: the batch that operations are for.
        reached: where a speedup is requested, the depth that reaches it by what runs in full.
        gpu: AdamW updates all parameters at once there; a CPU's bfloat16 product copies the head for every row.

    Attributes:
        grouping, passes: how the closed form groups its regressions, and the depths of each pass over the rows.

    Raises:
        InputError: the closed form's sums do not fit in ``projection.memory_gib``.
    """

    decoder: Decoder
    recipe: Recipe
    depths: Sequence[int]
    boundaries: Sequence[int]
    longest: Batch
    usual: Batch
    gpu: bool = False
    reached: Mapping[Kept, int] | None = None

    def __post_init__(self):
        self.layer, self.shape = Layer(self.decoder), Shape.of(self.decoder)
        self.layers, self.vocabulary = self.decoder.num_layers, self.decoder.head.out_features
        self.memory = self.recipe.projection.memory_bytes
        self.trains, self.kinds = trains(self.recipe), untrained_kinds(self.recipe)
        self.grouping, self.passes = "none", []
        if "closed_form" in self.kinds:
            self.grouping, self.passes = passes(self.shape, self.depths, self.recipe.projection.grouping, self.memory)
        self.refits = self.recipe.projection.refit and self.grouping != "none"
        full = count_prefill(self.decoder, PruningPlan(self.layers), self.usual.tokens)
        self.linear, self.attention, self.head = full.linear, full.attention, full.head * self.usual.response
        self.full = self.linear + self.attention

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
        return batch.rows * max(layer.passing(batch.tokens, self._masked(batch)), head)

    def _masked(self, batch: Batch) -> bool:
        """Whether attention is given a mask: for padding, and for windows that do not hold all tokens."""
        seen = min(self.decoder.visible(layer, batch.tokens) for layer in range(self.layers))
        return batch.rows > 1 or seen < batch.tokens - 1

    def _cache(self, batch: Batch) -> int:
        """Keys and values of one layer; one that slides keeps the memory of all tokens as well."""
        return batch.rows * batch.tokens * 2 * self.layer.kv * self.layer.itemsize

    def _appending(self, batch: Batch) -> int:
        """What one more token takes on top of the caches of a prefill.

        A layer's cache is copied while the token is appended, and eager attention repeats it for every query head. From
        its first copy on, a layer that slides keeps only the tokens it sees.
        """
        one, repeated = self._cache(batch), self.layer.eager * self.layer.queries / self.layer.kv
        needed, freed = one, 0
        for index in range(self.layers):
            seen = one * self.decoder.visible(index, batch.tokens) // batch.tokens
            needed = max(needed, int(seen * (1 + repeated)) - freed)
            freed += one - seen
        return needed

    def scoring_bytes(self, batch: Batch, checkpointing: bool) -> int:
        """Every layer's activations and branches; or every layer's input, and one layer's activations."""
        layer, tokens = self.layer, batch.tokens
        branches = 2 * tokens * layer.hidden * layer.itemsize
        saved = batch.rows * (layer.saved(tokens, tokens, self._masked(batch)) + branches)
        # Logits, those of the real tokens, residuals and their product; the signs that a chunk of one row's residuals
        # is drawn from are whole numbers of 8 bytes.
        logits = self._logits(batch) * layer.itemsize
        loss = 3 * logits + max(logits, 28 * min(batch.response * self.vocabulary, RESIDUALS))
        if checkpointing:
            return self._trace(batch, 0) + max(loss, saved + self._passing(batch))
        return self.layers * saved + max(loss, self._passing(batch))

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

    def evaluation_bytes(self, batch: Batch, plans: Sequence[PruningPlan]) -> int:
        """Logits of the full model and of one variant, with six float32 values per logit of a chunk; or a selection."""
        chunk = min(POSITIONS, batch.rows * batch.response) * self.vocabulary
        logits = self._logits(batch) * self.layer.itemsize
        selecting = (logits + self.selection_bytes(batch, plan) for plan in plans if plan.salient)
        needed = max(self._passing(batch), 2 * logits + 6 * _FLOAT * chunk, *selecting)
        return self._trace(batch, min(plan.depth for plan in plans)) + needed

    def selection_bytes(self, batch: Batch, plan: PruningPlan) -> int:
        """Projected keys and values of all pruned layers at once, and one layer over the tokens that run in full."""
        layer, context = self.layer, batch.prompt - 1
        rows = plan.boundary_of(batch.prompt) + plan.salient_of(batch.prompt) + batch.response - 1
        held = context * (layer.hidden + (self.layers - plan.depth) * 2 * layer.kv) * layer.itemsize
        if selector_named(plan.selector).fitted:
            held += 2 * context * self._features(plan.depth) * _FLOAT
        seen = batch.tokens * 2 * (layer.kv + layer.seen(True)) * layer.itemsize
        masks = rows * batch.tokens * (1 + layer.itemsize)
        running = rows * (3 * layer.mlp + 4 * layer.hidden) * layer.itemsize
        return batch.rows * (held + seen + masks + running)

    def _features(self, depth: int) -> int:
        """What a fitted selector reads of a token."""
        return learned.width(self.decoder, watched(self.decoder, depth))

    def selector_bytes(self, batch: Batch, depths: Sequence[int]) -> int:
        """Projections of all pruned layers, their gradients and one layer's activations; or the features of a depth."""
        layer, boundary = self.layer, max(1, self.recipe.fit_boundary)
        context, tail = max(0, batch.prompt - boundary), batch.response + boundary - 1
        needed = 0
        for depth in depths:
            pruned, features = self.layers - depth, self._features(depth) + 1
            leaves = pruned * 2 * layer.kv * context * layer.itemsize
            inputs = (pruned * tail + context) * layer.hidden * layer.itemsize
            loss = 5 * _FLOAT * min(self._logits(batch), max(CHUNK_LOGITS, self.vocabulary))
            backward = batch.rows * (2 * leaves + inputs + layer.saved(tail, tail + context)) + loss
            read = batch.rows * context * features * (2 * _FLOAT + _DOUBLE) + features**2 * _DOUBLE
            needed = max(needed, backward, read)
        return self._trace(batch, min(depths)) + max(self._passing(batch), needed)

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
        loss = 5 * _FLOAT * min(self._logits(batch), max(CHUNK_LOGITS, self.vocabulary))
        return self._trace(batch, depth) + max(self._passing(batch), batch.rows * kept + loss)

    # --- operations of one row ----------------------------------------------------------------------------------------

    def _rerun(self, plan: PruningPlan) -> tuple[float, float]:
        """The pruned layers on boundary and response tokens forward, and backward to the projections."""
        prompt, tokens = self.usual.prompt, self.usual.tokens - 1
        tail = plan.boundary_of(prompt) + plan.salient_of(prompt) + self.usual.response - 1
        some = 1 if plan.salient else 0  # makes the probing pass and whole projections count
        run, none = (
            count_prefill(self.decoder, each, tokens)
            for each in (PruningPlan(plan.depth, tail, some), PruningPlan(plan.depth, 0))
        )
        linear, attention = run.linear - none.linear + run.projections, run.attention - none.attention
        return linear + attention, linear + 2.5 * attention

    def _regressions(self, depths: Sequence[int], second: bool = False) -> float:
        """One pass over ``depths``: Gram and cross matrices, and what the queries read."""
        layer, boundary, width = self.layer, self.recipe.fit_boundary, self.layer.hidden + 1
        tokens, context = self.usual.tokens, max(0, self.usual.prompt - boundary)
        above = [self.layers - 1 - depth for depth in depths if depth < self.layers - 1]
        plain, gram = context * width * 2 * layer.kv, context * width**2
        if self.grouping == "none":
            return 2 * ((max(above, default=0) + sum(above)) * plain + len(above) * gram)
        asked = layer.heads * min(self.recipe.projection.queries, self.usual.response + boundary - 1)
        values = asked * width * (context + width + layer.kv)
        first = 0 if second else sum(above) * (plain + gram + context * width * layer.kv) + len(above) * gram
        targets = max(above, default=0) * 2 * tokens * layer.kv * (layer.hidden + asked)
        return 2 * (targets + sum(above) * values + first)

    # --- stages -------------------------------------------------------------------------------------------------------

    def stages(self, counts: dict[str, int], missing: int, devices: int = 1) -> Iterator[Stage]:
        """Every stage of a fit, in order.

        Args:
            counts: rows of each split.
            missing: rows that the full model has to answer first.
            devices: processes that share the rows of a training step.
        """
        recipe, deepest, kinds = self.recipe, min(self.depths), len(self.kinds)
        tried, search = ways(recipe, self.decoder, self.boundaries), counts["search"]
        # A requested speedup leaves one depth once the boundary is chosen; it is counted as the deepest.
        decided = self.depths if recipe.budget.speedup is None else [deepest]
        if missing:
            yield from self._responses(missing)
        yield self._scoring(min(recipe.importance.rows, counts["fit"]))
        if self.passes:
            yield self._closed_form_fit(counts["fit"])
            yield self._closed_form_choice(counts["tune"])
        if any(kept.salient and selector_named(kept.selector).fitted for kept in tried):
            yield self._selector_fit(counts["fit"])
        yield self.evaluation("search", search, [tried[0].at(depth) for depth in self.depths], kinds)
        if len(tried) > 1:
            yield from self._plans(tried, search)
        if self.trains and (trained := [depth for depth in decided if depth < self.layers - 1]):
            yield self._training(trained, devices)
        yield self.evaluation("verify", counts["verify"], [tried[-1].at(depth) for depth in decided])
        if self.boundaries:
            compared = dict.fromkeys([*map(Kept, self.boundaries), tried[-1]])
            yield self.evaluation("boundaries", search, [kept.at(deepest) for kept in compared])
        # Every kind and the ablations at one depth; all are counted as reruns of the pruned layers.
        plan, compared = tried[-1].at(deepest), kinds + self.trains
        unpruned, ablation = PruningPlan(self.layers), replace(plan, boundary=0, salient=0)
        comparison = self.evaluation("comparison", search, [*[plan] * (compared + 2), ablation, unpruned])
        yield replace(comparison, kept=compared * self._maps([deepest]))

    def _maps(self, depths: Sequence[int]) -> int:
        """Bytes of the projections of ``depths``."""
        return self.shape.map_bytes * sum(self.layers - depth for depth in depths)

    def _sums(self, depth: int) -> int:
        """Bytes of one depth's running sums, and of the maps that they are pulled toward."""
        return bytes_needed(self.shape, depth, self.grouping) + self._maps([depth])

    def _responses(self, rows: int) -> Iterator[Stage]:
        """The full model writes the responses: a prefill, then one token after another."""
        longest, prompts = self.longest, replace(self.longest, response=0)
        prefill = count_prefill(self.decoder, PruningPlan(self.layers), self.usual.prompt).total
        kept, passing = self.layers * self._cache(prompts), self._passing(prompts)
        yield Stage("responses: prompts", rows, prefill, kept, passing, _prefill, longest.rows)
        one = self._cache(longest)
        decode = self.full + self.head - prefill
        token = decode / max(1, self.usual.response)
        yield Stage(
            "responses: tokens", rows, decode, self.layers * one, self._appending(longest), _decode, longest.rows, token
        )

    def _scoring(self, rows: int) -> Stage:
        checkpointing = self.recipe.importance.gradient_checkpointing
        batch = replace(self.longest, rows=self.recipe.importance.rows_at_a_time(self.recipe.data))
        operations = 2 * (self.linear + self.head) + 3.5 * self.attention + self.full * checkpointing
        needed, build = self.scoring_bytes(batch, checkpointing), partial(_score, recipe=self.recipe)
        return Stage("scoring", rows, operations, 0, needed, build, batch.rows)

    def _closed_form_fit(self, rows: int) -> Stage:
        """The passes over the fit rows. The second one's sums are those of the values only, so the first decides."""
        largest = max(self.passes, key=lambda group: sum(map(self._sums, group)))
        operations = sum(self.full + self._regressions(group) for group in self.passes)
        if self.refits:
            operations += sum(self.full + self._regressions(group, second=True) for group in self.passes)
            plans = [PruningPlan(depth, self.recipe.fit_boundary) for depth in self.depths if depth < self.layers - 1]
            operations += sum(self._rerun(plan)[0] for plan in plans)
        kept, needed = sum(map(self._sums, largest)), self.fit_bytes(self.longest, largest)
        build = partial(_fit, recipe=self.recipe, depths=largest, grouping=self.grouping)
        step = self.full + self._regressions(largest)
        return Stage("closed form: fit", rows, operations, kept, needed, build, self.longest.rows, step)

    def _selector_fit(self, rows: int) -> Stage:
        """Every depth's sums: a backward pass to the projections, and a probing pass for the features."""
        choices = [Choice(depth, self.kinds[-1]) for depth in self.depths]
        measured = [[choice.depth for choice in each] for each in groups(self.decoder, choices, self.memory)]
        boundary = max(1, self.recipe.fit_boundary)
        per_depth = {}
        for depth in self.depths:
            forward, backward = self._rerun(PruningPlan(depth, boundary))
            probing = count_prefill(self.decoder, PruningPlan(depth, boundary, 1), self.usual.prompt).projections
            gram = 2 * max(0, self.usual.prompt - boundary) * (self._features(depth) + 1) ** 2
            # Checkpointing runs the layers again; true keys and values are projected like the others.
            per_depth[depth] = 2 * forward + backward + 4 * self.head + 2 * probing + gram

        def held(depths: Sequence[int]) -> int:
            return self._maps(depths) + sum((self._features(depth) + 1) ** 2 * _DOUBLE for depth in depths)

        largest = max(measured, key=held)
        needed = max(self.selector_bytes(self.longest, depths) for depths in measured)
        operations = len(measured) * self.full + sum(per_depth.values())
        build = partial(_fit_selectors, recipe=self.recipe, depths=largest)
        step = self.full + sum(per_depth[depth] for depth in largest)
        return Stage("selectors", rows, operations, held(largest), needed, build, self.longest.rows, step)

    def _closed_form_choice(self, rows: int) -> Stage:
        """Reuse at every depth and, where there is something to fit, every objective at every strength.

        Options wait for a measurement, next to the sums of the depths still to be solved, in ``projection.memory_gib``.
        """
        width, full = self.layer.hidden + 1, self.full + self.head
        tried, strengths = len(objectives(self.grouping)), len(self.recipe.projection.ridge)
        plans = [PruningPlan(depth, self.recipe.fit_boundary) for depth in self.depths]
        students = [self._rerun(plan)[0] + self.head for plan in plans]
        operations = len(self.passes) * (1 + self.refits) * full
        for depth, student in zip(self.depths, students, strict=True):
            operations += (1 + strengths * (tried + self.refits) * (depth < self.layers - 1)) * student
        made = measured = 0
        for group in self.passes:
            options = list(accumulate((1 + tried * strengths) * self._maps([depth]) for depth in group))
            measured = max(measured, min(self.memory, options[-1]))
            sums = [sum(map(self._sums, group[number:])) for number in range(len(group))]
            made = max(made, *(min(self.memory, sum(pair)) for pair in zip(sums, options, strict=True)))
        made += _DOUBLE * width * (3 * width + 6 * self.layer.kv)  # a Gram matrix, its factor and solutions in float64
        batch = max(made - measured, self.evaluation_bytes(self.longest, plans))
        build, step = partial(_evaluate, plans=plans), full + sum(students)
        return Stage("closed form: choice", rows, operations, measured, batch, build, self.longest.rows, step)

    def evaluation(
        self, name: str, rows: int, plans: list[PruningPlan], kinds: int = 1, together: int | None = None
    ) -> Stage:
        """A measurement on a split, in as many passes as hold the projections of its variants in memory.

        Args:
            together: number of plans of one pass, whatever the memory; all unless given.
        """
        measured, at_once = [], together or len(plans)
        for asked in (plans[start : start + at_once] for start in range(0, len(plans), at_once)):
            choices = dict.fromkeys(Choice(plan.depth, str(kind)) for plan in asked for kind in range(kinds))
            measured += groups(self.decoder, list(choices), self.memory)
        full, rerun = self.full + self.head, sum(self._rerun(plan)[0] + self.head for plan in plans)
        held = max(self._maps([choice.depth for choice in each]) for each in measured)
        needed = self.evaluation_bytes(self.longest, plans)
        operations, build = len(measured) * full + kinds * rerun, partial(_evaluate, plans=plans)
        return Stage(name, rows, operations, held, needed, build, self.longest.rows, full + rerun)

    def _plans(self, tried: list[Kept], search: int) -> Iterator[Stage]:
        """What the search measures to choose the tokens that run in full, at most: plans that cannot win are left out.

        The plans that are measured on all rows come in several passes, the fastest first, until one keeps the budget.
        """
        kinds = len(self.kinds)
        if self.reached is not None:
            reaching = [kept.at(self.reached[kept]) for kept in tried[1:] if kept in self.reached]
            if reaching:
                yield self.evaluation("search: plans", search, reaching, kinds)
            return
        worth = [depth for depth in self.depths if self.layers - depth >= self.recipe.budget.min_pruned]
        plans = [kept.at(depth) for kept in tried[1:] for depth in worth]
        plans.sort(key=lambda plan: -speedup(self.decoder, plan, self.usual.prompt))
        limit = condition(self.recipe)
        rows = None if limit is None else screening_rows(search, Budget(limit, self.recipe.budget.loss, print))
        if rows is not None and len(plans) > TOGETHER:
            yield self.evaluation("search: screening", rows, plans)
            plans = plans[-FINALISTS:]  # at most, and those that cost most
        if plans:
            yield self.evaluation("search: plans", search, plans, together=TOGETHER)
            yield self.evaluation("search: chosen", search, [tried[-1].at(depth) for depth in self.depths], kinds)

    def _training(self, depths: Sequence[int], devices: int) -> Stage:
        settings, depth = self.recipe.projection, min(depths)
        whole = settings.batch_size or self.recipe.data.batch_size  # of all devices together
        batch = replace(self.longest, rows=math.ceil(whole / devices))
        steps = []
        for each in depths:  # the teacher's pass and logits, the student's forward and backward, logits made again
            forward, backward = self._rerun(PruningPlan(each, self.recipe.fit_boundary))
            again = forward * settings.gradient_checkpointing
            steps.append(self.full + 4 * self.head + forward + backward + again)
        layers, width = self.layers - depth - 1, self.layer.hidden + 1
        masters = layers * 2 * self.layer.kv * width * _FLOAT
        kind = trained_kind(settings.kind)
        trained = layers * kind.parameters(settings, self.layer.hidden, 2 * self.layer.kv) * _FLOAT
        added = 0 if kind.replaces_start else trained
        # On a GPU AdamW makes a temporary copy of all parameters, next to their gradients.
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
def _read(decoder: Decoder, ids: Tensor, mask: Tensor, cache: Cache) -> None:
    """Run tokens over a cache of those before them; ``mask`` is that of all."""
    places = position_ids(mask)[:, -ids.shape[1] :]
    given = {"attention_mask": mask, "position_ids": places, CACHE: cache, "use_cache": True}
    decoder.model(input_ids=ids, logits_to_keep=1, **given)


def _prefill(decoder: Decoder, batch: dict) -> Callable[[], object]:
    ids, mask = (batch[name][:, : batch["prompt_length"]] for name in ("input_ids", "attention_mask"))

    def step() -> Cache:
        _read(decoder, ids, mask, cache := decoder.new_cache())
        return cache

    return step


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
    module = scoring_module(recipe, decoder)
    return lambda: module.gradients(batch)


def _fit(decoder: Decoder, batch: dict, recipe: Recipe, depths: list[int], grouping: str) -> Callable[[], object]:
    given = {"grouping": grouping, "queries": recipe.projection.queries}
    module = ClosedFormFit(decoder, depths, recipe.fit_boundary, **given)
    return lambda: module.validation_step(batch, 0)


def _fit_selectors(decoder: Decoder, batch: dict, recipe: Recipe, depths: list[int]) -> Callable[[], object]:
    module = SelectorFit({depth: KVProjections(decoder, depth) for depth in depths}, recipe.fit_boundary)
    return lambda: module.validation_step(batch, 0)


def _evaluate(decoder: Decoder, batch: dict, plans: list[PruningPlan]) -> Callable[[], object]:
    maps = {depth: KVProjections(decoder, depth) for depth in {plan.depth for plan in plans}}
    # A fitted selector has no weight here; the one that needs none reads the same attention.
    plans = [replace(plan, selector="attention") for plan in plans]
    module = Evaluation(decoder, {str(name): Variant(plan, maps[plan.depth]) for name, plan in enumerate(plans)})
    return torch.no_grad()(lambda: module.validation_step(batch, 0))


def _train(decoder: Decoder, batch: dict, recipe: Recipe, depth: int) -> Callable[[], object]:
    """A training step with its optimizer's; a learning rate of 0 leaves everything as it is."""
    module = training_module(recipe, KVProjections(decoder, depth), Kept(recipe.fit_boundary))
    optimizer = torch.optim.AdamW([module.parameter_group() | {"lr": 0.0}])

    def step() -> None:
        module.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
