"""The reward and cost models as a judge, offline: from the scores that the points files hold.

More reward is more helpful, less cost is less harmful; a tie only when the scores are equal. It has no order bias and costs
nothing, so it serves where no endpoint is at hand, and as a check: how often does the judge prefer what the scorer prefers?
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from alignment.evaluation.judging.prompts import DIMENSIONS
from alignment.evaluation.judging.tasks import Answers
from alignment.evaluation.judging.verdict import TIE, Verdict, result_of
from alignment.evaluation.measures import as_record, estimate_means


def scorer_verdicts(answers: Answers, prompts: Iterable[str]) -> tuple[list[Verdict], int]:
    """Verdicts on all pairs of models, and how many comparisons have none because a score is missing."""
    verdicts, missing = [], 0
    for prompt, dimension, pair in itertools.product(prompts, DIMENSIONS, itertools.combinations(sorted(answers), 2)):
        first, second = pair
        scores = _score(answers[first][prompt], dimension), _score(answers[second][prompt], dimension)
        if any(map(math.isnan, scores)):
            missing += 1
        else:
            verdicts.append(Verdict(dimension, prompt, first, second, result_of(scores, 0.0), scores))
    return verdicts, missing


def agreement(verdicts: Sequence[Verdict], answers: Answers) -> dict:
    """How often judge and scorer prefer the same answer, where both prefer one; verdicts of one dimension.

    A pair that was judged in both orders counts once, by the sum of its results. `share` is in percent, with its interval
    by bootstrap over prompts; None when no pair is decided by both.
    """
    results: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for verdict in verdicts:
        swapped = verdict.first > verdict.second
        pair = sorted((verdict.first, verdict.second))
        results[(verdict.prompt, *pair)].append(1.0 - verdict.result if swapped else verdict.result)

    groups: dict[str, int] = {}
    rows, same, judge_ties, scorer_ties, unknown = [], [], 0, 0, 0
    dimension = verdicts[0].dimension if verdicts else DIMENSIONS[0]
    for (prompt, first, second), values in sorted(results.items()):  # the bootstrap must not depend on the order
        own = [answers.get(model, {}).get(prompt) for model in (first, second)]
        scores = [_score(row, dimension) if row else math.nan for row in own]
        if any(map(math.isnan, scores)):
            unknown += 1
            continue
        judge, scorer = np.mean(values), result_of((scores[0], scores[1]), 0.0)
        judge_ties += judge == TIE
        scorer_ties += scorer == TIE
        if TIE not in (judge, scorer):
            rows.append(groups.setdefault(prompt, len(groups)))
            same.append(100.0 * ((judge > TIE) == (scorer > TIE)))
    share = estimate_means(np.array(same).reshape(-1, 1), np.array(rows, dtype=np.int64))[0] if same else None
    return {
        "share": as_record(share),
        "judge_ties": int(judge_ties),
        "scorer_ties": int(scorer_ties),
        "without_scores": unknown,
    }


def _score(row: dict, dimension: str) -> float:
    """Higher is better; NaN where the scorer gave none."""
    value = row["reward"] if dimension == "helpfulness" else row["cost"]
    if value is None:
        return math.nan
    return float(value) if dimension == "helpfulness" else -float(value)
