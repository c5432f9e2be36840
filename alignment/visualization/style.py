"""How every figure looks: sizes for a paper's column, colours, where names stand, and how a figure is written.

Colours are of the Okabe-Ito set and its neighbours, told apart by readers with any colour vision. A published model has the
same colour in every figure, and families share a hue (Alpaca grey, Beaver blue, ES orange, GRPO green). Another name has the
colour that its hash points to, so it keeps it from figure to figure, unless a name before it in the figure has taken it.
Texts are drawn as they are: `$` and `_` in a model's name mean nothing (`text.parse_math` is off). The same data give the same
file, byte for byte.
"""

from __future__ import annotations

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
    "es": "#c8500a",
    "GRPO": "#009e73",
    "grpo": "#009e73",
    "before": "#6b6b6b",
    "after": "#c8500a",
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
    known = {name: MODEL_COLOURS[name] for name in names if name in MODEL_COLOURS}
    palette = [colour for colour in OTHER_COLOURS if colour not in known.values()]
    alike = {colour for colour in palette if any(_distance(colour, other) < 60 for other in known.values())}
    palette.sort(key=alike.__contains__)  # given away last
    colours: dict[str, str] = {}
    free: list[str] = []
    for name in dict.fromkeys(names):
        if name in known:
            colours[name] = known[name]
            continue
        free = free or list(palette)
        wanted = OTHER_COLOURS[zlib.crc32(name.encode("utf-8", "surrogatepass")) % len(OTHER_COLOURS)]
        colours[name] = wanted if wanted in free and wanted not in alike else free[0]
        free.remove(colours[name])
    return colours


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
