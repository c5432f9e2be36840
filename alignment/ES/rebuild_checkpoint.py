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
    from alignment.ES.replay import replay
    from alignment.generation import TransformersEngine

    engine = TransformersEngine(settings.policy_model_path, dtype="float32")
    weights, steps = replay(engine, settings.policy_model_path, Path(settings.journal), settings.iteration)
    lambda_state = steps[-1]["lambda_state"] if steps else None
    with atomic_directory(settings.output) as folder:
        engine.save_pretrained(folder, weights.master)
        write_json(folder / "trainer_state.json", {"iteration": len(steps), "lambda_state": lambda_state})
    print(f"{settings.output}: the policy after {len(steps)} steps")


if __name__ == "__main__":
    run_main(main)
