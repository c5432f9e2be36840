"""The scorer service: reward and cost models behind HTTP, for ES, GRPO and evaluation jobs.

    REWARD_MODEL=path/to/reward COST_MODEL=path/to/cost python alignment/scoring/scorer_service.py

GET /health, POST /score_batch and /score {"prompts", "responses", "finished"}, POST /score_texts {"texts", "finished"}
-> {"rewards", "costs", "errors", "truncated"}; GET /info, /metrics, /docs. The environment is described in
alignment/scoring/README.md.

Requests are let in, checked and tokenised by http_app.py and scored by the one thread of worker.py; discovery.py publishes
the address in LOGS_DIR/scorer. Where it departs from the published service: it listens on loopback unless HOST says
otherwise (and then wants a token), the EOS rule of alignment/conversation.py (SCORER_REFERENCE=1 brings the published one
back), and a missing score has a reason in `errors`. The port is taken before the models load; until then /health answers
503 and says "loading". SIGTERM answers what is queued, for SCORER_STOP_SECONDS at most.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import FrameType

import uvicorn

from alignment.config import script_parser
from alignment.errors import UserError, run_main
from alignment.scoring.calibration import Calibration
from alignment.scoring.discovery import Publication, address_path, own_address, remove_stale
from alignment.scoring.http_app import build_app
from alignment.scoring.monitor import Minder, Monitor, access_log
from alignment.scoring.service_settings import Settings, read_settings
from alignment.scoring.worker import DeviceBroken, Worker, WorkQueue

DEFAULT_PORT = 8000
PORTS_TRIED = 100  # from the default one on, when no port was asked for
EXIT_FAILED = 1
HANGS_AFTER = 2  # times SCORER_STUCK_SECONDS, in one round on a GPU

log = logging.getLogger("scorer")


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


class Announcements:
    """Where the address is published: LOGS_DIR/scorer, and SCORER_ADDRESS_FILE, which appears when the service is ready."""

    def __init__(self, settings: Settings, url: str, instance: str) -> None:
        address = own_address(url, instance, os.environ, settings.token_file)
        token = settings.auth if settings.token_file is None else None
        self._logs = self._file = None
        if settings.logs_dir is not None:
            self._logs = Publication(address_path(settings.logs_dir, address), address, token)
        if settings.address_file is not None:
            self._file = Publication(Path(settings.address_file), address, token)
        self.about = {key: getattr(address, key) for key in ("host", "pid", "started", "job_id", "experiment_id")}
        self._left: list[Publication] = []  # could not be written yet
        self._identity: dict | None = None

    def begin(self) -> None:
        """Before the models load. Raises UserError when a place cannot be written."""
        if self._file is not None:
            self._file.check()
        if self._logs is not None:
            for name in remove_stale(self._logs.path.parent.parent, self._logs.address):
                log.info("took away the address file of a scorer that is gone: %s", name)
            self._logs.write(None)
            log.info("address in %s", self._logs.path)
            if self._logs.address.token_file:
                log.info("token in %s", self._logs.address.token_file)

    def ready(self, identity: dict) -> None:
        self._identity, self._left = identity, [one for one in (self._logs, self._file) if one is not None]
        self.catch_up()

    def catch_up(self) -> None:
        """Writes what could not be written before: a disk that is full now must not cost loaded models."""
        left, self._left = self._left, []
        for publication in left:
            try:
                publication.write(self._identity)
            except UserError as error:
                log.warning("%s; trying again every minute", error)
                self._left.append(publication)

    def remove(self) -> None:
        for publication in (self._logs, self._file):
            if publication is not None:
                publication.remove()


class Server(uvicorn.Server):
    """uvicorn's, which also says when it was told to stop."""

    on_stop = staticmethod(lambda: None)
    loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if (
            self.loop is not None
        ):  # not here: what the signal interrupts may hold the lock that a log line or a thread needs
            self.loop.call_soon_threadsafe(self.on_stop)


def main() -> int:
    """Serves until SIGTERM or Ctrl-C. 0 when stopped, 2 when something the user can mend is wrong, 1 for a broken GPU."""
    parser = script_parser(__doc__, prog="scorer_service.py")
    parser.add_argument("--port", type=int, help="as PORT in the environment; 0 for any free one")
    parser.epilog = f"{parser.epilog}\n\nenvironment:\n{environment_help()}"
    settings = read_settings(os.environ, parser.parse_args().port)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)

    plain = logging.StreamHandler(sys.stdout)  # lines of JSON alone, for grep '^{' and jq
    plain.setFormatter(logging.Formatter("%(message)s"))
    access_log.addHandler(plain)
    access_log.propagate = False

    listener = take_port(settings.host, settings.port)
    port = listener.getsockname()[1]
    shown_host = socket.gethostname() if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://[{shown_host}]:{port}" if ":" in shown_host else f"http://{shown_host}:{port}"
    instance = secrets.token_hex(8)
    announcements = Announcements(settings, url, instance)
    announcements.begin()
    failure: list[BaseException] = []
    began = time.monotonic()

    def on_ready(worker: Worker) -> None:
        for warning in worker.warnings:
            log.warning("%s\n%s\n%s", "!" * 100, warning, "!" * 100)
        assert worker.scorer is not None
        identity = worker.scorer.identity()
        log.info("models loaded in %.1f s: %s", time.monotonic() - began, json.dumps(identity))
        if error := identity.get("fp8_error"):
            log.info("%s", Calibration(**error))
        announcements.ready(identity)
        log.info("ready")

    def on_failure(error: BaseException) -> None:
        failure.append(error)
        server.should_exit = True

    monitor, jobs, limits = Monitor(), WorkQueue(settings.limits.max_queued_tokens), settings.limits
    monitor.watch(jobs)
    worker = Worker(settings, jobs, monitor, on_ready, on_failure)

    def chores() -> None:
        announcements.catch_up()
        seconds = monitor.seconds_in_round()
        if worker.scorer is not None and hangs(worker.scorer.device.type, seconds, limits.stuck_seconds):
            # Nothing interrupts a kernel or a collective. The job script starts the service again.
            log.error("the GPU hangs: one round for %.0f s; start the service again", seconds)
            announcements.remove()
            sys.stdout.flush()
            os._exit(EXIT_FAILED)

    minder = Minder(monitor, jobs, chores)
    server = Server(
        uvicorn.Config(
            build_app(worker, settings.auth, limits, instance, announcements.about, settings.log_texts),
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=limits.stop_seconds + 3,
        )
    )

    def give_up() -> None:
        dropped = jobs.close("the scorer was stopped")
        if dropped:
            log.warning("stopping after %d s: %d requests were not answered", limits.stop_seconds, dropped)

    def on_stop() -> None:
        log.info("stopping: %d texts wait, for %d s at most", len(jobs), limits.stop_seconds)
        timer = threading.Timer(limits.stop_seconds, give_up)
        timer.daemon = True
        timer.start()

    server.on_stop = on_stop
    # uvicorn stops on these signals and then raises them again for whoever handled them before: that is us, done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    print(f"Service will be available at {url}", flush=True)
    try:
        worker.start()
        minder.start()
        server.run(sockets=[listener])
    finally:
        announcements.remove()
    jobs.end()
    minder.ended.set()
    code = 0
    if failure and not isinstance(failure[0], DeviceBroken):
        if isinstance(failure[0], UserError):
            raise failure[0]
        raise RuntimeError("the scorer failed") from failure[0]
    if failure:
        log.error("%s; start the service again", failure[0])
        code = EXIT_FAILED
    log.info("stopped")
    if worker.scorer is not None:
        worker.join(1.0)
    if worker.is_alive():
        # It loads, or scores for clients that are gone: neither is worth waiting for, nor can it be interrupted.
        sys.stdout.flush()
        os._exit(code)
    return code


def hangs(device_type: str, seconds_in_round: float, stuck_seconds: float) -> bool:
    """Whether a round will never end. On a CPU it may just be slow."""
    return device_type == "cuda" and seconds_in_round > HANGS_AFTER * stuck_seconds


def environment_help() -> str:
    """The variables, from the table in README.md, which is the one place that describes them."""
    rows = (
        (Path(__file__).parent / "README.md").read_text(encoding="utf-8").split("## Environment")[1].split("\n## ")[0]
    )
    cells = [[cell.strip() for cell in row.strip("|").replace("`", "").split(" | ")] for row in rows.splitlines()]
    return "\n".join(
        textwrap.fill(f"{name} ({default}): {meaning}", 100, initial_indent="  ", subsequent_indent="      ")
        for name, default, meaning in (row for row in cells if len(row) == 3 and row[0].isupper())
    )


if __name__ == "__main__":
    run_main(main)
