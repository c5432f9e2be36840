"""Errors that a user can act on, and the one place where they become an exit code."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_PASSING = 75  # EX_TEMPFAIL: job scripts are queued again (slurm/common.sh)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what shells and SLURM expect


class UserError(Exception):
    """Something the user can mend. The message is one line: what (file, line, key), what was expected, what to do."""

    exit_code = EXIT_USER_ERROR


class PassingError(UserError):
    """What passes without the user: the same command goes on once it has."""

    exit_code = EXIT_PASSING


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits: 0 or what it returns, 2 for a UserError or a full disk, that of stdout as well (one
    line, no trace), 75 for what passes (PassingError), 130 for Ctrl-C."""
    threading.excepthook = _tell_of_thread
    try:
        try:
            sys.exit(main() or 0)
        except SystemExit as ended:  # of --help as well
            sys.stdout.flush()  # what was printed is written here, or its error told below
            if isinstance(ended.code, int):
                _leave(ended.code)
            raise
    except UserError as error:
        tell(str(error))
        _leave(error.exit_code)
    except OSError as error:  # what writes outside alignment/records.py: libraries, and print
        if error.errno not in NO_ROOM:
            raise
        tell(f"cannot write {error.filename or 'to disk'}: {error.strerror}; make room and run it again")
        _leave(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(EXIT_INTERRUPTED)


def _leave(code: int) -> NoReturn:
    """Exits. What stdout does not take is lost: Python would try again on its way out, with a trace and a code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # One of several processes: gloo's threads may outlive its group, and then now and then abort the process while Python
        # ends (134, with all done and saved; https://github.com/pytorch/pytorch/issues/190489).
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _tell_of_thread(failed: threading.ExceptHookArgs) -> None:
    """A thread that writes (TensorBoard's) says nothing of a full disk: who gave it the work is told, and says it."""
    if getattr(failed.exc_value, "errno", None) not in NO_ROOM:
        threading.__excepthook__(failed)


def tell(message: str) -> None:
    """One line, also where a name in it holds line breaks."""
    with contextlib.suppress(OSError):  # it may be a log on the full disk that is told of
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one where it ends in a colon; its kind when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
