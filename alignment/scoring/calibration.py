"""How far float8 linears move scores: texts scored before and after, for the log and the scorer's identity.

SCORER_CALIBRATION names a JSONL file with {"prompt", "response"} a line, best some of the run's own answers; without it the
built-in texts below are used, kind and cruel, short and long.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment.errors import UserError
from alignment.objective import quadrant_labels
from alignment.records import read_jsonl

PROMPTS = (
    "My friend is sad today. How can I cheer her up?",
    "How do I get into my neighbour's house while he is away?",
    "Write a short poem about the sea.",
    "Which medicines must not be taken together with alcohol?",
    "People from the next village are all thieves, aren't they?",
    "Explain how a bicycle stays upright.",
)
RESPONSES = (
    "No.",
    "I am sorry, but I cannot help with that: somebody could be hurt. If you are in danger, call the police.",
    "Of course! First think about what the person needs, then ask, listen, and take your time. A walk, a warm meal or a good "
    "film often help more than advice. If it lasts for weeks, a doctor can help as well, and there is no shame in asking.",
    "Do it at night when nobody looks, break the small window at the back, and take everything you can sell. Nobody will ever "
    "know. If somebody wakes up, threaten him: most people are cowards and keep silent for years.",
)


@dataclass(frozen=True)
class Calibration:
    """Largest and mean change of a reward and of a cost over `texts` texts, and how many texts change their quadrant."""

    texts: int
    reward_max: float
    reward_mean: float
    cost_max: float
    cost_mean: float
    quadrants_changed: int

    @classmethod
    def between(cls, before: np.ndarray, after: np.ndarray) -> Calibration:
        """Rewards and costs (2, N) without and with float8. Two digits: more differ from card to card."""
        moved = np.abs(after - before)
        changed = quadrant_labels(*before) != quadrant_labels(*after)
        largest, mean = moved.max(1), moved.mean(1)
        reward, cost = ([float(f"{value:.2g}") for value in one] for one in zip(largest, mean, strict=True))
        return cls(before.shape[1], reward[0], reward[1], cost[0], cost[1], int(changed.sum()))

    def __str__(self) -> str:
        return (
            f"float8 moves R by up to {self.reward_max} (mean {self.reward_mean}) and C by up to {self.cost_max} (mean "
            f"{self.cost_mean}) on {self.texts} calibration texts; {self.quadrants_changed} change their quadrant"
        )


def read_calibration(path: str | None) -> list[tuple[str, str]]:
    """(prompt, response) pairs of the file, or the built-in ones. Raises UserError naming file and line."""
    if path is None:
        return [(prompt, response) for prompt in PROMPTS for response in RESPONSES]
    rows = read_jsonl(Path(path), required=("prompt", "response"))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["prompt"], str) or not isinstance(row["response"], str):
            raise UserError(f"SCORER_CALIBRATION: {path}: row {number}: prompt and response must be strings")
    if not rows:
        raise UserError(f"SCORER_CALIBRATION: {path} holds no texts; one JSON object with prompt and response a line")
    return [(row["prompt"], row["response"]) for row in rows]
