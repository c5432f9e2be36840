"""Judged ratings of the models: harmlessness to the right, helpfulness upwards, with 95 % intervals.

    python alignment/visualization/plot_gpt_elo_figure.py --ratings alignment/outputs/gpt_elo/gpt_elo_ratings.json \\
        --order Alpaca-7B Beaver-V1 Beaver-V2 Beaver-V3 --outfile gpt_elo_figure.pdf

Intervals come from the details file that gpt_elo_eval.py writes beside the ratings; a published ratings file has none, and is
drawn without them. The grey bands are ratings below the baseline's 1000; `--order` joins models by a line. A model beyond
`--xlim` or `--ylim` is a triangle at the border, with its ratings beside its name; no line leads to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.records import read_json, read_object
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

BASELINE_RATING = 1000.0
RatingTable = dict[str, dict[str, float]]  # dimension -> model -> rating
Intervals = dict[str, dict[str, tuple[float, float] | None]]  # dimension -> model -> (low, high)


@dataclass
class Config:
    ratings: str = setting("alignment/outputs/gpt_elo/gpt_elo_ratings.json", "ratings, as gpt_elo_eval.py writes them")
    outfile: str = setting("alignment/outputs/gpt_elo/gpt_elo_figure.png", "figure, .png or .pdf")
    order: list[str] = setting([], "models to join by a line, in this order")
    name_map: str | None = setting(None, "JSON file {model: name in the figure}")
    xlim: list[float] = setting([], "limits of the harmlessness axis: LOW HIGH")
    ylim: list[float] = setting([], "limits of the helpfulness axis: LOW HIGH")
    crosshair: bool = setting(True, "dashed lines through each point; --no-crosshair leaves them out")
    width: float = setting(COLUMN_WIDTH, "inches", minimum=1.0, maximum=40.0)
    height: float = setting(3.0, "inches", minimum=1.0, maximum=40.0)

    def __post_init__(self) -> None:
        for name, limits in (("xlim", self.xlim), ("ylim", self.ylim)):
            if limits and (len(limits) != 2 or limits[0] >= limits[1]):
                raise UserError(f"--{name}: expected LOW HIGH with LOW < HIGH, got {limits}")


def main(argv: list[str] | None = None) -> None:
    config = load_config(Config, argv, prog="plot_gpt_elo_figure.py", description=__doc__)
    check_figure(config.outfile)
    ratings = load_ratings(config.ratings)
    details = load_details(config.ratings, ratings)
    names = read_json(config.name_map) if config.name_map else {}
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{config.name_map}: expected a JSON object {{model: name}}")
    figure = draw_ratings(
        ratings,
        intervals_of(details) if details else {},
        rating=details["rating"]["method"] if details else None,
        baseline=details["rating"]["baseline"] if details else None,
        order=config.order,
        names=names,
        xlim=config.xlim,
        ylim=config.ylim,
        crosshair=config.crosshair,
        size=(config.width, config.height),
    )
    save_figure(figure, config.outfile)
    print(config.outfile)


def details_path(ratings_path: str | Path) -> Path:
    """`gpt_elo_ratings_details.json` for `gpt_elo_ratings.json`."""
    path = Path(ratings_path)
    return path.with_name(f"{path.stem}_details.json")


def load_ratings(path: str | Path) -> RatingTable:
    """{"helpfulness": {model: rating}, "harmlessness": {...}}. Raises UserError for anything else."""
    table = read_json(path)
    for dimension in ("helpfulness", "harmlessness"):
        part = table.get(dimension) if isinstance(table, dict) else None
        if not isinstance(part, dict) or not all(
            type(value) in (int, float) and math.isfinite(value) for value in part.values()
        ):
            raise UserError(
                f"{path}: expected '{dimension}' with a rating for each model; gpt_elo_eval.py writes such a file"
            )
    if not set(table["helpfulness"]) & set(table["harmlessness"]):
        raise UserError(f"{path}: no model has a rating in both dimensions")
    return table


def load_details(
    ratings_path: str | Path, ratings: RatingTable, without: str = "the figure has no intervals"
) -> dict | None:
    """The details beside the ratings; None, and a note of what is `without` them, when there are none or of other ratings."""
    path = details_path(ratings_path)
    if not path.exists():
        print(f"note: no {path.name} beside the ratings, so {without}", file=sys.stderr)
        return None
    details = read_object(path)
    try:
        told = {
            dimension: {model: one["rating"] for model, one in part["ratings"].items()}
            for dimension, part in details["dimensions"].items()
        }
        method, spans = details["rating"], intervals_of(details)
        fits = isinstance(method["method"], str) and isinstance(method["baseline"], str)
        ends = [end for part in spans.values() for span in part.values() if span for end in span]
        fits = fits and all(type(end) in (int, float) and math.isfinite(end) for end in ends)
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{path}: not the details that gpt_elo_eval.py writes; remove the file, or rate again")
    if told != ratings:
        print(f"note: {path} belongs to other ratings, so {without}", file=sys.stderr)
        return None
    return details


def intervals_of(details: dict) -> Intervals:
    return {
        dimension: {
            model: (one["low"], one["high"]) if one["low"] is not None else None
            for model, one in part["ratings"].items()
        }
        for dimension, part in details["dimensions"].items()
    }


def draw_ratings(
    ratings: RatingTable,
    intervals: Intervals,
    *,
    rating: str | None = None,
    baseline: str | None = None,
    order: Sequence[str] = (),
    names: dict[str, str] | None = None,
    xlim: Sequence[float] = (),
    ylim: Sequence[float] = (),
    crosshair: bool = False,
    size: tuple[float, float] = (COLUMN_WIDTH, 3.0),
) -> Figure:
    """One point a model that has both ratings. `rating` and `baseline` say in the axis labels what was computed. Models beyond
    the limits are named on stderr, and at the border.

    Raises UserError when `order` names a model that is not there.
    """
    helpful, harmless = ratings["helpfulness"], ratings["harmlessness"]
    models = [model for model in helpful if model in harmless]
    unknown = [model for model in order if model not in models]
    if unknown:
        raise UserError(f"--order: {', '.join(unknown)} has no ratings; models are {', '.join(models)}")
    colours, shown = model_colours(models), {model: (names or {}).get(model, model) for model in models}
    outside = [m for m in models if _side(harmless[m], xlim) or _side(helpful[m], ylim)]
    if outside:
        print(f"beyond the limits, drawn at the border: {', '.join(shown[m] for m in outside)}", file=sys.stderr)
    inside = [model for model in models if model not in outside]
    spread: Intervals = {"helpfulness": {}, "harmlessness": {}} | intervals
    with paper_style():
        figure = new_figure(*size)
        panel = figure.subplots()
        for model in inside:
            x, y = harmless[model], helpful[model]
            if crosshair:
                panel.axvline(x, color="#c8c8c8", linestyle=(0, (3, 3)), linewidth=0.5, zorder=1)
                panel.axhline(y, color="#c8c8c8", linestyle=(0, (3, 3)), linewidth=0.5, zorder=1)
            panel.errorbar(
                x,
                y,
                xerr=_reach(x, spread["harmlessness"].get(model)),
                yerr=_reach(y, spread["helpfulness"].get(model)),
                fmt="o",
                markersize=5,
                color=colours[model],
                elinewidth=0.9,
                capsize=1.5,
                zorder=3,
            )
        steps = [step for step in zip(order, order[1:], strict=False) if not set(step) & set(outside)]
        paths = [np.array([[harmless[m], helpful[m]] for m in step]) for step in steps]
        for path in paths:
            panel.plot(*path.T, color="#444444", linewidth=0.8, zorder=2)
        panel.update_datalim([(harmless[m], helpful[m]) for m in outside])  # only one of its two ratings may be beyond
        panel.margins(0.08)
        panel.set_xlim(*(xlim or panel.get_xlim()))
        panel.set_ylim(*(ylim or panel.get_ylim()))
        panel.axvspan(panel.get_xlim()[0], BASELINE_RATING, color="#eeeeee", zorder=0)
        panel.axhspan(panel.get_ylim()[0], BASELINE_RATING, color="#eeeeee", zorder=0)
        kind = {"bradley-terry": "Bradley-Terry", "elo": "sequential ELO"}.get(rating or "", "rating")
        anchor = f", {short_name((names or {}).get(baseline, baseline), 16)} = 1000" if baseline else ""
        panel.set_xlabel(f"Harmlessness ({kind}{anchor})")
        panel.set_ylabel(f"Helpfulness ({kind}{anchor})")
        bars = list(paths)
        for m in inside:
            across, up = spread["harmlessness"].get(m), spread["helpfulness"].get(m)
            bars += [np.array([[end, helpful[m]] for end in across])] if across else []
            bars += [np.array([[harmless[m], end] for end in up])] if up else []
        labels = [(harmless[m], helpful[m], short_name(shown[m], 20)) for m in inside]
        for m in outside:
            x, y = (
                float(np.clip(one, *ends))
                for one, ends in ((harmless[m], panel.get_xlim()), (helpful[m], panel.get_ylim()))
            )
            marker = {-1: "<", 1: ">"}.get(_side(harmless[m], xlim)) or {-1: "v", 1: "^"}[_side(helpful[m], ylim)]
            panel.plot(x, y, marker, color=colours[m], markersize=5, clip_on=False, zorder=3)
            labels.append((x, y, f"{short_name(shown[m], 20)}\n({harmless[m]:.0f}, {helpful[m]:.0f})"))
        label_points(panel, labels, bars)
    return figure


def _side(value: float, limits: Sequence[float]) -> int:
    """-1 below the limits, 1 above, 0 within or without any."""
    return int(value > limits[1]) - int(value < limits[0]) if limits else 0


def _reach(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    """Lengths below and above the value; a percentile interval need not hold the value itself."""
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]] if interval else None


if __name__ == "__main__":
    run_main(main)
