"""Several processes that run one experiment: who is who, exchanging small objects, stopping together.

    python SCRIPT                                      one process
    torchrun --nproc_per_node 4 SCRIPT                 four, also `accelerate launch --num_processes 4 SCRIPT`
    srun --ntasks 8 python SCRIPT                      eight, on one node or several

Scalars and scores travel between processes (gloo, also on GPUs: a few kilobytes an iteration), weights never do. What one
process decides or fails at is known to all: an error on one is raised on all, a signal to one stops all.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from alignment.errors import UserError

Result = TypeVar("Result")

_STOP = "alignment/stop"
_SLURM_PORT = 29400  # plus the job's number modulo 1000, so that two jobs on a node do not meet


class Processes:
    """This process among `world_size`. `timeout` (seconds): how long to wait for the others before the run is given up."""

    def __init__(
        self, rank: int = 0, world_size: int = 1, local_rank: int = 0, store: Any = None, timeout: float = 1800
    ):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self._store = store
        if world_size > 1:
            limit = datetime.timedelta(seconds=timeout)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)

    @classmethod
    def from_environment(cls, timeout: float = 1800) -> Processes:
        """As the launcher set it: torchrun's and accelerate's variables, or those of srun. One process without them."""
        if launched() == 1:
            return cls()
        if "RANK" not in os.environ:
            _environment_from_slurm()
        store, rank, world_size = next(dist.rendezvous("env://"))
        return cls(rank, world_size, int(os.environ.get("LOCAL_RANK", "0")), store, timeout)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list:
        """Every process's `value`, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        self._talk(lambda: dist.all_gather_object(values, value))
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the main process, on every process. Its UserError is raised on all of them."""
        if self.world_size == 1:
            return work()
        message: list = [None]
        if self.is_main:
            try:
                message = [(work(), None)]
            except UserError as error:
                message = [(None, error)]
        self._talk(lambda: dist.broadcast_object_list(message, src=0))
        result, problem = message[0]
        if problem is not None:
            raise problem
        return result

    def request_stop(self) -> None:
        """Asks all processes to stop; harmless when repeated."""
        if self._store is not None:
            self._talk(lambda: self._store.set(_STOP, "1"))

    def stop_requested(self) -> bool:
        """Whether any process asked to stop. Cheap; no process waits for another."""
        return self._store is not None and self._talk(lambda: self._store.check([_STOP]))

    def close(self) -> None:
        if self.world_size > 1 and dist.is_initialized():  # vLLM has ended it when its engine was closed
            with contextlib.suppress(UserError):
                self.gather(None)  # the main process has the store, which the others may still be asking
            dist.destroy_process_group()

    def _talk(self, exchange: Callable[[], Result]) -> Result:
        try:
            return exchange()
        except RuntimeError as error:  # gloo's word for a peer that is gone or does not answer
            raise UserError(
                "another process of this run ended or does not answer; what was finished is saved, "
                f"the same command goes on from there ({' '.join(str(error).split())[:160]})"
            ) from error


def has_launcher() -> bool:
    """Whether torchrun, accelerate or srun has started this process as one of its own: it must not launch others."""
    return "WORLD_SIZE" in os.environ or _srun_tasks() > 1


def launched() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", _srun_tasks()))


def launch(count: int, argv: list[str]) -> int:
    """Runs `python argv...` as `count` processes of this machine by torch's own launcher; returns their exit code."""
    import torch.distributed.elastic.multiprocessing as elastic
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What failed is told by the processes themselves; the launcher would add a page of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"alignment-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # USR1 is the warning before a job's time limit
    )
    try:
        elastic_launch(config, sys.executable)(*argv)
        return 0
    except elastic.errors.ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # a negative one is a signal's
    except SignalException as error:
        return 128 + error.sigval


def _srun_tasks() -> int:
    """How many tasks `srun` has started together with this process. (SLURM_NTASKS is the job's: its script has it, too.)"""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def _environment_from_slurm() -> None:
    """torch's variables from those of `srun`: the first node of the step is where the processes meet."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    if found.returncode != 0:
        raise UserError(
            f"`scontrol show hostnames {nodes}` failed: {found.stderr.strip()}; set MASTER_ADDR, MASTER_PORT, RANK"
        )
    os.environ.setdefault("MASTER_ADDR", found.stdout.split()[0])
    os.environ.setdefault("MASTER_PORT", str(_SLURM_PORT + int(os.environ["SLURM_JOB_ID"]) % 1000))
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = os.environ["SLURM_STEP_NUM_TASKS"]
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
