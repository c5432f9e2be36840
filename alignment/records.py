"""Files of records (JSONL), single JSON documents and arrays: whole or absent, one row one line, errors with file and line.

Rows are split at b"\\n" alone. A string may hold U+2028, U+0085 or a lone surrogate: they are written as \\uXXXX escapes, so
that neither `str.splitlines` nor an editor breaks a row in two and every file is valid UTF-8. NaN and infinities are not
JSON: callers write None instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from alignment.errors import UserError

_NEEDS_ESCAPE = re.compile("[\u0085\u2028\u2029\ud800-\udfff]")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text, UTF-8 encodable, free of line separators inside strings. Raises ValueError for NaN and infinities."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return _NEEDS_ESCAPE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def finite_or_none(value: float) -> float | None:
    """A float for JSON: None stands for NaN and infinities."""
    return float(value) if np.isfinite(value) else None


def read_jsonl(path: str | Path, required: Iterable[str] = ()) -> list[dict]:
    """All rows of a JSONL file, in order; blank lines are passed over.

    Raises UserError with file and line for what is not UTF-8, not JSON, not an object, or lacks a `required` key.
    """
    return [row for _, row in read_numbered(path, required)]


def read_numbered(path: str | Path, required: Iterable[str] = ()) -> list[tuple[str, dict]]:
    """The rows of `read_jsonl`, each behind its place, FILE:LINE, for errors that tell it."""
    required = tuple(required)
    rows = []
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save the file as UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
            cut_off = number == len(lines)  # the last line has no newline behind it
            hint = "the file ends in the middle of a row" if cut_off else "expected one JSON object a line"
            raise UserError(f"{where}: not valid JSON ({error}); {hint}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
        for key in required:
            if key not in row:
                raise UserError(f"{where}: the key '{key}' is missing; the row has {', '.join(row) or 'no keys'}")
        rows.append((where, row))
    return rows


def load_prompts(path: str | Path, prompt_key: str = "prompt", limit: int | None = None) -> list[dict]:
    """Rows of a JSONL file whose `prompt_key` holds a prompt that tokenizers can read, with at least one visible character;
    the first `limit` of them. Raises UserError with file and line."""
    rows = read_numbered(path, required=(prompt_key,))
    if not rows:
        raise UserError(f"{path} has no rows; expected one JSON object with the key '{prompt_key}' a line")
    for where, row in rows:
        check_prompt(row[prompt_key], f"{where}: '{prompt_key}'")
    return [row for _, row in rows[:limit]]


def check_prompt(value: object, where: str) -> None:
    """Text with something in it to answer."""
    if not check_text(value, where).strip():
        raise UserError(f"{where} must be text that is not empty, got {value!r:.60}")


def check_text(value: object, where: str) -> str:
    """`value`, when a tokenizer can read it: half of a surrogate pair is a character for JSON and for Python, but for none."""
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, got {value!r:.40}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} holds {value[error.start]!a}, half of a character; mend or remove that row"
        ) from error
    return value


def check_writable_file(path: str | Path) -> None:
    """Raises UserError when no file of this name could be written; leaves nothing behind, not even a folder.

    Scripts ask it before they load a model: a mistyped or read-only place is told in seconds and not after hours.
    """
    if Path(path).is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the name of a file")
    _try_to_write(Path(path).absolute().parent, path)


def check_writable_folder(folder: str | Path) -> None:
    """The same for the files of a folder, which need not exist yet."""
    _try_to_write(Path(folder).absolute(), folder)


def _try_to_write(folder: Path, named: str | Path) -> None:
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {named}: {folder}: {error.strerror}; choose another place") from error


def check_room(folder: str | Path, needed: int) -> None:
    """Raises UserError when the disk of `folder`, which need not exist yet, has less than `needed` bytes left."""
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    disk = shutil.disk_usage(place)
    if disk.total and disk.free < needed:  # some mounted object stores say 0
        raise UserError(
            f"{folder} needs {needed / 2**30:.3g} GiB and its disk has {disk.free / 2**30:.3g} GiB left: make room and "
            "run the same command again"
        )


@contextlib.contextmanager
def atomic_open(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path`; it gets the name `path` when the block ends well and is flushed to disk first.

    `mode` is "w" (UTF-8 text, "\\n" kept as it is) or "wb". Raises UserError when the place cannot be written or is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text: dict[str, Any] = {"encoding": "utf-8", "newline": "\n"} if "b" not in mode else {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing of it was changed") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    with atomic_open(path) as file:
        file.write(to_json(value, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    with atomic_open(path) as file:
        for row in rows:
            file.write(to_json(row) + "\n")


def save_npy(path: str | Path, array: np.ndarray) -> None:
    """Writes `.npy` without pickled objects."""
    with atomic_open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_object(path: str | Path, **required: type | tuple[type, ...]) -> dict:
    """The JSON object in a file, with values of the `required` kinds. Raises UserError, which names file and key."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}; was it edited by hand?")
    for key, kind in required.items():
        if key not in content:
            raise UserError(f"{path}: the key '{key}' is missing; was the file edited by hand?")
        if not isinstance(content[key], kind) or isinstance(content[key], bool):  # for Python true is a whole number
            raise UserError(
                f"{path}: '{key}' is {content[key]!r:.40}, which this file never says; was it edited by hand?"
            )
    return content


class JsonlWriter:
    """Appends rows to a JSONL file, each as one whole line that is on disk when `append` returns.

    Opening heals what a killed process left: a last line without a newline is completed if it is whole JSON and dropped
    otherwise; `dropped` then holds its bytes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.dropped = b""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._heal()
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; check folder, permissions and quota") from error

    def _heal(self) -> None:
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            content = file.read()
            tail = content[content.rfind(b"\n") + 1 :]
            if not tail:
                return
            try:
                json.loads(tail)
                file.write(b"\n")
            except ValueError:
                self.dropped = tail
                file.truncate(len(content) - len(tail))

    def append(self, row: dict) -> None:
        line = (to_json(row) + "\n").encode("utf-8")
        try:
            start = self._file.tell()
            if self._file.write(line) != len(line):
                self._file.truncate(start)
                raise OSError(28, "no space left on the device")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot append to {self.path}: {error.strerror}; what was written before is whole"
            ) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
