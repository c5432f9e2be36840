"""A scorer service whose answers a test decides: the published interface, scores by rule, faults on demand."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import REPO


def score_of(prompt: str, response: str) -> tuple[float, float]:
    """A reward and a cost in -2..2 that depend on nothing but the two texts."""
    digest = hashlib.sha256(f"{prompt}\0{response}".encode("utf-8", "surrogatepass")).digest()
    return digest[0] / 63.75 - 2, digest[1] / 63.75 - 2


class FakeScorer:
    """`answer(request_number, body)` may change the answer: return a dict, an int for an HTTP status, or None to hang up.

    `pause`: seconds that every answer takes.
    """

    def __init__(
        self, answer: Callable[[int, dict], dict | int | None] | None = None, port: int = 0, pause: float = 0.0
    ):
        self.answer = answer or (lambda number, body: self.scores(body))
        self.identity = {"reward_model": "fake", "cost_model": "fake", "dtype": "float32"}
        self.instance = "fake"
        self.token: str | None = None  # asked for when set
        self.requests: list[dict] = []
        self.counting = threading.Condition()  # no two requests get one number
        self.connections: list[socket.socket] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                fake.connections.append(self.connection)

            def do_GET(self):
                if self.path != "/health" and self.refused():
                    return
                self.reply(
                    200, {"status": "healthy", "device": "cpu", "instance": fake.instance, "identity": fake.identity}
                )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.refused():
                    return None
                with fake.counting:
                    fake.requests.append(body)
                    number = len(fake.requests)
                    fake.counting.notify_all()
                time.sleep(pause)
                result = fake.answer(number, body)
                if result is None:
                    self.close_connection = True
                    return None
                if isinstance(result, int):
                    return self.reply(result, {"detail": "as the test wants"})
                return self.reply(200, result)

            def refused(self) -> bool:
                if fake.token is None or self.headers.get("Authorization") == f"Bearer {fake.token}":
                    return False
                self.reply(401, {"detail": "this scorer wants its token"})
                return True

            def reply(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    def scores(body: dict) -> dict:
        pairs = [score_of(p, r) for p, r in zip(body["prompts"], body["responses"], strict=True)]
        return {"rewards": [pair[0] for pair in pairs], "costs": [pair[1] for pair in pairs]}

    def wait_for_request(self, number: int, timeout: float = 120) -> None:
        """Returns once so many requests have come. Raises AssertionError when they do not come in time."""
        with self.counting:
            came = self.counting.wait_for(lambda: len(self.requests) >= number, timeout)
        assert came, f"{len(self.requests)} requests in {timeout} s, not {number}"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # as when its process ends
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> FakeScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run_until_request(
    scorer: FakeScorer, number: int, sent: signal.Signals, command: list[str], timeout: float = 120, **options: object
) -> subprocess.CompletedProcess[str]:
    """Runs the command and sends it a signal once the scorer has had so many requests."""
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        scorer.wait_for_request(number, timeout)
        process.send_signal(sent)
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()  # where it did not end by itself
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
