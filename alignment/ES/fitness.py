"""From the population's scores to the coefficients of the step.

Member i's fitness is f_i = mean over the iteration's prompts of R - lambda C, and the step is

    theta += (alpha / N) sum_i u_i eps_i

(there is no 1 / sigma: alpha absorbs it, as published). The shaping u of the fitnesses is one of

    z_score         u_i = (f_i - mean f) / (std f + 1e-8), population standard deviation      the published rule
    centered_rank   u_i = sqrt(12 (N - 1) / (N + 1)) (rank_i / (N - 1) - 1 / 2), rank 0 the worst, equal fitness the mean
                    rank: Salimans et al. 2017 (arXiv 1703.03864), scaled to the z-scores' variance, so that alpha keeps its
                    meaning

With antithetic pairs members 2j and 2j + 1 are theta +- sigma eps_j, and u is computed over all N of them.
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


def shape(fitness: np.ndarray, shaping: str) -> np.ndarray:
    """(N,) finite fitness -> (N,) float64 u. All zero, so no step, when all members are equal or there is only one."""
    fitness = np.asarray(fitness, np.float64)
    spread = fitness.std()
    if spread <= 1e-12 * max(1.0, np.abs(fitness).max()):  # equal but for rounding
        return np.zeros_like(fitness)
    return z_scores(fitness) if shaping == "z_score" else centered_ranks(fitness)


def z_scores(fitness: np.ndarray) -> np.ndarray:
    return (fitness - fitness.mean()) / (fitness.std() + 1e-8)


def centered_ranks(fitness: np.ndarray) -> np.ndarray:
    count = len(fitness)
    ranks = (fitness[:, None] > fitness).sum(1) + 0.5 * (
        (fitness[:, None] == fitness).sum(1) - 1
    )  # ties: the mean rank
    return np.sqrt(12 * (count - 1) / (count + 1)) * (ranks / (count - 1) - 0.5)


def usable_scores(rewards: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which members and which prompts enter a step: (N,) and (B,) bools, from (N, B) scores with NaN where one is missing.

    A member without any score is lost. A prompt that has no score for one of the others is left out for all, so that
    every fitness is a mean over the same prompts.
    """
    present = np.isfinite(rewards) & np.isfinite(costs)
    members = present.any(axis=1)
    return members, present[members].all(axis=0)
