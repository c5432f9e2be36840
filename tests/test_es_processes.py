"""ES on several processes: the same run as on one, whatever their number, also when one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from fake_scorer import FakeScorer, run_until_request
from test_es_training import REPO, SCRIPT, SMALL, command, run_script, same_weights, without_times

from alignment.records import read_jsonl, write_jsonl

SETTINGS = SMALL | {"num_iterations": 20, "population_size": 6, "eval_every": 10, "save_every": 7}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"question {i}?"} for i in range(8)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held out {i}"} for i in range(5)])
    return folder


@pytest.fixture(scope="module")
def alone(tiny_policy, prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone") / "run"
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **SETTINGS)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_run(run, other):
    assert same_weights(run, other)
    for name in ("journal.jsonl", "metrics.jsonl"):
        assert without_times(read_jsonl(run / name)) == without_times(read_jsonl(other / name))
    for name in ("iteration_00010_points.jsonl", "iteration_00020_points.jsonl"):
        assert (run / "eval" / name).read_bytes() == (other / "eval" / name).read_bytes()


@pytest.mark.slow
def test_four_processes_are_one_run(alone, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **SETTINGS, num_engines=4)
    assert done.returncode == 0, done.stderr
    assert_same_run(run, alone)
    assert done.stdout.count("\nfinished: ") == 1


@pytest.mark.slow
def test_a_killed_process_takes_the_run_down_and_two_go_on(alone, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer() as scorer:
        launcher = subprocess.Popen(
            command(tiny_policy, scorer.url, prompts, run, **SETTINGS, num_engines=3),
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        scorer.wait_for_request(80)
        workers = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        assert len(workers) >= 3
        os.kill(int(workers[1]), signal.SIGKILL)
        output, errors = launcher.communicate(timeout=90)
        assert launcher.returncode != 0
        assert "Traceback" not in errors
        assert not (run / "final").exists()
        done = run_script(tiny_policy, scorer.url, prompts, run, **SETTINGS, num_engines=2)
        assert done.returncode == 0, done.stderr
        assert "going on after step" in done.stdout
    assert_same_run(run, alone)


@pytest.mark.slow
def test_torchrun_starts_it_as_well_and_sigterm_saves(alone, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer(pause=0.01) as scorer:
        single = command(tiny_policy, scorer.url, prompts, run, **SETTINGS)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        stopped = run_until_request(scorer, 60, signal.SIGTERM, [*torchrun, SCRIPT, *single[2:]], env=environment)
        assert "go on with:" in stopped.stdout
        done = run_script(tiny_policy, scorer.url, prompts, run, **SETTINGS)
        assert done.returncode == 0, done.stderr
    assert_same_run(run, alone)


def test_a_scorer_that_is_gone_ends_all_processes_with_one_line(tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number < 20 else 503) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **SETTINGS, num_engines=2)
    assert done.returncode == 75
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert scorer.url in lines[0]
    assert "Traceback" not in done.stderr
