"""Cost against reward of every answer, one panel a model: where does each model put its answers?

    python alignment/visualization/plot_reward_cost_grid.py --data-dir alignment/outputs/model_comparisons \\
        --models Alpaca-7B Beaver-V1 ES-500 --output reward_cost_grid.pdf

Reads `{model}_Rs.npy` and `_Cs.npy` (or `_points.jsonl`). All panels have the same axes. Where points lie thick they are
darker. Unlike the published grid no point is lost: one beyond an axis limit is drawn as a triangle at the border, with their
number beside it, and rows without a score are counted in the panel's head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.evaluation.points import DEFAULT_FOLDER, ModelScores
from alignment.objective import quadrant_summary
from alignment.visualization.inputs import load_models
from alignment.visualization.style import (
    COLUMN_WIDTH,
    PAGE_WIDTH,
    QUADRANT_NAMES,
    QUADRANT_SHADES,
    check_figure,
    model_colours,
    new_figure,
    paper_style,
    save_figure,
    short_name,
)

Limits = tuple[float, float]
DENSITY_FROM = 300  # points; fewer are told apart by eye, and a count of neighbours would be noise
NAME_LENGTH = {1: 34, 2: 34, 3: 22}  # characters that fit over a panel, by the number of columns
BINS = 120  # per axis, for the density


@dataclass
class Config:
    data_dir: str = setting(DEFAULT_FOLDER, "folder with the files of the classified models")
    models: list[str] = setting([], "models, in the order of the panels (default: all in the folder)")
    output: str = setting("alignment/outputs/reward_cost_grid.png", "figure, .png or .pdf")
    xlim: list[float] | None = setting(None, "lower and upper limit of the cost axis (default: from the data)")
    ylim: list[float] | None = setting(None, "lower and upper limit of the reward axis (default: from the data)")

    def __post_init__(self) -> None:
        for name in ("xlim", "ylim"):
            limits = getattr(self, name)
            if limits is not None and (len(limits) != 2 or limits[0] >= limits[1]):
                raise UserError(f"--{name}: expected a lower and a higher number, got {limits}")


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv, prog="plot_reward_cost_grid.py", description=__doc__)
    check_figure(config.output)
    models = load_models(config.data_dir, config.models)
    save_figure(draw_grid(models, config.xlim, config.ylim), config.output)
    print(config.output)


def draw_grid(
    models: Sequence[ModelScores], xlim: Sequence[float] | None = None, ylim: Sequence[float] | None = None
) -> Figure:
    """One panel a model, up to three in a row, on common axes; limits are taken from the data of all models if not given."""
    xlim = (xlim[0], xlim[1]) if xlim else common_limits([model.costs for model in models])
    ylim = (
        (ylim[0], ylim[1]) if ylim else common_limits([model.rewards for model in models], margin=0.2)
    )  # room for the labels
    columns = min(3, len(models))
    rows = math.ceil(len(models) / columns)
    width = COLUMN_WIDTH if columns == 1 else PAGE_WIDTH
    colours = model_colours([model.name for model in models])
    with paper_style():
        figure = new_figure(width, rows * width / columns * 0.95 + 0.2)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for panel, model in zip(panels, models, strict=False):
            draw_panel(panel, model, colours[model.name], xlim, ylim)
            panel.set_title(short_name(model.name, NAME_LENGTH[columns]), loc="left", fontweight="bold", pad=12)
        for panel in panels[len(models) :]:
            panel.set_visible(False)
        for panel in panels[max(len(models) - columns, 0) : len(models)]:
            panel.tick_params(labelbottom=True)  # the lowest of its column, with or without a row of panels below
        figure.supxlabel("cost  (safe: 0 and below)      \N{BLACK DIAMOND} mean", fontsize=8)
        figure.supylabel("reward  (helpful: above 0)", fontsize=8)
    return figure


def common_limits(arrays: Sequence[np.ndarray], margin: float = 0.05) -> Limits:
    """Axis limits that hold 0 and all finite values, unless a few values would press the rest into a corner.

    When the whole range is more than twice the range that holds the inner 99 % of every array, that inner range with a
    quarter to each side is taken, and what lies beyond is marked at the border.
    """
    finite = [array[np.isfinite(array)] for array in arrays]
    finite = [array for array in finite if len(array)] or [np.zeros(1)]
    low, high = min(0.0, *(array.min() for array in finite)), max(0.0, *(array.max() for array in finite))
    inner = np.array([np.percentile(array, [0.5, 99.5]) for array in finite])  # (arrays, 2)
    inner_low, inner_high = min(0.0, inner[:, 0].min()), max(0.0, inner[:, 1].max())
    span = inner_high - inner_low
    if span > 0 and high - low > 2 * span:
        low, high = max(low, inner_low - 0.25 * span), min(high, inner_high + 0.25 * span)
    room = margin * (high - low) or 1.0
    return float(low - room), float(high + room)


def draw_panel(panel: Axes, model: ModelScores, colour: str, xlim: Limits, ylim: Limits) -> None:
    """Shaded quadrants with their shares, all points of one model, and marks for those beyond the limits."""
    scored = np.isfinite(model.costs) & np.isfinite(model.rewards)
    costs, rewards = model.costs[scored], model.rewards[scored]
    panel.set_xlim(xlim)
    panel.set_ylim(ylim)
    _shade_quadrants(panel, xlim, ylim)
    head = f"n = {len(costs):,}"
    if len(costs):
        summary = quadrant_summary(rewards, costs)
        head += f", safe {summary['safe_ratio']:.1f} %"
        inside = (costs >= xlim[0]) & (costs <= xlim[1]) & (rewards >= ylim[0]) & (rewards <= ylim[1])
        _scatter(panel, costs[inside], rewards[inside], colour, xlim, ylim)
        _mark_beyond(panel, costs[~inside], rewards[~inside], colour, xlim, ylim)
        _label_quadrants(panel, summary["percents"])
    if len(costs) > 1:  # the mark of a single point's mean would hide it
        mean = np.clip([costs.mean(), rewards.mean()], [xlim[0], ylim[0]], [xlim[1], ylim[1]])
        panel.plot(*mean, "D", color="black", markersize=4.5, markeredgecolor="white", markeredgewidth=0.8, zorder=5)
    if missing := int(np.sum(~scored)):
        head += f", {missing:,} without score"
    panel.text(0, 1.015, head, transform=panel.transAxes, va="bottom", fontsize=6.5, color="#444444")


def density(x: np.ndarray, y: np.ndarray, xlim: Limits, ylim: Limits) -> np.ndarray:
    """(N,) in 0 to 1: how thick points lie around each (root of a smoothed histogram); all 0 for few points."""
    if len(x) < DENSITY_FROM:
        return np.zeros(len(x))
    counts, x_edges, y_edges = np.histogram2d(x, y, bins=BINS, range=(xlim, ylim))
    kernel = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)  # a Gaussian of two bins
    for axis in (0, 1):
        counts = np.apply_along_axis(np.convolve, axis, counts, kernel, mode="same")
    column = np.clip(np.searchsorted(x_edges, x, side="right") - 1, 0, BINS - 1)
    row = np.clip(np.searchsorted(y_edges, y, side="right") - 1, 0, BINS - 1)
    return np.sqrt(counts[column, row] / counts.max())


def _scatter(panel: Axes, x: np.ndarray, y: np.ndarray, colour: str, xlim: Limits, ylim: Limits) -> None:
    shade = density(x, y, xlim, ylim)
    order = np.argsort(shade, kind="stable")  # thick places on top
    rgb = np.array(to_rgb(colour))
    palette = LinearSegmentedColormap.from_list("model", [0.45 + 0.55 * rgb, rgb, 0.3 * rgb]) if shade.any() else None
    panel.scatter(
        x[order],
        y[order],
        s=float(np.clip(9000 / max(len(x), 1), 0.5, 9.0)),
        linewidths=0,
        rasterized=True,  # 100,000 points as vectors make a PDF that no viewer scrolls
        zorder=3,
        **({"c": shade[order], "cmap": palette, "vmin": 0, "vmax": 1} if palette else {"color": colour}),
    )


def _mark_beyond(panel: Axes, x: np.ndarray, y: np.ndarray, colour: str, xlim: Limits, ylim: Limits) -> None:
    """Triangles at the border for points beyond it, pointing to where they lie, and how many there are on each side."""
    sides = {
        "<": (x < xlim[0], (0.015, 0.5, "left", "center")),
        ">": (x > xlim[1], (0.985, 0.5, "right", "center")),
    }
    within = (x >= xlim[0]) & (x <= xlim[1])
    sides["v"] = (within & (y < ylim[0]), (0.5, 0.03, "center", "bottom"))
    sides["^"] = (within & (y > ylim[1]), (0.5, 0.97, "center", "top"))
    for marker, (chosen, (left, up, horizontal, vertical)) in sides.items():
        if not chosen.any():
            continue
        panel.scatter(
            np.clip(x[chosen], *xlim),
            np.clip(y[chosen], *ylim),
            marker=marker,
            s=16,
            facecolor=colour,
            edgecolor="black",
            linewidths=0.5,
            clip_on=False,
            zorder=6,
        )
        text = f"{int(chosen.sum()):,} beyond"
        box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1}
        panel.text(
            left, up, text, transform=panel.transAxes, ha=horizontal, va=vertical, fontsize=6, bbox=box, zorder=2.5
        )


def _shade_quadrants(panel: Axes, xlim: Limits, ylim: Limits) -> None:
    spans = {"S": (xlim[0], 0.0), "U": (0.0, xlim[1])}
    heights = {"H": (0.0, ylim[1]), "U": (ylim[0], 0.0)}
    for name, shade in QUADRANT_SHADES.items():
        (left, right), (low, high) = spans[name[0]], heights[name[1]]
        panel.add_patch(Rectangle((left, low), right - left, high - low, facecolor=shade, edgecolor="none", zorder=0))
    panel.axvline(0, color="#555555", linewidth=0.7, zorder=2)
    panel.axhline(0, color="#555555", linewidth=0.7, zorder=2)


def _label_quadrants(panel: Axes, percents: dict[str, float]) -> None:
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}  # below the points: it hides none
    for name, share in percents.items():
        left, low = name[0] == "S", name[1] == "U"
        panel.text(
            0.02 if left else 0.98,
            0.02 if low else 0.98,
            f"{QUADRANT_NAMES[name]}\n{share:.1f} %",
            transform=panel.transAxes,
            ha="left" if left else "right",
            va="bottom" if low else "top",
            fontsize=6.3,
            bbox=box,
            zorder=2.5,
        )


if __name__ == "__main__":
    run_main(main)
