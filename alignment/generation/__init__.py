"""Engines that turn prompts into responses; each has the interface of `TransformersEngine`, the default.

    engine.generate(prompts, max_new_tokens, ...) -> list[Generation]
    engine.weights() -> {Hugging Face parameter name: the tensor that the engine computes with}

The response is the model's own first turn: it is cut here, once, and nowhere else.
"""

from alignment.generation.transformers_engine import Generation, TransformersEngine

__all__ = ["Generation", "TransformersEngine"]
