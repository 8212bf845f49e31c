"""The processes of one ``pop-fit`` run: started here unless torchrun or a cluster started them, joined, and ended.

All run the same stages side by side; the first one alone opens the output folder, writes files and talks to the user.
Where one process dies the others end as well, none waits forever: the first watches those that it started, they watch
the first, and a collective that nobody answers runs into the process group's timeout.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from transformers.utils.logging import disable_progress_bar

from pop_lightning.core import distributed
from pop_lightning.core.errors import InputError, on_process
from pop_lightning.run.recipe import Recipe

GRACE = 10.0  # seconds that a process has to end by itself after another one ended badly
_PARENT = "POP_LIGHTNING_PARENT"


def check_number(strategy: Strategy) -> None:
    """Refuse a run that torchrun or a cluster started as another number of processes than the recipe names.

    Each of them would take itself for the whole run, or wait for others that never come.

    Raises:
        InputError: the numbers differ.
    """
    if isinstance(strategy, DDPStrategy):
        environment, devices, nodes = strategy.cluster_environment, strategy.num_processes, strategy.num_nodes
        if not environment.creates_processes_externally:
            return
    else:
        environment = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
        if environment is None:
            return
        devices = nodes = 1
    started, named, problem = environment.world_size(), devices * nodes, None
    if started != named:
        # A script without srun is one process, whatever number of tasks its job has.
        said = f"SLURM names {started} tasks" if _is_slurm(environment) else f"{started} processes were started"
        problem = f"{said}, the recipe {named}"
    elif started > 1:  # srun leaves the job's tasks per node standing where it starts one task alone
        try:
            environment.validate_settings(num_devices=devices, num_nodes=nodes)
        except ValueError as error:
            problem = str(error).rstrip(".")
    if problem is not None:
        ways = [_start(environment, devices, nodes)]
        if started > 1:
            ways.append(
                "set trainer.num_nodes to the number of nodes, trainer.devices to the processes on each, and "
                "trainer.strategy to ddp or one of DeepSpeed's"
            )
        raise InputError(
            f"trainer.devices {devices} and trainer.num_nodes {nodes} do not fit how this run was started ({problem}): "
            f"{', or '.join(ways)}."
        )


def _is_slurm(environment: ClusterEnvironment) -> bool:
    return isinstance(environment, SLURMEnvironment)


def _start(environment: ClusterEnvironment, devices: int, nodes: int) -> str:
    """How the processes that a recipe names are started there."""
    if not _is_slurm(environment):
        return f"start {devices} on each of {nodes} nodes (torchrun --nnodes {nodes} --nproc_per_node {devices})"
    if devices * nodes == 1:
        return "start it with srun --ntasks 1"
    return f"start it with srun, one task per process (#SBATCH --nodes {nodes} --ntasks-per-node {devices})"


@contextlib.contextmanager
def joined(strategy: DDPStrategy, recipe: Recipe):
    """Inside, all processes that ``strategy`` names run, and its process group is there.

    Processes on this machine are started as ``pop-fit`` on a copy of ``recipe``, so a run can begin in a script as
    well. Standard output is the first process's alone.

    Raises:
        InputError: on the first process; the others leave with exit code 2.
    """
    before, children = dict(os.environ), _Children()
    _end_with_parent()
    try:
        if not strategy.cluster_environment.creates_processes_externally:
            children.start(strategy, recipe)
        strategy.setup_environment()
        children.read_recipe()
        # DeepSpeed goes by torchrun's names, whoever started the processes.
        os.environ |= {
            "RANK": str(distributed.rank()),
            "LOCAL_RANK": str(strategy.local_rank),
            "WORLD_SIZE": str(distributed.size()),
        }
        with contextlib.ExitStack() as stack:
            if not distributed.is_first():
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                disable_progress_bar()
            yield
        distributed.barrier()
    except InputError as error:
        if distributed.is_first():
            raise
        if not isinstance(error, distributed.ToldByFirst):
            print(f"pop-fit: error: {on_process(str(error), distributed.rank())}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as stop:
        if distributed.is_first():
            raise
        raise SystemExit(130) from stop
    finally:
        children.end()
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


class _Children:
    """The processes that this one started, and a watch over them."""

    def __init__(self):
        self.processes: list[subprocess.Popen] = []
        self.folder: tempfile.TemporaryDirectory | None = None
        self.ended = threading.Event()

    def start(self, strategy: DDPStrategy, recipe: Recipe) -> None:
        environment = strategy.cluster_environment
        environment.validate_settings(num_devices=strategy.num_processes, num_nodes=strategy.num_nodes)
        self.folder = tempfile.TemporaryDirectory(prefix="pop-fit-")
        copy = Path(self.folder.name) / "recipe.yaml"
        recipe.save(copy)
        # Lightning's own names; with LOCAL_RANK set no stage starts processes of its own.
        os.environ |= {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "LOCAL_RANK": str(environment.local_rank()),
            "WORLD_SIZE": str(strategy.num_processes * strategy.num_nodes),
        }
        command = [sys.executable, "-m", "pop_lightning.cli.fit", "--recipe", str(copy)]
        for local_rank in range(1, strategy.num_processes):
            own = os.environ | {"LOCAL_RANK": str(local_rank), _PARENT: str(os.getpid())}
            self.processes.append(subprocess.Popen(command, env=own))
        threading.Thread(target=self._watch, daemon=True, name="watch over processes").start()

    def read_recipe(self) -> None:
        """They have joined, so they have read the copy of the recipe: nothing of it stays if this one is killed."""
        if self.folder is not None:
            self.folder.cleanup()

    def _watch(self) -> None:
        while not self.ended.wait(0.5):
            failed = next((process for process in self.processes if process.poll()), None)
            if failed is None:
                continue
            if not self.ended.wait(GRACE):
                print(
                    f"pop-fit: error: process {self.processes.index(failed) + 1} of the run ended with code "
                    f"{failed.returncode}, so the others were stopped; --resume goes on from what is finished.",
                    file=sys.stderr,
                    flush=True,
                )
                self._kill()
                os._exit(1)  # the main thread may wait in a collective for good

    def end(self) -> None:
        self.ended.set()
        for process in self.processes:
            # Orderly ends come together; whoever is still busy waits for a process that is gone.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE if sys.exc_info()[0] is None else 1.0)
        self._kill()
        if self.folder is not None:
            self.folder.cleanup()

    def _kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    """In a process that :class:`_Children` or torchrun started: end as soon as the one that started it is gone."""
    if _PARENT in os.environ:
        parent = int(os.environ[_PARENT])
    elif TorchElasticEnvironment.detect():
        parent = os.getppid()  # without its agent it would go on, beside the run that is resumed
    else:
        return

    def watch() -> None:
        while True:
            time.sleep(0.5)
            if os.getppid() != parent:
                os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch over the first process").start()
