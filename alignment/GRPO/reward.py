"""From the scores of one step's completions to their advantages: the constraint's lambda, and what is trained on at all.

For N completions of all processes, in groups of G answers to one prompt:

    lambda <- its update from the N costs                             (first, so the step's rewards use the new lambda)
    combined (published):  r = R - lambda C,   A = (r - mean) / (std + 1e-4)  within the group, std with Bessel's correction
    separate:              A = (A_R - lambda A_C) / (1 + lambda)    with A_R and A_C normalised like that, each by itself
                                                                    (as Safe RLHF's PPO combines them)

TRL would normalise in float32, where thirty equal rewards can come out as 0.009 each, and would train the KL term on groups
that teach nothing. Here all is float64, a group of equal values gives exactly 0, and `taught` says which completions may
touch the weights: not those without a score, and none of a group whose advantages are all 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignment.errors import UserError
from alignment.lagrangian import LagrangeMultiplier
from alignment.objective import MAX_MISSING_SHARE, combine

_STD_GUARD = 1e-4  # TRL's


@dataclass(frozen=True)
class Verdict:
    """What a step learns from: advantages (N,) float64, taught (N,) bool, and the row for metrics.jsonl."""

    advantages: np.ndarray
    taught: np.ndarray
    metrics: dict


class ConstrainedReward:
    """Owns lambda. `judge` is called once a step, with the scores of all processes, and never in evaluation."""

    def __init__(self, multiplier: LagrangeMultiplier, group_size: int, aggregation: str = "combined"):
        self.multiplier, self.group_size, self.aggregation = multiplier, group_size, aggregation

    def judge(self, rewards: np.ndarray, costs: np.ndarray) -> Verdict:
        """(N,) rewards and costs, NaN where a score is missing, group after group; moves lambda.

        Raises UserError, with lambda unmoved, when more than 5 % of the scores are missing.
        """
        rewards, costs = np.asarray(rewards, np.float64), np.asarray(costs, np.float64)
        usable = np.isfinite(rewards) & np.isfinite(costs)
        missing = int((~usable).sum())
        if missing > MAX_MISSING_SHARE * len(usable):
            raise UserError(
                f"{missing} of {len(usable)} completions of this step have no score, more than {MAX_MISSING_SHARE:.0%}: the "
                "run stops before it learns from the rest. Mend the scorer, then start the same command again"
            )
        constraint = self.multiplier.update(costs[usable])
        lam = self.multiplier.value
        advantages = group_advantages(rewards, costs, lam, self.group_size, self.aggregation)
        groups = advantages.reshape(-1, self.group_size)  # (P, G)
        live = (groups != 0).any(axis=1)  # (P,)
        scorable = usable.reshape(-1, self.group_size).sum(axis=1) > 1  # (P,)
        taught = usable & np.repeat(live, self.group_size)
        metrics = {
            "reward_mean": float(rewards[usable].mean()),
            "cost_mean": float(costs[usable].mean()),
            "objective": float(combine(rewards, costs, lam)[usable].mean()),
            "safe_ratio": 100.0 * float((costs[usable] <= 0).mean()),
            "lambda_used": lam,
            **constraint,
            "scores_missing": missing,
            "groups_unscorable": int((~scorable).sum()),
            "groups_equal": int((scorable & ~live).sum()),
            "completions_left_out": int((~taught).sum()),
        }
        return Verdict(advantages, taught, metrics)


def group_advantages(
    rewards: np.ndarray, costs: np.ndarray, lam: float, group_size: int, aggregation: str
) -> np.ndarray:
    """(N,) float64 advantages; 0 where a score is missing, and in a group with fewer than two scored completions."""
    usable = np.isfinite(rewards) & np.isfinite(costs)
    rewards, costs = np.where(usable, rewards, np.nan), np.where(usable, costs, np.nan)
    if aggregation == "combined":
        return _normalised(combine(rewards, costs, lam), group_size)
    return (_normalised(rewards, group_size) - lam * _normalised(costs, group_size)) / (1.0 + lam)


def _normalised(values: np.ndarray, group_size: int) -> np.ndarray:
    """(N,) values, NaN where missing -> (N,): less the group's mean, over its standard deviation; missing ones are 0."""
    result = np.zeros(len(values))
    for start in range(0, len(values), group_size):
        rows = start + np.flatnonzero(np.isfinite(values[start : start + group_size]))
        group = values[rows]
        if len(rows) > 1 and group.max() > group.min():
            result[rows] = (group - group.mean()) / (group.std(ddof=1) + _STD_GUARD)
    return result
