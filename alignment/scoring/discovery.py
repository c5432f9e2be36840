"""How a scorer is found: it publishes its address in LOGS_DIR/scorer/*.json, and trainers look there (`--scorer_url auto`).

    python alignment/scoring/discovery.py           # prints the address of the one scorer that fits, or says why not
    python alignment/scoring/discovery.py --list    # every published scorer and its state
    EXPERIMENT_ID=beta_sweep python alignment/scoring/discovery.py  # of that experiment; SCORER_JOB_ID: of that job

In Python: find_scorer("logs", experiment_id="beta_sweep") gives an Address, or raises ScorerNotFound, UserError for several.

A file appears before the models load (an unwritable place is found at once), gets the scorer's identity when they are there,
and goes when the scorer stops. A scorer that was killed leaves its file behind: such a file is stale, which shows because
nobody answers under its address with the random `instance` that the file names, and SLURM says what became of the job. A
trainer takes the scorers of its EXPERIMENT_ID if it has one, of SCORER_JOB_ID if that is set, and with the identity that its
run began with; what is left must be one. A trainer that has its scorer keeps to it when several are left.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import stat
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from urllib.parse import urlsplit

import requests

from alignment.config import script_parser
from alignment.errors import UserError, run_main
from alignment.records import read_json, write_json
from alignment.scoring.scores import asked_of, deciding

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
HEALTH_SECONDS = 5.0
SQUEUE_SECONDS = 10.0
JOB_STATE_SECONDS = 60.0  # that a job's state is kept, where it is only told
GONE = "gone"  # a job that SLURM no longer knows
JOB_OVER = {GONE, "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}

_job_states: dict[str, tuple[float, str | None]] = {}  # job -> when it was asked (monotonic), SLURM's word


class ScorerNotFound(UserError):
    """No scorer that fits answers now. One may come: clients look again until their time is over."""


@dataclass(frozen=True)
class Address:
    """What a scorer says about itself in its file."""

    url: str
    host: str  # name of the machine
    pid: int
    instance: str  # random, the same in /health: whoever answers with another one is somebody else
    started: str
    job_id: str | None = None
    restarts: int = 0  # SLURM_RESTART_COUNT
    experiment_id: str | None = None
    token_file: str | None = None
    identity: dict | None = None  # None while the models load
    cluster: str | None = None  # SLURM's name of it: job numbers are its own, and several may share a home

    def where(self) -> str:
        """One line for people."""
        job = f", job {self.job_id}" if self.job_id else ""
        experiment = f", experiment {self.experiment_id}" if self.experiment_id else ""
        return f"{self.url} on {self.host}{job}{experiment}, since {self.started}"


@dataclass(frozen=True)
class State:
    """What /health says: "ready", "loading", "stuck" or "silent"; the identity where known, the reason of the last two."""

    name: str
    identity: dict | None = None
    reason: str = ""


def scorer_folder(logs_dir: str | Path) -> Path:
    return Path(logs_dir) / "scorer"


class Publication:
    """One file with a scorer's address, and beside it the token's, which only its owner can read."""

    def __init__(self, path: Path, address: Address, token: str | None) -> None:
        self.path, self.address, self._token = path.resolve(), address, token
        self._token_path = self.path.with_suffix(".token")
        if token is not None:
            self.address = replace(address, token_file=str(self._token_path))

    def write(self, identity: dict | None) -> None:
        """Writes or renews the file; without an identity it says that the models load. Raises UserError."""
        if self._token is not None:
            write_secret(self._token_path, self._token)
        write_json(self.path, asdict(self.address) | {"identity": identity})

    def check(self) -> None:
        """Takes away what an earlier scorer left, and raises UserError when the file could not be written later."""
        trial = self.path.with_name(f"{self.path.name}.trial")
        write_json(trial, asdict(self.address))
        trial.unlink()
        self.path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Takes the files away, unless a newer scorer has written them since."""
        with contextlib.suppress(OSError, UserError):
            now = read_address(self.path)
            if now is not None and now.instance == self.address.instance:
                self.path.unlink()
                if self._token is not None:
                    self._token_path.unlink(missing_ok=True)


def own_address(url: str, instance: str, env: Mapping[str, str], token_file: str | None = None) -> Address:
    """What this process is, as a scorer: SLURM_JOB_ID, SLURM_RESTART_COUNT and EXPERIMENT_ID come from `env`."""
    restarts = env.get("SLURM_RESTART_COUNT", "")
    return Address(
        url=url,
        host=socket.gethostname(),
        pid=os.getpid(),
        instance=instance,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        job_id=env.get("SLURM_JOB_ID") or None,
        cluster=env.get("SLURM_CLUSTER_NAME") or None,
        restarts=int(restarts) if restarts.isdecimal() else 0,
        experiment_id=env.get("EXPERIMENT_ID") or None,
        token_file=token_file,
    )


def address_path(logs_dir: str | Path, address: Address) -> Path:
    """Where a scorer publishes: one file a job, machine and port."""
    owner = f"job{address.job_id}" if address.job_id else "local"
    return scorer_folder(logs_dir) / f"{owner}-{address.host}-{urlsplit(address.url).port}.json"


def remove_stale(logs_dir: str | Path, mine: Address) -> list[str]:
    """Removes files of scorers that are known to be gone, earlier starts of this job among them; returns their names."""
    removed = []
    for path, other in read_addresses(logs_dir).items():
        if other.cluster not in (None, mine.cluster):
            continue  # its jobs are unknown here
        older = mine.job_id is not None and other.job_id == mine.job_id and other.restarts < mine.restarts
        if older or (is_gone(other) and ask_state(other).name == "silent"):
            with contextlib.suppress(OSError):
                path.unlink()
                path.with_suffix(".token").unlink(missing_ok=True)
                removed.append(path.name)
    return removed


def is_gone(address: Address) -> bool:
    """Whether SLURM, or this machine, knows that the scorer's job or process has ended."""
    if address.job_id is not None:
        return job_state(address.job_id) in JOB_OVER
    return address.host == socket.gethostname() and not process_lives(address.pid)


def find_scorer(
    logs_dir: str | Path = "logs",
    experiment_id: str | None = None,
    job_id: str | None = None,
    expected_identity: dict | None = None,
    known: Address | None = None,
) -> Address:
    """The one scorer that fits what is given, with the identity that it has now (None while it loads).

    With `expected_identity` a scorer that still loads does not fit yet. `known` is the scorer that the caller had: of several it
    is taken, else the one at its address, else the one of its job. Raises ScorerNotFound when none fits, UserError when several
    do (with `known` ScorerNotFound too: it may come back).
    """
    folder = scorer_folder(logs_dir)
    addresses = [
        address
        for address in read_addresses(logs_dir).values()
        if experiment_id in (None, address.experiment_id) and job_id in (None, address.job_id)
    ]
    with ThreadPoolExecutor(max_workers=16) as pool:
        states = list(pool.map(ask_state, addresses))
    found, others = [], []
    for address, state in zip(addresses, states, strict=True):
        if state.reason:
            others.append(f"{address.where()}: {state.reason}{stale_hint(address)}")
        elif expected_identity is None or fits(state.identity, expected_identity):
            found.append(replace(address, identity=state.identity))
        else:
            others.append(f"{address.where()}: {'still loading' if state.identity is None else 'another identity'}")
    if known is not None:
        found = closest(known, found)
    if len(found) == 1:
        return found[0]
    if found:
        listed = "; ".join(address.where() for address in found)
        raise (UserError if known is None else ScorerNotFound)(
            f"{len(found)} scorers fit in {folder}: {listed}. Set EXPERIMENT_ID or SCORER_JOB_ID, or name the address"
            " with --scorer_url (several, separated by commas, share the work)"
        )
    asked = [f"experiment {experiment_id}"] * (experiment_id is not None) + [f"job {job_id}"] * (job_id is not None)
    raise ScorerNotFound(
        f"no scorer{' of ' + ', '.join(asked) if asked else ''} answers in {folder}: {'; '.join(others) or 'no file'}."
        " Start one (sbatch slurm/run_scorer_service.sh), or name its address with --scorer_url"
    )


def closest(known: Address, found: list[Address]) -> list[Address]:
    """Of the scorers found the known one, else those at its address, else those of its job, else all."""
    for name in ("instance", "url", "job_id"):
        mine = getattr(known, name)
        if mine is not None and (same := [one for one in found if getattr(one, name) == mine]):
            return same
    return found


def find_from_environment(expected_identity: dict | None = None, known: Address | None = None) -> Address:
    """`find_scorer` with LOGS_DIR, EXPERIMENT_ID and SCORER_JOB_ID: what `--scorer_url auto` means."""
    env = os.environ
    return find_scorer(
        env.get("LOGS_DIR") or "logs",
        env.get("EXPERIMENT_ID") or None,
        env.get("SCORER_JOB_ID") or None,
        expected_identity,
        known,
    )


def read_addresses(logs_dir: str | Path) -> dict[Path, Address]:
    """All files that hold an address, by path."""
    found = {}
    for path in sorted(scorer_folder(logs_dir).glob("*.json")):
        with contextlib.suppress(UserError):  # taken away just now, or not ours
            address = read_address(path)
            if address is not None:
                found[path] = address
    return found


def read_address(path: Path) -> Address | None:
    """The address in a file, None when it holds something else. Raises UserError when it cannot be read."""
    content = read_json(path)
    known = {field.name for field in fields(Address)}
    try:
        address = Address(**{key: value for key, value in content.items() if key in known})
        return address if urlsplit(address.url).hostname else None
    except (TypeError, AttributeError, ValueError):
        return None


def ask_state(address: Address) -> State:
    """Asks /health whether this very scorer is there."""
    if urlsplit(address.url).hostname in LOOPBACK and address.host != socket.gethostname():
        return State(
            "silent",
            reason=f"listens on the loopback address of {address.host} only (HOST=0.0.0.0 opens it, in job scripts SCORER_BIND)",
        )
    try:
        with requests.Session() as session:
            session.trust_env = False  # a proxy setting must not catch calls inside a cluster
            reply = session.get(address.url + "/health", timeout=HEALTH_SECONDS)
        health = reply.json()
        if health.get("instance") != address.instance:
            return State("silent", reason="another service answers there")
        if health.get("status") == "stuck":
            return State("stuck", health.get("identity"), str(health.get("detail") or "it is stuck"))
    except (requests.RequestException, ValueError, AttributeError) as error:
        return State("silent", reason=f"no answer ({type(error).__name__})")
    return State("ready" if reply.ok else "loading", health.get("identity"))


def stale_hint(address: Address) -> str:
    """What SLURM says about a silent scorer's job, in words. Waiting trainers ask often, and slurmctld serves all users."""
    here = os.environ.get("SLURM_CLUSTER_NAME") or address.cluster
    if address.job_id is None or here != (address.cluster or here):
        return ""
    asked, state = _job_states.get(address.job_id, (-math.inf, None))
    if time.monotonic() - asked >= JOB_STATE_SECONDS:
        state = job_state(address.job_id)
        _job_states[address.job_id] = time.monotonic(), state
    if state is None:
        return ""
    return f", job {address.job_id} is {state}" + (": a stale file" if state in JOB_OVER else "")


def job_state(job_id: str) -> str | None:
    """SLURM's word for the job ("RUNNING"), "gone" when it knows none of that id, None when it cannot be asked."""
    command = ["squeue", "--noheader", "--states=all", "--jobs", job_id, "--format=%T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode == 0:
        return asked.stdout.split()[0] if asked.stdout.split() else GONE
    return GONE if "Invalid job id" in asked.stderr else None


def process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def fits(identity: dict | None, expected: dict) -> bool:
    """Whether a client that expects this identity would take the scorer; not while it loads and has none."""
    return identity is not None and asked_of(expected, identity) == deciding(expected)


def write_secret(path: Path, secret: str) -> None:
    """Writes a file that only its owner can read, whole or not at all. Raises UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing of it was changed") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_secret(path: str | Path) -> str:
    """The token in a file that nobody but its owner may read. Raises UserError."""
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the token file {path}: {getattr(error, 'strerror', None) or error}") from error
    if mode & 0o077:
        raise UserError(f"others can read the token file {path} (mode {mode:o}): chmod 600 it, and take a new token")
    if not secret:
        raise UserError(f"the token file {path} is empty")
    return secret


def new_token() -> str:
    return secrets.token_urlsafe(32)


def main() -> None:
    """Prints the address; --list shows every file and its state."""
    parser = script_parser(__doc__, prog="discovery.py")
    parser.add_argument("--list", action="store_true", help="every published scorer and its state, as JSON lines")
    if not parser.parse_args().list:
        print(find_from_environment().url)
        return
    for path, address in read_addresses(os.environ.get("LOGS_DIR") or "logs").items():
        state = ask_state(address)
        told = state.name + (f": {state.reason}{stale_hint(address)}" if state.reason else "")
        print(json.dumps({"file": str(path), "url": address.url, "state": told, "experiment": address.experiment_id}))


if __name__ == "__main__":
    run_main(main)
