"""The scorer's HTTP interface with a stub in place of the models: limits, backpressure, departures, tokens, logs, metrics."""

from __future__ import annotations

import asyncio
import html.parser
import json
import logging
import socket
import threading
import time

import pytest
import requests
from scorer_process import HELLO, StubScorer, in_process

from alignment.errors import UserError
from alignment.scoring import http_app
from alignment.scoring.client import ScorerClient
from alignment.scoring.discovery import Publication, ScorerNotFound, address_path, find_scorer, own_address
from alignment.scoring.http_app import BadRequest, Intake
from alignment.scoring.monitor import Monitor
from alignment.scoring.service_settings import Limits

SMALL = {
    "SCORER_MAX_BODY": "20000",
    "SCORER_MAX_TEXTS": "50",
    "SCORER_MAX_CHARACTERS": "1000",
    "SCORER_MAX_QUEUED_TOKENS": "300",
    "SCORER_MAX_REQUESTS": "4",
}


@pytest.fixture(scope="module")
def small():
    """A service with narrow limits: (worker, url)."""
    with in_process(stub=True, **SMALL) as one:
        yield one


def post(url: str, body, path: str = "/score_texts", **more) -> requests.Response:
    return requests.post(url + path, json=body, timeout=20, **more)


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Held:
    """Holds the stub's scoring up and sends requests that wait meanwhile."""

    def __init__(self, worker, url) -> None:
        self.worker, self.url, self.answers, self.threads = worker, url, [], []

    def send(self, *texts: str) -> None:
        before = len(self.worker.jobs._open)
        thread = threading.Thread(target=lambda: self.answers.append(post(self.url, {"texts": list(texts)})))
        thread.start()
        self.threads.append(thread)
        until(lambda: len(self.worker.jobs._open) > before)

    def __enter__(self):
        self.worker.scorer.gate.clear()
        self.send("holds the worker")
        until(lambda: len(self.worker.jobs) == 0)
        return self

    def __exit__(self, *_):
        self.worker.scorer.gate.set()
        for thread in self.threads:
            thread.join(20)
        until(lambda: self.worker.monitor.under_way._value.get() == 0)


@pytest.mark.parametrize("round_tokens", [None, 100])
def test_health_says_when_a_round_does_not_end(monkeypatch, tmp_path, round_tokens):
    monkeypatch.setattr(StubScorer, "round_tokens", round_tokens)
    with in_process(stub=True, SCORER_STUCK_SECONDS="1") as (worker, url):
        address = own_address(url, "instance", {})
        Publication(address_path(tmp_path, address), address, None).write(worker.scorer.identity())

        def health() -> tuple[int, str]:
            reply = requests.get(url + "/health", timeout=10)
            assert reply.json()["identity"] == worker.scorer.identity()
            return reply.status_code, reply.json()["status"]

        with Held(worker, url):
            assert health() == (200, "healthy")
            until(lambda: health() == (503, "stuck"))
            assert requests.get(url + "/health", timeout=10).json()["detail"].startswith("the models have been at one")
            with pytest.raises(
                ScorerNotFound, match="the models have been at one round for 1 s, more than SCORER_STUCK_"
            ):
                find_scorer(tmp_path)
        assert health() == (200, "healthy")
        worker.scorer.error = RuntimeError("out of memory")
        assert post(url, {"texts": ["fails"]}).status_code == 500
        assert worker.monitor.seconds_in_round() == 0  # a round that failed has ended
        worker.scorer.error = None
        assert find_scorer(tmp_path).url == url


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"texts": ["a"] * 51}, "51 texts, the limit is 50 a request (SCORER_MAX_TEXTS)"),
        ({"texts": ["a", "b" * 1001]}, "texts[1]: 1001 characters, the limit is 1000 a text (SCORER_MAX_CHARACTERS)"),
        ({"texts": ["a" * 900] * 25}, "more than 20000 bytes: ask for fewer texts at a time"),
        ({"texts": ["a" * 100] * 4}, "400 tokens in one request, the queue holds 300: ask for fewer texts"),
    ],
)
def test_too_much_in_one_request(small, body, line):
    answer = post(small[1], body)
    assert (answer.status_code, answer.json()["detail"]) == (413, line)
    assert post(small[1], {"texts": ["a" * 100] * 3}).status_code == 200


def test_a_prompt_and_its_response_are_one_text(small):
    pair = {"prompts": ["a" * 600], "responses": ["b" * 600]}
    answer = post(small[1], pair, "/score_batch")
    assert answer.status_code == 413 and answer.json()["detail"].startswith("prompts[0]: 1200 characters")


def test_a_refused_body_is_read_so_that_its_client_sees_the_refusal(small):
    assert post(small[1], {"texts": ["a" * 10_000_000]}).status_code == 413
    # Chunked: no length is known beforehand.
    answer = requests.post(
        small[1] + "/score_texts",
        data=(b"a" * 100_000 for _ in range(50)),
        headers={"Content-Type": "application/json"},
        timeout=20,
    )
    assert answer.status_code == 413
    with pytest.raises(UserError, match="413: more than 20000 bytes"):
        ScorerClient(small[1]).score(["a" * 1_000_000], ["b"])


def test_a_full_queue_says_when_to_come_back(small):
    with Held(*small) as held:
        held.send("a" * 100, "b" * 100)
        answer = post(small[1], {"texts": ["c" * 100, "d"]})
        assert answer.status_code == 429
        assert 1 <= int(answer.headers["Retry-After"]) <= 30
        assert "the queue is full; ask again in" in answer.json()["detail"]
        held.send("c" * 100)  # this still fits
    assert [answer.status_code for answer in held.answers] == [200] * 3


def test_the_client_comes_back_when_the_queue_was_full(small, monkeypatch):
    waits = []
    with Held(*small) as held:
        held.send("a" * 100, "b" * 100, "c" * 100)
        threading.Timer(0.3, held.worker.scorer.gate.set).start()
        scores = ScorerClient(small[1], on_wait=waits.append).score(["d"] * 3, ["e", "ee", "eee"])
    assert scores.rewards.tolist() == [2, 3, 4] and waits


def test_too_many_requests_under_way(small):
    with Held(*small) as held:
        for text in "abc":
            held.send(text)
        answer = post(small[1], {"texts": ["d"]})
        assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
        assert requests.get(small[1] + "/health", timeout=5).status_code == 200
    assert [answer.status_code for answer in held.answers] == [200] * 4


def test_bodies_under_way_are_bounded():
    async def check():
        intake = Intake(Limits(max_body=100), Monitor())
        intake.bytes_left = 150

        class Request:
            def __init__(self, *chunks):
                self.chunks = chunks

            async def stream(self):
                for chunk in self.chunks:
                    yield chunk

        assert await intake.read(Request(b"a" * 50, b"b" * 50)) == b"a" * 50 + b"b" * 50
        with pytest.raises(BadRequest) as refused:
            await intake.read(Request(b"c" * 40, b"d" * 20))
        assert (refused.value.status, refused.value.retry_after, intake.bytes_left) == (503, 1, 50)
        intake.release(100)
        with pytest.raises(BadRequest) as refused:
            await intake.read(Request(b"c" * 101))
        assert (refused.value.status, intake.bytes_left) == (413, 150)

    asyncio.run(check())


def test_a_body_that_never_comes(small, monkeypatch):
    monkeypatch.setattr(http_app, "BODY_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", int(small[1].rsplit(":", 1)[1]))) as slow:
        slow.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
        )
        slow.settimeout(10)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_the_texts_of_a_client_that_goes_away_are_dropped(small):
    worker, url = small
    before = worker.monitor.texts.labels("departed")._value.get()
    with Held(worker, url):
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            body = json.dumps({"texts": ["departs", "departs too"]}).encode()
            head = f"POST /score_texts HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: len(worker.jobs) == 2)
        until(lambda: len(worker.jobs) == 0)
        assert worker.jobs.tokens == 0
    assert worker.monitor.texts.labels("departed")._value.get() - before == 2
    assert not any("departs" in text for texts in worker.scorer.rounds for text in texts)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types(small, kind):
    answer = requests.post(small[1] + "/score", data="{}", headers={"Content-Type": kind}, timeout=10)
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["detail"]


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 10_000, b"nul", b'{"texts": [' + b"1" * 5000 + b"]}"])
def test_what_is_no_json(small, data):
    kind = {"Content-Type": "application/json; charset=utf-8"}
    answer = requests.post(small[1] + "/score_texts", data=data, headers=kind, timeout=10)
    assert answer.status_code == 422 and answer.json()["detail"].startswith("body: not JSON")


def test_a_token_where_one_is_set():
    with in_process(stub=True, auth="s3cret-ü-名") as (_, url):
        right = {"Authorization": "Bearer s3cret-ü-名".encode()}
        assert requests.get(url + "/health", timeout=10).status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic czNjcmV0"},
            {"Authorization": ""},
        ):
            for path in ("/info", "/metrics", "/docs", "/openapi.json"):
                assert requests.get(url + path, headers=headers, timeout=10).status_code == 401
            answer = post(url, {"texts": []}, headers=headers)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        for path in ("/info", "/metrics", "/docs", "/openapi.json"):
            assert requests.get(url + path, headers=right, timeout=10).status_code == 200
        assert post(url, {"texts": []}, headers=right).status_code == 200
        assert ScorerClient(url, token="s3cret-ü-名").score(["a"], ["b"]).rewards.tolist() == [2]


def test_the_comparison_of_tokens_takes_constant_time(monkeypatch):
    """It goes through hmac.compare_digest, for the right length and the wrong one."""
    compared = []

    def compare(given, expected):
        compared.append((given, expected))
        return given == expected

    monkeypatch.setattr(http_app.hmac, "compare_digest", compare)
    with in_process(stub=True, auth="right") as (_, url):
        for token in ("wrong", "r", "right"):
            post(url, {"texts": []}, headers={"Authorization": f"Bearer {token}"})
    assert [given for given, _ in compared] == [b"wrong", b"r", b"right"]


def test_metrics(small):
    worker, url = small
    text = requests.get(url + "/metrics", timeout=10).text
    scored_before = worker.monitor.texts.labels("scored")._value.get()
    post(url, {"texts": ["metric one", "metric one", "metric two"]})
    text = requests.get(url + "/metrics", timeout=10).text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures['scorer_texts_total{outcome="scored"}']) == scored_before + 2
    assert float(figures['scorer_requests_total{route="/score_texts",status="200"}']) >= 1
    for name in ("scorer_queued_texts", "scorer_queued_tokens", "scorer_requests_under_way"):
        assert float(figures[name]) == 0
    assert float(figures["scorer_round_seconds_count"]) >= 1


def test_info(small):
    info = requests.get(small[1] + "/info", timeout=10).json()
    assert info["job_id"] == "7" and info["instance"] == "instance"
    assert info["limits"]["max_texts"] == 50
    assert info["identity"] == requests.get(small[1] + "/health", timeout=10).json()["identity"]
    assert {"python", "torch", "transformers"} <= info["versions"].keys()
    assert (info["queued_texts"], info["queued_tokens"], info["requests_under_way"]) == (0, 0, 0)


def test_the_documentation_needs_nothing_from_elsewhere(small):
    page = requests.get(small[1] + "/docs", timeout=10)
    assert page.headers["Content-Type"].startswith("text/html")

    class Links(html.parser.HTMLParser):
        found: list = []

        def handle_starttag(self, tag, attributes):
            self.found += [(tag, value) for key, value in attributes if key in ("src", "href")]
            assert tag != "script"

    Links().feed(page.text)
    assert Links.found == [("a", "openapi.json")]
    assert "http" not in page.text.replace("$URL", "")
    for part in (
        "POST /score_batch",
        "POST /score_texts",
        "GET /health",
        "prompts",
        "list of string",
        "truncated",
        "429",
    ):
        assert part in page.text
    description = requests.get(small[1] + "/openapi.json", timeout=10).json()
    assert set(description["paths"]) == {"/health", "/info", "/metrics", "/score", "/score_batch", "/score_texts"}


def access_lines(caplog) -> list[dict]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "scorer.access"]


def own_lines(caplog) -> list[dict]:
    """Without that of the test before, which may come late."""
    return [line for line in access_lines(caplog) if line["route"] != "/openapi.json"]


def test_the_access_log_has_everything_but_the_texts(small, caplog):
    with caplog.at_level(logging.INFO, logger="scorer.access"):
        post(small[1], {"texts": ["a secret", "a secret"]})
        post(small[1], {"texts": ["a secret", None]})
        requests.get(small[1] + "/a secret?secret=secret", timeout=10)
        requests.get(small[1] + "/health", timeout=10)
        until(lambda: len(own_lines(caplog)) == 3)
    assert "secret" not in caplog.text
    good, bad, unknown = own_lines(caplog)
    assert (good["route"], good["status"], good["texts"], good["tokens"]) == ("/score_texts", 200, 2, 16)
    assert (good["client"], good["method"], good["repeated"]) == ("127.0.0.1", "POST", 1)
    assert good["seconds"] >= 0 and abs(good["time"] - time.time()) < 60
    assert (bad["status"], unknown["status"], unknown["route"]) == (422, 404, "(none)")


def test_texts_in_the_log_when_asked_for(caplog):
    with in_process(stub=True, SCORER_LOG_TEXTS="1") as (_, url), caplog.at_level(logging.INFO, "scorer.access"):
        post(url, HELLO, "/score_batch")
        until(lambda: access_lines(caplog))
    assert access_lines(caplog)[0]["prompts"] == HELLO["prompts"]
    assert access_lines(caplog)[0]["responses"] == HELLO["responses"]


def test_a_stopping_service_says_so():
    with in_process(stub=True) as (worker, url), Held(worker, url) as held:
        held.send("waits")
        assert worker.jobs.close("the scorer was stopped") == 2
        until(lambda: len(held.answers) == 2)
        assert {answer.status_code for answer in held.answers} == {503}
        assert held.answers[0].json()["detail"] == "the scorer was stopped"
        assert held.answers[0].headers["Retry-After"] == "5"
        assert post(url, {"texts": ["late"]}).status_code == 503
