"""Rebuilds the weights of any iteration of an ES run from its base weights and its journal.

    python alignment/ES/rebuild_checkpoint.py --journal RUN/journal.jsonl --iteration 120 \\
        --policy_model_path BASE --output rebuilt/

The result is the checkpoint that the run itself saved after that many steps, bit for bit: Hugging Face layout, float32,
with the tokenizer. A journal that was begun from other base weights is refused. The steps of a low-rank run are matrix
products, whose last bits are those of a kind of device: give the one that the run had with --device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.ES.journal import read_journal
from alignment.records import check_writable_folder, write_json
from alignment.runs import atomic_directory


@dataclass
class RebuildSettings:
    journal: str = setting("", "journal.jsonl of the run")
    iteration: int | None = setting(None, "how many steps to take; default: all that the journal has", minimum=0)
    policy_model_path: str = setting("", "the base policy that the run began from")
    output: str = setting("", "folder for the rebuilt model")
    device: Literal["cpu", "cuda"] = setting("cpu", "where steps are computed; decides the last bits of a low-rank run")

    def __post_init__(self) -> None:
        for name in ("journal", "policy_model_path", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing")


def main() -> None:
    settings = load_config(RebuildSettings, prog="rebuild_checkpoint.py", description=__doc__)
    check_writable_folder(Path(settings.output).absolute().parent)  # the folder itself appears whole
    begun, _ = read_journal(Path(settings.journal))
    from alignment.ES.replay import replay
    from alignment.generation import TransformersEngine

    # Adapters are merged into the base as the run had it; otherwise all weights are the checkpoint's own.
    dtype = begun["settings"].get("base_dtype", "float32")
    engine = TransformersEngine(settings.policy_model_path, dtype=dtype, device=settings.device)
    weights, steps = replay(engine, settings.policy_model_path, Path(settings.journal), settings.iteration)
    lambda_state = steps[-1].get("lambda_state") if steps else None
    with atomic_directory(settings.output) as folder:
        engine.save_pretrained(folder, weights.whole())
        write_json(folder / "trainer_state.json", {"iteration": len(steps), "lambda_state": lambda_state})
    print(f"{settings.output}: the policy after {len(steps)} steps")


if __name__ == "__main__":
    run_main(main)
