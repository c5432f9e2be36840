"""Who is better in both, helpfulness and harmlessness? Models, checkpoints and sweeps in one plane, with the Pareto front.

    python alignment/visualization/plot_pareto.py --data-dir alignment/outputs/model_comparisons \\
        --models Alpaca-7B Beaver-V3 ES-500 --runs runs/es_a runs/grpo_b --output pareto.pdf
    python alignment/visualization/plot_pareto.py --ratings alignment/outputs/gpt_elo/gpt_elo_ratings.json

Across is harmlessness, -E[C], up is helpfulness, E[R], or both are a judge's ratings (--ratings; their intervals are read from
the details file beside them). A run is the path of its held-out evaluations, named at its end; the settings of a sweep are
runs. Crosses are 95 % intervals. Filled marks lie on the front: nothing drawn is at least as good in both and better in one.
The front is that of the estimates: where crosses overlap, so may the order. Models and runs that answered other prompts, or with
another longest answer or temperature, have a front each: who answers easier prompts is no better. Other scorers are refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.evaluation.measures import estimate_means
from alignment.evaluation.points import DEFAULT_FOLDER, ModelScores
from alignment.visualization.inputs import (
    Asked,
    asked_of_model,
    asked_of_run,
    load_models,
    require_runs_scored_alike,
)
from alignment.visualization.plot_gpt_elo_figure import intervals_of, load_details, load_ratings
from alignment.visualization.style import (
    COLUMN_WIDTH,
    check_figure,
    label_points,
    model_colours,
    new_figure,
    paper_style,
    save_figure,
    short_name,
)
from alignment.visualization.training_runs import Run, load_runs

Interval = tuple[float, float, float]  # value, low, high; low and high NaN where no interval is known
SCORE_AXES = ("harmlessness, −E[C]", "helpfulness, E[R]")
FRONT_STYLES: tuple[Any, ...] = ("--", ":", "-.")
OTHER_PROMPTS = "prompts, longest answer or temperature differ: a front for each group"
RATING_AXES = ("harmlessness rating", "helpfulness rating")


@dataclass
class Config:
    data_dir: str = setting(DEFAULT_FOLDER, "folder with the files of the classified models")
    models: list[str] = setting(
        [], "models (default: all in the folder, or in the ratings; none if only runs are named)"
    )
    runs: list[str] = setting([], "run folders, whose held-out evaluations are drawn as a path")
    ratings: str | None = setting(None, "a ratings file of gpt_elo_eval.py, instead of scores")
    output: str = setting("alignment/outputs/pareto.png", "figure, .png or .pdf")

    def __post_init__(self) -> None:
        if self.ratings and self.runs:
            raise UserError("--ratings and --runs have different units: draw two figures")


@dataclass(frozen=True)
class Candidate:
    """A mark in the plane. `label` is drawn beside it; `path` is the run that it is a checkpoint of; those of one `group`
    answered the same prompts and compare."""

    name: str
    x: Interval
    y: Interval
    label: str | None
    path: str | None = None
    group: int = 0

    @property
    def model(self) -> str:
        return self.path or self.name


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv, prog="plot_pareto.py", description=__doc__)
    check_figure(config.output)
    if config.ratings:
        candidates, axes = from_ratings(Path(config.ratings), config.models), RATING_AXES
    else:
        models = load_models(config.data_dir, config.models) if config.models or not config.runs else []
        runs = load_runs(config.runs)
        require_runs_scored_alike(runs, config.data_dir, models)
        asked = {model.name: asked_of_model(config.data_dir, model) for model in models}
        asked |= {run.name: asked_of_run(run) for run in runs}
        groups = groups_of(asked)
        candidates = [replace(one, group=groups[one.model]) for one in from_models(models) + from_runs(runs)]
        axes = SCORE_AXES
        if len({one.group for one in candidates}) > 1:
            print(f"note: {OTHER_PROMPTS}", file=sys.stderr)
    if not candidates:
        raise UserError("nothing to draw: no model has a scored answer and no run a held-out evaluation")
    save_figure(draw_pareto(candidates, axes), config.output)
    print(config.output)


def from_models(models: Sequence[ModelScores]) -> list[Candidate]:
    """A model without any scored answer is passed over and named on stderr."""
    found = []
    for model in models:
        scored = np.isfinite(model.rewards) & np.isfinite(model.costs)
        values = np.where(scored, [-model.costs, model.rewards], np.nan).T  # (N, 2)
        harmless, helpful = estimate_means(values, model.groups)
        if harmless is None or helpful is None:
            print(f"not drawn, {model.name} has no scored answer", file=sys.stderr)
            continue
        x, y = (_interval(one.value, one.low, one.high) for one in (harmless, helpful))
        found.append(Candidate(model.name, x, y, model.name))
    return found


def from_runs(runs: Sequence[Run]) -> list[Candidate]:
    found = []
    for run in runs:
        rows = [row for row in run.eval if _is_number(row.get("cost_mean")) and _is_number(row.get("reward_mean"))]
        for row in rows:
            cost, reward = (
                _interval(*(row.get(f"{key}{end}") for end in ("", "_low", "_high")))
                for key in ("cost_mean", "reward_mean")
            )
            label = f"{run.name}, {row['iteration']}" if row is rows[-1] else None
            name = f"{run.name}, {row['iteration']}"
            found.append(Candidate(name, (-cost[0], -cost[2], -cost[1]), reward, label, run.name))
        if not rows:
            print(f"not drawn, {run.name} has no held-out evaluation", file=sys.stderr)
    return found


def groups_of(asked: dict[str, Asked]) -> dict[str, int]:
    """The number of each one's group: what was answered fits, as far as it is known, with all in the group."""
    groups: list[list[Asked]] = []
    found = {}
    for name, one in asked.items():
        number = next((n for n, members in enumerate(groups) if all(map(one.fits, members))), len(groups))
        if number == len(groups):
            groups.append([])
        groups[number].append(one)
        found[name] = number
    return found


def from_ratings(path: Path, names: Sequence[str] = ()) -> list[Candidate]:
    """Raises UserError when the file is no ratings file or lacks one of `names`."""
    ratings = load_ratings(path)
    harmless, helpful = ratings["harmlessness"], ratings["helpfulness"]
    details = load_details(path, ratings)
    intervals = intervals_of(details) if details else {}
    common = [name for name in harmless if name in helpful]
    if missing := [name for name in names if name not in common]:
        raise UserError(f"{path} has no ratings of {', '.join(missing)}; it has {', '.join(common)}")
    unknown = (np.nan, np.nan)
    return [
        Candidate(
            name,
            (harmless[name], *(intervals.get("harmlessness", {}).get(name) or unknown)),
            (helpful[name], *(intervals.get("helpfulness", {}).get(name) or unknown)),
            label=name,
        )
        for name in names or common
    ]


def pareto_front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) bool: no other point is at least as large in both x (N,) and y (N,), and larger in one."""
    as_good = (x[None, :] >= x[:, None]) & (y[None, :] >= y[:, None])  # (N, N) column against row
    better = (x[None, :] > x[:, None]) | (y[None, :] > y[:, None])
    return ~np.any(as_good & better, axis=1)


def draw_pareto(candidates: Sequence[Candidate], axes: tuple[str, str] = SCORE_AXES) -> Figure:
    """All candidates with their intervals, the runs' paths, and the front as a staircase to the borders."""
    x, y = (np.array([getattr(one, side)[0] for one in candidates]) for side in ("x", "y"))
    members = [
        np.flatnonzero([one.group == group for one in candidates]) for group in {one.group: None for one in candidates}
    ]
    front = np.zeros(len(candidates), bool)
    for own in members:
        front[own] = pareto_front(x[own], y[own])
    colours = model_colours([one.model for one in candidates])
    with paper_style():
        figure = new_figure(COLUMN_WIDTH, 3.0)
        panel = figure.subplots()
        for path in dict.fromkeys(one.path for one in candidates if one.path):
            marks = [index for index, one in enumerate(candidates) if one.path == path]
            panel.plot(x[marks], y[marks], color=colours[path], linewidth=0.8, alpha=0.6, zorder=2)
        for one, on_front in zip(candidates, front, strict=True):
            _draw_candidate(panel, one, colours[one.model], bool(on_front))
        panel.margins(0.16)
        panel.autoscale_view()
        for number, own in enumerate(members):
            on_it = own[front[own]]
            _draw_front(panel, x[on_it], y[on_it], FRONT_STYLES[number % len(FRONT_STYLES)])
        if axes == SCORE_AXES:
            _shade_infeasible(panel)
        panel.set_xlabel(axes[0])
        panel.set_ylabel(axes[1])
        dot: dict[str, Any] = {"color": "#555555", "marker": "o", "markersize": 4, "linewidth": 0.8}
        keys = []
        for number, own in enumerate(members):
            names = ", ".join(dict.fromkeys(candidates[index].model for index in own.tolist()))
            label = f"front of {short_name(names)}" if len(members) > 1 else "Pareto front"
            keys.append(Line2D([], [], linestyle=FRONT_STYLES[number % len(FRONT_STYLES)], label=label, **dot))
        keys.append(Line2D([], [], markerfacecolor="white", linestyle="", label="behind it", **dot))
        if len(members) > 1:
            figure.legend(
                handles=keys, loc="outside upper left", handlelength=2.2, title=OTHER_PROMPTS, title_fontsize=6
            )
        else:
            figure.legend(handles=keys, loc="outside upper right", ncols=2, handlelength=2.2)
        labels = [(one.x[0], one.y[0], short_name(one.label, 24)) for one in candidates if one.label]
        label_points(panel, labels, _lines_of(candidates))
    return figure


def _draw_candidate(panel: Axes, one: Candidate, colour: str, on_front: bool) -> None:
    (x, x_low, x_high), (y, y_low, y_high) = one.x, one.y
    width = 0.6 if one.path else 0.9
    if not np.isnan([x_low, x_high]).any():
        panel.hlines(y, x_low, x_high, color=colour, linewidth=width, zorder=3)
    if not np.isnan([y_low, y_high]).any():
        panel.vlines(x, y_low, y_high, color=colour, linewidth=width, zorder=3)
    size = 3.0 if one.path and not one.label else 5.0
    panel.plot(
        x,
        y,
        "o",
        color=colour,
        markersize=size,
        markerfacecolor=colour if on_front else "white",
        zorder=4,
        label=one.name,
    )


def _interval(value: float | None, low: float | None, high: float | None) -> Interval:
    """With NaN for what is not known."""
    value, low, high = (np.nan if one is None else float(one) for one in (value, low, high))
    return value, low, high


def _draw_front(panel: Axes, x: np.ndarray, y: np.ndarray, linestyle: Any) -> None:
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    stairs_x, stairs_y = np.concatenate([[left], x, [x[-1]]]), np.concatenate([[y[0]], y, [low]])
    panel.plot(
        stairs_x,
        stairs_y,
        drawstyle="steps-pre",
        color="#555555",
        linestyle=linestyle,
        linewidth=0.7,
        zorder=1,
        label="front",
    )
    panel.set_xlim(left, right)
    panel.set_ylim(low, high)


def _shade_infeasible(panel: Axes) -> None:
    left, right = panel.get_xlim()
    if left < 0:
        panel.axvspan(left, min(0.0, right), color="#fbe3d0", alpha=0.6, zorder=0, linewidth=0)
        panel.text(0.02, 0.02, "E[C] > 0", transform=panel.transAxes, fontsize=6.5, color="#8a4b1c")
        panel.set_xlim(left, right)


def _lines_of(candidates: Sequence[Candidate]) -> list[np.ndarray]:
    """What a label should not cover, as (2, 2) ends: marks, intervals, and the runs' paths."""
    lines = []
    for one in candidates:
        (x, *x_ends), (y, *y_ends) = one.x, one.y
        lines += [
            np.array([[x, y], [x, y]]),
            np.array([[end, y] for end in x_ends]),
            np.array([[x, end] for end in y_ends]),
        ]
    for path in {one.path for one in candidates if one.path}:
        marks = [(one.x[0], one.y[0]) for one in candidates if one.path == path]
        lines += [np.array(step) for step in zip(marks, marks[1:], strict=False)]
    return [line for line in lines if np.isfinite(line).all()]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))


if __name__ == "__main__":
    run_main(main)
