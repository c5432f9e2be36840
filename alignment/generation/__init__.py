"""Engines that turn prompts into answers, behind one interface (engine.py).

    engine.generate(prompts, max_new_tokens, ...) -> list[Generation]
    engine.weights() -> {Hugging Face parameter name: the tensor that the engine computes with}

`TransformersEngine` is the default, on a CPU and on GPUs; `vllm_engine.VLLMEngine` is for GPU clusters.
"""

from alignment.generation.engine import Engine, Generation
from alignment.generation.transformers_engine import TransformersEngine

__all__ = ["Engine", "Generation", "TransformersEngine"]
