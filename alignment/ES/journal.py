"""The journal: an ES run as seeds and coefficients, from which the weights of any iteration can be rebuilt.

    RUN/journal.jsonl   {"kind": "start", "base_weights": ..., "settings": {...}}, then one row an iteration:
                        {"kind": "step", "iteration", "seeds", "fitness", "coefficients", "lambda_state", ...}
    RUN/members.jsonl   the full scores of the members of the iteration in progress, so that a killed run asks the scorer
                        only for what is missing; emptied once their step is in the journal

A row is on disk before the run goes on. The step of iteration t is taken from `coefficients`; nothing is computed anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.records import JsonlWriter, read_jsonl, write_jsonl


class Journal:
    def __init__(self, folder: Path, base_weights: str, settings: dict[str, Any]):
        """Opens the journal in `folder` or begins one. `settings` are those that decide the weights.

        Raises UserError when the journal there belongs to other base weights or settings.
        """
        self._path = folder / "journal.jsonl"
        self._members_path = folder / "members.jsonl"
        self._file = JsonlWriter(self._path)
        self.dropped_tail = bool(self._file.dropped)
        rows = read_jsonl(self._path)
        if not rows:
            self._file.append({"kind": "start", "base_weights": base_weights, "settings": settings})
        else:
            self._check(rows[0], base_weights, settings)
        self.steps: list[dict] = rows[1:]
        for number, step in enumerate(self.steps):
            if step.get("iteration") != number:
                raise UserError(
                    f"{self._path}:{number + 2}: expected iteration {number}, found {step.get('iteration')!r}"
                )
        self._members = JsonlWriter(self._members_path)

    def _check(self, start: dict, base_weights: str, settings: dict[str, Any]) -> None:
        if start.get("kind") != "start":
            raise UserError(f"{self._path}:1: not an ES journal (its first row must say kind 'start')")
        if start["base_weights"] != base_weights:
            raise UserError(
                f"{self._path} was begun from other base weights ({start['base_weights'][:12]}, not {base_weights[:12]}): "
                "give the same --policy_model_path, or another --experiment_dir"
            )
        changed = [
            f"{key} (was {start['settings'].get(key)!r}, now {settings.get(key)!r})"
            for key in sorted(start["settings"].keys() | settings.keys())
            if start["settings"].get(key) != settings.get(key)
        ]
        if changed:
            raise UserError(
                f"{self._path} was begun with other settings: {', '.join(changed)}. Go on with the same ones, "
                "or give another --experiment_dir"
            )

    @property
    def iteration(self) -> int:
        """How many steps are in the journal, so also the iteration to do next."""
        return len(self.steps)

    def finished_members(self) -> dict[int, dict]:
        """Rows of the iteration in progress by member number (-1 is the unperturbed policy)."""
        return {row["member"]: row for row in read_jsonl(self._members_path) if row["iteration"] == self.iteration}

    def add_member(self, row: dict) -> None:
        """`row` has `iteration`, `member` and the scores."""
        self._members.append(row)

    def add_step(self, row: dict) -> None:
        self._file.append({"kind": "step", **row})
        self.steps.append(row)
        # Rows that a kill leaves here carry their iteration, so it does not matter when they are taken away.
        self._members.close()
        write_jsonl(self._members_path, [])
        self._members = JsonlWriter(self._members_path)

    def close(self) -> None:
        self._file.close()
        self._members.close()
