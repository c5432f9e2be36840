"""The folder in which a recovery works, and how its content becomes the result.

OUTPUT.partial holds finished shards and `recovery_progress.jsonl`: the plan in the first row, then one row a finished shard
with the checksums of its tensors. `runs.atomic_directory` does not serve here, because it begins from nothing each time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from alignment.alpaca.integrity import MANIFEST, damaged_tensors
from alignment.errors import UserError
from alignment.records import JsonlWriter, fsync_folder, read_jsonl, read_object

PROGRESS = "recovery_progress.jsonl"
LOCK = ".lock"


@contextlib.contextmanager
def owned(work: Path) -> Iterator[None]:
    """Makes the work folder and keeps a second recovery out of it; an empty one does not stay behind."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / LOCK, "w")
    except OSError as error:
        raise UserError(f"cannot write {work}: {error.strerror}; choose another --path_tuned") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{work}: another recovery is writing there; wait for it or choose another --path_tuned"
            ) from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            if work.is_dir() and not any(path.suffix == ".safetensors" for path in work.iterdir()):
                shutil.rmtree(work, ignore_errors=True)


def finished_shards(work: Path, plan: dict) -> dict[str, dict]:
    """{shard: manifest entries} of what an earlier run has finished for the same plan; everything else is removed."""
    path = work / PROGRESS
    rows = []
    if path.is_file():
        JsonlWriter(path).close()  # heals a torn last line
        rows = read_jsonl(path)
    edited = not all(isinstance(row.get("shard"), str) and isinstance(row.get("tensors"), dict) for row in rows[1:])
    if rows and (rows[0].get("plan") != plan or edited):
        print(f"{work}: left by a recovery from other files or with other settings, beginning again")
        rows = []
    done = {}
    for row in rows[1:]:
        problems = damaged_tensors(work, row["tensors"])
        if problems:
            print(f"{work}/{problems[0]}: writing this shard again")
        else:
            done[row["shard"]] = row["tensors"]
    for left_over in work.iterdir():
        if left_over.name not in (*done, PROGRESS, LOCK):
            left_over.unlink()
    if not rows or len(done) < len(rows) - 1:
        path.unlink(missing_ok=True)
        with JsonlWriter(path) as progress:
            progress.append({"plan": plan})
            for file, entries in done.items():
                progress.append({"shard": file, "tensors": entries})
    return done


def is_finished(final: Path, plan: dict, overwrite: bool) -> bool:
    """Whether OUTPUT is the result of this very plan. Raises UserError when it is something else that may not be replaced."""
    try:
        content = list(final.iterdir()) if final.exists() else []
    except NotADirectoryError as error:
        raise UserError(f"{final}: is a file, expected a folder or nothing: choose another --path_tuned") from error
    if not content or overwrite:
        return False
    if (final / MANIFEST).is_file() and read_object(final / MANIFEST).get("plan") == plan:
        missing = [file for file in plan["shards"] if not (final / file).is_file()]
        if not missing:
            return True
        raise UserError(f"{final}: {missing[0]} is gone: --overwrite writes the folder again")
    raise UserError(
        f"{final}: exists, and was not recovered from these files with these settings: choose another --path_tuned, or "
        f"--overwrite to replace it"
    )


def give_final_name(work: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.{os.getpid()}.old")
    try:
        if final.is_dir() and any(final.iterdir()):
            final.rename(old)
        work.rename(final)
        fsync_folder(final.parent)
    except OSError as error:
        raise UserError(f"cannot rename {work} to {final}: {error.strerror}; all is written, run again") from error
    for replaced in final.parent.glob(f".{final.name}.*.old"):  # also one that a killed run left
        shutil.rmtree(replaced, ignore_errors=True)
    for name in (PROGRESS, LOCK):
        (final / name).unlink(missing_ok=True)
