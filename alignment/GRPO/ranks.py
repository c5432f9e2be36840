"""What one process learns and all must act on: a failure, a signal, a folder written together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from alignment.errors import PassingError, UserError
from alignment.runs import atomic_directory


class Stopped(Exception):
    """A signal came; every process saves and ends."""


@contextlib.contextmanager
def failing_together(accelerator: Accelerator | PartialState) -> Iterator[None]:
    """All processes go through this, and none leaves it before the others: what one fails at in it, all raise.

    The first rank that failed raises its error, with its trace, and the others a UserError or PassingError of the same words. A
    Stopped of one process wins over errors of others, which it may have caused.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as problem:
        error = problem
    told = gather_object(
        [None if error is None else (isinstance(error, Stopped), str(error), isinstance(error, PassingError))]
    )
    found = [one for one in told if one is not None]
    if any(stopped for stopped, _, _ in found):
        raise Stopped
    if found:
        if error is not None and told.index(found[0]) == accelerator.process_index:
            raise error
        _, text, passing = found[0]
        raise (PassingError if passing else UserError)(text) from error


def on_any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    mine = torch.tensor([int(flag)], device=accelerator.device)
    return bool(accelerator.reduce(mine, reduction="sum").item())


@contextlib.contextmanager
def folder_of_all(accelerator: Accelerator, final: Path, needed: int) -> Iterator[Path]:
    """`atomic_directory` for all processes together (one file system): it gets its name when all of them are through.
    `needed` are the bytes of all of them.

    What one of them fails at, all raise.
    """
    with failing_together(accelerator), contextlib.ExitStack() as stack:
        told: list = [None]
        with failing_together(accelerator):
            if accelerator.is_main_process:
                told = [str(stack.enter_context(atomic_directory(final, needed)))]
        broadcast_object_list(told)
        with failing_together(accelerator):
            yield Path(told[0])
