"""Low-rank members in one batch: y[t] = W x[t] + left[m] (right[m]^T x[t]), m = slots[t], with W shared by all tokens.

The perturbation of EGGROLL (arXiv 2511.16652) is never written out: W + left right^T is applied as it stands, each token with
the factors of its own member: two Triton kernels a linear layer beside the shared product, `_shrink` (u[t] = right[m]^T x[t],
one program a token) and `_expand` (the product plus left[m] u[t]). q, k and v, or gate and up, share all three. Tokens need no
order: at rank 1 the factors of 30 members are 0.5 MB a layer and come from the L2 cache.

The product stays in float32 until `_expand` has added to it: so y is rounded once, as with the member's weights written out.
A 16-bit product is less to write and read, but tokens then equalled those of written-out weights for 85 % of an answer, and
94 % this way, where two plain runs agree for 97 % (H200, tests/test_vllm_members.py).

The PyTorch path is for a CPU, and the oracle of the kernels. tests/test_member_kernels.py checks one against the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import library
from torch.nn import functional

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this machine: the PyTorch path does it
    triton = None

MAX_PARTS = 3  # q, k, v

# Tile sizes and warps: of a sweep on an H100 (bench/es_population.py --linears --sweep); the others took up to 2 % longer.
SHRINK_TILE, SHRINK_WARPS = 16384, 8  # elements of (parts * rank, inputs) that one program holds
EXPAND_TOKENS, EXPAND_COLUMNS, EXPAND_WARPS = 8, 512, 4


def add_members(
    y: torch.Tensor, x: torch.Tensor, right: torch.Tensor, left: torch.Tensor, slots: torch.Tensor, parts: Sequence[int]
) -> torch.Tensor:
    """y (T, O) with each token's member added, in plain PyTorch, rounded once to y's dtype.

    x (T, I); right (slots, P * r, I), the parts' factors one after the other; left (slots, r, O); slots (>= T,) int32; parts:
    the P widths that O is made of. Slot 0 holds zeros: an unperturbed token.
    """
    member = slots[: len(x)].long()
    inner = torch.einsum("ti,tki->tk", x.float(), right[member].float())  # (T, P * r)
    return _add_expanded(y, inner, left, member, parts)


def embed_members(
    y: torch.Tensor, ids: torch.Tensor, right: torch.Tensor, left: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    """y (T, H), the embeddings of ids (T,), with what each token's member adds to its row: right left[ids[t]].

    right (slots, r, H) and left (slots, r, V) are those of the head, which shares the matrix.
    """
    member = slots[: len(ids)].long()
    return _add_expanded(y, left[member, :, ids].float(), right, member, [y.shape[1]])


def _add_expanded(
    y: torch.Tensor, inner: torch.Tensor, left: torch.Tensor, member: torch.Tensor, parts: Sequence[int]
) -> torch.Tensor:
    rank = left.shape[1]
    total = y.float() if y.dtype != torch.float32 else y.clone()
    for number, (start, end) in enumerate(pairwise(accumulate(parts, initial=0))):
        own = inner[:, number * rank : (number + 1) * rank]  # (T, r)
        total[:, start:end] += torch.einsum("tk,tko->to", own, left[member, :, start:end].float())
    return total.to(y.dtype)


if triton is not None:

    @triton.jit(do_not_specialize=["tokens"])
    def _shrink(
        inner, x, right, slots, tokens, x_stride,
        INPUTS: tl.constexpr, ROWS: tl.constexpr, ROWS_PADDED: tl.constexpr, TILE: tl.constexpr
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token).to(tl.int64)
        rows = tl.arange(0, ROWS_PADDED)
        if slot > 0:
            total = tl.zeros([ROWS_PADDED, TILE], tl.float32)
            for start in tl.static_range(0, INPUTS, TILE):
                columns = start + tl.arange(0, TILE)
                there = columns < INPUTS
                value = tl.load(x + token * x_stride + columns, mask=there, other=0.0).to(tl.float32)
                factor = tl.load(
                    right + slot * ROWS * INPUTS + rows[:, None] * INPUTS + columns[None, :],
                    mask=(rows[:, None] < ROWS) & there[None, :],
                    other=0.0,
                ).to(tl.float32)
                total += value[None, :] * factor
            tl.store(inner + token * ROWS + rows, tl.sum(total, 1), mask=rows < ROWS)
        else:
            tl.store(inner + token * ROWS + rows, tl.zeros([ROWS_PADDED], tl.float32), mask=rows < ROWS)

    @triton.jit(do_not_specialize=["tokens"])
    def _expand(
        y, product, inner, left, slots, bias, tokens,
        FIRST: tl.constexpr, SECOND: tl.constexpr, OUTPUTS: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
        TOKENS: tl.constexpr, COLUMNS: tl.constexpr
    ):  # fmt: skip
        # Blocks of columns never reach over two parts: first those of part 0, then of part 1, then of part 2.
        block = tl.program_id(1)
        first_blocks: tl.constexpr = (FIRST + COLUMNS - 1) // COLUMNS
        second_blocks: tl.constexpr = (SECOND + COLUMNS - 1) // COLUMNS
        part = 0
        start = block * COLUMNS
        end = FIRST
        if block >= first_blocks:
            part = 1
            start = FIRST + (block - first_blocks) * COLUMNS
            end = FIRST + SECOND
        if block >= first_blocks + second_blocks:
            part = 2
            start = FIRST + SECOND + (block - first_blocks - second_blocks) * COLUMNS
            end = OUTPUTS
        token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        real = token < tokens
        slot = tl.load(slots + token, mask=real, other=0).to(tl.int64)
        token = token.to(tl.int64)
        column = start + tl.arange(0, COLUMNS)
        there = column < end
        place = real[:, None] & there[None, :]
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        if bias is not None:
            total += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(RANK):
            own = tl.load(inner + token * (PARTS * RANK) + part * RANK + k, mask=real, other=0.0)
            factor = tl.load(
                left + (slot * RANK + k)[:, None] * OUTPUTS + column[None, :],
                mask=(slot > 0)[:, None] & there[None, :],
                other=0.0,
            ).to(tl.float32)
            total += own[:, None] * factor
        at = token[:, None] * OUTPUTS + column[None, :]
        total += tl.load(product + at, mask=place, other=0.0).to(tl.float32)
        tl.store(y + at, total.to(y.dtype.element_ty), mask=place)


def shrink(x: torch.Tensor, right: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(T, P * r) float32: x (T, I), rows contiguous, times the factors right (slots, P * r, I) of each token's slot."""
    rows, inputs = right.shape[1:]
    padded = triton.next_power_of_2(rows)
    inner = torch.empty((len(x), rows), dtype=torch.float32, device=x.device)
    _shrink[(len(x),)](
        inner, x, right, slots, len(x), x.stride(0),
        INPUTS=inputs, ROWS=rows, ROWS_PADDED=padded, TILE=min(SHRINK_TILE // padded, triton.next_power_of_2(inputs)),
        num_warps=SHRINK_WARPS,
    )  # fmt: skip
    return inner


def expand(
    product: torch.Tensor,
    inner: torch.Tensor,
    left: torch.Tensor,
    slots: torch.Tensor,
    parts: Sequence[int],
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(T, O) of `dtype`: product (T, O), contiguous, plus inner (T, P * r) times the factors left (slots, r, O) of each token's
    slot, plus the bias (O,); summed in float32.
    """
    y = torch.empty(product.shape, dtype=dtype, device=product.device)
    first, second = parts[0], parts[1] if len(parts) > 1 else 0
    blocks = sum(triton.cdiv(part, EXPAND_COLUMNS) for part in parts)
    _expand[(triton.cdiv(len(y), EXPAND_TOKENS), blocks)](
        y, product, inner, left, slots, bias, len(y),
        FIRST=first, SECOND=second, OUTPUTS=y.shape[1], RANK=left.shape[1], PARTS=len(parts),
        TOKENS=EXPAND_TOKENS, COLUMNS=EXPAND_COLUMNS, num_warps=EXPAND_WARPS,
    )  # fmt: skip
    return y


# torch.compile and CUDA graphs see one operation.
_library = library.Library("alignment", "FRAGMENT")
_library.define(
    "member_linear(Tensor x, Tensor weight, Tensor? bias, Tensor right, Tensor left, Tensor slots, int[] parts) -> Tensor"
)
_library.define("member_embedding(Tensor ids, Tensor weight, Tensor right, Tensor left, Tensor slots) -> Tensor")


def _member_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    right: torch.Tensor,
    left: torch.Tensor,
    slots: torch.Tensor,
    parts: list[int],
) -> torch.Tensor:
    if x.dtype == torch.float32:
        product = torch.mm(x, weight.t())
    else:
        product = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return expand(product, shrink(x, right, slots), left, slots, parts, bias, x.dtype)


def _member_embedding(
    ids: torch.Tensor, weight: torch.Tensor, right: torch.Tensor, left: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    inner = left[slots[: len(ids)].long(), :, ids].float()  # (T, r)
    return expand(functional.embedding(ids, weight), inner, right, slots, [weight.shape[1]], None, weight.dtype)


_library.impl("member_linear", _member_linear, "CUDA")
_library.impl("member_embedding", _member_embedding, "CUDA")


@library.register_fake("alignment::member_linear", lib=_library)
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    right: torch.Tensor,
    left: torch.Tensor,
    slots: torch.Tensor,
    parts: list[int],
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@library.register_fake("alignment::member_embedding", lib=_library)
def _(
    ids: torch.Tensor, weight: torch.Tensor, right: torch.Tensor, left: torch.Tensor, slots: torch.Tensor
) -> torch.Tensor:
    return weight.new_empty((ids.shape[0], weight.shape[1]))
