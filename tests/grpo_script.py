"""The GRPO script at a tiny size, as users run it: its command line, and whether two runs are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from alignment.records import read_json, read_jsonl, write_jsonl

REPO = Path(__file__).resolve().parents[1]
SCRIPT = "alignment/GRPO/train_grpo_alignment.py"
SMALL = {
    "num_generations": 4,
    "prompts_per_step": 2,
    "per_device_train_batch_size": 2,
    "max_steps": 6,
    "max_completion_length": 6,
    "temperature": 1.0,
    "learning_rate": 0.005,
    "beta": 0.1,
    "lambda_lr": 0.1,
    "lambda_pos_cost_only": "false",
    "eval_every": 2,
    "save_steps": 2,
    "scorer_batch_size": 64,
    "scorer_max_wait": 3,
    "seed": 7,
}


def write_prompts(folder: Path) -> Path:
    """The files that `command` names: five prompts to train on and five held out."""
    write_jsonl(folder / "train.jsonl", [{"prompt": f"question {i}?"} for i in range(5)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held out {i}"} for i in range(5)])
    return folder


def command(policy, url, prompts, run, *, processes=1, script=SCRIPT, **settings):
    flags = [text for name, value in (SMALL | settings).items() for text in (f"--{name}", str(value))]
    files = ["--train_jsonl", str(prompts / "train.jsonl"), "--eval_jsonl", str(prompts / "eval.jsonl")]
    where = ["--model_name", str(policy), "--scorer_url", url, "--output_dir", str(run)]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0"]
    return [sys.executable, *(launcher if processes > 1 else []), script, *where, *files, *flags]


def run_script(*arguments, environment=None, **settings):
    return subprocess.run(
        command(*arguments, **settings),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **(environment or {})},
    )


def same_run(a: Path, b: Path) -> bool:
    """Weights, metrics (with lambda and the prompts drawn) and held-out answers."""
    first, second = (load_file(run / "final" / "model.safetensors") for run in (a, b))
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in read_jsonl(run / "metrics.jsonl")]
        for run in (a, b)
    ]
    assert rows[0] == rows[1]
    assert read_json(a / "final/trainer_state.json") == read_json(b / "final/trainer_state.json")
    for path in (a / "eval").iterdir():
        assert path.read_bytes() == (b / "eval" / path.name).read_bytes()
    return True
