"""The engine that an ES run generates with, as its settings ask for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig

from alignment.conversation import get_template, load_tokenizer
from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.ES.settings import ESSettings
from alignment.generation import Engine, TransformersEngine


def open_engine(settings: ESSettings, prompts: Sequence[str], processes: Processes) -> Engine:
    """The policy on this process's GPU, or on the CPU. `prompts` are all that it will be asked.

    Raises UserError, for vLLM before it loads anything when the weights, the master and a KV cache do not fit.
    """
    gpus = torch.cuda.device_count()
    common: dict[str, Any] = {
        "template": settings.policy_template,
        "device": f"cuda:{processes.local_rank % gpus}" if gpus else "cpu",
        "dtype": settings.dtype,
        "first_turn_only": settings.first_turn_only,
    }
    path = settings.policy_model_path
    if settings.engine == "transformers":
        return TransformersEngine(path, batch_size=settings.generation_batch_size, **common)
    from alignment.generation.vllm_engine import MAX_NUM_SEQS, VLLMEngine  # it sets vLLM's environment variables

    if 1 < gpus <= processes.local_rank:  # with one that is visible, each process may have its own
        raise UserError(
            f"engine: vllm needs a GPU for each process; this is process {processes.local_rank + 1} of {gpus} GPUs"
        )
    low_rank = settings.perturbation == "low_rank"
    everyone = settings.population_size + 1
    return VLLMEngine(
        path,
        max_model_len=_longest(settings, prompts),
        max_num_seqs=settings.max_num_seqs or MAX_NUM_SEQS,
        reserved_bytes=_master_bytes(settings) if gpus else 0,
        members_at_once=(settings.members_at_once or -(-everyone // processes.world_size)) if low_rank else 0,
        member_rank=settings.rank,
        **common,
    )


def _longest(settings: ESSettings, prompts: Sequence[str]) -> int:
    """Tokens that the longest prompt and its answer may have, at most what the model can."""
    tokenizer = load_tokenizer(settings.policy_model_path)
    template = get_template(settings.policy_template, tokenizer)
    longest = max(len(template.encode_prompt(tokenizer, prompt)) for prompt in prompts) + settings.max_new_tokens
    return min(longest, AutoConfig.from_pretrained(settings.policy_model_path).max_position_embeddings)


def _master_bytes(settings: ESSettings) -> int:
    """What the float32 master (weights.py, low_rank.py) takes of the GPU."""
    from alignment.generation.vllm_engine import shapes_of

    if settings.master_device == "cpu" or settings.noise == "reference":
        return 0
    shapes = shapes_of(AutoConfig.from_pretrained(settings.policy_model_path))
    pattern = None if settings.perturbation == "low_rank" else settings.trainable
    return 4 * sum(shape.numel() for name, shape in shapes.items() if pattern is None or re.search(pattern, name))
