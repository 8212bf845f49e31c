"""The processes of one ``pop-fit`` run: started here unless torchrun or a cluster started them, joined, and ended.

All run the same stages; only the first one opens the output folder, writes files and prints.
``pop-fit`` itself starts them through torch's elastic launcher, as torchrun does: it watches them, ends all where one
fails, and never restarts. What the launcher lacks is here: exit codes and a sentence instead of its log, and the end of
processes whose launcher was killed.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers.utils.logging import disable_progress_bar

from pop_lightning.core import distributed
from pop_lightning.core.errors import LAUNCHED_BY, InputError, Terminated, first_sentence, on_process
from pop_lightning.run.recipe import Recipe

GRACE = 10  # seconds that a process has to end by itself after another one ended


def check_number(strategy: Strategy) -> None:
    """Refuse a run that torchrun or a cluster started as another number of processes than the recipe names.

    Each process would act as the whole run, or wait for others that never start.

    Raises:
        InputError: the numbers differ.
    """
    if isinstance(strategy, DDPStrategy):
        environment, devices, nodes = strategy.cluster_environment, strategy.num_processes, strategy.num_nodes
        if not environment.creates_processes_externally:
            return
    else:
        environment = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
        devices = nodes = 1
    if environment is None:
        return
    started, named, problem = environment.world_size(), devices * nodes, None
    slurm = isinstance(environment, SLURMEnvironment)
    if started != named:
        # A script without srun is one process, whatever number of tasks its job has.
        found = f"SLURM names {started} tasks" if slurm else f"{started} processes were started"
        problem = f"{found}, the recipe {named}"
    elif started > 1:  # srun leaves the job's tasks per node as they are where it starts only one task
        try:
            environment.validate_settings(num_devices=devices, num_nodes=nodes)
        except ValueError as error:
            problem = str(error).rstrip(".")
    if problem is None:
        return
    if not slurm:
        advice = f"start {devices} on each of {nodes} nodes (torchrun --nnodes {nodes} --nproc_per_node {devices})"
    elif named == 1:
        advice = "start it with srun --ntasks 1"
    else:
        advice = f"start it with srun, one task per process (#SBATCH --nodes {nodes} --ntasks-per-node {devices})"
    if started > 1:
        advice += (
            ", or set trainer.num_nodes to the number of nodes, trainer.devices to the processes on each, and "
            "trainer.strategy to ddp or one of DeepSpeed's"
        )
    raise InputError(
        f"trainer.devices {devices} and trainer.num_nodes {nodes} do not fit how this run was started ({problem}): "
        f"{advice}."
    )


def starts_processes(strategy: Strategy) -> bool:
    """Whether ``strategy`` names several processes that nobody has started yet."""
    return (
        isinstance(strategy, DDPStrategy)
        and strategy.num_processes * strategy.num_nodes > 1
        and not strategy.cluster_environment.creates_processes_externally
    )


def start(strategy: DDPStrategy, recipe: Recipe, *flags: str) -> int:
    """Run ``pop-fit`` on a copy of ``recipe`` in all processes of this machine, and wait for them.

    Several nodes, where this is called on each, meet by Lightning's variables MASTER_ADDR, MASTER_PORT and NODE_RANK.

    Args:
        flags: of the command line, such as ``--resume``.

    Returns:
        the exit code: 0 or 3 as of one process, 2 for bad input (which a process has printed), 1 where one failed.

    Raises:
        InputError: the nodes do not meet.
        KeyboardInterrupt: Ctrl-C or, as :class:`Terminated`, SIGTERM; the processes have ended.
    """
    environment = strategy.cluster_environment
    endpoint = f"{environment.main_address}:{environment.main_port}"
    config = LaunchConfig(
        min_nodes=strategy.num_nodes,
        max_nodes=strategy.num_nodes,
        nproc_per_node=strategy.num_processes,
        run_id="pop-fit",
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": environment.node_rank()},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(os.devnull),  # no files: the processes write to this one's streams
        signals_to_handle="SIGINT,SIGTERM",  # by default SIGHUP as well, which nohup has ignored
        shutdown_timeout=GRACE,
    )
    with tempfile.TemporaryDirectory(prefix="pop-fit-") as folder, _unchanged_process():
        copy = Path(folder) / "recipe.yaml"
        recipe.save(copy)
        os.environ[LAUNCHED_BY] = str(os.getpid())
        try:
            elastic_launch(config, sys.executable)("-m", "pop_lightning.cli.fit", "--recipe", str(copy), *flags)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode in (2, 3):
                return failure.exitcode
            how = failure.signal_name() if failure.exitcode < 0 else f"code {failure.exitcode}"
            print(
                f"pop-fit: error: process {rank} of the run ended with {how}, so the others were stopped; "
                "--resume continues from what is finished.",
                file=sys.stderr,
            )
            return 1
        except SignalException as stop:
            raise Terminated if stop.sigval == signal.SIGTERM else KeyboardInterrupt from stop
        except dist.DistError as error:
            raise InputError(
                f"the nodes of the run do not meet at MASTER_ADDR:MASTER_PORT {endpoint} as NODE_RANK "
                f"{environment.node_rank()} of trainer.num_nodes {strategy.num_nodes}: {first_sentence(error)}"
            ) from error
    return 0


@contextlib.contextmanager
def _unchanged_process():
    """Restore what the elastic launcher changes here, variables and handlers of signals; its log is not printed."""
    before = dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def joined(strategy: DDPStrategy):
    """Inside, the process group of the processes that ``strategy`` names is there.

    Only the first process writes to standard output.

    Raises:
        InputError: on the first process; the others leave with exit code 2.
    """
    before = dict(os.environ)
    _end_with_launcher()
    try:
        strategy.setup_environment()
        # DeepSpeed reads torchrun's names, whoever started the processes.
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
    except Exception as error:
        first, bad_input = distributed.is_first(), isinstance(error, InputError)
        if TorchElasticEnvironment.detect() and not (first and bad_input):
            # The launcher's SIGTERM cuts this short where the error only follows from the end of another process, or
            # where the first process has the same one and prints it, on a busy machine some seconds later.
            time.sleep(1 if first else 15)
        if first or not bad_input:
            raise
        if not isinstance(error, distributed.ReportedByFirst):
            print(f"pop-fit: error: {on_process(str(error), distributed.rank())}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def _end_with_launcher() -> None:
    """In a process that the elastic launcher started: end as soon as the launcher is gone.

    Without it the process would go on, at the same time as the run that is resumed.
    """
    if not TorchElasticEnvironment.detect():
        return
    launcher = int(os.environ.get(LAUNCHED_BY) or os.getppid())

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch over the launcher").start()
