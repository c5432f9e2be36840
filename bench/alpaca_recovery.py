"""Memory and time of the Alpaca recovery on a synthetic checkpoint with 7B widths, beside the time of copying the bytes.

    python bench/alpaca_recovery.py                       # 4 layers (1.1 G weights, 15 GB of disk), 1, 3 and 9 shards
    python bench/alpaca_recovery.py --layers 1 --folder /dev/shm      # no disk in the way: the worst ratio

The base is float16, the difference float32, the result float32, as in the real recovery. The ceiling is a plain copy: read
both inputs, write as many bytes as the result has, flush them to disk. Peak memory is the recovery's RssAnon (from
/proc/PID/status): what the system cannot drop and read again. On a busy machine look at the CPU seconds: the copy waits for
the disk, and the recovery for its turn as well. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from alignment.alpaca.integrity import SUMS_FILE, file_sha256
from alignment.alpaca.llama_config import read_llama_config
from alignment.alpaca.shards import BLOCK, as_bytes, index_text, safetensors_header
from alignment.config import load_config, setting
from alignment.errors import run_main

SCRIPT = Path(__file__).resolve().parents[1] / "alignment" / "alpaca" / "recover_alpaca_weights.py"
POLL_SECONDS = 0.005


@dataclass
class Settings:
    layers: int = setting(4, "transformer layers; LLaMA-7B has 32", minimum=1)
    shards: list[str] = setting(["1", "3", "9"], "numbers of input shards to measure")
    formats: list[str] = setting(
        ["safetensors", "bin"], "input formats: safetensors, bin, or safetensors+sums (SHA256SUMS)"
    )
    folder: str | None = setting(None, "where the files go; default: a temporary folder")
    repeats: int = setting(3, "copies and recoveries a row, in turn; the median of each counts", minimum=1)


def main() -> None:
    settings = load_config(Settings, prog="alpaca_recovery.py", description=__doc__)
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'input':>20} {'shards':>6} {'recover s':>9} {'copy s':>7} {'ratio':>6} {'CPU s':>6} {'peak anonymous GiB':>18}"
    )
    for kind in settings.formats:
        for count in map(int, settings.shards):
            with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
                row = measure(Path(folder), settings.layers, count, kind, settings.repeats)
            rows.append(row)
            print(
                f"{kind:>20} {count:>6} {row['recover_s']:>9.1f} {row['copy_s']:>7.1f} {row['ratio']:>6.2f} "
                f"{row['recover_cpu_s']:>6.1f} {row['peak_anonymous_gib']:>18.2f}",
                flush=True,
            )
    worst = {"ratio": max(row["ratio"] for row in rows), "peak_gib": max(row["peak_anonymous_gib"] for row in rows)}
    print(json.dumps({"bench": "alpaca_recovery", "layers": settings.layers, "worst": worst, "rows": rows}))


def measure(folder: Path, layers: int, shards: int, kind: str, repeats: int) -> dict:
    base, diff = make_pair(folder, widths(layers), shards, kind.split("+")[0], sums=kind.endswith("+sums"))
    recover_s, copy_s, cpu_s, peak = [], [], [], 0
    for _ in range(repeats):
        copy_s.append(copy(base, diff, folder / "copy"))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, anonymous = recover(base, diff, folder / "tuned")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        recover_s.append(seconds)
        cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        peak = max(peak, anonymous)
        shutil.rmtree(folder / "tuned")
    return {
        "input": kind,
        "shards": shards,
        "recover_s": round(statistics.median(recover_s), 2),
        "copy_s": round(statistics.median(copy_s), 2),
        "recover_cpu_s": round(statistics.median(cpu_s), 2),
        "ratio": round(statistics.median(recover_s) / statistics.median(copy_s), 2),
        "peak_anonymous_gib": round(peak / 2**30, 3),
    }


def recover(base: Path, diff: Path, tuned: Path) -> tuple[float, int]:
    """Runs the script; returns seconds (start of the interpreter included) and the peak of RssAnon in bytes."""
    command = [
        sys.executable,
        str(SCRIPT),
        "--path_raw",
        str(base),
        "--path_diff",
        str(diff),
        "--path_tuned",
        str(tuned),
    ]
    started = time.monotonic()
    process = subprocess.Popen([*command, "--check_integrity_naively", "false"], stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(POLL_SECONDS)
    seconds = time.monotonic() - started
    if process.returncode:
        raise RuntimeError(f"the recovery ended with {process.returncode}: {process.communicate()[0]}")
    return seconds, peak


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def copy(base: Path, diff: Path, target: Path) -> float:
    """Seconds to read both inputs and to write and flush the bytes of the second, which are as many as the result's."""
    started = time.monotonic()
    with open(target, "wb", buffering=0) as out:
        for folder in (base, diff):
            for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
                with open(file, "rb", buffering=0) as source:
                    while block := source.read(1 << 22):
                        if folder is diff:
                            out.write(block)
        os.fsync(out.fileno())
    target.unlink()
    return time.monotonic() - started


def widths(layers: int, hidden: int = 4096, mlp: int = 11008, vocabulary: int = 32000) -> dict:
    """A LLaMA config.json; the defaults are 7B's."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "max_position_embeddings": 2048,
        "num_attention_heads": max(1, hidden // 128),
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": vocabulary,
    }


def make_pair(folder: Path, config: dict, shards: int, kind: str, sums: bool = False) -> tuple[Path, Path]:
    """Writes a base (float16) and a difference (float32, one row more) in `shards` files each: folders `base` and `diff`."""
    for name, dtype, rows in (("base", torch.float16, 0), ("diff", torch.float32, 1)):
        own = {**config, "vocab_size": config["vocab_size"] + rows, "torch_dtype": str(dtype).removeprefix("torch.")}
        target = folder / name
        target.mkdir()
        (target / "config.json").write_text(json.dumps(own))
        (target / "tokenizer.json").write_text("{}")
        _write_weights(target, read_llama_config(target).shapes(), dtype, shards, kind)
        if sums:
            files = sorted(target.glob("*.safetensors"))
            (target / SUMS_FILE).write_text("".join(f"{file_sha256(file)}  {file.name}\n" for file in files))
    return folder / "base", folder / "diff"


def _write_weights(target: Path, shapes: dict, dtype: torch.dtype, shards: int, kind: str) -> None:
    names = list(shapes)
    groups = [names[len(names) * k // shards : len(names) * (k + 1) // shards] for k in range(shards)]
    ending, stem = (".safetensors", "model") if kind == "safetensors" else (".bin", "pytorch_model")
    files = [f"{stem}-{k:05d}-of-{shards:05d}{ending}" for k in range(1, shards + 1)] if shards > 1 else [stem + ending]
    # The numbers do not matter for time and memory: one random block, repeated.
    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    for file, group in zip(files, groups, strict=True):
        if kind == "bin":
            torch.save({name: _filled(shapes[name], noise) for name in group}, target / file)
            continue
        with open(target / file, "wb") as out:
            out.write(safetensors_header({name: shapes[name] for name in group}, dtype))
            for name in group:
                for start in range(0, torch.Size(shapes[name]).numel(), BLOCK):
                    out.write(as_bytes(noise[: torch.Size(shapes[name]).numel() - start]))
    if shards > 1:
        (target / f"{stem}{ending}.index.json").write_text(index_text(dict(zip(files, groups, strict=True)), 0))


def _filled(shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return noise.repeat(-(-count // noise.numel()))[:count].clone().view(shape)


if __name__ == "__main__":
    run_main(main)
