"""Where a run is: what lies in its folder, whether anything is left to do, and the weights of its last step, saved and read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.errors import UserError
from alignment.ES.journal import read_journal
from alignment.records import read_jsonl, read_object, write_json
from alignment.runs import atomic_directory

if TYPE_CHECKING:  # slow to import, and most of this is asked before any model is loaded
    from alignment.ES.weights import MasterWeights
    from alignment.generation import Engine

# A run writes none of them before the first row of its journal is on disk.
_AFTER_THE_JOURNAL = ("metrics.jsonl", "members.*.jsonl", "eval/*", "tensorboard", "checkpoints/*", "best", "final")


def left_by_a_run(folder: Path) -> list[str]:
    """Names of what a run has left in `folder` besides its journal."""
    if not os.path.isdir(folder):
        return []
    found = {path.relative_to(folder).parts[0] for pattern in _AFTER_THE_JOURNAL for path in folder.glob(pattern)}
    return sorted(found)


def is_finished(folder: Path, num_iterations: int) -> bool:
    """Whether nothing is left to do: the journal has all steps, the policy after them is evaluated, and final/ is that policy.

    final/ may be that of a shorter run which was gone on with. Files that are torn or damaged say no: going on mends or
    tells it.
    """
    try:
        steps = len(read_journal(folder / "journal.jsonl")[1])
        if steps < num_iterations:
            return False
        saved = read_object(folder / "final" / "trainer_state.json", iteration=int)["iteration"]
        rows = read_jsonl(folder / "metrics.jsonl", required=("kind", "iteration"))
    except UserError:
        return False
    return saved == steps and any(row["kind"] == "eval" and row["iteration"] == steps for row in rows)


def restore(weights: MasterWeights, folder: Path, steps: list[dict]) -> int:
    """`weights` <- those after `steps`: from the newest checkpoint that is not ahead of them, then by replay.

    Returns the checkpoint's step, 0 without one. Raises UserError for a checkpoint that is damaged.
    """
    begin = 0
    for checkpoint in sorted((folder / "checkpoints").glob("iteration_*"), reverse=True):
        try:
            saved = read_object(checkpoint / "trainer_state.json", iteration=int)["iteration"]
            if saved <= len(steps):
                weights.load(checkpoint)
                begin = saved
                break
        except UserError as error:
            raise UserError(
                f"{error}. Remove that checkpoint: the same command goes on from an older one, or from the journal alone"
            ) from error
    for step in steps[begin:]:
        weights.step(step["seeds"], step["coefficients"])
    weights.restore()
    return begin


def save_model(final: Path, engine: Engine, weights: MasterWeights, adapters: bool, card: str, state: dict) -> None:
    """The policy in Hugging Face layout, float32, with `card` as its README.md and the trainer's state beside it.

    `adapters`: `weights` are those of LoRA adapters in `engine`.
    """
    from safetensors.torch import save_file

    weights.restore()
    with atomic_directory(final, needed=4 * engine.num_parameters) as folder:
        if not adapters:
            engine.save_pretrained(folder, weights.whole())
        else:  # merged; to go on, the adapters are needed
            engine.save_pretrained(folder)
            (folder / "adapters").mkdir()  # not among the model's own files: loaders take all that lie there
            save_file(weights.master, folder / "adapters" / "es_weights.safetensors")
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "trainer_state.json", state)
