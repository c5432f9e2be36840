"""Gaussian noise that is a function of (member seed, Hugging Face parameter name, element) alone.

Every parameter has a stream of its own, so no two parameters share numbers (the published scripts restart one seed for each
parameter, which makes all parameters of a size move alike). Any process can draw any part of any parameter's noise by
itself, and gets the same bits on a CPU and on a GPU, because nothing here rounds differently anywhere:

    key = hash(seed, name)                      counter-based generator Philox4x32-7 (Salmon et al., SC 2011:
                                                the fewest rounds that pass all their tests of randomness)
    counter c -> four 32-bit words -> eight 16-bit numbers h
    z = TABLE[h]                                a normal quantile for each of the 65,536 values of h

TABLE is symmetric: bit 15 of h is the sign, its other bits m pick the quantile with tail probability (2m + 1) / 2^17. The
quantile is a cubic in float32, one for each power of two that 2m + 1 reaches, evaluated by Horner's rule with every product
and sum rounded; a GPU kernel evaluates the same cubic without fused multiply-adds. It is within 4e-4 of the exact quantile;
the mean is 0, the variance 1 within 1e-8, the kurtosis 2.9992, the largest value 4.32.

Elements are counted in row-major order of the Hugging Face tensor; of each block of 8,192, counter c gives the eight elements
c % 1024 + 1024 j, j = 0..7, so that a kernel reads and writes runs of 1,024.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import torch

COUNTERS = 1024  # in a block; eight elements each
BLOCK = 8 * COUNTERS
_CHUNK = 16  # blocks drawn at once: the generator's words then stay in a core's cache

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
_MASK = 0xFFFFFFFF

# Row k: the cubic in t of the quantile at tail probability v / 2^17, v = 2^k (1 + t), divided by the table's deviation.
QUANTILE_CUBICS = (
    (4.32496309, 0.0, 0.0, 0.0),
    (4.07624769, 0.0, 0.0, 0.0),
    (3.99638319, -0.162360355, 0.0, 0.0),
    (3.84155965, -0.239589706, 0.089839749, -0.0236810036),
    (3.66809893, -0.250683188, 0.0946997032, -0.0251575857),
    (3.48690224, -0.262462109, 0.0989200473, -0.0263045169),
    (3.29699063, -0.275744617, 0.10333211, -0.0274510179),
    (3.09705687, -0.291107714, 0.108242959, -0.0287076812),
    (2.88540983, -0.309209973, 0.11383453, -0.0301278699),
    (2.65982723, -0.330968946, 0.12028458, -0.0317569524),
    (2.41730118, -0.35776943, 0.127803653, -0.0336478539),
    (2.15359688, -0.391836315, 0.13663657, -0.0358682722),
    (1.86243033, -0.437018305, 0.146995112, -0.0385085009),
    (1.53379107, -0.500672102, 0.158702984, -0.0417168625),
    (1.14998734, -0.599078894, 0.169413701, -0.0461027175),
    (0.674128234, -0.778582454, 0.165351436, -0.0611522533),
)


def member_seed(global_seed: int, iteration: int, member: int) -> int:
    """The 64-bit seed of a population member: a hash of its place in the run, so that resuming needs no generator state."""
    return _hash64(f"member {global_seed} {iteration} {member}")


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """The two 32-bit key words of the stream of parameter `name` for the member `seed`."""
    key = _hash64(f"noise {seed} {name}")
    return key & _MASK, key >> 32


def noise(seed: int, name: str, shape: torch.Size, device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 standard normal noise of `shape` for the parameter `name` of the member `seed`."""
    count = math.prod(shape)
    table = _table(torch.device(device))
    key = stream_key(seed, name)
    blocks = -(-count // BLOCK)
    values = torch.empty(blocks * BLOCK, dtype=torch.float32, device=device)
    for start in range(0, blocks, _CHUNK):
        end = min(start + _CHUNK, blocks)
        counters = torch.arange(start * COUNTERS, end * COUNTERS, dtype=torch.int64, device=device)
        words = torch.stack(philox(counters, key))  # (4, n)
        halves = torch.stack((words & 0xFFFF, words >> 16), dim=1)  # (4, 2, n)
        halves = halves.view(8, end - start, COUNTERS).transpose(0, 1)  # (blocks, 8, COUNTERS)
        values[start * BLOCK : end * BLOCK] = table[halves.reshape(-1)]
    return values[:count].view(shape)


def philox(
    counters: torch.Tensor, key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-7 of the counters (c, 0) with c below 2^64: four int64 tensors of 32-bit words, shaped like `counters`."""
    zeros = torch.zeros_like(counters)
    return philox_words(counters & _MASK, counters >> 32, zeros, zeros, key)


def philox_words(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-7 of any four counter words, int64 tensors below 2^32."""
    first, second = key
    for _ in range(ROUNDS):
        # int64 products wrap around at 2^64; their bits are those of the unsigned products.
        low, high = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = ((high >> 32) & _MASK) ^ b ^ first, high & _MASK
        c, d = ((low >> 32) & _MASK) ^ d ^ second, low & _MASK
        first, second = (first + _WEYL[0]) & _MASK, (second + _WEYL[1]) & _MASK
    return a, b, c, d


@cache
def _table(device: torch.device) -> torch.Tensor:
    """(65536,) float32: z for every 16-bit number."""
    odd = 2 * np.arange(2**15) + 1  # v
    power = np.log2(odd).astype(np.int64)  # exact: v is below 2^16
    t = (odd / 2.0**power - 1.0).astype(np.float32)  # exact as well
    cubic = np.array(QUANTILE_CUBICS, dtype=np.float32)[power]  # (32768, 4)
    half = cubic[:, 3]
    for column in (2, 1, 0):
        half = half * t + cubic[:, column]  # NumPy rounds the product and the sum
    return torch.from_numpy(np.concatenate([half, -half])).to(device)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
