"""Proof that recovered weights are the right ones: the published sum, checksums of inputs, checksums of every tensor.

The published sum is one float32 number over all tensors of the model, 50637.1836, with a tolerance of 0.01. It was taken in
early 2023, when a LLaMA's state dict held the rotary `inv_freq` tables (32 of them, together 238.7) and the MLP's tensors
came in another order; today's have neither, which explains why the published script fails on the right weights. So three
sums are looked at (`published_check`). This explanation follows from the code of that time and its figures; it has not been
seen on the real weights here. A sum cannot see a small change, so each tensor also has its SHA-256 in the manifest.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from alignment.alpaca.llama_config import EMBEDDINGS, HEAD, LlamaConfig
from alignment.alpaca.shards import as_bytes
from alignment.errors import UserError
from alignment.records import read_object

PUBLISHED_SUM = 50637.1836  # tatsu-lab/stanford_alpaca, weight_diff.py
PUBLISHED_TOLERANCE = 0.01
# About 300 additions in float32, each rounded to the spacing of 0.004 near the sum: 0.02 (one standard deviation) is lost
# or won by the order alone, which is more than the published tolerance. Five of them:
ROUNDING = 0.1
SUMS_FILE = "SHA256SUMS"  # the format of sha256sum, so that `sha256sum -c SHA256SUMS` checks a folder too
MANIFEST = "recovery_manifest.json"
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class SumCheck:
    """`total` as the published script would compute it today; `with_tables` as in early 2023; `exact` without rounding."""

    expected: float
    total: float
    with_tables: float
    exact: float
    exact_with_tables: float
    passed: bool
    verdict: str

    def as_dict(self) -> dict:
        return asdict(self)


def published_check(
    order: Sequence[str], sums: dict[str, float], config: LlamaConfig, expected: float = PUBLISHED_SUM
) -> SumCheck:
    """Compares the sum over all tensors with the published one.

    `order`: tensor names in the order of the state dict; `sums`: the float32 sum of each recovered tensor before it is
    converted to another dtype, a tied head counting as the embeddings. Source of order and tables: transformers 4.28.
    """
    sums = {**sums, HEAD: sums.get(HEAD, sums[EMBEDDINGS])}
    table = rotary_table_sum(config)
    total = _float32_sum(sums[name] for name in order)
    with_tables = _float32_sum(_early_2023(order, sums, table))
    exact = float(np.sum([sums[name] for name in order], dtype=np.float64))
    exact_with_tables = exact + config.num_hidden_layers * table
    verdict, passed = "", True
    if abs(total - expected) <= PUBLISHED_TOLERANCE:
        verdict = "agrees, as published"
    elif abs(with_tables - expected) <= PUBLISHED_TOLERANCE:
        verdict = "agrees, as published, when the rotary tables are counted that checkpoints held in early 2023"
    elif abs(exact - expected) <= ROUNDING:
        verdict = "agrees within the rounding of a float32 sum"
    elif abs(exact_with_tables - expected) <= ROUNDING:
        verdict = "agrees within the rounding of a float32 sum when the rotary tables of early 2023 are counted"
    else:
        passed = False
        verdict = f"does not agree: {total:.4f}, or {with_tables:.4f} with the rotary tables of early 2023; expected {expected}"
    return SumCheck(expected, total, with_tables, exact, exact_with_tables, passed, verdict)


def rotary_table_sum(config: LlamaConfig) -> float:
    """Sum of one layer's `inv_freq` in float32: 1 / theta^(2i / d), d the width of a head."""
    width = config.head_dim
    powers = torch.arange(0, width, 2, dtype=torch.float32) / width
    return (1.0 / config.rope_theta**powers).sum().item()


def _early_2023(order: Sequence[str], sums: dict[str, float], table: float) -> Iterable[float]:
    held = None  # up_proj came after down_proj
    for name in order:
        if name.endswith("mlp.up_proj.weight"):
            held = sums[name]
            continue
        yield sums[name]
        if name.endswith("self_attn.o_proj.weight"):
            yield table
        if held is not None:
            yield held
            held = None


def _float32_sum(values: Iterable[float]) -> float:
    total = np.float32(0)
    for value in values:
        total = np.float32(total + np.float32(value))
    return float(total)


class InputChecks:
    """Checks input files in the background, in the order given, while the main thread computes.

    A file listed in its folder's SHA256SUMS must have that checksum; a `.bin` that is not listed must agree with the
    CRC-32 values that torch writes into it; other files have nothing to be checked against.
    """

    def __init__(self, files: Sequence[Path]):
        self._pool = ThreadPoolExecutor(max_workers=1)
        known = {folder: read_sums(folder) for folder in {file.parent for file in files}}
        self._results: dict[Path, Future] = {
            file: self._pool.submit(check_file, file, known[file.parent].get(file.name)) for file in files
        }

    def wait(self, files: Iterable[Path]) -> None:
        """Returns when all of these files are checked. Raises UserError naming the first bad one."""
        for file in files:
            if file in self._results:
                self._results[file].result()

    def outcome(self, file: Path) -> str | None:
        """What the file was checked against, None for nothing."""
        return self._results[file].result() if file in self._results else None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_file(file: Path, expected: str | None) -> str | None:
    """Raises UserError when the file's content is not what its checksum says; returns what it was checked against."""
    again = "delete it and download it again"
    if expected is not None:
        found = file_sha256(file)
        if found != expected:
            raise UserError(f"{file}: corrupt, its SHA-256 is {found}, {SUMS_FILE} says {expected}: {again}")
        return f"sha256:{found}"
    if file.suffix == ".bin":
        try:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{file}: corrupt: {error}: {again}") from error
        if bad is not None:
            raise UserError(f"{file}: corrupt, the CRC-32 of its entry {bad} is wrong: {again}")
        return "crc32 of the file's own entries"
    return None


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb", buffering=0) as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """{file name: SHA-256} of the folder's SHA256SUMS, empty without one. Raises UserError for a line of another form."""
    path = folder / SUMS_FILE
    if not path.is_file():
        return {}
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if match is None:
            raise UserError(f"{path}:{number}: expected '<64 hex digits>  <file name>', as sha256sum writes it")
        sums[match[2]] = match[1].lower()
    return sums


def read_manifest(path: Path) -> dict:
    """A recovery's manifest. Raises UserError when its `tensors` are not {name: {file, shape, sha256, sum}}."""
    manifest = read_object(path, dtype=str, tensors=dict)
    kinds: dict[str, type | tuple[type, ...]] = {"file": str, "shape": list, "sha256": str, "sum": (int, float)}
    for name, entry in manifest["tensors"].items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
            raise UserError(f"{path}: {name} lacks one of {', '.join(kinds)}, or it is of another kind; recover again")
    return manifest


def damaged_tensors(folder: Path, tensors: dict[str, dict]) -> list[str]:
    """Compares every tensor on disk with the manifest's entries `{name: {file, shape, sha256}}`.

    Returns one line for each that is missing, of another shape or of other content, with the file that holds it.
    """
    problems = []
    for file in sorted({entry["file"] for entry in tensors.values()}):
        names = [name for name, entry in tensors.items() if entry["file"] == file]
        try:
            with safe_open(folder / file, framework="pt") as stored:
                present = set(stored.keys())
                for name in names:
                    if name not in present:
                        problems.append(f"{file}: {name} is missing")
                        continue
                    tensor = stored.get_tensor(name)
                    if list(tensor.shape) != tensors[name]["shape"]:
                        problems.append(f"{file}: {name} has shape {list(tensor.shape)}, not {tensors[name]['shape']}")
                    elif hashlib.sha256(as_bytes(tensor)).hexdigest() != tensors[name]["sha256"]:
                        problems.append(f"{file}: {name} is corrupt")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file}: cannot be read ({error})")
    return problems


def differing_tensors(found: dict[str, dict], reference: dict[str, dict]) -> list[str]:
    """Lines for the tensors whose content differs from another recovery's manifest, with the inputs they were made from."""
    lines = []
    for name, entry in found.items():
        if name not in reference:
            lines.append(f"{name} is not in the reference")
        elif entry["sha256"] != reference[name]["sha256"]:
            lines.append(f"{name} differs, made from {entry['base_file']} (base) and {entry['diff_file']} (difference)")
    return lines + [f"{name} is only in the reference" for name in reference if name not in found]
