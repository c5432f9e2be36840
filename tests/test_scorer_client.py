"""The scorer client against a service that misbehaves in every way the test asks for."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time

import numpy as np
import pytest
from fake_scorer import FakeScorer, score_of

from alignment.errors import UserError
from alignment.scoring import client as client_module
from alignment.scoring import connection
from alignment.scoring.client import ScorerClient, ScorerUnavailable
from alignment.scoring.discovery import Publication, address_path, own_address, write_secret
from alignment.scoring.scores import Scores, difference

PROMPTS = [f"prompt {index}" for index in range(50)]
RESPONSES = [f"response {index}" for index in range(50)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client_module, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(client_module, "PAUSE_AFTER_FAILED", 0.01)
    for name in ("SCORER_AUTH", "SCORER_TOKEN_FILE", "EXPERIMENT_ID", "SCORER_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


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


@pytest.mark.parametrize("fault", [429, 500, 502, 503, 504, None])
def test_what_passes_is_tried_again(fault):
    waits = []

    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number > 2 else fault) as scorer:
        client = ScorerClient(scorer.url, on_wait=waits.append)
        assert client.score(PROMPTS[:1], RESPONSES[:1]).rewards.tolist() == expected(0)[:1]
    assert len(scorer.requests) == 3
    assert len(waits) == 2 and waits == sorted(waits)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_is_wrong_is_not_tried_again(status):
    with FakeScorer(lambda number, body: status) as scorer, pytest.raises(UserError, match=f"{status}: as the test"):
        ScorerClient(scorer.url).score(["a"], ["b"])
    assert len(scorer.requests) == 1


def test_a_scorer_that_only_fails_is_given_up_in_its_own_words(monkeypatch):
    pauses = []
    pause = client_module._Call.pause
    monkeypatch.setattr(
        client_module._Call,
        "pause",
        lambda call, waited, seconds: (pauses.append(seconds), pause(call, waited, seconds)),
    )
    with FakeScorer(lambda number, body: 500) as scorer:
        with pytest.raises(
            UserError, match=f"{scorer.url} has failed 7 times, the last one 500: as the test"
        ) as caught:
            ScorerClient(scorer.url).score(["a"], ["b"])
        assert not isinstance(caught.value, ScorerUnavailable)
    assert len(scorer.requests) == 7 and len(pauses) == 6
    assert pauses[-1] > 10 * pauses[0]


def test_one_scorer_fails_and_another_does_not():
    with FakeScorer(lambda number, body: 500) as bad, FakeScorer() as good:
        client = ScorerClient([bad.url, good.url], batch_size=1)
        assert client.score(PROMPTS, RESPONSES).rewards.tolist() == expected(0)
        assert bad.requests


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


def test_what_was_measured_at_the_start_does_not_make_another_scorer():
    with FakeScorer() as scorer:
        scorer.identity = scorer.identity | {"fp8": True, "fp8_error": {"reward_max": 0.01}}
        client = ScorerClient(scorer.url, expected_identity=scorer.identity | {"fp8_error": {"reward_max": 0.02}})
        assert client.wait_until_ready()["fp8_error"] == {"reward_max": 0.01}
        scorer.identity = {key: value for key, value in scorer.identity.items() if key != "fp8"}
        with pytest.raises(UserError, match=r": fp8 was True, is None; the run began with the former"):
            client.wait_until_ready()


def test_a_resumed_run_expects_the_identity_that_it_began_with():
    with FakeScorer() as scorer:
        client = ScorerClient(scorer.url, expected_identity=scorer.identity | {"dtype": "bfloat16"})
        for ask in (client.wait_until_ready, lambda: client.score(["a"], ["b"])):
            with pytest.raises(UserError, match="dtype was 'bfloat16', is 'float32'; the run began with the former"):
                ask()
        client = ScorerClient(scorer.url, expected_identity=dict(scorer.identity))
        assert client.score(["a"], ["b"]).errors == [None]


def test_whole_texts():
    def answer(number, body):
        assert body == {"texts": ["a b", "c"], "finished": [False, True]}
        return {
            "rewards": [1.0, 2.0],
            "costs": [3.0, None],
            "errors": [None, "cost is nan"],
            "truncated": [True, False],
        }

    with FakeScorer(answer) as scorer:
        scores = ScorerClient(scorer.url).score_texts(["a b", "c"], [False, True])
    assert scores.rewards.tolist() == [1, 2] and scores.errors == [None, "cost is nan"]
    assert scores.costs[0] == 3 and np.isnan(scores.costs[1]) and scores.truncated == [True, False]


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


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "localhost", "ftp://host", "http://", "", "http://host:99999", "http://[::1", "http://a:1,", []],
)
def test_a_url_without_scheme_or_host(url):
    with pytest.raises(UserError, match="expected something like http://127"):
        ScorerClient(url)


def test_unequal_lists_and_bad_sizes():
    with pytest.raises(UserError, match="batch size is 0"):
        ScorerClient("http://127.0.0.1:1", batch_size=0)
    with pytest.raises(UserError, match="concurrency is 0"):
        ScorerClient("http://127.0.0.1:1", concurrency=0)
    with pytest.raises(ValueError, match="2 prompts, 1 responses"):
        ScorerClient("http://127.0.0.1:1").score(["a", "b"], ["c"])


def test_scores_join_in_order():
    parts = [Scores(np.array([float(i)]), np.array([-float(i)]), [None], [bool(i)]) for i in range(2)]
    joined = Scores.joined(parts)
    assert (joined.rewards.tolist(), joined.costs.tolist(), joined.truncated) == ([0, 1], [0, -1], [False, True])


def test_chunks_are_under_way_together():
    """Four chunks meet at the scorer: each waits there until all have come."""
    gate = threading.Barrier(4, timeout=10)

    def answer(number, body):
        gate.wait()
        return FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        scores = ScorerClient(scorer.url, batch_size=5, concurrency=4).score(PROMPTS[:40], RESPONSES[:40])
    assert scores.rewards.tolist() == expected(0)[:40]


def test_one_bad_chunk_ends_the_call():
    def answer(number, body):
        return 422 if "prompt 3" in body["prompts"] else FakeScorer.scores(body)

    with FakeScorer(answer) as scorer, pytest.raises(UserError, match="422: as the test wants"):
        ScorerClient(scorer.url, batch_size=1).score(PROMPTS, RESPONSES)
    assert len(scorer.requests) < 50


def test_what_on_wait_raises_ends_a_call_of_many_chunks_at_once():
    """Also while other chunks hang in requests that nobody answers."""
    release = threading.Event()
    caller = threading.get_ident()

    class Stop(Exception):
        pass

    def on_wait(seconds):
        assert threading.get_ident() == caller
        raise Stop

    def answer(number, body):
        if "prompt 0" in body["prompts"]:
            return 503
        release.wait(20)
        return FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        client = ScorerClient(scorer.url, batch_size=1, on_wait=on_wait)
        began = time.monotonic()
        with pytest.raises(Stop):
            client.score(PROMPTS[:8], RESPONSES[:8])
        assert time.monotonic() - began < 5
        release.set()


def test_a_call_has_a_deadline():
    with FakeScorer(lambda number, body: 503) as scorer:
        client = ScorerClient(scorer.url, batch_size=1, deadline=0.3)
        began = time.monotonic()
        with pytest.raises(ScorerUnavailable, match=r"not done after 0\.3 s; last error: 503"):
            client.score(PROMPTS[:3], RESPONSES[:3])
        assert time.monotonic() - began < 5


def test_a_scorer_that_answers_others_is_not_away():
    """One chunk is refused for longer than max_wait while the others get their scores: that is load, not absence."""
    began = time.monotonic()

    def answer(number, body):
        time.sleep(0.02)
        return 429 if "prompt 0" in body["prompts"] and time.monotonic() - began < 0.8 else FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        client = ScorerClient(scorer.url, batch_size=1, max_wait=0.5)
        assert client.score(PROMPTS, RESPONSES).rewards.tolist() == expected(0)


def test_the_wait_that_the_scorer_asks_for(monkeypatch):
    slept = []
    monkeypatch.setattr(client_module.time, "sleep", lambda seconds: slept.append(seconds))
    endpoint_ask = connection.Endpoint.ask
    refusals = iter([3.0, 7.0])

    def ask(self, method, path, body, timeout):
        if method == "POST" and (pause := next(refusals, None)) is not None:
            raise connection.Retry("429: full", pause)
        return endpoint_ask(self, method, path, body, timeout)

    monkeypatch.setattr(connection.Endpoint, "ask", ask)
    with FakeScorer() as scorer:
        ScorerClient(scorer.url).score(["a"], ["b"])
    assert [round(seconds) for seconds in slept[:1]] == [3]


def test_several_scorers_share_the_work():
    def slow(number, body):
        time.sleep(0.1)
        return FakeScorer.scores(body)

    with FakeScorer() as quick_one, FakeScorer(slow) as slow_one:
        client = ScorerClient([quick_one.url, slow_one.url], batch_size=1)
        scores = client.score(PROMPTS, RESPONSES)
        assert client.url == f"{quick_one.url}, {slow_one.url}"
    assert scores.rewards.tolist() == expected(0)
    assert len(quick_one.requests) + len(slow_one.requests) == 50
    assert len(quick_one.requests) > len(slow_one.requests) > 0


def test_one_of_several_goes_away_and_comes_back():
    with FakeScorer() as stays, FakeScorer() as goes:
        client = ScorerClient(f"{stays.url}, {goes.url}", batch_size=1)
        client.score(PROMPTS, RESPONSES)
        port = int(goes.url.rsplit(":", 1)[1])
        goes.stop()
        scores = client.score(PROMPTS, RESPONSES)
        assert scores.rewards.tolist() == expected(0)
        with FakeScorer(port=port) as back:
            time.sleep(0.1)
            for _ in range(5):
                client.score(PROMPTS, RESPONSES)
            assert back.requests
            back.identity = {"dtype": "float16"}
            with pytest.raises(UserError, match="dtype was 'float32', is 'float16'"):
                client.wait_until_ready()


def test_one_of_several_that_hangs_is_left_alone_while_another_answers():
    """It was asked again after a pause of seconds, and each time a chunk waited for its whole timeout."""
    release = threading.Event()

    def hang(number, body):
        release.wait(20)
        return FakeScorer.scores(body)

    def ask(calls: int) -> float:
        """The longest of so many calls, in seconds."""
        longest = 0.0
        for _ in range(calls):
            began = time.monotonic()
            assert client.score(PROMPTS[:8], RESPONSES[:8]).rewards.tolist() == expected(0)[:8]
            longest = max(longest, time.monotonic() - began)
        return longest

    with FakeScorer(hang) as hangs, FakeScorer() as answers:
        client = ScorerClient([hangs.url, answers.url], batch_size=1, timeout=1.0, concurrency=2)
        assert ask(1) >= 1
        asked, hung = len(hangs.requests), client._endpoints[0]
        assert 1 <= asked <= 4 and 0.5 < hung.avoided_until - time.monotonic() <= 1
        hung.avoided_until += 20  # however long the next calls take here
        assert ask(3) < 1 and len(hangs.requests) == asked
        hung.avoided_until = 0.0  # its time is over: one chunk tries it
        assert ask(1) >= 1 and len(hangs.requests) == asked + 1
        assert 1.5 < hung.avoided_until - time.monotonic() <= 2  # and it is left alone for longer
        release.set()
        assert ask(1) < 1 and len(hangs.requests) == asked + 1
        hung.avoided_until = 0.0
        ask(3)
        assert len(hangs.requests) > asked + 3 and hung.avoided == 0.0  # it takes its share again


def test_after_all_have_hung_none_is_left_alone_for_long():
    """As when the network is away: what is there again must not be avoided for many times the timeout."""
    away = threading.Event()
    away.set()

    def answer(number, body):
        while away.is_set():
            time.sleep(0.01)
        return FakeScorer.scores(body)

    def on_wait(seconds):
        if seconds > 3:
            away.clear()

    with FakeScorer(answer) as one, FakeScorer(answer) as two:
        client = ScorerClient([one.url, two.url], batch_size=10, timeout=1.0, on_wait=on_wait)
        assert client.score(PROMPTS, RESPONSES).rewards.tolist() == expected(0)
        assert max(endpoint.avoided for endpoint in client._endpoints) <= 2


def test_one_of_several_is_away_from_the_start():
    with socket.socket() as silent, FakeScorer() as scorer:
        silent.bind(("127.0.0.1", 0))  # refuses connections
        client = ScorerClient([f"http://127.0.0.1:{silent.getsockname()[1]}", scorer.url], batch_size=10)
        assert client.wait_until_ready() == scorer.identity
        assert client.score(PROMPTS, RESPONSES).rewards.tolist() == expected(0)


def test_several_scorers_must_be_alike():
    with FakeScorer() as one, FakeScorer() as other:
        other.identity = other.identity | {"max_length": 5}
        with pytest.raises(UserError, match="max_length was None, is 5"):
            ScorerClient([one.url, other.url]).wait_until_ready()


def test_tokens(tmp_path, monkeypatch):
    with FakeScorer() as scorer:
        scorer.token = "a"
        with pytest.raises(UserError, match="401: this scorer wants its token"):
            ScorerClient(scorer.url).score(["a"], ["b"])
        with pytest.raises(UserError, match="401"):
            ScorerClient(scorer.url, token="wrong").score(["a"], ["b"])
        assert ScorerClient(scorer.url, token="a").score(["a"], ["b"]).errors == [None]
        monkeypatch.setenv("SCORER_AUTH", "a")
        assert ScorerClient(scorer.url).score(["a"], ["b"]).errors == [None]
        monkeypatch.delenv("SCORER_AUTH")
        write_secret(tmp_path / "token", "a")
        monkeypatch.setenv("SCORER_TOKEN_FILE", str(tmp_path / "token"))
        client = ScorerClient(scorer.url)
        assert client.score(["a"], ["b"]).errors == [None]
        # A restarted scorer has another one: the file is read again.
        scorer.token = "b"
        write_secret(tmp_path / "token", "b")
        assert client.score(["a"], ["b"]).errors == [None]


def publish(logs, scorer: FakeScorer, token: str | None = None) -> Publication:
    scorer.instance, scorer.token = f"instance of {scorer.url}", token
    address = own_address(scorer.url, scorer.instance, {"EXPERIMENT_ID": "e"})
    publication = Publication(address_path(logs, address), address, token)
    publication.write(scorer.identity)
    return publication


def test_auto_finds_the_scorer_and_finds_it_again_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGS_DIR", str(tmp_path))
    monkeypatch.setenv("EXPERIMENT_ID", "e")
    client = ScorerClient("auto", batch_size=5)
    with FakeScorer() as first:
        publish(tmp_path, first, "first token")
        assert client.score(PROMPTS, RESPONSES).rewards.tolist() == expected(0)
        assert client.url == first.url
    waits = []

    with FakeScorer() as second, FakeScorer() as stranger:
        stranger.identity = stranger.identity | {"dtype": "float16"}
        publish(tmp_path, stranger)

        def on_wait(seconds):
            waits.append(seconds)
            if len(waits) == 3:
                publish(tmp_path, second, "second token")

        client.on_wait = on_wait
        assert client.score(PROMPTS, RESPONSES).rewards.tolist() == expected(0)
        assert client.url == second.url and stranger.requests == []
        # Restarted at the same address with another token.
        publish(tmp_path, second, "third token")
        assert client.score(PROMPTS, RESPONSES).rewards.tolist() == expected(0)
    assert len(waits) >= 3


def test_auto_keeps_to_its_scorer_when_another_fits_too(tmp_path, monkeypatch):
    """One dropped connection, after a second experiment's scorer with the same models came up, ended the run."""
    monkeypatch.setenv("LOGS_DIR", str(tmp_path))
    dropped = []

    def drop_one(number, body):
        if number == 2 and not dropped:
            return dropped.append(number)
        return FakeScorer.scores(body)

    with FakeScorer(drop_one) as mine, FakeScorer() as other:
        publish(tmp_path, mine)
        client = ScorerClient("auto")
        client.score(PROMPTS[:1], RESPONSES[:1])
        publish(tmp_path, other)
        assert client.score(PROMPTS[:2], RESPONSES[:2]).rewards.tolist() == expected(0)[:2]
        assert dropped and client.url == mine.url and other.requests == []


def test_auto_waits_for_its_scorer_when_several_others_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGS_DIR", str(tmp_path))
    with FakeScorer() as mine:
        publish(tmp_path, mine)
        client = ScorerClient("auto", max_wait=20)
        client.score(PROMPTS[:1], RESPONSES[:1])
    waits = []
    with FakeScorer() as one, FakeScorer() as two, contextlib.ExitStack() as stack:
        publish(tmp_path, one)
        publish(tmp_path, two)

        def on_wait(seconds):
            waits.append(seconds)
            if len(waits) == 3:
                publish(tmp_path, stack.enter_context(FakeScorer(port=int(mine.url.rsplit(":", 1)[1]))))

        client.on_wait = on_wait
        assert client.score(PROMPTS[:2], RESPONSES[:2]).rewards.tolist() == expected(0)[:2]
        assert client.url == mine.url and one.requests == two.requests == []


def test_auto_without_a_scorer(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGS_DIR", str(tmp_path))
    with pytest.raises(
        ScorerUnavailable, match=r"scorer auto gave no answer for 0 s; last error: no scorer answers in"
    ):
        ScorerClient("auto", max_wait=0.2).wait_until_ready()
    with FakeScorer() as one, FakeScorer() as two:
        publish(tmp_path, one)
        publish(tmp_path, two)
        with pytest.raises(UserError, match="2 scorers fit"):
            ScorerClient("auto").wait_until_ready()


@pytest.mark.parametrize(
    ("terminal", "on_wait", "said"), [(False, False, 1), (False, True, 1), (True, False, 1), (True, True, 0)]
)
def test_waiting_is_said_once_a_minute_where_nobody_shows_it(monkeypatch, capsys, terminal, on_wait, said):
    """Not by trainers on a terminal, whose bar does; a job's log has no bar."""
    monkeypatch.setattr(client_module, "SAY_AFTER", 0.0)
    monkeypatch.setattr(client_module, "watched", lambda: terminal)
    waits = []
    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number > 5 else 503) as scorer:
        ScorerClient(scorer.url, on_wait=waits.append if on_wait else None).score(["a"], ["b"])
    assert capsys.readouterr().err == said * "waiting for the scorer, 0 min (503: as the test wants)\n"
    assert bool(waits) == on_wait


def test_an_answer_that_is_no_json_or_cut_off():
    class Raw:
        """Answers every request on a raw socket with the same bytes."""

        def __init__(self, reply: bytes) -> None:
            self.socket = socket.create_server(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
            threading.Thread(target=self.serve, args=(reply,), daemon=True).start()

        def serve(self, reply: bytes) -> None:
            while True:
                try:
                    peer, _ = self.socket.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(65536)
                    peer.sendall(reply)

    for reply in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"not http at all\r\n",
    ):
        raw = Raw(reply)
        with pytest.raises(ScorerUnavailable, match="gave no answer"):
            ScorerClient(raw.url, max_wait=0.1).score(["a"], ["b"])
        raw.socket.close()
