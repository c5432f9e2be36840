"""Copies the weights of a folder into a score model, and lets nothing through that does not fit."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import torch

from alignment.errors import UserError
from alignment.model_folder import read_tensors, some_keys


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
    found = "; ".join(f"{what}: {some_keys(keys)}" for what, keys in problems if keys)
    if found:
        raise UserError(f"{folder}: these weights do not fit a score model, tensors {found}")
