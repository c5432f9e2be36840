"""Engines that turn prompts into answers, behind one interface (engine.py).

    engine.generate(prompts, max_new_tokens, ...) -> list[Generation]
    engine.generate_members(prompts, max_new_tokens, members, on_answers)
    engine.weights() -> {Hugging Face parameter name: the tensor that the engine computes with}

`TransformersEngine` is the default, on a CPU and on GPUs; `vllm_engine.VLLMEngine` is for GPU clusters.
"""

from alignment.generation.engine import Engine, Generation
from alignment.generation.members import LowRank
from alignment.generation.transformers_engine import TransformersEngine

__all__ = ["Engine", "Generation", "LowRank", "TransformersEngine"]
