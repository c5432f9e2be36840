"""A model's folder: where it is, which files hold its weights, and by what hash they are known.

Layouts: `model.safetensors`, `model-0000x-of-0000y.safetensors` with an index, `pytorch_model*.bin` with or without one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from alignment.errors import UserError, first_line

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


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


def weights_hash(folder: str | Path) -> str:
    """16 hex digits of the SHA-256 of the folder's weight files: the same files give the same hash."""
    digest = hashlib.sha256()
    for file in weight_files(resolve_folder(folder)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]
