"""The journal: an ES run as seeds and coefficients, from which the weights of any iteration can be rebuilt.

    RUN/journal.jsonl     {"kind": "start", "base_weights": ..., "settings": {...}}, then one row an iteration:
                          {"kind": "step", "iteration", "seeds", "fitness", "coefficients", "lambda_state", ...}
    RUN/members.K.jsonl   full scores of the members that process K finished in the iteration in progress, so that a killed
                          run asks the scorer only for what is missing; emptied once their step is in the journal

A row is on disk before the run goes on. The step of iteration t is taken from `coefficients`; nothing is computed anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.records import JsonlWriter, read_jsonl, write_jsonl
from alignment.scoring.scores import asked_of

MEMBER_KEYS = "iteration member rewards costs errors tokens unfinished cut truncated distinct".split()


class Journal:
    """The steps of a run. One process, the main one, has it open."""

    def __init__(self, folder: Path, base_weights: str, settings: dict[str, Any]):
        """Opens the journal in `folder` or begins one. `settings` are those that decide the weights.

        Raises UserError when the journal there belongs to other base weights or settings.
        """
        path = folder / "journal.jsonl"
        self._file = JsonlWriter(path)
        self.dropped_tail = bool(self._file.dropped)
        if not read_jsonl(path):
            self._file.append({"kind": "start", "base_weights": base_weights, "settings": settings})
        start, self.steps = read_journal(path)
        _check_start(path, start, base_weights, settings)
        for number, step in enumerate(self.steps, start=2):
            _check_state(f"{path}:{number}", step)

    def add_step(self, row: dict) -> None:
        self._file.append({"kind": "step", **row})
        self.steps.append(row)

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path) -> tuple[dict, list[dict]]:
    """The start row and the steps. Raises UserError for what is no journal or lacks a step."""
    rows = read_jsonl(path, required=("kind",))
    if not rows or rows[0]["kind"] != "start":
        raise UserError(f"{path}:1: not an ES journal (its first row must say kind 'start')")
    if not isinstance(rows[0].get("base_weights"), str) or not isinstance(rows[0].get("settings"), dict):
        raise UserError(f"{path}:1: not an ES journal (its first row must have base_weights and settings)")
    for number, step in enumerate(rows[1:]):
        if step.get("iteration") != number:
            raise UserError(f"{path}:{number + 2}: expected iteration {number}, found {step.get('iteration')!r}")
        _check_step(f"{path}:{number + 2}", step)
    return rows[0], rows[1:]


def _check_step(where: str, step: dict) -> None:
    """Raises UserError when the weights cannot be taken from it."""
    for key in ("seeds", "coefficients"):
        if not isinstance(step.get(key), list):
            raise UserError(f"{where}: the step's {key} is no list: {step.get(key)!r:.40}")
    seeds, coefficients = step["seeds"], step["coefficients"]
    if len(seeds) != len(coefficients) or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{where}: expected whole numbers as seeds, and a coefficient for each")
    if not all(type(factor) in (int, float) and math.isfinite(factor) for factor in coefficients):
        raise UserError(f"{where}: a coefficient is not a finite number")


def _check_state(where: str, step: dict) -> None:
    """Raises UserError when a run cannot go on from it."""
    state = step.get("lambda_state")
    if not isinstance(state, dict) or type(state.get("value")) not in (int, float) or "cost_ema" not in state:
        raise UserError(f"{where}: the step has no lambda_state with value and cost_ema")
    if not isinstance(step.get("metrics"), dict):
        raise UserError(f"{where}: the step has no metrics")


def begun_with(path: Path) -> dict | None:
    """The settings in the journal's first row, before anything is loaded; None while no run has written one whole.

    Raises UserError for a first row that is none.
    """
    try:
        with path.open("rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give another --experiment_dir") from error
    if not line.endswith(b"\n"):
        return None
    try:
        start = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:1: not valid JSON ({error}): not an ES journal, or a damaged one") from error
    settings = start.get("settings") if isinstance(start, dict) else None
    if not isinstance(settings, dict) or not isinstance(settings.get("scorer", {}), dict):
        raise UserError(f"{path}:1: not an ES journal (its first row must have base_weights and settings)")
    return settings


def check_settings(path: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError naming what of `now` the run was not begun with."""
    changed = [
        f"{key} (was {begun.get(key)!r}, now {value!r})"
        for key, value in sorted(now.items())
        if begun.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{path} was begun with other settings: {', '.join(changed)}. Go on with the same ones, "
            "or give another --experiment_dir"
        )


def _check_start(path: Path, start: dict, base_weights: str, settings: dict[str, Any]) -> None:
    if start["base_weights"] != base_weights:
        raise UserError(
            f"{path} was begun from other base weights ({start['base_weights'][:12]}, not {base_weights[:12]}): "
            "give the same --policy_model_path, or another --experiment_dir"
        )
    begun, now = start["settings"], dict.fromkeys(start["settings"]) | settings
    if begun.get("scorer") and now.get("scorer"):
        now["scorer"] = asked_of(begun["scorer"], now["scorer"])
    check_settings(path, begun, now)


class MembersFile:
    """One process's finished members of the iteration in progress."""

    def __init__(self, folder: Path, rank: int):
        self._path = folder / f"members.{rank}.jsonl"
        self._file = JsonlWriter(self._path)

    def add(self, row: dict) -> None:
        """`row` has `iteration`, `member` and the scores."""
        self._file.append(row)

    def clear(self) -> None:
        """Rows carry their iteration, so it does no harm when a kill comes before this."""
        self._file.close()
        write_jsonl(self._path, [])
        self._file = JsonlWriter(self._path)

    def close(self) -> None:
        self._file.close()


def finished_members(folder: Path, iteration: int) -> dict[int, dict]:
    """All processes' rows of that iteration by member number (-1 is the unperturbed policy)."""
    rows: dict[int, dict] = {}
    for path in sorted(folder.glob("members.*.jsonl")):
        JsonlWriter(path).close()  # heals a torn last line
        rows |= {row["member"]: row for row in read_jsonl(path, MEMBER_KEYS) if row["iteration"] == iteration}
    return rows
