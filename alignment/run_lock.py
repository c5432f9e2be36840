"""The lock on a run folder: two live runs in one folder would each write steps that the other does not know."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.records import to_json
from alignment.runs import mend_leftovers, utc_now

LOCK = ".lock"
LOCK_WAIT = 30.0  # seconds that a start gives the one before it to end; after a requeue the two may overlap


class RunLock:
    """RUN/.lock, held by the main process of a run from before it reads anything of the run until it ends.

    The kernel gives the lock back when that process is gone, however it ended, and a file server when a machine is lost (NFS 3
    only when that machine is back: whoever is refused is told to remove the file; a new one is a new lock).
    Processes that it starts do not hold it for it: the descriptor is closed by exec, and in the children of a fork. The file
    says who has it, and is empty after a good end. Use as a context manager; only the main process calls `take`.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._descriptor: int | None = None
        self._owner: dict[str, Any] = {}  # of the process that has it, or had it
        self._ended: tuple[int, str] | None = None  # a process that had it, on a machine that may not answer any more
        self._made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]

    def take(self) -> None:
        """Takes it, and mends what a killed process left half saved in the run.

        Raises UserError when another process has it and keeps it for LOCK_WAIT seconds more.
        """
        deadline = time.monotonic() + LOCK_WAIT
        told = False
        while not self._try():
            if time.monotonic() >= deadline:
                host = self._owner.get("host", platform.node())
                lost = f" (if {host} is lost for good: remove {self.folder / LOCK})" if host != platform.node() else ""
                raise UserError(
                    f"another run is at work in {self.folder}: {self._who()}. Let it end, or stop it, and give the same "
                    f"command again{lost}; or give this run another folder"
                )
            if not told:
                told = True
                print(f"{self.folder} is in use by {self._who()}: waiting {LOCK_WAIT:.0f} s for it to end", flush=True)
            time.sleep(0.25)
        for place in (self.folder, self.folder / "checkpoints"):
            mend_leftovers(place, ended=self._ended)

    def _try(self) -> bool:
        path = self.folder / LOCK
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from error
        self._owner = _owner(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):
                raise BlockingIOError  # it was removed meanwhile, with the folder of a run that came to nothing
            self._ended = (self._owner.get("pid", 0), self._owner.get("host", ""))
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:  # some mounts of Lustre and NFS
            print(
                f"warning: {self.folder}: its file system has no locks ({error.strerror}): two runs in one folder would "
                "damage it unnoticed",
                file=sys.stderr,
            )
        self._descriptor = descriptor
        _held.append(self)
        me = {"pid": os.getpid(), "host": platform.node(), "slurm_job_id": os.environ.get("SLURM_JOB_ID")}
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, to_json(me | {"since": utc_now()}).encode(), 0)
        return True

    def _who(self) -> str:
        if not self._owner:
            return "a process that has not said which"
        job = self._owner.get("slurm_job_id")
        return (
            f"process {self._owner.get('pid')} on {self._owner.get('host')}{f', SLURM job {job}' if job else ''}, "
            f"since {self._owner.get('since')}"
        )

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            path = self.folder / LOCK
            if os.listdir(self.folder) == [LOCK] and _is_at(self._descriptor, path):  # a start that came to nothing
                path.unlink()
                for made in self._made:
                    made.rmdir()
        _held.remove(self)
        self._close()


_held: list[RunLock] = []


def _let_go_in_child() -> None:
    """A child that outlives its parent must not hold the run. (Closing takes no lock away; the parent still has it.)"""
    for lock in _held:
        lock._close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one of that name, and not one that was removed."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _owner(descriptor: int) -> dict[str, Any]:
    """What the process that holds, or held, a lock has written of itself; {} where it has not."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}
