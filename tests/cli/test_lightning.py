"""LightningCLI around the training module: from a YAML file to a checkpoint that loads."""

import torch
import yaml

from pop_lightning import KVProjectionTraining
from pop_lightning.cli import lightning

from tests.helpers.workbench import save_base, save_rows


def config(tmp_path, **model):
    base = str(save_base(tmp_path / "base"))
    content = {
        "model": {"start": base, "depth": 1, **model},
        "data": {"calibration": str(save_rows(tmp_path / "rows.jsonl")), "tokenizer": base, "batch_size": 4},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
        },
    }
    (tmp_path / "training.yaml").write_text(yaml.safe_dump(content))
    return ["fit", "--config", str(tmp_path / "training.yaml")]


def test_a_training_runs_from_a_yaml_file_and_its_checkpoint_loads(tmp_path):
    assert lightning.main([*config(tmp_path), "--model.kind", "lora", "--model.kind_arguments.r", "2"]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    training = KVProjectionTraining.load_from_checkpoint(checkpoint, weights_only=True)
    assert training.kind.name == "lora"
    assert any("lora_A" in name and each.shape[0] == 2 for name, each in training.named_parameters())
    moved = [each.abs().max() for name, each in training.named_parameters() if "lora_B" in name]
    assert torch.stack(moved).max() > 0


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert lightning.main([*config(tmp_path), "--model.kind", "reuse"]) == 2
    assert "projections of kind reuse are not trained: expected one of lora, full." in capsys.readouterr().err
