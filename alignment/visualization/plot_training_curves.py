"""How does training go? Reward, cost, objective, safe ratio and lambda over the iterations of one or several runs.

    python alignment/visualization/plot_training_curves.py runs/es_a runs/es_b --output training_curves.pdf

Reads `metrics.jsonl` of each run folder: `train` rows are thin lines (the training prompts of that iteration), `eval` rows
are dots with their 95 % intervals on held-out prompts. In the panel of the cost the feasible side, E[C] <= 0, is shaded.
Training's objective uses lambda as it was in that iteration, held-out evaluation the fixed `lambda_cost`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.records import read_jsonl
from alignment.visualization.style import (
    PAGE_WIDTH,
    QUADRANT_SHADES,
    model_colours,
    new_figure,
    paper_style,
    save_figure,
    short_name,
)

PANELS = {  # key in metrics.jsonl -> title
    "reward_mean": "E[R]",
    "cost_mean": "E[C]",
    "objective": "E[R - lambda C]",
    "safe_ratio": "safe ratio, %",
    "lambda": "lambda",
}


@dataclass
class Config:
    runs: list[str] = setting([], "run folders, or their metrics.jsonl")
    output: str = setting("alignment/outputs/training_curves.png", "figure, .png or .pdf")

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name one or more run folders, for example: plot_training_curves.py runs/es_a runs/es_b")


@dataclass(frozen=True)
class Run:
    """The rows of one run, by kind, in the order of their iterations."""

    name: str
    train: list[dict]
    eval: list[dict]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--runs", *argv]
    config = load_config(Config, argv, prog="plot_training_curves.py", description=__doc__.split("\n\n")[0])
    save_figure(draw_curves(load_runs(config.runs)), config.output)
    print(config.output)


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Raises UserError for a folder without metrics, or whose metrics have neither train nor eval rows."""
    files = [Path(path) / "metrics.jsonl" if Path(path).is_dir() else Path(path) for path in paths]
    folders = [file.parent for file in files]
    names = [folder.resolve().name for folder in folders]
    runs = []
    for file, folder, name in zip(files, folders, names, strict=True):
        rows = read_jsonl(file, required=("kind",))
        kinds = {kind: _by_iteration([row for row in rows if row["kind"] == kind], file) for kind in ("train", "eval")}
        if not any(kinds.values()):
            raise UserError(f"{file} has no rows of the kind train or eval yet; wait for the first iteration")
        runs.append(Run(str(folder) if names.count(name) > 1 else name, **kinds))
    if len({run.name for run in runs}) < len(runs):
        raise UserError(f"a run is named twice: {', '.join(map(str, paths))}")
    return runs


def draw_curves(runs: Sequence[Run]) -> Figure:
    """Five panels, and the names of the runs in the place of the sixth."""
    colours = model_colours([run.name for run in runs])
    with paper_style():
        figure = new_figure(PAGE_WIDTH, 3.9)
        axes = figure.subplots(2, 3, sharex=True).ravel()
        for panel, (key, title) in zip(axes, PANELS.items(), strict=False):
            panel.set_title(title, loc="left")
            for run in runs:
                _draw_run(panel, run, key, colours[run.name])
            _finish(panel, key)
        figure.supxlabel("iteration", fontsize=8)
        axes[2].tick_params(labelbottom=True)  # below it are the names, not another axis
        axes[5].axis("off")
        keys = [Line2D([], [], color=colours[run.name], linewidth=2, label=short_name(run.name)) for run in runs]
        keys.append(Line2D([], [], color="#777777", linewidth=0.7, alpha=0.45, label="training prompts"))
        keys.append(Line2D([], [], color="#777777", marker="o", markersize=3, label="held out, 95 % interval"))
        axes[5].legend(handles=keys, loc="center left")
    return figure


def _draw_run(panel: Axes, run: Run, key: str, colour: str) -> None:
    alone = key == "lambda"  # it is one number and not measured on prompts: training's rows have all of it
    if run.train:
        steps, values = _columns(run.train, "iteration", key)
        panel.plot(steps, values, color=colour, linewidth=1.2 if alone else 0.7, alpha=1.0 if alone else 0.45)
    if run.eval and not alone:
        steps, middle, low, high = _columns(run.eval, "iteration", key, f"{key}_low", f"{key}_high")
        panel.plot(steps, middle, color=colour, marker="o", markersize=3)
        panel.vlines(steps, low, high, color=colour, linewidth=1.0)


def _finish(panel: Axes, key: str) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    panel.margins(x=0.03)
    if key == "safe_ratio":
        panel.set_ylim(-3, 103)
    if key == "cost_mean":
        low, high = panel.get_ylim()
        low, high = min(low, -0.1 * abs(high)), max(high, 0.1 * abs(low))  # the border at 0 is always in sight
        panel.set_ylim(low, high)
        panel.axhspan(low, 0, color=QUADRANT_SHADES["SH"], zorder=0, linewidth=0)
        panel.axhline(0, color="#555555", linewidth=0.7)


def _columns(rows: Sequence[dict], *keys: str) -> list[np.ndarray]:
    """One float array a key; NaN, which leaves a gap in a line, where a row has no number there."""
    return [np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=np.float64) for key in keys]


def _by_iteration(rows: list[dict], file: Path) -> list[dict]:
    for row in rows:
        if not isinstance(row.get("iteration"), int):
            raise UserError(f"{file}: a {row['kind']} row has no whole number as its 'iteration'")
    # A run that was resumed by hand from an earlier checkpoint may have written an iteration twice; the later one is its own.
    return [row for _, row in sorted({row["iteration"]: row for row in rows}.items())]


if __name__ == "__main__":
    run_main(main)
