"""What waits to be scored, and the one thread that scores it.

    queue = WorkQueue(max_tokens=8_000_000)
    worker = Worker(settings, queue, on_ready, on_failure); worker.start()
    queue.put(job)                 # Job; raises QueueFull, TooLarge, Closed
    scores = job.scores.result()   # list[Score]

A round takes up to TEXTS_A_ROUND texts, across requests and oldest first, but not more than SLICE of one request at a turn:
a request of 10,000 texts does not make a small one wait. Within a round, and against the last CACHE_SIZE texts scored, a
text that was seen before is not scored again (so a client that asks again after a broken connection costs nothing).
A job whose client has gone leaves the queue. When the GPU is broken for good, everybody waiting gets a 503 and the service ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace

import torch

from alignment.scoring.local_scorer import Conversation, LocalScorer, Score
from alignment.scoring.monitor import Monitor
from alignment.scoring.service_settings import Settings

TEXTS_A_ROUND = 512
SLICE = 128
CACHE_SIZE = 65_536  # scores, about 15 MB
SLOWEST_RETRY_AFTER = 30  # seconds

log = logging.getLogger("scorer")


class QueueFull(Exception):
    """No room now. `seconds` is when to ask again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; ask again in {seconds} s")
        self.seconds = seconds


class TooLarge(Exception):
    """More tokens than the queue ever holds."""


class Closed(Exception):
    """The service ends: nothing is scored any more."""


class DeviceBroken(RuntimeError):
    """The GPU does nothing more for this process."""


@dataclass(eq=False)
class Job:
    """One request's conversations and where its scores go."""

    conversations: list[Conversation]
    scores: Future = field(default_factory=Future)  # of list[Score]
    done: list[Score] = field(default_factory=list)  # the first ones, round by round
    taken: int = 0  # conversations that a round has taken
    cached: int = 0
    put_at: float = 0.0

    def tokens(self, start: int = 0) -> int:
        return sum(len(one.reward_ids) for one in self.conversations[start:])


class WorkQueue:
    """Jobs in the order of their turns, bounded by the tokens of all that nobody has taken yet. Thread-safe."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self.tokens_a_second = 0.0  # of the last rounds
        self._jobs: deque[Job] = deque()  # with conversations to take
        self._open: set[Job] = set()  # without an answer yet
        self._changed = threading.Condition()
        self._closed: str | None = None
        self._last = False  # nothing comes any more: end when empty

    def __len__(self) -> int:
        """Texts that wait."""
        with self._changed:
            return sum(len(job.conversations) - job.taken for job in self._jobs)

    def put(self, job: Job) -> None:
        tokens = job.tokens()
        if tokens > self.max_tokens:  # it would wait forever
            raise TooLarge(f"{tokens} tokens in one request, the queue holds {self.max_tokens}: ask for fewer texts")
        with self._changed:
            if self._closed is not None:
                raise Closed(self._closed)
            if self.tokens + tokens > self.max_tokens:
                raise QueueFull(self._seconds_to_go())
            if not job.conversations:
                job.scores.set_result([])
                return
            job.put_at = time.monotonic()
            self.tokens += tokens
            self._jobs.append(job)
            self._open.add(job)
            self._changed.notify()

    def take(self) -> list[tuple[Job, list[Conversation]]] | None:
        """The next round: jobs and conversations of theirs. Waits for work; None when there will be none any more."""
        with self._changed:
            while not self._jobs:
                if self._closed is not None or self._last:
                    return None
                self._changed.wait()
            room, turns = TEXTS_A_ROUND, []
            # Slices of the same job may follow each other when nobody else waits.
            while self._jobs and room > 0:
                job = self._jobs.popleft()
                part = job.conversations[job.taken : job.taken + min(SLICE, room)]
                job.taken += len(part)
                room -= len(part)
                self.tokens -= sum(len(one.reward_ids) for one in part)
                turns.append((job, part))
                if job.taken < len(job.conversations):
                    self._jobs.append(job)
            return turns

    def forget(self, job: Job) -> bool:
        """Takes a job out, and what nobody has taken of it; returns whether it was here, without an answer."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self.tokens -= job.tokens(job.taken)
            was_here = job in self._open
            self._open.discard(job)
            return was_here

    def end(self) -> None:
        """Lets `take` return None once nothing waits."""
        with self._changed:
            self._last = True
            self._changed.notify_all()

    def close(self, reason: str) -> int:
        """Refuses everything from now on, and everybody who waits; returns how many requests that were."""
        with self._changed:
            self._closed, waiting = reason, list(self._open)
            self._open.clear()
            self._jobs.clear()
            self.tokens = 0
            self._changed.notify_all()
        for job in waiting:
            answer(job, Closed(reason))
        return len(waiting)

    def _seconds_to_go(self) -> int:
        """Until half of what is queued is done, by the speed of the last rounds."""
        seconds = self.tokens / 2 / self.tokens_a_second if self.tokens_a_second else 1.0
        return max(1, min(SLOWEST_RETRY_AFTER, round(seconds)))


def answer(job: Job, result: list[Score] | Exception) -> None:
    """Gives a job its result, unless it has one or its client has gone."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, Exception):
            job.scores.set_exception(result)
        else:
            job.scores.set_result(result)


class Worker(threading.Thread):
    """Loads the models, then scores what is in the queue, until the queue ends. The only thread that touches the models."""

    def __init__(
        self,
        settings: Settings,
        jobs: WorkQueue,
        monitor: Monitor,
        on_ready: Callable[[Worker], None],
        on_failure: Callable[[BaseException], None],
        load: Callable[..., LocalScorer] = LocalScorer,
    ) -> None:
        super().__init__(name="scorer-worker", daemon=True)
        self.settings, self.jobs, self.monitor = settings, jobs, monitor
        self.on_ready, self.on_failure, self.load = on_ready, on_failure, load
        self.scorer: LocalScorer | None = None  # set once loaded
        self.warnings: list[str] = []
        self._recent: OrderedDict[bytes, Score] = OrderedDict()

    def run(self) -> None:
        try:
            scorer = self.load(**self.settings.scorer)
            if scorer.is_small_on_cpu() and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(1)  # twice as fast as two for tiny models, and leaves the cores to the trainer
            self.warnings = [] if self.settings.probe_off else scorer.warnings(self.settings.probe)
            self.scorer = scorer
            self.on_ready(self)
            while (turns := self.jobs.take()) is not None:
                self._round(turns, scorer)
        except BaseException as error:  # whatever it is, the service must not go on without models
            self.jobs.close("the scorer has failed and ends")
            self.on_failure(error)

    def _round(self, turns: list[tuple[Job, list[Conversation]]], scorer: LocalScorer) -> None:
        turns = [(job, part) for job, part in turns if not job.scores.done()]
        began = time.monotonic()
        try:
            scores = self._score([(job, one) for job, part in turns for one in part], scorer)
        except Exception as error:
            log.exception("scoring failed")
            if scorer.device_is_broken():
                raise DeviceBroken(f"the GPU is broken for this process: {error}") from error
            # One failed round does not end the service; its requests get a 500.
            for job, _ in turns:
                self.jobs.forget(job)
                answer(job, error)
            return
        seconds = time.monotonic() - began
        tokens = sum(len(one.reward_ids) for _, part in turns for one in part)
        self.jobs.tokens_a_second = 0.7 * self.jobs.tokens_a_second + 0.3 * tokens / max(seconds, 1e-6)
        self.monitor.round_seconds.observe(seconds)
        given = iter(scores)
        for job, part in turns:
            job.done += [next(given) for _ in part]
            if len(job.done) == len(job.conversations):
                # Counted first: who has the answer must find it in the figures.
                self.monitor.answered(len(job.done))
                self.jobs.forget(job)
                answer(job, job.done)

    def _score(self, rows: list[tuple[Job, Conversation]], scorer: LocalScorer) -> list[Score]:
        """Scores in order; each different text that is not among the recent ones goes through the models once."""
        keys = [text_key(one) for _, one in rows]
        fresh: dict[bytes, Conversation] = {}
        found: dict[bytes, Score] = {}
        for key, (job, one) in zip(keys, rows, strict=True):
            known = self._recent.get(key)
            if known is not None:
                self._recent.move_to_end(key)
                found[key] = known
            if known is not None or key in fresh:
                job.cached += 1
                self.monitor.texts.labels("repeated").inc()
            else:
                fresh[key] = one
        for key, score in zip(fresh, scorer.score_encoded(list(fresh.values())), strict=True):
            found[key] = score
            if score.error is None:
                self._recent[key] = score
        self.monitor.texts.labels("scored").inc(len(fresh))
        self.monitor.tokens.inc(sum(len(one.reward_ids) for one in fresh.values()))
        while len(self._recent) > CACHE_SIZE:
            self._recent.popitem(last=False)
        return [replace(found[key], truncated=one.truncated) for key, (_, one) in zip(keys, rows, strict=True)]


def text_key(conversation: Conversation) -> bytes:
    """16 bytes that stand for what is scored: both models' ids, and whether there is anything to score."""
    digest = hashlib.blake2b(array("I", conversation.reward_ids).tobytes(), digest_size=16)
    if conversation.cost_ids is not conversation.reward_ids:
        digest.update(b"cost" + array("I", conversation.cost_ids).tobytes())
    digest.update(b"!" if conversation.error else b".")
    return digest.digest()
