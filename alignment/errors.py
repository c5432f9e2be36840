"""Errors that a user can act on, and the one place where they become an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what shells and SLURM expect


class UserError(Exception):
    """Something the user can mend. The message is one line: what (file, line, key), what was expected, what to do."""

    exit_code = EXIT_USER_ERROR


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` and exits: 0 or what it returns, 2 for a UserError (one line, no trace), 130 for Ctrl-C."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with the next one where it ends in a colon; its kind when it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
