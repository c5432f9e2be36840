"""What every scorer gives, over HTTP (client.py) or in this process (local_scorer.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

# What an identity says of measurements: they differ a little from card to card and decide nothing.
MEASURED = ("fp8_error",)
# What identities lack, at any depth, that were written before these decided: the hashes of a model's tokenizer and config.json,
# and SCORE_BACKEND. A run that began with such an identity is asked for the rest.
ADDED = ("tokenizer", "config", "backend")


def deciding(identity: dict) -> dict:
    """What decides a score, of an identity: all but MEASURED. Two scorers are the same when these are equal."""
    return {key: value for key, value in identity.items() if key not in MEASURED}


def asked_of(known: dict, now: dict) -> dict:
    """What decides a score, of an identity `now` that must be equal to `known`: without what is ADDED and not in `known`.

    Also for the settings of a run with the identity in them.
    """
    return _asked_of(known, deciding(now))


def _asked_of(known: Any, now: Any) -> Any:
    if not isinstance(known, dict) or not isinstance(now, dict):
        return now
    return {key: _asked_of(known.get(key), value) for key, value in now.items() if key in known or key not in ADDED}


def same_scorer(one: dict, other: dict) -> bool:
    """Whether two identities, each of which may be an old one without what is ADDED, name the same scorer."""
    return asked_of(one, other) == asked_of(other, one)


def difference(known: dict, now: dict, path: str = "") -> str:
    """What changed between two identities: "cost_model.weights was a, is b"."""
    changes = []
    for key in sorted(known.keys() | now.keys()):
        old, new = known.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            if old != new:
                changes.append(difference(old, new, f"{path}{key}."))
        elif old != new:
            changes.append(f"{path}{key} was {old!r}, is {new!r}")
    return ", ".join(changes)


@dataclass(frozen=True)
class Scores:
    """N scores in the order of the texts. A missing score is NaN, and `errors` says why."""

    rewards: np.ndarray  # (N,) float64
    costs: np.ndarray  # (N,) float64
    errors: list[str | None]
    truncated: list[bool]

    @classmethod
    def of(cls, rows: Sequence[Any]) -> Scores:
        """From N objects with reward, cost (None where missing), error and truncated."""
        return cls(
            np.array([math.nan if row.reward is None else row.reward for row in rows], dtype=np.float64),
            np.array([math.nan if row.cost is None else row.cost for row in rows], dtype=np.float64),
            [row.error for row in rows],
            [row.truncated for row in rows],
        )

    @classmethod
    def joined(cls, parts: list[Scores]) -> Scores:
        """The parts one after the other."""
        return cls(
            np.concatenate([part.rewards for part in parts] or [np.empty(0)]),
            np.concatenate([part.costs for part in parts] or [np.empty(0)]),
            [error for part in parts for error in part.errors],
            [truncated for part in parts for truncated in part.truncated],
        )


class Scorer(Protocol):
    """ScorerClient and LocalScorer."""

    def identity(self) -> dict:
        """What decides a score: models, weights, tokenizers, configs, dtype, template, settings; and MEASURED."""

    def score(self, prompts: list[str], responses: list[str], finished: list[bool] | None = None) -> Scores:
        """Scores of N responses, in order. `finished` says which end with EOS; all do by default."""


class WaitingScorer(Scorer, Protocol):
    """What trainers ask: `on_wait(seconds)` is called while the scorer is away, and what it raises ends the wait."""

    on_wait: Callable[[float], None] | None
