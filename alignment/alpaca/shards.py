"""Weight files, one tensor at a time: reading through memory maps, writing safetensors shards as a stream.

Nothing here holds more of a model in anonymous memory than the tensor in hand: what is read stays in the file's own pages,
which the system may drop at any time, and what is written goes out in blocks.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from alignment.errors import UserError
from alignment.model_folder import weight_files

BLOCK = 1 << 20  # elements; 4 MiB of float32: enough for the disk, small beside any tensor of a 7B model
DTYPE_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # the safetensors format's names
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class WeightFolder:
    """The tensors of a model folder (safetensors or `.bin`, one file or shards with an index), read when asked for.

    Raises UserError naming the file when it is missing, damaged or holds more than tensors, and when two hold one key.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; expected a model folder with config.json, weights and tokenizer"
            )
        self.files = weight_files(self.folder)
        self.file_of: dict[str, Path] = {}
        self._readers = {}
        for file in self.files:
            reader = _SafetensorsFile(file) if file.suffix == ".safetensors" else _BinFile(file)
            self._readers[file] = reader
            for name in reader.names:
                if name in self.file_of:
                    raise UserError(
                        f"{file}: {name} is in {self.file_of[name].name} as well: one of them is not of this model"
                    )
                self.file_of[name] = file

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, a view of the file's pages: read it in blocks, do not write to it."""
        return self._readers[self.file_of[name]].tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def identity(self) -> dict[str, list[int]]:
        """{file name: [bytes, time of last change in ns]}: what tells whether the files are still the same."""
        return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in self.files}


class _SafetensorsFile:
    def __init__(self, file: Path):
        try:
            self._tensors = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or not a safetensors file ({error}): download it again") from error
        self.names = list(self._tensors.keys())

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors.get_tensor(name)


class _BinFile:
    def __init__(self, file: Path):
        try:
            # mmap: the pickle holds names and shapes, the numbers stay in the file.
            self._tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{file}: refused, it holds more than tensors and could run code when loaded") from error
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{file}: damaged, or saved by a torch older than 1.6 ({reason}): download it again"
            ) from error
        if not isinstance(self._tensors, dict):
            raise UserError(f"{file}: holds a {type(self._tensors).__name__}, expected tensors by name")
        for name, value in self._tensors.items():
            if not isinstance(value, torch.Tensor):
                raise UserError(f"{file}: {name} is a {type(value).__name__}, expected tensors only")
        self.names = list(self._tensors)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def safetensors_header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file whose tensors follow in the order of `shapes`, all of one dtype.

    Format: 8 bytes little-endian length, JSON, spaces up to a multiple of 8 (https://github.com/huggingface/safetensors).
    """
    entries: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index_text(shards: Mapping[str, Iterable[str]], total_bytes: int) -> str:
    """The text of `model.safetensors.index.json` for {file name: tensor names}."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2) + "\n"


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
