"""What a notebook does with the modules, through an ordinary Trainer: in this process, or as a script that Lightning
starts again for each process. Writes the figures as JSON, one file per process."""

import json
import sys
import warnings
from functools import partial
from pathlib import Path

import lightning
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_lightning import CalibrationData, Evaluation, ImportanceScoring, KVProjectionTraining, closed_form

STEPS = 5  # an epoch, after which Lightning validates


def figures(base: Path, rows: Path, **arguments) -> dict:
    """Everything that is measured and trained; figures do not depend on the number of processes."""
    trainer = partial(
        lightning.Trainer, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    data = CalibrationData(rows, tokenizer, batch_size=6)

    scoring = ImportanceScoring(model)
    (scored,) = trainer().validate(scoring, datamodule=data, verbose=False)
    # A loader of one's own making, which is there before the processes have found each other.
    again = ImportanceScoring(model)
    trainer().validate(again, data.loader("fit"), verbose=False)
    fitted = closed_form(model, [2, 1], data, trainer=partial(lightning.Trainer, accelerator="cpu",
                         enable_progress_bar=False, **arguments), ridges=[0.1])  # fmt: skip
    evaluation = Evaluation(model, fitted)
    (searched,) = trainer().validate(evaluation, datamodule=data, verbose=False)
    (verified,) = trainer().test(evaluation, datamodule=data, verbose=False)

    training = KVProjectionTraining(fitted[1].copy(), learning_rate=1e-2)
    fit = trainer(max_steps=STEPS, limit_val_batches=2)
    fit.fit(training, datamodule=data)
    epoch = trainer(max_epochs=1)
    epoch.fit(KVProjectionTraining(model, 2), datamodule=data)
    return {
        "rows": [scoring.rows, again.rows],
        "scores": [scoring.scores.tolist(), again.scores.tolist()],
        "logged": scored | searched | verified,
        "fitted": [projections.maps["3"].weight[0].tolist() for projections in fitted.values()],
        "verified_rows": len(evaluation.rows("1")["kl"]),
        "trained": training.trained().maps["3"].weight[0].tolist(),
        "validation_loss": float(fit.callback_metrics["validation_loss"]),
        "steps": [fit.global_step, epoch.global_step],
        "gradients": sum(parameter.grad is not None for parameter in model.parameters()),
        "frozen": sum(not parameter.requires_grad for parameter in model.parameters()),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    base, rows, folder, processes = sys.argv[1:]
    measured = figures(Path(base), Path(rows), strategy="ddp", devices=int(processes))
    # A file per process: lines of this length, printed to one pipe, can mix.
    (Path(folder) / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(measured))
