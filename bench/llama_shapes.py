"""What the benchmarks compute on, imported by them: Llama shapes, lengths of answers, a vLLM engine with random 7B weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from vllm import SamplingParams

    from alignment.generation.vllm_engine import VLLMEngine


def llama(hidden: int, mlp: int, layers: int, heads: int, vocabulary: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def llama_7b(layers: int, **more: Any) -> LlamaConfig:
    """Alpaca's and Beaver's shapes; the whole model has 32 layers."""
    return llama(4096, 11008, layers, 32, 32001, **more)


def policy_7b(layers: int) -> LlamaConfig:
    """A 7B policy in float16, as ES writes its config.json."""
    return llama_7b(layers, pad_token_id=0, dtype="float16", architectures=["LlamaForCausalLM"])


def shapes_of(config: LlamaConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def draw_lengths(path: str | None, count: int) -> np.ndarray:
    """(count, 2) tokens of prompt and response: rows of the CSV in a fixed random order; without a file 45 and 255 each."""
    if path is None:
        return np.full((count, 2), (45, 255))
    return np.random.default_rng(0).permutation(np.loadtxt(path, delimiter=",", dtype=int))[:count]


def byte_tokenizer(folder: str | Path) -> None:
    """Saves a tokenizer that has a token for each byte."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>"])}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.ByteFallback()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def start_vllm(folder: str | Path, layers: int, **options: Any) -> tuple[VLLMEngine, float]:
    """vLLM with random float16 weights in the 7B policy's shapes, and the seconds that it took to start."""
    from alignment.generation.vllm_engine import VLLMEngine

    policy_7b(layers).save_pretrained(folder)
    byte_tokenizer(folder)
    began = time.perf_counter()
    engine = VLLMEngine(folder, dtype="float16", load_format="dummy", max_model_len=1088, **options)
    took = time.perf_counter() - began
    generator = torch.Generator("cuda").manual_seed(0)
    for tensor in engine.parameters().values():
        if tensor.dim() > 1:
            tensor.normal_(0, 0.02, generator=generator)
    return engine, took


def greedy_requests(lengths: np.ndarray) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of random ids, and what asks vLLM for greedy answers of exactly these lengths (N, 2)."""
    from vllm import SamplingParams

    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 31000, int(length)).tolist() for length, _ in lengths]
    choices = [
        SamplingParams(temperature=0.0, max_tokens=int(length), ignore_eos=True, detokenize=False)
        for _, length in lengths
    ]
    return prompts, choices
