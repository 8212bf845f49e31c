"""KVProjectionTraining: distill the unpruned model into the projections; the base stays frozen.

Teacher and student share everything below the depth, so a step is a full forward without a graph, and a small forward
and backward of the pruned layers on boundary and response tokens (:func:`~.passes.student_hidden`). Logits are computed
for a chunk of positions at a time, and again in the backward pass, which bounds their memory for large vocabularies.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError, Key
from pop_lightning.core.plan import PruningPlan
from pop_lightning.fitting.finite import check_maps
from pop_lightning.fitting.kinds import trained_kind
from pop_lightning.models.decoder import Decoder, Trace
from pop_lightning.models.loading import as_decoder
from pop_lightning.pruning.module import DecoderModule
from pop_lightning.pruning.passes import at_loss_positions, student_hidden, teacher_trace
from pop_lightning.pruning.projections import KVProjections, fingerprint

# What to do about a training that diverged; a resumed run would continue from the diverged values.
_LOWER = ("start again (pop-fit --overwrite) with a lower ", Key("projection.learning_rate"))
Decay = Literal["cosine", "linear"]
CHUNK_LOGITS = 2**26  # logits in memory at a time per model: 256 MiB in float32


def chunked_kl(
    decoder: Decoder, student: Tensor, teacher: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """T^2 KL(teacher || student) at temperature T, mean over positions, from the inputs of the final norm.

    With several processes the mean is over the positions of all: each process returns its own part times the number of
    processes, so that the gradients that DDP and ZeRO average are the gradient of that mean.

    Args:
        student, teacher: ``[positions, hidden]``, of this process; ``teacher`` gets no gradient.
        chunk: positions whose logits are in memory at a time; as many as :data:`CHUNK_LOGITS` allows unless given.

    Returns:
        A scalar, float32. With several chunks, the backward pass computes their logits again.
    """

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            target = (decoder.logits(teacher).float() / temperature).log_softmax(-1)
        output = (decoder.logits(student).float() / temperature).log_softmax(-1)
        return torch.nn.functional.kl_div(output, target, log_target=True, reduction="sum")

    chunk = chunk or max(1, CHUNK_LOGITS // decoder.config.vocab_size)
    positions = distributed.counts(len(student), student.device)
    chunks = -(-max(positions) // chunk)  # the same number in every process: all gather sharded weights together
    if chunks <= 1:
        total = divergence(student, teacher)
    else:
        total = sum(
            torch.utils.checkpoint.checkpoint(divergence, *pair, use_reentrant=False)
            for pair in zip(student.tensor_split(chunks), teacher.tensor_split(chunks), strict=True)
        )
    return temperature**2 * total * len(positions) / sum(positions)


class KVProjectionTraining(DecoderModule):
    """Train the projections of one depth, starting from their current maps.

    ``Trainer.fit`` reads the rows of the ``fit`` split, and validates on those of ``tune``.

    Loss: ``T^2 KL(teacher || student)`` averaged over the loss positions t = N..T-1, at temperature T, plus
    ``kv_match`` times the squared error of the context's keys and values (before k_norm and RoPE) and ``hidden_match``
    times that of the hidden states of boundary and response tokens, both relative to the full model's mean square and
    averaged over the pruned layers. ``loss`` is logged, and its terms if there are several.

    Args:
        start: projections, which are trained in place; or a base, whose training starts from reuse: a hub id or
            folder, a Transformers model, or a decoder.
        depth: the first pruned layer; that of the projections unless given.
        boundary, salient, selector: of the plan, see :class:`PruningPlan`.
        kind: ``full`` or ``lora``. Projections with parameters that already require a gradient are trained unchanged.
        kind_arguments: of the kind, such as ``r`` and ``lora_alpha`` of lora.
        temperature: of the distillation.
        seed: of the adapters' initial values and, together with the step, of dropout.
        learning_rate: the peak, reached after the ``warmup`` share of the steps, followed by a decay to zero.
        decay: shape of the decay.
        round_steps: length of one rise and decay of the learning rate, which repeats if training continues after it;
            the whole training unless given.
        gradient_checkpointing: run the pruned layers again in the backward pass instead of keeping their activations.

    Raises:
        InputError: ``depth`` is missing or differs from that of the projections, nothing can be trained at it, or a
            setting is out of its range.

    ``load_from_checkpoint`` loads the base by its name, or needs ``start=`` again. Checkpoints hold only the trained
    parameters; adapters need the start that they were trained on.
    """

    split = "tune"

    def __init__(
        self,
        start: KVProjections | Decoder | PreTrainedModel | str | Path,
        depth: int | None = None,
        boundary: int | float = 1,
        salient: int | float = 0,
        selector: str = "attention",
        *,
        kind: str = "full",
        kind_arguments: Mapping[str, Any] | None = None,
        temperature: float = 2.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
        decay: Decay = "cosine",
        round_steps: int | None = None,
        kv_match: float = 0.0,
        hidden_match: float = 0.0,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ):
        start = str(start) if isinstance(start, Path) else start  # a name, which checkpoints can hold
        projections = start if isinstance(start, KVProjections) else _reuse(start, depth)
        depth = projections.depth if depth is None else depth  # of the checkpoint too
        super().__init__(projections.decoder)
        self.save_hyperparameters(ignore=() if isinstance(start, str) else "start")
        self.strict_loading = False  # checkpoints hold the trained parameters, never the base
        self.plan, self.temperature, self.seed = PruningPlan(depth, boundary, salient, selector), temperature, seed
        self.learning_rate, self.weight_decay, self.warmup, self.decay = learning_rate, weight_decay, warmup, decay
        self.round_steps = round_steps
        self.kv_match, self.hidden_match = kv_match, hidden_match
        self.gradient_checkpointing = gradient_checkpointing
        for name, value in (("temperature", temperature), ("learning_rate", learning_rate)):
            if not value > 0:
                raise InputError(f"{name} must be above 0, found {value}.")
        if decay not in get_args(Decay):
            raise InputError(f"decay must be one of {', '.join(get_args(Decay))}, found {decay!r}.")
        if depth != projections.depth:
            raise InputError(f"the projections to train were made for depth {projections.depth}, not for {depth}.")
        if not projections.fitted_layers:
            raise InputError(
                f"nothing can be trained at depth {depth}, where projections are exact: choose a smaller depth."
            )
        self.projections, self.kind = projections, trained_kind(kind)
        self._prepared: tuple[nn.Module | None] = (None,)  # in a tuple, so that it is not a submodule
        if not any(parameter.requires_grad for parameter in projections.parameters()):
            torch.manual_seed(seed)
            self._prepared = (self.kind.prepare(projections, **(kind_arguments or {})),)

    def trained(self, folder: Path | None = None) -> KVProjections:
        """The projections for an artifact: adapters merged, in the base's dtype. They cannot be trained further.

        Args:
            folder: if given, adapters are saved there first, in peft's format.

        Raises:
            InputError: a trained value is not finite, or is not once it is in the base's dtype.
        """
        stage = f"training of kind {self.kind.name}"
        check_maps(self.projections, stage, _LOWER)
        trained = self.kind.finish(self.projections, *self._prepared, folder).copy(self.kind.name)
        check_maps(trained, stage, ("choose another ", Key("model.dtype"), " or ", *_LOWER))
        return trained

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if checkpoint.get("start") not in (None, self._start()):
            raise InputError(
                "the adapters of this checkpoint were trained on different projections: pass as start the projections "
                "that the training started from."
            )
        # Other names would be skipped, since checkpoints never hold the base; DeepSpeed loads them in its own way.
        if "state_dict" in checkpoint and set(checkpoint["state_dict"]) != self._trained_names():
            raise InputError(
                f"the checkpoint holds other parameters than a training of kind {self.kind.name} at depth "
                f"{self.plan.depth}: give one of the same kind and depth."
            )

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["start"] = self._start()
        trained = self._trained_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}

    def _start(self) -> str | None:
        """A hash of the weights that the trained parameters are added to; None if they replace them."""
        if self.kind.replaces_start:
            return None
        return fingerprint({name: p for name, p in self.projections.named_parameters() if not p.requires_grad})

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        # Checkpoints do not hold the random generator's state: seeding from the step makes a resumed run the same.
        torch.manual_seed((self.seed * 1_000_003 + self.global_step) * distributed.size() + distributed.rank())
        terms = self._terms(batch)
        loss = sum(terms.values())
        if not loss.isfinite():  # the next checkpoint would hold NaN, and every resumed run start from it
            raise InputError(
                f"training of kind {self.kind.name}: the loss at depth {self.plan.depth} is {loss.item()} at step "
                f"{self.global_step}",
                advice=_LOWER if self.global_step else ("choose another ", Key("model.dtype")),
            )
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        if len(terms) > 1:
            self.log_dict({f"loss/{name}": term.detach() for name, term in terms.items()}, sync_dist=True)
        return loss

    def validation_step(self, batch: dict, batch_index: int) -> None:
        # Weighted by the positions of all processes, so that the mean over batches is the mean over positions.
        positions = batch["attention_mask"][:, batch["prompt_length"] :].sum()
        weight = int(distributed.total(positions))
        self.log("validation_loss", self.loss(batch), prog_bar=True, sync_dist=True, batch_size=weight)

    def loss(self, batch: dict, trace: Trace | None = None) -> Tensor:
        """The loss of a batch; ``trace`` is its :func:`teacher_trace`, computed here unless given."""
        return sum(self._terms(batch, trace).values())

    def _terms(self, batch: dict, trace: Trace | None = None) -> dict[str, Tensor]:
        """The terms whose sum is the loss."""
        decoder, mask, prompt = self.decoder, batch["attention_mask"], batch["prompt_length"]
        trace = teacher_trace(decoder, batch, self.plan.depth) if trace is None else trace
        with decoder.tracing(range(self.plan.depth, decoder.num_layers)) as pruned:
            student = student_hidden(
                self.projections, self.plan, trace, mask, prompt, checkpoint=self.gradient_checkpointing
            )
        real = mask[:, prompt:].bool()
        teacher = at_loss_positions(decoder, trace, prompt)
        terms = {"kl": chunked_kl(decoder, student[real], teacher[real], self.temperature)}
        if self.kv_match:
            terms["kv"] = self.kv_match * self._kv_error(trace, mask, prompt)
        if self.hidden_match:
            terms["hidden"] = self.hidden_match * self._hidden_error(trace, pruned, mask, prompt)
        return terms

    def _kv_error(self, trace: Trace, mask: Tensor, prompt: int) -> Tensor:
        context = self.plan.context_of(prompt)
        real = mask[:, :context].bool()
        hidden = trace.hidden[self.plan.depth][:, :context]
        normed = self.decoder.normalize(hidden)
        errors = []
        for layer in self.projections.fitted_layers:
            with torch.no_grad():
                target = self.decoder.own_kv(layer, trace.hidden[layer][:, :context])[real]
            errors.append(_relative_error(self.projections(layer, hidden, normed)[real], target))
        return torch.stack(errors).mean()

    def _hidden_error(self, trace: Trace, pruned: Trace, mask: Tensor, prompt: int) -> Tensor:
        tokens = mask.shape[1] - 1
        context = self.plan.context_of(prompt)
        real = mask[:, context:tokens].bool()
        errors = [
            _relative_error(
                pruned.hidden[layer][:, -real.shape[1] :][real], trace.hidden[layer][:, context:tokens][real]
            )
            for layer in range(self.plan.depth + 1, self.decoder.num_layers + 1)
        ]
        return torch.stack(errors).mean()

    def configure_optimizers(self):
        return _optimizer([self], self.trainer)

    def parameter_group(self) -> dict:
        """The trained parameters, as an optimizer's parameter group."""
        parameters = [p for p in self.projections.parameters() if p.requires_grad]
        return {"params": parameters, "lr": self.learning_rate, "weight_decay": self.weight_decay}


class JointTraining(DecoderModule):
    """Several trainings of different depths, kinds and learning rates on the same batches, with one teacher pass.

    Their losses are summed and share no parameter, so each training is the same as a separate one (except for gradient
    clipping, which would apply to all of them together). Warm-up and decay are those of the first.
    """

    def __init__(self, trainings: list[KVProjectionTraining]):
        super().__init__(trainings[0].decoder)
        self.trainings = nn.ModuleList(trainings)

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        trace = teacher_trace(self.decoder, batch, min(training.plan.depth for training in self.trainings))
        return sum(training.loss(batch, trace) for training in self.trainings)

    def configure_optimizers(self):
        return _optimizer(list(self.trainings), self.trainer)


def _optimizer(trainings: list[KVProjectionTraining], trainer: lightning.Trainer) -> dict:
    optimizer = torch.optim.AdamW([training.parameter_group() for training in trainings])
    first = trainings[0]
    steps = first.round_steps or max(1, int(trainer.estimated_stepping_batches))
    factor = partial(learning_rate_factor, steps=steps, warmup=round(first.warmup * steps), decay=first.decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def learning_rate_factor(step: int, *, steps: int, warmup: int, decay: Decay) -> float:
    """The share of the peak at ``step``: up from zero over ``warmup`` steps, down to zero at ``steps``, repeating."""
    step %= steps
    if step < warmup:
        return step / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)
    return left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2


def _reuse(base: Decoder | PreTrainedModel | str, depth: int | None) -> KVProjections:
    if depth is None:
        raise InputError("training from a base needs the depth to prune it at: pass depth=.")
    return KVProjections(as_decoder(base), depth)


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The squared error over the mean square of ``target``; over several processes as in :func:`chunked_kl`."""
    size = distributed.total(target.float().square().sum()).clamp(min=1e-12)
    return distributed.size() * (output.float() - target.float()).square().sum() / size
