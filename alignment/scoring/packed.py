"""Score models on a GPU without padding: texts stand one behind the other in one row, and attention stays inside each.

    forward = PackedForward(model, max_length=576)
    scores = forward.score([(1, 383, 2), (1, 383, 373, 2)])  # (N,) float32 on the device, in order

A batch is cut to a few total lengths (BUCKETS), each filled up with a text of pads, so that what torch.compile makes for a
bucket at start-up serves for good: neither the number of texts nor their lengths change a shape. Layers are compiled one by
one; they are alike, so one compilation serves all. Nothing is copied back to the host but the scores, once a batch.

With `fp8=True` every linear layer of the backbone multiplies in float8 (e4m3): weights with a scale for each output row,
activations with a scale for each token. Scores then move; `scorer_service` measures by how much at start-up.

Attention is `torch.nn.attention.varlen` for 16-bit weights on CUDA, otherwise one scaled_dot_product_attention a text:
that is the plain path, which the tests hold the packed one against.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from alignment.scoring.score_model import ScoreModel

BUCKETS = (1024, 2048, 4096, 8192, 16384)  # tokens in a batch
_MAX_TEXTS = 512  # in a batch
_NAME = "alignment_packed"


class PackedForward:
    """`model` is changed: its attention becomes the packed one and, on CUDA, its layers are compiled."""

    def __init__(self, model: ScoreModel, max_length: int, fp8: bool = False, compiled: bool | None = None):
        AttentionInterface.register(_NAME, packed_attention)
        AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
        model.model.set_attn_implementation(_NAME)
        self.model, self.max_length = model, max_length
        self.device = next(model.parameters()).device
        if fp8:
            use_fp8(model.model)
        # Sums over parts of a product must not be rounded to 16 bits: which parts depends on the number of tokens.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        if self.device.type == "cuda" if compiled is None else compiled:
            for layer in model.model.layers:
                layer.compile(dynamic=False)

    def warm_up(self) -> None:
        """Compiles every bucket."""
        for tokens in BUCKETS:
            count = max(1, tokens // self.max_length)
            self.score([(0,) * min(self.max_length, tokens - 1)] * count)

    @torch.inference_mode()
    def score(self, texts: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """End scores (N,) float32 of N texts given as token ids, in their order. No text may exceed `max_length` tokens."""
        scores = torch.empty(len(texts), device=self.device)
        for rows in batches([len(text) for text in texts]):
            scores[rows] = self._batch([texts[row] for row in rows])
        return scores

    def _batch(self, texts: list[tuple[int, ...]]) -> torch.Tensor:
        tokens, starts = pack(texts, self.max_length)
        positions = torch.cat([torch.arange(end - start) for start, end in zip(starts, starts[1:], strict=False)])
        # Empty texts at the end keep the shape of `starts`: the number of texts is not part of what is compiled.
        fixed = torch.full((_MAX_TEXTS + len(BUCKETS) * 32,), starts[-1], dtype=torch.int32)
        fixed[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
        ids = torch.tensor(tokens)[None]  # (1, T)
        ends = torch.tensor(starts[1 : len(texts) + 1]) - 1  # (N,)
        if self.device.type == "cuda":
            ids, positions, fixed, ends = (t.pin_memory() for t in (ids, positions, fixed, ends))
        ids, positions, fixed, ends = (t.to(self.device, non_blocking=True) for t in (ids, positions, fixed, ends))
        hidden = self.model.model(
            input_ids=ids,
            position_ids=positions[None],
            use_cache=False,
            text_starts=fixed,
            longest_text=self.max_length,
        ).last_hidden_state  # (1, T, H)
        return self.model.end_scores(hidden[0, ends])


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows grouped so that each group fits the largest bucket; the longest texts first, so that groups fill up well."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    room = 0
    for row in order:
        if lengths[row] > room or len(groups[-1]) == _MAX_TEXTS:
            groups.append([])
            room = BUCKETS[-1]
        groups[-1].append(row)
        room -= lengths[row]
    return groups


def pack(texts: list[tuple[int, ...]], max_length: int) -> tuple[list[int], list[int]]:
    """Ids of the texts one behind the other, filled up to a bucket with texts of pads (id 0), and where each text starts.

    The last start is the total length. A batch longer than the largest bucket keeps its length.
    """
    tokens = [token for text in texts for token in text]
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text))
    wanted = next((bucket for bucket in BUCKETS if bucket >= len(tokens)), len(tokens))
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
            one = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))  # (1, H, t, D)
            part = functional.scaled_dot_product_attention(*one, is_causal=True, scale=scaling, enable_gqa=True)
            output[start:end] = part[0].transpose(0, 1)
    return output[None], None


def _varlen(query, key, value, starts, longest, scaling):
    from torch.nn.attention.varlen import varlen_attn

    if "window_size" in inspect.signature(varlen_attn).parameters:  # causal is a window that looks back only
        how = {"window_size": (-1, 0), "scale": scaling}
    else:  # torch 2.10
        how = {"is_causal": True}
    return varlen_attn(query, key, value, starts, starts, longest, longest, **how)


class Fp8Linear(nn.Module):
    """A linear layer without bias in float8: y = (x / s_x) (W / s_w)^T s_x s_w, s_x one a token, s_w one an output row."""

    LARGEST = torch.finfo(torch.float8_e4m3fn).max

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


def use_fp8(backbone: nn.Module) -> None:
    """Replaces every bias-free linear layer of the backbone by its float8 form."""
    for module in list(backbone.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None:
                setattr(module, name, Fp8Linear(child))
