"""Members in one batch: the PyTorch form against the sum written out, and the Triton kernels against the PyTorch form.

The kernels run on a GPU, or on the CPU where Triton is installed and TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import os

import pytest
import torch

from alignment.generation import member_kernels

CASES = [
    # parts of the output, inputs, rank, tokens
    ([64, 32, 32], 48, 1, 5),
    ([600, 600], 100, 3, 17),
    ([37], 1000, 8, 9),
    ([512, 128, 700], 64, 2, 1),
    ([1024], 5000, 1, 33),
]


def case(parts, inputs, rank, tokens, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(parts) + inputs)
    slots = 4
    x, y = torch.randn(tokens, inputs, generator=generator), torch.randn(tokens, sum(parts), generator=generator)
    right = torch.randn(slots, len(parts) * rank, inputs, generator=generator)
    left = 0.1 * torch.randn(slots, rank, sum(parts), generator=generator)
    right[0], left[0] = 0.0, 0.0
    member = torch.randint(0, slots, (tokens + 3,), generator=generator, dtype=torch.int32)
    return *(tensor.to(device, dtype) for tensor in (y, x, right, left)), member.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("parts", "inputs", "rank", "tokens"), CASES)
def test_each_token_gets_its_own_member(parts, inputs, rank, tokens, dtype):
    y, x, right, left, slots = case(parts, inputs, rank, tokens, dtype)
    expected = y.double()
    for token in range(tokens):
        start = 0
        for part, width in enumerate(parts):
            a = left[slots[token], :, start : start + width].double().T  # (width, r)
            b = right[slots[token], part * rank : (part + 1) * rank].double().T  # (I, r)
            expected[token, start : start + width] += a @ b.T @ x[token].double()
            start += width
    before = y.clone()
    found = member_kernels.add_members(y, x, right, left, slots, parts)
    assert found.dtype == dtype
    assert torch.equal(y, before)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=1e-4)


def test_embeddings_get_the_row_of_the_members_matrix():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 8, generator=generator)  # (V, H)
    right, left = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 2, 11, generator=generator)
    ids, slots = torch.tensor([4, 0, 10, 4]), torch.tensor([1, 2, 1, 2, 0], dtype=torch.int32)
    found = member_kernels.embed_members(weight[ids], ids, right, left, slots)
    for token, (row, slot) in enumerate(zip(ids, slots[:4], strict=True)):
        torch.testing.assert_close(found[token], (weight + left[slot].T @ right[slot])[row])
    if torch.cuda.is_available():
        on_gpu = [tensor.cuda() for tensor in (ids, weight, right, left, slots)]
        torch.testing.assert_close(torch.ops.alignment.member_embedding(*on_gpu).cpu(), found)


def test_slot_zero_changes_nothing():
    y, x, right, left, slots = case([40, 24], 32, 2, 6, torch.float16)
    assert torch.equal(member_kernels.add_members(y, x, right, left, torch.zeros_like(slots), [40, 24]), y)


@pytest.mark.skipif(
    member_kernels.triton is None or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")),
    reason="needs a GPU, or Triton and TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("parts", "inputs", "rank", "tokens"), CASES)
def test_kernels_equal_the_plain_form(parts, inputs, rank, tokens, dtype):
    y, x, right, left, slots = case(parts, inputs, rank, tokens, dtype, "cuda" if torch.cuda.is_available() else "cpu")
    bias = y[0]
    expected = member_kernels.add_members(y.float() + bias.float(), x, right, left, slots, parts).to(dtype)
    inner = member_kernels.shrink(x, right, slots)
    found = member_kernels.expand(y, inner, left, slots, parts, bias, dtype)
    step = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[
        dtype
    ]  # sums in another order, one rounding
    torch.testing.assert_close(found, expected, rtol=step, atol=step)
    weight = torch.randn(sum(parts), inputs, device=x.device).to(dtype) / inputs**0.5
    if dtype != torch.float32 and not x.is_cuda:  # the product of 16-bit numbers into float32 is a GPU's
        return
    whole = member_kernels._member_linear(x, weight, bias, right, left, slots, parts)
    shared = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    expected = member_kernels.add_members(shared, x, right, left, slots, parts)
    torch.testing.assert_close(whole.float(), expected, rtol=2 * step, atol=2 * step)
    unperturbed = member_kernels.expand(y, inner, left, torch.zeros_like(slots), parts, None, dtype)
    assert torch.equal(unperturbed, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the operation is for a GPU")
def test_operation_in_a_compiled_cuda_graph():
    """torch.compile keeps the operation whole, and a graph reads the slots that the buffer holds when it is replayed."""
    parts, inputs, tokens = [64, 32, 32], 48, 16
    _, x, right, left, slots = case(parts, inputs, 2, tokens, torch.float16, "cuda")
    weight = torch.randn(sum(parts), inputs, device="cuda", dtype=torch.float16)
    bias = torch.randn(sum(parts), device="cuda", dtype=torch.float16)

    @torch.compile(fullgraph=True)
    def layer(x):
        return torch.ops.alignment.member_linear(2 * x, weight, bias, right, left, slots, parts) + 1

    def expected():
        shared = torch.nn.functional.linear(2 * x, weight, bias)
        return member_kernels.add_members(shared, 2 * x, right, left, slots, parts) + 1

    torch.testing.assert_close(layer(x), expected(), rtol=2e-3, atol=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    slots.copy_(slots.flip(0))
    graph.replay()
    torch.testing.assert_close(y, expected(), rtol=2e-3, atol=1e-2)
