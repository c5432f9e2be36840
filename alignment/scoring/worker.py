"""What waits to be scored, and the worker that scores it.

    queue = WorkQueue(max_tokens=8_000_000)
    worker = Worker(settings, queue, on_ready, on_failure); worker.start()
    queue.put(job)                 # Job; raises QueueFull, TooLarge, Closed
    scores = job.scores.result()   # list[Score]

A round takes up to TEXTS_A_ROUND texts, across requests and oldest first, but not more than SLICE of one request at a turn:
a request of 10,000 texts does not make a small one wait. Within a round, and against the last CACHE_SIZE texts scored, a
text that was seen before is not scored again (so a client that asks again after a broken connection costs nothing).
Where the scorer names a number of tokens for a round (`round_tokens`: on a GPU), rounds are that small, and each is queued
on the GPU while the one before is computed; a second thread waits for the scores and gives the answers.

A job whose client has gone leaves the queue. When the GPU is broken for good, everybody waiting gets a 503 and the service ends.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import logging
import math
import os
import queue
import threading
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace

import torch

from alignment.scoring.local_scorer import Conversation, LocalScorer, Pending, Score
from alignment.scoring.monitor import Monitor
from alignment.scoring.service_settings import Settings

TEXTS_A_ROUND = 512
SLICE = 128
CACHE_SIZE = 65_536  # scores, about 15 MB
SLOWEST_RETRY_AFTER = 30  # seconds
FAILED = "the scorer has failed and ends"

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


Turn = tuple[Job, list[Conversation]]  # what a round takes of a job


@dataclass(eq=False)
class Round:
    """What goes through the models at a time. Each text that has no score yet is in `fresh` once."""

    turns: list[Turn]
    keys: list[bytes]  # of all its texts, in order
    known: dict[bytes, Score]
    fresh: dict[bytes, Conversation]
    before: Round | None  # the one that was not finished when this began, for the texts that are under way there
    began: float
    pending: Pending | None = None
    scores: dict[bytes, Score] = field(default_factory=dict)  # of `fresh`, once there

    def rows(self) -> list[tuple[bytes, Job, Conversation]]:
        pairs = ((job, one) for job, part in self.turns for one in part)
        return [(key, *pair) for key, pair in zip(self.keys, pairs, strict=True)]


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

    def take(self, tokens: int | None = None) -> list[Turn] | None:
        """The next round: jobs and conversations of theirs. Waits for work; None when there will be none any more.

        A round has up to `tokens` tokens, unless its only text is longer; None: as many as its texts have.
        """
        with self._changed:
            while not self._jobs:
                if self._closed is not None or self._last:
                    return None
                self._changed.wait()
            room, left = TEXTS_A_ROUND, math.inf if tokens is None else tokens
            turns: list[Turn] = []
            # Slices of the same job may follow each other when nobody else waits.
            while self._jobs and room > 0:
                job = self._jobs.popleft()
                part = job.conversations[job.taken : job.taken + min(SLICE - job.taken % SLICE, room)]
                sizes = list(itertools.accumulate(len(one.reward_ids) for one in part))
                part = part[: max(bisect.bisect_right(sizes, left), 0 if turns else 1)]
                if not part:
                    self._jobs.appendleft(job)
                    break
                taken = sizes[len(part) - 1]
                job.taken += len(part)
                room -= len(part)
                left -= taken
                self.tokens -= taken
                turns.append((job, part))
                if job.taken % SLICE and job.taken < len(job.conversations):
                    self._jobs.appendleft(job)  # the round is full; this turn goes on in the next one
                elif job.taken < len(job.conversations):
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
    """Loads the models, then scores what is in the queue, until the queue ends."""

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
        self._models = threading.Lock()  # of the scorer: one thread at a time
        self._lock = threading.Lock()  # of the next two
        self._recent: OrderedDict[bytes, Score] = OrderedDict()
        self._under_way: Round | None = None  # the newest that is not finished
        self._finished_at = 0.0  # monotonic, of the last round

    def run(self) -> None:
        try:
            scorer = self.load(**self.settings.scorer)
            if scorer.is_small_on_cpu() and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(1)  # twice as fast as two for tiny models, and leaves the cores to the trainer
            self.warnings = [] if self.settings.probe_off else scorer.warnings(self.settings.probe)
            self.scorer = scorer
            self.on_ready(self)
            if scorer.round_tokens is None:
                while (turns := self.jobs.take()) is not None:
                    if (one := self._begin(turns)) is not None:
                        self._finish(one)
            else:
                self._serve_ahead(scorer.round_tokens)
        except BaseException as error:  # whatever it is, the service must not go on without models
            self.jobs.close(FAILED)
            self.on_failure(error)

    def _serve_ahead(self, tokens: int) -> None:
        """Begins a round while the one before is computed, never more than that one ahead."""
        begun: queue.SimpleQueue[Round | None] = queue.SimpleQueue()
        room = threading.Semaphore(2)  # rounds that are begun and not finished
        failures: list[BaseException] = []

        def finish_all() -> None:
            try:
                while (one := begun.get()) is not None:
                    self._finish(one)
                    room.release()
            except BaseException as error:
                failures.append(error)
                self.jobs.close(FAILED)  # `take` then returns None
                room.release()

        finisher = threading.Thread(target=finish_all, name="scorer-answers", daemon=True)
        finisher.start()
        try:
            while True:
                room.acquire()
                if (turns := self.jobs.take(tokens)) is None:
                    break
                if (one := self._begin(turns)) is not None:
                    begun.put(one)
                else:
                    room.release()
        finally:
            begun.put(None)
            finisher.join()
        if failures:
            raise failures[0]

    def _begin(self, turns: list[Turn]) -> Round | None:
        """Has a round's texts scored, each different one that is neither known nor under way once. None when that fails."""
        assert self.scorer is not None
        self.monitor.round_begins()
        turns = [(job, part) for job, part in turns if not job.scores.done()]
        texts = [one for _, part in turns for one in part]
        one = Round(turns, [text_key(text) for text in texts], {}, {}, None, time.monotonic())
        with self._lock:
            one.before = self._under_way
            for key, text in zip(one.keys, texts, strict=True):
                if key in self._recent:
                    self._recent.move_to_end(key)
                    one.known[key] = self._recent[key]
                elif one.before is None or key not in one.before.fresh:
                    one.fresh.setdefault(key, text)
        try:
            with self._models:
                one.pending = self.scorer.queue_encoded(list(one.fresh.values()))
        except Exception as error:
            self._fail(one, error)
            return None
        with self._lock:
            self._under_way = one
        return one

    def _finish(self, one: Round) -> None:
        """Waits for a round's scores, and gives every job that has all of its scores its answer."""
        try:
            scored = self._score(one)
        except Exception as error:
            self._fail(one, error)
            return
        finally:
            with self._lock:
                if self._under_way is one:
                    self._under_way = None
            one.before = one.pending = None
        self.monitor.round_ends()
        now = time.monotonic()
        seconds = now - max(one.began, self._finished_at)  # not those in which the round before was computed
        self._finished_at = now
        tokens = sum(len(text.reward_ids) for _, part in one.turns for text in part)
        self.jobs.tokens_a_second = 0.7 * self.jobs.tokens_a_second + 0.3 * tokens / max(seconds, 1e-6)
        self.monitor.round_seconds.observe(seconds)
        given = iter(scored)
        for job, part in one.turns:
            job.done += [next(given) for _ in part]
            # `forget` says whether somebody waits still. Counted first: who has the answer must find it in the figures.
            if len(job.done) == len(job.conversations) and self.jobs.forget(job):
                self.monitor.answered(len(job.done))
                answer(job, job.done)

    def _score(self, one: Round) -> list[Score]:
        """Scores of all texts of a round, in order."""
        assert self.scorer is not None and one.pending is not None
        one.scores = dict(zip(one.fresh, one.pending.result(), strict=True))
        elsewhere = one.before.scores if one.before is not None else {}
        found = elsewhere | one.known | one.scores
        # The round before has failed: what was to come from there is scored now.
        missing = {key: text for key, _, text in one.rows() if key not in found}
        if missing:
            with self._models:
                pending = self.scorer.queue_encoded(list(missing.values()))
            found |= zip(missing, pending.result(), strict=True)
        fresh = one.fresh | missing
        with self._lock:
            self._recent.update((key, found[key]) for key in fresh if found[key].error is None)
            while len(self._recent) > CACHE_SIZE:
                self._recent.popitem(last=False)
        first = set(fresh)  # whose first place is still to come
        for key, job, _ in one.rows():
            if key in first:
                first.remove(key)
            else:
                job.cached += 1
                self.monitor.texts.labels("repeated").inc()
        self.monitor.texts.labels("scored").inc(len(fresh))
        self.monitor.tokens.inc(sum(len(text.reward_ids) for text in fresh.values()))
        return [replace(found[key], truncated=text.truncated) for key, _, text in one.rows()]

    def _fail(self, one: Round, error: Exception) -> None:
        """One failed round does not end the service; its requests get a 500. Raises DeviceBroken when nothing goes any more."""
        log.error("scoring failed", exc_info=error)
        self.monitor.round_ends()
        assert self.scorer is not None
        if self.scorer.device_is_broken():
            raise DeviceBroken(f"the GPU is broken for this process: {error}") from error
        for job, _ in one.turns:
            self.jobs.forget(job)
            answer(job, error)


def text_key(conversation: Conversation) -> bytes:
    """16 bytes that stand for what is scored: both models' ids, and whether there is anything to score."""
    digest = hashlib.blake2b(array("I", conversation.reward_ids).tobytes(), digest_size=16)
    if conversation.cost_ids is not conversation.reward_ids:
        digest.update(b"cost" + array("I", conversation.cost_ids).tobytes())
    digest.update(b"!" if conversation.error else b".")
    return digest.digest()
