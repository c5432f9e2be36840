"""One process at a time writes a run folder: a second start is refused, and no dead process locks a run for good."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
import threading
import time

import pytest
from conftest import REPO
from grpo_script import command as grpo_command
from script_here import refused
from test_es_training import command as es_command

from alignment import run_lock
from alignment.errors import UserError
from alignment.records import write_jsonl
from alignment.run_lock import RunLock

NOBODY = "http://127.0.0.1:9"
HOLDER = """
import os, subprocess, sys, time
from pathlib import Path
from alignment.run_lock import RunLock
with RunLock(Path(sys.argv[1])) as lock:
    lock.take()
    pids = [subprocess.Popen(["sleep", "60"]).pid]
    if (pid := os.fork()) == 0:
        time.sleep(60)
    print(*pids, pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the lock of tmp_path/run, and two children."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "run"],
        cwd=REPO,
        env=os.environ | {"SLURM_JOB_ID": "77"},
        stdout=subprocess.PIPE,
        text=True,
    )
    children = [int(word) for word in process.stdout.readline().split()]
    yield process
    process.kill()
    process.wait()
    for child in children:
        os.kill(child, 9)  # it is there: nothing else has ended it
    process.stdout.close()


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(run_lock, "LOCK_WAIT", 0.3)


def test_a_second_process_is_told_who_is_there(holder, tmp_path, soon, capsys):
    run = tmp_path / "run"
    with RunLock(run) as lock, pytest.raises(UserError) as refusal:
        lock.take()
    for word in (str(run), f"process {holder.pid} on {platform.node()}", "SLURM job 77", "another folder"):
        assert word in str(refusal.value)
    assert "waiting" in capsys.readouterr().out
    assert (run / ".lock").read_text()  # the refused one has not touched it


def test_a_lock_that_a_lost_machine_keeps_can_be_removed(tmp_path, soon):
    run = tmp_path / "run"
    with RunLock(run) as lost, RunLock(run) as lock:
        lost.take()
        (run / ".lock").write_text('{"pid": 5, "host": "lost-node"}')
        with pytest.raises(UserError, match=f"if lost-node is lost for good: remove {run}/.lock"):
            lock.take()
        (run / ".lock").unlink()
        lock.take()
        with RunLock(run) as third, pytest.raises(UserError, match=f"process {os.getpid()} on"):
            third.take()


def test_children_of_a_killed_process_do_not_hold_its_run(holder, tmp_path, soon):
    holder.kill()
    holder.wait()
    with RunLock(tmp_path / "run") as lock:
        lock.take()


def test_a_start_waits_for_the_one_before_it(tmp_path, capsys):
    run = tmp_path / "run"
    with RunLock(run) as before:
        before.take()
        (run / "journal.jsonl").touch()
        threading.Timer(0.5, lambda: before.__exit__(None, None, None)).start()
        with RunLock(run) as lock:
            began = time.monotonic()
            lock.take()
            assert 0.3 < time.monotonic() - began < 10
    assert f"{run} is in use by process {os.getpid()}" in capsys.readouterr().out


def test_a_start_that_comes_to_nothing_leaves_nothing_and_a_run_an_empty_file(tmp_path):
    run = tmp_path / "runs" / "a"
    for again in range(2):
        with RunLock(run) as lock:
            lock.take()
            assert str(os.getpid()) in (run / ".lock").read_text()
        assert not run.parent.exists(), again
    with RunLock(run) as lock:
        lock.take()
        (run / "journal.jsonl").touch()
    assert (run / ".lock").read_bytes() == b""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path / "run") as lock:
        lock.take()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and os.strerror(number) in line and str(tmp_path / "run") in line


# --- the scripts


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("train", "eval"):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": f"question {i}?"} for i in range(4)])
    return folder


COMMANDS = {"es": es_command, "grpo": grpo_command}


@pytest.mark.parametrize("method", COMMANDS)
def test_a_run_that_is_at_work_is_left_alone(tmp_path, prompts, soon, method):
    run = tmp_path / "run"
    with RunLock(run) as lock:
        lock.take()
        (run / "journal.jsonl").write_text("half a row that its own pro")
        (run / "checkpoints" / "iteration_00001").mkdir(parents=True)
        arguments = COMMANDS[method]("/absent/model", NOBODY, prompts, run)[1:]
        line = refused(*arguments)
        assert f"another run is at work in {run}: process {os.getpid()} on" in line


@pytest.mark.slow
def test_all_processes_end_when_the_first_is_refused(tmp_path, prompts):
    """For half a minute the first one hopes that the other ends; the rest wait with it."""
    run = tmp_path / "run"
    several = {"es": {"num_engines": 2}, "grpo": {"processes": 2}}
    with RunLock(run) as lock:
        lock.take()
        (run / "journal.jsonl").touch()
        before = (run / ".lock").read_text()
        started = {
            method: subprocess.Popen(
                COMMANDS[method]("/absent/model", NOBODY, prompts, run, **several[method]),
                cwd=REPO,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for method in COMMANDS
        }
        for method, process in started.items():
            output, errors = process.communicate(timeout=150)
            assert process.returncode == (2 if method == "es" else 1)  # torchrun's own code
            assert output.count("waiting 30 s") == 1
            assert "Traceback (most" not in errors.split("torch/distributed")[0]
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert {line.split(". Let it end")[0] for line in lines} == {
                f"error: another run is at work in {run}: process {os.getpid()} on {platform.node()}, since "
                + lock_time(before)
            }
            # Of GRPO's two processes torchrun may end the second before it has said it.
            assert len(lines) == 1 or (method, len(lines)) == ("grpo", 2)
        assert (run / ".lock").read_text() == before


def lock_time(content: str) -> str:
    return content.split('"since": "')[1].split('"')[0]
