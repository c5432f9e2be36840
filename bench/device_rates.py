"""How the benchmarks take times, and what the device can do at most, imported by them: copied bytes and FLOP a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_each(work: Work, runs: int) -> list[float]:
    """Seconds of each of some runs, with what they leave to the GPU."""
    times = []
    for _ in range(runs):
        synchronise()
        began = time.perf_counter()
        work()
        synchronise()
        times.append(time.perf_counter() - began)
    return times


def median_seconds(work: Work, repeats: int) -> float:
    """Of `repeats` runs, after one that is not counted."""
    return statistics.median(seconds_each(work, repeats + 1)[1:])


def copy_rate(size: int, device: torch.device, clock: Callable[[Work], float]) -> float:
    """Bytes read and written a second in a copy of `size` bytes; `clock` gives the seconds of what it is handed."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / clock(lambda: target.copy_(source))


def product_rate(a: torch.Tensor, b: torch.Tensor, clock: Callable[[Work], float]) -> float:
    """FLOP a second of the product of two square matrices (N, N)."""
    return 2 * len(a) ** 3 / clock(lambda: a @ b)
