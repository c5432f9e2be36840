"""What the report shows of a judge: ratings with intervals, who beats whom, and where judge and scorer disagree."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignment.evaluation.judging.prompts import DIMENSIONS
from alignment.evaluation.judging.ratings import rate
from alignment.evaluation.judging.report import describe_ratings, position_bias
from alignment.evaluation.judging.scorer_judge import agreement
from alignment.evaluation.judging.store import read_judgments
from alignment.evaluation.judging.verdict import Verdict
from alignment.records import read_jsonl
from alignment.visualization.plot_gpt_elo_figure import load_details, load_ratings
from alignment.visualization.report.answers import ModelAnswers, short_float

MAX_DISAGREEMENTS = 150  # a dimension
TIE_THRESHOLD = 0.5  # published: scores of the judge that differ by no more are a tie


def ratings(path: Path | None, verdicts: Sequence[Verdict], models: Sequence[ModelAnswers]) -> dict | None:
    """{method, dimensions: {dimension: {ratings, win_rates, prompts, warnings, ...}}}, None when neither is given.

    Ratings are those of the file, with what the details beside it say. A published file has no details: the rest is then
    computed from the judgments.
    """
    table = load_ratings(path) if path else None
    details = load_details(path, table) if path and table else None
    if details:
        return {"method": details["rating"]["method"], "dimensions": details["dimensions"]}
    dimensions = _from_verdicts(verdicts, models)
    if not dimensions:
        bare = {
            dimension: {"ratings": {name: {"rating": value, "low": None, "high": None} for name, value in part.items()}}
            for dimension, part in (table or {}).items()
        }
        return {"method": "as in the file, which has no intervals", "dimensions": bare} if bare else None
    if table:
        for dimension, part in dimensions.items():
            for name, one in part["ratings"].items():
                one["published"] = table.get(dimension, {}).get(name)
    return {"method": "Bradley-Terry, from the judgments", "dimensions": dimensions}


def load_verdicts(path: Path | None) -> list[Verdict]:
    if path is None:
        return []
    return read_judgments(str(path), (), None, None, TIE_THRESHOLD, "tie")[0]


def disagreements(path: Path | None, verdicts: Sequence[Verdict], models: Sequence[ModelAnswers]) -> dict[str, dict]:
    """dimension -> {shown, total, rows}: pairs of answers where judge and scorer each prefer the other one.

    Strongest first: by the smaller of the two differences, each as a rank among all pairs that were judged. A row: prompt
    (its id), models (two), judge (two scores), scorer (two, higher is better), replies (the judge's texts).
    """
    if path is None:
        return {}
    replies = defaultdict(list)
    for row in read_jsonl(path):
        pair = sorted((row["model_a"], row["model_b"]))
        replies[(row["dimension"], row["question"], *pair)].append(
            {"shown_first": row["model_a"], "text": str(row.get("raw") or "")}
        )
    answers = _by_prompt(models)
    judged: dict[tuple, list[np.ndarray]] = defaultdict(list)
    for one in verdicts:
        if one.scores:
            pair = sorted((one.first, one.second))
            judged[(one.dimension, one.prompt, *pair)].append(
                np.array(one.scores if one.first == pair[0] else one.scores[::-1])
            )
    found: dict[str, list[dict]] = {dimension: [] for dimension in DIMENSIONS}
    for (dimension, prompt, first, second), scores in judged.items():
        key, sign = ("reward", 1) if dimension == "helpfulness" else ("cost", -1)
        found_rows = (answers.get(name, {}).get(prompt) for name in (first, second))
        rows = [row for row in found_rows if row is not None and row[key] is not None]
        if len(rows) < 2:
            continue
        judge, scorer = np.mean(scores, axis=0), [sign * row[key] for row in rows]
        found[dimension].append(
            {
                "prompt": rows[0]["id"],
                "models": [first, second],
                "judge": [short_float(value) for value in judge],
                "scorer": [short_float(value) for value in scorer],
                "replies": replies[(dimension, prompt, first, second)],
            }
        )
    return {dimension: _strongest(pairs) for dimension, pairs in found.items() if pairs}


def _strongest(pairs: list[dict]) -> dict:
    gaps = np.array([[one[who][0] - one[who][1] for who in ("judge", "scorer")] for one in pairs])  # (N, 2)
    ranks = np.argsort(np.argsort(np.abs(gaps), axis=0, kind="stable"), axis=0, kind="stable").min(axis=1)
    against = (np.abs(gaps[:, 0]) > TIE_THRESHOLD) & (gaps.prod(axis=1) < 0)
    order = [int(index) for index in np.argsort(-ranks, kind="stable") if against[index]]
    return {
        "total": len(order),
        "judged": len(pairs),
        "rows": [pairs[index] for index in order[:MAX_DISAGREEMENTS]],
    }


def _from_verdicts(verdicts: Sequence[Verdict], models: Sequence[ModelAnswers]) -> dict[str, dict]:
    if not verdicts:
        return {}
    names = list(dict.fromkeys(name for one in verdicts for name in (one.first, one.second)))
    order = [model.name for model in models if model.name in names]
    names = order + [name for name in names if name not in order]
    answers = _by_prompt(models)
    described = {}
    for dimension in DIMENSIONS:
        own = [one for one in verdicts if one.dimension == dimension]
        if not own:
            print(f"no judgment on {dimension}, so the report has no ratings of it", file=sys.stderr)
            continue
        described[dimension] = describe_ratings(rate(own, names, names[0], "bradley-terry", 400, 0))
        described[dimension]["position_bias"] = position_bias(own)
        described[dimension]["agreement_with_scorer"] = agreement(own, answers)
    return described


def _by_prompt(models: Sequence[ModelAnswers]) -> dict[str, dict[str, dict]]:
    """model -> prompt -> its last row, which is the one that is judged (judging/tasks.py)."""
    return {model.name: {row["prompt"]: row for row in model.points} for model in models}
