"""Reads the weight files of a model folder, tensor by tensor, and lets nothing through that does not fit.

The layouts are model_folder.py's; of `.bin` files only tensors are read: a pickle that would run code is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alignment.errors import UserError, first_line
from alignment.model_folder import weight_files

KEYS_SHOWN = 5


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor on the CPU) for every tensor of the folder. Raises UserError naming a file that cannot be read."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 - not a dict
                        yield key, tensors.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: damaged or not a safetensors file: {error}") from error
            continue
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{file}: refused, it holds more than tensors and could run code when loaded") from error
        except (RuntimeError, EOFError, OSError) as error:
            raise UserError(f"{file}: damaged: {first_line(error)}") from error
        yield from tensors.items()


def copy_tensors(folder: Path, wanted: dict[str, torch.Tensor], optional: Set[str] = frozenset()) -> None:
    """Copies the folder's tensors into `wanted`, in place and in its dtypes.

    `optional` keys may be missing. Raises UserError naming missing, extra and misshapen keys and those not finite.
    """
    seen, extra, misshapen, not_finite = set(), [], [], []
    for key, tensor in read_tensors(folder):
        if key.endswith("rotary_emb.inv_freq"):
            continue  # old checkpoints store this; it follows from the config
        if key not in wanted:
            extra.append(key)
        elif tensor.shape != wanted[key].shape:
            misshapen.append(f"{key} is {tuple(tensor.shape)}, the config asks for {tuple(wanted[key].shape)}")
        else:
            with torch.no_grad():
                wanted[key].copy_(tensor)
            if not torch.isfinite(wanted[key]).all():
                not_finite.append(key)
        seen.add(key)
    missing = sorted(wanted.keys() - seen - optional)
    problems = [
        ("missing", missing),
        ("not expected", sorted(extra)),
        ("of the wrong shape", misshapen),
        ("not finite", not_finite),
    ]
    found = "; ".join(f"{what}: {_some(keys)}" for what, keys in problems if keys)
    if found:
        raise UserError(f"{folder}: these weights do not fit a score model, tensors {found}")


def _some(keys: list[str]) -> str:
    more = len(keys) - KEYS_SHOWN
    return ", ".join(keys[:KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
