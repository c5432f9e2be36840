"""The step of one iteration from the scores of its members: theta <- theta + (alpha / N) sum_i u(f)_i eps(seed_i)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.errors import UserError
from alignment.ES.fitness import FitnessRule, shape, usable_scores
from alignment.ES.noise import member_seed
from alignment.ES.settings import ESSettings
from alignment.objective import MAX_MISSING_SHARE

# One missing score takes its prompt from all members: with many members far fewer than MAX_MISSING_SHARE can leave next to
# nothing of the prompts to compare them on.
MIN_PROMPTS_SHARE = 0.5
UNPERTURBED = -1  # the member number of theta itself, which lambda and the training curve are taken from


@dataclass
class Step:
    """theta moves by the sum of coefficients[i] eps(seeds[i]); lambda by `costs`, those of theta itself."""

    seeds: list[int]
    coefficients: list[float]
    fitness: list[float | None]  # by member, None: its scores are missing
    costs: np.ndarray  # (prompts whose scores are all there,) float64
    metrics: dict[str, Any]


def direction(settings: ESSettings, t: int, member: int) -> tuple[int, float]:
    """The seed of a member's noise in iteration t and its signed scale."""
    if settings.antithetic:
        sign = 1 if member % 2 == 0 else -1
        return member_seed(settings.global_seed, t, member // 2), sign * settings.sigma
    return member_seed(settings.global_seed, t, member), settings.sigma


def population_step(settings: ESSettings, rule: FitnessRule, t: int, done: dict[int, dict], lam: float) -> Step:
    """The step at the multiplier `lam` from `done`: the members file's rows of iteration t by member, theta's included.

    Raises UserError when too many scores are missing.
    """
    order = (UNPERTURBED, *range(settings.population_size))
    rewards = np.array([done[member]["rewards"] for member in order], dtype=np.float64)  # (1 + N, B), None -> NaN
    costs = np.array([done[member]["costs"] for member in order], dtype=np.float64)
    members, usable = usable_scores(rewards, costs)
    missing = ~(np.isfinite(rewards) & np.isfinite(costs))
    if missing.mean() > MAX_MISSING_SHARE or usable.mean() < MIN_PROMPTS_SHARE or not members[0]:
        reasons = sorted({reason for member in order for reason in done[member]["errors"]})
        raise UserError(
            f"iteration {t}: {missing.sum()} of {missing.size} scores are missing "
            f"({'; '.join(reasons) or 'no reason given'}), which leaves {usable.sum()} of {usable.size} prompts: too little to "
            "learn from. Mend the scorer, then start the same command again"
        )
    kept = np.flatnonzero(members[1:]).tolist()  # member numbers
    fitness = rule.member_fitness(rewards[1:][kept][:, usable], costs[1:][kept][:, usable], lam)
    if settings.shuffle_fitness:
        used = np.random.default_rng([settings.global_seed, t, 1]).permutation(fitness)
    else:
        used = fitness
    weights: dict[int, float] = {}  # seed -> coefficient; a pair's two members share a seed
    for member, u in zip(kept, shape(used, settings.fitness_shaping).tolist(), strict=True):
        seed, scale = direction(settings, t, member)
        weights[seed] = weights.get(seed, 0.0) + (u if scale >= 0 else -u) * settings.alpha / len(kept)
    own_rewards, own_costs = rewards[0, usable], costs[0, usable]
    total = {name: sum(done[member][name] for member in order) for name in ("tokens", "unfinished", "cut", "truncated")}
    metrics = {
        "kind": "train",
        "iteration": t,
        "reward_mean": float(own_rewards.mean()),
        "cost_mean": float(own_costs.mean()),
        "objective": float((own_rewards - lam * own_costs).mean()),
        "safe_ratio": 100.0 * float((own_costs <= 0).mean()),
        "fitness_mean": float(fitness.mean()),
        "fitness_std": float(fitness.std()),
        "fitness_max": float(fitness.max()),
        "lambda_used": lam,
        "prompts_left_out": int((~usable).sum()),
        "members_lost": settings.population_size - len(kept),
        "scored": missing.size,
        "scores_missing": int(missing.sum()),
        "unfinished_share": total["unfinished"] / missing.size,
        "cut_share": total["cut"] / missing.size,
        "truncated_share": total["truncated"] / missing.size,
        "distinct_share": done[UNPERTURBED]["distinct"] / missing.shape[1],
        "tokens": total["tokens"],
    }
    of_member = dict(zip(kept, fitness.tolist(), strict=True))
    return Step(
        seeds=list(weights),
        coefficients=list(weights.values()),
        fitness=[of_member.get(member) for member in range(settings.population_size)],
        costs=own_costs,
        metrics=metrics,
    )
