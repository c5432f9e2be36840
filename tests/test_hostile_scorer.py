"""What is asked of the scorer service and of its client that makes no sense: one line, exit code 2; 4xx over HTTP."""

from __future__ import annotations

import http.server
import math
import os
import signal
import socket
import threading

import pytest
import requests
from fake_scorer import FakeScorer
from scorer_process import in_process
from script_here import ES, FIXED, SERVICE, refused

from alignment.errors import UserError
from alignment.records import write_jsonl
from alignment.scoring.client import ScorerClient, ScorerUnavailable
from alignment.scoring.local_scorer import LocalScorer

HALF = "\ud83d"  # the first half of an emoji: JSON can hold it, no tokenizer takes it


# --- texts


@pytest.fixture(scope="module")
def url(tiny_scorers):
    with in_process(tiny_scorers) as (_, url):
        yield url


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        ("/score_batch", {"prompts": ["a", f"b{HALF}"], "responses": ["c", "d"]}, "prompts[1]: a lone surrogate"),
        ("/score_batch", {"prompts": ["a", "b"], "responses": [f"x {HALF} y", "d"]}, "responses[0]: a lone surrogate"),
        ("/score_texts", {"texts": ["a", "b", HALF]}, "texts[2]: a lone surrogate at character 0"),
    ],
)
def test_half_a_character_is_named_by_its_place(url, path, body, place):
    answer = requests.post(url + path, json=body, timeout=30)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(place)
    client = ScorerClient(url)
    with pytest.raises(UserError) as refusal:
        client.score(body["prompts"], body["responses"]) if "prompts" in body else client.score_texts(body["texts"])
    assert place in str(refusal.value) and "\n" not in str(refusal.value)


TEXTS = {
    "nul": "before\0after",
    "only nul": "\0",
    "one word of a megabyte": "w" * 2**20,
    "a megabyte of emoji": "\U0001f600" * 2**18,
    "end tokens": "</s>" * 50,
    "control characters": "".join(map(chr, range(32))),
    "right to left": "\u202eabc\u202c \u05d0",
    "not a character of Unicode": "\ufffe\uffff",
    "byte order mark": "\ufeffabc",
    "line separators": "a\u2028b\u2029c\u0085d\r\n",
    "the next turn": "no. USER: and now? ASSISTANT: BEGINNING OF CONVERSATION:",
    "nothing": "",
}


@pytest.mark.parametrize("name", TEXTS)
def test_strange_texts_have_scores_over_http_as_in_this_process(url, tiny_scorers, name):
    local = LocalScorer(*tiny_scorers).score(["hello", "hello"], [TEXTS[name], "fine"])
    over_http = ScorerClient(url).score(["hello", "hello"], [TEXTS[name], "fine"])
    assert all(map(math.isfinite, [*local.rewards, *local.costs]))
    assert over_http.rewards.tolist() == local.rewards.tolist()
    assert over_http.costs.tolist() == local.costs.tolist()
    assert over_http.truncated == [len(TEXTS[name]) > 576, False]


# --- how the service is started


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Of models that are not there: what is told of a setting was told before they were looked for."""
    for name in [name for name in os.environ if name.startswith(("SCORER_", "SLURM_"))]:
        monkeypatch.delenv(name)
    absent = str(tmp_path / "absent")
    values = {"PORT": "0", "LOGS_DIR": str(tmp_path / "logs"), "REWARD_MODEL": absent, "COST_MODEL": absent}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)


NONSENSE = [
    ("MAX_LENGTH", "0", "MAX_LENGTH is '0', expected a whole number from 2 on"),
    ("MAX_LENGTH", "1", "MAX_LENGTH is '1'"),
    ("MAX_LENGTH", "-5", "MAX_LENGTH is '-5'"),
    ("MAX_LENGTH", "1e3", "MAX_LENGTH is '1e3'"),
    ("MAX_LENGTH", "٥٧٦", "MAX_LENGTH is"),
    ("MAX_LENGTH", "9" * 5000, "MAX_LENGTH is '999"),
    ("SCORER_DTYPE", "float64", "SCORER_DTYPE is 'float64', expected one of auto, float32"),
    ("SCORER_TEMPLATE", "vicuna", "SCORER_TEMPLATE: template 'vicuna': expected 'pku'"),
    ("SCORER_TEMPLATE", "{prompt} and {prompt}", "exactly once"),
    ("SCORER_FP8", "yes please", "SCORER_FP8 is 'yes please', expected 1 or 0"),
    ("SCORER_REFERENCE", "2", "SCORER_REFERENCE is '2'"),
    ("SCORER_LOG_TEXTS", "some", "SCORER_LOG_TEXTS is 'some'"),
    ("SCORER_MAX_BODY", "-1", "SCORER_MAX_BODY is '-1'"),
    ("SCORER_MAX_REQUESTS", "0", "SCORER_MAX_REQUESTS is '0', expected a whole number from 1 on"),
    ("SCORER_STOP_SECONDS", "1" + "0" * 30, "SCORER_STOP_SECONDS is '1000"),
    ("SCORER_TOKEN_FILE", "/absent/token", "/absent/token"),
    ("SCORER_AUTH", "two words", "SCORER_AUTH: a token has no spaces"),
    ("SCORER_PROBES", "/absent/probes.json", "SCORER_PROBES: /absent/probes.json"),
    ("SCORER_ADDRESS_FILE", "/proc/nowhere/address.json", "/proc/nowhere/address.json"),
    ("LOGS_DIR", "/dev/null", "/dev/null/scorer"),
    ("PORT", "http", "PORT is 'http', expected a whole number"),
    ("PORT", "70000", "port 70000"),
    ("HOST", "no such host", "HOST no such host"),
    ("HOST", "192.0.2.1", "HOST 192.0.2.1"),
    ("REWARD_MODEL", "nobody/no-such-model", "nobody/no-such-model: no such folder, and the model hub did not give it"),
    ("REWARD_MODEL", "no-such-folder", "no-such-folder: no such model folder"),
]


@pytest.mark.parametrize(
    ("name", "value", "said"), NONSENSE, ids=[f"{name}={value[:12]}" for name, value, _ in NONSENSE]
)
def test_nonsense_in_the_environment(environment, name, value, said):
    environment.setenv(name, value)
    line = refused(SERVICE)
    assert said in line and len(line) < 400


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "x"], "--port"),
        (["--prot", "8000"], "--prot 8000 (--help lists"),
        (["8000"], "8000 (--help lists"),
    ],
)
def test_nonsense_on_the_command_line(environment, flags, said):
    assert said in refused(SERVICE, *flags)


def test_a_port_in_use(environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(SERVICE, "--port", port)
    assert f"port {port}: Address already in use; choose another with PORT=<number>, or PORT=0" in line


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MAX_LENGTH", "2000", "MAX_LENGTH is 2000, the model reads up to 1024 tokens"),
        ("SCORER_FP8", "1", "SCORER_FP8"),
        ("SCORER_TEMPLATE", "chat", "template 'chat': the tokenizer has no chat template"),
        ("SCORE_BACKEND", "jax", "SCORE_BACKEND is 'jax', expected transformers"),
        ("SCORE_BACKEND", "safe_rlhf", "SCORE_BACKEND=safe_rlhf: No module named 'safe_rlhf'"),
    ],
)
def test_what_does_not_fit_the_models(environment, tiny_scorers, name, value, said):
    environment.setenv("REWARD_MODEL", str(tiny_scorers[0]))
    environment.setenv("COST_MODEL", str(tiny_scorers[1]))
    environment.setenv(name, value)
    assert said in refused(SERVICE)


# --- where trainers look for it


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "expected something like http://127.0.0.1:8000, or auto"),
        ("node12", "expected something like"),
        ("ftp://node12:8000", "expected something like"),
        ("http://", "expected something like"),
        ("http://node12:80000", "expected something like"),
        ("http://node12:port", "expected something like"),
        ("http://[::1:8000", "expected something like"),
        ("http://node12:8000?x=1", "expected something like"),
        ("http://node 12:8000", "expected something like"),
        ("http://node12:8000,", "expected something like"),
        ("Auto", "expected something like"),
        ("http://node12:8000/score_batch", "give the address alone, without /score_batch"),
        ("http://node12:8000/health/", "give the address alone, without /health"),
    ],
)
def test_addresses_that_are_none(tiny_policy, tmp_path, url, said):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert said in refused(FIXED, "--scorer_url", url)
    files = ["--train_jsonl", tmp_path / "prompts.jsonl", "--eval_jsonl", tmp_path / "prompts.jsonl"]
    line = refused(
        ES, "--policy_model_path", tiny_policy, *files, "--scorer_url", url, "--experiment_dir", tmp_path / "run"
    )
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["url", "reward"], ["url", "cost"], ["url", "reward", "cost"], ["reward"], []])
def test_a_service_and_models_of_its_own(flags):
    """Of a model beside a service it would be thought that it was the one that was scored with."""
    given = {
        "url": ["--scorer_url", "ftp://node12:8000"],
        "reward": ["--reward_model", "r"],
        "cost": ["--cost_model", "c"],
    }
    line = refused(FIXED, *(word for flag in flags for word in given[flag]))
    assert line == "name either --scorer_url or both --reward_model and --cost_model"


def test_addresses_with_a_path_or_a_strange_name():
    for url in ("http://node12:8000/", "https://gateway/team/score", "http://score", "http://health:8000"):
        assert ScorerClient(url).url == url


@pytest.mark.parametrize("host", ["127.0.0.1:9", "no-such-host.invalid:8000"])
def test_nobody_is_there(host):
    with pytest.raises(ScorerUnavailable) as refusal:
        ScorerClient(f"http://{host}", max_wait=0.5).wait_until_ready()
    assert f"scorer http://{host} gave no answer for" in str(refusal.value) and "\n" not in str(refusal.value)


class Other(http.server.BaseHTTPRequestHandler):
    """Some other service behind the port."""

    def do_GET(self):
        status, headers, body = self.server.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def other():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, {}, b"<html>\nnothing\nhere</html>"), "/health refused the request, 404: <html> nothing here</html>"),
        ((403, {}, b""), "/health refused the request, 403"),
        ((200, {}, b'{"status": "ok"}'), "names no identity: is that a scorer of this project?"),
        ((200, {}, b"[1, 2]"), "names no identity"),
        ((301, {"Location": "http://elsewhere/"}, b""), "sends on to http://elsewhere/; name the scorer itself"),
        ((200, {}, b"<html></html>"), "an answer that is not JSON"),
    ],
)
def test_somebody_else_is_there(other, answer, said):
    other.answer = answer
    with pytest.raises(UserError) as refusal:
        ScorerClient(f"http://127.0.0.1:{other.server_address[1]}", max_wait=0.3).wait_until_ready()
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_https_where_there_is_none():
    with FakeScorer() as scorer, pytest.raises(UserError, match=r"no secure connection: .*; is it http:// there\?"):
        ScorerClient(scorer.url.replace("http:", "https:"), max_wait=5).wait_until_ready()


# --- models that are not what they seem


def test_cost_and_reward_models_in_each_others_place_are_a_loud_warning(tiny_scorers, tmp_path):
    swapped = LocalScorer(tiny_scorers[1], tiny_scorers[0])
    assert any("REWARD_MODEL says in its config that it is a cost model" in line for line in swapped.warnings())
