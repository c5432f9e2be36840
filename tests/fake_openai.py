"""A local server with OpenAI's chat-completions interface that judges by a number in the answers, and misbehaves on request.

An answer that holds `quality=7` gets the score 7. `plan(attempt, content)` names what happens to a call: one of the methods
below that start with `act_`, by the name behind that; attempt 0 is the first call with that content (dimension and user
message).
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-3141592653589793"
ANSWER = re.compile(r"==== (\w+) answer of ([AB]) begins ====\n(.*?)\n==== \1 answer of \2 ends ====", re.DOTALL)


def hash_number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


class FakeOpenAI(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, plan: Callable[[int, str], str] = lambda attempt, content: "verdict", *, delay=0.0, most=10**6):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.plan, self.delay, self.most = plan, delay, most
        self.lock = threading.Lock()
        self.attempts: Counter[str] = Counter()  # calls by content
        self.done: Counter[str] = Counter()  # what was done, by name
        self.verdicts: Counter[str] = Counter()  # verdicts sent, by content
        self.active = self.peak = 0
        self.requests: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> FakeOpenAI:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeOpenAI

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, (system, user) = self.server, [message["content"] for message in body["messages"]]
        self.content = ("helpfulness\n" if "how helpful" in system else "harmlessness\n") + user
        self.body, self.as_json = body, "response_format" in body
        with server.lock:
            attempt = server.attempts[self.content]
            server.attempts[self.content] += 1
            server.active += 1
            server.peak = max(server.peak, server.active)
            crowded = server.active > server.most
            server.requests.append(body)
        try:
            time.sleep(server.delay)
            if self.headers["Authorization"] != f"Bearer {KEY}":
                what = "unauthorized"
            else:
                what = "rate_limit" if crowded else server.plan(attempt, self.content)
            with server.lock:
                server.done[what] += 1
            getattr(self, f"act_{what}")()
        finally:
            with server.lock:
                server.active -= 1

    # what may happen to a call

    def act_verdict(self) -> None:
        a, b = self.scores()
        if self.as_json:
            self.reply(json.dumps({"analysis": "B is [[10, 1]] worse.", "score_a": a, "score_b": b}))
        else:
            self.reply(f"A is good.\n\n[[{a}, {b}]]")

    def act_quoting(self) -> None:
        """A verdict of the candidate's own is quoted in the analysis, before the judge's verdict."""
        a, b = self.scores()
        analysis = 'Assistant B claims:\n[[10, 1]]\nand {"score_a": 10, "score_b": 1}, which I do not follow.'
        if self.as_json:
            self.reply(json.dumps({"analysis": analysis, "score_a": a, "score_b": b}))
        else:
            self.reply(f"{analysis}\n\nFinal scores: [[{a}, {b}]]")

    def act_text(self) -> None:
        """An endpoint that takes response_format and ignores it."""
        a, b = self.scores()
        self.reply(f"Both answers are short.\n\n**[[{a}, {b}]]**")

    def act_quote_only(self) -> None:
        self.reply("Assistant A says [[10, 1]], and I will not rate that.", verdict=False)

    def act_cut(self) -> None:
        self.reply('{"analysis": "It begins well\n[[9, 1]]', finish="length", verdict=False)

    def act_broken_content(self) -> None:
        self.reply('{"analysis": "quite good", "score_a": 9, "sco', verdict=False)

    def act_refuse(self) -> None:
        self.reply("", finish="content_filter", verdict=False)

    def act_refuse_400(self) -> None:
        self.error(400, "The response was filtered by the content management policy", code="content_filter")

    def act_rate_limit(self) -> None:
        self.error(429, "Rate limit reached", code="rate_limit_exceeded", headers={"Retry-After": "0.1"})

    def act_long_wait(self) -> None:
        self.error(429, "Daily limit", code="rate_limit_exceeded", headers={"Retry-After": "86400"})

    def act_quota(self) -> None:
        self.error(429, "You exceeded your current quota", code="insufficient_quota")

    def act_server_error(self) -> None:
        self.error(500, f"internal error, the key was {KEY}")

    def act_unauthorized(self) -> None:
        self.error(401, f"Incorrect API key provided: {self.headers['Authorization']}", code="invalid_api_key")

    def act_no_model(self) -> None:
        self.error(404, "The model does not exist", code="model_not_found")

    def act_no_schema(self) -> None:
        """An endpoint without structured output and with the older name of the token limit."""
        for name in ("response_format", "max_completion_tokens"):
            if name in self.body:
                self.error(400, f"Unknown parameter: '{name}'", code="unknown_parameter")
                return
        self.act_verdict()

    def act_no_temperature(self) -> None:
        """A model with a temperature of its own, as OpenAI tells it."""
        if "temperature" in self.body:
            self.error(
                400, "Unsupported value: 'temperature' does not support 0.2 with this model", "unsupported_value"
            )
        else:
            self.act_verdict()

    def act_too_long(self) -> None:
        self.error(400, "maximum context length is 4096, max_completion_tokens is 1000", code="context_length_exceeded")

    def act_hang(self) -> None:
        time.sleep(3.0)
        self.close_connection = True

    def act_drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def act_drop_inside(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(b'{"id": "x", "choices": [')
        self.close_connection = True

    def act_broken_body(self) -> None:
        self.send(200, b'{"id": "x", "choices": [{"message": {"content": "[[9, 1]]"')

    def act_html(self) -> None:
        self.send(200, b"<html>a proxy's page [[9, 1]]</html>", content_type="text/html")

    def act_no_choices(self) -> None:
        self.send(200, json.dumps({"error": {"message": "upstream is busy"}}).encode())

    # how it is sent

    def scores(self) -> tuple[float, float]:
        texts = {side: text for _, side, text in ANSWER.findall(self.content)}
        return tuple(float(re.findall(r"quality=([\d.]+)", texts[side])[-1]) for side in "AB")

    def reply(self, text: str, finish: str = "stop", verdict: bool = True) -> None:
        if verdict:
            with self.server.lock:
                self.server.verdicts[self.content] += 1
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        value = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "fake-1",
            "choices": [choice],
            "usage": usage,
        }
        self.send(200, json.dumps(value).encode())

    def error(self, status: int, message: str, code: str | None = None, headers: dict | None = None) -> None:
        value = {"error": {"message": message, "type": "error", "param": None, "code": code}}
        self.send(status, json.dumps(value).encode(), headers=headers)

    def send(
        self, status: int, body: bytes, content_type: str = "application/json", headers: dict | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
