"""How a judge's reply becomes a verdict.

The published script takes the first `[[a, b]]` anywhere, also one that the judge quotes from a candidate. Here a verdict is the
reply's last line, alone or behind a label such as "Final scores:", or the two numbers of a reply that is one JSON object.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

LOWEST, HIGHEST = 1.0, 10.0
TIE = 0.5  # the result of a tie: half a win for either

_NUMBER = r"(\d{1,2}(?:\.\d+)?)"
_LAST_LINE = re.compile(
    r"[\s*_`#>]{0,4}(?:(?:my |the )?(?:final )?(?:scores?|verdict|ratings?)[\s*_]*:)?[\s*_`]*"
    rf"\[\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]\][\s*_`.]*",
    re.IGNORECASE,
)
_CODE_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """One decided comparison. `first` was shown as A; `result` is 1 when it won, 0 when it lost, 0.5 for a tie."""

    dimension: str
    prompt: str
    first: str
    second: str
    result: float
    scores: tuple[float, float] | None = None
    asked: bool = True  # False for two equal answers, which are a tie without a judge
    reply: str = ""  # the judge's words


def read_scores(reply: str, as_json: bool) -> tuple[float, float] | None:
    """A's and B's score in 1-10, None where the reply holds no verdict."""
    scores = _from_json(reply) if as_json else None
    if scores is None:
        lines = [line for line in reply.splitlines() if line.strip()]
        found = _LAST_LINE.fullmatch(lines[-1]) if lines else None
        scores = (float(found[1]), float(found[2])) if found else None
    if scores is None or not all(LOWEST <= score <= HIGHEST for score in scores):
        return None
    return scores


def result_of(scores: tuple[float, float], tie_threshold: float) -> float:
    """1, 0 or 0.5 for A: a tie when the scores differ by no more than `tie_threshold` (published: 0.5)."""
    difference = scores[0] - scores[1]
    if abs(difference) <= tie_threshold:
        return TIE
    return 1.0 if difference > 0 else 0.0


def outcome_of(result: float) -> str:
    return {1.0: "win", 0.0: "loss", TIE: "tie"}[result]


def _from_json(reply: str) -> tuple[float, float] | None:
    fenced = _CODE_FENCE.fullmatch(reply.strip())
    try:
        value = json.loads(fenced[1] if fenced else reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    scores = (value.get("score_a"), value.get("score_b"))
    found = [score for score in scores if isinstance(score, (int, float)) and not isinstance(score, bool)]
    if len(found) < 2 or not all(LOWEST <= score <= HIGHEST for score in found):
        return None  # compared as they are: JSON's whole numbers may be beyond a float
    return float(found[0]), float(found[1])
