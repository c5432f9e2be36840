"""Run folders: everything needed to understand a run, to run it again and to go on with it.

    RUN/config.yaml      the resolved settings          RUN/manifest.json   command, versions, commit, weights
    RUN/starts.jsonl     a row for each later start, which may have other settings, versions or another commit
    RUN/metrics.jsonl    one row an event, the truth    RUN/tensorboard/    the same for dashboards (and W&B if configured)
    RUN/.lock            held by the process that writes there

Files and checkpoint folders appear under their final name only when they are whole and on disk. What a kill leaves of a
folder that was not whole yet, the next start of the run removes. A run goes on only as what it was begun as.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from alignment.errors import UserError, first_line
from alignment.records import (
    JsonlWriter,
    atomic_open,
    check_room,
    fsync_folder,
    read_jsonl,
    to_json,
    write_json,
    write_jsonl,
)

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(@(?P<host>.+))?\.(?P<kind>tmp|old)")  # of atomic_directory
_A_DAY = 86400.0
_PACKAGES = ("torch", "transformers", "numpy", "accelerate", "trl", "vllm", "safetensors", "tokenizers")


@contextlib.contextmanager
def atomic_directory(final: str | Path, needed: int = 0) -> Iterator[Path]:
    """Yields a temporary folder beside `final`; it takes that name when the block ends well, with all its files on disk.

    An older folder of that name is replaced. It stays until the new one is complete; for a moment, between two renames,
    neither has the name. A kill leaves a hidden folder, in that moment two: `mend_leftovers` takes care of them, here and at
    the start of a run. Raises UserError when the place cannot be written, is full, or has less than the `needed` bytes left.
    """
    final = Path(final)
    mend_leftovers(final.parent, final.name)
    if needed:
        check_room(final, needed)
    temporary, old = (
        final.with_name(f".{final.name}.{os.getpid()}@{platform.node()}.{kind}") for kind in ("tmp", "old")
    )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        try:
            if final.exists():
                final.rename(old)
            temporary.rename(final)
            fsync_folder(final.parent)
        except BaseException:
            if old.exists():
                if final.exists():
                    final.rename(temporary)
                old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not _is_about_writing(error):
            raise
        reason = getattr(error, "strerror", None) or f"is the disk full? {first_line(error)}"
        raise UserError(f"cannot write {final}: {reason}; what was there before is unchanged") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def mend_leftovers(folder: Path, name: str | None = None, ended: tuple[int, str] | None = None) -> None:
    """After a kill in `atomic_directory`: half of a new folder is removed, and so is an old one that has a successor; an old
    one that has none gets its name back. Of all folders in `folder`, or of one `name`.

    Nothing is touched that a living process may still write: only what belongs to a process of this machine that is gone, or
    to `ended` (process and host, known to be gone), or has not changed for a day.
    """
    found = [
        (path, match)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _LEFTOVER.fullmatch(path.name)) and name in (None, match["name"])
    ]
    for path, match in found:
        if path.is_symlink() or not path.is_dir() or not _is_left(path, int(match["pid"]), match["host"], ended):
            continue
        final = folder / match["name"]
        if match["kind"] == "old" and not final.exists():
            try:
                path.rename(final)
            except OSError as error:
                raise UserError(f"cannot rename {path} to {final}: {error.strerror}; do it by hand") from error
            print(f"{final} has its name back, which a killed process had taken from it")
        else:
            shutil.rmtree(path, ignore_errors=True)
            print(f"{path}, left by a killed process, is removed")


def _is_left(path: Path, pid: int, host: str | None, ended: tuple[int, str] | None) -> bool:
    """Whether nobody writes that folder any more."""
    if (pid, host) == ended:
        return True
    if host == platform.node():
        return pid == os.getpid() or not _is_alive(pid)
    changed = 0.0
    for one in (path, *path.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # its process is alive and has renamed it
            changed = max(changed, one.stat().st_mtime)
    return time.time() - changed > _A_DAY


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # someone else's
        pass
    return True


def _is_about_writing(error: Exception) -> bool:
    """Whether a disk that is full or failing is behind it: of the libraries only some raise OSError then."""
    words = ("inline_container", "No space left on device", "Disk quota exceeded")  # torch.save, tokenizers
    return isinstance(error, (OSError, SafetensorError)) or any(word in str(error) for word in words)


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag that long work looks at, so that it can save and end.

    A second Ctrl-C interrupts at once. Use as a context manager; the former handlers come back at its end.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        # Not print: where the signal interrupts a write to stderr (a progress bar's), Python refuses another one in it.
        told = f"\n{self.received.name} received: saving and stopping (Ctrl-C again stops at once)\n"
        with contextlib.suppress(OSError):
            os.write(2, told.encode())

    def __enter__(self) -> StopSignal:
        self._former = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


def manifest(extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a reader needs to repeat a run: command, folder, versions, git commit (with `-dirty`), time in UTC."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "folder": os.getcwd(),
        "started": utc_now(),
        "git_commit": _git_commit(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "versions": versions,
        **(extra or {}),
    }


def utc_now() -> str:
    """The time in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _git_commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class MetricsLog:
    """`metrics.jsonl` first, TensorBoard second, W&B when `wandb_project` is set.

    Opening drops rows that `keep` refuses: a run that goes on from iteration k rewrites what came after k, so that the file
    is the one of a run that was never interrupted.
    """

    def __init__(
        self,
        folder: Path,
        keep: Callable[[dict], bool],
        wandb_project: str | None = None,
        wandb_run_name: str | None = None,
    ):
        path = folder / "metrics.jsonl"
        JsonlWriter(path).close()  # heals a torn last line
        rows = read_jsonl(path)
        kept = [row for row in rows if keep(row)]
        if len(kept) < len(rows):
            write_jsonl(path, kept)
        self._file = JsonlWriter(path)
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only runs need it

        self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        self._wandb = _start_wandb(folder, wandb_project, wandb_run_name) if wandb_project else None

    def log(self, row: dict[str, Any], step: int) -> None:
        """Appends `row` (with its `kind`) and shows its numbers as `kind/name` at `step` on the dashboards."""
        self._file.append(row)
        numbers = {
            f"{row['kind']}/{name}": value
            for name, value in row.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "iteration"
        }
        try:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            raise UserError(
                f"cannot write {self._tensorboard.log_dir}: {error.strerror}; the metrics are whole"
            ) from error
        if self._wandb is not None:
            self._wandb.log({**numbers, "iteration": step})

    def close(self) -> None:
        self._file.close()
        try:
            self._tensorboard.close()
        except OSError as error:  # its rows stand in metrics.jsonl as well
            print(f"note: {self._tensorboard.log_dir} is not complete: {error.strerror}", file=sys.stderr)
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(folder: Path, project: str, name: str | None) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"wandb_project is '{project}' but wandb is not installed: pip install wandb, or leave it empty"
        ) from error
    run_id_file = folder / "wandb_run_id"
    run_id = run_id_file.read_text().strip() if run_id_file.exists() else wandb.util.generate_id()
    with atomic_open(run_id_file) as file:
        file.write(run_id)
    return wandb.init(project=project, name=name or folder.name, id=run_id, resume="allow", dir=str(folder))


def check_same_run(begun_with: dict[str, Any], now: dict[str, Any], place: Path, option: str) -> None:
    """Raises UserError naming what of `now` (settings, weights, prompts, scorer, processes) the run was not begun with.

    `place` is where the run is or says so, `option` the one that puts another run elsewhere.
    """
    changed = [
        f"{key} (was {begun_with.get(key)!r}, now {value!r})"
        for key, value in sorted(now.items())
        if begun_with.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{place} was begun otherwise: {', '.join(changed)}. Going on would not be that run: undo the change, or give "
            f"another {option}"
        )


def write_run_files(folder: Path, config_yaml: str, extra: dict[str, Any]) -> None:
    """`config.yaml` and `manifest.json` of a new run. They stay as they are: the record of its beginning."""
    with atomic_open(folder / "config.yaml") as file:
        file.write(config_yaml)
    write_json(folder / "manifest.json", manifest(extra))


def record_start(folder: Path, config_yaml: str) -> None:
    """A row in `starts.jsonl` for a start that goes on with a run: as manifest.json, and in `changed` each setting that is not
    that of config.yaml: {name: [then, now]}, or null where that file is gone or damaged."""
    now = yaml.safe_load(config_yaml)
    try:
        then = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        names = [name for name in now if name not in then or then[name] != now[name]]
        changed = {name: [then.get(name), now[name]] for name in names} | {
            name: [then[name], None] for name in then if name not in now
        }
        to_json(changed)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
        changed = None
    with JsonlWriter(folder / "starts.jsonl") as starts:
        starts.append(manifest({"changed": changed}))
