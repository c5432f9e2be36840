"""The training curves of the report: the lines of plot_training_curves.py as numbers, over every axis that the runs allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignment.errors import UserError
from alignment.visualization.report.answers import short_float
from alignment.visualization.training_runs import PANELS, X_TITLES, Run, by_label, columns, positions, seed_line


def curves(runs: Sequence[Run]) -> dict | None:
    """{axes: {name: title}, panels: [{key, title}], lines: [{label, runs, kind, key, x: {axis: [...]}, ...}]}; None without runs.

    A line has mean, low and high: of one run's held-out rows the 95 % interval, of several runs of a label their range.
    """
    if not runs:
        return None
    axes = {name: title for name, title in X_TITLES.items() if _known(runs, name)}
    lines = []
    for label, members in by_label(runs).items():
        for key in PANELS:
            for kind in ("train", "eval"):
                if key == "lambda" and kind == "eval":
                    continue
                over = {axis: _line(members, kind, key, axis) for axis in axes}
                over = {axis: line for axis, line in over.items() if line}
                if over:
                    lines.append({"label": label, "runs": len(members), "kind": kind, "key": key, "over": over})
    return {"axes": axes, "panels": [{"key": key, "title": title} for key, title in PANELS.items()], "lines": lines}


def _line(runs: Sequence[Run], kind: str, key: str, axis: str) -> dict | None:
    if len(runs) > 1:
        line = seed_line(runs, kind, key, axis)
        parts = [] if line is None else [line.x, line.mean, line.low, line.high]
    else:
        rows = getattr(runs[0], kind)
        parts = [positions(runs[0], rows, axis), *columns(rows, key, f"{key}_low", f"{key}_high")] if rows else []
    if not parts or not np.isfinite(parts[1]).any():
        return None
    return {
        name: [short_float(value) for value in part]
        for name, part in zip(("x", "mean", "low", "high"), parts, strict=True)
    }


def _known(runs: Sequence[Run], axis: str) -> bool:
    """Whether every run says where it is on this axis."""
    try:
        for run in runs:
            positions(run, run.train or run.eval, axis)
    except UserError:
        return False
    return True
