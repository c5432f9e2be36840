"""The scorer service as its users meet it: a real process, its published answers, its refusals, its end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import requests
from conftest import REPO
from scorer_process import HELLO, SCRIPT, START_SECONDS, Service, fails, in_process, running

from alignment.errors import UserError
from alignment.scoring import test_score_fixed_prompt as fixed_prompt
from alignment.scoring.client import ScorerClient, ScorerUnavailable
from alignment.scoring.discovery import read_addresses
from alignment.scoring.local_scorer import LocalScorer
from alignment.scoring.scorer_service import Announcements, hangs, take_port
from alignment.scoring.scores import Scores
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
    nothing = service.post("/score_texts", {"texts": ["", "a", ""], "finished": [False, True, True]}).json()
    assert nothing["errors"] == ["an empty text that is not finished has no token to score", None, None]
    assert nothing["rewards"][0] is None and None not in nothing["rewards"][1:]
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
    answers = 0
    while thread.is_alive():  # if it waited for the scores there would be one answer, and that at the end
        assert requests.get(service.url + "/health", timeout=10).status_code == 200
        answers += thread.is_alive()
    thread.join()
    assert answers > 5


def test_a_gpu_that_is_at_one_round_for_twice_the_limit_hangs_and_a_cpu_is_slow():
    assert hangs("cuda", 1201, stuck_seconds=600)
    assert not hangs("cuda", 1199, stuck_seconds=600) and not hangs("cpu", 1e6, stuck_seconds=600)


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


@pytest.mark.slow
def test_a_token_where_one_is_set_and_a_port_where_none_is(tiny_scorers, tmp_path):
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held = False
        with contextlib.suppress(OSError):  # somebody else holds it: as good, unless it lets go meanwhile
            holder.bind(("127.0.0.1", 8000))
            holder.listen()
            held = True
        service = stack.enter_context(running(tiny_scorers, tmp_path, PORT="", SCORER_AUTH="s3cret-ü"))
        port = int(service.url.rsplit(":", 1)[1])
        assert 8000 <= port < 8100
        assert ("port 8000 is taken" in service.log.read_text()) == (port > 8000)
        assert port > 8000 or not held
        assert requests.get(service.url + "/health", timeout=10).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert service.post("/score_batch", HELLO, headers=headers).status_code == 401
        assert ScorerClient(service.url, token="s3cret-ü").score(["hi"], ["yes"]).errors == [None]
        with pytest.raises(UserError, match="wants its token"):
            ScorerClient(service.url, token="other").score(["hi"], ["yes"])
        assert "s3cret" not in service.log.read_text()


@pytest.mark.slow
def test_errors_at_the_start_are_one_line(tiny_scorers, tmp_path):
    assert "no such model folder" in fails((tmp_path / "absent", tiny_scorers[1]), tmp_path)
    assert "cannot write" in fails(tiny_scorers, tmp_path, SCORER_ADDRESS_FILE="/proc/nothing/address.json")
    assert "cannot write" in fails(tiny_scorers, tmp_path, LOGS_DIR="/proc/nothing")


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


@pytest.mark.slow
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
        real = worker.scorer.queue_encoded

        def fails_once(conversations):
            worker.scorer.queue_encoded = real
            raise RuntimeError("CUDA error: a test\nmore lines")

        worker.scorer.queue_encoded = fails_once
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


def test_golden_calls_of_the_published_service(goldens):
    """Published rule, float16: the same answers, with fields added; refusals keep their status and get one line."""
    folder = goldens / "score_model"
    calls = json.loads((folder / "service.json").read_text(encoding="utf-8"))["calls"]
    models = folder / "reward", folder / "cost"
    checked = 0
    with in_process(models, SCORER_REFERENCE="1", SCORER_DTYPE="float16", MAX_LENGTH="512") as (_, url):
        for call in calls:
            if "reward_head_bias" in call:
                continue  # weights that are not finite do not start a service here
            ask = requests.post if call["method"] == "POST" else requests.get
            reply = ask(url + call["path"], json=call["body"], timeout=30)
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


def test_fixed_texts_on_the_service_and_in_process(service, tiny_scorers, capsys, monkeypatch):
    reports = []
    for flags in (
        ["--scorer_url", service.url],
        ["--reward_model", str(tiny_scorers[0]), "--cost_model", str(tiny_scorers[1]), "--max_length", "200"],
    ):
        monkeypatch.setattr(sys, "argv", ["test_score_fixed_prompt.py", *flags])
        code = fixed_prompt.main()
        reports.append(capsys.readouterr().out)
        assert ("PASS" in reports[-1]) == (code == 0)  # random models know no cruelty
    assert reports[0] == reports[1]
    assert "nothing to compare with the model cards" in reports[0]


def test_real_models_are_compared_with_their_cards():
    class Beaver:
        def __init__(self, shift: float) -> None:
            self.shift = shift

        def identity(self):
            return {
                "reward_model": {"name": "PKU-Alignment/beaver-7b-unified-reward"},
                "cost_model": {"name": "beaver-7b-v1.0-cost"},
            }

        def score_texts(self, texts, finished):
            assert texts == fixed_prompt.CARD_TEXTS and not any(finished)
            cards = [fixed_prompt.CARD_SCORES[name] for name in ("beaver-7b-unified-reward", "beaver-7b-v1.0-cost")]
            rewards, costs = ([self.shift + (score or 0) for score in card] for card in cards)
            return Scores(np.array(rewards), np.array(costs), [None] * 4, [False] * 4)

    told, wrong = fixed_prompt.card_lines(Beaver(0.01))
    assert len(told) == 3 + 4 and wrong == []
    assert len(fixed_prompt.card_lines(Beaver(1.0))[1]) == 7
    assert len(fixed_prompt.card_lines(Beaver(float("nan")))[1]) == 7


def test_nan_in_one_row_leaves_the_others(tiny_scorers):
    with in_process(tiny_scorers) as (worker, url):
        real = worker.scorer._models[0].score

        def one_nan(texts):
            scores = real(texts).clone()
            scores[1:2] = math.nan
            return scores

        body = {"prompts": ["a", "b", "c"], "responses": ["x", "y", "z"]}
        expected = requests.post(url + "/score_batch", json=body, timeout=10).json()
        worker.scorer._models[0].score = one_nan
        body["responses"] = ["x!", "y!", "z!"]  # not seen before
        answer = requests.post(url + "/score_batch", json=body, timeout=10).json()
        assert answer["rewards"][1] is None and answer["errors"] == [None, "reward is nan", None]
        assert None not in answer["costs"] + answer["rewards"][::2]
        scores = ScorerClient(url).score(body["prompts"], body["responses"])
        assert np.isfinite(scores.rewards).all()  # the second time it was the only one, and not remembered as NaN
        body["responses"] = ["x", "y", "z"]
        assert requests.post(url + "/score_batch", json=body, timeout=10).json() == expected


def test_special_tokens_in_a_prompt_and_the_limit(service, tiny_scorers):
    prompts = ["say </s> or <pad>", "</s>", "<s>USER: a ASSISTANT: b</s>"]
    scorer = LocalScorer(*tiny_scorers, max_length=200)
    local = scorer.score(prompts, ["<pad></s>"] * 3)
    answer = service.post("/score_batch", {"prompts": prompts, "responses": ["<pad></s>"] * 3}).json()
    assert answer["rewards"] == local.rewards.tolist() and answer["errors"] == [None] * 3
    room = 200 - len(scorer.encode("hi", "").reward_ids)  # one token a character
    body = {"prompts": ["hi"] * 2, "responses": ["x" * room, "x" * (room + 1)]}
    answer = service.post("/score_batch", body).json()
    assert answer["truncated"] == [False, True]
    assert answer["rewards"][0] == answer["rewards"][1]  # what is left of the second is the first


def test_ten_thousand_texts_in_one_request(service):
    texts = [f"{index % 5000}" for index in range(10_000)]
    answer = service.post("/score_texts", {"texts": texts}, long=True)
    assert answer.status_code == 200
    rewards = answer.json()["rewards"]
    assert len(rewards) == 10_000 and rewards[:5000] == rewards[5000:]
    assert service.post("/score_texts", {"texts": ["a"] * 10_001}).status_code == 413


def test_a_huge_text_blocks_nobody(service):
    """10 MB is refused at once; 1.9 MB is tokenised while others are served."""
    answer = service.post("/score_batch", {"prompts": ["hi"], "responses": ["word " * 2_000_000]})
    assert answer.status_code == 413 and "SCORER_MAX_CHARACTERS" in answer.json()["detail"]
    answers = []
    body = {"prompts": ["hi"], "responses": ["word " * 380_000]}
    thread = threading.Thread(target=lambda: answers.append(service.post("/score_batch", body)))
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        began = time.monotonic()
        assert requests.get(service.url + "/health", timeout=10).status_code == 200
        slowest = max(slowest, time.monotonic() - began)
    assert answers[0].json()["truncated"] == [True]
    assert slowest < 1.0


def test_a_disk_that_is_full_when_the_models_are_there(tmp_path, monkeypatch):
    """The address is written later; the loaded models are kept."""
    settings = read_settings({"LOGS_DIR": str(tmp_path), "SCORER_ADDRESS_FILE": str(tmp_path / "a.json")})
    announcements = Announcements(settings, "http://127.0.0.1:1", "x")
    announcements.begin()
    real = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    announcements.ready({"dtype": "float32"})
    [address] = read_addresses(tmp_path).values()
    assert address.identity is None and not (tmp_path / "a.json").exists()
    announcements.catch_up()
    monkeypatch.setattr(os, "fsync", real)
    announcements.catch_up()
    [address] = read_addresses(tmp_path).values()
    assert address.identity == {"dtype": "float32"} and (tmp_path / "a.json").exists()
    announcements.remove()
    assert not (tmp_path / "a.json").exists() and not read_addresses(tmp_path)


@pytest.mark.slow
def test_a_full_disk_at_the_start(tiny_scorers, tmp_path):
    """No file may grow beyond a hundred bytes: one line, exit code 2, nothing half-written."""
    environment = os.environ | {"REWARD_MODEL": str(tiny_scorers[0]), "COST_MODEL": str(tiny_scorers[1]), "PORT": "0"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment | {"LOGS_DIR": str(tmp_path)},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert list((tmp_path / "scorer").iterdir()) == []


@pytest.mark.slow
def test_two_scorers_on_one_host_and_one_that_moves(tiny_scorers, tmp_path, monkeypatch):
    """Each trainer finds the scorer of its experiment. One is killed and comes back elsewhere with another token."""
    logs = {"LOGS_DIR": str(tmp_path), "HOST": "127.0.0.2"}  # not 127.0.0.1: a token is made up
    monkeypatch.setenv("LOGS_DIR", str(tmp_path))
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    prompts, responses = ["hi"] * 300, [f"{index} " + "word " * (index % 25) for index in range(300)]
    expected = LocalScorer(*tiny_scorers).score(prompts, responses)
    with (
        running(tiny_scorers, folders[0], EXPERIMENT_ID="a", SLURM_JOB_ID="1", **logs) as first,
        running(tiny_scorers[::-1], folders[1], EXPERIMENT_ID="b", SLURM_JOB_ID="2", **logs) as other,
    ):
        with pytest.raises(UserError, match="2 scorers fit"):
            ScorerClient("auto").wait_until_ready()
        monkeypatch.setenv("EXPERIMENT_ID", "b")
        assert ScorerClient("auto").wait_until_ready()["reward_model"]["name"] == tiny_scorers[1].name
        monkeypatch.setenv("EXPERIMENT_ID", "a")
        client = ScorerClient("auto", batch_size=10, max_wait=START_SECONDS)
        client.wait_until_ready()
        assert client.url == first.url
        token_file = tmp_path / "scorer" / f"job1-{socket.gethostname()}-{first.url.rsplit(':', 1)[1]}.token"
        assert token_file.stat().st_mode & 0o777 == 0o600
        assert token_file.read_text().strip() not in first.log.read_text()
        assert requests.post(first.url + "/score", json=HELLO, timeout=10).status_code == 401
        first.process.kill()
        first.process.wait()
        starter = threading.Timer(
            0.5, lambda: moved.append(Service(tiny_scorers, folders[2], EXPERIMENT_ID="a", SLURM_JOB_ID="1", **logs))
        )
        moved: list[Service] = []
        starter.start()
        try:
            scores = client.score(prompts, responses)
        finally:
            starter.join()
            moved[0].wait()
        assert scores.rewards.tolist() == expected.rewards.tolist()
        assert client.url == moved[0].url != first.url
        assert moved[0].stop() == 0
        assert other.stop() == 0
    left = [path.name for path in (tmp_path / "scorer").iterdir()]
    assert all(f"-{first.url.rsplit(':', 1)[1]}." in name for name in left)  # the killed one's, and nothing else


@pytest.mark.slow
def test_sigterm_waits_for_its_limit_and_no_longer(tiny_scorers, tmp_path):
    with running(tiny_scorers, tmp_path, SCORER_STOP_SECONDS="1") as service:
        answers = []
        body = {"prompts": ["hi"] * 10_000, "responses": [f"{index} " + "x" * 400 for index in range(10_000)]}
        thread = threading.Thread(target=lambda: answers.append(service.post("/score_batch", body, long=True)))
        thread.start()
        while (
            "ready" not in service.log.read_text()
            or not requests.get(service.url + "/info", timeout=10).json()["queued_texts"]
        ):
            time.sleep(0.05)
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(30) == 0
        assert time.monotonic() - began < 10
        thread.join()
        assert (answers[0].status_code, answers[0].json()["detail"]) == (503, "the scorer was stopped")
        assert "1 requests were not answered" in service.log.read_text()
        assert not service.address.exists()
