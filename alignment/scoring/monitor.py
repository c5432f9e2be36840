"""What the scorer service counts: Prometheus metrics, a summary line a minute, an access log of one JSON object a request.

The access log (logger "scorer.access") names time, client, route, status, texts, tokens and seconds, never a text unless
SCORER_LOG_TEXTS=1. Answers of /health and /metrics are left out of it, they would hide the rest.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from alignment.scoring.worker import WorkQueue

SUMMARY_SECONDS = 60.0
QUIET_ROUTES = {"/health", "/metrics"}
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

log = logging.getLogger("scorer")
access_log = logging.getLogger("scorer.access")


class Monitor:
    """Counters of one service. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("scorer_requests", "Requests by route and status", ["route", "status"], **more)
        self.texts = Counter(
            "scorer_texts",
            "Texts: scored (by the models), repeated (their score was known), answered, departed (client gone)",
            ["outcome"],
            **more,
        )
        self.tokens = Counter("scorer_tokens", "Tokens scored by the models, of one of the two", **more)
        self.request_seconds = Histogram(
            "scorer_request_seconds", "Seconds to answer a request for scores", buckets=SECONDS_BUCKETS, **more
        )
        self.round_seconds = Histogram(
            "scorer_round_seconds", "Seconds of one round of the models", buckets=SECONDS_BUCKETS, **more
        )
        self.under_way = Gauge("scorer_requests_under_way", "Requests for scores without an answer yet", **more)
        self._queue_texts = Gauge("scorer_queued_texts", "Texts that wait", **more)
        self._queue_tokens = Gauge("scorer_queued_tokens", "Tokens that wait", **more)
        for outcome in ("scored", "repeated", "answered", "departed"):
            self.texts.labels(outcome)  # so that /metrics names them from the start
        self.texts_answered = 0
        self._lock = threading.Lock()
        self._statuses: dict[int, int] = {}
        self._departed = 0
        self._seconds: list[float] = []
        self._told = (time.monotonic(), 0)
        self._idle = False
        self._rounds, self._round_news = 0, 0.0  # in progress; when one last began after none, or ended (monotonic)

    def watch(self, queue: WorkQueue) -> None:
        """Shows a WorkQueue's length in the metrics."""
        self._queue_texts.set_function(lambda: len(queue))
        self._queue_tokens.set_function(lambda: queue.tokens)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)

    def answered(self, texts: int) -> None:
        with self._lock:
            self.texts_answered += texts
        self.texts.labels("answered").inc(texts)

    def round_begins(self) -> None:
        with self._lock:
            if not self._rounds:
                self._round_news = time.monotonic()
            self._rounds += 1

    def round_ends(self) -> None:
        with self._lock:
            self._rounds -= 1
            self._round_news = time.monotonic()

    def seconds_in_round(self) -> float:
        """How long the models have been at work on the oldest round in progress, 0 without one."""
        with self._lock:
            return time.monotonic() - self._round_news if self._rounds else 0.0

    def departed(self, texts: int) -> None:
        with self._lock:
            self._departed += texts
        self.texts.labels("departed").inc(texts)

    def request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        if route.startswith("/score"):
            self.request_seconds.observe(seconds)
            with self._lock:
                self._statuses[status] = self._statuses.get(status, 0) + 1
                self._seconds.append(seconds)

    def summary(self, queued_texts: int) -> str | None:
        """What happened since the last call; None when nothing did, the second time on."""
        now = time.monotonic()
        with self._lock:
            began, before = self._told
            self._told = (now, self.texts_answered)
            statuses, seconds, departed = self._statuses, sorted(self._seconds), self._departed
            self._statuses, self._seconds, self._departed = {}, [], 0
            texts = self.texts_answered - before
        idle = not statuses and not queued_texts
        if idle and self._idle:
            return None
        self._idle = idle
        if idle:
            return "idle"
        told = [
            f"{texts} texts in the last {now - began:.0f} s ({texts / max(now - began, 1e-6):.1f}/s)",
            f"{queued_texts} waiting",
            "requests by status " + (", ".join(f"{key}: {statuses[key]}" for key in sorted(statuses)) or "none"),
        ]
        if seconds:
            median, late = seconds[len(seconds) // 2], seconds[math.ceil(0.99 * len(seconds)) - 1]
            told.append(f"seconds a request {median:.2f} (99 %: {late:.2f})")
        if departed:
            told.append(f"{departed} texts dropped, their clients had gone")
        return "; ".join(told)


class Minder(threading.Thread):
    """Writes the summary line, and does `chores` (tries again what failed, looks whether the GPU hangs), once a minute."""

    def __init__(self, monitor: Monitor, queue: WorkQueue, chores: Callable[[], None]) -> None:
        super().__init__(name="scorer-minder", daemon=True)
        self.monitor, self.queue, self.chores = monitor, queue, chores
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SUMMARY_SECONDS):
            line = self.monitor.summary(len(self.queue))
            if line is not None:
                log.info("%s", line)
            self.chores()


class Access:
    """ASGI middleware: counts every request and writes its line. Endpoints add to scope["facts"]."""

    def __init__(self, app: ASGIApp, monitor: Monitor) -> None:
        self.app, self.monitor = app, monitor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        facts: dict[str, Any] = {}
        scope["facts"] = facts

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            seconds = time.monotonic() - began
            # The route, not the path: a path may hold anything.
            route = getattr(scope.get("route"), "path", "(none)")
            self.monitor.request(route, status, seconds)
            if route not in QUIET_ROUTES or status >= 400:
                client = scope["client"][0] if scope.get("client") else None
                line = {"time": round(time.time(), 3), "client": client, "method": scope["method"], "route": route}
                access_log.info("%s", json.dumps(line | {"status": status, "seconds": round(seconds, 4)} | facts))
