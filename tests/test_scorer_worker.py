"""The scorer's queue and its worker: bounds, turns, repeated texts, departed clients, failures. No models, no HTTP."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
from scorer_process import StubPending, StubScorer

from alignment.scoring import worker as module
from alignment.scoring.local_scorer import Conversation, LocalScorer
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


class LaterScorer(StubScorer):
    """Its rounds are queued at once and done when the test says so: in order, as on a GPU, or with an error."""

    round_tokens = 10

    def __init__(self, **_) -> None:
        super().__init__()
        self.queued: list[Later] = []

    def queue_encoded(self, conversations: list[Conversation]) -> Later:
        later = Later(super().queue_encoded(conversations).conversations)
        self.queued.append(later)
        return later


class Later(StubPending):
    """Scores that are there once `done` is set; `error` instead of them when there is one."""

    def __init__(self, conversations: list[Conversation]) -> None:
        super().__init__(conversations)
        self.done, self.error = threading.Event(), None

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self.done.set()

    def result(self):
        assert self.done.wait(20)
        if self.error is not None:
            raise self.error
        return super().result()


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def ahead():
    """A running worker whose rounds of ten tokens are queued behind each other."""
    ready, failures = threading.Event(), []
    one = Worker(read_settings({}), WorkQueue(10_000), Monitor(), lambda _: ready.set(), failures.append, LaterScorer)
    one.failures = failures
    one.start()
    assert ready.wait(10)
    yield one
    one.jobs.end()
    end = time.monotonic() + 10
    while one.is_alive() and time.monotonic() < end:
        for later in one.scorer.queued:
            later.done.set()
        one.join(0.01)
    assert not one.is_alive()


def put(worker, *texts: str) -> Job:
    one = job(*texts)
    worker.jobs.put(one)
    return one


def figures(worker) -> dict[str, float]:
    return {
        outcome: worker.monitor.texts.labels(outcome)._value.get() for outcome in ("scored", "repeated", "answered")
    }


def test_one_round_is_queued_behind_the_one_under_way_and_not_more(ahead):
    jobs = [put(ahead, name * 10) for name in "abcd"]
    queued = ahead.scorer.queued
    until(lambda: len(queued) == 2)
    time.sleep(0.05)
    assert ahead.scorer.rounds == [["a" * 10], ["b" * 10]] and len(ahead.jobs) == 2
    queued[1].end()  # it cannot be answered before the first
    time.sleep(0.05)
    assert not any(one.scores.done() for one in jobs)
    queued[0].end()
    assert [score.reward for one in jobs[:2] for score in one.scores.result(10)] == [10, 10]
    until(lambda: len(queued) == 4)
    queued[2].end()
    assert jobs[2].scores.result(10) and not jobs[3].scores.done()
    queued[3].end()
    assert jobs[3].scores.result(10)
    assert figures(ahead) == {"scored": 4, "repeated": 0, "answered": 4}
    assert ahead.monitor.texts_answered == 4 and ahead.jobs.tokens == 0


def test_a_request_of_several_rounds_has_its_scores_in_order(ahead):
    one = put(ahead, *("x" * (1 + index % 7) + str(index) for index in range(60)))
    for count in range(1, 100):
        if one.scores.done():
            break
        until(lambda count=count: one.scores.done() or len(ahead.scorer.queued) >= count)
        ahead.scorer.queued[min(count, len(ahead.scorer.queued)) - 1].end()
    assert [score.reward for score in one.scores.result(10)] == [len(text.reward_ids) for text in one.conversations]
    assert all(sum(map(len, texts)) <= 10 for texts in ahead.scorer.rounds)
    assert [text for texts in ahead.scorer.rounds for text in texts] == [
        bytes(text.reward_ids).decode() for text in one.conversations
    ]


def test_a_round_that_fails_on_the_gpu_ends_its_requests_only(ahead):
    first, second, third = (put(ahead, name * 10) for name in "abc")
    queued = ahead.scorer.queued
    until(lambda: len(queued) == 2)
    queued[0].end(RuntimeError("once"))
    with pytest.raises(RuntimeError, match="once"):
        first.scores.result(10)
    queued[1].end()
    until(lambda: len(queued) == 3)
    queued[2].end()
    assert second.scores.result(10)[0].reward == third.scores.result(10)[0].reward == 10
    assert not ahead.failures and figures(ahead) == {"scored": 2, "repeated": 0, "answered": 2}


def test_a_round_that_cannot_be_queued_ends_its_requests_only(ahead):
    first = put(ahead, "a" * 10)
    until(lambda: len(ahead.scorer.queued) == 1)
    ahead.scorer.error = RuntimeError("out of memory")
    second = put(ahead, "b" * 10)
    with pytest.raises(RuntimeError, match="out of memory"):  # while the first is still under way
        second.scores.result(10)
    ahead.scorer.error = None
    third = put(ahead, "c" * 10)
    until(lambda: len(ahead.scorer.queued) == 2)
    for later in ahead.scorer.queued:
        later.end()
    assert first.scores.result(10) and third.scores.result(10)
    assert not ahead.failures


def test_a_text_that_is_under_way_is_not_scored_twice(ahead):
    queued = ahead.scorer.queued
    first = put(ahead, "a" * 8)
    until(lambda: len(queued) == 1)
    second = put(ahead, "b", "a" * 8, "b")
    until(lambda: len(queued) == 2)
    third = put(ahead, "a" * 8, "b")
    for at in range(3):
        until(lambda at=at: len(queued) > at)
        queued[at].end()
    assert [score.reward for one in (first, second, third) for score in one.scores.result(10)] == [8, 1, 8, 1, 8, 1]
    assert ahead.scorer.rounds == [["a" * 8], ["b"], []]
    assert (first.cached, second.cached, third.cached) == (0, 2, 2)
    assert figures(ahead) == {"scored": 2, "repeated": 4, "answered": 6}


def test_what_was_to_come_from_a_failed_round_is_scored_again(ahead):
    first, second = put(ahead, "a" * 9, "b"), put(ahead, "a" * 9)
    queued = ahead.scorer.queued
    until(lambda: len(queued) == 2)
    assert ahead.scorer.rounds == [["a" * 9, "b"], []]
    queued[1].end()
    queued[0].end(RuntimeError("once"))
    with pytest.raises(RuntimeError, match="once"):
        first.scores.result(10)
    until(lambda: len(queued) == 3)
    assert ahead.scorer.rounds[2] == ["a" * 9]
    queued[2].end()
    assert second.scores.result(10)[0].reward == 9
    assert second.cached == 0 and figures(ahead) == {"scored": 1, "repeated": 0, "answered": 1}


def test_a_gpu_that_breaks_ends_the_service_with_two_rounds_under_way(ahead):
    jobs = [put(ahead, name * 10) for name in "abc"]
    until(lambda: len(ahead.scorer.queued) == 2)
    ahead.scorer.broken = True
    ahead.scorer.queued[0].end(RuntimeError("CUDA error: illegal memory access"))
    for one in jobs:
        with pytest.raises(Closed, match="has failed and ends"):
            one.scores.result(10)
    ahead.join(10)
    assert not ahead.is_alive()
    assert len(ahead.failures) == 1 and isinstance(ahead.failures[0], DeviceBroken)
    with pytest.raises(Closed):
        put(ahead, "late")


def test_the_end_waits_for_both_rounds_and_for_what_is_queued(ahead):
    jobs = [put(ahead, name * 10) for name in "abcd"]
    until(lambda: len(ahead.scorer.queued) == 2)
    ahead.jobs.end()
    ahead.join(0.05)
    assert ahead.is_alive()
    for at in range(4):
        until(lambda at=at: len(ahead.scorer.queued) > at)
        ahead.scorer.queued[at].end()
    assert [one.scores.result(10)[0].reward for one in jobs] == [10] * 4
    ahead.join(10)
    assert not ahead.is_alive() and not ahead.failures


def test_a_client_that_departs_with_its_round_under_way_is_not_counted_as_answered(ahead):
    stays, gone, waits = (put(ahead, name * 10) for name in "abc")
    queued = ahead.scorer.queued
    until(lambda: len(queued) == 2)
    for one in (gone, waits):
        assert ahead.jobs.forget(one)
        one.scores.cancel()
    for later in queued:
        later.end()
    assert stays.scores.result(10)
    after = put(ahead, "d")
    until(lambda: len(queued) == 3)
    queued[2].end()
    assert after.scores.result(10)
    assert ahead.scorer.rounds == [["a" * 10], ["b" * 10], ["d"]]
    assert figures(ahead) == {"scored": 3, "repeated": 0, "answered": 2}


def test_a_round_has_its_tokens_and_a_cut_turn_goes_on_in_the_next():
    queue = WorkQueue(10**6)
    first, second = job("aaaa", "bbbb", "cccc"), job("d" * 50, "e")
    queue.put(first)
    queue.put(second)
    rounds = []
    while len(queue):
        rounds.append([[bytes(one.reward_ids).decode() for one in part] for _, part in queue.take(9)])
    assert rounds == [[["aaaa", "bbbb"]], [["cccc"]], [["d" * 50]], [["e"]]]
    assert queue.tokens == 0
    large, small = many("t", 300), job("s")
    queue.put(large)
    queue.put(small)
    order = []
    while len(queue):
        order += [("small" if one is small else "large", len(part)) for one, part in queue.take(300)]
    before = sum(count for name, count in order[: order.index(("small", 1))])
    assert before == module.SLICE and sum(count for name, count in order if name == "large") == 300


def test_scores_of_queued_rounds_are_those_of_the_plain_path(tiny_scorers):
    def answers(round_tokens: int | None) -> list:
        def load(**_):
            scorer = LocalScorer(*tiny_scorers)
            scorer.round_tokens = round_tokens
            return scorer

        ready = threading.Event()
        one = Worker(read_settings({}), WorkQueue(10**6), Monitor(), lambda _: ready.set(), pytest.fail, load)
        one.start()
        assert ready.wait(60)
        jobs = [Job([one.scorer.encode(f"p{at % 5}", "word " * (at % 9) + name) for at in range(90)]) for name in "ab"]
        jobs.append(Job(jobs[0].conversations[::-1]))
        for job_ in jobs:
            one.jobs.put(job_)
        rows = [job_.scores.result(60) for job_ in jobs]
        assert jobs[2].cached == 90
        one.jobs.end()
        one.join(10)
        assert not one.is_alive()
        return rows

    assert answers(200) == answers(None)
