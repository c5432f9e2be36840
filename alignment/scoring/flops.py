"""How many floating-point operations a score takes: what a benchmark holds its rate against."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedConfig


def llama_flops(config: PreTrainedConfig, lengths: Iterable[int]) -> int:
    """Multiplications and additions of a Llama-type backbone over texts of `lengths` tokens, without padding.

    A linear layer of I inputs and O outputs takes 2 I O a token. Causal attention takes 2 D a head for each (query, key)
    pair for the scores and the same for the weighted sum, over t (t + 1) / 2 pairs. Embedding, norms, rotary and the head
    at one token are left out: under 0.1 % at 7B.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    kv = config.num_key_value_heads * head
    linears = hidden * heads * head + 2 * hidden * kv + heads * head * hidden + 3 * hidden * config.intermediate_size
    total = 0
    for tokens in lengths:
        pairs = tokens * (tokens + 1) // 2
        total += config.num_hidden_layers * (2 * linears * tokens + 4 * heads * head * pairs)
    return total
