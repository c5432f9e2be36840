"""Recovers Alpaca-7B: LLaMA-7B plus the published weight difference, tensor by tensor, from shards into shards.

    python alignment/alpaca/recover_alpaca_weights.py --path_raw LLAMA --path_diff DIFFERENCE --path_tuned OUTPUT

The rule is the published one (tatsu-lab/stanford_alpaca, weight_diff.py), and in float32 the result is the same to the last
bit: both sides in float32, one row added to the base's embeddings and head as the mean of its rows, tuned = diff + base for
every tensor, tokenizer from the difference. Where it departs from the published script:
- One tensor is in memory at a time: 0.7 GiB for 7B, where two whole models (54 GB) were.
- `--dtype` rounds the float32 sums once; the published script writes float32 only.
- Inputs are checked against SHA256SUMS or the checksums inside `.bin` files; every written tensor has its own checksum.
- The published sum is explained where today's checkpoints lack what it counted (integrity.py).
- Rotary tables, tied heads and wrong bases have defined outcomes (pairing.py).

OUTPUT appears when everything is written and the check has passed or was switched off. Until then the work is in
OUTPUT.partial, which has no config.json and so loads nowhere; a rerun goes on from its finished shards.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from alignment.alpaca.integrity import (
    MANIFEST,
    PUBLISHED_SUM,
    InputChecks,
    SumCheck,
    differing_tensors,
    published_check,
    read_manifest,
)
from alignment.alpaca.llama_config import HEAD, read_llama_config
from alignment.alpaca.pairing import Pair, pair_tensors
from alignment.alpaca.shards import BLOCK, WeightFolder, as_bytes, index_text, safetensors_header
from alignment.alpaca.work_folder import PROGRESS, finished_shards, give_final_name, is_finished, owned
from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.records import JsonlWriter, atomic_open, read_json, write_json
from alignment.runs import manifest

TOKENIZER_PARTS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SPARE_BYTES = 64 << 20  # for everything beside the weights
PROBLEMS_SHOWN = 5


@dataclass
class Settings:
    path_raw: str = setting("", "folder of the base model, LLaMA-7B in Hugging Face layout")
    path_diff: str = setting("", "folder of the published difference (tatsu-lab/alpaca-7b-wdiff)")
    path_tuned: str = setting("", "folder to write; it appears when the recovery is complete")
    dtype: str = setting("float32", "dtype to store; float32 as published", choices=("float32", "float16", "bfloat16"))
    max_shard_gb: float = setting(5.0, "largest output shard, 10^9 bytes", minimum=0.00001)
    check_integrity_naively: bool = setting(True, "the published sum must agree; false takes the result in any case")
    expected_sum: float = setting(PUBLISHED_SUM, "the sum to agree with; another pair of models has another one")
    check_inputs: bool = setting(True, "check input files against SHA256SUMS, or the CRC-32 inside .bin files")
    reference_manifest: str | None = setting(
        None, f"{MANIFEST} of a recovery known to be good: every tensor must be the same as there"
    )
    overwrite: bool = setting(False, "replace path_tuned if it exists")

    def __post_init__(self) -> None:
        for name in ("path_raw", "path_diff", "path_tuned"):
            if not getattr(self, name):
                raise UserError(f"--{name} is needed (--help explains it)")
        places = {
            name: Path(getattr(self, name)).expanduser().resolve() for name in ("path_raw", "path_diff", "path_tuned")
        }
        if len(set(places.values())) < 3:
            raise UserError("path_raw, path_diff and path_tuned must be three different folders")


def main() -> None:
    settings = load_config(Settings, prog="recover_alpaca_weights.py", description=__doc__)
    # The disk sets the pace, and with one thread a float32 sum does not depend on the number of cores.
    torch.set_num_threads(1)
    recover(settings)


def recover(settings: Settings) -> Path:
    """Does everything that the settings ask for and returns the folder. Raises UserError; then OUTPUT is not there."""
    final = Path(settings.path_tuned).expanduser().absolute()
    base, diff = WeightFolder(settings.path_raw), WeightFolder(settings.path_diff)
    base_config, config = read_llama_config(base.folder), read_llama_config(diff.folder)
    pairs, notes = pair_tensors(base, diff, base_config, config)
    for note in notes:
        print(f"note: {note}")
    shards = split_into_shards(pairs, getattr(torch, settings.dtype), settings.max_shard_gb)
    plan = {
        "base": {"folder": str(base.folder.resolve()), "files": base.identity()},
        "difference": {"folder": str(diff.folder.resolve()), "files": diff.identity()},
        "dtype": settings.dtype,
        "shards": {file: [[pair.name, list(pair.shape), pair.base_name, pair.mean_row] for pair in group]
                   for file, group in shards.items()},
    }  # fmt: skip
    reference = _read_reference(settings)

    def judge(tensors: dict[str, dict]) -> SumCheck:
        order = [pair.name for pair in pairs] + ([HEAD] if config.tie_word_embeddings else [])
        sums = {name: entry["sum"] for name, entry in tensors.items()}
        return _judge(settings, published_check(order, sums, config, settings.expected_sum), tensors, reference)

    if is_finished(final, plan, settings.overwrite):
        judge(read_manifest(final / MANIFEST)["tensors"])
        print(f"{final}: already recovered from these files with these settings")
        return final

    work = final.with_name(final.name + ".partial")
    with owned(work):
        done = finished_shards(work, plan)
        files = [
            file
            for group in shards.values()
            for pair in group
            for file in (base.file_of[pair.base_name], diff.file_of[pair.name])
        ]
        checks = InputChecks(list(dict.fromkeys(files)) if settings.check_inputs else [])
        try:
            _write_shards(work, shards, done, base, diff, getattr(torch, settings.dtype), checks)
            tensors = {name: entry for entries in done.values() for name, entry in entries.items()}
            check = judge(tensors)
            checks.wait(dict.fromkeys(files))
            inputs = {str(file): checks.outcome(file) for file in dict.fromkeys(files)}
        finally:
            checks.close()
        record = manifest(
            {
                "dtype": settings.dtype,
                "check": check.as_dict(),
                "check_was_required": settings.check_integrity_naively,
                "inputs_checked_against": inputs,
                "notes": notes,
                "plan": plan,
                "tensors": tensors,
            }
        )
        _add_model_files(work, diff.folder, settings.dtype, shards, tensors, record)
        give_final_name(work, final)
    print(f"{final}: recovered, {len(tensors)} tensors in {len(shards)} files, {settings.dtype}")
    return final


def split_into_shards(pairs: list[Pair], dtype: torch.dtype, max_gb: float) -> dict[str, list[Pair]]:
    """{file name: its tensors}, filled in order up to `max_gb` * 10^9 bytes, with Hugging Face's names."""
    groups: list[list[Pair]] = [[]]
    size = 0
    for pair in pairs:
        bytes_of_pair = torch.Size(pair.shape).numel() * dtype.itemsize
        if groups[-1] and size + bytes_of_pair > max_gb * 1e9:
            groups.append([])
            size = 0
        groups[-1].append(pair)
        size += bytes_of_pair
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{k:05d}-of-{len(groups):05d}.safetensors": group for k, group in enumerate(groups, start=1)}


def add_blocks(buffer: torch.Tensor, pair: Pair, base: WeightFolder, diff: WeightFolder) -> Iterator[torch.Tensor]:
    """tuned = difference + base in float32: fills the flat `buffer` (elements of pair.shape) and yields it in finished blocks.

    The mean of the base's rows is taken over the whole float32 tensor, as published: a sum in parts would round differently.
    """
    source = base.tensor(pair.base_name).reshape(-1)
    difference = diff.tensor(pair.name).reshape(-1)
    if pair.mean_row:
        table = buffer.view(pair.shape)
        rows = pair.shape[0] - 1  # the base has that many, or one more that is replaced
        for start in range(0, rows * pair.shape[1], BLOCK):
            end = min(start + BLOCK, rows * pair.shape[1])
            buffer[start:end] = source[start:end]
        table[rows] = table[:rows].mean(dim=0)
    for start in range(0, buffer.numel(), BLOCK):
        block = buffer[start : start + BLOCK]
        if not pair.mean_row:
            block.copy_(source[start : start + BLOCK])
        yield block.add_(difference[start : start + BLOCK])


def write_shard(
    path: Path, group: list[Pair], base: WeightFolder, diff: WeightFolder, dtype: torch.dtype, buffer: torch.Tensor
) -> dict[str, dict]:
    """Streams one safetensors file; returns the manifest's entries of its tensors. Raises UserError for non-finite values.

    Of one tensor, a block is written and another hashed while the next is added.
    """
    entries = {}
    with atomic_open(path, "wb") as file, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as hasher:
        file.write(safetensors_header({pair.name: pair.shape for pair in group}, dtype))
        for pair in group:
            sources = f"made from {base.file_of[pair.base_name]} and {diff.file_of[pair.name]}"
            total = buffer[: torch.Size(pair.shape).numel()]
            digest = hashlib.sha256()
            jobs: list[Future] = []
            for block in add_blocks(total, pair, base, diff):
                stored = block.to(dtype)
                if dtype is torch.float16 and torch.isfinite(block).all() and not torch.isfinite(stored).all():
                    raise UserError(
                        f"{pair.name} has values beyond float16, {sources}: use --dtype bfloat16 or float32"
                    )
                jobs += [writer.submit(file.write, as_bytes(stored)), hasher.submit(digest.update, as_bytes(stored))]
            value_sum = total.view(pair.shape).sum()  # not finite exactly if an element is not
            if not torch.isfinite(value_sum):
                raise UserError(f"{pair.name} is not finite, {sources}: one of these files is corrupt")
            for job in jobs:
                job.result()
            entries[pair.name] = {
                "file": path.name,
                "shape": list(pair.shape),
                "sum": value_sum.item(),
                "sha256": digest.hexdigest(),
                "base_file": base.file_of[pair.base_name].name,
                "diff_file": diff.file_of[pair.name].name,
            }
    return entries


def _write_shards(
    work: Path,
    shards: dict[str, list[Pair]],
    done: dict[str, dict],
    base: WeightFolder,
    diff: WeightFolder,
    dtype: torch.dtype,
    checks: InputChecks,
) -> None:
    """Writes the shards that are not in `done` and adds them to it and to the progress file, one after the other."""
    left = {file: group for file, group in shards.items() if file not in done}
    sizes = {
        file: sum(torch.Size(pair.shape).numel() for pair in group) * dtype.itemsize for file, group in left.items()
    }
    free = shutil.disk_usage(work).free
    if sum(sizes.values()) + SPARE_BYTES > free:
        raise UserError(
            f"{work.parent}: {free / 1e9:.1f} GB free, {(sum(sizes.values()) + SPARE_BYTES) / 1e9:.1f} GB needed: "
            f"make room, choose another --path_tuned, or store half with --dtype bfloat16"
        )
    if done:
        print(f"{work}: {len(done)} of {len(shards)} shards are finished, going on")
    largest = max((torch.Size(pair.shape).numel() for group in left.values() for pair in group), default=0)
    buffer = torch.empty(largest, dtype=torch.float32)
    with JsonlWriter(work / PROGRESS) as progress:
        for file, group in left.items():
            started = time.monotonic()
            entries = write_shard(work / file, group, base, diff, dtype, buffer)
            # A shard counts as finished when the files that it was made from are known to be good.
            checks.wait(source for pair in group for source in (base.file_of[pair.base_name], diff.file_of[pair.name]))
            progress.append({"shard": file, "tensors": entries})
            done[file] = entries
            print(f"{file}: {sizes[file] / 1e9:.2f} GB in {time.monotonic() - started:.1f} s", flush=True)


def _read_reference(settings: Settings) -> dict | None:
    if settings.reference_manifest is None:
        return None
    reference = read_manifest(Path(settings.reference_manifest))
    if reference["dtype"] != settings.dtype:
        raise UserError(
            f"{settings.reference_manifest}: is of a recovery in {reference['dtype']}, this one is in {settings.dtype}: "
            f"checksums compare within one dtype only"
        )
    return reference["tensors"]


def _judge(settings: Settings, check: SumCheck, tensors: dict, reference: dict | None) -> SumCheck:
    """Prints the verdict. Raises UserError when a check that is switched on has failed."""
    if reference is not None:
        lines = differing_tensors(tensors, reference)
        if lines:
            more = f" and {len(lines) - PROBLEMS_SHOWN} more" if len(lines) > PROBLEMS_SHOWN else ""
            raise UserError(f"not the same as {settings.reference_manifest}: {'; '.join(lines[:PROBLEMS_SHOWN])}{more}")
        print(f"every tensor is the same as in {settings.reference_manifest}")
    print(f"published sum: {check.verdict}")
    if not check.passed and settings.check_integrity_naively:
        raise UserError(
            f"integrity check failed, the published sum {check.verdict}; the base is another model, or a file is corrupt: "
            f"compare with SHA256SUMS of the hub, or take the result with --check_integrity_naively false"
        )
    return check


def _add_model_files(
    work: Path, diff: Path, dtype: str, shards: dict[str, list[Pair]], tensors: dict[str, dict], record: dict
) -> None:
    """Everything beside the weights; config.json comes last."""
    if len(shards) > 1:
        names = {file: [pair.name for pair in group] for file, group in shards.items()}
        size = sum(torch.Size(entry["shape"]).numel() for entry in tensors.values()) * getattr(torch, dtype).itemsize
        with atomic_open(work / "model.safetensors.index.json") as file:
            file.write(index_text(names, size))
    for name in (*TOKENIZER_PARTS, "generation_config.json"):
        if (diff / name).is_file():
            with atomic_open(work / name, "wb") as file:
                file.write((diff / name).read_bytes())
    write_json(work / MANIFEST, record)
    config = read_json(diff / "config.json")
    config.pop("_name_or_path", None)
    config.pop("dtype", None)
    config["torch_dtype"] = dtype
    with atomic_open(work / "config.json") as file:
        file.write(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
