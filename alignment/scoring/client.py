"""Asks a running scorer service for rewards and costs, and never makes up a number.

    client = ScorerClient("http://127.0.0.1:8000")
    client.wait_until_ready()
    scores = client.score(prompts, responses, finished)  # Scores: float64 arrays in order, NaN where a score is missing

Connection errors, timeouts and the answers 429, 502, 503, 504 are tried again with growing, jittered pauses until
`max_wait` seconds have gone by without an answer; then ScorerUnavailable is raised and the trainer saves its state. Any
other 4xx is a mistake in the request and is raised at once. Every answer is checked: number of scores, finite or null
with a reason, and the scorer's identity, which must stay what it was at first contact.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
import requests

from alignment.errors import UserError

RETRY_STATUS = {429, 502, 503, 504}
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0  # seconds
LONGEST_RETRY_AFTER = 30.0  # seconds
CONNECT_TIMEOUT = 10.0  # seconds
HEALTH_TIMEOUT = 10.0  # seconds: /health answers at once, also while the service scores
IDENTITY_HEADER = "X-Scorer-Identity"  # a hash of the service's identity, in every answer


class ScorerUnavailable(UserError):
    """The scorer gave no usable answer for `max_wait` seconds."""


@dataclass(frozen=True)
class Scores:
    """N scores in the order of the texts. A missing score is NaN, and `errors` says why."""

    rewards: np.ndarray  # (N,) float64
    costs: np.ndarray  # (N,) float64
    errors: list[str | None]
    truncated: list[bool]

    @classmethod
    def of(cls, rows) -> Scores:
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


class ScorerClient:
    """One scorer service. May be used from several threads; each has its own connection.

    `timeout` is for one answer, `max_wait` for how long a scorer may stay away, both in seconds. `on_wait(seconds)` is
    called before every pause with the time waited so far. `token` is the service's SCORER_AUTH (default: the environment).
    """

    def __init__(
        self,
        url: str,
        batch_size: int = 32,
        timeout: float = 300.0,
        max_wait: float = 900.0,
        on_wait: Callable[[float], None] | None = None,
        token: str | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"scorer URL {url!r}: expected something like http://127.0.0.1:8000")
        if batch_size < 1:
            raise UserError(f"scorer batch size is {batch_size}, expected 1 or more")
        self.url = url.rstrip("/")
        self.batch_size, self.timeout, self.max_wait, self.on_wait = batch_size, timeout, max_wait, on_wait
        token = os.environ.get("SCORER_AUTH") if token is None else token
        self._headers = {"Authorization": f"Bearer {token}"} if token and token != "none" else {}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._identity: dict | None = None
        self._identity_hash: str | None = None

    def wait_until_ready(self, max_wait: float | None = None) -> dict:
        """Waits until the service has loaded its models; returns its identity. Raises ScorerUnavailable."""
        health, headers = self._ask("GET", "/health", None, max_wait)
        identity = health.get("identity") if isinstance(health, dict) else None
        if not isinstance(identity, dict):
            raise UserError(f"{self.url}/health names no identity: is that a scorer of this project?")
        with self._lock:
            known = self._identity
            if known is not None and known != identity:
                raise UserError(f"scorer {self.url}: {difference(known, identity)}; the run began with the former")
            self._identity, self._identity_hash = identity, headers.get(IDENTITY_HEADER)
        return identity

    def identity(self) -> dict:
        """What decides a score, as the service said at first contact: models, weights, dtype, template, settings."""
        return self._identity if self._identity is not None else self.wait_until_ready()

    def score(self, prompts: list[str], responses: list[str], finished: list[bool] | None = None) -> Scores:
        """Scores of N responses, in order, asked for in chunks of `batch_size`.

        `finished` (N bools, default all true) says which responses end with EOS. Raises ScorerUnavailable, and
        UserError for a request that the service refuses, an answer that does not fit, or another identity.
        """
        finished = [True] * len(prompts) if finished is None else list(finished)
        if not len(prompts) == len(responses) == len(finished):
            raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses, {len(finished)} finished flags")
        self.identity()
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            body = {
                "prompts": list(prompts[chunk]),
                "responses": list(responses[chunk]),
                "finished": [bool(one) for one in finished[chunk]],
            }
            answer, headers = self._ask("POST", "/score_batch", body)
            if headers.get(IDENTITY_HEADER) != self._identity_hash:
                self.wait_until_ready()  # restarted or replaced: raises when the identity is another one
                if headers.get(IDENTITY_HEADER) != self._identity_hash:
                    raise UserError(f"scorer {self.url}: an answer came from another scorer than the one in /health")
            parts.append(self._checked(answer, len(body["prompts"])))
        return Scores.joined(parts)

    def _ask(self, method: str, path: str, body: dict | None, max_wait: float | None = None):
        """One request, tried again until it is answered: (decoded JSON, headers)."""
        max_wait = self.max_wait if max_wait is None else max_wait
        began, pause = time.monotonic(), FIRST_PAUSE
        timeout = HEALTH_TIMEOUT if path == "/health" else self.timeout
        while True:
            wanted_pause = 0.0
            # A port that accepts and never answers must not outlast max_wait either.
            left = max(1.0, max_wait - (time.monotonic() - began))
            try:
                reply = self._session().request(
                    method,
                    self.url + path,
                    json=body,
                    timeout=(min(CONNECT_TIMEOUT, left), min(timeout, left)),
                    headers=self._headers,
                )
                if reply.ok:
                    return reply.json(), reply.headers
                problem = f"{reply.status_code}: {detail(reply)}"
                if reply.status_code not in RETRY_STATUS:
                    raise UserError(f"scorer {self.url}{path} refused the request, {problem}")
                wanted_pause = retry_after(reply)
            except requests.JSONDecodeError:
                problem = "an answer that is not JSON"
            except requests.exceptions.InvalidJSONError as error:
                raise UserError(f"scorer {self.url}{path}: the request cannot be written as JSON: {error}") from error
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = f"{type(error).__name__}: {root_cause(error)}"
            waited = time.monotonic() - began
            if waited >= max_wait:
                raise ScorerUnavailable(f"scorer {self.url} gave no answer for {waited:.0f} s; last error: {problem}")
            if self.on_wait is not None:
                self.on_wait(waited)
            # Jitter keeps several ranks from coming back in step.
            time.sleep(min(max(wanted_pause, pause * random.uniform(0.5, 1.5)), max(0.0, max_wait - waited)))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _checked(self, answer, count: int) -> Scores:
        """The answer as Scores. Raises UserError when it has not exactly `count` usable rows."""
        if not isinstance(answer, dict):
            raise UserError(f"scorer {self.url}: expected a JSON object, got {type(answer).__name__}")
        columns = {}
        for key, default in (("rewards", None), ("costs", None), ("errors", [None]), ("truncated", [False])):
            column = answer.get(key, default * count if default else None)
            if not isinstance(column, list) or len(column) != count:
                got = f"{len(column)}" if isinstance(column, list) else "none"
                raise UserError(f"scorer {self.url}: asked for {count} {key}, got {got}")
            columns[key] = column
        for row in range(count):
            for key in ("rewards", "costs"):
                value = columns[key][row]
                if value is None:
                    if not columns["errors"][row]:
                        columns["errors"][row] = f"the scorer gave null for {key} and no reason"
                elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise UserError(f"scorer {self.url}: {key}[{row}] is {value!r}, expected a finite number or null")
        return Scores(
            np.array([math.nan if value is None else value for value in columns["rewards"]], dtype=np.float64),
            np.array([math.nan if value is None else value for value in columns["costs"]], dtype=np.float64),
            columns["errors"],
            [bool(one) for one in columns["truncated"]],
        )

    def _session(self) -> requests.Session:
        # requests does not promise that a Session may be shared between threads.
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False  # a proxy setting must not catch calls inside a cluster
        return self._local.session


def detail(reply: requests.Response) -> str:
    """The service's own words, on one line."""
    try:
        return str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return " ".join(reply.text.split())[:200]


def retry_after(reply: requests.Response) -> float:
    """Seconds that the service asks to wait, 0 when it does not say."""
    value = reply.headers.get("Retry-After", "")
    return min(float(value), LONGEST_RETRY_AFTER) if value.isdigit() else 0.0


def root_cause(error: BaseException) -> str:
    """The innermost reason of a connection error: "Connection refused", not the whole pool's description."""
    reason = error.args[0] if error.args else error
    reason = getattr(reason, "reason", reason)
    return " ".join(str(reason).split()).rsplit(">: ", 1)[-1][:200]


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
