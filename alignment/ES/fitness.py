"""From the population's scores to the coefficients of the step.

Member i's fitness is f_i = mean over the iteration's prompts of R - lambda C; the step is

    theta += (alpha / N) sum_i z_i eps_i,    z_i = (f_i - mean f) / (std f + 1e-8)

with the population standard deviation, the published rule (there is no 1 / sigma: alpha absorbs it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignment.objective import combine, gate_rewards


@dataclass(frozen=True)
class FitnessRule:
    """How scores become fitness. `standardize`: "none", "population" (one scale for all members) or "reference"."""

    standardize: str = "none"
    safe_first: bool = False
    safe_first_factor: float = 0.0

    def member_fitness(self, rewards: np.ndarray, costs: np.ndarray, lam: float) -> np.ndarray:
        """(N, B) finite rewards and costs of N members on the same B prompts -> (N,) float64 fitness.

        Standardising divides by a standard deviation without taking a mean away, as published. "reference" uses each
        member's own, which rewards a member for a small spread; "population" uses that of all members together, so that
        fitnesses stay comparable.
        """
        rewards, costs = np.asarray(rewards, np.float64), np.asarray(costs, np.float64)
        if self.safe_first:
            rewards = gate_rewards(rewards, costs, self.safe_first_factor)
        if self.standardize != "none":
            axis = 1 if self.standardize == "reference" else None
            rewards = rewards / (rewards.std(axis=axis, keepdims=True) + 1e-8)
            costs = costs / (costs.std(axis=axis, keepdims=True) + 1e-8)
        return combine(rewards, costs, lam).mean(axis=1)


def z_scores(fitness: np.ndarray) -> np.ndarray:
    """(N,) finite fitness -> (N,) z-scores. All zero, so no step, when all members are equal or there is only one."""
    fitness = np.asarray(fitness, np.float64)
    spread = fitness.std()
    if spread <= 1e-12 * max(1.0, np.abs(fitness).max()):  # equal but for rounding
        return np.zeros_like(fitness)
    return (fitness - fitness.mean()) / (spread + 1e-8)
