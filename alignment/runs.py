"""Run folders: everything needed to understand a run, to run it again and to go on with it.

    RUN/config.yaml      the resolved settings          RUN/manifest.json   command, versions, commit, weights
    RUN/metrics.jsonl    one row an event, the truth    RUN/tensorboard/    the same for dashboards (and W&B if configured)

Files and checkpoint folders appear under their final name only when they are whole and on disk. A run goes on only as what it
was begun as.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignment.errors import UserError, first_line
from alignment.records import JsonlWriter, atomic_open, check_room, fsync_folder, read_jsonl, write_json, write_jsonl

_PACKAGES = ("torch", "transformers", "numpy", "accelerate", "trl", "vllm", "safetensors", "tokenizers")


@contextlib.contextmanager
def atomic_directory(final: str | Path, needed: int = 0) -> Iterator[Path]:
    """Yields a temporary folder beside `final`; it takes that name when the block ends well, with all its files on disk.

    An older folder of that name is replaced, and stays until the new one is complete. Raises UserError when the place cannot be
    written, is full, or has less than the `needed` bytes left.
    """
    final = Path(final)
    if needed:
        check_room(final, needed)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if final.exists():
            old = final.with_name(f".{final.name}.{os.getpid()}.old")
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(final)
        fsync_folder(final.parent)
    except Exception as error:
        if not _is_about_writing(error):
            raise
        reason = getattr(error, "strerror", None) or f"is the disk full? {first_line(error)}"
        raise UserError(f"cannot write {final}: {reason}; what was there before is unchanged") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        print(f"\n{self.received.name} received: saving and stopping (Ctrl-C again stops at once)", file=sys.stderr)

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
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": _git_commit(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "versions": versions,
        **(extra or {}),
    }


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
    """`config.yaml` and `manifest.json` of a new run."""
    with atomic_open(folder / "config.yaml") as file:
        file.write(config_yaml)
    write_json(folder / "manifest.json", manifest(extra))
