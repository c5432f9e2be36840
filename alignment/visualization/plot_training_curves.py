"""How does training go? Reward, cost, objective, safe ratio and lambda of one or several runs, ES and GRPO on one axis.

    python alignment/visualization/plot_training_curves.py runs/es_a runs/es_b runs/grpo --labels ES ES GRPO \\
        --x samples --output training_curves.pdf

Reads `metrics.jsonl` of each run folder: `train` rows are thin lines (the training prompts of that iteration), `eval` rows
are dots with their 95 % intervals on held-out prompts. Runs of one label are seeds: their mean, and a band from the lowest
to the highest of them, as far as all have come. An ES iteration and a GRPO step cost differently: `--x samples` counts
scored responses, `--x time` hours of training. In the panel of the cost the feasible side, E[C] <= 0, is shaded. Training's
objective uses lambda as it was in that iteration, held-out evaluation the fixed `lambda_cost`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.visualization.inputs import require_runs_scored_alike
from alignment.visualization.style import (
    PAGE_WIDTH,
    QUADRANT_SHADES,
    check_figure,
    model_colours,
    new_figure,
    paper_style,
    save_figure,
    short_name,
)
from alignment.visualization.training_runs import (
    PANELS,
    X_TITLES,
    Run,
    by_label,
    columns,
    load_runs,
    positions,
    seed_line,
)

LEGEND_ROWS = 11  # that fit beside the panels at full size


@dataclass
class Config:
    runs: list[str] = setting([], "run folders, or their metrics.jsonl; also without --runs as first arguments")
    labels: list[str] = setting([], "one a run; runs of one label are drawn as a band (default: each run for itself)")
    x: Literal["iteration", "samples", "time"] = setting("iteration", "what the runs are compared over")
    output: str = setting("alignment/outputs/training_curves.png", "figure, .png or .pdf")

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("name one or more run folders, for example: plot_training_curves.py runs/es_a runs/es_b")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--runs", *argv]
    config = load_config(Config, argv, prog="plot_training_curves.py", description=__doc__)
    check_figure(config.output)
    runs = load_runs(config.runs, config.labels)
    require_runs_scored_alike(runs)
    save_figure(draw_curves(runs, config.x), config.output)
    print(config.output)


def draw_curves(runs: Sequence[Run], axis: str = "iteration") -> Figure:
    """Five panels, and the labels of the runs in the place of the sixth."""
    groups = by_label(runs)
    colours = model_colours(list(groups))
    with paper_style():
        figure = new_figure(PAGE_WIDTH, 3.9)
        axes = figure.subplots(2, 3, sharex=True).ravel()
        for panel, (key, title) in zip(axes, PANELS.items(), strict=False):
            panel.set_title(title, loc="left")
            for label, members in groups.items():
                draw = _draw_run if len(members) == 1 else _draw_seeds
                draw(panel, members, key, axis, colours[label])
            _finish(panel, key, axis)
        figure.supxlabel(X_TITLES[axis], fontsize=8)
        axes[2].tick_params(labelbottom=True)  # below it are the labels, not another axis
        axes[5].axis("off")
        _draw_legend(axes[5], groups, colours)
    return figure


def _draw_run(panel: Axes, runs: Sequence[Run], key: str, axis: str, colour: str) -> None:
    (run,) = runs
    alone = key == "lambda"  # it is one number and not measured on prompts: training's rows have all of it
    if run.train:
        (values,) = columns(run.train, key)
        _thin_line(panel, positions(run, run.train, axis), values, colour, alone)
    if run.eval and not alone:
        middle, low, high = columns(run.eval, key, f"{key}_low", f"{key}_high")
        where = positions(run, run.eval, axis)
        panel.plot(where, middle, color=colour, marker="o", markersize=3)
        panel.vlines(where, low, high, color=colour, linewidth=1.0)


def _draw_seeds(panel: Axes, runs: Sequence[Run], key: str, axis: str, colour: str) -> None:
    alone = key == "lambda"
    train = seed_line(runs, "train", key, axis)
    held_out = None if alone else seed_line(runs, "eval", key, axis)
    if train is not None:
        _thin_line(panel, train.x, train.mean, colour, alone)
    if held_out is not None:
        panel.plot(held_out.x, held_out.mean, color=colour, marker="o", markersize=3)
    band = held_out or train
    if band is not None:
        panel.fill_between(band.x, band.low, band.high, color=colour, alpha=0.2, linewidth=0)


def _thin_line(panel: Axes, x: np.ndarray, y: np.ndarray, colour: str, alone: bool) -> None:
    panel.plot(x, y, color=colour, linewidth=1.2 if alone else 0.7, alpha=1.0 if alone else 0.45)


def _finish(panel: Axes, key: str, axis: str) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(integer=axis != "time", nbins=5, steps=[1, 2, 5, 10]))
    if axis == "samples":
        panel.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
        )
    panel.margins(x=0.03)
    if key == "safe_ratio":
        panel.set_ylim(-3, 103)
    if key == "cost_mean":
        low, high = panel.get_ylim()
        low, high = min(low, -0.1 * abs(high)), max(high, 0.1 * abs(low))  # the border at 0 is always in sight
        panel.set_ylim(low, high)
        panel.axhspan(low, 0, color=QUADRANT_SHADES["SH"], zorder=0, linewidth=0)
        panel.axhline(0, color="#555555", linewidth=0.7)


def _draw_legend(panel: Axes, groups: dict[str, list[Run]], colours: dict[str, str]) -> None:
    keys: list[Line2D | Patch] = []
    for label, members in groups.items():
        count = f", {len(members)} runs" if len(members) > 1 else ""
        keys.append(Line2D([], [], color=colours[label], linewidth=2, label=short_name(label) + count))
    keys.append(Line2D([], [], color="#777777", linewidth=0.7, alpha=0.45, label="training prompts"))
    if any(len(members) == 1 for members in groups.values()):
        keys.append(Line2D([], [], color="#777777", marker="o", markersize=3, label="held out, 95 % interval"))
    if any(len(members) > 1 for members in groups.values()):
        keys.append(Line2D([], [], color="#777777", marker="o", markersize=3, label="held out, mean of the runs"))
        keys.append(Patch(color="#777777", alpha=0.2, linewidth=0, label="lowest to highest run"))
    panel.legend(handles=keys, loc="center left", fontsize=min(7.0, 7.0 * LEGEND_ROWS / len(keys)))


if __name__ == "__main__":
    run_main(main)
