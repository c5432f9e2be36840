"""The scorer service: reward and cost models behind HTTP, for ES, GRPO and evaluation jobs.

    REWARD_MODEL=path/to/reward COST_MODEL=path/to/cost python alignment/scoring/scorer_service.py

GET /health, POST /score_batch and /score {"prompts", "responses", "finished"}, POST /score_texts {"texts", "finished"}
-> {"rewards", "costs", "errors", "truncated"}. The environment is described in alignment/scoring/README.md.

Requests are checked and tokenised in a thread pool and put in a queue; one worker thread owns the models, takes all that
is waiting and forms batches across requests. Nothing heavy runs in an async endpoint, so /health always answers.
Where it departs from the published service: it listens on loopback unless HOST says otherwise (and then wants a token),
the EOS rule of alignment/conversation.py (SCORER_REFERENCE=1 brings the published one back), and a missing score has a
reason in `errors`. The port is taken before the models load; until then /health answers 503 and says "loading".
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import hmac
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, StrictBool, StrictStr
from starlette.concurrency import run_in_threadpool

from alignment.errors import UserError, run_main
from alignment.records import write_json
from alignment.scoring.checkpoint import first_line
from alignment.scoring.client import IDENTITY_HEADER
from alignment.scoring.local_scorer import Conversation, LocalScorer, Score, check_texts

DEFAULT_REWARD = "PKU-Alignment/beaver-7b-unified-reward"
DEFAULT_COST = "PKU-Alignment/beaver-7b-unified-cost"
DEFAULT_PORT = 8000
PORTS_TRIED = 100  # from the default one on, when no port was asked for
TEXTS_A_ROUND = 512  # how many waiting texts the worker scores before it answers and looks again
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
SHUTDOWN_SECONDS = 30
TRUE, FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}

log = logging.getLogger("scorer")


@dataclass(frozen=True)
class Settings:
    """The environment, read and checked."""

    host: str
    port: int | None  # None: not asked for
    auth: str | None  # the token, None for no check
    address_file: str | None
    probe: dict | None
    probe_off: bool
    scorer: dict = field(repr=False)  # LocalScorer's arguments


def read_settings(env: dict[str, str], port: int | None = None) -> Settings:
    """Settings from the environment. Raises UserError naming the variable."""
    host = env.get("HOST") or "127.0.0.1"
    auth = env.get("SCORER_AUTH") or None
    if host not in LOOPBACK and auth is None:
        raise UserError(
            f"HOST is {host}, which others can reach: set SCORER_AUTH to a token (or to none, to let everybody in)"
        )
    dtype = env.get("SCORER_DTYPE") or "auto"
    bf16 = _switch(env, "USE_BF16")
    if bf16 is not None:
        # Published: bfloat16 when true, float16 when false.
        asked = "bfloat16" if bf16 else "float16"
        if dtype not in ("auto", asked):
            raise UserError(f"USE_BF16 asks for {asked}, SCORER_DTYPE for {dtype}: set one of them")
        dtype = asked
    probe = env.get("SCORER_PROBES") or ""
    scorer = {
        "reward_model": env.get("REWARD_MODEL") or DEFAULT_REWARD,
        "cost_model": env.get("COST_MODEL") or DEFAULT_COST,
        "dtype": dtype,
        "max_length": _integer(env, "MAX_LENGTH", 576),
        "template": env.get("SCORER_TEMPLATE") or "pku",
        "deterministic": _switch(env, "SCORER_DETERMINISTIC"),
        "reference": bool(_switch(env, "SCORER_REFERENCE")),
    }
    return Settings(
        host=host,
        port=_integer(env, "PORT", None) if port is None else port,
        auth=None if auth == "none" else auth,
        address_file=env.get("SCORER_ADDRESS_FILE") or None,
        probe=read_probe(probe) if probe and probe != "none" else None,
        probe_off=probe == "none",
        scorer=scorer,
    )


def read_probe(path: str) -> dict:
    """{"prompt", "good", "bad"} from a JSON file, in place of the built-in start-up texts."""
    try:
        probe = json.loads(Path(path).read_text(encoding="utf-8"))
        return {key: str(probe[key]) for key in ("prompt", "good", "bad")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"SCORER_PROBES: {path}: expected a JSON object with prompt, good, bad: {error}") from error


def _switch(env: dict[str, str], name: str) -> bool | None:
    value = env.get(name, "").strip().lower()
    if value and value not in TRUE | FALSE:
        raise UserError(f"{name} is {env[name]!r}, expected 1 or 0 (or true, false)")
    return value in TRUE if value else None


def _integer(env: dict[str, str], name: str, default: int | None) -> int | None:
    value = env.get(name, "").strip()
    if not value:
        return default
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r}, expected a whole number")
    return int(value)


@dataclass
class Job:
    """One request's conversations and where its scores go."""

    conversations: list[Conversation]
    scores: Future = field(default_factory=Future)  # of list[Score]


class Worker(threading.Thread):
    """Loads the models, then scores what is in the queue, until `stop`. The only thread that touches the models."""

    def __init__(self, settings: Settings, on_ready, on_failure) -> None:
        super().__init__(name="scorer-worker", daemon=True)
        self.settings, self.on_ready, self.on_failure = settings, on_ready, on_failure
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.scorer: LocalScorer | None = None  # set once loaded
        self.warnings: list[str] = []
        self.scored = 0

    def run(self) -> None:
        try:
            scorer = LocalScorer(**self.settings.scorer)
            if scorer.is_small_on_cpu() and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(1)  # twice as fast as two for tiny models, and leaves the cores to the trainer
            self.warnings = [] if self.settings.probe_off else scorer.warnings(self.settings.probe)
            self.scorer = scorer
            self.on_ready(self)
        except BaseException as error:  # whatever it is, the service must not go on without models
            self.on_failure(error)
            return
        while (job := self.jobs.get()) is not None:
            jobs = [job]
            waiting = len(job.conversations)
            while waiting < TEXTS_A_ROUND and not self.jobs.empty():
                if (job := self.jobs.get()) is None:
                    self.jobs.put(None)  # stop after this round
                    break
                jobs.append(job)
                waiting += len(job.conversations)
            self._score(jobs)

    def stop(self) -> None:
        """Ends the thread after what is queued."""
        self.jobs.put(None)

    def _score(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if job.scores.set_running_or_notify_cancel()]
        try:
            scores = iter(self.scorer.score_encoded([one for job in jobs for one in job.conversations]))
            for job in jobs:
                job.scores.set_result([next(scores) for _ in job.conversations])
                self.scored += len(job.conversations)
        except Exception as error:  # one failed round must not end the service; its requests get a 500
            log.exception("scoring failed")
            for job in jobs:
                if not job.scores.done():
                    job.scores.set_exception(error)


class PairRequest(BaseModel):
    """Body of /score_batch and /score. `finished` says which responses end with EOS; all do by default."""

    prompts: list[StrictStr]
    responses: list[StrictStr]
    finished: list[StrictBool] | None = None


class TextRequest(BaseModel):
    """Body of /score_texts: whole conversations."""

    texts: list[StrictStr]
    finished: list[StrictBool] | None = None


class BadRequest(Exception):
    """A request that gets no scores: status and one line."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status, self.line = status, line


def build_app(worker: Worker, auth: str | None) -> FastAPI:
    """The HTTP interface of one worker."""
    app = FastAPI(title="Scorer", docs_url=None, redoc_url=None)

    @app.exception_handler(BadRequest)
    def refused(_: Request, error: BadRequest) -> JSONResponse:
        headers = {"Retry-After": "5"} if error.status == 503 else {}
        return JSONResponse({"detail": error.line}, error.status, headers)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:]).lstrip(".")
        return JSONResponse({"detail": f"{place or 'body'}: {first['msg']}"}, 422)

    @app.get("/health")
    async def health() -> JSONResponse:
        if worker.scorer is None:
            return JSONResponse({"status": "loading", "detail": "the models are loading"}, 503)
        return JSONResponse(
            {
                "status": "healthy",
                "device": str(worker.scorer.device),
                "identity": worker.scorer.identity(),
                "warnings": worker.warnings,
                "texts_scored": worker.scored,
            },
            headers={IDENTITY_HEADER: identity_hash(worker.scorer)},
        )

    @app.post("/score_batch")
    @app.post("/score")
    async def score_batch(body: PairRequest, request: Request) -> JSONResponse:
        scorer = admit(request)
        if len(body.prompts) != len(body.responses):
            raise BadRequest(400, "Number of prompts and responses must match")
        return await answer(scorer, scorer.encode, [("prompts", body.prompts), ("responses", body.responses)], body)

    @app.post("/score_texts")
    async def score_texts(body: TextRequest, request: Request) -> JSONResponse:
        scorer = admit(request)
        return await answer(scorer, scorer.encode_whole, [("texts", body.texts)], body)

    def admit(request: Request) -> LocalScorer:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if auth is not None and not hmac.compare_digest(given.encode(), auth.encode()):
            raise BadRequest(401, "this scorer wants its token: Authorization: Bearer <SCORER_AUTH>")
        if worker.scorer is None:
            raise BadRequest(503, "the models are loading")
        return worker.scorer

    async def answer(scorer: LocalScorer, encode, columns, body) -> JSONResponse:
        count = len(columns[0][1])
        finished = [True] * count if body.finished is None else body.finished
        if len(finished) != count:
            raise BadRequest(400, f"finished has {len(finished)} values for {count} texts")

        def encode_all() -> list[Conversation]:
            try:
                for name, texts in columns:
                    check_texts(name, texts)
            except UserError as error:
                raise BadRequest(422, str(error)) from error
            return [encode(*row) for row in zip(*(texts for _, texts in columns), finished, strict=True)]

        job = Job(await run_in_threadpool(encode_all))
        worker.jobs.put(job)
        try:
            scores: list[Score] = await asyncio.wrap_future(job.scores)
        except Exception as error:  # the worker has logged it
            raise BadRequest(500, f"scoring failed: {first_line(error)}") from error
        content = {
            "rewards": [score.reward for score in scores],
            "costs": [score.cost for score in scores],
            "errors": [score.error for score in scores],
            "truncated": [score.truncated for score in scores],
        }
        return JSONResponse(content, headers={IDENTITY_HEADER: identity_hash(scorer)})

    return app


def identity_hash(scorer: LocalScorer) -> str:
    """16 hex digits of the identity, so that a client can see in every answer that it is still the same scorer."""
    return hashlib.sha256(json.dumps(scorer.identity(), sort_keys=True).encode()).hexdigest()[:16]


def take_port(host: str, port: int | None) -> socket.socket:
    """A listening socket. No port asked for: 8000, or the next free one; 0: any. Raises UserError."""
    ports = range(DEFAULT_PORT, DEFAULT_PORT + PORTS_TRIED) if port is None else [port]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reason = None
    for candidate in ports:
        # The protocol is named because asyncio turns Nagle's algorithm off for such sockets only: 40 ms an answer.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(1024)
        except (OSError, OverflowError) as error:
            listener.close()
            reason = f"HOST {host}, port {candidate}: {getattr(error, 'strerror', None) or error}"
            continue
        if port is None and candidate != DEFAULT_PORT:
            log.info("port %d is taken, using %d", DEFAULT_PORT, candidate)
        return listener
    raise UserError(f"{reason}; choose another with PORT=<number>, or PORT=0 for any free one")


def main() -> int:
    """Serves until SIGTERM or Ctrl-C. 0 when stopped, 2 when something the user can mend is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, help="as PORT in the environment; 0 for any free one")
    settings = read_settings(dict(os.environ), parser.parse_args().port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)

    listener = take_port(settings.host, settings.port)
    port = listener.getsockname()[1]
    shown_host = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://[{shown_host}]:{port}" if ":" in shown_host else f"http://{shown_host}:{port}"
    failure: list[BaseException] = []
    began = time.monotonic()

    def on_ready(worker: Worker) -> None:
        for warning in worker.warnings:
            log.warning("%s\n%s\n%s", "!" * 100, warning, "!" * 100)
        log.info("models loaded in %.1f s: %s", time.monotonic() - began, json.dumps(worker.scorer.identity()))
        if settings.address_file:
            address = {"url": url, "pid": os.getpid(), "identity": worker.scorer.identity()}
            write_json(settings.address_file, address)
        log.info("ready")

    def on_failure(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    worker = Worker(settings, on_ready, on_failure)
    config = uvicorn.Config(
        build_app(worker, settings.auth),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    server = uvicorn.Server(config)
    # uvicorn stops on these signals and then raises them again for whoever handled them before: that is us, done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    print(f"Service will be available at {url}", flush=True)
    worker.start()
    server.run(sockets=[listener])
    worker.stop()
    if failure:
        if isinstance(failure[0], UserError):
            raise failure[0]
        raise RuntimeError("the models could not be loaded") from failure[0]
    if worker.scorer is not None:
        worker.join(SHUTDOWN_SECONDS)
    if settings.address_file:
        Path(settings.address_file).unlink(missing_ok=True)
    log.info("stopped")
    return 0


if __name__ == "__main__":
    run_main(main)
