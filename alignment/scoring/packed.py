"""Score models on a GPU without padding: texts stand one behind the other in one row, and attention stays inside each.

    forward = PackedForward(model, max_length=576)
    scores = forward.score([(1, 383, 2), (1, 383, 373, 2)])  # (N,) float32 on the device, in order

A batch holds up to TOKENS tokens, filled up with texts of pads to a multiple of STEP. Layers are compiled one by one, for any
number of tokens: they are alike, so that one compilation at start-up serves all layers and batches, and all batches run the
same kernels. That matters for scores as well: code compiled for one number of tokens rounds its sums differently from code
compiled for another, which moved a bfloat16 score by up to 0.04 with the size of its batch. Nothing here waits for the GPU:
what it computes on goes there through pinned memory, and nothing comes back, so that work can be queued behind work.

After `use_fp8` every linear layer of the backbone multiplies in float8 (e4m3): weights with a scale for each output row,
activations with a scale for each token. Scores then move; `local_scorer.py` measures by how much at start-up.

Attention is `torch.nn.attention.varlen` for 16-bit weights on CUDA, otherwise one scaled_dot_product_attention a text:
that is the plain path, which the tests hold the packed one against.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from alignment.errors import UserError
from alignment.scoring.score_model import ScoreModel

TOKENS = 16384  # in a batch at most, unless one text alone is longer
STEP = 512  # tokens that a batch is filled up to a multiple of
_MAX_TEXTS = 512  # in a batch
_NAME = "alignment_packed"


class PackedForward:
    """`model` is changed: its attention becomes the packed one; `warm_up` compiles its layers on CUDA."""

    def __init__(self, model: ScoreModel, max_length: int):
        # No mask function of this name, on purpose: transformers then makes no mask. With one, it looks at the positions for
        # packed texts first, and waits for the GPU to do so.
        AttentionInterface.register(_NAME, packed_attention)
        model.model.set_attn_implementation(_NAME)
        self.model, self.max_length = model, max_length
        self.device = next(model.parameters()).device
        # Sums over parts of a product must not be rounded to 16 bits: which parts depends on the number of tokens.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def use_fp8(self) -> None:
        """From now on the linear layers multiply in float8. Before `warm_up`."""
        use_fp8(self.model.model)

    def warm_up(self) -> None:
        """Compiles the layers; without it, on a CPU and in float32, they run as they are."""
        if self.device.type != "cuda" or self.model.score_head.weight.dtype == torch.float32:
            return
        for layer in self.model.model.layers:
            layer.compile(dynamic=True)
        for tokens in (TOKENS, STEP):  # the compiler takes the first as the size to plan for
            length = min(self.max_length, tokens - 1)
            self.score([(0,) * length] * (tokens // length))

    @torch.inference_mode()
    def score(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """End scores (N,) float32 of N >= 1 texts given as token ids, in their order.

        Raises ValueError for a text that has no token or more than `max_length`: attention would stop in its midst.
        """
        for index, text in enumerate(texts):
            if not 0 < len(text) <= self.max_length:
                raise ValueError(f"text {index} has {len(text)} tokens, expected 1 to {self.max_length}")
        groups = batches([len(text) for text in texts])
        scores = torch.cat([self._batch([texts[row] for row in rows]) for rows in groups])  # (N,), batch by batch
        places = torch.tensor([row for rows in groups for row in rows]).argsort()  # (N,) of each text in `scores`
        return scores.index_select(0, to_device(places, self.device))

    def _batch(self, texts: list[tuple[int, ...]]) -> torch.Tensor:
        tokens, starts = pack(texts, self.max_length)
        positions = torch.cat([torch.arange(end - start) for start, end in zip(starts, starts[1:], strict=False)])
        # Empty texts at the end keep the shape of `starts`: the number of texts is not part of what is compiled.
        fixed = torch.full((_MAX_TEXTS + STEP + 1,), starts[-1], dtype=torch.int32)
        fixed[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
        ids = torch.tensor(tokens)[None]  # (1, T)
        ends = torch.tensor(starts[1 : len(texts) + 1]) - 1  # (N,)
        ids, positions, fixed, ends = (to_device(t, self.device) for t in (ids, positions, fixed, ends))
        hidden = self.model.model(
            input_ids=ids,
            position_ids=positions[None],
            use_cache=False,
            text_starts=fixed,
            longest_text=self.max_length,
        ).last_hidden_state  # (1, T, H)
        return self.model.end_scores(hidden[0].index_select(0, ends))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`. On CUDA it is still on its way: through pinned memory, without which the host would wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows grouped so that each group has up to TOKENS tokens: the longest texts first, each into the first group with room."""
    groups: list[list[int]] = []
    room: list[int] = []  # tokens left in each group
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fits = (at for at, left in enumerate(room) if left >= lengths[row] and len(groups[at]) < _MAX_TEXTS)
        at = next(fits, len(groups))
        if at == len(groups):
            groups.append([])
            room.append(TOKENS)
        groups[at].append(row)
        room[at] -= lengths[row]
    return groups


def pack(texts: list[tuple[int, ...]], max_length: int) -> tuple[list[int], list[int]]:
    """Ids of the texts one behind the other, filled up to a multiple of STEP with texts of pads (id 0), and where each starts.

    The last start is the total length.
    """
    tokens = [token for text in texts for token in text]
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text))
    wanted = -(-len(tokens) // STEP) * STEP
    while starts[-1] < wanted:
        starts.append(min(starts[-1] + max_length, wanted))
    return tokens + [0] * (wanted - len(tokens)), starts


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    text_starts: torch.Tensor,
    longest_text: int,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each text. query (1, H, T, D), key and value (1, H_kv, T, D) -> (1, T, H, D)."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    if query.is_cuda and query.dtype != torch.float32:
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return _varlen(query, key, value, text_starts, longest_text, scaling)[None], None
    output = torch.empty_like(query)
    bounds = text_starts.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        if end > start:
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))  # (1, H, t, D)
            part = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            output[start:end] = part[0].transpose(0, 1)
    return output[None], None


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" in inspect.signature(varlen_attn).parameters:  # causal is a window that looks back only
        how: dict[str, Any] = {"window_size": (-1, 0), "scale": scaling}
    else:  # torch 2.10
        how = {"is_causal": True}
    # A tuple comes only where the log-sum-exp is asked for.
    return varlen_attn(query, key, value, starts, starts, longest, longest, **how)  # type: ignore[return-value]


class Fp8Linear(nn.Module):
    """A linear layer without bias in float8: y = (x / s_x) (W / s_w)^T s_x s_w, s_x one a token, s_w one an output row."""

    LARGEST = torch.finfo(torch.float8_e4m3fn).max
    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()  # (O, I)
        scale = weight.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / self.LARGEST  # (O, 1)
        self.register_buffer("weight", (weight.float() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.t().contiguous())  # (1, O)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., I) 16 bit to (..., O) of the same dtype."""
        flat = x.reshape(-1, x.shape[-1])
        scale = flat.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / self.LARGEST  # (T, 1)
        small = (flat.float() / scale).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(
            small, self.weight.t(), scale_a=scale, scale_b=self.scale, out_dtype=x.dtype, use_fast_accum=True
        )
        return y.view(*x.shape[:-1], -1)


def can_pack(model: nn.Module) -> bool:
    """Whether this forward is the model's own: a Beaver model, whose attention is plain (no window, no cap on its logits)."""
    return isinstance(model, ScoreModel) and model.config.model_type == "llama"


def check_fp8(device: torch.device, dtype: str, deterministic: bool) -> None:
    """Raises UserError where float8 cannot be had or is not what was asked for."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("SCORER_FP8 needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper); leave it out")
    if dtype != "bfloat16":  # torch's float8 product with a scale a row gives bfloat16
        raise UserError(f"SCORER_FP8 computes in bfloat16, SCORER_DTYPE asks for {dtype}: set one of them")
    if deterministic:
        raise UserError("SCORER_FP8 and SCORER_DETERMINISTIC exclude each other: set one of them")


def use_fp8(backbone: nn.Module) -> None:
    """Replaces every bias-free linear layer of the backbone by its float8 form, but those of odd sizes: the product wants 16."""
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if (
                isinstance(child, nn.Linear)
                and child.bias is None
                and not any(size % 16 for size in child.weight.shape)
            ):
                setattr(module, name, Fp8Linear(child))
