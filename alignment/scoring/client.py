"""Asks running scorer services for rewards and costs, and never makes up a number.

    client = ScorerClient("http://127.0.0.1:8000")  # or several addresses, or "auto": see alignment/scoring/discovery.py
    client.wait_until_ready()
    scores = client.score(prompts, responses, finished)  # Scores: float64 arrays in order, NaN where a score is missing

A call is cut into chunks, several of which are under way at a time; with several addresses each chunk goes to the one that
has the least to do, and one of them may go away. Connection errors, timeouts and the answers 429, 502, 503, 504 are tried
again with growing, jittered pauses until `max_wait` seconds have gone by without an answer; then ScorerUnavailable is raised
and the trainer saves its state. A 500, a round that failed, is tried again a few times. Any other 4xx is a mistake in the
request and is raised at once. Every answer is checked: number of scores, finite or null with a reason, and the scorer's
identity, which must stay what it was at first contact, at every address and after every restart. With "auto", a scorer that
comes back elsewhere (a requeued job) is found again.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from alignment.errors import PassingError, UserError
from alignment.progress import watched
from alignment.scoring.connection import IDENTITY_HEADER, Endpoint, Retry
from alignment.scoring.discovery import Address, ScorerNotFound, find_from_environment, read_secret
from alignment.scoring.scores import Scores, asked_of, deciding, difference

HEALTH_TIMEOUT = 10.0  # seconds: /health answers at once, also while the service scores
SAY_AFTER, SAY_EVERY = 5.0, 60.0  # seconds until the first and between lines about waiting, where nobody else shows it
# Chunks that a scorer fails on are asked again so often, after pauses that begin so long (seconds) and double: a minute in all.
RETRIES_OF_FAILED, PAUSE_AFTER_FAILED = 6, 1.0
LOOK_EVERY = 2.0  # seconds, with "auto" while no scorer is found
AUTO = "auto"

Answer = TypeVar("Answer")


class ScorerUnavailable(PassingError):
    """No scorer gave a usable answer for `max_wait` seconds, or not all of them before the deadline."""


class _Abandoned(Exception):
    """Another chunk of the same call failed: this one need not go on."""


class ScorerClient:
    """One scorer service, several with the same models, or the one that is found. May be used from several threads.

    `url` is an address, several (a list, or separated by commas), or "auto". `timeout` is for one answer, `max_wait` for how
    long all scorers may stay away, `deadline` for a whole call (None: no limit), all in seconds. `concurrency` is the number
    of chunks that a call has under way at each address. `on_wait(seconds)` is called in the calling thread during pauses with
    the time waited so far, and may raise to end the call; without it, and where stderr is no terminal, a line a minute goes
    there. The token is `token`, or SCORER_AUTH, or the content of SCORER_TOKEN_FILE; with "auto", the scorer's own token file.
    `expected_identity` is the one that a resumed run began with.
    """

    def __init__(
        self,
        url: str | list[str],
        batch_size: int = 32,
        timeout: float = 300.0,
        max_wait: float = 900.0,
        on_wait: Callable[[float], None] | None = None,
        token: str | None = None,
        concurrency: int = 4,
        deadline: float | None = None,
        expected_identity: dict | None = None,
    ) -> None:
        for name, value in (("batch size", batch_size), ("concurrency", concurrency)):
            if value < 1:
                raise UserError(f"scorer {name} is {value}, expected 1 or more")
        urls = [one.strip() for one in url.split(",")] if isinstance(url, str) else list(url)
        self.url = ", ".join(urls)
        self.batch_size, self.timeout, self.max_wait, self.on_wait = batch_size, timeout, max_wait, on_wait
        self.concurrency, self.deadline = concurrency, deadline
        self._token = token
        self._address: Address | None = None  # with "auto", what was found last
        self._auto = urls == [AUTO]
        self._endpoints = [] if self._auto else [Endpoint(one, self._configured_token) for one in dict.fromkeys(urls)]
        if not self._auto and not urls:
            raise UserError("no scorer URL: expected something like http://127.0.0.1:8000, or auto")
        self._lock = threading.Lock()  # of what follows, and of the endpoints' state
        self._finding = threading.Lock()
        self._identity = expected_identity
        # Times on the monotonic clock: when any scorer last answered, when to look for one again, when waiting was told.
        self._answered, self._looks_again, self._said = 0.0, 0.0, -SAY_EVERY
        self._problem = ""

    def wait_until_ready(self, max_wait: float | None = None) -> dict:
        """Waits until a service has loaded its models; returns its identity. Raises ScorerUnavailable, UserError.

        Of several addresses one is enough, but every one that answers must have the same identity.
        """
        for endpoint in self._endpoints:
            endpoint.verified = False

        def attempt(endpoint: Endpoint, left: float) -> None:
            self._verify(endpoint, left)
            # /health wants no token: a wrong one is told here, and not after hours of generation.
            endpoint.ask("GET", "/info", None, min(HEALTH_TIMEOUT, left))

        self._persist(attempt, 0, _Call(self._tell), self.max_wait if max_wait is None else max_wait)
        for endpoint in self._endpoints:
            if not endpoint.verified:
                with contextlib.suppress(Retry):  # away or loading: it can join later
                    self._verify(endpoint, HEALTH_TIMEOUT)
        assert self._identity is not None  # _verify has set it
        return self._identity

    def identity(self) -> dict:
        """What decides a score, as the service said at first contact: scores.py."""
        return self._identity if self._identity is not None else self.wait_until_ready()

    def score(self, prompts: list[str], responses: list[str], finished: list[bool] | None = None) -> Scores:
        """Scores of N responses, in order, asked for in chunks of `batch_size`.

        `finished` (N bools, default all true) says which responses end with EOS. Raises ScorerUnavailable, and
        UserError for a request that the service refuses, an answer that does not fit, or another identity.
        """
        return self._score("/score_batch", {"prompts": list(prompts), "responses": list(responses)}, finished)

    def score_texts(self, texts: list[str], finished: list[bool] | None = None) -> Scores:
        """Scores of N whole conversations, as `score`."""
        return self._score("/score_texts", {"texts": list(texts)}, finished)

    def _score(self, path: str, columns: dict[str, list], finished: list[bool] | None) -> Scores:
        count = len(next(iter(columns.values())))
        columns = columns | {"finished": [True] * count if finished is None else [bool(one) for one in finished]}
        if any(len(column) != count for column in columns.values()):
            raise ValueError(", ".join(f"{len(column)} {name}" for name, column in columns.items()) + ": unequal")
        self.identity()
        bodies = [
            {name: column[start : start + self.batch_size] for name, column in columns.items()}
            for start in range(0, count, self.batch_size)
        ]
        call = _Call(self._tell, self.deadline)
        if len(bodies) <= 1:
            return Scores.joined([self._score_chunk(path, body, call) for body in bodies])
        return Scores.joined(self._score_together(path, bodies, call))

    def _score_together(self, path: str, bodies: list[dict], call: _Call) -> list[Scores]:
        """Scores of several chunks, in order. The calling thread waits for them, and tells about pauses."""
        parts: dict[int, Scores] = {}
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(bodies)):
            todo.put(index)

        def work() -> None:
            with contextlib.suppress(queue.Empty, _Abandoned):
                while not call.ended.is_set():
                    index = todo.get_nowait()
                    try:
                        call.news.put((index, self._score_chunk(path, bodies[index], call)))
                    except _Abandoned:
                        raise
                    except BaseException as error:  # the calling thread raises it
                        call.news.put((index, error))
                        return

        call.shared = True
        # Daemon threads: an abandoned request may hang for its whole timeout, and must not keep a program from ending.
        for _ in range(min(len(bodies), self.concurrency * max(1, len(self._endpoints)))):
            threading.Thread(target=work, daemon=True, name="scorer-client").start()
        try:
            while len(parts) < len(bodies):
                index, news = call.news.get()
                if isinstance(news, BaseException):
                    raise news
                if index is None:
                    call.tell(news)
                else:
                    parts[index] = news
        finally:
            call.ended.set()
        return [parts[index] for index in range(len(bodies))]

    def _score_chunk(self, path: str, body: dict, call: _Call) -> Scores:
        count = len(body["finished"])

        def attempt(endpoint: Endpoint, left: float) -> Scores:
            if not endpoint.verified:
                self._verify(endpoint, left)
            answer, headers = endpoint.ask("POST", path, body, min(self.timeout, left))
            given = headers.get(IDENTITY_HEADER)
            if given != endpoint.identity_hash:
                self._verify(endpoint, left)  # restarted or replaced: raises when the identity is another one
                if given != endpoint.identity_hash:
                    raise UserError(
                        f"scorer {endpoint.url}: an answer came from another scorer than the one in /health"
                    )
            return checked(endpoint.url, answer, count)

        return self._persist(attempt, count, call, self.max_wait)

    def _verify(self, endpoint: Endpoint, left: float) -> None:
        """Asks for the identity, which must be the known one if there is one. Raises Retry, UserError."""
        health, headers = endpoint.ask("GET", "/health", None, min(HEALTH_TIMEOUT, left))
        identity = health.get("identity") if isinstance(health, dict) else None
        if not isinstance(identity, dict):
            raise UserError(f"{endpoint.url}/health names no identity: is that a scorer of this project?")
        with self._lock:
            known = deciding(self._identity or identity)
            if known != (now := asked_of(known, identity)):
                raise UserError(
                    f"scorer {endpoint.url}: {difference(known, now)}; the run began with the former: start that one again,"
                    " or begin another run"
                )
            self._identity = identity
            endpoint.identity_hash, endpoint.verified = headers.get(IDENTITY_HEADER), True

    def _persist(self, attempt: Callable[[Endpoint, float], Answer], work: int, call: _Call, max_wait: float) -> Answer:
        """Tries until an answer comes, `max_wait` goes by without any, or the call ends."""
        began, problem, failures = time.monotonic(), "none", 0
        while True:
            if call.left() <= 0:
                raise ScorerUnavailable(f"scorer {self.url}: not done after {self.deadline:g} s; last error: {problem}")
            # A port that accepts and never answers must not outlast max_wait either.
            left = max(1.0, min(max_wait - (time.monotonic() - began), call.left()))
            try:
                with self._borrowed(work) as endpoint:
                    return attempt(endpoint, left)
            except Retry as error:
                problem = str(error)
                with self._lock:
                    rest = min(one.rests_until for one in self._there()) - time.monotonic()
                failures += error.failed
                if failures > RETRIES_OF_FAILED:
                    raise UserError(
                        f"scorer {endpoint.url} has failed {failures} times, the last one {problem}"
                    ) from error
                if error.failed and failures >= len(self._endpoints):  # no other may do better
                    rest = PAUSE_AFTER_FAILED * 2 ** (failures - len(self._endpoints)) * random.uniform(0.75, 1.25)
            except ScorerNotFound as error:
                problem, rest = str(error), LOOK_EVERY * random.uniform(0.5, 1.5)
            self._problem = problem
            now = time.monotonic()
            waited = now - max(began, self._answered)
            if waited >= max_wait:
                raise ScorerUnavailable(f"scorer {self.url} gave no answer for {waited:.0f} s; last error: {problem}")
            if rest > 0:  # otherwise another scorer takes it at once
                call.pause(waited, min(rest, max_wait - waited, max(0.0, call.left())))

    @contextlib.contextmanager
    def _borrowed(self, work: int) -> Iterator[Endpoint]:
        """The address with the least to do among those that did not fail just now. Raises ScorerNotFound with "auto"."""
        if self._auto:
            self._find()
        with self._lock:
            now = time.monotonic()
            there = self._there()
            # Of those awake the one with the least to do, else the one that wakes first.
            endpoint = min(there, key=lambda one: (max(0.0, one.rests_until - now), one.outstanding))
            endpoint.outstanding += work
            if any(one is not endpoint and not one.lost for one in there):
                endpoint.try_alone()
        try:
            yield endpoint
            with self._lock:
                self._answered = time.monotonic()
                endpoint.has_answered()
        except Retry as error:
            with self._lock:
                endpoint.has_failed(error)
            raise
        finally:
            with self._lock:
                endpoint.outstanding -= work

    def _there(self) -> list[Endpoint]:
        """The addresses to choose from: not those that ran into a timeout, while another answers."""
        now = time.monotonic()
        there = [endpoint for endpoint in self._endpoints if endpoint.avoided_until <= now]
        return there if any(not endpoint.lost for endpoint in there) else self._endpoints

    def _find(self) -> None:
        """With "auto": looks for the scorer when none is known or the known one is lost."""
        with self._finding:  # one thread looks, the others take what it finds
            if self._endpoints and not self._endpoints[0].lost:
                return
            if time.monotonic() < self._looks_again:
                raise ScorerNotFound(self._problem)
            try:
                address = find_from_environment(self._identity, self._address)
                if address.token_file is not None and not Path(address.token_file).exists():
                    raise ScorerNotFound(f"{address.where()}: its token file {address.token_file} is not there")
            except ScorerNotFound as error:
                self._problem, self._looks_again = str(error), time.monotonic() + LOOK_EVERY / 2
                raise
            known, self._address = self._address, address
            if known is None or (known.url, known.token_file) != (address.url, address.token_file):
                self._endpoints = [Endpoint(address.url, self._configured_token)]
                self.url = address.url
            self._endpoints[0].lost = False

    def _configured_token(self) -> str | None:
        """The token to send now: files are read again after a refusal, because a restarted scorer may have another."""
        token, path = self._token, self._address.token_file if self._address is not None else None
        if token is None and path is None:
            token, path = os.environ.get("SCORER_AUTH"), os.environ.get("SCORER_TOKEN_FILE")
        if not token and path:
            return read_secret(path)
        return token if token and token != "none" else None

    def _tell(self, seconds: float) -> None:
        if self.on_wait is not None:
            self.on_wait(seconds)
        shown = self.on_wait is not None and watched()  # in its bar, which a job's log does not have
        if not shown and seconds >= SAY_AFTER and time.monotonic() - self._said >= SAY_EVERY:
            self._said = time.monotonic()
            print(f"waiting for the scorer, {seconds / 60:.0f} min ({self._problem})", file=sys.stderr, flush=True)


class _Call:
    """What the chunks of one call share: when it must be done, and how they reach the calling thread."""

    def __init__(self, tell: Callable[[float], None], deadline: float | None = None) -> None:
        self.tell = tell
        self.shared = False  # whether chunks run in threads of their own
        self.ended = threading.Event()
        self.news: queue.SimpleQueue = queue.SimpleQueue()  # (chunk, scores or error), (None, seconds waited)
        self._end = math.inf if deadline is None else time.monotonic() + deadline

    def left(self) -> float:
        return self._end - time.monotonic()

    def pause(self, waited: float, seconds: float) -> None:
        """Waits; raises what `tell` raises."""
        if not self.shared:
            self.tell(waited)
            time.sleep(seconds)
            return
        self.news.put((None, waited))
        if self.ended.wait(seconds):
            raise _Abandoned


def checked(url: str, answer: object, count: int) -> Scores:
    """The answer as Scores. Raises UserError when it has not exactly `count` usable rows."""
    if not isinstance(answer, dict):
        raise UserError(f"scorer {url}: expected a JSON object, got {type(answer).__name__}")
    columns = {}
    for key, default in (("rewards", None), ("costs", None), ("errors", [None]), ("truncated", [False])):
        column = answer.get(key, default * count if default else None)
        if not isinstance(column, list) or len(column) != count:
            got = f"{len(column)}" if isinstance(column, list) else "none"
            raise UserError(f"scorer {url}: asked for {count} {key}, got {got}")
        columns[key] = column
    for row in range(count):
        for key in ("rewards", "costs"):
            value = columns[key][row]
            if value is None:
                if not columns["errors"][row]:
                    columns["errors"][row] = f"the scorer gave null for {key} and no reason"
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"scorer {url}: {key}[{row}] is {value!r}, expected a finite number or null")
    return Scores(
        np.array([math.nan if value is None else value for value in columns["rewards"]], dtype=np.float64),
        np.array([math.nan if value is None else value for value in columns["costs"]], dtype=np.float64),
        columns["errors"],
        [bool(one) for one in columns["truncated"]],
    )
