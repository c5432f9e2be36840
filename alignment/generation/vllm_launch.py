"""vLLM as a world of its own in each of several processes (torchrun, accelerate, srun, --num_engines), each on its GPU.

vLLM's default executor begins a torch process group of one, and takes GPU 0: right for a process that is alone. With several
there is a group already, that of alignment.distributed.Processes, with a rank for each policy. vLLM 0.26 then builds its own
groups within that one (vllm/distributed/parallel_state.py, init_distributed_environment): with tensor and pipeline
parallelism of 1, a group of one for each rank. Its executor for such launchers ("external_launcher") reads rank and GPU from
the environment, which this module sets while the model is loaded. All processes must load at the same time; after that none
waits for another.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@contextmanager
def placed_on(device: torch.device) -> Iterator[dict]:
    """Options of vllm.LLM, and inside the block the environment, for a whole model of this process on `device`."""
    if not dist.is_initialized() and not device.index:
        yield {}
        return
    before = {name: os.environ.pop(name) for name in _NAMES if name in os.environ}
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    if dist.is_initialized():
        os.environ["RANK"] = str(dist.get_rank())
    else:  # alone on another GPU, whatever a launcher's variables said: a group of one, which vLLM begins
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(alone)
    try:
        yield {"distributed_executor_backend": "external_launcher"}
    finally:
        for name in _NAMES:
            os.environ.pop(name, None)
        os.environ.update(before)
