"""The scorer client against a service that misbehaves in every way the test asks for."""

from __future__ import annotations

import math
import socket
import threading
import time

import numpy as np
import pytest
from fake_scorer import FakeScorer, score_of

from alignment.errors import UserError
from alignment.scoring import client as client_module
from alignment.scoring.client import ScorerClient, ScorerUnavailable, Scores, difference

PROMPTS = [f"prompt {index}" for index in range(50)]
RESPONSES = [f"response {index}" for index in range(50)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("SCORER_AUTH", raising=False)


def expected(column: int) -> list[float]:
    return [score_of(prompt, response)[column] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def test_scores_come_in_order_and_in_chunks():
    with FakeScorer() as scorer:
        scores = ScorerClient(scorer.url + "/", batch_size=8).score(PROMPTS, RESPONSES, [True] * 49 + [False])
    assert scores.rewards.tolist() == expected(0)
    assert scores.costs.tolist() == expected(1)
    assert (scores.rewards.dtype, scores.rewards.shape) == (np.float64, (50,))
    assert sorted(len(body["prompts"]) for body in scorer.requests) == [2] + [8] * 6
    last = next(body for body in scorer.requests if "prompt 49" in body["prompts"])
    assert last["finished"] == [True, False]
    assert scores.errors == [None] * 50 and scores.truncated == [False] * 50


def test_nothing_to_score():
    with FakeScorer() as scorer:
        scores = ScorerClient(scorer.url).score([], [])
    assert scores.rewards.shape == (0,) and scorer.requests == []


@pytest.mark.parametrize("fault", [429, 502, 503, 504, None])
def test_what_passes_is_tried_again(fault):
    waits = []

    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number > 2 else fault) as scorer:
        client = ScorerClient(scorer.url, on_wait=waits.append)
        assert client.score(PROMPTS[:1], RESPONSES[:1]).rewards.tolist() == expected(0)[:1]
    assert len(scorer.requests) == 3
    assert len(waits) == 2 and waits == sorted(waits)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500])
def test_what_is_wrong_is_not_tried_again(status):
    with FakeScorer(lambda number, body: status) as scorer, pytest.raises(UserError, match=f"{status}: as the test"):
        ScorerClient(scorer.url).score(["a"], ["b"])
    assert len(scorer.requests) == 1


def test_a_scorer_that_stays_away():
    with FakeScorer() as scorer:
        client = ScorerClient(scorer.url, max_wait=0.3)
    began = time.monotonic()
    with pytest.raises(ScorerUnavailable, match=rf"{scorer.url} gave no answer for \d+ s; last error: .*refused"):
        client.score(["a"], ["b"])
    assert time.monotonic() - began < 5


def test_a_port_that_accepts_and_never_answers():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        client = ScorerClient(f"http://127.0.0.1:{silent.getsockname()[1]}", max_wait=0.5)
        with pytest.raises(ScorerUnavailable, match="ReadTimeout"):
            client.score(["a"], ["b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answer: answer["rewards"].append(0.0), "asked for 3 rewards, got 4"),
        (lambda answer: answer["costs"].pop(), "asked for 3 costs, got 2"),
        (lambda answer: answer.pop("costs"), "asked for 3 costs, got none"),
        (lambda answer: answer.update(errors=[None]), "asked for 3 errors, got 1"),
        (lambda answer: answer["rewards"].__setitem__(1, math.nan), r"rewards\[1\] is nan"),
        (lambda answer: answer["costs"].__setitem__(2, math.inf), r"costs\[2\] is inf"),
        (lambda answer: answer["costs"].__setitem__(0, "1"), r"costs\[0\] is '1'"),
        (lambda answer: answer["costs"].__setitem__(0, True), r"costs\[0\] is True"),
    ],
)
def test_answers_that_do_not_fit_are_refused(change, message):
    def answer(number, body):
        scores = FakeScorer.scores(body)
        change(scores)
        return scores

    with FakeScorer(answer) as scorer, pytest.raises(UserError, match=message):
        ScorerClient(scorer.url).score(PROMPTS[:3], RESPONSES[:3])
    assert len(scorer.requests) == 1


def test_a_missing_score_is_nan_with_a_reason():
    def answer(number, body):
        scores = FakeScorer.scores(body)
        scores["rewards"][1] = scores["costs"][2] = None
        return scores | {"errors": [None, "reward is nan", None], "truncated": [True, False, False]}

    with FakeScorer(answer) as scorer:
        scores = ScorerClient(scorer.url).score(PROMPTS[:3], RESPONSES[:3])
    assert np.isnan(scores.rewards).tolist() == [False, True, False]
    assert np.isnan(scores.costs).tolist() == [False, False, True]
    assert scores.errors == [None, "reward is nan", "the scorer gave null for costs and no reason"]
    assert scores.truncated == [True, False, False]


def test_another_identity_is_an_error():
    with FakeScorer() as scorer:
        client = ScorerClient(scorer.url)
        assert client.wait_until_ready() == client.identity() == scorer.identity
        scorer.identity = scorer.identity | {"dtype": "bfloat16"}
        with pytest.raises(UserError, match="dtype was 'float32', is 'bfloat16'"):
            client.wait_until_ready()


def test_what_changed_is_said_by_key():
    known = {"cost_model": {"name": "c", "weights": "a"}, "dtype": "float32"}
    now = {"cost_model": {"name": "c", "weights": "b"}, "dtype": "float32", "template": "pku"}
    assert difference(known, now) == "cost_model.weights was 'a', is 'b', template was None, is 'pku'"


def test_a_service_without_identity_is_no_scorer():
    with FakeScorer() as scorer:
        scorer.identity = None
        with pytest.raises(UserError, match="names no identity"):
            ScorerClient(scorer.url).score(["a"], ["b"])


def test_several_threads_share_a_client():
    with FakeScorer() as scorer:
        client = ScorerClient(scorer.url, batch_size=3)
        results = {}

        def ask(start: int) -> None:
            results[start] = client.score(PROMPTS[start : start + 20], RESPONSES[start : start + 20])

        threads = [threading.Thread(target=ask, args=(start,)) for start in range(0, 30, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for start, scores in results.items():
        assert scores.rewards.tolist() == expected(0)[start : start + 20]
    assert len(results) == 6


def test_what_on_wait_raises_ends_the_wait():
    class Stop(Exception):
        pass

    def on_wait(seconds):
        raise Stop

    with FakeScorer(lambda number, body: 503) as scorer, pytest.raises(Stop):
        ScorerClient(scorer.url, on_wait=on_wait).score(["a"], ["b"])


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost", "ftp://host", "http://", ""])
def test_a_url_without_scheme_or_host(url):
    with pytest.raises(UserError, match="expected something like http://127"):
        ScorerClient(url)


def test_unequal_lists_and_bad_sizes():
    with pytest.raises(UserError, match="batch size is 0"):
        ScorerClient("http://127.0.0.1:1", batch_size=0)
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        ScorerClient("http://127.0.0.1:1").score(["a", "b"], ["c"])


def test_scores_join_in_order():
    parts = [Scores(np.array([float(i)]), np.array([-float(i)]), [None], [bool(i)]) for i in range(2)]
    joined = Scores.joined(parts)
    assert (joined.rewards.tolist(), joined.costs.tolist(), joined.truncated) == ([0, 1], [0, -1], [False, True])
