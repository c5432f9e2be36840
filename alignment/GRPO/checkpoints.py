"""Where a run is: its newest checkpoint, and whether going on with it would still be that run."""

from __future__ import annotations

from pathlib import Path

from alignment.errors import UserError


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run. They appear when they are whole, so whatever bears the name can be resumed from."""
    return max((folder / "checkpoints").glob("iteration_*"), default=None, key=step_of)


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("iteration_"))


def check_same_run(begun_with: dict, now: dict, folder: Path) -> None:
    """Raises UserError naming what of `now` (settings, weights, prompts, scorer, processes) the run was not begun with."""
    changed = [
        f"{name} (was {begun_with.get(name)!r}, now {value!r})"
        for name, value in now.items()
        if begun_with.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{folder} was begun otherwise: {', '.join(changed)}. Going on would not be that run: undo the change, or give "
            "another --output_dir"
        )
