"""What one process learns and all must act on: a failure, a signal, a folder written together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from alignment.errors import UserError
from alignment.runs import atomic_directory


class Stopped(Exception):
    """A signal came; every process saves and ends."""


def raise_on_all(accelerator: Accelerator, error: Exception | None) -> None:
    """Every process calls this; when one of them has an error, all raise it (the first rank's), so none waits for the rest.

    A Stopped of one process wins over errors of others, which it may have caused.
    """
    told = gather_object([None if error is None else (isinstance(error, Stopped), str(error))])
    found = [one for one in told if one is not None]
    if any(stopped for stopped, _ in found):
        raise Stopped
    if found:
        raise UserError(found[0][1]) from error


def on_any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    mine = torch.tensor([int(flag)], device=accelerator.device)
    return bool(accelerator.reduce(mine, reduction="sum").item())


@contextlib.contextmanager
def folder_of_all(accelerator: Accelerator, final: Path) -> Iterator[Path]:
    """`atomic_directory` for all processes together (one file system): it gets its name when all of them are through."""
    with contextlib.ExitStack() as stack:
        told: list = [str(stack.enter_context(atomic_directory(final))) if accelerator.is_main_process else None]
        broadcast_object_list(told)
        yield Path(told[0])
        accelerator.wait_for_everyone()
    accelerator.wait_for_everyone()
