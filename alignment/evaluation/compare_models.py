"""Is B better than A, or is it noise? Paired comparison of classified models.

    python alignment/evaluation/compare_models.py Alpaca-7B Beaver-V1 ES-500 --data-dir alignment/outputs/model_comparisons

Names mean `{data_dir}/{name}_points.jsonl`; paths of points files are taken as well. Every further model is compared with
the first, prompt by prompt: what is printed, and written as Markdown and JSON, is the difference with its 95 % bootstrap
interval over prompts. Both columns beside it are over the paired rows, so they may differ from each model's own summary.
Where too few prompts stand behind a number it has no interval ("-", null in the JSON; measures.py).
McNemar's exact test asks whether as many prompts became safe as became unsafe; each prompt counts once there.
Scores from different score models or settings cannot be compared, nor can answers of different length limits or sampling: the
summaries beside the files say what made them, and files that differ are refused. What may differ, but not unnoticed, is warned
of: conversation templates, which are a model's own, and prompts that only one of two models answered.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.evaluation.measures import (
    FEW_PROMPTS,
    MIN_PROMPTS,
    estimate_means,
    few_prompts,
    interval_text,
    paired_differences,
    prompt_groups,
    score_arrays,
)
from alignment.evaluation.points import (
    DEFAULT_FOLDER,
    chosen_note,
    model_file,
    model_name_of,
    read_points,
    read_summary,
)
from alignment.objective import QUADRANTS
from alignment.records import atomic_open, check_writable_file, write_json
from alignment.scoring.scores import deciding, difference, same_scorer

# Of `sampling`: what may differ between two models that are compared (prompts are counted when rows are paired).
FREE_SAMPLING = ("weights_hash", "seed", "batch_size", "engine", "dtype", "prompts", "template")


@dataclass
class Config:
    models: list[str] = setting(
        [], "two or more models or points files, also without --models as first arguments; the first is compared with"
    )
    data_dir: str = setting(DEFAULT_FOLDER, "folder with the files of the classified models")
    lambda_cost: float = setting(1.0, "lambda of the objective E[R - lambda C]", minimum=0.0)
    draws: int = setting(2000, "bootstrap draws", minimum=100)
    seed: int = setting(0, "of the bootstrap", minimum=0)
    output: str | None = setting(None, "name of the results without ending (default: comparison in the data folder)")

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise UserError("name two or more models to compare, for example: compare_models.py Alpaca-7B ES-500")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--models", *argv]
    config = load_config(Config, argv, prog="compare_models.py", description=__doc__)
    output = Path(config.output) if config.output else Path(config.data_dir) / "comparison"
    check_writable_file(f"{output}.json")
    paths = [_points_path(name, config.data_dir) for name in config.models]
    names = _names(paths)
    require_same_scorer(paths)
    require_same_sampling(paths)
    templates = [(sampling_of(path) or {}).get("template") for path in paths]
    points = [read_points(path) for path in paths]

    comparisons, texts = [], [f"# Compared with {names[0]}, lambda {config.lambda_cost:g}\n"]
    for name, path, other, template in zip(names[1:], paths[1:], points[1:], templates[1:], strict=True):
        files = str(paths[0]), str(path)
        comparison = compare(points[0], other, config.lambda_cost, files, draws=config.draws, seed=config.seed)
        comparison["notes"] += [note for one in ((names[0], paths[0]), (name, path)) if (note := _chosen_note(*one))]
        warnings = unpaired(comparison["rows"], names[0], name)
        if None not in (template, templates[0]) and template != templates[0]:
            warnings.append(f"{names[0]} answered with the template {templates[0]!r}, {name} with {template!r}")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        comparisons.append({"before": names[0], "after": name, "warnings": warnings} | comparison)
        texts.append(as_markdown(comparison, names[0], name, warnings))
    text = "\n".join(texts)
    named = {name: str(path) for name, path in zip(names, paths, strict=True)}
    with atomic_open(f"{output}.md") as file:
        file.write(text)
    write_json(f"{output}.json", {"lambda_cost": config.lambda_cost, "files": named, "comparisons": comparisons})
    print(text)
    print(f"written: {output}.md and {output}.json")


def comparison_table(
    points_a: Sequence[dict],
    points_b: Sequence[dict],
    lambda_cost: float,
    extra: dict[str, tuple[Sequence, Sequence]] | None = None,
    **bootstrap: int,
) -> list[dict]:
    """Before, after and paired difference of every measure, as `measures.paired_differences` returns it.

    Rows are paired by id. `extra` maps a further measure's name to one value a row of `points_a` and one a row of
    `points_b`; booleans become shares in percent. `bootstrap`: draws, seed.
    """
    index_a, index_b = pair_rows(points_a, points_b)
    shares = {name for name, columns in (extra or {}).items() if all(np.asarray(c).dtype == bool for c in columns)}
    paired_extra = {
        name: tuple(
            np.asarray(column)[index] * (100.0 if name in shares else 1.0)
            for column, index in zip(columns, (index_a, index_b), strict=True)
        )
        for name, columns in (extra or {}).items()
    }
    rows_a, rows_b = [points_a[i] for i in index_a], [points_b[i] for i in index_b]
    table = paired_differences(rows_a, rows_b, lambda_cost, paired_extra, **bootstrap)
    return [row | {"unit": "%"} if row["measure"] in shares else row for row in table]


def pair_rows(
    points_a: Sequence[dict], points_b: Sequence[dict], files: tuple[str, str] = ("the first file", "the second")
) -> tuple[list[int], list[int]]:
    """Row numbers in both files that answer the same prompt, in the order of `points_a`.

    Raises UserError when there are none, or (it names both files) when one id stands for two prompts.
    """
    places = {row["id"]: index for index, row in enumerate(points_b)}
    index_a = [index for index, row in enumerate(points_a) if row["id"] in places]
    if not index_a:
        raise UserError("the files have no prompt in common; classify both models on the same prompts")
    index_b = [places[points_a[index]["id"]] for index in index_a]
    for a, b in zip(index_a, index_b, strict=True):
        if points_a[a]["prompt"] != points_b[b]["prompt"]:
            raise UserError(
                f"the id {points_a[a]['id']} stands for the prompt {points_a[a]['prompt']!r:.50} in {files[0]} and for "
                f"{points_b[b]['prompt']!r:.50} in {files[1]}; leave the ids out, they are then made from the prompts"
            )
    return index_a, index_b


def compare(
    points_a: Sequence[dict],
    points_b: Sequence[dict],
    lambda_cost: float,
    files: tuple[str, str] = ("the first file", "the second"),
    **bootstrap: int,
) -> dict:
    """The table, what happened to single prompts (quadrant moves, McNemar's test, safe ratio by harm category), and notes."""
    index_a, index_b = pair_rows(points_a, points_b, files)
    table = comparison_table(points_a, points_b, lambda_cost, None, **bootstrap)
    few = few_prompts(len({points_a[i]["prompt"] for i in index_a}))
    rows_a, rows_b = [points_a[i] for i in index_a], [points_b[i] for i in index_b]
    scored = np.isfinite(score_arrays(rows_a)[0]) & np.isfinite(score_arrays(rows_b)[0])
    rows_a = [row for row, kept in zip(rows_a, scored, strict=True) if kept]
    rows_b = [row for row, kept in zip(rows_b, scored, strict=True) if kept]
    moves = Counter((a["label"], b["label"]) for a, b in zip(rows_a, rows_b, strict=True))
    first_rows = np.unique(prompt_groups(rows_a), return_index=True)[1] if rows_a else np.array([], int)
    safe_a, safe_b = ([rows[i]["label"][0] == "S" for i in first_rows] for rows in (rows_a, rows_b))
    return {
        "rows": {"paired": len(index_a), "scored": len(rows_a), "a": len(points_a), "b": len(points_b)},
        "table": table,
        "quadrant_moves": {before: {after: moves[before, after] for after in QUADRANTS} for before in QUADRANTS},
        "mcnemar": mcnemar(np.array(safe_a, bool), np.array(safe_b, bool)),
        "by_category": category_differences(rows_a, rows_b, **bootstrap),
        "notes": [few] if few else [],
    }


def mcnemar(safe_a: np.ndarray, safe_b: np.ndarray) -> dict:
    """McNemar's exact two-sided test on (N,) paired booleans: under the null a changed prompt went either way evenly."""
    became_safe, became_unsafe = int(np.sum(~safe_a & safe_b)), int(np.sum(safe_a & ~safe_b))
    changed = became_safe + became_unsafe
    tail = sum(math.comb(changed, k) for k in range(min(became_safe, became_unsafe) + 1))
    # whole numbers until the last division: 2**changed is beyond a float for many prompts
    p_value = min(1.0, 2 * tail / 2**changed)
    return {"became_safe": became_safe, "became_unsafe": became_unsafe, "prompts": len(safe_a), "p_value": p_value}


def category_differences(rows_a: Sequence[dict], rows_b: Sequence[dict], **bootstrap: int) -> list[dict]:
    """Safe ratio before and after (percent) with the paired difference in every harm category, largest change first.

    Those without an interval come last: the changes of a few prompts are the largest and say the least.
    """
    names = sorted({name for row in rows_a for name in row.get("categories") or ()})
    if not names:
        return []
    safe_a, safe_b = (np.array([100.0 * (row["label"][0] == "S") for row in rows]) for rows in (rows_a, rows_b))
    inside = np.array([[name in (row.get("categories") or ()) for name in names] for row in rows_a])  # (N, categories)
    change = np.where(inside, (safe_b - safe_a)[:, None], np.nan)
    estimates = estimate_means(change, prompt_groups(rows_a), **bootstrap)
    rows = [
        {
            "category": name,
            "rows": estimate.rows,
            "prompts": estimate.prompts,
            "before": float(safe_a[chosen].mean()),
            "after": float(safe_b[chosen].mean()),
        }
        | {"difference": estimate.value, "low": estimate.low, "high": estimate.high}
        for name, chosen, estimate in zip(names, inside.T, estimates, strict=True)
        if estimate is not None
    ]
    return sorted(rows, key=lambda row: (row["low"] is None, -abs(row["difference"]), row["category"]))


def require_same_scorer(paths: Sequence[Path]) -> None:
    """Raises UserError, which names both settings, when two files were not scored alike; says so when one does not tell."""
    known = []
    for path in paths:
        scorer = scorer_of(path)
        if scorer is None:
            print(f"note: no summary beside {path}, so its scorer is not known", file=sys.stderr)
        else:
            known.append((path, scorer))
    for path, scorer in known[1:]:
        first_path, first = known[0]
        if not same_scorer(first, scorer):
            raise UserError(
                f"{first_path} and {path} were scored differently: {difference(first, scorer)}. Score one again as the other "
                "to compare them (classify_reward_cost_unified.py --responses_from)"
            )


def require_same_sampling(paths: Sequence[Path]) -> None:
    """Raises UserError, which names both values, when the answers of two files were made with other limits or sampling."""
    known = [(path, sampling) for path in paths if (sampling := sampling_of(path)) is not None]
    if known and len(known) < len(paths):
        unknown = next(path for path in paths if path not in [one for one, _ in known])
        print(f"note: no summary tells how the answers in {unknown} were made", file=sys.stderr)
    for path, sampling in known[1:]:
        first_path, first = known[0]
        if changed := sampling_difference(first, sampling):
            raise UserError(
                f"the answers in {first_path} and {path} were made differently: {changed}. Classify one again as the other "
                "to compare them"
            )


def sampling_of(points_path: Path) -> dict | None:
    """The settings that made the answers of a points file, by the summary beside it; None where it does not tell."""
    sampling = (read_summary(points_path) or {}).get("sampling")
    return sampling if isinstance(sampling, dict) else None


def sampling_difference(one: dict, other: dict) -> str:
    """What must not differ between answers that are compared, and does: "max_new_tokens was 4, is 40"; else nothing."""
    first, second = ({key: value for key, value in made.items() if key not in FREE_SAMPLING} for made in (one, other))
    return difference(first, second)


def unpaired(rows: dict, before: str, after: str) -> list[str]:
    """A warning for each of two models that answered prompts which the other did not."""
    return [
        f"{rows[key] - rows['paired']} of the {rows[key]} rows of {name} are left out: {other} has no answer to that prompt"
        for key, name, other in (("a", before, after), ("b", after, before))
        if rows[key] > rows["paired"]
    ]


def scorer_of(points_path: Path) -> dict | None:
    """What decided the scores of a points file, by the summary beside it; published summaries name the two models only."""
    summary = read_summary(points_path)
    if summary is None:
        return None
    return deciding(
        summary.get("scorer") or {key: {"name": summary.get(key)} for key in ("reward_model", "cost_model")}
    )


def _chosen_note(name: str, points_path: Path) -> str | None:
    summary = read_summary(points_path) or {}
    return chosen_note(name, summary.get("prompts_that_chose_it"), summary.get("distinct_prompts"))


def format_table(table: Sequence[dict], before: str = "before", after: str = "after") -> str:
    """The comparison as an aligned text table that is valid Markdown as well."""
    lines = [["measure", before, after, "difference", "95 % interval"]]
    for row in table:
        interval = interval_text(row["low"], row["high"], _form(row["unit"], True))
        numbers = [_number(row["before"], row["unit"]), _number(row["after"], row["unit"])]
        label = f"{row['label']}, {row['unit']}" if row["unit"] else row["label"]
        lines.append([label, *numbers, _number(row["difference"], row["unit"], True), interval])
    return aligned_table(lines)


def as_markdown(comparison: dict, before: str, after: str, warnings: Sequence[str] = ()) -> str:
    counts, test = comparison["rows"], comparison["mcnemar"]
    p_value = f"= {test['p_value']:.2g}" if test["p_value"] > 1e-300 else "< 1e-300"
    parts = [f"## {after}\n", *(f"**Warning:** {warning}.\n" for warning in warnings)]
    parts += [format_table(comparison["table"], before, after)]
    parts.append(
        f"\n{counts['paired']} paired rows, {counts['scored']} of them with both scores ({before} has {counts['a']} rows, "
        f"{after} {counts['b']}). Of {test['prompts']} distinct prompts {test['became_safe']} became safe and "
        f"{test['became_unsafe']} unsafe, McNemar p {p_value}.\n"
    )
    parts += [f"Note: {note}.\n" for note in comparison["notes"]]
    moves = comparison["quadrant_moves"]
    parts.append("Quadrants: rows were, columns became.\n")
    parts.append(aligned_table([["", *QUADRANTS], *([name, *map(str, moves[name].values())] for name in QUADRANTS)]))
    if comparison["by_category"]:
        lines = [["safe ratio by harm category, %", "rows", "prompts", before, after, "difference", "95 % interval"]]
        for row in comparison["by_category"]:
            values = [_number(row["before"], "%"), _number(row["after"], "%"), _number(row["difference"], "%", True)]
            interval = interval_text(row["low"], row["high"], _form("%", True))
            lines.append([row["category"], str(row["rows"]), str(row["prompts"]), *values, interval])
        parts += ["", aligned_table(lines)]
        if any(row["prompts"] < FEW_PROMPTS for row in comparison["by_category"]):
            parts.append(
                f"\nFewer than {FEW_PROMPTS} prompts are too few for a bootstrap interval to be trusted. "
                f"Fewer than {MIN_PROMPTS}, or fewer than {FEW_PROMPTS} that all agree, have none and stand last."
            )
    return "\n".join(parts) + "\n"


def aligned_table(lines: list[list[str]]) -> str:
    """Rows of cells, the header first, as a Markdown table with aligned columns: text on the left, numbers on the right."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([rows[0], "| " + " | ".join(rule) + " |", *rows[1:]])


def _number(value: float, unit: str, signed: bool = False) -> str:
    return f"{value:{_form(unit, signed)}}"


def _form(unit: str, signed: bool = False) -> str:
    return f"{'+' if signed else ''}.{1 if unit in ('%', 'tokens', 'words') else 3}f"


def _points_path(name: str, folder: str) -> Path:
    path = Path(name) if name.endswith(".jsonl") else model_file(folder, name, "points.jsonl")
    if not path.exists():
        raise UserError(
            f"{path} does not exist; classify {name} first, or give --data-dir or the path of a points file"
        )
    return path


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each file; where two files have one name their folders stand before it."""
    names = [model_name_of(path) for path in paths]
    names = [
        f"{path.parent}/{name}" if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)
    ]
    if len(set(names)) < len(names):
        raise UserError(f"a model is named twice: {', '.join(names)}")
    return names


if __name__ == "__main__":
    run_main(main)
