"""The journal: an ES run as seeds and coefficients, from which the weights of any iteration can be rebuilt.

    RUN/journal.jsonl     {"kind": "start", "base_weights": ..., "settings": {...}}, then one row an iteration:
                          {"kind": "step", "iteration", "seeds", "fitness", "coefficients", "lambda_state", ...}
    RUN/members.K.jsonl   full scores of the members that process K finished in the iteration in progress, so that a killed
                          run asks the scorer only for what is missing; dropped once their step is in the journal

A row is on disk before the run goes on. The step of iteration t is taken from `coefficients`; nothing is computed anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.ES.settings import ESSettings
from alignment.prompts import text_hash
from alignment.records import JsonlWriter, fsync_folder, read_jsonl, write_jsonl
from alignment.runs import check_same_run
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
            fsync_folder(folder)  # what else a run leaves without it is refused
        start, self.steps = read_journal(path)
        begun = {"base_weights": start["base_weights"], **start["settings"]}
        now = dict.fromkeys(begun) | {"base_weights": base_weights, **settings}
        check_same_run(begun, asked_of(begun, now), path, "--experiment_dir")
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
    _settings_in(path, rows[0] if rows else None)
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
    return _settings_in(path, start)


def _settings_in(path: Path, start: Any) -> dict:
    """The settings in a journal's first row. Raises UserError when that is none."""
    if isinstance(start, dict) and start.get("kind") == "start" and isinstance(start.get("base_weights"), str):
        settings = start.get("settings")
        if isinstance(settings, dict) and isinstance(settings.get("scorer", {}), dict):
            return settings
    raise UserError(f"{path}:1: not an ES journal (its first row must have kind 'start', base_weights and settings)")


def check_settings(known: dict, settings: ESSettings, train_prompts: list[str], place: Path, option: str) -> None:
    """Raises UserError when these are not what the run was begun with whose journal holds `known`; see check_same_run."""
    now = dict.fromkeys(known.keys() & vars(settings).keys()) | settings.deciding()
    now |= {"train_prompts": text_hash(train_prompts)}
    now.pop("members_at_once", None)  # the journal has the number that came of it
    check_same_run(known, now, place, option)


class MembersFile:
    """One process's finished members of the iteration in progress."""

    def __init__(self, folder: Path, rank: int):
        self._path = folder / f"members.{rank}.jsonl"
        self._file = JsonlWriter(self._path)
        self._iteration: int | None = None  # of the rows that were added here

    def add(self, row: dict) -> None:
        """`row` has `iteration`, `member` and the scores."""
        self._file.append(row)
        self._iteration = row["iteration"]

    def begin(self, iteration: int) -> None:
        """Drops the rows of the iteration before, whose step must be in the journal.

        Rows carry their iteration, so it does no harm when a kill comes before this.
        """
        if self._iteration not in (None, iteration):
            self._file.close()
            write_jsonl(self._path, [])
            self._file = JsonlWriter(self._path)
            self._iteration = None

    def close(self) -> None:
        self._file.close()


def finished_members(folder: Path, iteration: int) -> dict[int, dict]:
    """All processes' rows of that iteration by member number (-1 is the unperturbed policy)."""
    rows: dict[int, dict] = {}
    for path in sorted(folder.glob("members.*.jsonl")):
        JsonlWriter(path).close()  # heals a torn last line
        rows |= {row["member"]: row for row in read_jsonl(path, MEMBER_KEYS) if row["iteration"] == iteration}
    return rows


def forget_missing(folder: Path) -> None:
    """Drops the members' rows that lack a score, so that they are scored again. No process may write any more."""
    for path in sorted(folder.glob("members.*.jsonl")):
        rows = read_jsonl(path, MEMBER_KEYS)
        whole = [row for row in rows if None not in (*row["rewards"], *row["costs"])]
        if len(whole) < len(rows):
            write_jsonl(path, whole)
