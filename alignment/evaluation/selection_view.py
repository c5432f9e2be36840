"""Tables (Markdown) and figures (PNG bytes) of a selection, for `select_pku_balanced.ipynb`. Nothing is computed here."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alignment.evaluation.compare_models import aligned_table
from alignment.evaluation.selection import Selection, statistics
from alignment.visualization.style import PAGE_WIDTH, new_figure, paper_style

COLOURS = {"pool": "#6b6b6b", "train": "#0072b2", "eval": "#e69f00"}
BUCKETS = {
    "(True, True)": "both safe",
    "(False, False)": "both unsafe",
    "(True, False)": "only response 0 safe",
    "(False, True)": "only response 1 safe",
}
LISTED = 10  # pairs of alike prompts in a table; the report file has all
CUT = 90  # characters of a prompt in a table


def parts(selection: Selection) -> dict[str, list[dict]]:
    return {"pool": selection.pool, "train": selection.train, "eval": selection.evaluation}


def counts_table(selection: Selection) -> str:
    """How the rows of the data came down to those that could be drawn."""
    texts = {
        "total": "rows in the data",
        "of_source": "both responses from the source",
        "identical_rows": "left out: same prompt and responses as another row",
        "repeated_prompts": "left out: prompt of another row",
        "excluded": "left out: prompt of the test split",
        "can_be_drawn": "could be drawn",
    }
    return aligned_table([["", "rows"], *([texts[key], f"{count:,}"] for key, count in selection.counts.items())])


def bucket_table(selection: Selection) -> str:
    """Rows and shares of every bucket in pool, train and eval."""
    found = {name: statistics(rows) for name, rows in parts(selection).items()}
    lines = [["bucket", *found]]
    for bucket in found["pool"]["bucket_counts"]:
        cells = []
        for part in found.values():
            count, share = part["bucket_counts"].get(bucket, 0), part["bucket_proportions"].get(bucket, 0.0)
            cells.append(f"{count:,} ({100 * share:.1f} %)")
        lines.append([f"{bucket} {BUCKETS[bucket]}", *cells])
    return aligned_table([*lines, ["all", *(f"{part['num_rows']:,}" for part in found.values())]])


def category_table(selection: Selection) -> str:
    """Share of rows with a response of each harm category, in percent, the most frequent in the pool first."""
    found = {name: statistics(rows) for name, rows in parts(selection).items()}
    names = sorted(found["pool"]["harm_counts_per_pair"].items(), key=lambda item: (-item[1], item[0]))
    lines = [["harm category, % of rows", *found]]
    for name, _ in names:
        lines.append([name, *(f"{_share(part, name):.1f}" for part in found.values())])
    return aligned_table(lines)


def leakage_table(report: dict[str, dict]) -> str:
    """What every pair of splits has in common."""
    header = ["between", "common prompts", "rows of the first", "rows of the second", "same words", "alike"]
    lines = [
        [name, *(str(found[key]) for key in ("prompts", "rows_a", "rows_b", "same_words")), str(len(found["alike"]))]
        for name, found in report.items()
    ]
    return aligned_table([header, *lines])


def alike_table(report: dict[str, dict]) -> str:
    """The most alike prompts with different words, of all pairs of splits."""
    pairs = [
        (pair["similarity"], name, pair["a"], pair["b"]) for name, found in report.items() for pair in found["alike"]
    ]
    pairs = sorted(pairs, key=lambda pair: -pair[0])[:LISTED]
    if not pairs:
        return "No two prompts are alike."
    lines = [["between", "first", "second", "similarity"]]
    lines += [[name, _one_line(a), _one_line(b), f"{similarity:.2f}"] for similarity, name, a, b in pairs]
    return aligned_table(lines)


def draw_buckets(selection: Selection) -> bytes:
    found = {name: statistics(rows)["bucket_proportions"] for name, rows in parts(selection).items()}
    names = list(found["pool"])
    shares = {name: [100 * part.get(bucket, 0.0) for bucket in names] for name, part in found.items()}
    with paper_style():
        figure = new_figure(PAGE_WIDTH, 0.6 + 0.4 * len(names))
        _bars(figure.subplots(), [BUCKETS[name] for name in names], shares, "rows, %")
        return _png(figure)


def draw_categories(selection: Selection) -> bytes:
    found = {name: statistics(rows) for name, rows in parts(selection).items()}
    counts = found["pool"]["harm_counts_per_pair"]
    names = sorted(counts, key=lambda name: (-counts[name], name))
    shares = {name: [_share(part, category) for category in names] for name, part in found.items()}
    with paper_style():
        figure = new_figure(PAGE_WIDTH, 0.7 + 0.26 * len(names))
        _bars(figure.subplots(), names, shares, "rows with a response of the category, %")
        return _png(figure)


def draw_lengths(selection: Selection) -> bytes:
    """Histograms of the lengths of prompts and responses in words; what is beyond the pool's 99th percentile counts there."""
    kinds = {"prompt": ["prompt"], "response": ["response_0", "response_1"]}
    with paper_style():
        figure = new_figure(PAGE_WIDTH, 2.2)
        for panel, (kind, keys) in zip(figure.subplots(1, len(kinds)), kinds.items(), strict=True):
            lengths = {
                name: np.array([len(row[key].split()) for row in rows for key in keys])
                for name, rows in parts(selection).items()
            }
            end = int(np.percentile(lengths["pool"], 99))
            width = max(1, round(end / 30))  # whole words, so that every bar holds as many lengths
            edges = np.arange(0, end + width + 1, width) - 0.5
            for name, values in lengths.items():
                counts, _ = np.histogram(np.minimum(values, end), edges)
                panel.stairs(100 * counts / len(values), edges, color=COLOURS[name], label=name)
            panel.set(xlabel=f"length of the {kind}, words", ylabel="share, %")
        panel.legend()
        return _png(figure)


def _bars(panel: Axes, names: Sequence[str], shares: dict[str, list[float]], label: str) -> None:
    places = np.arange(len(names))
    for number, (name, values) in enumerate(shares.items()):
        panel.barh(places + 0.27 * (number - 1), values, height=0.24, color=COLOURS[name], label=name)
    panel.set_yticks(places, names)
    panel.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    panel.set_xlabel(label)
    panel.legend()


def _share(part: dict, category: str) -> float:
    return 100 * part["harm_counts_per_pair"].get(category, 0) / part["num_rows"]


def _one_line(prompt: str) -> str:
    text = " ".join(prompt.split())
    return text if len(text) <= CUT else text[: CUT - 1] + "…"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
