"""The few values of a LLaMA's config.json that decide which tensors it has, and the list of these tensors.

transformers knows the same (a test compares the two), but importing it takes longer than adding a gigabyte of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.records import read_object

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_KINDS: dict[str, Any] = {  # of the values that are no whole numbers
    "rope_scaling": dict,
    "tie_word_embeddings": bool,
    "rms_norm_eps": float,
    "rope_theta": (int, float),
}


@dataclass(frozen=True)
class LlamaConfig:
    """Names as in config.json; the defaults are those of LLaMA-7B, which old files leave out."""

    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{tensor name: shape} in the order of the model's state dict; a tied head is listed as well."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, mlp = self.hidden_size, self.intermediate_size
        layer = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        layers = {
            f"model.layers.{index}.{name}.weight": shape
            for index in range(self.num_hidden_layers)
            for name, shape in layer.items()
        }
        table = (self.vocab_size, hidden)
        return {EMBEDDINGS: table, **layers, "model.norm.weight": (hidden,), HEAD: table}


def read_llama_config(folder: Path) -> LlamaConfig:
    """The folder's config.json. Raises UserError naming the key when it is not a LLaMA's or a value is of the wrong kind."""
    path = folder / "config.json"
    content = read_object(path)
    if content.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {content.get('model_type')!r}, expected 'llama'")
    # transformers 5 writes both rope settings into one entry.
    rope = content.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters is {rope!r}, expected what a LLaMA model has there")
    scaled = rope if rope.get("rope_type", "default") != "default" else None
    values: dict[str, Any] = {"rope_theta": rope.get("rope_theta"), "rope_scaling": scaled}
    values |= {field.name: content[field.name] for field in fields(LlamaConfig) if content.get(field.name) is not None}
    values = {name: value for name, value in values.items() if value is not None}
    for name, value in values.items():
        if not isinstance(value, _KINDS.get(name, int)):
            raise UserError(f"{path}: {name} is {value!r}, expected what a LLaMA model has there")
    return LlamaConfig(**values)
