"""What ``trainer.strategy`` means: what each process holds of the base and of what is trained.

| strategy | the base | what is trained |
|---|---|---|
| ``ddp`` | whole on every process | whole on every process, gradients averaged |
| ``deepspeed_stage_2`` | whole on every process | its gradients and optimizer in shards |
| ``deepspeed_stage_3`` | in shards (ZeRO-3), a module gathered while it runs; never whole anywhere | as in stage 2 |
| ``deepspeed_stage_3_offload`` | the same, the shards in the CPU's memory | as in stage 2 |

Passes that train nothing have nothing else to shard and run under plain DDP. The frozen base belongs to no
LightningModule: one engine gathers it for the whole run, however many trainers come and go. Only its own strategies
import DeepSpeed. Trainers (``trainers.py``) are made from what is here.
"""

import gc
import os
import shutil
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy, StrategyRegistry
from transformers import PreTrainedModel

from pop_lightning.core.errors import InputError
from pop_lightning.core.files import replace_folder, write_whole

DDP = ("auto", "ddp")
DEEPSPEED = ("deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_3_offload")


def check_name(name: object) -> None:
    """Raise :class:`InputError` for a ``trainer.strategy`` that pop-fit runs nowhere."""
    if name not in (*DDP, *DEEPSPEED):
        raise InputError(f"trainer.strategy must be one of {', '.join((*DDP, *DEEPSPEED))}, found {name!r}.")


def check(name: object, accelerator: object = "auto") -> None:
    """Raise :class:`InputError` for a ``trainer.strategy`` that pop-fit does not run, or not on this machine."""
    check_name(name)
    if name in DEEPSPEED:
        try:
            _import_deepspeed(on_cpu=accelerator == "cpu" or not torch.cuda.is_available())
        except ImportError as error:
            raise InputError(
                f"trainer.strategy {name} needs DeepSpeed, which is missing: pip install 'pop-lightning[deepspeed]'."
            ) from error


def _import_deepspeed(on_cpu: bool) -> None:
    """The first import, without its talk about this machine and what it is built on."""
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated.*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    if on_cpu:
        # A collective through shared memory that nothing here uses; it would be compiled on the spot.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def for_training(name: str) -> Strategy | str:
    """The strategy that trains projections, as ``lightning.Trainer`` accepts it; a new one for each trainer."""
    if name not in DEEPSPEED:
        return name
    strategy = _deepspeed(name)
    zero = {k: v for k, v in _zero(strategy).items() if not k.startswith(("stage3", "offload"))}
    # DeepSpeed's own count of rows per second depends on the batch size, which steps of rows of our choice do not have.
    strategy.config |= {"zero_optimization": zero | {"stage": 2}, "train_micro_batch_size_per_gpu": 1}
    return strategy


def shards_base(name: str) -> bool:
    """Whether the base is to be held in shards."""
    return name in DEEPSPEED and _zero(_deepspeed(name)).get("stage") == 3


class ShardedBase(lightning.Callback):
    """ZeRO-3 over the frozen base: each process holds its share, hooks gather a module's weights while it runs.

    A callback of every trainer that runs the base. The settings are those of Lightning's strategy of that name,
    ``PL_DEEPSPEED_CONFIG_PATH`` included.

    Attributes:
        engine: DeepSpeed's; None until :meth:`load`.
    """

    def __init__(self, name: str):
        zero = {k: v for k, v in _zero(_deepspeed(name)).items() if k != "offload_optimizer"}
        # Passes over some of the layers follow whole ones: what would be prefetched is rarely what comes next.
        zero |= {"stage3_prefetch_bucket_size": 0}
        self.config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        self.engine = None

    def load(self, load: Callable[[], PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
        """The model that ``load`` reads by ``from_pretrained``, in shards of ``dtype`` from its first weight on."""
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        # DeepSpeed reads only these switches, and makes float32 of whatever a checkpoint holds where both are off.
        self.config |= {"bf16": {"enabled": dtype is torch.bfloat16}, "fp16": {"enabled": dtype is torch.float16}}
        self._held = HfDeepSpeedConfig(self.config)  # Transformers shards, and generates in step, while it lives
        model = load()
        self.engine, *_ = deepspeed.initialize(model=model, config=self.config, dist_init_required=False)
        return model

    def on_after_backward(self, trainer, module) -> None:
        self._release()

    def on_validation_batch_end(self, *_) -> None:
        self._release()

    def _release(self) -> None:
        """Let go of modules that no hook after the backward pass reached: their input asked for no gradient.

        DeepSpeed does this itself where the engine trains what it shards.
        """
        self.engine.optimizer.release_backward_leftovers()

    def close(self) -> None:
        """Remove the engine's hooks and reset the switch in Transformers."""
        self._held = None
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
        gc.collect()


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning checkpoints that appear whole: Lightning's own may be cut where the temporary folder lies elsewhere."""

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: torch.save(checkpoint, temporary))


def whole_checkpoints(name: str, plugins: object) -> list:
    """``plugins`` of a trainer with a checkpoint writer of ours, where DeepSpeed does not write its own."""
    given = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins] if plugins is not None else []
    return given if name in DEEPSPEED else [*given, WholeCheckpoints()]


def training_step_of(checkpoint: Path) -> int:
    """At which step a training was when ``checkpoint`` (a file, or DeepSpeed's folder) was written.

    Raises:
        Exception: whatever reading damaged bytes raises. PyTorch does not compare an archive's checksums, so a flipped
            bit would go unnoticed without it.
    """
    for file in sorted(checkpoint.rglob("*.pt")) if checkpoint.is_dir() else [checkpoint]:
        with zipfile.ZipFile(file) as archive:
            if (name := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{name} in {file} is damaged")
    inside = checkpoint / "checkpoint" / "mp_rank_00_model_states.pt"
    return torch.load(inside if checkpoint.is_dir() else checkpoint, weights_only=True)["global_step"]


class _DeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy, on CPUs as well as on GPUs, with checkpoints that are replaced whole."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # Lightning asks for a CUDA accelerator here

    def setup_distributed(self) -> None:
        self.set_world_ranks()  # and for devices with numbers here; the process group is there already
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model, optimizer, lr_scheduler=None):
        import deepspeed

        engine, optimizer, _, _ = deepspeed.initialize(
            args=Namespace(device_rank=self.local_rank),  # Lightning passes the device's number, a CPU has none
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, optimizer

    def backward(self, closure_loss, optimizer, *args, **kwargs):
        # Lightning has divided by the batches of a step, which DeepSpeed would do once more.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint: dict, filepath: str | Path, storage_options=None) -> None:
        folder = Path(self.broadcast(str(filepath)))
        partial = folder.with_name(f".{folder.name}.partial")
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        if self.is_global_zero:
            replace_folder(partial, folder)
        self.barrier()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self.model, "destroy"):
            self.model.destroy()  # Lightning leaves the engine and its hooks to the end of the process


def _deepspeed(name: str) -> _DeepSpeed:
    return _DeepSpeed(**StrategyRegistry[name]["init_params"], exclude_frozen_parameters=True)


def _zero(strategy: _DeepSpeed) -> dict:
    return strategy.config.get("zero_optimization", {})
