"""Ratings from verdicts: Bradley-Terry by maximum likelihood (default), and the published sequential ELO.

Bradley-Terry: P(i beats j) = 1 / (1 + 10^((r_j - r_i) / 400)); a tie is half a win for each, which is the likelihood that ELO's
updates climb. The fit is scipy.optimize (Newton-CG, gradient and Hessian given; the problem is strictly convex).
Departures from plain maximum likelihood: a weak prior, every rating ~ Normal(common mean, PRIOR_SD = 5000 points), keeps the fit
finite and unique when a model wins or loses everything, or two groups of models never met. On the published judgments it
moves a rating by 0.03 points; a model that wins all of 100 comparisons ends about 1,600 points ahead.
Intervals: percentile bootstrap over prompts, because judgments on one prompt share its answers.
Ratings do not depend on the models' names nor on the order of the verdicts. Sequential ELO does, by about 60 points (one sd).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit

from alignment.errors import UserError
from alignment.evaluation.judging.verdict import Verdict

POINTS = 400.0 / np.log(10.0)  # rating points of one unit of log odds
PRIOR_SD = 5000.0  # points
BASELINE_RATING = 1000.0
PUBLISHED_BASELINE = "Alpaca-7B"
ELO_SHUFFLE_SEED = 123  # published


@dataclass(frozen=True)
class Ratings:
    """Ratings of one dimension with the baseline at 1000. Arrays are in the order of `models`.

    ratings (M,); low, high (M,) 95 % limits, NaN where fewer than two prompts were judged; wins (M, M) of row over column,
    ties half; rate_low, rate_high (M, M) limits of wins / games in percent; ahead (M, M) share of the bootstrap draws in
    which the row is rated above the column.
    """

    models: list[str]
    ratings: np.ndarray
    low: np.ndarray
    high: np.ndarray
    wins: np.ndarray
    rate_low: np.ndarray
    rate_high: np.ndarray
    ahead: np.ndarray
    prompts: int

    @property
    def games(self) -> np.ndarray:
        """(M, M) comparisons between row and column."""
        return self.wins + self.wins.T


def choose_baseline(models: Sequence[str], normalize_to: str | None) -> str:
    """The model at 1000. Raises UserError when the one asked for is not there; ask before anything is paid for."""
    if normalize_to is None:
        return PUBLISHED_BASELINE if PUBLISHED_BASELINE in models else models[0]
    if normalize_to not in models:
        raise UserError(f"--normalize_to {normalize_to}: not among the models, which are {', '.join(models)}")
    return normalize_to


def rate(
    verdicts: Sequence[Verdict],
    models: Sequence[str],
    baseline: str,
    method: str,
    draws: int,
    seed: int,
    k: float = 32.0,
) -> Ratings:
    """Ratings of `models` from the verdicts of one dimension. `method` is "bradley-terry" or "elo"; `draws` of the bootstrap.

    Raises UserError when there is no verdict or the baseline is not among the models.
    """
    models = list(models)
    choose_baseline(models, baseline)
    if not verdicts:
        raise UserError("there is no verdict to rate; see the outcomes above")
    prompts = sorted({verdict.prompt for verdict in verdicts})
    wins = wins_by_prompt(verdicts, models, prompts)  # (P, M, M)
    index = models.index(baseline)

    def anchored(strengths: np.ndarray) -> np.ndarray:
        return strengths - strengths[index] + BASELINE_RATING

    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=draws)  # (draws, P)
    drawn_wins = np.tensordot(drawn.astype(np.float64), wins, axes=1)  # (draws, M, M)
    if method == "elo":
        # offset + rating, not (rating - baseline) + 1000: the published order of operations, to the last bit
        strengths = sequential_elo(verdicts, models, k)
        ratings = strengths + (BASELINE_RATING - strengths[index])
        by_prompt: dict[str, list[Verdict]] = {prompt: [] for prompt in prompts}
        for verdict in verdicts:
            by_prompt[verdict.prompt].append(verdict)
        resampled = (
            [one for prompt, times in zip(prompts, counts, strict=True) for one in by_prompt[prompt] * times]
            for counts in drawn.tolist()
        )
        samples = np.array([anchored(sequential_elo(sample, models, k)) for sample in resampled])  # (draws, M)
    else:
        # beyond 1e-6 points the digits depend on the order of summation
        ratings = np.round(anchored(bradley_terry(wins.sum(axis=0))), 6)
        samples = np.round([anchored(bradley_terry(sample)) for sample in drawn_wins], 6)  # (draws, M)

    with np.errstate(invalid="ignore"):  # pairs that never met, in a draw or at all
        rates = 100.0 * drawn_wins / (drawn_wins + drawn_wins.transpose(0, 2, 1))  # (draws, M, M)
    rate_low, rate_high = _limits(rates.reshape(draws, -1), len(prompts)).reshape(2, len(models), len(models))
    low, high = _limits(samples, len(prompts))
    ahead = (samples[:, :, None] > samples[:, None, :]).mean(axis=0)
    return Ratings(models, ratings, low, high, wins.sum(axis=0), rate_low, rate_high, ahead, len(prompts))


def wins_by_prompt(verdicts: Sequence[Verdict], models: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """(P, M, M) float64: wins of row over column on each prompt, ties half."""
    row, place = {prompt: i for i, prompt in enumerate(prompts)}, {model: i for i, model in enumerate(models)}
    wins = np.zeros((len(prompts), len(models), len(models)))
    for verdict in verdicts:
        first, second = place[verdict.first], place[verdict.second]
        wins[row[verdict.prompt], first, second] += verdict.result
        wins[row[verdict.prompt], second, first] += 1.0 - verdict.result
    return wins


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """(M, M) wins of row over column -> (M,) ratings in points with mean 0: the mode under the prior above."""
    games, won = wins + wins.T, wins.sum(axis=1)
    precision = (POINTS / PRIOR_SD) ** 2

    def loss(strengths: np.ndarray) -> float:
        differences = strengths[:, None] - strengths[None, :]  # (M, M)
        return -(wins * log_expit(differences)).sum() + 0.5 * precision * (strengths @ strengths)

    def gradient(strengths: np.ndarray) -> np.ndarray:
        expected = (games * expit(strengths[:, None] - strengths[None, :])).sum(axis=1)
        return expected - won + precision * strengths

    def hessian(strengths: np.ndarray) -> np.ndarray:
        chance = expit(strengths[:, None] - strengths[None, :])
        information = games * chance * (1.0 - chance)
        return np.diag(information.sum(axis=1) + precision) - information

    start = np.zeros(len(wins))
    fit = minimize(loss, start, jac=gradient, hess=hessian, method="Newton-CG", options={"xtol": 1e-12, "maxiter": 500})
    # one exact Newton step: the search stops within 1e-6 points, and which side of it depends on the order of the models
    strengths = fit.x - np.linalg.solve(hessian(fit.x), gradient(fit.x))
    strengths -= strengths.mean()
    slope = np.abs(gradient(strengths)).max()
    if not slope < 1e-6 * max(1.0, games.max()):
        raise RuntimeError(f"the Bradley-Terry fit did not converge ({fit.message}, gradient {slope:.2g})")
    return strengths * POINTS


def sequential_elo(verdicts: Sequence[Verdict], models: Sequence[str], k: float = 32.0) -> np.ndarray:
    """(M,) ratings as the published script computes them, before the baseline is set to 1000."""
    ratings = dict.fromkeys(models, BASELINE_RATING)
    shuffled = list(verdicts)
    random.Random(ELO_SHUFFLE_SEED).shuffle(shuffled)
    for verdict in shuffled:
        first, second = ratings[verdict.first], ratings[verdict.second]
        expected = 1.0 / (1.0 + 10 ** ((second - first) / 400.0))
        ratings[verdict.first] = first + k * (verdict.result - expected)
        ratings[verdict.second] = second + k * ((1.0 - verdict.result) - (1.0 - expected))
    return np.array([ratings[model] for model in models])


def rating_warnings(rated: Ratings) -> list[str]:
    """What a reader must know before believing a rating: models that never met, that won or lost everything, few prompts."""
    warnings = []
    groups, membership = connected_components(rated.games > 0, directed=False)
    if groups > 1:
        parts = [[m for m, own in zip(rated.models, membership, strict=True) if own == part] for part in range(groups)]
        listed = "; ".join(", ".join(part) for part in parts)
        warnings.append(f"no comparison links these groups, so their ratings do not compare: {listed}")
    won, played = rated.wins.sum(axis=1), rated.games.sum(axis=1)
    for model, wins, games in zip(rated.models, won, played, strict=True):
        if games and wins in (0, games):
            what = f"{model} {'lost' if wins == 0 else 'won'} all of {games:.0f} comparisons"
            warnings.append(f"{what}: only the prior bounds its rating, and the interval says nothing")
    if rated.prompts < 30:
        warnings.append(f"{rated.prompts} prompts are too few for a bootstrap interval to be trusted")
    return warnings


def _limits(samples: np.ndarray, prompts: int) -> np.ndarray:
    """(draws, M) -> (2, M): 2.5 and 97.5 percentiles without NaN draws; NaN for a single prompt or a column without values."""
    limits = np.full((2, samples.shape[1]), np.nan)
    usable = ~np.isnan(samples).all(axis=0)
    if prompts > 1 and usable.any():
        limits[:, usable] = np.nanpercentile(samples[:, usable], [2.5, 97.5], axis=0)
    return limits
