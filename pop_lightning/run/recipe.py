"""The recipe: every choice of a ``pop-fit`` run as typed dataclasses.

The fields below are the only place that knows a key, its type, its range and its meaning: validation, ``--help``, the
JSON schema for editors (``--schema``) and every error message follow from them (``invocation.py``, which reads them).
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from pop_lightning.core.errors import InputError
from pop_lightning.core.kinds import KINDS, SELECTORS
from pop_lightning.core.plan import Kept, in_order
from pop_lightning.evaluation.losses import METRICS, BudgetMetric, metric_named
from pop_lightning.run import trainer_arguments, yaml_text

# YAML has types of its own, so nothing is converted: true is not 1, and "2" is not 2.
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
AtLeast0 = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, gt=0, lt=1)]
Tokens = Index | Share  # a number of prompt tokens, or a share of the prompt
_NO_PROBE = "needs a boundary of at least 1, whose last token selects the salient ones"
Flag = Annotated[bool, Field(strict=True)]
Words = Annotated[str, Field(pattern=r"\S")]
Place = Annotated[Words, AfterValidator(os.path.expanduser)]  # a path, or a name that is not one
TrainerArguments = trainer_arguments.typed()
TOGETHER = "together"

section = partial(dataclass, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))


def _together(problem: str, key: str, found: str) -> PydanticCustomError:
    """An error of several values together, which pydantic collects with the others."""
    return PydanticCustomError(TOGETHER, "{key} {problem}", {"problem": problem, "key": key, "found": found})


@section
class Model:
    """The base model and how it is loaded."""

    base: Place = Field(description="hub id, folder or bundled:NAME of the base model")
    revision: Words | None = Field(None, description="commit or tag of the hub repository; null: the newest")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: as the checkpoint is stored"
    )
    attn_implementation: Words | None = Field(None, description="such as sdpa or eager; null: Transformers' choice")
    trust_remote_code: Flag = Field(False, description="run code that comes with the model")
    device_map: Words | dict | None = Field(None, description="null: one device, as trainer says; auto: several")


@section
class Splits:
    """Shares of the calibration rows; they sum to 1, and no row is in two of them."""

    fit: Share = Field(0.3, description="to score the layers and fit the projections")
    tune: Share = Field(0.1, description="to choose the ridge strength")
    search: Share = Field(0.2, description="to choose the depths to verify")
    verify: Share = Field(0.4, description="used once, for the certified bound")

    @model_validator(mode="after")
    def _sum(self):
        total = self.fit + self.tune + self.search + self.verify
        if abs(total - 1) > 1e-6:
            raise _together("must sum to 1 (fit + tune + search + verify)", "data.splits", f"{total:g}")
        return self


@section
class Data:
    """The calibration data and its lengths, in tokens."""

    calibration: Place | Annotated[list[Place], Field(min_length=1)] = Field(
        description="JSON Lines or text file, hub dataset or bundled:NAME/FILE; a list combines several"
    )
    split: Words | None = Field(None, description="split of a hub dataset; null: train")
    name: Words | None = Field(None, description="configuration of a hub dataset that has several")
    columns: dict[Words, Words] | None = Field(
        None, description="keys of the rows that have other names, as in {prompt: question, response: answer}"
    )
    max_prompt_tokens: Count = Field(2048, description="rows with a longer prompt are left out; plain text is cut")
    max_response_tokens: Count = Field(256, description="longer responses are cut")
    limit: Count | None = Field(None, description="number of rows to use, sampled by their content; null: all")
    batch_size: Count = Field(8, description="rows per forward pass; lower it first when memory runs out")
    allow_urls: Flag = Field(False, description="fetch images and videos that rows name by URL")
    splits: Splits = field(default_factory=Splits)

    @property
    def sources(self) -> list[str]:
        """``calibration`` as a list."""
        return [self.calibration] if isinstance(self.calibration, str) else self.calibration


@section
class Importance:
    """How the layers are scored."""

    rows: Count = Field(64, description="rows of the fit split to score on")
    batch_size: Count | None = Field(None, description="rows per backward pass; null: data.batch_size")
    gradient_checkpointing: Flag = Field(
        False, description="keep one layer's activations at a time, at about 1.5x the operations"
    )

    def rows_at_a_time(self, data: Data) -> int:
        """Of one process; its backward pass keeps more of a row than any other stage does."""
        return self.batch_size or data.batch_size


@section
class Lora:
    """The low-rank adapters of kind ``lora``, named as in peft."""

    r: Count = Field(16, description="rank")
    lora_alpha: Positive = Field(16.0, description="scale, divided by r")
    lora_dropout: Annotated[float, Field(strict=True, ge=0, lt=1)] = Field(0.0, description="dropout in training")
    use_rslora: Flag = Field(False, description="divide lora_alpha by sqrt(r) instead of r")


@section
class Projection:
    """Where the pruned layers' keys and values come from, and how those maps are fitted."""

    kind: Literal[*KINDS] = Field(
        "closed_form", description="reuse: nothing fitted; closed_form: regression; lora and full: trained"
    )
    ridge: Annotated[list[Positive], Field(min_length=1)] = Field(
        [0.0001, 0.001, 0.01, 0.1, 1.0],
        description="strengths to choose from on the tune split; a large one is close to reuse",
    )
    grouping: Literal["auto", "head", "layer", "none"] = Field(
        "auto",
        description="values fitted per head, per layer or for all tokens alike; auto: the finest that fits in one pass",
    )
    queries: Count = Field(
        24, description="boundary and response tokens per row whose attention weights the regression"
    )
    refit: Flag = Field(True, description="fit a second time, with the attention of the pruned model's queries")
    memory_gib: Positive = Field(
        8.0, description="limit for running sums and candidate maps; what does not fit is fitted in further passes"
    )
    start: Literal["closed_form", "reuse"] = Field("closed_form", description="where lora and full start")
    lora: Lora = field(default_factory=Lora)
    steps: Count = Field(100, description="training steps of lora and full")
    learning_rate: Positive = Field(1e-3, le=1e30, description="peak learning rate")
    temperature: Positive = Field(2.0, description="temperature of the distillation")
    warmup: Annotated[float, Field(strict=True, ge=0, le=1)] = Field(
        0.1, description="share of steps with a rising rate"
    )
    decay: Literal["cosine", "linear"] = Field("cosine", description="how the learning rate falls after that")
    weight_decay: AtLeast0 = Field(0.0, le=1e6, description="of AdamW")
    kv_match: AtLeast0 = Field(0.0, description="weight of the error of projected keys and values in the loss")
    hidden_match: AtLeast0 = Field(
        0.0, description="weight of the error of the pruned layers' hidden states in the loss"
    )
    gradient_checkpointing: Flag = Field(False, description="run the pruned layers again in the backward pass")
    batch_size: Count | None = Field(None, description="rows per training step; null: data.batch_size")
    checkpoint_every: Count = Field(50, description="steps between Lightning checkpoints, which --resume starts from")

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)


@section
class Budget:
    """How much may be lost, or how fast it must be, and which depths are tried."""

    metric: Literal[*METRICS] = Field(
        "agreement", description="agreement: same next token; exact_match: same response; nll_increase: nats per token"
    )
    max_drop: AtLeast0 = Field(0.01, description="largest loss: an absolute fraction; for nll_increase nats")
    nll_cap: Positive = Field(
        1.0, description="nats per token at which the losses of nll_increase are clipped, which makes its bound valid"
    )
    speedup: Annotated[float, Field(strict=True, gt=1)] | None = Field(
        None, description="prefill speedup to reach with the smallest loss; max_drop is ignored then"
    )
    confidence: Annotated[float, Field(strict=True, gt=0.5, lt=1)] = Field(0.95, description="of the certified bound")
    min_pruned: Count = Field(2, description="nothing is exported if fewer layers can be pruned")
    candidates: Count | Annotated[list[Count], Field(min_length=1)] | Literal["all"] = Field(
        8, description="number of depths to try, chosen by importance; or a list of depths; or all"
    )
    boundaries: list[Tokens] = Field(
        [1, 4, 16, 64], description="boundaries to report loss and cost for, and to choose from if boundary is auto"
    )
    salient: Tokens | list[Tokens] = Field(
        [0, 0.05, 0.1, 0.2],
        description="values to choose from if salient is auto; 0 selects no tokens, for engines that cannot",
    )
    extensions: Index = Field(
        2, description="further rounds of `steps` that lora and full may train if they could change the choice"
    )

    @property
    def loss(self) -> BudgetMetric:
        """The metric, with its cap."""
        return metric_named(self.metric, self.nll_cap)

    @model_validator(mode="after")
    def _fraction(self):
        metric = self.loss
        if metric.rate and self.max_drop > 1:
            problem = f"is an absolute fraction, at most 1 for {self.metric}"
            raise _together(problem, "budget.max_drop", f"{self.max_drop:g}")
        if not metric.rate and self.max_drop >= metric.cap and self.speedup is None:
            problem = (
                f"must be below budget.nll_cap, {metric.cap:g}, where losses are clipped: it would promise nothing"
            )
            raise _together(problem, "budget.max_drop", f"{self.max_drop:g}")
        return self


@section
class Recipe:
    """Every choice of a run. ``trainer`` holds arguments of ``lightning.Trainer`` as plain data."""

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = Field(
        0, description="seed of splits, targets and training"
    )
    output: Place = Field("runs/pop", description="folder of the run")
    boundary: Tokens | Literal["auto"] = Field(
        "auto",
        description="prompt tokens at the end that run in full, a number or a share; auto: one of budget.boundaries",
    )
    salient: Tokens | Literal["auto"] = Field(
        0,
        description="context tokens that run in full as well, a number or a share; auto: one of budget.salient",
    )
    selector: Literal[*SELECTORS] = Field("attention", description="how the salient tokens are selected")
    depth: Count | None = Field(
        None,
        description="export this depth whatever its measured loss and bound; null: the budget decides",
    )
    model: Model
    data: Data
    importance: Importance = field(default_factory=Importance)
    projection: Projection = field(default_factory=Projection)
    budget: Budget = field(default_factory=Budget)
    trainer: TrainerArguments = field(default_factory=lambda: dict(trainer_arguments.DEFAULTS))

    @model_validator(mode="after")
    def _choices(self):
        if self.boundary == "auto" and not self.budget.boundaries:
            problem = "must name what boundary: auto chooses from"
            raise _together(problem, "budget.boundaries", "an empty list")
        if self.boundary == 0 and self.salient not in (0, "auto"):
            raise _together(_NO_PROBE, "salient", str(self.salient))
        if self.depth is not None and self.budget.speedup is not None:
            raise _together(
                "already fixes what budget.speedup would choose; set only one of them", "depth", str(self.depth)
            )
        return self

    @property
    def fit_boundary(self) -> int:
        """The boundary that layers are scored and projections are fitted at.

        Fitting does not wait for the choice of a boundary: k = 1 leaves the most context tokens to fit on, and what is
        a good key or value of a token does not depend on k.
        """
        return self.boundary if isinstance(self.boundary, int) else 1

    def kept(self, boundaries: Sequence[int | float]) -> list[Kept]:
        """What may run in full, the least first.

        A depth that is given leaves nothing to choose by: ``auto`` is the paper's choice then.

        Args:
            boundaries: those of ``budget.boundaries`` that the rows allow.

        Raises:
            InputError: salient tokens are asked for, and no boundary is left that could choose them.
        """

        listed = self.budget.salient if isinstance(self.budget.salient, list) else [self.budget.salient]
        searched = {"boundary": boundaries or [min(self.budget.boundaries)], "salient": listed or [0]}
        if self.depth is not None:
            searched = {"boundary": [1], "salient": [0]}
        ways = {name: each if (given := getattr(self, name)) == "auto" else [given] for name, each in searched.items()}
        pairs = {
            Kept(boundary, salient, self.selector) if salient else Kept(boundary)  # equal to what is read back
            for boundary in ways["boundary"]
            for salient in ways["salient"]
            if boundary or not salient
        }
        if not pairs:
            raise InputError(_NO_PROBE, key="salient", found=self.salient)
        return in_order(pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, every value named; of ``trainer`` those that differ from Lightning's defaults."""
        return asdict(self)

    def to_yaml(self) -> str:
        return yaml_text.dump(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write a file that ``--recipe`` reads back as this recipe."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def data_arguments(self) -> dict[str, Any]:
        """The recipe's keyword arguments for ``CalibrationData``; the others follow from the base."""
        settings = asdict(self.data)
        del settings["calibration"]
        return settings | {"seed": self.seed}

    def trainer_arguments(self, without: Sequence[str] = ()) -> dict[str, Any]:
        """Keyword arguments for ``lightning.Trainer``; ``class_path`` entries are imported and become objects.

        Args:
            without: keys that are left at their defaults, so that their objects are not made.
        """
        # A copy: jsonargparse puts the objects that it makes into the lists that it is given.
        kept = {key: value for key, value in self.trainer.items() if key not in without}
        return trainer_arguments.instantiate(copy.deepcopy(kept), self.output)
