"""Judging through the real openai client against a local server: nothing is lost, counted twice, or paid twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_openai import KEY, FakeOpenAI, hash_number

from alignment.errors import run_main
from alignment.evaluation import gpt_elo_eval
from alignment.records import read_jsonl, write_jsonl

QUALITY = {"poor": 3, "fair": 4.5, "good": 6, "better": 7.5, "best": 9}
FAULTS = ("rate_limit", "server_error", "drop", "drop_inside", "broken_body", "html", "no_choices")
FAULTS += ("broken_content", "cut", "quote_only", "refuse", "refuse_400", "quoting", "quoting", "text")


def make_points(folder: Path, models, prompts: int) -> None:
    for model in models:
        rows = [
            {
                "prompt": f"question {i}: how do I open a jar?",
                "response": f"{model} says: turn the lid {i} times. [[10, 1]] quality={QUALITY[model]}",
                "reward": float(QUALITY[model]),
                "cost": -float(QUALITY[model]),
                "label": "SH",
            }
            for i in range(prompts)
        ]
        write_jsonl(folder / f"{model}_points.jsonl", rows)


def arguments(folder: Path, server: FakeOpenAI, models, *more: str) -> list[str]:
    fast = [
        "--retry_wait",
        "0.02",
        "--timeout",
        "1",
        "--draws",
        "100",
        "--max_prompts",
        "0",
        "--normalize_to",
        models[0],
    ]
    outputs = ["--judgments-out", str(folder / "judgments.jsonl"), "--ratings-out", str(folder / "ratings.json")]
    outputs += ["--plot-out", str(folder / "scatter.png")]
    return ["--data-dir", str(folder), "--models", *models, "--base-url", server.url, *fast, *outputs, *more]


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the script's main in this process, as its last line does."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def run(folder, server, models, *more, key: str | None = KEY) -> Done:
        if key:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        else:
            monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        with pytest.raises(SystemExit) as exit:
            run_main(lambda: gpt_elo_eval.main(arguments(folder, server, models, *more)))
        return Done(exit.value.code, *capsys.readouterr())

    return run


def start(folder, server, models) -> subprocess.Popen:
    """The script in a process of its own, to be killed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return subprocess.Popen(
        [sys.executable, gpt_elo_eval.__file__, *arguments(folder, server, models)],
        env=kept | {"NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(process: subprocess.Popen, path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def decided(folder: Path) -> dict[str, dict]:
    """key -> its one record with a verdict; fails when a key has two."""
    rows = [row for row in read_jsonl(folder / "judgments.jsonl") if row["outcome"] in ("win", "loss", "tie")]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def check_scores(records) -> None:
    """Every record holds the qualities of the two models in the order in which they were shown."""
    for record in records:
        assert record["scores"] == [QUALITY[record["model_a"]], QUALITY[record["model_b"]]]
        assert record["outcome"] == ("win" if record["scores"][0] > record["scores"][1] else "loss")
        assert record["order_ab"] == [record["model_a"], record["model_b"]]


def check_no_key(folder: Path, *outputs: str) -> None:
    secret = KEY.removeprefix("sk-")
    assert not any(secret in text for text in outputs)
    for path in folder.iterdir():
        assert secret.encode() not in path.read_bytes(), path


def first_call_fails(attempt: int, content: str) -> str:
    """Each kind of fault on the first call of some judgments, and once more on the second of a few."""
    number = hash_number(content)
    if attempt == 0 or (attempt == 1 and number % 7 == 0):
        return FAULTS[number // 100 % len(FAULTS)] if number % 3 else "verdict"
    return "verdict"


def test_every_fault_is_survived_and_only_verdicts_count(run, tmp_path):
    models = ["poor", "good", "best"]
    make_points(tmp_path, models, prompts=8)

    def plan(attempt, content):
        return "hang" if attempt == 0 and hash_number(content) % 29 == 0 else first_call_fails(attempt, content)

    with FakeOpenAI(plan) as server:
        done = run(tmp_path, server, models)
    assert done.returncode == 0, done.stderr
    for fault in ("rate_limit", "drop", "broken_body", "refuse", "quoting", "hang"):
        assert server.done[fault], f"{fault} did not happen"
    records = decided(tmp_path)
    assert len(records) == 8 * 2 * 6  # prompts, dimensions, ordered pairs
    check_scores(records.values())
    assert set(server.verdicts.values()) == {1}
    ratings = json.loads((tmp_path / "ratings.json").read_text())
    for part in ratings.values():
        assert part["poor"] == 1000.0 and 1000 < part["good"] < part["best"] < 10_000
    details = json.loads((tmp_path / "ratings_details.json").read_text())
    assert details["source"]["outcomes"] == {"win": 48, "loss": 48}
    assert details["source"]["usage"]["replies"] == sum(
        row.get("usage") is not None for row in read_jsonl(tmp_path / "judgments.jsonl")
    )
    part = details["dimensions"]["helpfulness"]
    assert part["position_bias"]["both_orders"] == {"pairs": 24, "same": 24, "first": 0, "second": 0, "one_tie": 0}
    assert part["position_bias"]["first_wins"]["value"] == 50.0
    assert part["agreement_with_scorer"]["share"]["value"] == 100.0
    check_no_key(tmp_path, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_thousand_judgments_with_faults_kill_9_and_rerun(run, tmp_path):
    models = list(QUALITY)
    make_points(tmp_path, models, prompts=25)
    hung: Counter[str] = Counter()

    def plan(attempt, content):
        if attempt == 0 and hash_number(content) % 83 == 0:
            hung[content] += 1
            return "hang"
        return first_call_fails(attempt, content)

    path = tmp_path / "judgments.jsonl"
    with FakeOpenAI(plan, delay=0.005) as server:
        for target in (200, 600):
            process = start(tmp_path, server, models)
            wait_for_lines(process, path, target)
            process.send_signal(signal.SIGKILL)
            check_no_key(tmp_path, *process.communicate())
            with open(path, "ab") as file:  # what a kill in the middle of a write leaves
                file.write(b'{"model_a": "poor", "mod')
        assert path.read_bytes().count(b"\n") < 1000
        done = run(tmp_path, server, models)
        assert done.returncode == 0, done.stderr
        calls = sum(server.attempts.values())
        again = run(tmp_path, server, models)
        assert again.returncode == 0 and sum(server.attempts.values()) == calls  # nothing is asked twice
    records = decided(tmp_path)
    assert len(records) == 1000
    assert "1000 of 1000 judgments have a verdict" in done.stdout
    check_scores(records.values())
    # only a reply that was on its way when the process died is paid a second time
    assert len(server.verdicts) == 1000 and sum(server.verdicts.values()) <= 1000 + 2 * 8
    assert len(hung) > 3
    for fault in FAULTS:
        assert server.done[fault], f"{fault} did not happen"
    assert json.loads((tmp_path / "ratings_details.json").read_text())["source"]["outcomes"] == {
        "win": 500,
        "loss": 500,
    }
    check_no_key(tmp_path, done.stdout, done.stderr, again.stdout, again.stderr)


@pytest.mark.parametrize("key", ["sk-wrong-2718281828459045", KEY])
def test_a_refused_key_stops_at_once_with_one_line_and_shows_no_key(run, tmp_path, key):
    make_points(tmp_path, ["poor", "best"], prompts=50)
    with FakeOpenAI(lambda attempt, content: "unauthorized", delay=0.01) as server:
        done = run(tmp_path, server, ["poor", "best"], key=key)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "refused the key in OPENAI_API_KEY (HTTP 401)" in line
    assert sum(server.attempts.values()) <= 8  # one round at most
    assert not read_jsonl(tmp_path / "judgments.jsonl")
    assert not (tmp_path / "ratings.json").exists()
    secret = key.removeprefix("sk-")
    assert secret not in done.stdout + done.stderr
    check_no_key(tmp_path, done.stdout, done.stderr)


def test_without_a_key_or_with_one_as_an_argument_nothing_is_asked(run, tmp_path):
    make_points(tmp_path, ["poor", "best"], prompts=2)
    with FakeOpenAI() as server:
        without = run(tmp_path, server, ["poor", "best"], key=None)
        given = [
            run(tmp_path, server, ["poor", "best"], *words) for words in (["--api-key", KEY], [f"--api_key={KEY}"])
        ]
    assert without.returncode == 2 and "OPENAI_API_KEY is not set" in without.stderr
    for done in given:
        assert done.returncode == 2 and "export OPENAI_API_KEY" in done.stderr
        check_no_key(tmp_path, done.stdout, done.stderr)
    assert not server.attempts


def test_a_baseline_that_is_not_there_is_told_before_anything_is_paid_for(run, tmp_path):
    make_points(tmp_path, ["poor", "best"], prompts=2)
    with FakeOpenAI() as server:
        done = run(tmp_path, server, ["poor", "best"], "--normalize-to", "Best")
    assert done.returncode == 2 and "--normalize_to Best: not among the models, which are poor, best" in done.stderr
    assert not server.attempts


@pytest.mark.parametrize("address", ["not a url", "ftp://x/v1", "http://x:port/v1"])
def test_an_address_that_is_none_is_an_error_at_once(run, tmp_path, address):
    make_points(tmp_path, ["poor", "best"], prompts=2)
    with FakeOpenAI() as server:
        done = run(tmp_path, server, ["poor", "best"], "--base-url", address)
    assert done.returncode == 2 and done.stderr.startswith("error: --base_url / OPENAI_BASE_URL: ")
    assert not (tmp_path / "judgments.jsonl").exists()


@pytest.mark.parametrize(
    "what, told",
    [
        ("no_model", "no chat completions for the model"),
        ("quota", "no money left"),
        ("long_wait", "asks to wait 86400 s"),
    ],
)
def test_what_cannot_succeed_stops_with_its_reason(run, tmp_path, what, told):
    make_points(tmp_path, ["poor", "best"], prompts=20)
    with FakeOpenAI(lambda attempt, content: what if hash_number(content) % 4 == 0 else "verdict") as server:
        done = run(tmp_path, server, ["poor", "best"])
    assert done.returncode == 2 and told in done.stderr
    assert done.stderr.count("error:") == 1
    # what was under way and paid is kept
    assert len(decided(tmp_path)) == sum(server.verdicts.values()) < 80


def test_an_endpoint_that_is_away_stops_the_run_after_a_while(run, tmp_path):
    make_points(tmp_path, ["poor", "best"], prompts=40)
    with FakeOpenAI(lambda attempt, content: "server_error") as server:
        done = run(tmp_path, server, ["poor", "best"], "--tries", "2", "--concurrency", "2")
    assert done.returncode == 2 and "judgments failed (HTTP 500" in done.stderr
    assert sum(server.attempts.values()) < 50
    check_no_key(tmp_path, done.stdout, done.stderr)


def test_refused_and_unparsed_are_reported_left_out_and_asked_again_by_the_next_run(run, tmp_path):
    make_points(tmp_path, ["poor", "good", "best"], prompts=10)
    bad = {"refuse": 0, "refuse_400": 1, "quote_only": 2, "too_long": 3}

    def plan(attempt, content):
        return next((name for name, rest in bad.items() if hash_number(content) % 17 == rest), "verdict")

    with FakeOpenAI(plan) as server:
        first = run(tmp_path, server, ["poor", "good", "best"])
        calls = sum(server.attempts.values())
        server.plan = lambda attempt, content: "verdict"
        outcomes = json.loads((tmp_path / "ratings_details.json").read_text())["source"]["outcomes"]
        second = run(tmp_path, server, ["poor", "good", "best"])
    assert first.returncode == second.returncode == 0
    undecided = {name: outcomes.get(name, 0) for name in ("refused", "unparsed", "failed")}
    assert all(undecided.values()) and sum(outcomes.values()) == 120
    assert f"{undecided['unparsed']} unparsed" in first.stdout
    assert sum(server.attempts.values()) - calls == sum(undecided.values())
    assert len(decided(tmp_path)) == 120
    check_scores(decided(tmp_path).values())


def test_an_endpoint_without_structured_output_or_newer_names_is_adapted_to(run, tmp_path):
    make_points(tmp_path, ["poor", "best"], prompts=10)
    with FakeOpenAI(lambda attempt, content: "no_schema") as server:
        done = run(tmp_path, server, ["poor", "best"], "--concurrency", "3")
    assert done.returncode == 0, done.stderr
    check_scores(decided(tmp_path).values())
    assert len(decided(tmp_path)) == 40
    last = server.requests[-1]
    assert "response_format" not in last and last["max_tokens"] == 1000 and "[[a, b]]" in last["messages"][0]["content"]
    assert sum(server.attempts.values()) <= 40 + 2 * 3  # each parameter is found out once a worker


def test_options_are_recorded_as_they_were_sent(run, tmp_path):
    models, path = ["poor", "best"], tmp_path / "judgments.jsonl"
    make_points(tmp_path, models, prompts=2)  # 8 judgments

    def options() -> list[dict]:
        return json.loads((tmp_path / "ratings_details.json").read_text())["source"]["options"]

    with FakeOpenAI() as server:
        assert "note" not in run(tmp_path, server, models).stderr
        sent = {"temperature": 0.2, "max_completion_tokens": 1000, "response_format": "json_schema"}
        assert options() == [{"options": sent, "judgments": 8}]
        again = run(tmp_path, server, models, "--temperature", "0.9")
        assert sum(server.attempts.values()) == 8 and options() == [{"options": sent, "judgments": 8}]
        assert "note: 8 judgments were asked for at temperature 0.2, not at 0.9" in again.stderr
        rows = read_jsonl(path)
        del rows[0]["options"]  # a line of a former version
        write_jsonl(path, rows[:6])
        server.plan = lambda attempt, content: "no_temperature"
        done = run(tmp_path, server, models)
    assert f"note: {server.url}/ does not take temperature: left out" in done.stderr
    assert "2 judgments were asked for without a temperature, so at the endpoint's own, not at 0.2" in done.stderr
    assert "1 judgments do not say at which temperature they were asked for" in done.stderr
    del sent["temperature"]
    assert {"options": sent, "judgments": 2} in options() and {"options": None, "judgments": 1} in options()
    assert all(row["options"] == sent for row in read_jsonl(path)[6:])


def test_concurrency_adapts_to_what_the_endpoint_takes(run, tmp_path):
    make_points(tmp_path, ["poor", "best"], prompts=30)
    with FakeOpenAI(delay=0.02, most=4) as server:
        done = run(tmp_path, server, ["poor", "best"], "--concurrency", "32")
    assert done.returncode == 0, done.stderr
    assert len(decided(tmp_path)) == 120
    assert server.peak > 4 and server.done["rate_limit"] < 80  # it slows down instead of knocking on


def test_dry_run_needs_no_key_asks_nothing_and_budget_stops_in_time(run, tmp_path):
    models = ["poor", "good", "best"]
    make_points(tmp_path, models, prompts=10)
    price = ["--price_in", "1", "--price_out", "10"]  # a reply of 1000 + 100 tokens costs 0.002
    with FakeOpenAI() as server:
        dry = run(tmp_path, server, models, *price, "--dry-run", key=None)
        assert dry.returncode == 0 and "120 judgments: 0 in" in dry.stdout and "120 calls to make" in dry.stdout
        assert "$" in dry.stdout and not server.attempts and not (tmp_path / "judgments.jsonl").exists()
        part = run(tmp_path, server, models, *price, "--budget", "0.1")
        spent = 0.002 * sum(server.attempts.values())
        assert part.returncode == 3 and "--budget 0.1 is spent" in part.stderr
        assert 0.085 < spent <= 0.1
        assert (tmp_path / "ratings.json").exists()
        more = run(tmp_path, server, models, *price, "--budget", "0.1")  # former runs count
        assert more.returncode == 3 and 0.002 * sum(server.attempts.values()) <= 0.1
        rest = run(tmp_path, server, models, *price)
    assert rest.returncode == 0 and sum(server.attempts.values()) == 120
    assert json.loads((tmp_path / "ratings_details.json").read_text())["source"]["usage"]["dollars"] == pytest.approx(
        0.24
    )


def test_every_reply_has_the_price_of_its_own_judge(run, tmp_path):
    models = ["poor", "best"]
    make_points(tmp_path, models, prompts=5)  # 20 judgments, a reply has 1000 + 100 tokens

    def judged(judge, *more) -> tuple[Done, dict]:
        done = run(tmp_path, server, models, "--judge-model", judge, *more)
        return done, json.loads((tmp_path / "ratings_details.json").read_text())["source"]["usage"]

    with FakeOpenAI() as server:
        judged("gpt-4o")  # 0.0035 dollars a reply
        done, usage = judged("own", "--price_in", "1", "--price_out", "10", "--budget", "0.13")  # 0.002 a reply
        assert done.returncode == 0 and "$0.07 spent before" in done.stdout and usage["dollars"] == pytest.approx(0.11)
        done, usage = judged("gpt-4.1-nano", "--dry-run")
        assert "$0.07 spent before; not counted: 20 replies of own, whose price is not known" in done.stdout
        done, usage = judged("gpt-4.1-nano", "--price_in", "0", "--price_out", "0", "--budget", "1")
        assert done.returncode == 2 and "the judgments file holds 20 replies of own, whose price" in done.stderr
        assert "--judgments_out" in done.stderr and sum(server.attempts.values()) == 40
        done, usage = judged("gpt-4.1-nano")
    assert usage["dollars"] == pytest.approx(20 * (0.0035 + 0.00014)) and usage["without_price"] == {"own": 20}
    assert usage["replies"] == 60


@pytest.mark.slow
def test_sigterm_keeps_what_is_under_way_and_a_second_run_is_locked_out(run, tmp_path):
    make_points(tmp_path, ["poor", "best"], prompts=100)
    path = tmp_path / "judgments.jsonl"
    with FakeOpenAI(delay=0.1) as server:
        process = start(tmp_path, server, ["poor", "best"])
        wait_for_lines(process, path, 10)
        other = run(tmp_path, server, ["poor", "best"])
        assert other.returncode == 2 and "being written by another run" in other.stderr
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command again" in error and "Traceback" not in error
    assert len(decided(tmp_path)) == sum(server.verdicts.values()) < 400


def test_new_answers_are_judged_anew_and_equal_answers_cost_nothing(run, tmp_path):
    make_points(tmp_path, ["poor", "best"], prompts=5)
    with FakeOpenAI() as server:
        run(tmp_path, server, ["poor", "best"])
        rows = read_jsonl(tmp_path / "best_points.jsonl")
        rows[0]["response"] = "another answer, quality=9"
        rows[1]["response"] = read_jsonl(tmp_path / "poor_points.jsonl")[1]["response"]
        write_jsonl(tmp_path / "best_points.jsonl", rows)
        done = run(tmp_path, server, ["poor", "best"])
    assert done.returncode == 0, done.stderr
    assert sum(server.attempts.values()) == 20 + 4
    details = json.loads((tmp_path / "ratings_details.json").read_text())
    assert details["source"]["outcomes"] == {"win": 8, "loss": 8, "tie": 4}
