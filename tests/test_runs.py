"""Run folders: checkpoints are whole or absent, signals are heard, metrics go on where they were."""

import json
import os
import signal

import pytest

from alignment.errors import UserError
from alignment.runs import MetricsLog, StopSignal, atomic_directory, manifest


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    final = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with atomic_directory(final) as folder:
            (folder / "a").write_text(content)
            assert not final.exists() or (final / "a").read_text() != content
    assert (final / "a").read_text() == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_failure_leaves_the_old_folder(tmp_path):
    final = tmp_path / "checkpoint"
    with atomic_directory(final) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(final) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert (final / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoint"), atomic_directory(tmp_path / "file" / "checkpoint"):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_flag_and_the_old_handler_comes_back(number, capsys):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.received == number
    assert signal.getsignal(number) == before
    assert number.name in capsys.readouterr().err


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_metrics_after_the_place_a_run_goes_on_from_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, keep=lambda row: True)
    for iteration in range(5):
        log.log({"kind": "train", "iteration": iteration, "objective": float(iteration)}, iteration)
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "iterat')  # what a kill leaves
    log = MetricsLog(tmp_path, keep=lambda row: row["iteration"] < 3)
    log.log({"kind": "train", "iteration": 3, "objective": 30.0}, 3)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["objective"] for row in rows] == [0.0, 1.0, 2.0, 30.0]


def test_the_manifest_says_what_ran():
    found = manifest({"base_weights": "abc"})
    assert found["base_weights"] == "abc"
    assert found["command"]
    assert {"python", "torch", "transformers"} <= found["versions"].keys()
