"""KVProjectionTraining: distil the unpruned model into the projections; the base stays frozen.

Teacher and student share everything below the depth, so a step is one full forward without graph and a small forward
and backward of the pruned layers on boundary and response tokens (``prefill.student_logits``).
"""

import lightning
import torch
from torch import Tensor

from pop_lightning.decoder import Decoder, Trace, position_ids
from pop_lightning.plan import PruningPlan
from pop_lightning.prefill import student_logits
from pop_lightning.projections import KVProjections


@torch.no_grad()
def teacher_pass(decoder: Decoder, batch: dict, first: int) -> tuple[Trace, Tensor]:
    """One full pass: inputs of layers ``first`` and up, and logits at the loss positions ``[batch, response, V]``."""
    mask, prompt = batch["attention_mask"], batch["prompt_length"]
    with decoder.tracing(range(first, decoder.num_layers)) as trace:
        logits = decoder.model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            logits_to_keep=mask.shape[1] - prompt + 1,
        ).logits[:, :-1]
    return trace, logits


class KVProjectionTraining(lightning.LightningModule):
    """Train the fitted layers' W', b' of one depth (``full``), starting from what they are.

    Loss: ``T^2 KL(teacher || student)`` averaged over the loss positions t = N..T-1, at temperature T.

    Args:
        projections: where training starts; closed form, as a rule. Changed in place.
        temperature: of the distillation.
        learning_rate: the peak: reached over the ``warmup`` share of the steps, then a cosine decay to zero.
    """

    def __init__(
        self,
        projections: KVProjections,
        plan: PruningPlan,
        *,
        temperature: float = 2.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.1,
    ):
        super().__init__()
        self.plan, self.temperature = plan, temperature
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.decoder = projections.decoder
        self.base = self.decoder.model
        self.projections = projections
        projections.replace({layer: projections.affine(layer) for layer in projections.fitted_layers}, "full")
        for layer in projections.fitted_layers:
            projections.maps[str(layer)].float().requires_grad_(True)  # masters in float32, whatever the base is

    def on_fit_start(self):
        self.base.eval()

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, batch_index: int) -> None:
        self.log("validation_loss", self.loss(batch), prog_bar=True, batch_size=len(batch["input_ids"]))

    def loss(self, batch: dict) -> Tensor:
        trace, teacher = teacher_pass(self.decoder, batch, self.plan.depth)
        student = student_logits(self.projections, self.plan, trace, batch["attention_mask"], batch["prompt_length"])
        mask = batch["attention_mask"][:, batch["prompt_length"] :].bool()
        teacher_logp = (teacher[mask].float() / self.temperature).log_softmax(-1)
        student_logp = (student[mask].float() / self.temperature).log_softmax(-1)
        divergence = torch.nn.functional.kl_div(student_logp, teacher_logp, log_target=True, reduction="batchmean")
        return self.temperature**2 * divergence

    def configure_optimizers(self):
        parameters = [p for p in self.projections.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=steps + 1, pct_start=self.warmup
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
