"""The scorer service as its users meet it: a real process, its published answers, its refusals, its end."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import requests
from conftest import REPO
from scorer_process import HELLO, START_SECONDS, Service, fails, in_process, running

from alignment.errors import UserError
from alignment.scoring.client import ScorerClient, ScorerUnavailable
from alignment.scoring.local_scorer import LocalScorer
from alignment.scoring.scorer_service import take_port
from alignment.scoring.service_settings import read_settings
from alignment.scoring.worker import Job


@pytest.fixture(scope="module")
def service(tiny_scorers, tmp_path_factory):
    with running(tiny_scorers, tmp_path_factory.mktemp("service"), MAX_LENGTH="200") as one:
        yield one


def test_health_says_who_it_is(service, tiny_scorers):
    health = requests.get(service.url + "/health", timeout=10).json()
    assert (health["status"], health["device"]) == ("healthy", "cpu")
    identity = health["identity"]
    assert identity["reward_model"]["name"] == tiny_scorers[0].name
    assert len(identity["cost_model"]["weights"]) == 16
    assert (identity["dtype"], identity["max_length"], identity["deterministic"]) == ("float32", 200, True)
    address = json.loads(service.address.read_text())
    assert (address["url"], address["pid"], address["identity"]) == (service.url, service.process.pid, identity)
    assert address["instance"] == health["instance"] and address["token_file"] is None
    assert f"Service will be available at {service.url}\n" in service.log.read_text()


@pytest.mark.parametrize("path", ["/score_batch", "/score"])
def test_scores_are_those_of_the_models(service, tiny_scorers, path):
    body = {
        "prompts": ["hi", "a\nb", "👋\u2028\0"],
        "responses": ["yes", "", "x" * 300],
        "finished": [True, False, True],
    }
    local = LocalScorer(*tiny_scorers, max_length=200).score(body["prompts"], body["responses"], body["finished"])
    answer = service.post(path, body)
    assert answer.status_code == 200
    assert answer.json() == {
        "rewards": local.rewards.tolist(),
        "costs": local.costs.tolist(),
        "errors": [None] * 3,
        "truncated": [False, False, True],
    }


def test_whole_texts_score_as_their_parts(service):
    pair = service.post("/score_batch", HELLO).json()
    text = "BEGINNING OF CONVERSATION: USER: hello ASSISTANT:Hello! How can I help you today?"
    assert service.post("/score_texts", {"texts": [text]}).json() == pair
    assert service.post("/score_texts", {"texts": [text + "</s>"]}).json()["errors"] == [None]
    empty = {"rewards": [], "costs": [], "errors": [], "truncated": []}
    assert service.post("/score_texts", {"texts": []}).json() == empty
    assert service.post("/score_batch", {"prompts": [], "responses": []}).json() == empty


@pytest.mark.parametrize(
    ("path", "body", "status", "detail"),
    [
        (
            "/score_batch",
            {"prompts": ["a", "b"], "responses": ["c"]},
            400,
            "Number of prompts and responses must match",
        ),
        ("/score", {"prompts": ["a"], "responses": []}, 400, "Number of prompts and responses must match"),
        (
            "/score_batch",
            {"prompts": ["a"], "responses": ["b"], "finished": []},
            400,
            "finished has 0 values for 1 text",
        ),
        ("/score_batch", {"prompts": ["a"]}, 422, "responses: Field required"),
        (
            "/score_batch",
            {"prompts": ["a", 1], "responses": ["a", "b"]},
            422,
            "prompts[1]: Input should be a valid str",
        ),
        ("/score_batch", {"prompts": ["a"], "responses": [None]}, 422, "responses[0]: Input should be a valid string"),
        ("/score_batch", {"prompts": ["a"], "responses": ["b"], "finished": [1]}, 422, "finished[0]: "),
        ("/score_batch", {"prompts": ["a", "\ud800"], "responses": ["", ""]}, 422, "prompts[1]: a lone surrogate"),
        ("/score_texts", {"texts": "abc"}, 422, "texts: Input should be a valid list"),
        ("/score_texts", None, 422, "body: not JSON"),
        ("/score_texts", [], 422, "body: "),
    ],
)
def test_bad_requests_get_one_clear_line(service, path, body, status, detail):
    answer = service.post(path, body)
    assert answer.status_code == status
    assert isinstance(answer.json()["detail"], str)
    assert answer.json()["detail"].startswith(detail)
    assert "\n" not in answer.json()["detail"]


def test_what_is_not_json_and_not_post(service):
    kind = {"Content-Type": "application/json"}
    assert requests.post(service.url + "/score", data="{", headers=kind, timeout=10).status_code == 422
    assert requests.get(service.url + "/score_texts", timeout=10).status_code == 405
    assert requests.get(service.url + "/nothing", timeout=10).status_code == 404


def test_a_prompt_without_room_for_its_response(service):
    answer = service.post("/score_batch", {"prompts": ["p" * 1_000_000, "hi"], "responses": ["a", "b"]}).json()
    assert answer["rewards"][0] is None and answer["costs"][0] is None
    assert "MAX_LENGTH" in answer["errors"][0]
    assert answer["truncated"] == [True, False]
    assert answer["rewards"][1] is not None


def test_answers_do_not_depend_on_company(service):
    """Many clients at once: each gets its own scores, in order, with the bits that they have alone."""
    texts = [f"text {i} " + "x" * (i % 50) for i in range(48)]
    alone = [service.post("/score_batch", {"prompts": ["hi"], "responses": [text]}).json() for text in texts]
    results: dict[int, object] = {}

    def ask(start: int) -> None:
        chunk = [texts[(start + k) % 48] for k in range(24)]
        scores = ScorerClient(service.url, batch_size=7).score(["hi"] * 24, chunk)
        results[start] = (chunk, scores)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(0, 48, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {text: (one["rewards"][0], one["costs"][0]) for text, one in zip(texts, alone, strict=True)}
    assert len(results) == 8
    for chunk, scores in results.values():
        assert list(zip(scores.rewards, scores.costs, strict=True)) == [expected[text] for text in chunk]


def test_health_answers_while_the_worker_scores(service):
    body = {"prompts": ["hi"] * 1500, "responses": [f"{i} " + "word " * (i % 30) for i in range(1500)]}
    thread = threading.Thread(target=service.post, args=("/score_batch", body))
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        began = time.monotonic()
        assert requests.get(service.url + "/health", timeout=10).status_code == 200
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.02)
    thread.join()
    assert slowest < 1.0


def test_no_text_in_the_log(service):
    service.post("/score_batch", {"prompts": ["a secret prompt"], "responses": ["b"]})
    service.post("/score_batch", {"prompts": ["a secret prompt"], "responses": [None]})
    assert "secret" not in service.log.read_text()


def test_sigterm_ends_it_cleanly_and_answers_first(tiny_scorers, tmp_path):
    with running(tiny_scorers, tmp_path) as service:
        answers = []
        body = {"prompts": ["hi"] * 1000, "responses": [f"{i} " + "word " * (i % 20) for i in range(1000)]}
        thread = threading.Thread(target=lambda: answers.append(service.post("/score_batch", body)))
        thread.start()
        time.sleep(0.3)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(30) == 0
        thread.join()
        assert len(answers[0].json()["rewards"]) == 1000
        assert service.log.read_text().endswith("stopped\n")
        assert not service.address.exists()


def test_a_token_where_one_is_set_and_a_port_where_none_is(tiny_scorers, tmp_path):
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(socket.socket())
        with contextlib.suppress(OSError):  # somebody else holds it: as good
            holder.bind(("127.0.0.1", 8000))
            holder.listen()
        service = stack.enter_context(running(tiny_scorers, tmp_path, PORT="", SCORER_AUTH="s3cret-ü"))
        assert 8000 < int(service.url.rsplit(":", 1)[1]) < 8100
        assert "port 8000 is taken" in service.log.read_text()
        assert requests.get(service.url + "/health", timeout=10).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert service.post("/score_batch", HELLO, headers=headers).status_code == 401
        assert ScorerClient(service.url, token="s3cret-ü").score(["hi"], ["yes"]).errors == [None]
        with pytest.raises(UserError, match="wants its token"):
            ScorerClient(service.url, token="other").score(["hi"], ["yes"])
        assert "s3cret" not in service.log.read_text()


def test_errors_at_the_start_are_one_line(tiny_scorers, tmp_path):
    assert "no such model folder" in fails((tmp_path / "absent", tiny_scorers[1]), tmp_path)
    assert "cannot write" in fails(tiny_scorers, tmp_path, SCORER_ADDRESS_FILE="/proc/nothing/address.json")


def test_a_named_port_that_is_taken_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="Address already in use; choose another with PORT"):
            take_port("127.0.0.1", taken.getsockname()[1])
    for host, port in (("127.0.0.1", 99999), ("192.0.2.1", 0)):
        with pytest.raises(UserError, match=f"HOST {host}"):
            take_port(host, port)


def test_settings_of_the_environment():
    plain = read_settings({})
    assert (plain.host, plain.port, plain.auth, plain.logs_dir) == ("127.0.0.1", None, None, "logs")
    assert plain.scorer["reward_model"] == "PKU-Alignment/beaver-7b-unified-reward"
    assert (plain.scorer["max_length"], plain.scorer["dtype"], plain.scorer["deterministic"]) == (576, "auto", None)
    assert read_settings({"USE_BF16": "true"}).scorer["dtype"] == "bfloat16"
    assert read_settings({"USE_BF16": "false"}).scorer["dtype"] == "float16"
    assert read_settings({"HOST": "0.0.0.0", "SCORER_AUTH": "none"}).auth is None
    made_up = [read_settings({"HOST": "0.0.0.0"}).auth for _ in range(2)]
    assert made_up[0] != made_up[1] and len(made_up[0]) > 30
    assert read_settings({"SCORER_ADDRESS_FILE": "a.json"}).logs_dir is None
    assert read_settings({"SCORER_MAX_TEXTS": "5"}).limits.max_texts == 5
    assert read_settings({"PORT": "9000"}, port=0).port == 0
    for env, message in (
        ({"USE_BF16": "true", "SCORER_DTYPE": "float32"}, "set one of them"),
        ({"SCORER_DETERMINISTIC": "maybe"}, "SCORER_DETERMINISTIC is 'maybe'"),
        ({"SCORER_AUTH": "a", "SCORER_TOKEN_FILE": "b"}, "set one of them"),
        ({"SCORER_AUTH": "a b"}, "no spaces"),
        ({"SCORER_MAX_TEXTS": "0"}, "from 1 on"),
        ({"MAX_LENGTH": "5k"}, "MAX_LENGTH is '5k'"),
        ({"SCORER_PROBES": "/absent.json"}, "SCORER_PROBES"),
    ):
        with pytest.raises(UserError, match=message):
            read_settings(env)


def test_loading_is_said_and_waited_for(tiny_scorers, tmp_path):
    """The port is open before the models are there: /health says so, the client waits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = Service(tiny_scorers, tmp_path, PORT=str(port))
    try:
        client = ScorerClient(f"http://127.0.0.1:{port}", max_wait=START_SECONDS)
        assert client.wait_until_ready()["max_length"] == 576
        assert client.score(["hi"], ["yes"]).errors == [None]
    finally:
        service.stop()


def test_one_failed_round_is_a_500_and_does_not_end_the_worker(tiny_scorers):
    with in_process(tiny_scorers) as (worker, url):
        real = worker.scorer.score_encoded

        def fails_once(conversations):
            worker.scorer.score_encoded = real
            raise RuntimeError("CUDA error: a test\nmore lines")

        worker.scorer.score_encoded = fails_once
        answer = requests.post(url + "/score", json=HELLO, timeout=10)
        assert (answer.status_code, answer.json()["detail"]) == (500, "scoring failed: CUDA error: a test")
        cancelled = Job([worker.scorer.encode("a", "b")])
        cancelled.scores.cancel()
        worker.jobs.put(cancelled)
        assert requests.post(url + "/score", json=HELLO, timeout=10).json()["errors"] == [None]


@pytest.mark.slow
def test_kill_9_in_the_middle_and_back(tiny_scorers, tmp_path):
    """The client waits for the restarted scorer and no score is lost; another model in its place is an error."""
    waits = []
    prompts = ["hi"] * 600
    responses = [f"{i} " + "word " * (i % 25) for i in range(600)]
    with running(tiny_scorers, tmp_path) as service:
        port = service.url.rsplit(":", 1)[1]
        client = ScorerClient(service.url, batch_size=20, max_wait=START_SECONDS, on_wait=waits.append)
        expected = LocalScorer(*tiny_scorers).score(prompts, responses)
        client.wait_until_ready()
        killer = threading.Timer(0.2, service.process.kill)
        restarted = []

        def restart() -> None:
            service.process.wait()
            restarted.append(Service(tiny_scorers, tmp_path, PORT=port))

        thread = threading.Thread(target=restart)
        killer.start()
        thread.start()
        try:
            scores = client.score(prompts, responses)
            thread.join()
            assert scores.rewards.tolist() == expected.rewards.tolist()
            assert scores.costs.tolist() == expected.costs.tolist()
        finally:
            thread.join()
            restarted[0].stop()
        with pytest.raises(ScorerUnavailable, match=r"gave no answer.*last error: .*refused"):
            ScorerClient(service.url, max_wait=0.5).score(["hi"], ["yes"])
        service.address.unlink(missing_ok=True)
        with (
            running(tiny_scorers, tmp_path, PORT=port, MAX_LENGTH="300"),
            pytest.raises(UserError, match="max_length was 576, is 300"),
        ):
            client.score(["hi"], ["yes"])
    assert waits


def test_golden_calls_of_the_published_service(goldens, tmp_path):
    """Published rule, float16: the same answers, with fields added; refusals keep their status and get one line."""
    folder = goldens / "score_model"
    calls = json.loads((folder / "service.json").read_text(encoding="utf-8"))["calls"]
    models = folder / "reward", folder / "cost"
    checked = 0
    with running(models, tmp_path, SCORER_REFERENCE="1", SCORER_DTYPE="float16", MAX_LENGTH="512") as service:
        for call in calls:
            if "reward_head_bias" in call:
                continue  # weights that are not finite do not start a service here
            ask = requests.post if call["method"] == "POST" else requests.get
            reply = ask(service.url + call["path"], json=call["body"], timeout=30)
            assert reply.status_code == call["status"]
            checked += 1
            if reply.status_code == 200 and call["method"] == "POST":
                answer = reply.json()
                # Scores of the published service differ by this much between its own two calls.
                assert answer["rewards"] == pytest.approx(call["answer"]["rewards"], abs=0.02)
                assert answer["costs"] == pytest.approx(call["answer"]["costs"], abs=0.02)
                assert answer["errors"] == [None] * len(answer["rewards"])
            elif reply.status_code == 200:
                assert call["answer"].items() <= reply.json().items()
            elif reply.status_code == 400:
                assert reply.json() == call["answer"]
    assert checked == 15


def test_fixed_texts_on_the_service_and_in_process(service, tiny_scorers):
    script = REPO / "alignment" / "scoring" / "test_score_fixed_prompt.py"
    reports = []
    for flags in (
        ["--scorer_url", service.url],
        ["--reward_model", str(tiny_scorers[0]), "--cost_model", str(tiny_scorers[1]), "--max_length", "200"],
    ):
        done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, cwd=REPO)
        assert done.returncode in (0, 1), done.stderr  # random models know no cruelty
        assert ("PASS" in done.stdout) == (done.returncode == 0)
        reports.append(done.stdout)
    assert reports[0] == reports[1]
