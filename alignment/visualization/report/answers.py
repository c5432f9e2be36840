"""The answers of all models, in the form in which the page holds them: columns, with texts apart from scores.

Answers to one prompt find each other by the row's `id` (points.py), so a prompt that stands in the data 52 times is 52 prompts
here. A published points file may be shorter than its score arrays (ES-500: 500 of 3,036 rows): scores without a text are
points as well, with no prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignment.errors import UserError
from alignment.evaluation.measures import (
    MEASURES,
    Estimate,
    as_record,
    estimate_means,
    measure,
    row_measures,
    score_arrays,
)
from alignment.evaluation.points import ModelScores, load_scores, model_file, read_points
from alignment.objective import quadrant_labels
from alignment.records import finite_or_none

FLAGS = ("unfinished", "cut", "truncated")  # bits of the column `flags`, lowest first
SCORE_MEASURES = ("reward_mean", "cost_mean", "objective", "safe_ratio", "SH", "SU", "UH", "UU")


@dataclass(frozen=True)
class ModelAnswers:
    """Scores of all rows of a model, and its points: as many, or fewer, or none."""

    scores: ModelScores
    points: list[dict]

    @property
    def name(self) -> str:
        return self.scores.name


def load_answers(folder: str, name: str) -> ModelAnswers:
    """Raises UserError when the model has no files, or when its arrays and its points file contradict each other."""
    path = model_file(folder, name, "points.jsonl")
    scores = load_scores(folder, name)
    points = read_points(path) if path.exists() else []
    count = len(points)
    if count > len(scores.rewards):
        raise UserError(
            f"{path} has {count} rows and the arrays {len(scores.rewards)} scores; classify the model again"
        )
    for ours, theirs in zip(score_arrays(points), (scores.rewards, scores.costs), strict=True):
        known = np.isfinite(ours)
        if not np.allclose(ours[known], theirs[:count][known], atol=1e-4):
            raise UserError(f"{path}: the arrays beside it have other scores; classify the model again")
    return ModelAnswers(scores, points)


def columns(models: Sequence[ModelAnswers]) -> tuple[dict, dict]:
    """(scores and indices, texts). Points are those of the first model, then those of the second, and so on.

    scores: points {model, prompt (-1: unknown), reward, cost, quadrant, words, flags, errors}, categories, prompt_categories.
    texts: prompts, and responses, one a point, None where there is none.
    """
    numbers: dict[str, int] = {}
    prompts: list[str] = []
    categories: list[set[str]] = []
    points: dict[str, list] = {key: [] for key in ("model", "prompt", "reward", "cost", "quadrant", "words", "flags")}
    errors: dict[int, str] = {}
    responses: list[str | None] = []
    for place, model in enumerate(models):
        labels = quadrant_labels(model.scores.rewards, model.scores.costs)
        for index, (reward, cost) in enumerate(zip(model.scores.rewards, model.scores.costs, strict=True)):
            row = model.points[index] if index < len(model.points) else None
            if row is None:
                number = -1
            else:
                number = numbers.setdefault(row["id"], len(numbers))
                if number == len(prompts):
                    prompts.append(row["prompt"])
                    categories.append(set())
                categories[number].update(row.get("categories") or ())
                if row.get("error"):
                    errors[len(responses)] = str(row["error"])
            scored = np.isfinite(reward) and np.isfinite(cost)
            points["model"].append(place)
            points["prompt"].append(number)
            points["reward"].append(short_float(reward))
            points["cost"].append(short_float(cost))
            points["quadrant"].append(str(labels[index]) if scored else None)
            points["words"].append(len(row["response"].split()) if row else None)
            points["flags"].append(_flags(row) if row else 0)
            responses.append(row["response"] if row else None)
    names = sorted(set().union(*categories)) if categories else []
    order = {name: number for number, name in enumerate(names)}
    scores = {
        "points": points,
        "errors": errors,
        "categories": names,
        "prompt_categories": [sorted(order[name] for name in own) for own in categories],
    }
    return scores, {"prompts": prompts, "responses": responses}


def estimates(model: ModelAnswers, lambda_cost: float) -> dict[str, dict | None]:
    """Every measure of MEASURES with its 95 % interval. Where the points are fewer than the scores, what can be said from
    scores alone is said from all of them; `rows` tells over how many each was taken."""
    found: dict[str, Estimate | None] = dict.fromkeys(MEASURES)
    if model.points:
        found = measure(model.points, lambda_cost)
    if len(model.points) < len(model.scores.rewards):
        rows = [
            {"response": "", "reward": finite_or_none(reward), "cost": finite_or_none(cost)}
            for reward, cost in zip(model.scores.rewards, model.scores.costs, strict=True)
        ]
        values = row_measures(rows, lambda_cost)
        matrix = np.column_stack([values[name] for name in SCORE_MEASURES])
        found |= dict(zip(SCORE_MEASURES, estimate_means(matrix, model.scores.groups), strict=True))
    return {name: as_record(found[name]) for name in MEASURES}


def unscored(model: ModelAnswers) -> int:
    """Rows that lack one of their two scores, or have an infinite one."""
    return int(np.sum(~(np.isfinite(model.scores.rewards) & np.isfinite(model.scores.costs))))


def short_float(value: float) -> float | None:
    """Six digits are more than any score model means; None for NaN and infinities."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _flags(row: dict) -> int:
    known = (row.get("finished") is False, bool(row.get("cut")), bool(row.get("truncated")))
    return sum(1 << bit for bit, is_set in enumerate(known) if is_set)
