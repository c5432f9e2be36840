"""ES on several processes: the same run as on one, whatever their number, also when one of them is killed."""

from __future__ import annotations

import os
import signal
import socket
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


def srun(count: int, folder, arguments: list) -> list[tuple[int, str, str]]:
    """Exit code and output of each of `count` processes that have what srun's tasks have, and nothing of torch's."""
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho localhost\n")
    scontrol.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count)}
    step |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}
    tasks = [
        subprocess.Popen(
            arguments,
            cwd=REPO,
            env=os.environ
            | step
            | {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
            | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        ends = [task.communicate(timeout=100) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    return [(task.returncode, *end) for task, end in zip(tasks, ends, strict=True)]


@pytest.mark.slow
def test_srun_and_num_engines_are_one_run(alone, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer() as scorer:
        arguments = command(tiny_policy, scorer.url, prompts, run, **SETTINGS, num_engines=2)
        tasks = srun(2, tmp_path, arguments)
    assert [code for code, _, _ in tasks] == [0, 0], tasks
    assert sum(output.count("\nfinished: ") for _, output, _ in tasks) == 1
    assert sorted(path.name for path in run.glob("members.*")) == ["members.0.jsonl", "members.1.jsonl"]
    assert_same_run(run, alone)


def test_srun_with_another_number_of_tasks_than_num_engines(tiny_policy, prompts, tmp_path):
    arguments = command(tiny_policy, "http://127.0.0.1:9", prompts, tmp_path / "run", num_engines=4)
    for code, _, errors in srun(2, tmp_path, arguments):
        assert code == 2
        assert "num_engines is 4, but 2 processes were launched" in errors


def test_a_scorer_that_is_gone_ends_all_processes_with_one_line(tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number < 20 else 503) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **SETTINGS, num_engines=2)
    assert done.returncode == 75
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert scorer.url in lines[0]
    assert "Traceback" not in done.stderr
