"""Reads the weight files of a model folder, tensor by tensor, and lets nothing through that does not fit.

Layouts: `model.safetensors`, `model-0000x-of-0000y.safetensors` with an index, `pytorch_model*.bin` with or without an
index (tensors only: a pickle that would run code is refused).
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alignment.errors import UserError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
KEYS_SHOWN = 5


def resolve_folder(name: str | Path) -> Path:
    """The folder itself, or the local copy of a model of that name on the Hugging Face hub. Raises UserError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(f"{name}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # no network, no such model, no permission: the hub has its own words for each
        raise UserError(f"{name}: no such folder, and the model hub did not give it: {first_line(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the folder's weights, in name order. Raises UserError when there are none or one is missing."""
    for single in SINGLE_FILES:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index}: not a weight index: {error}") from error
            for name in names:
                if Path(name).name != name or not (folder / name).is_file():
                    raise UserError(f"{index}: names {name}, which is not in the folder: download it again")
            return [folder / name for name in names]
    raise UserError(f"{folder}: no weights found, expected {' or '.join(SINGLE_FILES)} or their shards with an index")


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


def copy_tensors(folder: Path, wanted: dict[str, torch.Tensor], optional: set[str] = frozenset()) -> None:
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


def weights_hash(folder: str | Path) -> str:
    """16 hex digits of the SHA-256 of the folder's weight files: the same files give the same hash."""
    digest = hashlib.sha256()
    for file in weight_files(resolve_folder(folder)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _some(keys: list[str]) -> str:
    more = len(keys) - KEYS_SHOWN
    return ", ".join(keys[:KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
