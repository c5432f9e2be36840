"""The noise of noise.py as Triton kernels: a member's weights and the population's step, each in one pass over memory.

The same numbers as the PyTorch path, bit for bit: the same counters and quantile cubics, and products and sums that the
compiler must not fuse (`enable_fp_fusion=False`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from alignment.ES.noise import BLOCK, COUNTERS, QUANTILE_CUBICS, ROUNDS, stream_key

# Counters that one program works on (a part of a block's) and its warps: the fastest of a sweep on an H100.
_TILE = 128
_PERTURB_WARPS, _STEP_WARPS = 2, 4


def keys(pairs: list[tuple[int, str]], device: torch.device) -> torch.Tensor:
    """(n,) int64 on the device: the stream keys of (seed, parameter name), for the kernels to read."""
    words = [low | high << 32 for low, high in (stream_key(seed, name) for seed, name in pairs)]
    return torch.tensor([word - 2**64 if word >= 2**63 else word for word in words], dtype=torch.int64).to(device)


def perturb(working: torch.Tensor, master: torch.Tensor, key: torch.Tensor, scale: float) -> None:
    """working <- master + scale * noise, rounded once to working's dtype. `key` (1,) as made by `keys`; both contiguous."""
    grid = (triton.cdiv(master.numel(), BLOCK), COUNTERS // _TILE)
    with torch.cuda.device(master.device):  # Triton launches on the current device, wherever the tensors are
        _perturb[grid](
            working, master, key, _cubics(master.device), scale, master.numel(),
            COUNTERS=COUNTERS, TILE=_TILE, ROUNDS=ROUNDS, num_warps=_PERTURB_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def step(master: torch.Tensor, key: torch.Tensor, coefficients: torch.Tensor) -> None:
    """master += sum_i coefficients[i] * noise_i, summed in float32 in that order. `key` (N,) int64, `coefficients` (N,)."""
    grid = (triton.cdiv(master.numel(), BLOCK), COUNTERS // _TILE)
    with torch.cuda.device(master.device):
        _step[grid](
            master, key, coefficients, _cubics(master.device), len(key), master.numel(),
            COUNTERS=COUNTERS, TILE=_TILE, ROUNDS=ROUNDS, num_warps=_STEP_WARPS, enable_fp_fusion=False,
        )  # fmt: skip


_on_device: dict[torch.device, torch.Tensor] = {}


def _cubics(device: torch.device) -> torch.Tensor:
    if device not in _on_device:
        _on_device[device] = torch.tensor(QUANTILE_CUBICS, dtype=torch.float32, device=device)
    return _on_device[device]


@triton.jit
def _normal(half, cubics):
    """16-bit numbers (int32) to their normal quantiles; see noise.py."""
    odd = 2 * (half & 0x7FFF) + 1
    # A whole number below 2^23 in the mantissa of 2^23, less 2^23, is that number: quicker than a conversion.
    bits = ((odd | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0).to(tl.int32, bitcast=True)
    row = cubics + ((bits >> 23) - 127) * 4
    t = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    z = tl.load(row + 3)
    z = z * t + tl.load(row + 2)
    z = z * t + tl.load(row + 1)
    z = z * t + tl.load(row)
    return (z.to(tl.int32, bitcast=True) ^ ((half & 0x8000) << 16)).to(tl.float32, bitcast=True)


@triton.jit
def _eight(key, cubics, COUNTERS: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr):
    """The eight normals of each of this program's counters, in the order of the block's layout."""
    first = tl.program_id(0).to(tl.int64) * COUNTERS + tl.program_id(1) * TILE
    low = (first & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, TILE).to(tl.uint32)  # a block never crosses 2^32
    high = (low * 0) + (first >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(key, low, high, zero, zero, n_rounds=ROUNDS)
    a, b, c, d = a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), d.to(tl.int32)
    return (
        _normal(a & 0xFFFF, cubics), _normal((a >> 16) & 0xFFFF, cubics),
        _normal(b & 0xFFFF, cubics), _normal((b >> 16) & 0xFFFF, cubics),
        _normal(c & 0xFFFF, cubics), _normal((c >> 16) & 0xFFFF, cubics),
        _normal(d & 0xFFFF, cubics), _normal((d >> 16) & 0xFFFF, cubics),
    )  # fmt: skip


@triton.jit
def _put(working, master, z, scale, place, left):
    inside = place < left
    value = tl.load(master + place, mask=inside) + scale * z
    tl.store(working + place, value.to(working.dtype.element_ty), mask=inside)


@triton.jit
def _put_eight(
    working, master, z0, z1, z2, z3, z4, z5, z6, z7, scale, count, COUNTERS: tl.constexpr, TILE: tl.constexpr
):
    """working <- master + scale * z for this program's elements."""
    block = tl.program_id(0).to(tl.int64) * (8 * COUNTERS)
    left = tl.minimum(count - block, 8 * COUNTERS).to(tl.int32)
    working += block
    master += block
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    _put(working, master, z0, scale, place, left)
    _put(working, master, z1, scale, place + COUNTERS, left)
    _put(working, master, z2, scale, place + 2 * COUNTERS, left)
    _put(working, master, z3, scale, place + 3 * COUNTERS, left)
    _put(working, master, z4, scale, place + 4 * COUNTERS, left)
    _put(working, master, z5, scale, place + 5 * COUNTERS, left)
    _put(working, master, z6, scale, place + 6 * COUNTERS, left)
    _put(working, master, z7, scale, place + 7 * COUNTERS, left)


@triton.jit
def _perturb(
    working, master, key, cubics, scale, count, COUNTERS: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr
):
    z0, z1, z2, z3, z4, z5, z6, z7 = _eight(tl.load(key), cubics, COUNTERS, TILE, ROUNDS)
    _put_eight(working, master, z0, z1, z2, z3, z4, z5, z6, z7, scale, count, COUNTERS, TILE)


@triton.jit
def _step(
    master, keys, factors, cubics, members, count, COUNTERS: tl.constexpr, TILE: tl.constexpr, ROUNDS: tl.constexpr
):
    s0 = tl.zeros([TILE], tl.float32)
    s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
    for i in range(members):
        factor = tl.load(factors + i)
        z0, z1, z2, z3, z4, z5, z6, z7 = _eight(tl.load(keys + i), cubics, COUNTERS, TILE, ROUNDS)
        s0 += factor * z0
        s1 += factor * z1
        s2 += factor * z2
        s3 += factor * z3
        s4 += factor * z4
        s5 += factor * z5
        s6 += factor * z6
        s7 += factor * z7
    _put_eight(master, master, s0, s1, s2, s3, s4, s5, s6, s7, 1.0, count, COUNTERS, TILE)
