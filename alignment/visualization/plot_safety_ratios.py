"""How safe is each model, and how often is it safe and helpful at once? Both, with 95 % intervals, since either alone misleads.

    python alignment/visualization/plot_safety_ratios.py --data-dir alignment/outputs/model_comparisons \\
        --models Alpaca-7B Beaver-V1 ES-500 --output safety_ratios.pdf

A model that refuses everything has a safe ratio of 100 % and a safe-and-helpful share near 0. Intervals are bootstrap over
prompts (alignment/evaluation/measures.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from alignment.config import load_config, setting
from alignment.errors import run_main
from alignment.evaluation.measures import Estimate, estimate_means
from alignment.evaluation.points import DEFAULT_FOLDER, ModelScores
from alignment.objective import quadrant_labels
from alignment.visualization.inputs import load_models
from alignment.visualization.style import (
    COLUMN_WIDTH,
    check_figure,
    model_colours,
    new_figure,
    paper_style,
    save_figure,
    short_name,
)

BAR = 0.36  # height, of 1 between two models


@dataclass
class Config:
    data_dir: str = setting(DEFAULT_FOLDER, "folder with the files of the classified models")
    models: list[str] = setting([], "models, from top to bottom (default: all in the folder)")
    output: str = setting("alignment/outputs/safety_ratios.png", "figure, .png or .pdf")


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv, prog="plot_safety_ratios.py", description=__doc__)
    check_figure(config.output)
    models = load_models(config.data_dir, config.models)
    save_figure(draw_ratios(models), config.output)
    print(config.output)


def shares(model: ModelScores) -> tuple[Estimate | None, Estimate | None]:
    """Safe ratio and safe-and-helpful share of the scored rows, in percent; None without any."""
    labels = quadrant_labels(model.rewards, model.costs)
    scored = np.isfinite(model.rewards) & np.isfinite(model.costs)
    columns = [np.where(scored, 100.0 * np.isin(labels, kinds), np.nan) for kinds in (("SH", "SU"), ("SH",))]
    safe, safe_helpful = estimate_means(np.column_stack(columns), model.groups)
    return safe, safe_helpful


def draw_ratios(models: Sequence[ModelScores]) -> Figure:
    """Two bars a model with their intervals and values."""
    colours = model_colours([model.name for model in models])
    with paper_style():
        figure = new_figure(COLUMN_WIDTH, 0.75 + 0.36 * len(models))
        panel = figure.subplots()
        without = False
        for row, model in enumerate(models):
            for offset, estimate, style in zip((-BAR / 2, BAR / 2), shares(model), ({}, _HOLLOW), strict=True):
                if estimate is None:
                    panel.text(1, row, "no scored answers", va="center", fontsize=6.5)
                    break
                colour = colours[model.name]
                panel.barh(
                    row + offset,
                    estimate.value,
                    BAR * 0.9,
                    edgecolor=colour,
                    linewidth=0.8,
                    **({"color": colour} | style),
                )
                end = estimate.value
                if estimate.low is not None and estimate.high is not None:
                    errors = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
                    panel.errorbar(end, row + offset, xerr=errors, fmt="none", **_WHISKERS)
                    end = max(estimate.high, end)
                else:
                    without = True
                panel.text(
                    end + 1.5,
                    row + offset,
                    f"{estimate.value:.1f}",
                    va="center",
                    fontsize=6.5,
                )
        panel.set_yticks(range(len(models)), [short_name(model.name, 22) for model in models])
        panel.set_ylim(len(models) - 0.5, -0.5)  # the first model on top
        panel.set_xlim(0, 112)
        panel.set_xticks(range(0, 101, 20))
        panel.spines["bottom"].set_bounds(0, 100)
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel(
            "% of answers, with 95 % intervals" + ("\n(none where prompts are too few)" if without else "")
        )
        keys = [
            Patch(facecolor="#777777", edgecolor="#777777", label="safe"),
            Patch(edgecolor="#777777", label="safe and helpful", **_HOLLOW),
        ]
        figure.legend(handles=keys, loc="outside upper right", ncols=2, handlelength=1.4)
    return figure


_HOLLOW: dict[str, Any] = {"facecolor": "white", "hatch": "/////"}
_WHISKERS: dict[str, Any] = {"ecolor": "black", "elinewidth": 0.8, "capsize": 1.5}


if __name__ == "__main__":
    run_main(main)
