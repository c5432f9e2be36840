"""One scorer address as the client sees it: pooled connections, its token, how much is asked of it, and what went wrong.

    endpoint = Endpoint("http://127.0.0.1:8000", token=lambda: None)
    answer, headers = endpoint.ask("POST", "/score_batch", body, timeout=300.0)  # raises Retry, UserError

What may pass is a `Retry`: connection errors, timeouts, answers cut short, 429, 502, 503, 504, and 500, with which a scorer
answers for a round that failed (a GPU without memory while somebody shares it) and lives on. All else is the request's fault
and a UserError. A 401 is asked again once if the token has changed meanwhile (a scorer that was restarted).
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import requests

from alignment.errors import UserError

RETRY_STATUS = {429, 500, 502, 503, 504}
FAILED_STATUS = 500
GATEWAY_STATUS = {502, 504}  # somebody in between speaks: the scorer itself may be gone
LONGEST_RETRY_AFTER = 30.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0  # seconds; doubled after every failure
LONGEST_AVOIDED = 3600.0  # seconds after a timeout; doubled with every further one
CONNECT_TIMEOUT = 10.0  # seconds
ENDPOINTS = ("/score", "/score_batch", "/score_texts", "/health", "/info", "/metrics", "/docs")
SSL_MISTAKES = ("CERTIFICATE", "WRONG_VERSION", "hostname")  # these do not pass; a proxy that is restarted does
IDENTITY_HEADER = "X-Scorer-Identity"  # a hash of the service's identity, in every answer


class Retry(Exception):
    """What may pass. `pause` is how long the scorer asks to wait; `lost` says that it may no longer be there.

    `failed`: it was at work and failed, which passes or is the texts' fault. `hung`: the seconds of a timeout.
    """

    def __init__(
        self, problem: str, pause: float = 0.0, lost: bool = False, failed: bool = False, hung: float = 0.0
    ) -> None:
        super().__init__(problem)
        self.pause, self.lost, self.failed, self.hung = pause, lost, failed, hung


class Endpoint:
    """One address. Several threads may ask at a time."""

    def __init__(self, url: str, token: Callable[[], str | None]) -> None:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            usable = usable and not (parts.query or parts.fragment or any(map(str.isspace, url)))
        except ValueError:  # brackets that do not match, a port beyond 65535
            usable = False
        if not usable:
            raise UserError(f"scorer URL {url!r}: expected something like http://127.0.0.1:8000, or auto")
        self.url = url.rstrip("/")
        if parts.path.rstrip("/") in ENDPOINTS:
            raise UserError(f"scorer URL {url!r}: give the address alone, without /{self.url.rpartition('/')[2]}")
        self.outstanding = 0  # texts asked for and not answered
        self.rests_until = 0.0  # after a failure, on the monotonic clock
        self.pause = FIRST_PAUSE  # after the next failure, in seconds
        self.avoided_until = 0.0  # after a timeout, on the monotonic clock: while another address answers
        self.avoided = 0.0  # for how many seconds that was; 0 once it has answered
        self.verified = False  # its identity is known and fits
        self.lost = False  # it gave no answer: it may be gone for good
        self.identity_hash: str | None = None
        self._read_token, self._token = token, token()
        self._idle: list[requests.Session] = []
        self._lock = threading.Lock()

    def try_alone(self) -> None:
        """After a timeout one request tries it: the others avoid it for twice as long as before, or until it answers."""
        if self.avoided:
            self._avoid(max(self.avoided, min(2 * self.avoided, LONGEST_AVOIDED)))

    def has_answered(self) -> None:
        self.pause, self.lost = FIRST_PAUSE, False
        self.avoided = self.avoided_until = 0.0

    def has_failed(self, error: Retry) -> None:
        """Rests, and is avoided after a timeout. Several requests that fail together count once."""
        now = time.monotonic()
        self.verified = self.verified and not error.lost
        self.lost = self.lost or error.lost
        if self.rests_until <= now:
            # Jitter keeps several ranks from coming back in step.
            self.rests_until = now + max(error.pause, self.pause * random.uniform(0.5, 1.5))
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
        if error.hung:
            self._avoid(max(error.hung, self.avoided))
        else:
            self.avoided_until = 0.0  # it says at once that it cannot: asking costs nothing

    def _avoid(self, seconds: float) -> None:
        self.avoided = seconds
        self.avoided_until = time.monotonic() + self.avoided

    def ask(self, method: str, path: str, body: dict | None, timeout: float) -> tuple[object, Mapping[str, str]]:
        """One request: decoded JSON and headers. `timeout` in seconds, for the connection and between bytes."""
        token = self._token
        reply = self._send(method, path, body, timeout, token)
        if reply.status_code == 401:
            self._token = self._read_token()
            if self._token != token:
                reply = self._send(method, path, body, timeout, self._token)
        if reply.is_redirect:
            raise UserError(f"scorer {self.url}{path}: sends on to {reply.headers['Location']}; name the scorer itself")
        if not reply.ok:
            problem = f"{reply.status_code}: {detail(reply)}"
            if reply.status_code in RETRY_STATUS:
                raise Retry(
                    problem,
                    retry_after(reply),
                    lost=reply.status_code in GATEWAY_STATUS,
                    failed=reply.status_code == FAILED_STATUS,
                )
            raise UserError(f"scorer {self.url}{path} refused the request, {problem}")
        try:
            return reply.json(), reply.headers
        except requests.JSONDecodeError as error:
            raise Retry("an answer that is not JSON", lost=True) from error

    def _send(self, method: str, path: str, body: dict | None, timeout: float, token: str | None) -> requests.Response:
        with self._lock:
            session = self._idle.pop() if self._idle else self._new_session()
        try:
            reply = session.request(
                method,
                self.url + path,
                json=body,
                timeout=(min(CONNECT_TIMEOUT, timeout), timeout),
                headers={"Authorization": f"Bearer {token}".encode()} if token else {},
                allow_redirects=False,
            )
        except requests.exceptions.InvalidJSONError as error:
            raise UserError(f"scorer {self.url}{path}: the request cannot be written as JSON: {error}") from error
        except requests.exceptions.SSLError as error:
            session.close()
            if not any(word in str(error) for word in SSL_MISTAKES):
                raise Retry(f"SSLError: {root_cause(error)}", lost=True) from error
            raise UserError(
                f"scorer {self.url}: no secure connection: {root_cause(error)}; is it http:// there?"
            ) from error
        except requests.RequestException as error:
            session.close()
            with self._lock:
                self._idle.clear()  # connections to a service that is gone
            hung = timeout if isinstance(error, requests.Timeout) else 0.0
            raise Retry(f"{type(error).__name__}: {root_cause(error)}", lost=True, hung=hung) from error
        with self._lock:
            self._idle.append(session)
        return reply

    @staticmethod
    def _new_session() -> requests.Session:
        # One request at a time each: requests does not promise that a Session may be shared between threads.
        session = requests.Session()
        session.trust_env = False  # a proxy setting must not catch calls inside a cluster
        return session


def detail(reply: requests.Response) -> str:
    """The service's own words, on one line."""
    try:
        return str(reply.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return " ".join(reply.text.split())[:200]


def retry_after(reply: requests.Response) -> float:
    """Seconds that the service asks to wait, 0 when it does not say."""
    value = reply.headers.get("Retry-After", "")
    return min(float(value), LONGEST_RETRY_AFTER) if value.isdecimal() else 0.0


def root_cause(error: BaseException) -> str:
    """The innermost reason of a connection error: "Connection refused", not the whole pool's description."""
    reason = error.args[0] if error.args else error
    reason = getattr(reason, "reason", reason)
    return " ".join(str(reason).split()).rsplit(">: ", 1)[-1][:200]
