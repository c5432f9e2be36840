"""Training runs whose disk fills up or whose folder was edited by hand, as processes of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from fake_scorer import FakeScorer
from script_here import ES

from alignment.records import read_jsonl, write_jsonl

pytestmark = pytest.mark.slow
SMALL = {"population_size": 2, "batch_size": 2, "num_iterations": 4, "max_new_tokens": 4, "sigma": 0.02, "alpha": 0.05}
SMALL |= {"eval_every": 2, "save_every": 2, "scorer_max_wait": 3, "keep_last": 1}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    write_jsonl(path, [{"prompt": f"question {number}?"} for number in range(4)])
    return path


def train(policy: Path, url: str, prompts: Path, run: Path) -> subprocess.CompletedProcess:
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    files = ["--train_jsonl", str(prompts), "--eval_jsonl", str(prompts), "--experiment_dir", str(run)]
    command = [sys.executable, ES, "--policy_model_path", str(policy), "--scorer_url", url, *files, *flags]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def undisturbed(tiny_policy, prompts, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with FakeScorer() as scorer:
        done = train(tiny_policy, scorer.url, prompts, run)
    assert done.returncode == 0, done.stderr
    return run


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


@pytest.fixture
def disk(tmp_path):
    """Makes `tmp_path/disk` a file system of that many KiB; the same again makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def size(kibibytes: int, how: str = "") -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={kibibytes}k", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system is not allowed here")
        return folder

    yield size
    subprocess.run(["umount", "-l", str(folder)])


@pytest.mark.parametrize("room", [100, 150, 165, 230])
def test_a_run_whose_disk_fills_goes_on_when_there_is_room(tiny_policy, prompts, undisturbed, disk, room):
    """100 KiB are too few for a model, which is told before it is begun; 150 for its tensors, 165 for the tokenizer beside
    them, 230 for a second model."""
    run = disk(room) / "run"
    with FakeScorer() as scorer:
        message = one_line(train(tiny_policy, scorer.url, prompts, run))
        assert str(run) in message
        assert (run / "best").exists() == (room == 230)
        assert not list(run.rglob(".*.tmp"))
        for path in run.rglob("*.jsonl"):
            read_jsonl(path)
        disk(8192, "remount,")
        again = train(tiny_policy, scorer.url, prompts, run)
        assert again.returncode == 0, again.stderr
    weights = [folder / "final" / "model.safetensors" for folder in (run, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_folder_that_was_edited_by_hand(tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer() as scorer:
        assert train(tiny_policy, scorer.url, prompts, run).returncode == 0
        (checkpoint,) = (run / "checkpoints").iterdir()
        shutil.rmtree(run / "final")  # of a run that is finished nothing more is looked at
        damages = {
            checkpoint / "trainer_state.json": "[]",
            run / "best" / "trainer_state.json": '{"objective": "high"}',
            run / "journal.jsonl": json.dumps({"kind": "start"}) + "\n",
            run / "metrics.jsonl": "[]\n",
        }
        for path, content in damages.items():
            if path.parent.name == "best":  # is looked at when the next evaluation is better or not
                rows = read_jsonl(run / "metrics.jsonl")
                write_jsonl(run / "metrics.jsonl", [row for row in rows if row != rows[-1]])
            former = path.read_bytes()
            path.write_text(content)
            assert str(path) in one_line(train(tiny_policy, scorer.url, prompts, run))
            path.write_bytes(former)
