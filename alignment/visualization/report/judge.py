"""What the report shows of a judge: ratings with intervals, who beats whom, and where judge and scorer disagree."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment.evaluation.judging.prompts import DIMENSIONS
from alignment.evaluation.judging.ratings import BASELINE_RATING, choose_baseline, rate
from alignment.evaluation.judging.report import describe_ratings, position_bias
from alignment.evaluation.judging.scorer_judge import agreement
from alignment.evaluation.judging.store import UnclearJudgments, models_and_judges, read_judgments
from alignment.evaluation.judging.tasks import Answers, answers_there, points_hash
from alignment.evaluation.judging.verdict import Verdict
from alignment.visualization.plot_gpt_elo_figure import load_details, load_ratings
from alignment.visualization.report.answers import ModelAnswers, short_float

MAX_DISAGREEMENTS = 150  # a dimension
TIE_THRESHOLD = 0.5  # published: scores of the judge that differ by no more are a tie


@dataclass(frozen=True)
class Rated:
    """A ratings file: its table, and the details beside it, {} where there are none."""

    path: Path
    table: dict[str, dict[str, float]]
    details: dict

    @property
    def source(self) -> dict:
        """What the ratings were made from."""
        found = self.details.get("source")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Judged:
    """What a judgments file says of the answers that are here, and whose judgments they are."""

    verdicts: list[Verdict]
    kind: str = ""


def read_ratings(path: Path, models: Sequence[ModelAnswers], notes: list[str]) -> Rated:
    table = load_ratings(path)
    details = load_details(path, table, "the report's intervals come from the judgments, if there are any")
    rated = Rated(path, table, details or {})
    points, answers = rated.source.get("points"), _by_prompt(models)
    known = points if isinstance(points, dict) else {}
    changed = [name for name, own in answers.items() if name in known and known[name] != points_hash(own.values())]
    if changed:
        notes.append(
            f"The answers or scores of {', '.join(changed)} have changed since {path} was made: rate again (gpt_elo_eval.py)."
        )
    return rated


def read_verdicts(
    path: Path,
    models: Sequence[ModelAnswers],
    data_dir: str,
    *,
    only: Sequence[str],
    judge: str | None,
    template: str | None,
    rated: Rated | None,
    notes: list[str],
) -> Judged:
    """The verdicts on the answers that are here, of the models `only` if any are named. Of several judges the one that `judge`
    and `template` name, else that of the ratings; where it stays unclear what counts, nothing does, and a note says why."""
    names, judges = models_and_judges(path)
    answers = _by_prompt(models)
    answers |= answers_there(data_dir, [name for name in names if name not in {model.name for model in models}])
    own = (rated.source.get("judge"), rated.source.get("template")) if rated else (None, None)
    if judge is None and template is None and own in judges:
        judge, template = own
    try:
        verdicts, told = read_judgments(path, only, judge, template, TIE_THRESHOLD, "tie", answers)
    except UnclearJudgments as error:
        notes.append(f"Judgments are left out: {error}.")
        return Judged([])
    if told.get("on_other_answers"):
        notes.append(
            f"{told['on_other_answers']:,} verdicts in {path} are on other answers than those here, and are left out."
        )
    if rated and own[1] is not None and told.get("judge") and (told["judge"], told["template"]) != own:
        notes.append(f"{rated.path} rates by {own[0]} (template {own[1]}), the judgments shown are by {told['kind']}.")
    return Judged(verdicts, told["kind"])


def ratings(rated: Rated | None, judged: Judged, models: Sequence[ModelAnswers]) -> dict | None:
    """{method, scale, dimensions: {dimension: {ratings, win_rates, prompts, warnings, ...}}}, None when neither is given.

    Ratings are those of the file, with what the details beside it say. A published file has no details: the rest is then
    computed from the judgments, with the same model at 1000. `scale` says which.
    """
    if rated and rated.details:
        told, judge = rated.details["rating"], rated.source.get("judge")
        method = f"{told['method']}, judge: {judge}" if judge else told["method"]
        return {"method": method, "scale": f"{told['baseline']} = 1000", "dimensions": rated.details["dimensions"]}
    table = rated.table if rated else {}
    anchors = [
        name
        for name in table.get("helpfulness", {})
        if all(math.isclose(part.get(name, 0.0), BASELINE_RATING) for part in table.values())
    ]
    if not judged.verdicts:
        dimensions: dict[str, dict] = {
            dimension: {"ratings": {name: {"rating": value, "low": None, "high": None} for name, value in part.items()}}
            for dimension, part in table.items()
        }
        scale = f"{choose_baseline(anchors, None)} = 1000" if anchors else ""
        return (
            {"method": "as in the file, which has no intervals", "scale": scale, "dimensions": dimensions}
            if table
            else None
        )
    names = _judged_names(judged.verdicts, models)
    common = [name for name in anchors if name in names]
    baseline = choose_baseline(common or names, None)
    dimensions = _from_verdicts(judged.verdicts, names, baseline, _by_prompt(models))
    for dimension, part in dimensions.items():
        for name, one in part["ratings"].items():
            if table:
                one["published"] = table.get(dimension, {}).get(name)
    scale = f"{baseline} = 1000"
    if table and not common:
        scale += (
            f"; in the file {choose_baseline(anchors, None)} = 1000" if anchors else "; in the file no model is at 1000"
        )
    return {"method": f"Bradley-Terry, from the judgments: {judged.kind}", "scale": scale, "dimensions": dimensions}


def disagreements(verdicts: Sequence[Verdict], models: Sequence[ModelAnswers]) -> dict[str, dict]:
    """dimension -> {total, judged, rows}: pairs of answers where judge and scorer each prefer the other one.

    Strongest first: by the smaller of the two differences, each as a rank among all pairs that were judged. A row: prompt
    (its id), models (two), judge (two scores), scorer (two, higher is better), replies (the judge's texts).
    """
    replies = defaultdict(list)
    for one in verdicts:
        pair = sorted((one.first, one.second))
        replies[(one.dimension, one.prompt, *pair)].append({"shown_first": one.first, "text": one.reply})
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


def _judged_names(verdicts: Sequence[Verdict], models: Sequence[ModelAnswers]) -> list[str]:
    names = list(dict.fromkeys(name for one in verdicts for name in (one.first, one.second)))
    order = [model.name for model in models if model.name in names]
    return order + [name for name in names if name not in order]


def _from_verdicts(
    verdicts: Sequence[Verdict], names: Sequence[str], baseline: str, answers: Answers
) -> dict[str, dict]:
    described = {}
    for dimension in DIMENSIONS:
        own = [one for one in verdicts if one.dimension == dimension]
        if not own:
            print(f"no judgment on {dimension}, so the report has no ratings of it", file=sys.stderr)
            continue
        described[dimension] = describe_ratings(rate(own, names, baseline, "bradley-terry", 400, 0))
        described[dimension]["position_bias"] = position_bias(own)
        described[dimension]["agreement_with_scorer"] = agreement(own, answers)
    return described


def _by_prompt(models: Sequence[ModelAnswers]) -> Answers:
    """Of the models whose texts are here: prompt -> its last row, which is the one that is judged (judging/tasks.py)."""
    return {model.name: {row["prompt"]: row for row in model.points} for model in models if model.points}
