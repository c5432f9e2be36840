"""The device that a user named, looked for before anything is loaded onto it."""

from __future__ import annotations

import torch

from alignment.errors import UserError


def find_device(name: str | torch.device) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:N or mps. Raises UserError for one that is not there or has no such name."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {str(name)!r}: expected cpu, cuda, or one GPU of several as cuda:1")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps is not there: it is Apple's GPU; use cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(
                f"device {name}: PyTorch finds no CUDA GPU here; use cpu, or start this where nvidia-smi shows a GPU"
            )
        if (device.index or 0) >= count:
            there = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise UserError(f"device {name}: PyTorch finds {there} here (CUDA_VISIBLE_DEVICES narrows that down)")
    return device
