"""How scorers publish their address and trainers find it: matching, stale files, tokens, SLURM's word."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPO
from fake_scorer import FakeScorer

from alignment.errors import UserError
from alignment.scoring import discovery
from alignment.scoring.discovery import (
    Publication,
    ScorerNotFound,
    address_path,
    find_from_environment,
    find_scorer,
    job_state,
    own_address,
    read_addresses,
    read_secret,
    remove_stale,
    write_secret,
)

DEAD_PID = 2**22 + 1  # beyond the largest process id


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    """A squeue that knows no job, whatever this machine has."""
    squeue(monkeypatch, tmp_path / "bin", {})
    for name in ("EXPERIMENT_ID", "SCORER_JOB_ID", "SLURM_JOB_ID", "LOGS_DIR"):
        monkeypatch.delenv(name, raising=False)


def squeue(monkeypatch, folder: Path, states: dict[str, str]) -> None:
    cases = "".join(f"{job}) echo {state}; exit 0;;\n" for job, state in states.items())
    folder.mkdir(exist_ok=True)
    script = folder / "squeue"
    script.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --jobs ]; do shift; done\ncase "$2" in\n{cases}down) exit 1;;\nesac\n'
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    if str(folder) not in os.environ["PATH"]:
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@contextlib.contextmanager
def scorer(logs: Path, experiment: str | None = None, job: str | None = None, **more):
    """A running scorer that has published its address."""
    with FakeScorer() as fake:
        fake.instance = f"{fake.url}-instance"
        env = {"EXPERIMENT_ID": experiment, "SLURM_JOB_ID": job}
        address = replace(own_address(fake.url, fake.instance, {k: v for k, v in env.items() if v}), **more)
        publication = Publication(address_path(logs, address), address, None)
        publication.write(fake.identity)
        fake.publication = publication
        yield fake


def test_one_scorer_is_found(tmp_path):
    with scorer(tmp_path, "exp", "12") as fake:
        address = find_scorer(tmp_path)
        assert (address.url, address.experiment_id, address.job_id) == (fake.url, "exp", "12")
        assert address.identity == fake.identity
        port = fake.url.rsplit(":", 1)[1]
        assert fake.publication.path == tmp_path.resolve() / "scorer" / f"job12-{socket.gethostname()}-{port}.json"
        fake.publication.remove()
    assert list((tmp_path / "scorer").iterdir()) == []
    with pytest.raises(ScorerNotFound, match=r"no scorer answers in .*: no file\. Start one"):
        find_scorer(tmp_path)


def test_by_experiment_then_job_then_identity(tmp_path):
    with scorer(tmp_path, "a", "1") as a1, scorer(tmp_path, "a", "2") as a2, scorer(tmp_path, None, "3") as b:
        assert find_scorer(tmp_path, job_id="3").url == b.url
        assert find_scorer(tmp_path, experiment_id="a", job_id="2").url == a2.url
        a1.identity = a1.identity | {"dtype": "bfloat16"}
        assert find_scorer(tmp_path, "a", expected_identity=a1.identity).url == a1.url
        # What the scorer has beyond the expected identity decides as well (float8), but for what old identities lack.
        a1.identity = a1.identity | {"fp8": True}
        with pytest.raises(ScorerNotFound, match=f"{a1.url}.*: another identity"):
            find_scorer(tmp_path, "a", "1", b.identity | {"dtype": "bfloat16"})
        assert find_scorer(tmp_path, "a", "1", a1.identity).url == a1.url
        a2.identity = a2.identity | {"backend": "own"}
        assert find_scorer(tmp_path, "a", "2", b.identity).url == a2.url
        assert find_scorer(tmp_path, "a", None, a2.identity | {"fp8_error": {"texts": 24}}).url == a2.url
        with pytest.raises(ScorerNotFound, match=r"no scorer of experiment c, job 1 answers"):
            find_scorer(tmp_path, "c", "1")
        with pytest.raises(ScorerNotFound, match=f"{b.url}.*: another identity"):
            find_scorer(tmp_path, job_id="3", expected_identity=b.identity | {"dtype": "float16"})


def test_several_are_an_error_that_lists_them(tmp_path):
    with scorer(tmp_path, "a", "1") as one, scorer(tmp_path, "a", "2") as two:
        with pytest.raises(UserError, match="2 scorers fit") as caught:
            find_scorer(tmp_path, "a")
        assert not isinstance(caught.value, ScorerNotFound)  # waiting would not help
        for part in (one.url, two.url, "job 1", "job 2", "SCORER_JOB_ID", "--scorer_url"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_of_several_the_known_one_then_its_address_then_its_job(tmp_path):
    with scorer(tmp_path, "a", "1") as one, scorer(tmp_path, "a", "2") as two:
        known = one.publication.address
        assert find_scorer(tmp_path, "a", known=known).url == one.url
        assert find_scorer(tmp_path, "a", known=replace(known, url=two.url)).url == one.url  # the same process
        assert find_scorer(tmp_path, "a", known=replace(known, instance="before", url=two.url)).url == two.url
        elsewhere = replace(known, instance="before", url="http://127.0.0.1:9")
        assert find_scorer(tmp_path, "a", known=elsewhere).url == one.url
        for stranger in (replace(elsewhere, job_id="9"), replace(elsewhere, job_id=None)):
            with pytest.raises(ScorerNotFound, match="2 scorers fit"):  # the known one may come back
                find_scorer(tmp_path, "a", known=stranger)
    with scorer(tmp_path, "a", "3") as third:
        assert find_scorer(tmp_path, "a", known=known).url == third.url


def test_the_environment_of_a_trainer(tmp_path, monkeypatch):
    with scorer(tmp_path, "a", "1") as one, scorer(tmp_path, "b", "2") as two:
        monkeypatch.setenv("LOGS_DIR", str(tmp_path))
        monkeypatch.setenv("EXPERIMENT_ID", "b")
        assert find_from_environment().url == two.url
        monkeypatch.delenv("EXPERIMENT_ID")
        monkeypatch.setenv("SCORER_JOB_ID", "1")
        assert find_from_environment().url == one.url
        script = [sys.executable, "alignment/scoring/discovery.py"]
        assert subprocess.run(script, capture_output=True, text=True, cwd=REPO).stdout == f"{one.url}\n"
        listed = subprocess.run([*script, "--list"], capture_output=True, text=True, cwd=REPO).stdout.splitlines()
        assert [json.loads(line)["state"] for line in listed] == ["ready", "ready"]


def test_files_that_a_killed_scorer_left(tmp_path, monkeypatch):
    squeue(monkeypatch, tmp_path / "bin", {"5": "RUNNING", "6": "TIMEOUT"})
    with scorer(tmp_path, "a", "5"), scorer(tmp_path, "a", "6"), scorer(tmp_path, "a", "7"), scorer(tmp_path, "a"):
        pass  # all have gone
    with pytest.raises(ScorerNotFound) as caught:
        find_scorer(tmp_path, "a")
    told = str(caught.value)
    assert "job 5 is RUNNING;" in told  # it may come back
    assert "job 6 is TIMEOUT: a stale file" in told and "job 7 is gone: a stale file" in told
    with scorer(tmp_path, "a", "8") as alive:
        assert find_scorer(tmp_path, "a").url == alive.url  # the others do not count


def test_another_service_on_the_same_port_is_not_the_scorer(tmp_path):
    with scorer(tmp_path) as fake:
        fake.instance = "somebody else"
        with pytest.raises(ScorerNotFound, match="another service answers there"):
            find_scorer(tmp_path)


def test_a_scorer_that_loads(tmp_path):
    with scorer(tmp_path) as fake:
        fake.identity = None
        assert find_scorer(tmp_path).identity is None
        with pytest.raises(ScorerNotFound, match="still loading"):
            find_scorer(tmp_path, expected_identity={"dtype": "float32"})


def test_loopback_of_another_machine(tmp_path):
    with (
        scorer(tmp_path, host="another-node"),
        pytest.raises(ScorerNotFound, match="listens on the loopback address of another-node only"),
    ):
        find_scorer(tmp_path)


def test_a_starting_scorer_takes_stale_files_away(tmp_path, monkeypatch):
    squeue(monkeypatch, tmp_path / "bin", {"5": "RUNNING", "6": "FAILED", "9": "RUNNING"})
    with (
        scorer(tmp_path, None, "5"),
        scorer(tmp_path, None, "6"),
        scorer(tmp_path, None, None, pid=DEAD_PID),
        scorer(tmp_path, None, None, host="another-node", pid=DEAD_PID),
        scorer(tmp_path, None, "9"),
    ):
        pass
    mine = own_address("http://127.0.0.1:1", "x", {"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "1"})
    with scorer(tmp_path, None, None, pid=DEAD_PID) as answers:
        removed = remove_stale(tmp_path, mine)
        left = [address.job_id or address.host for address in read_addresses(tmp_path).values()]
        assert answers.publication.path.exists()
    assert len(removed) == 3  # the failed job's, the dead process's, and what this job left at its first start
    assert sorted(left) == sorted(["5", "another-node", socket.gethostname()])


def test_jobs_of_another_cluster_with_the_same_home_are_unknown_here(tmp_path, monkeypatch):
    squeue(monkeypatch, tmp_path / "bin", {})  # "Invalid job id"
    with scorer(tmp_path, None, "6", cluster="a"), scorer(tmp_path, None, "7", cluster="b"):
        pass
    mine = own_address("http://127.0.0.1:1", "x", {"SLURM_JOB_ID": "9", "SLURM_CLUSTER_NAME": "b"})
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "b")
    with pytest.raises(ScorerNotFound) as caught:
        find_scorer(tmp_path)
    assert "job 7 is gone: a stale file" in str(caught.value) and "job 6 is" not in str(caught.value)
    assert [name.split("-")[0] for name in remove_stale(tmp_path, mine)] == ["job7"]


def test_waiting_trainers_ask_slurm_once_a_minute(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(discovery, "job_state", lambda job: asked.append(job) or "RUNNING")
    with scorer(tmp_path, None, "61"):
        pass
    for _ in range(3):
        with pytest.raises(ScorerNotFound, match="job 61 is RUNNING"):
            find_scorer(tmp_path)
    assert asked == ["61"]


def test_slurms_word(monkeypatch, tmp_path):
    squeue(monkeypatch, tmp_path / "bin", {"1": "PENDING"})
    assert (job_state("1"), job_state("2"), job_state("down")) == ("PENDING", "gone", None)
    monkeypatch.setenv("PATH", "/nowhere")
    assert job_state("1") is None


def test_what_else_lies_in_the_folder_is_passed_over(tmp_path):
    folder = tmp_path / "scorer"
    folder.mkdir()
    for name, content in {"a": "{", "b": "[]", "c": '{"url": 1}', "d": '{"url": "x"}', "e": "\udcff"}.items():
        (folder / f"{name}.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert read_addresses(tmp_path) == {}
    with scorer(tmp_path) as fake:
        # A later version may write more.
        content = json.loads(fake.publication.path.read_text()) | {"more": 1}
        fake.publication.path.write_text(json.dumps(content))
        assert find_scorer(tmp_path).url == fake.url


def test_only_its_own_file_is_removed(tmp_path):
    with scorer(tmp_path) as fake:
        newer = Publication(fake.publication.path, replace(fake.publication.address, instance="newer"), "t")
        newer.write(None)
        fake.publication.remove()
        assert fake.publication.path.exists()
        newer.remove()
        newer.remove()
    assert list((tmp_path / "scorer").iterdir()) == []


def test_the_tokens_file_is_its_owners_alone(tmp_path):
    address = own_address("http://127.0.0.1:1", "x", {})
    publication = Publication(address_path(tmp_path, address), address, "secret-ü")
    old_mask = os.umask(0)
    try:
        publication.write(None)
    finally:
        os.umask(old_mask)
    token = Path(publication.address.token_file)
    assert token.stat().st_mode & 0o777 == 0o600
    assert read_secret(token) == "secret-ü"
    assert "secret" not in publication.path.read_text()
    token.chmod(0o640)
    with pytest.raises(UserError, match="others can read the token file"):
        read_secret(token)
    write_secret(token, "")
    with pytest.raises(UserError, match="is empty"):
        read_secret(token)
    with pytest.raises(UserError, match="cannot read the token file"):
        read_secret(tmp_path / "absent")
    publication.remove()
    assert list((tmp_path / "scorer").iterdir()) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "scorer").write_text("a file where a folder should be")
    address = own_address("http://127.0.0.1:1", "x", {})
    for token in (None, "secret"):
        publication = Publication(address_path(tmp_path, address), address, token)
        for write in (lambda one: one.write(None), Publication.check):
            with pytest.raises(UserError, match="cannot write"):
                write(publication)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    with scorer(tmp_path) as fake:
        before = fake.publication.path.read_text()

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            fake.publication.write(fake.identity | {"dtype": "float16"})
        with pytest.raises(UserError, match="No space left on device"):
            write_secret(tmp_path / "scorer" / "a.token", "secret")
    assert fake.publication.path.read_text() == before
    assert [path.name for path in (tmp_path / "scorer").iterdir()] == [fake.publication.path.name]


def test_a_check_takes_the_old_address_away(tmp_path):
    path = tmp_path / "address.json"
    path.write_text("{}")
    Publication(path, own_address("http://127.0.0.1:1", "x", {}), None).check()
    assert list(tmp_path.glob("address*")) == []


def test_a_silent_port_does_not_hold_the_search_up(tmp_path, monkeypatch):
    monkeypatch.setattr(discovery, "HEALTH_SECONDS", 0.3)
    with socket.socket() as silent, scorer(tmp_path) as fake:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = own_address(f"http://127.0.0.1:{silent.getsockname()[1]}", "x", {})
        Publication(address_path(tmp_path, address), address, None).write(None)
        assert find_scorer(tmp_path).url == fake.url
