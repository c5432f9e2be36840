"""Asks for the judgments that are missing, many at once, and keeps every reply.

- How many run at once adapts: halved when the endpoint says that it is too much, then one more for each round that went well,
  up to --concurrency. A Retry-After holds all calls back.
- What may succeed later (rate limit, server error, timeout, dropped connection, broken reply) is tried again after a wait that
  doubles, with jitter. A reply without a verdict is kept (it was charged) and asked again --reasks times.
- A wrong key and the like, an endpoint that only fails, a spent budget and a signal stop the run: no new call starts, those
  under way are awaited and kept.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from alignment.evaluation.judging.client import JudgeClient, JudgeStopped, Reply
from alignment.evaluation.judging.cost import Budget, count_bytes, worst_usage
from alignment.evaluation.judging.store import JudgmentStore, make_record
from alignment.evaluation.judging.tasks import Task
from alignment.evaluation.judging.verdict import outcome_of, result_of
from alignment.progress import progress_bar
from alignment.runs import StopSignal

LONGEST_BACKOFF = 60.0  # seconds
MOST_RATE_LIMITS = 100  # of one judgment, before it counts as failed


@dataclass(frozen=True)
class LoopSettings:
    concurrency: int
    max_output_tokens: int
    tie_threshold: float
    tries: int  # calls for one judgment that fail in transport
    reasks: int  # further calls for one judgment whose reply held no verdict
    retry_wait: float  # seconds before the first repetition
    max_wait: float  # seconds; a longer Retry-After stops the run


@dataclass
class Progress:
    """How the run stands. `outcomes` of this run's judgments; `repeated` counts replies that led to another call, by kind."""

    outcomes: Counter = field(default_factory=Counter)
    repeated: Counter = field(default_factory=Counter)
    budget_spent: bool = False
    signal: signal.Signals | None = None
    error: JudgeStopped | None = None
    failures_in_a_row: int = 0

    @property
    def stopped(self) -> bool:
        """No new call starts."""
        return self.budget_spent or self.signal is not None or self.error is not None


class Pace:
    """How many calls may be under way, and from when on the next may start."""

    def __init__(self, most: int):
        self.most, self.limit = most, float(most)
        self.not_before = 0.0
        self._running = 0
        self._lowered = 0.0
        self._changed = asyncio.Condition()

    async def start(self) -> float:
        """Waits for a place; returns when the call starts."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._running < int(self.limit))
            self._running += 1
        return time.monotonic()

    async def end(self, started: float, reply: Reply | None) -> None:
        async with self._changed:
            self._running -= 1
            if reply is not None and reply.kind == "rate_limited":
                if started >= self._lowered:  # calls sent before the limit was lowered tell nothing new
                    self.limit = max(self.limit / 2, 1.0)
                    self._lowered = time.monotonic()
            elif reply is not None and reply.usage is not None:
                self.limit = min(self.limit + 1.0 / int(self.limit), float(self.most))
            self._changed.notify_all()


def ask_all(
    tasks: Sequence[Task], client: JudgeClient, store: JudgmentStore, budget: Budget, settings: LoopSettings
) -> Progress:
    """Asks for all `tasks`; every reply is in the store when this returns. Raises JudgeStopped after what was under way ended."""
    with StopSignal() as stop_signal:
        loop = _Loop(client, store, budget, settings, stop_signal)
        try:
            asyncio.run(loop.run(tasks))
        except ExceptionGroup as group:  # what went wrong in a worker, for example a full disk
            raise group.exceptions[0] from None
    if loop.progress.error is not None:
        raise loop.progress.error
    return loop.progress


class _Loop:
    def __init__(
        self,
        client: JudgeClient,
        store: JudgmentStore,
        budget: Budget,
        settings: LoopSettings,
        stop_signal: StopSignal,
    ):
        self.client, self.store, self.budget, self.settings = client, store, budget, settings
        self.stop_signal = stop_signal
        self.progress = Progress()

    async def run(self, tasks: Sequence[Task]) -> None:
        self.pace = Pace(self.settings.concurrency)
        waiting = iter(tasks)
        with progress_bar(len(tasks), "judging", "judgment") as self.bar:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.settings.concurrency, len(tasks))):
                    group.create_task(self._work(waiting))
        await self.client.close()

    async def _work(self, waiting: Iterator[Task]) -> None:
        for task in waiting:  # one iterator for all workers
            await self._judge(task)
            if self._stopping():
                return

    def _stopping(self) -> bool:
        if self.stop_signal:
            self.progress.signal = self.stop_signal.received
        return self.progress.stopped

    async def _judge(self, task: Task) -> None:
        """Asks until there is a verdict, the tries are used up, or the run stops."""
        if task.first_answer == task.second_answer:  # nothing to pay for
            self._finish(make_record(task, "tie", None, "", error="the answers are the same: not asked"))
            return
        failures = reasks = limits = 0
        while not self._stopping():
            reply = await self._call(task)
            if reply is None:
                return
            if reply.scores is not None:  # a verdict
                outcome = outcome_of(result_of(reply.scores, self.settings.tie_threshold))
                self._finish(_record(task, outcome, reply))
                return
            if reply.kind == "adapted":
                continue
            self.progress.repeated[reply.kind] += 1
            if reply.kind in ("unparsed", "refused"):
                reasks += 1
                if reasks > self.settings.reasks:
                    self._finish(_record(task, reply.kind, reply))
                    return
                self.store.append(_record(task, reply.kind, reply))
                if reply.usage is not None:
                    continue
            elif reply.kind == "rate_limited":
                limits += 1
            else:
                failures += 1
            if reply.kind == "rejected" or failures >= self.settings.tries or limits >= MOST_RATE_LIMITS:
                self._finish(_record(task, "failed", reply))
                return
            await self._wait(reply, failures + reasks + limits)

    async def _call(self, task: Task) -> Reply | None:
        """One call in its place and within the budget; None when the run stops instead."""
        started = await self.pace.start()
        reply = reserved = None
        try:
            await self._sleep_until(self.pace.not_before)
            worst = worst_usage(count_bytes(self.client.messages(task)), self.settings.max_output_tokens)
            while not self._stopping() and (reserved := self.budget.reserve(worst)) is None:
                if self.budget.open_calls == 0:
                    self.progress.budget_spent = True
                await asyncio.sleep(0.02)  # calls under way mostly cost less than was set aside for them
            if reserved is None:
                return None
            started = time.monotonic()
            reply = await self.client.ask(task)
        except JudgeStopped as error:
            self._stop_for(error)
        finally:
            if reserved is not None:
                charged = reply is not None and reply.kind == "unreachable"
                self.budget.settle(reserved, reply.usage if reply else None, charged)
            await self.pace.end(started, reply)
        return reply

    def _stop_for(self, error: JudgeStopped) -> None:
        self.progress.error = self.progress.error or error

    async def _wait(self, reply: Reply, count: int) -> None:
        """Backoff with jitter before the next try; a wait that the server asks for holds for all calls."""
        backoff = min(self.settings.retry_wait * 2 ** min(count - 1, 16), LONGEST_BACKOFF)
        if reply.wait is None:
            seconds = backoff * random.uniform(0.5, 1.0)
        elif reply.wait > self.settings.max_wait:
            self._stop_for(
                JudgeStopped(f"{self.client.address} asks to wait {reply.wait:.0f} s ({reply.error}); run again then")
            )
            return
        else:
            seconds = reply.wait + random.uniform(0.0, 0.25) * min(reply.wait, backoff)
        until = time.monotonic() + seconds
        if reply.kind == "rate_limited":
            self.pace.not_before = max(self.pace.not_before, until)
        await self._sleep_until(until)

    async def _sleep_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0 and not self._stopping():
            await asyncio.sleep(min(left, 0.5))  # short, so that a stop is noticed

    def _finish(self, record: dict) -> None:
        self.store.append(record)
        outcome, progress = record["outcome"], self.progress
        progress.outcomes[outcome] += 1
        progress.failures_in_a_row = progress.failures_in_a_row + 1 if outcome == "failed" else 0
        if progress.failures_in_a_row >= 3 * self.settings.concurrency + 10:
            self._stop_for(
                JudgeStopped(
                    f"the last {progress.failures_in_a_row} judgments failed ({record['error']}); see to "
                    f"{self.client.address} and run again, what was judged is kept"
                )
            )
        without = ", ".join(f"{name} {progress.outcomes[name]}" for name in ("refused", "unparsed", "failed"))
        money = f"${self.budget.spent:.2f}, " if self.budget.price else ""
        self.bar.set_postfix_str(f"{money}{without}, {int(self.pace.limit)} at once", refresh=False)
        self.bar.update(1)


def _record(task: Task, outcome: str, reply: Reply) -> dict:
    more = {"usage": reply.usage, "served_by": reply.served_by, "finish_reason": reply.finish_reason}
    more |= {"options": reply.options, "error": reply.error}
    return make_record(task, outcome, reply.scores, reply.text, **more)
