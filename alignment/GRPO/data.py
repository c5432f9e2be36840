"""The prompts of a GRPO run as TRL wants them."""

from __future__ import annotations

from datasets import Dataset

from alignment.errors import UserError
from alignment.generation import TransformersEngine
from alignment.prompts import iteration_prompts


def prompts_that_fit(engine: TransformersEngine, prompts: list[str], longest: int) -> list[str]:
    """The prompts of at most `longest` tokens with their template, in order. Raises UserError when none is left."""
    fitting = [text for text in prompts if len(engine.template.encode_prompt(engine.tokenizer, text)) <= longest]
    if not fitting:
        raise UserError(f"all {len(prompts)} training prompts are longer than max_prompt_length {longest} tokens")
    return fitting


def run_order(prompts: list[str], prompts_per_step: int, max_steps: int, seed: int) -> Dataset:
    """The whole run's prompts, step after step, as one pass: columns `prompt` (the user's bare words) and `row`.

    The draw of a step is ES's. TRL's own shuffle replays the first epoch's order after a resume in a later one, so the
    trainer must take these rows as they come (`shuffle_dataset=False`).
    """
    rows = [row for step in range(max_steps) for row in iteration_prompts(len(prompts), prompts_per_step, seed, step)]
    return Dataset.from_dict({"prompt": [prompts[row] for row in rows], "row": rows})
