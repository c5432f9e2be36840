"""Gaussian noise that is a function of (member seed, Hugging Face parameter name) alone.

Every parameter has a stream of its own, so no two parameters share numbers (the published scripts restart one seed for each
parameter, which makes all parameters of a size move alike), and any process can draw any parameter's noise by itself.
"""

from __future__ import annotations

import hashlib

import torch


def member_seed(global_seed: int, iteration: int, member: int) -> int:
    """The 63-bit seed of a population member: a hash of its place in the run, so that resuming needs no generator state."""
    return _hash63(f"member {global_seed} {iteration} {member}")


def noise(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    """float32 standard normal noise of `shape` on the CPU for the parameter `name` of the member `seed`."""
    generator = torch.Generator().manual_seed(_hash63(f"noise {seed} {name}"))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _hash63(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
