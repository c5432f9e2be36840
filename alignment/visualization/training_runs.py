"""Training runs as figures see them: the rows of `metrics.jsonl`, where a row lies on the x axis, and bands over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment.config import read_yaml_mapping
from alignment.errors import UserError
from alignment.records import read_numbered

PANELS = {  # key in metrics.jsonl -> title
    "reward_mean": "E[R]",
    "cost_mean": "E[C]",
    "objective": "E[R - lambda C]",
    "safe_ratio": "safe ratio, %",
    "lambda": "lambda",
}
X_TITLES = {"iteration": "iteration", "samples": "scored samples", "time": "training time, hours"}


@dataclass(frozen=True)
class Run:
    """The rows of one run, by kind, in the order of their iterations. Runs of one label differ in their seed only."""

    name: str
    label: str
    train: list[dict]
    eval: list[dict]
    folder: Path


@dataclass(frozen=True)
class Line:
    """One measure of the runs of a label: where (N,), the mean over runs (N,), the lowest and the highest run (N,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def load_runs(paths: Sequence[str | Path], labels: Sequence[str] = ()) -> list[Run]:
    """One run a folder (or metrics.jsonl), labelled with its name unless `labels` has one for each.

    Raises UserError for a folder without metrics, or whose metrics have neither train nor eval rows.
    """
    if labels and len(labels) != len(paths):
        raise UserError(f"--labels: expected one for each of the {len(paths)} runs, got {len(labels)}")
    files = [Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path) for path in paths]
    folders = [file.parent for file in files]
    names = [folder.resolve().name for folder in folders]
    names = [
        str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)
    ]  # one name would mean two
    if len(set(names)) < len(names):
        raise UserError(f"a run is named twice: {', '.join(map(str, paths))}")
    runs = []
    for file, folder, name, label in zip(files, folders, names, labels or names, strict=True):
        rows = read_rows(file)
        kinds = {kind: _by_iteration([row for row in rows if row["kind"] == kind], file) for kind in ("train", "eval")}
        if not any(kinds.values()):
            raise UserError(f"{file} has no rows of the kind train or eval yet; wait for the first iteration")
        runs.append(Run(name, label, **kinds, folder=folder))
    return runs


def read_rows(file: Path) -> list[dict]:
    """The rows of a metrics.jsonl. Raises UserError for a measure that is no number, with file, line and key."""
    rows = read_numbered(file, required=("kind",))
    drawn = {f"{key}{end}" for key in PANELS for end in ("", "_low", "_high")}
    for where, row in rows:
        for key in drawn & row.keys():
            if row[key] is not None and type(row[key]) not in (int, float):
                raise UserError(f"{where}: '{key}' must be a number or null, got {row[key]!r:.60}")
    return [row for _, row in rows]


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """label -> its runs, in the order in which the labels first come."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def positions(run: Run, rows: Sequence[dict], axis: str) -> np.ndarray:
    """(N,) float64 where `rows` lie on the axis. A row of iteration t tells of the weights after t steps, so it lies at what
    those t steps took: steps, scored responses, or hours (without held-out evaluation). UserError when the run does not say.
    """
    steps = np.array([row["iteration"] for row in rows], dtype=np.float64)
    if axis == "iteration":
        return steps
    if axis == "samples":
        return steps * samples_per_step(run.folder)
    taken: dict[int, float] = {}
    hours = 0.0
    for row in run.train:
        taken[row["iteration"]] = hours
        seconds = row.get("seconds")
        seconds = seconds.get("total") if isinstance(seconds, dict) else None
        if not isinstance(seconds, (int, float)):
            raise UserError(f"{run.folder}: the train rows have no number as seconds.total; choose another --x")
        hours += seconds / 3600
    return np.array([taken.get(row["iteration"], hours) for row in rows], dtype=np.float64)


def samples_per_step(folder: Path) -> int:
    """Responses that one step has scored, from the run's config.yaml: ES scores the population and theta itself."""
    path = folder / "config.yaml"
    config = read_yaml_mapping(path)
    for factors, more in ((("population_size", "batch_size"), 1), (("num_generations", "prompts_per_step"), 0)):
        if all(isinstance(config.get(name), int) for name in factors):
            return (config[factors[0]] + more) * config[factors[1]]
    raise UserError(
        f"{path}: neither population_size and batch_size nor num_generations and prompts_per_step are there, so the scored "
        "samples are not known; choose another --x"
    )


def seed_line(runs: Sequence[Run], kind: str, key: str, axis: str) -> Line | None:
    """Mean and range of `key` over runs that differ in their seed, where all of them have values; None without any.

    Runs are read between their rows by linear interpolation, since hours never coincide; iterations that all runs have are
    taken as they are.
    """
    series = []
    for run in runs:
        rows = getattr(run, kind)
        x, (y,) = positions(run, rows, axis), columns(rows, key)
        known = np.isfinite(y)
        if not known.any():
            return None
        series.append((x[known], y[known]))
    first, last = max(x[0] for x, _ in series), min(x[-1] for x, _ in series)
    grid = np.unique(np.concatenate([x for x, _ in series]))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.array([np.interp(grid, x, y) for x, y in series])  # (runs, N)
    return Line(grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0)) if len(grid) else None


def columns(rows: Sequence[dict], *keys: str) -> list[np.ndarray]:
    """One float array a key; NaN, which leaves a gap in a line, where a row has no number there."""
    return [np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64) for key in keys]


def _by_iteration(rows: list[dict], file: Path) -> list[dict]:
    for row in rows:
        if not isinstance(row.get("iteration"), int):
            raise UserError(f"{file}: a {row['kind']} row has no whole number as its 'iteration'")
    # A run that was resumed by hand from an earlier checkpoint may have written an iteration twice; the later one is its own.
    return [row for _, row in sorted({row["iteration"]: row for row in rows}.items())]
