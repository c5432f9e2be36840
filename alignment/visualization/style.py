"""How every figure looks: sizes for a paper's column, colours, where names stand, and how a figure is written.

Colours are of the Okabe-Ito set and its neighbours, told apart by readers with any colour vision. Families share a hue: the base
policy and Alpaca grey, Beaver blue, ES orange, GRPO green, with the pipeline's names (base, ES, GRPO-0.01) and its run folders
(es, beta_0.01, the run behind GRPO-0.01) among them. A name of MODEL_COLOURS has the same colour in every figure; another one
has the shade of its family, or without a family the colour, that its hash points to, unless a name before it in the figure has
taken that: then the next free one.
Texts are drawn as they are: `$` and `_` in a model's name mean nothing (`text.parse_math` is off). The same data give the same
file, byte for byte.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)  # no display on a cluster node; a notebook's own backend, chosen before, stays

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from alignment.errors import UserError
from alignment.records import atomic_open, check_writable_file

COLUMN_WIDTH, PAGE_WIDTH = 3.4, 7.0  # inches: one and two columns of a conference paper
MAX_NAME = 34  # characters of a name that fit beside a legend's key

MODEL_COLOURS = {
    "Alpaca-7B": "#6b6b6b",
    "Beaver-V1": "#7fb8dd",
    "Beaver-V2": "#2f86c1",
    "Beaver-V3": "#0b4a7d",
    "ES-100": "#e69f00",
    "ES-500": "#c8500a",
    "ES": "#c8500a",
    "GRPO": "#009e73",
    "GRPO-0.01": "#009e73",
    "GRPO-0.1": "#00523c",
    "base": "#6b6b6b",
    "before": "#6b6b6b",
    "after": "#c8500a",
}
# How the names of a family begin (a letter further on is another word) -> its shades.
FAMILIES = {
    "base|alpaca": ("#6b6b6b", "#2e2e2e", "#c4c4c4"),
    "beaver": ("#2f86c1", "#7fb8dd", "#0b4a7d"),
    "es": ("#c8500a", "#e69f00", "#7a2f04", "#f2b98a"),
    "grpo": ("#009e73", "#00523c", "#72d4b3"),
}
OTHER_COLOURS = ("#cc79a7", "#009e73", "#e69f00", "#0072b2", "#d55e00", "#56b4e9", "#882255", "#7a5c2e")

# backgrounds of the quadrants: safe blue-green, unsafe orange-red, the helpful half stronger
QUADRANT_SHADES = {"SH": "#d7ede4", "SU": "#eef6f8", "UH": "#fbe3d0", "UU": "#fdf3ec"}
QUADRANT_NAMES = {"SH": "safe, helpful", "SU": "safe, unhelpful", "UH": "unsafe, helpful", "UU": "unsafe, unhelpful"}

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure looks the same on every machine
    "font.size": 7.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.2,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "savefig.dpi": 300,
    "figure.dpi": 150,
    "pdf.fonttype": 42,  # text in a PDF stays text
}


def paper_style() -> AbstractContextManager:
    """The settings of all figures, for the length of a `with` block: nothing global is changed."""
    return matplotlib.rc_context(_SETTINGS)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, laid out so that nothing overlaps or is cut off."""
    return Figure(figsize=(width, height), layout="constrained")


def model_colours(names: Sequence[str]) -> dict[str, str]:
    """name -> colour. Beyond the number of free colours they repeat; every figure names its models in text as well."""
    fixed = {name.lower(): colour for name, colour in MODEL_COLOURS.items()}
    models: dict[str, str] = {}  # a model's name -> its colour, which a run of that model has too
    for model in map(_as_model, names):
        if model in fixed and fixed[model] not in models.values():
            models[model] = fixed[model]
    for model in map(_as_model, names):
        if model not in models and (shades := _shades(model)):
            free = [shade for shade in shades if shade not in models.values()] or list(shades)
            wanted = shades[_number(model, len(shades))]
            models[model] = wanted if wanted in free else free[0]
    known = {name: models[_as_model(name)] for name in names if _as_model(name) in models}
    palette = [colour for colour in OTHER_COLOURS if colour not in known.values()]
    alike = {colour for colour in palette if any(_distance(colour, other) < 60 for other in known.values())}
    palette.sort(key=alike.__contains__)  # given away last
    colours: dict[str, str] = {}
    left: list[str] = []
    for name in dict.fromkeys(names):
        if name in known:
            colours[name] = known[name]
            continue
        left = left or list(palette)
        wanted = OTHER_COLOURS[_number(name, len(OTHER_COLOURS))]
        colours[name] = wanted if wanted in left and wanted not in alike else left[0]
        left.remove(colours[name])
    return colours


def _as_model(name: str) -> str:
    """In lower case; for a run folder of the pipeline the model that it becomes: grpo-0.01 for beta_0.01."""
    return re.sub(r"^beta_(?=[\d.])", "grpo-", name.lower())


def _shades(model: str) -> tuple[str, ...]:
    """Those of the family of a name in lower case; none without a family."""
    for beginning, shades in FAMILIES.items():
        if re.match(rf"({beginning})(?![a-z])", model):
            return shades
    return ()


def _number(name: str, count: int) -> int:
    """0 to count - 1, always the same for a name."""
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % count


def _distance(one: str, other: str) -> float:
    """Of two colours #rrggbb: 0 to 442."""
    return float(np.linalg.norm(255 * (np.array(to_rgb(one)) - np.array(to_rgb(other)))))


def short_name(name: str, length: int = MAX_NAME) -> str:
    """A name on one line; the middle of a long one gives way, since beginnings and ends tell checkpoints apart."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return name[: length - 1 - end] + "…" + name[-end:]


def label_points(panel: Axes, points: Sequence[tuple[float, float, str]], bars: Sequence[np.ndarray]) -> None:
    """Names beside points (x, y, name), each where it covers least of points, `bars` ((2, 2) ends each) and other names.

    Call it last: it measures the panel's layout.
    """
    figure = panel.figure.figure  # the whole one
    figure.draw_without_rendering()  # the layout must be known to measure on the page
    unit = figure.dpi / 72.0  # pixels of a point of the page
    steps = np.linspace(0.0, 1.0, 101)[:, None]
    lines = [start + steps * (end - start) for start, end in (panel.transData.transform(bar) for bar in bars)]
    covered = np.concatenate([*lines, np.repeat(panel.transData.transform([p[:2] for p in points]), 50, axis=0)])
    for x, y, name in points:
        texts = [
            panel.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=side, va=base, fontsize=7, zorder=4)
            for dx, side in ((5, "left"), (-5, "right"))
            for dy, base in ((3, "bottom"), (-3, "top"), (16, "bottom"), (-16, "top"), (30, "bottom"), (-30, "top"))
        ]
        boxes = [text.get_window_extent().padded(unit) for text in texts]
        costs = []
        for number, box in enumerate(boxes):
            inside = (covered >= box.min) & (covered <= box.max)
            outside = not (panel.bbox.contains(*box.min) and panel.bbox.contains(*box.max))
            costs.append(inside.all(axis=1).sum() + 1000 * outside + 3 * (number % 6 // 2))  # near places first
        best = int(np.argmin(costs))
        for number, text in enumerate(texts):
            if number != best:
                text.remove()
        box = boxes[best]
        grid = np.stack(np.meshgrid(np.linspace(box.x0, box.x1, 20), np.linspace(box.y0, box.y1, 10)), axis=-1)
        covered = np.concatenate([covered, grid.reshape(-1, 2)])


def check_figure(path: str | Path) -> None:
    """Raises UserError when no figure can be written under this name. Scripts ask it before they read anything."""
    if Path(path).suffix.lower() not in (".png", ".pdf"):
        raise UserError(f"{path}: a figure's name must end in .png or .pdf")
    check_writable_file(path)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a PNG or a PDF, by the ending of `path`, whole or not at all. Raises UserError for another ending."""
    path = Path(path)
    check_figure(path)
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"CreationDate": None} if kind == "pdf" else {}  # the only thing that would differ from run to run
    with paper_style(), atomic_open(path, "wb") as file:
        figure.savefig(file, format=kind, metadata=metadata)
