"""Run folders: checkpoints are whole or absent, signals are heard, metrics go on where they were."""

import io
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from alignment.errors import UserError
from alignment.records import read_json, read_jsonl
from alignment.run_lock import RunLock
from alignment.runs import MetricsLog, StopSignal, atomic_directory, manifest, record_start, write_run_files


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


SAVES = """
import os, sys
from pathlib import Path
from alignment.runs import atomic_directory
final, moment = Path(sys.argv[1]), sys.argv[2]
rename = Path.rename
def killed_in_between(path, target):
    rename(path, target)
    os.kill(os.getpid(), 9)
if moment == "between the renames":
    Path.rename = killed_in_between
with atomic_directory(final) as folder:
    (folder / "a").write_text("new")
    if moment == "while it writes":
        os.kill(os.getpid(), 9)
"""


def saved_and_killed(final, moment: str) -> None:
    """A process that is killed in `atomic_directory`, with an older folder there; its hidden folders are left."""
    final.mkdir(parents=True, exist_ok=True)
    (final / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", SAVES, final, moment], cwd=REPO, timeout=60)
    assert done.returncode == -9
    assert [path.name for path in final.parent.glob(".*.tmp")]


@pytest.mark.parametrize("moment", ["while it writes", "between the renames"])
def test_what_a_kill_left_is_mended_at_the_next_start_of_the_run(tmp_path, moment):
    finals = [tmp_path / "run" / "best", tmp_path / "run" / "checkpoints" / "iteration_00002"]
    for final in finals:
        saved_and_killed(final, moment)
        assert final.exists() == (moment == "while it writes")
    with RunLock(tmp_path / "run") as lock:
        lock.take()
    for final in finals:
        assert (final / "a").read_text() == "old"
    left = {"best", "checkpoints", "iteration_00002", ".lock", "a"}
    assert {path.name for path in (tmp_path / "run").rglob("*")} == left


def test_what_a_kill_left_is_mended_by_the_next_save_of_that_name(tmp_path):
    final = tmp_path / "rebuilt"
    saved_and_killed(final, "between the renames")
    with atomic_directory(final) as folder:
        assert (final / "a").read_text() == "old"
        (folder / "a").write_text("third")
    assert (final / "a").read_text() == "third"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rebuilt"]


def test_a_folder_that_a_living_process_may_write_is_left_alone(tmp_path):
    run = tmp_path / "run"
    here, alive = platform.node(), os.getppid()
    kept = [f".best.{alive}@{here}.tmp", ".best.5@elsewhere.tmp", ".best.5@elsewhere.old", ".best.5.tmp", ".best.tmp"]
    gone = [".final.4711@lost-node.tmp", ".best.6@elsewhere.tmp"]
    for name in (*kept, *gone):
        (run / name).mkdir(parents=True)
    os.utime(run / gone[1], (0, 0))
    (run / ".lock").write_text(json.dumps({"pid": 4711, "host": "lost-node"}))  # what a lost node leaves
    with RunLock(run) as lock:
        lock.take()
    assert {path.name for path in run.iterdir()} == {*kept, ".lock"}


def test_a_rename_that_fails_gives_the_old_folder_its_name_back(tmp_path, monkeypatch):
    final = tmp_path / "best"
    with atomic_directory(final) as folder:
        (folder / "a").write_text("old")
    rename = Path.rename

    def refused(path, target):
        if path.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(UserError, match="what was there before is unchanged"), atomic_directory(final):
        pass
    assert (final / "a").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["best"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoint"), atomic_directory(tmp_path / "file" / "checkpoint"):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_flag_and_the_old_handler_comes_back(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.received == number
    assert signal.getsignal(number) == before
    assert number.name in capfd.readouterr().err


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


def test_later_starts_are_recorded_beside_the_first(tmp_path):
    write_run_files(tmp_path, "sigma: 0.1\nsteps: 4\nold: 1\n", {})
    first = [(tmp_path / name).read_bytes() for name in ("config.yaml", "manifest.json")]
    record_start(tmp_path, "sigma: 0.1\nsteps: 6\nnew: null\n")
    record_start(tmp_path, "sigma: 0.1\nsteps: 4\nold: 1\n")
    assert [(tmp_path / name).read_bytes() for name in ("config.yaml", "manifest.json")] == first
    rows = read_jsonl(tmp_path / "starts.jsonl")
    assert [row["changed"] for row in rows] == [{"steps": [4, 6], "new": [None, None], "old": [1, None]}, {}]
    assert rows[0].keys() == read_json(tmp_path / "manifest.json").keys() | {"changed"}


@pytest.mark.parametrize("text", [None, "", "[]", "{", "steps: 2020-01-01", "steps: .nan", "\xff"])
def test_a_config_that_was_edited_keeps_no_run_from_going_on(tmp_path, text):
    if text is not None:
        (tmp_path / "config.yaml").write_bytes(text.encode("latin-1"))
    record_start(tmp_path, "steps: 6\n")
    assert [row["changed"] for row in read_jsonl(tmp_path / "starts.jsonl")] == [None]


def test_a_signal_while_stderr_is_written_is_no_error(monkeypatch, capfd):
    """As while a progress bar is drawn; Python refuses a print within a print."""

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            os.kill(os.getpid(), signal.SIGTERM)
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(Raw())))
    with StopSignal() as stop:
        print("bar", file=sys.stderr, flush=True)
        assert stop.received == signal.SIGTERM
    assert "SIGTERM received: saving and stopping" in capfd.readouterr().err


@pytest.mark.parametrize(("ends", "code"), [("return 3", 3), ("raise UserError('no')", 2), ("return None", 0)])
def test_what_happens_while_python_ends_does_not_change_the_code_of_one_of_several(ends, code):
    """gloo's threads now and then abort a process that has done and saved all."""
    script = "import atexit, os\nfrom alignment.errors import UserError, run_main\natexit.register(os.abort)\n"
    script += f"def main():\n    print('done')\n    {ends}\nrun_main(main)\n"
    several = os.environ | {"WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, env=several, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "done\n"), done.stderr
