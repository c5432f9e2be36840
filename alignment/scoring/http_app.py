"""The scorer's HTTP interface: what is let in, how a request is read, and what it gets.

Requests are read with a limit, parsed, checked and tokenised in threads of their own, and put in the worker's queue. Nothing
heavy runs on the event loop, so /health always answers. What does not fit gets one line in `detail`: 400 and 422 for its
form, 401 without the token, 408 when its body does not come, 413 over a limit, 415 for another content type; 429 with
Retry-After when the queue is full, 503 with Retry-After while the models load, too much is under way, or the service ends.
A client that goes away takes its texts out of the queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import transformers
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, StrictBool, StrictStr, ValidationError
from starlette.requests import ClientDisconnect

from alignment.errors import UserError, first_line
from alignment.scoring.connection import IDENTITY_HEADER
from alignment.scoring.docs_page import docs_page
from alignment.scoring.local_scorer import Conversation, LocalScorer, Score, check_texts
from alignment.scoring.monitor import Access, Monitor
from alignment.scoring.scores import deciding
from alignment.scoring.service_settings import Limits
from alignment.scoring.worker import Closed, Job, QueueFull, TooLarge, Worker

Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")

BODY_SECONDS = 120.0  # for a request's body to arrive
BODIES_IN_HOUSE = 8  # the largest body, times this, is what may be read and not yet tokenised
LARGEST_DRAIN = 256 * 2**20  # bytes of a refused body that are read, so that its client sees the refusal
ENCODERS = 2  # threads; the tokenizers let other threads run
CLIENT_GONE = 499  # as in nginx's logs: nobody reads it


class PairRequest(BaseModel):
    """Body of /score_batch and /score. `finished` says which responses end with EOS; all do by default."""

    prompts: list[StrictStr]
    responses: list[StrictStr]
    finished: list[StrictBool] | None = None

    def columns(self) -> dict[str, list[str]]:
        return {"prompts": self.prompts, "responses": self.responses}


class TextRequest(BaseModel):
    """Body of /score_texts: whole conversations. `finished` as above."""

    texts: list[StrictStr]
    finished: list[StrictBool] | None = None

    def columns(self) -> dict[str, list[str]]:
        return {"texts": self.texts}


class ScoresReply(BaseModel):
    """One value a text, in order. Where a score is null, `errors` says why."""

    rewards: list[float | None]
    costs: list[float | None]
    errors: list[str | None]
    truncated: list[bool]


class HealthReply(BaseModel):
    """`status` is "healthy", or with code 503 "loading" or "stuck"."""

    status: str
    instance: str
    detail: str | None = None
    device: str | None = None
    identity: dict | None = None
    warnings: list[str] = []
    texts_scored: int = 0


class Refusal(BaseModel):
    """Why there are no scores, in one line."""

    detail: str


class BadRequest(Exception):
    """A request that gets no scores: status and one line, and when to come back."""

    def __init__(self, status: int, line: str, retry_after: int | None = None) -> None:
        super().__init__(line)
        self.status, self.line, self.retry_after = status, line, retry_after


class Departed(Exception):
    """The client has closed its connection."""


class Intake:
    """How much is read and not yet tokenised, and how many requests are under way. Used on the event loop only."""

    def __init__(self, limits: Limits, monitor: Monitor) -> None:
        self.limits, self.monitor = limits, monitor
        self.requests = 0
        self.bytes_left = BODIES_IN_HOUSE * limits.max_body

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        if self.requests >= self.limits.max_requests:
            raise BadRequest(503, f"{self.requests} requests are under way; ask again", 1)
        self.requests += 1
        self.monitor.under_way.set(self.requests)
        try:
            yield
        finally:
            self.requests -= 1
            self.monitor.under_way.set(self.requests)

    async def read(self, request: Request) -> bytes:
        """The body. It counts until `release(len(body))`. Raises BadRequest, Departed."""
        content, size, refusal = bytearray(), 0, None
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > self.limits.max_body:
                        refusal = BadRequest(
                            413, f"more than {self.limits.max_body} bytes: ask for fewer texts at a time"
                        )
                    elif len(chunk) > self.bytes_left:
                        refusal = refusal or BadRequest(503, "too many bytes are under way; ask again", 1)
                    if refusal is None:
                        content += chunk
                        self.bytes_left -= len(chunk)
                    elif size > LARGEST_DRAIN:
                        break
            if refusal is not None:
                raise refusal
            return bytes(content)
        except BaseException as error:
            self.release(len(content))
            if isinstance(error, TimeoutError):
                raise BadRequest(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
            if isinstance(error, ClientDisconnect):
                raise Departed from None
            raise

    def release(self, size: int) -> None:
        self.bytes_left += size


def build_app(
    worker: Worker, auth: str | None, limits: Limits, instance: str, about: dict, log_texts: bool = False
) -> Access:
    """The HTTP interface of one worker: an ASGI application. `about` is what /info says besides what it knows itself."""
    monitor, started = worker.monitor, time.time()
    refusals = {code: {"model": Refusal} for code in (400, 401, 408, 413, 415, 422, 429, 500, 503)}
    app = FastAPI(title="Scorer", docs_url=None, redoc_url=None, openapi_url=None)
    intake = Intake(limits, monitor)
    encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="scorer-encoder")

    @app.exception_handler(BadRequest)
    async def refused(_: Request, error: BadRequest) -> JSONResponse:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"detail": error.line}, error.status, headers)

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        return await refused(request, BadRequest(429, str(error), error.seconds))

    @app.exception_handler(TooLarge)
    async def too_large(request: Request, error: TooLarge) -> JSONResponse:
        return await refused(request, BadRequest(413, str(error)))

    @app.exception_handler(Closed)
    async def closed(request: Request, error: Closed) -> JSONResponse:
        return await refused(request, BadRequest(503, str(error), 5))

    @app.exception_handler(Departed)
    async def departed(_: Request, __: Departed) -> Response:
        return Response(status_code=CLIENT_GONE)

    def check_token(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode("latin-1")
        if auth is not None and not hmac.compare_digest(given, auth.encode()):
            raise BadRequest(401, "this scorer wants its token: Authorization: Bearer <SCORER_AUTH>")

    @app.get("/health", response_model=HealthReply, responses={503: {"model": HealthReply}})
    async def health() -> JSONResponse:
        """Whether it scores, and what decides a score. Needs no token."""
        later = {"Retry-After": "5"}
        if worker.scorer is None:
            loading = {"status": "loading", "instance": instance, "detail": "the models are loading"}
            return JSONResponse(loading, 503, later)
        content = {
            "status": "healthy",
            "device": str(worker.scorer.device),
            "instance": instance,
            "identity": worker.scorer.identity(),
            "warnings": worker.warnings,
            "texts_scored": monitor.texts_answered,
        }
        seconds, limit = monitor.seconds_in_round(), limits.stuck_seconds
        if seconds > limit:
            told = f"the models have been at one round for {seconds:.0f} s, more than SCORER_STUCK_SECONDS ({limit})"
            return JSONResponse(content | {"status": "stuck", "detail": told}, 503, later)
        return JSONResponse(content, headers={IDENTITY_HEADER: identity_hash(worker.scorer)})

    @app.get("/info", responses={401: {"model": Refusal}})
    async def info(request: Request) -> dict:
        """What runs here: identity, limits, versions, what waits."""
        check_token(request)
        return about | {
            "instance": instance,
            "identity": worker.scorer.identity() if worker.scorer is not None else None,
            "device": str(worker.scorer.device) if worker.scorer is not None else None,
            "warnings": worker.warnings,
            "limits": vars(limits),
            "queued_texts": len(worker.jobs),
            "queued_tokens": worker.jobs.tokens,
            "requests_under_way": intake.requests,
            "uptime_seconds": round(time.time() - started, 1),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    @app.get(
        "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, 401: {"model": Refusal}}
    )
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus."""
        check_token(request)
        return Response(monitor.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> dict:
        check_token(request)
        return app.openapi()

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        check_token(request)
        return HTMLResponse(docs_page(app.openapi()))

    def takes(model: type[BaseModel]) -> dict:
        """What OpenAPI says of an endpoint that reads its body itself."""
        content = {"application/json": {"schema": model.model_json_schema()}}
        return {"responses": refusals, "openapi_extra": {"requestBody": {"required": True, "content": content}}}

    @app.post("/score_batch", response_model=ScoresReply, **takes(PairRequest))
    @app.post("/score", response_model=ScoresReply, **takes(PairRequest))
    async def score_batch(request: Request) -> Response:
        """Scores of responses to prompts."""
        return await scored(request, PairRequest, lambda scorer: scorer.encode)

    @app.post("/score_texts", response_model=ScoresReply, **takes(TextRequest))
    async def score_texts(request: Request) -> Response:
        """Scores of whole conversations."""
        return await scored(request, TextRequest, lambda scorer: scorer.encode_whole)

    async def scored(request: Request, model: type[PairRequest] | type[TextRequest], encoder: Callable) -> Response:
        check_token(request)
        kind = request.headers.get("Content-Type", "application/json").split(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest(415, "expected the header Content-Type: application/json")
        if worker.scorer is None:
            raise BadRequest(503, "the models are loading", 5)
        with intake.request():
            job = Job(await encoded(request, model, encoder(worker.scorer)))
            request.scope["facts"]["tokens"] = job.tokens()
            worker.jobs.put(job)
            try:
                scores: list[Score] = await unless_departed(request, asyncio.wrap_future(job.scores))
            except (Departed, Closed):
                raise
            except Exception as error:  # the worker has logged it
                raise BadRequest(500, f"scoring failed: {first_line(error)}") from error
            finally:
                if worker.jobs.forget(job):  # nobody waits for it any more
                    job.scores.cancel()
                    monitor.departed(len(job.conversations))
        request.scope["facts"]["repeated"] = job.cached
        content = {
            "rewards": [score.reward for score in scores],
            "costs": [score.cost for score in scores],
            "errors": [score.error for score in scores],
            "truncated": [score.truncated for score in scores],
        }
        return JSONResponse(content, headers={IDENTITY_HEADER: identity_hash(worker.scorer)})

    async def encoded(
        request: Request, model: type[PairRequest] | type[TextRequest], encode: Callable
    ) -> list[Conversation]:
        """The request's conversations, read here, parsed and tokenised in another thread."""
        facts, gone = request.scope["facts"], threading.Event()
        body = await intake.read(request)

        def encode_all() -> list[Conversation]:
            content = parse(model, body)
            columns = content.columns()
            finished = check_content(columns, content.finished, limits)
            facts["texts"] = len(finished)
            if log_texts:
                facts.update(columns)
            conversations = []
            for row in zip(*columns.values(), finished, strict=True):
                if gone.is_set():
                    raise Departed
                conversations.append(encode(*row))
            return conversations

        try:
            return await unless_departed(request, asyncio.get_running_loop().run_in_executor(encoders, encode_all))
        finally:
            gone.set()
            intake.release(len(body))

    return Access(app, monitor)


async def unless_departed(request: Request, work: asyncio.Future[Result]) -> Result:
    """The result of `work`. Raises Departed when the client closes its connection first."""

    async def departure() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(departure())
    try:
        both: set[asyncio.Future] = {work, watch}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            raise Departed
        return work.result()
    finally:
        watch.cancel()


def parse(model: type[Body], body: bytes) -> Body:
    """The body as `model`. Raises BadRequest that names the place."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(422, f"body: not JSON: {first_line(error)}") from error
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        raise BadRequest(422, f"{place or 'body'}: {first['msg']}") from error


def check_content(columns: dict[str, list[str]], finished: list[bool] | None, limits: Limits) -> list[bool]:
    """Which texts are finished. Raises BadRequest for unequal counts, too much, and what is not text."""
    counts = [len(column) for column in columns.values()]
    if len(set(counts)) > 1:
        raise BadRequest(400, "Number of prompts and responses must match")  # as published
    if finished is not None and len(finished) != counts[0]:
        raise BadRequest(400, f"finished has {len(finished)} values for {counts[0]} texts")
    if counts[0] > limits.max_texts:
        raise BadRequest(413, f"{counts[0]} texts, the limit is {limits.max_texts} a request (SCORER_MAX_TEXTS)")
    for index, row in enumerate(zip(*columns.values(), strict=True)):
        if (size := sum(map(len, row))) > limits.max_characters:
            limit = f"the limit is {limits.max_characters} a text (SCORER_MAX_CHARACTERS)"
            raise BadRequest(413, f"{next(iter(columns))}[{index}]: {size} characters, {limit}")
    try:
        for name, texts in columns.items():
            check_texts(name, texts)
    except UserError as error:
        raise BadRequest(422, str(error)) from error
    return [True] * counts[0] if finished is None else finished


def identity_hash(scorer: LocalScorer) -> str:
    """16 hex digits of the identity, so that a client can see in every answer that it is still the same scorer."""
    return hashlib.sha256(json.dumps(deciding(scorer.identity()), sort_keys=True).encode()).hexdigest()[:16]
