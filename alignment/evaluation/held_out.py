"""Held-out evaluation during training, the same for every trainer: greedy answers, their scores, measures with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignment.errors import UserError
from alignment.evaluation.measures import interval_text, measure
from alignment.evaluation.points import prompt_ids
from alignment.generation import Generation
from alignment.objective import MAX_MISSING_SHARE, quadrant_labels
from alignment.records import finite_or_none, read_object
from alignment.scoring.scores import Scorer


def score_held_out(
    prompts: Sequence[str], answers: Sequence[Generation], scorer: Scorer, lambda_cost: float
) -> tuple[list[dict], dict]:
    """Scores answers to `prompts` (greedy ones, on the prompt alone): (rows of a points file, measures with intervals)."""
    points = with_ids(score_answers(prompts, answers, scorer))
    return points, measures_row(points, lambda_cost)


def score_answers(prompts: Sequence[str], answers: Sequence[Generation], scorer: Scorer) -> list[dict]:
    """Rows of a points file (points.py) but for their ids, in the order of the prompts."""
    scores = scorer.score(list(prompts), [one.response for one in answers], [one.finished for one in answers])
    labels = quadrant_labels(scores.rewards, scores.costs)
    scored = np.isfinite(scores.rewards) & np.isfinite(scores.costs)
    points = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        row = {
            "prompt": prompt,
            "response": answer.response,
            "reward": finite_or_none(scores.rewards[i]),
            "cost": finite_or_none(scores.costs[i]),
            "label": str(labels[i]) if scored[i] else None,
            "finished": answer.finished,
            "cut": answer.cut,
            "num_tokens": answer.num_tokens,
            "truncated": scores.truncated[i],
        }
        points.append(row | ({"error": scores.errors[i]} if scores.errors[i] else {}))
    return points


def with_ids(points: list[dict]) -> list[dict]:
    """The rows with their prompts' ids. They need all rows: a repeated prompt is numbered."""
    ids = prompt_ids(point["prompt"] for point in points)
    return [point | {"id": one} for one, point in zip(ids, points, strict=True)]


def measures_row(points: list[dict], lambda_cost: float) -> dict:
    """`name`, `name_low`, `name_high` (None: too few prompts) for each of `measures.MEASURES` that the rows have, and
    `scores_missing`.

    The objective is taken at `lambda_cost`, so that iterations compare while lambda moves. Raises UserError when more than
    5 % of the scores are missing.
    """
    reasons = [point["error"] for point in points if "error" in point]
    if len(reasons) > MAX_MISSING_SHARE * len(points):
        raise UserError(f"held-out evaluation: {len(reasons)} of {len(points)} scores are missing ({reasons[0]})")
    row: dict = {"scores_missing": len(reasons)}
    for name, estimate in measure(points, lambda_cost).items():
        if estimate is not None:
            row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row


def is_best(best: Path, objective: float, held_out: str) -> bool:
    """Whether a policy beats the one that a run keeps in the folder `best`; `held_out`: the hash of the prompts.

    Objectives on other prompts do not compare: the run then begins anew with its best.
    """
    state = best / "trainer_state.json"
    if not state.exists():
        return True
    standing = read_object(state, objective=(int, float))
    return standing.get("held_out", held_out) != held_out or objective > standing["objective"]


def summary_line(iteration: int, row: dict) -> str:
    """One line for a terminal or a log."""
    interval = interval_text(row["objective_low"], row["objective_high"], ".3f")
    return (
        f"held-out after {iteration} steps: objective {row['objective']:.3f} {interval}  "
        f"R {row['reward_mean']:.3f}  C {row['cost_mean']:.3f}  "
        f"safe {row['safe_ratio']:.1f} %  safe and helpful {row['SH']:.1f} %"
    )


def samples(points: list[dict], count: int = 3) -> str:
    """The first answers, a line each, with their quadrants."""
    return "\n".join(
        f"  {point['label'] or 'not scored'}  {point['prompt'][:80]!r} -> {point['response'][:120]!r}"
        for point in points[:count]
    )
