"""The weights of any iteration of an ES run, from its base weights and its journal."""

from __future__ import annotations

from pathlib import Path

from alignment.errors import UserError
from alignment.ES.journal import read_journal
from alignment.ES.policy_weights import open_weights
from alignment.ES.weights import MasterWeights
from alignment.generation import Engine

_NEEDED = {"noise", "trainable", "lora_rank", "global_seed"}
_LOW_RANK = {"rank", "device"}


def replay(engine: Engine, base: str, path: Path, iteration: int | None = None) -> tuple[MasterWeights, list[dict]]:
    """The weights after `iteration` steps (default: all) of the journal at `path`, and the rows of those steps.

    `engine` holds the base policy from the folder `base`; it gets the weights, rounded to its dtype. Raises UserError when
    the journal is shorter, was begun from other weights, or is one of a run that drifts. Says so when bits may differ.
    """
    start, steps = read_journal(path)
    settings = start["settings"]
    needed = _NEEDED | (_LOW_RANK if settings.get("perturbation") == "low_rank" else set())
    if lacking := needed - settings.keys():
        raise UserError(
            f"{path}:1: the settings of the run lack {', '.join(sorted(lacking))}: was the file edited by hand?"
        )
    if iteration is not None and iteration > len(steps):
        raise UserError(f"{path} has {len(steps)} steps, fewer than {iteration}")
    if settings["noise"] == "reference":
        raise UserError(
            f"{path}: a run with noise: reference drifts, and its journal does not tell how; use its checkpoints"
        )
    weights = open_weights(engine, settings | {"policy_model_path": base, "master_device": "cpu"})
    found = weights.hash()
    if found != start["base_weights"]:
        raise UserError(
            f"{base} does not hold the base weights that {path} was begun from "
            f"({found[:12]}, not {start['base_weights'][:12]})"
        )
    if settings.get("perturbation") == "low_rank" and settings["device"] != engine.device.type:
        print(
            f"note: the run's steps were computed on {settings['device']}; on {engine.device.type} the last bits may differ"
        )
    for step in steps[:iteration]:
        weights.step(step["seeds"], step["coefficients"])
    weights.restore()
    return weights, steps[:iteration]
