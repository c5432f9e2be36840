"""Rebuilds the weights of any iteration of an ES run from its base weights and its journal.

    python alignment/ES/rebuild_checkpoint.py --journal RUN/journal.jsonl --iteration 120 \\
        --policy_model_path BASE --output rebuilt/

The result is the checkpoint that the run itself saved after that many steps, bit for bit: Hugging Face layout, float32,
with the tokenizer. A journal that was begun from other base weights is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.ES.journal import read_journal
from alignment.records import write_json
from alignment.runs import atomic_directory


@dataclass
class RebuildSettings:
    journal: str = setting("", "journal.jsonl of the run")
    iteration: int | None = setting(None, "how many steps to take; default: all that the journal has", minimum=0)
    policy_model_path: str = setting("", "the base policy that the run began from")
    output: str = setting("", "folder for the rebuilt model")

    def __post_init__(self) -> None:
        for name in ("journal", "policy_model_path", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing")


def main() -> None:
    settings = load_config(
        RebuildSettings,
        prog="rebuild_checkpoint.py",
        description="Rebuilds the weights of any iteration of an ES run from base weights and journal.",
        epilog="example: rebuild_checkpoint.py --journal runs/es1/journal.jsonl --iteration 120 "
        "--policy_model_path models/alpaca-7b --output rebuilt/es1-120",
    )
    start, steps = read_journal(Path(settings.journal))
    iteration = len(steps) if settings.iteration is None else settings.iteration
    if iteration > len(steps):
        raise UserError(f"{settings.journal} has {len(steps)} steps, fewer than --iteration {iteration}")

    from alignment.ES.weights import open_weights
    from alignment.generation import TransformersEngine

    engine = TransformersEngine(settings.policy_model_path, dtype="float32")
    weights = open_weights(
        engine, start["settings"] | {"policy_model_path": settings.policy_model_path, "master_device": "cpu"}
    )
    if weights.hash() != start["base_weights"]:
        raise UserError(
            f"{settings.policy_model_path} does not hold the base weights that {settings.journal} was begun from "
            f"({weights.hash()[:12]}, not {start['base_weights'][:12]})"
        )
    for step in steps[:iteration]:
        weights.step(step["seeds"], step["coefficients"])
    weights.restore()
    lambda_state = steps[iteration - 1]["lambda_state"] if iteration else None
    with atomic_directory(settings.output) as folder:
        engine.save_pretrained(folder, weights.master)
        write_json(folder / "trainer_state.json", {"iteration": iteration, "lambda_state": lambda_state})
    print(f"{settings.output}: the policy after {iteration} of {len(steps)} steps")


if __name__ == "__main__":
    run_main(main)
