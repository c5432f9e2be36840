"""Scorer services for tests: as a process of its own, and inside the test's, with models or with a stub in their place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import uvicorn
from conftest import REPO

from alignment.scoring.http_app import build_app
from alignment.scoring.local_scorer import Conversation, LocalScorer, Score
from alignment.scoring.monitor import Monitor
from alignment.scoring.scorer_service import take_port
from alignment.scoring.service_settings import read_settings
from alignment.scoring.worker import Worker, WorkQueue

SCRIPT = REPO / "alignment" / "scoring" / "scorer_service.py"
START_SECONDS = 90
HELLO = {"prompts": ["hello"], "responses": ["Hello! How can I help you today?"]}


class Service:
    """The service as a subprocess, its log in a file."""

    def __init__(self, models, folder: Path, **env: str) -> None:
        self.log = folder / "scorer.log"
        self.address = folder / "address.json"
        names = {"REWARD_MODEL": str(models[0]), "COST_MODEL": str(models[1])}
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SCORER_", "SLURM_"))}
        clean |= names | {"PORT": "0", "SCORER_ADDRESS_FILE": str(self.address), "OMP_NUM_THREADS": "1"} | env
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT)], env=clean, cwd=REPO, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self) -> Service:
        end = time.monotonic() + START_SECONDS
        while not self.address.exists():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        self.url = json.loads(self.address.read_text())["url"]
        return self

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def post(self, path: str, body, long: bool = False, **more) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=300 if long else 30, **more)


@contextlib.contextmanager
def running(models, folder: Path, **env: str):
    service = Service(models, folder, **env)
    try:
        yield service.wait()
    finally:
        service.stop()


def fails(models, folder: Path, **env: str) -> str:
    """Starts a service that must end by itself with exit code 2; returns the last line of its output."""
    service = Service(models, folder, **env)
    try:
        assert service.process.wait(START_SECONDS) == 2, service.log.read_text()
    finally:
        service.process.kill()
    output = service.log.read_text()
    assert "Traceback" not in output
    return output.strip().splitlines()[-1]


class StubScorer:
    """In the place of LocalScorer: a reward is the text's length, a cost its negative. A closed `gate` holds scoring up."""

    device = "cpu"
    round_tokens = None

    def __init__(self, **_) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.rounds: list[list[str]] = []
        self.error: Exception | None = None
        self.broken = False

    def identity(self) -> dict:
        return {"reward_model": {"name": "stub"}, "max_length": 100}

    def is_small_on_cpu(self) -> bool:
        return False

    def warnings(self, probe) -> list[str]:
        return []

    def device_is_broken(self) -> bool:
        return self.broken

    def encode(self, prompt: str, response: str, finished: bool = True) -> Conversation:
        return self.encode_whole(prompt + response, finished)

    def encode_whole(self, text: str, finished: bool = True) -> Conversation:
        ids = tuple(text.encode())[:100]
        return Conversation(ids, ids, len(text.encode()) > 100, "nothing left" if text == "nothing" else None)

    def queue_encoded(self, conversations: list[Conversation]) -> StubPending:
        assert self.gate.wait(20)
        self.rounds.append([bytes(one.reward_ids).decode() for one in conversations])
        if self.error is not None:
            raise self.error
        return StubPending(conversations)


@dataclass
class StubPending:
    """What `queue_encoded` gives: its scores are there at once."""

    conversations: list[Conversation]

    def result(self) -> list[Score]:
        return [
            Score(None, None, one.error, one.truncated)
            if one.error
            else Score(float(len(one.reward_ids)), -float(len(one.reward_ids)), None, one.truncated)
            for one in self.conversations
        ]


@contextlib.contextmanager
def in_process(models=("reward", "cost"), on_failure=pytest.fail, auth=None, stub: bool = False, **env: str):
    """Worker and HTTP interface in this process: (worker, url)."""
    ready = threading.Event()
    settings = read_settings({"REWARD_MODEL": str(models[0]), "COST_MODEL": str(models[1])} | env)
    jobs = WorkQueue(settings.limits.max_queued_tokens)
    load = StubScorer if stub else LocalScorer
    worker = Worker(settings, jobs, Monitor(), lambda _: ready.set(), on_failure, load)
    worker.monitor.watch(jobs)
    worker.start()
    assert ready.wait(START_SECONDS)
    listener = take_port("127.0.0.1", 0)
    app = build_app(worker, auth, settings.limits, "instance", {"job_id": "7"}, settings.log_texts)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield worker, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        jobs.end()
        thread.join(10)
        worker.join(10)
        assert not worker.is_alive()
