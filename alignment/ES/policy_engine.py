"""The engine that an ES run generates with, as its settings ask for it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch

from alignment.conversation import get_template, load_tokenizer
from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.ES.settings import ESSettings
from alignment.generation import Engine, TransformersEngine
from alignment.generation.loading import read_policy_config, shapes_of
from alignment.model_folder import resolve_folder


def open_engine(settings: ESSettings, prompts: Sequence[str], processes: Processes) -> Engine:
    """The policy on this process's GPU, or on the CPU. `prompts` are all that it will be asked.

    Raises UserError, for vLLM before it loads anything when the weights, the master and a KV cache do not fit.
    """
    if settings.noise == "reference" and processes.world_size > 1:
        raise UserError(
            f"noise: reference drifts by the members that a process tries, so {processes.world_size} processes would each have "
            "weights of their own: run it on one"
        )
    gpus = torch.cuda.device_count()
    named, visible = settings.cuda_devices, os.environ.get("CUDA_VISIBLE_DEVICES")
    if named and (not gpus or (named == visible and gpus < len(named.split(",")))):
        raise UserError(
            f"cuda_devices is {named!r}, but PyTorch finds {gpus} GPU(s) there: name those that nvidia-smi lists, or leave "
            "cuda_devices out to take what is there"
        )
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
    folder = resolve_folder(settings.policy_model_path)
    limit = getattr(read_policy_config(folder).get_text_config(), "max_position_embeddings", None)
    tokenizer = load_tokenizer(folder)
    template = get_template(settings.policy_template, tokenizer)
    longest = max(len(template.encode_prompt(tokenizer, prompt)) for prompt in prompts) + settings.max_new_tokens
    return longest if limit is None else min(longest, limit)


def _master_bytes(settings: ESSettings) -> int:
    """What the float32 master (weights.py, low_rank.py) takes of the GPU."""
    if settings.master_device == "cpu" or settings.noise == "reference":
        return 0
    shapes = shapes_of(read_policy_config(resolve_folder(settings.policy_model_path)))
    pattern = None if settings.perturbation == "low_rank" else settings.trainable
    return 4 * sum(shape.numel() for name, shape in shapes.items() if pattern is None or re.search(pattern, name))
