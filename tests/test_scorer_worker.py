"""The scorer's queue and its worker: bounds, turns, repeated texts, departed clients, failures. No models, no HTTP."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
from scorer_process import StubScorer

from alignment.scoring import worker as module
from alignment.scoring.local_scorer import Conversation
from alignment.scoring.monitor import Monitor
from alignment.scoring.service_settings import read_settings
from alignment.scoring.worker import Closed, DeviceBroken, Job, QueueFull, TooLarge, Worker, WorkQueue, text_key


def job(*texts: str) -> Job:
    stub = StubScorer()
    return Job([stub.encode_whole(text) for text in texts])


def many(name: str, count: int) -> Job:
    return job(*(f"{name}{index}" for index in range(count)))


@pytest.fixture
def worker():
    """A running worker with a stub; `failures` collects what it reports."""
    ready, failures = threading.Event(), []
    one = Worker(read_settings({}), WorkQueue(10_000), Monitor(), lambda _: ready.set(), failures.append, StubScorer)
    one.failures = failures
    one.start()
    assert ready.wait(10)
    yield one
    one.scorer.gate.set()
    one.jobs.end()
    one.join(10)
    assert not one.is_alive()


def test_scores_come_back_in_order(worker):
    jobs = [job("a", "bbb", "cc"), job(), job("dddd")]
    for one in jobs:
        worker.jobs.put(one)
    rewards = [[score.reward for score in one.scores.result(10)] for one in jobs]
    assert rewards == [[1, 3, 2], [], [4]]
    assert worker.jobs.tokens == 0 and len(worker.jobs) == 0
    assert worker.monitor.texts_answered == 4


def test_the_queue_is_bounded():
    queue = WorkQueue(max_tokens=10)
    queue.put(job("12345678"))
    with pytest.raises(QueueFull, match="ask again in 1 s"):
        queue.put(job("123"))
    queue.put(job("12"))
    with pytest.raises(TooLarge, match="11 tokens in one request, the queue holds 10"):
        queue.put(job("12345678901"))
    queue.tokens_a_second = 0.5
    with pytest.raises(QueueFull) as full:
        queue.put(job("1"))
    assert full.value.seconds == 10  # until half of the ten tokens are done
    queue.tokens_a_second = 1e-9
    with pytest.raises(QueueFull) as full:
        queue.put(job("1"))
    assert full.value.seconds == module.SLOWEST_RETRY_AFTER
    queue.take()
    assert queue.tokens == 0
    queue.put(job("1234567890"))


def test_a_large_request_does_not_make_a_small_one_wait():
    queue = WorkQueue(10**6)
    large, small = many("large", 2000), many("small", 3)
    queue.put(large)
    queue.put(small)
    turns = queue.take()
    assert [(one is large, len(part)) for one, part in turns[:2]] == [(True, module.SLICE), (False, 3)]
    assert sum(len(part) for _, part in turns) == module.TEXTS_A_ROUND
    taken = [one for turn_job, part in turns if turn_job is large for one in part]
    while len(queue):
        taken += [one for _, part in queue.take() for one in part]
    assert taken == large.conversations
    assert queue.tokens == 0


def test_identical_texts_are_scored_once(worker):
    worker.scorer.gate.clear()
    first = job("x")
    worker.jobs.put(first)
    while len(worker.jobs):
        time.sleep(0.005)
    second, third = job("a", "b", "a"), job("b", "c", "x")
    worker.jobs.put(second)
    worker.jobs.put(third)
    worker.scorer.gate.set()
    assert [score.reward for score in second.scores.result(10) + third.scores.result(10)] == [1] * 6
    again = job("a", "x")
    worker.jobs.put(again)
    again.scores.result(10)
    assert worker.scorer.rounds == [["x"], ["a", "b", "c"], []]
    assert (second.cached, third.cached, again.cached) == (1, 2, 2)


def test_only_the_recent_scores_are_kept(worker, monkeypatch):
    monkeypatch.setattr(module, "CACHE_SIZE", 2)
    for text in ("a", "b", "a", "c", "b", "a"):
        one = job(text)
        worker.jobs.put(one)
        one.scores.result(10)
    # "a" was used again before "c" came, so "b" had to go; then "a".
    assert worker.scorer.rounds == [["a"], ["b"], [], ["c"], ["b"], ["a"]]


def test_what_has_no_score_is_not_remembered(worker):
    for _ in range(2):
        one = job("nothing")
        worker.jobs.put(one)
        assert one.scores.result(10)[0].error == "nothing left"
    assert worker.scorer.rounds == [["nothing"], ["nothing"]]


def test_truncation_belongs_to_the_text_not_to_the_score(worker):
    long = "x" * 100
    one = job(long, long + "y")
    worker.jobs.put(one)
    assert [score.truncated for score in one.scores.result(10)] == [False, True]
    assert [score.reward for score in one.scores.result(10)] == [100, 100]
    assert len(worker.scorer.rounds[0]) == 1


def test_keys_tell_texts_apart():
    def key(reward, cost=None, error=None):
        reward = tuple(reward)
        return text_key(Conversation(reward, reward if cost is None else tuple(cost), False, error))

    keys = [key([1, 2]), key([2, 1]), key([1]), key([258]), key([1, 2], [1, 2, 3]), key([1, 2], [2, 1])]
    keys += [key([1, 2], error="e"), key([])]
    assert len(set(keys)) == len(keys)


def test_work_of_a_departed_client_is_dropped(worker):
    worker.scorer.gate.clear()
    holder, gone, stays = job("holder"), many("gone", 700), job("stays")
    worker.jobs.put(holder)
    while len(worker.jobs):
        time.sleep(0.005)
    worker.jobs.put(gone)
    worker.jobs.put(stays)
    assert worker.jobs.forget(gone) and not worker.jobs.forget(gone)
    gone.scores.cancel()
    assert worker.jobs.tokens == len("stays") and len(worker.jobs) == 1
    worker.scorer.gate.set()
    assert stays.scores.result(10)[0].reward == 5
    with pytest.raises(CancelledError):
        gone.scores.result(10)
    assert worker.scorer.rounds == [["holder"], ["stays"]]


def test_a_client_departs_while_its_first_part_is_scored(worker):
    worker.scorer.gate.clear()
    large = many("t", 1000)
    worker.jobs.put(large)
    while large.taken == 0:
        time.sleep(0.005)
    worker.jobs.forget(large)
    large.scores.cancel()
    worker.scorer.gate.set()
    after = job("after")
    worker.jobs.put(after)
    after.scores.result(10)
    assert [len(texts) for texts in worker.scorer.rounds] == [module.TEXTS_A_ROUND, 1]


def test_a_failed_round_ends_its_requests_only(worker):
    worker.scorer.error = RuntimeError("once")
    large = many("t", 1000)  # its second half waits when the first fails
    worker.jobs.put(large)
    with pytest.raises(RuntimeError, match="once"):
        large.scores.result(10)
    worker.scorer.error = None
    assert worker.jobs.tokens == 0
    after = job("after")
    worker.jobs.put(after)
    assert after.scores.result(10)[0].reward == 5
    assert not worker.failures


def test_a_broken_gpu_ends_the_service_and_tells_everybody_to_come_back(worker):
    worker.scorer.gate.clear()
    first = job("first")
    worker.jobs.put(first)
    while len(worker.jobs):
        time.sleep(0.005)
    waiting = job("waiting")
    worker.jobs.put(waiting)
    worker.scorer.error, worker.scorer.broken = RuntimeError("CUDA error: illegal memory access"), True
    worker.scorer.gate.set()
    for one in (first, waiting):
        with pytest.raises(Closed, match="has failed and ends"):
            one.scores.result(10)
    worker.join(10)
    assert isinstance(worker.failures[0], DeviceBroken) and "illegal memory access" in str(worker.failures[0])
    with pytest.raises(Closed):
        worker.jobs.put(job("late"))


def test_models_that_cannot_be_loaded():
    def fails(**_):
        raise OSError("no such disk")

    failures = []
    one = Worker(read_settings({}), WorkQueue(10), Monitor(), pytest.fail, failures.append, fails)
    one.start()
    one.join(10)
    assert str(failures[0]) == "no such disk"


def test_closing_answers_everybody(worker):
    worker.scorer.gate.clear()
    jobs = [job("under way"), job("waiting")]
    worker.jobs.put(jobs[0])
    while len(worker.jobs):
        time.sleep(0.005)
    worker.jobs.put(jobs[1])
    assert worker.jobs.close("stopped") == 2
    for one in jobs:
        with pytest.raises(Closed, match="stopped"):
            one.scores.result(1)
    worker.scorer.gate.set()
    worker.join(10)
    assert not worker.is_alive() and not worker.failures


def test_the_summary_line():
    monitor = Monitor()
    assert monitor.summary(0) == "idle" and monitor.summary(0) is None
    monitor.answered(6)
    monitor.request("/score_batch", 200, 0.25)
    monitor.request("/score_batch", 429, 0.01)
    monitor.request("/health", 200, 0.01)
    monitor.departed(3)
    line = monitor.summary(2)
    assert line.startswith("6 texts in the last 0 s (")
    assert line.endswith(
        "2 waiting; requests by status 200: 1, 429: 1; seconds a request 0.25 (99 %: 0.25);"
        " 3 texts dropped, their clients had gone"
    )
    assert monitor.summary(0) == "idle" and monitor.summary(0) is None
