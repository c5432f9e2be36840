"""A model's folder: where it is, what its config says, which files hold its weights, and by what hash they are known.

Layouts: `model.safetensors`, `model-0000x-of-0000y.safetensors` with an index, `pytorch_model*.bin` with or without one. Of
`.bin` files only tensors are read: a pickle that would run code is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.errors import UserError, first_line

if TYPE_CHECKING:  # slow to import, and not all that look at a folder read its weights
    import torch
    from transformers import PretrainedConfig

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
KEYS_SHOWN = 5
_NEVER_READ = ["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot", "original/*"]  # the same weights in other layouts
# What tokenizers of all kinds are read from: the names differ, these patterns hold them.
_TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges*", "*.model", "*.spm", "*.tiktoken", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
_LFS_POINTER = b"version https://git-lfs"


def resolve_folder(name: str | Path) -> Path:
    """The folder itself, or the local copy of a model of that name on the Hugging Face hub. Raises UserError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise UserError(f"{name}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(str(name), ignore_patterns=[*_NEVER_READ, "*.bin"]))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(name), ignore_patterns=_NEVER_READ))
        return found
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


def known_as(model: str) -> str:
    """What a scorer's identity calls that model: a folder by its own name, wherever it lies; others as they are."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def tokenizer_hash(folder: Path, chat_template: bool) -> str:
    """16 hex digits of the SHA-256 of the names and bytes of the tokenizer's files, and of its chat template's if asked for.

    Of the files, because what a loaded tokenizer says of itself differs between versions of the libraries.
    """
    patterns = (*_TOKENIZER_FILES, *(("chat_template*",) if chat_template else ()))
    return _files_hash({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def config_hash(folder: Path) -> str:
    """16 hex digits of the SHA-256 of config.json, which says what is computed with the weights."""
    return _files_hash([folder / "config.json"])


def _files_hash(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def read_config(folder: Path) -> PretrainedConfig:
    """The folder's transformers config. Raises UserError when there is none or it cannot be read."""
    from transformers import AutoConfig

    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: adapters alone; merge them into their base model (final/ and best/ of a run are merged)"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json: not a model folder, or not all of it was downloaded")
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds; all mean the same to a user
        raise UserError(f"{folder}/config.json: not a readable transformers config: {first_line(error)}") from error


def check_ids(folder: Path, largest: int, known: int) -> None:
    """Raises UserError when `largest`, a tokenizer's id, is beyond the `known` ids that the model has an embedding for."""
    if largest >= known:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {largest}, the model knows {known}: they do not belong together"
        )


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor on the CPU) for every tensor of the folder. Raises UserError naming a file that cannot be read."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with open_safetensors(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    yield key, tensors.get_tensor(key)
        else:
            yield from _load_bin(file).items()


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every tensor of the folder, from the files' headers. Raises UserError as `read_tensors` does."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with open_safetensors(file) as tensors:
                shapes |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        else:
            shapes |= {key: tuple(tensor.shape) for key, tensor in _load_bin(file).items()}
    return shapes


@contextlib.contextmanager
def open_safetensors(file: Path) -> Iterator:
    """The open file. Raises UserError for one that is damaged; what it holds is checked as it is read."""
    from safetensors import SafetensorError, safe_open

    _refuse_pointer(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: damaged or not a safetensors file, download or save it again: {first_line(error)}"
        ) from error


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    import torch

    _refuse_pointer(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: refused, it holds more than tensors and could run code when loaded") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{file}: damaged, download or save it again: {first_line(error)}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: expected tensors by name, as torch.save(model.state_dict(), file) writes them")
    return tensors


def _refuse_pointer(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("rb") as stream:  # who reads it says what else is wrong
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{file}: a Git LFS pointer in place of the weights: run `git lfs pull` in that folder")


def some_keys(keys: Iterable[str]) -> str:
    """The first few keys, and how many more there are."""
    keys = list(keys)
    more = len(keys) - KEYS_SHOWN
    return ", ".join(keys[:KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
