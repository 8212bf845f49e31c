"""What each stage of a fit takes in bytes and operations: its own modules' steps, dry, over a base on the meta device.

The preflight asks here for a recipe's stages at given lengths and turns the answer into memory per device, hardware and
time. The steps are written once: on a real base the same ones are timed.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from pop_lightning.core.plan import Choice, PruningPlan
from pop_lightning.data.module import collate
from pop_lightning.data.rows import Row
from pop_lightning.evaluation.evaluate import Evaluation, Variant, groups
from pop_lightning.fitting.closed_form import fit_depths
from pop_lightning.fitting.importance import ImportanceScoring
from pop_lightning.fitting.kinds import kind, trained_kind
from pop_lightning.fitting.regressions import ClosedFormFit, ValueRefit
from pop_lightning.fitting.training import KVProjectionTraining
from pop_lightning.models.decoder import Decoder
from pop_lightning.models.positions import position_ids
from pop_lightning.pruning.passes import teacher_pass
from pop_lightning.pruning.projections import KVProjections
from pop_lightning.run.depths import closed_form_passes
from pop_lightning.run.dry_run import DryRun
from pop_lightning.run.recipe import Recipe


@dataclass(frozen=True)
class Cost:
    """One stage. Bytes come on top of the base's weights.

    Attributes:
        name: as the preflight prints it.
        rows: which it reads: a split, ``responses`` (rows without one), ``importance`` or ``steps`` (of training).
        flops: operations per row, 2 per multiply-add.
        once: operations that do not depend on rows (the closed form's solutions).
        kept: bytes that stay between its batches: projections, running sums, masters and optimiser.
        peak: the most bytes alive at one time, ``kept`` included.
        shared: bytes of ``peak`` that DeepSpeed spreads over devices: gradients and optimiser states.
        gradients: bytes of the gradients alone, of which several processes hold a second copy to send.
        pace: which of :meth:`Steps.all` its time follows from.
    """

    name: str
    rows: str
    flops: float
    kept: int
    peak: int
    pace: str
    once: float = 0
    shared: int = 0
    gradients: int = 0


def batch_of(rows: int, prompt: int, response: int) -> dict:
    """A batch of ``rows`` rows as the pipeline collates them; of several the last is shorter, as in real batches."""
    made = [Row((5,) * prompt, (5,) * response, f"row {row}") for row in range(rows - 1)]
    made.append(Row((5,) * max(1, prompt - (rows > 1)), (5,) * response, "last row"))
    return collate(made, 0)


class Steps:
    """One step of each kind on one batch, over a base that is real or on the meta device.

    Args:
        depths: those to be fitted and measured, shallowest pruning first.
        scored: the batch that layers are scored on, where that is another one.
    """

    def __init__(
        self, decoder: Decoder, recipe: Recipe, depths: Sequence[int], batch: dict, scored: dict | None = None
    ):
        self.decoder, self.recipe, self.depths = decoder, recipe, list(depths)
        self.batch = self._placed(batch)
        self.scored = self.batch if scored is None else self._placed(scored)

    def _placed(self, batch: dict) -> dict:
        moved = ("input_ids", "attention_mask")
        return {name: each.to(self.decoder.model.device) if name in moved else each for name, each in batch.items()}

    def all(self, *, responses: bool) -> dict[str, Callable[[], object]]:
        """The steps that the recipe's stages are made of, by name."""
        steps = {"scoring": self.scoring(), "evaluate": self.evaluate()}
        if responses:
            steps |= {"prefill": self.prefill, "decode": self.decode()}
        if fits_closed_form(self.recipe):
            steps["fit"] = self.fit()
        if kind(self.recipe.projection.kind).trains and (depth := self.trained()[:1]):
            steps["train"] = self.train(depth[0], KVProjections(self.decoder, depth[0]))[0]
        return steps

    def trained(self) -> list[int]:
        """The depths with something to train, deepest pruning first."""
        return [depth for depth in reversed(self.depths) if depth < self.decoder.num_layers - 1]

    def prefill(self) -> Cache:
        """The prompts, into a new cache."""
        prompt = self.batch["prompt_length"]
        return self._read(self.batch["input_ids"][:, :prompt], self.batch["attention_mask"][:, :prompt])

    def decode(self) -> Callable[[], object]:
        """One token for every row behind a cache of all that the rows hold; each call reads one more."""
        ids, mask = self.batch["input_ids"][:, :-1], self.batch["attention_mask"][:, :-1]
        cache = self._read(ids, mask)

        def once():
            longer = nn.functional.pad(mask, (0, cache.get_seq_length() + 1 - mask.shape[1]), value=1)
            self._read(ids[:, -1:], longer, cache)

        return once

    @torch.no_grad()
    def _read(self, ids: Tensor, mask: Tensor, cache: Cache | None = None) -> Cache:
        cache = self.decoder.new_cache() if cache is None else cache
        positions = position_ids(mask)[:, -ids.shape[1] :]
        self.decoder.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache

    def scoring(self) -> Callable[[], None]:
        checkpointing = self.recipe.importance.gradient_checkpointing
        module = ImportanceScoring(self.decoder, self.recipe.fit_boundary, gradient_checkpointing=checkpointing)
        return lambda: module.gradients(self.scored)

    def fit(self) -> Callable[[], None]:
        """The closed form's pass over as many depths as it reads at once."""
        grouping, groups = closed_form_passes(self.recipe, self.decoder, self.depths)
        module = ClosedFormFit(
            self.decoder, groups[0], self.recipe.fit_boundary, grouping=grouping, queries=self.recipe.projection.queries
        )
        return lambda: module.validation_step(self.batch, 0)

    def evaluate(self) -> Callable[[], None]:
        """One variant per depth."""
        variants = {
            str(depth): Variant(PruningPlan(depth, self.recipe.fit_boundary), KVProjections(self.decoder, depth))
            for depth in self.depths
        }
        return self.validation(Evaluation(self.decoder, variants))

    def validation(self, module: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def once() -> None:
            module.validation_step(self.batch, 0)

        return once

    def train(self, depth: int, start: KVProjections) -> tuple[Callable[[], None], dict]:
        """A training step with its optimiser's, and the parameter group that is trained."""
        settings = self.recipe.projection
        module = KVProjectionTraining(
            start.copy(),
            boundary=self.recipe.fit_boundary,
            kind=settings.kind,
            kind_arguments=trained_kind(settings.kind).arguments(settings),
            temperature=settings.temperature,
            kv_match=settings.kv_match,
            hidden_match=settings.hidden_match,
            gradient_checkpointing=settings.gradient_checkpointing,
        )
        group = module.parameter_group() | {"lr": 0.0}
        optimizer = torch.optim.AdamW([group])

        def once() -> None:
            module.loss(self.batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return once, group


def fits_closed_form(recipe: Recipe) -> bool:
    """Whether the recipe's projections are, or start from, a closed form."""
    return kind(recipe.projection.kind).starts_from(recipe.projection) == "closed_form"


def operations(
    decoder: Decoder,
    recipe: Recipe,
    depths: Sequence[int],
    batch: dict,
    scored: dict | None = None,
    *,
    responses: bool,
) -> dict[str, int]:
    """Operations of every step on one batch (of scoring on ``scored``, where given), dry."""
    found = {}
    with DryRun() as run:
        for name, step in Steps(decoder, recipe, depths, batch, scored).all(responses=responses).items():
            run.reset()
            step()
            found[name] = run.flops
    return found


def costs(
    decoder: Decoder,
    recipe: Recipe,
    depths: Sequence[int],
    *,
    prompt: int,
    response: int,
    boundaries: Sequence[int] = (),
    responses: bool = False,
    gpu: bool = False,
    devices: int = 1,
    only: str | None = None,
) -> list[Cost]:
    """Every stage of a fit, dry, in order.

    Args:
        decoder: over a model on the meta device.
        depths: candidates, shallowest pruning first.
        prompt, response: tokens of the rows of a batch.
        boundaries: those of ``budget.boundaries`` that are measured.
        responses: the full model writes responses first.
        gpu: count what a GPU's kernels take beside their results.
        devices: processes that share the rows of a training step.
        only: the name of a stage to run alone, with the others of its kind.

    Raises:
        InputError: the closed form's sums do not fit in ``projection.memory_gib``.
    """
    with DryRun(gpu=gpu) as run:
        return list(_Stages(run, decoder, recipe, depths, prompt, response, boundaries, devices).all(responses, only))


class _Stages:
    def __init__(
        self,
        run: DryRun,
        decoder: Decoder,
        recipe: Recipe,
        depths: Sequence[int],
        prompt: int,
        response: int,
        boundaries: Sequence[int],
        devices: int,
    ):
        self.run, self.decoder, self.recipe, self.depths = run, decoder, recipe, list(depths)
        self.prompt, self.response = prompt, response
        self.boundaries, self.devices = sorted(boundaries), devices
        self.evaluated: dict[frozenset, tuple[float, float, int]] = {}
        self.steps = self._steps(recipe.data.batch_size)

    def _steps(self, rows: int) -> Steps:
        return Steps(self.decoder, self.recipe, self.depths, batch_of(rows, self.prompt, self.response))

    def all(self, responses: bool, only: str | None) -> Iterator[Cost]:
        def wanted(kind: str) -> bool:
            return only is None or only.startswith(kind)

        if responses and wanted("responses"):
            yield from self._responses()
        if wanted("scoring"):
            with self._batch(self.recipe.importance.rows_at_a_time(self.recipe.data)):
                yield self._cost("scoring", "importance", self.steps.scoring(), pace="scoring")
        if fits_closed_form(self.recipe) and wanted("closed form"):
            yield from self._closed_form()
        settings = self.recipe.projection
        trains = kind(settings.kind).trains
        kinds = dict.fromkeys(("reuse", settings.start if trains else settings.kind))
        choices = [Choice(depth, kind) for depth in self.depths for kind in kinds]
        tried = [self.recipe.boundary]
        if self.recipe.boundary == "auto":
            tried = self.boundaries or [min(self.recipe.budget.boundaries)]
        if wanted("search"):
            yield self._evaluation("search", "search", choices, tried)
        if trains and wanted("training"):
            yield from self._training()
        # A wanted speedup leaves one depth once the boundary is chosen; the deepest stands for it.
        chosen = [Choice(depth, settings.kind) for depth in self._decided]
        if wanted("verify"):
            yield self._evaluation("verify", "verify", chosen, [self.recipe.fit_boundary])
        if self.boundaries and wanted("boundaries"):
            compared = sorted({*self.boundaries, *tried[:1]})
            yield self._evaluation("boundaries", "search", [Choice(min(self.depths), settings.kind)], compared)
        if wanted("comparison"):
            yield self._comparison(len(kinds) + trains)

    def _cost(self, name: str, rows: str, step: Callable[[], object], *, pace: str, repeats: int = 1, **others) -> Cost:
        """The last of ``repeats`` steps: the first may leave behind what its peak stands on (sums, optimiser)."""
        for _ in range(repeats - 1):
            step()
        self.run.reset()
        step()
        return Cost(
            name, rows, self.run.flops / self._rows, kept=self.run.held, peak=self.run.peak, pace=pace, **others
        )

    @property
    def _decided(self) -> list[int]:
        """The depths that are trained and verified."""
        return self.depths if self.recipe.budget.speedup is None else [min(self.depths)]

    @property
    def _rows(self) -> int:
        return len(self.steps.batch["input_ids"])

    def _responses(self) -> Iterator[Cost]:
        yield self._cost("responses: prompts", "responses", self.steps.prefill, pace="prefill")
        token = self._cost("responses: tokens", "responses", self.steps.decode(), pace="decode")
        yield Cost(**vars(token) | {"flops": token.flops * self.response})

    def _closed_form(self) -> Iterator[Cost]:
        settings, passed, solved, solving = self.recipe.projection, [], 0, 0

        def validate(what: str, module, rows: str) -> None:
            nonlocal solved, solving
            if passed:  # since the last pass: solutions of what it summed up
                solved, solving = solved + self.run.flops, max(solving, self.run.peak)
            if isinstance(module, Evaluation):
                passed.append(self._evaluate(module, "closed form: choice", rows))
                module.rows = lambda name: {"kl": torch.zeros(1)}
            else:
                second = isinstance(module, ValueRefit)
                name = "closed form: second pass" if second else "closed form: fit pass"
                passed.append(self._cost(name, rows, self.steps.validation(module), pace="fit", repeats=2))
            self.run.reset()

        self.run.reset()
        fitted = fit_depths(
            self.decoder,
            self.depths,
            boundary=self.recipe.fit_boundary,
            ridges=settings.ridge,
            fit_rows="fit",
            tune_rows="tune",
            validate=validate,
            grouping=settings.grouping,
            queries=settings.queries,
            refit=settings.refit,
            memory=settings.memory_bytes,
        )
        deque(fitted, maxlen=0)  # a loop's variable would hold each depth through the next pass
        for name in dict.fromkeys(each.name for each in passed):
            same = [each for each in passed if each.name == name]
            largest = max(same, key=lambda each: each.peak)
            flops, peak, once = sum(each.flops for each in same), largest.peak, 0
            if name == "closed form: choice":
                peak, once = max(peak, solving), solved
            yield Cost(**vars(largest) | {"flops": flops, "peak": peak, "once": once})

    def _training(self) -> Iterator[Cost]:
        settings, found = self.recipe.projection, []
        # The batch is that of all processes together; the one with most rows decides the memory.
        with self._batch(math.ceil((settings.batch_size or self.recipe.data.batch_size) / self.devices)):
            for depth in self.steps.trained():
                if depth not in self._decided:
                    continue
                step, group = self.steps.train(depth, KVProjections(self.decoder, depth))
                cost = self._cost("training", "steps", step, pace="train", repeats=2)
                trained = sum(each.nbytes for each in group["params"])
                if self.run.gpu:  # AdamW works on all parameters at once there, through a temporary copy of them
                    optimiser = cost.kept + 2 * trained
                    cost = Cost(**vars(cost) | {"peak": max(cost.peak, optimiser)})
                found.append(Cost(**vars(cost) | {"shared": 3 * trained, "gradients": trained}))
                del step, group
        if found:
            largest = max(found, key=lambda each: each.peak)
            yield Cost(**vars(largest) | {"flops": sum(each.flops for each in found)})

    @contextmanager
    def _batch(self, rows: int):
        usual = self.steps
        self.steps = self._steps(rows)
        try:
            yield
        finally:
            self.steps = usual

    def _evaluation(self, name: str, rows: str, choices: Sequence[Choice], boundaries: Sequence[int]) -> Cost:
        """A measurement on the split ``rows``, in as many passes as the pipeline makes of it."""
        memory, passed = self.recipe.projection.memory_bytes, []
        for group in groups(self.decoder, choices, memory):
            variants = {}
            for choice in group:
                projections = KVProjections(self.decoder, choice.depth)
                variants |= {f"{choice} {k}": Variant(PruningPlan(choice.depth, k), projections) for k in boundaries}
            passed.append(self._evaluate(Evaluation(self.decoder, variants), name, rows))
            del variants, projections
        largest = max(passed, key=lambda each: each.peak)
        return Cost(**vars(largest) | {"flops": sum(each.flops for each in passed)})

    def _evaluate(self, module: Evaluation, name: str, rows: str) -> Cost:
        """One variant of each way to prune stands for all of them: they come one after the other."""
        ways = {}
        for variant in module.variants.values():
            ways.setdefault((variant.plan, variant.context_visible, variant.remove_layers), variant)
        if (known := frozenset(ways)) not in self.evaluated:
            few = Evaluation(self.decoder, {str(number): each for number, each in enumerate(ways.values())})
            self.run.reset()
            teacher_pass(self.decoder, self.steps.batch, min(each.plan.depth for each in ways.values()))
            teacher = self.run.flops / self._rows
            cost = self._cost(name, rows, self.steps.validation(few), pace="evaluate")
            self.evaluated[known] = teacher, cost.flops - teacher, cost.peak - cost.kept
        teacher, students, above = self.evaluated[known]
        flops = teacher + students * len(module.variants) / len(ways)
        return Cost(name, rows, flops, kept=self.run.held, peak=self.run.held + above, pace="evaluate")

    def _comparison(self, kinds: int) -> Cost:
        """The deepest pruning in every way that the report compares, with ``kinds`` kinds of projections."""
        depth, boundary = min(self.depths), self.recipe.fit_boundary
        plan, fitted = PruningPlan(depth, boundary), [KVProjections(self.decoder, depth) for _ in range(kinds)]
        variants = {
            "full model": Variant(PruningPlan(self.decoder.num_layers), fitted[0]),
            **{f"kind {number}": Variant(plan, each) for number, each in enumerate(fitted)},
            "layers removed": Variant(plan, fitted[0], remove_layers=True),
            "no boundary handling": Variant(PruningPlan(depth, 0), fitted[0]),
            "no KV projection": Variant(plan, fitted[0], context_visible=False),
        }
        return self._evaluate(Evaluation(self.decoder, variants), "comparison", "search")
