"""GRPO on several processes of one machine: is lambda equal on all of them, and does a run that died go on as it was?

    python bench/grpo_ranks.py --config_file alignment/GRPO/accelerate_4gpu_zero2.yaml --processes 4 --folder /dev/shm/ranks
    python bench/grpo_ranks.py --config_file alignment/GRPO/accelerate_4gpu_ddp.yaml --processes 2 --lora_rank 16
    python bench/grpo_ranks.py --shape tiny --completion_length 8        # two gloo processes on a CPU, without DeepSpeed

The project's trainer with its own Accelerate files, a policy of random weights, and scores that depend on the texts alone. Two
launches: the first saves after step 3 and dies after step 5, before it has saved again; the second goes on from step 3.
Every process writes lambda after each step and a checksum of its weights after the last. Prints what was equal, the seconds
of a step's parts and, as the last line, one JSON object; exits with 1 when processes differ among themselves. (Whether
the second launch repeats steps 4 and 5 to the last bit depends on the attention kernels' backward pass on a GPU.)

At 7b with ZeRO-2 a checkpoint is 107 GB; the second launch drops the first's once it is loaded, so 150 GB in FOLDER are enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpo_step
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.generation import TransformersEngine
from alignment.GRPO.checkpoints import newest_checkpoint, step_of
from alignment.GRPO.data import run_order
from alignment.GRPO.reward import ConstrainedReward
from alignment.GRPO.run import Run
from alignment.GRPO.settings import GRPOSettings
from alignment.GRPO.trainer import ConstrainedGRPOTrainer
from alignment.GRPO.trl_config import adapter_config, trl_config, weights_dtype
from alignment.lagrangian import LagrangeMultiplier
from alignment.records import read_jsonl
from alignment.runs import StopSignal
from alignment.scoring.client import Scores

STEPS, SAVED = 5, 3


@dataclass
class Settings:
    shape: str = setting("7b", "size of the policy", choices=tuple(grpo_step.SHAPES))
    config_file: str = setting("torchrun", "Accelerate's file; torchrun: a process group without one, on CPUs too")
    processes: int = setting(2, "processes, one a GPU", minimum=1)
    completion_length: int = setting(128, "tokens a completion", minimum=2)
    passes: int = setting(15, "completions a pass", minimum=1)
    lora_rank: int = setting(0, "rank of LoRA adapters; 0 trains all weights", minimum=0)
    scorer_rate: float = setting(0.0, "pairs a second of the one scorer of all processes; 0: no time", minimum=0.0)
    folder: str | None = setting(None, "where the policy and the run go, kept; default: a temporary folder")
    worker: bool = setting(False, "set by the script itself: this is one of the processes")


class TextScorer:
    """A reward and a cost in -2..2 from each text's hash, at the speed of one scorer that all processes share."""

    on_wait: Callable[[float], None] | None = None

    def __init__(self, rate: float, processes: int):
        self.seconds_a_pair = processes / rate if rate else 0.0

    def identity(self) -> dict:
        return {"reward_model": "hash of the text"}

    def score(self, prompts: list[str], responses: list[str], finished: list[bool] | None = None) -> Scores:
        digests = [hashlib.sha256(f"{p}\0{r}".encode()).digest() for p, r in zip(prompts, responses, strict=True)]
        rewards, costs = torch.tensor([[d[0], d[1]] for d in digests]).double().div(63.75).sub(2).numpy().T
        time.sleep(len(prompts) * self.seconds_a_pair)
        return Scores(rewards, costs, [None] * len(prompts), [False] * len(prompts))


class Died(Exception):
    """The first launch ends here, as if killed: nothing of its last steps is saved."""


class Record(TrainerCallback):
    """One process's file: lambda after each step, the weights' checksum and the peak memory after the last."""

    def __init__(self, trainer: ConstrainedGRPOTrainer, path: Path, resumed: Path | None):
        self.trainer, self.path, self.resumed = trainer, path, resumed
        self.rows: list[dict] = []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.resumed and not self.rows:
            self.trainer.accelerator.wait_for_everyone()  # all have loaded it: room for the next one
            if self.trainer.accelerator.is_main_process:
                shutil.rmtree(self.resumed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        row = {"step": state.global_step, "lambda": self.trainer.constraint.multiplier.value.hex()}
        if state.global_step == STEPS:
            assert self.trainer.model is not None
            row["weights"] = checksum(self.trainer.model)
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        self.rows.append(row | {"seconds": self.trainer.step_metrics["seconds"]})
        self.path.write_text("".join(json.dumps(one) + "\n" for one in self.rows))
        if state.global_step == STEPS and not self.resumed:
            raise Died


def checksum(model: torch.nn.Module) -> str:
    """Of every bit of the weights, computed where they are."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        bits = weight.detach().flatten().view(torch.int16 if weight.element_size() == 2 else torch.int32).long()
        places = torch.arange(len(bits), device=bits.device) % 1_000_003 + 1
        digest.update(f"{name} {int((bits * places).sum())}".encode())
    return digest.hexdigest()


def worker(settings: Settings) -> None:
    assert settings.folder is not None
    folder = Path(settings.folder)
    run = folder / "run"
    grpo = GRPOSettings(
        model_name=str(folder / "policy"),
        scorer_url="http://in.this.process",
        output_dir=str(run),
        max_steps=STEPS,
        save_steps=SAVED,
        eval_every=1000,
        max_completion_length=settings.completion_length,
        per_device_train_batch_size=settings.passes,
        lora_rank=settings.lora_rank,
        lambda_lr=0.1,
        lambda_pos_cost_only=False,
        # DeepSpeed makes its own float32 master of the weights.
        dtype="bfloat16"
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and torch.cuda.is_available()
        else "auto",
    )
    args = trl_config(grpo, run)
    prompts = grpo_step.train_prompts()
    trainer = ConstrainedGRPOTrainer(
        args,
        TransformersEngine(folder / "policy", dtype=weights_dtype(grpo)),
        TextScorer(settings.scorer_rate, args.world_size),
        ConstrainedReward(LagrangeMultiplier.from_settings(grpo), grpo.num_generations),
        run_order(prompts, grpo.prompts_per_step, STEPS, grpo.seed),
        peft_config=adapter_config(grpo),
    )
    rank = trainer.accelerator.process_index
    trainer.add_callback(Record(trainer, folder / f"rank_{rank}.jsonl", newest_checkpoint(run)))
    trainer.accelerator.wait_for_everyone()  # all have seen which checkpoint is there
    with StopSignal() as stop, contextlib.suppress(Died):
        Run(grpo, trainer, prompts[:4], run, stop).train()
    trainer.accelerator.end_training()


def main() -> int:
    settings = load_config(Settings, prog="grpo_ranks.py", description=__doc__)
    if settings.worker:
        worker(settings)
        return 0
    if settings.folder:
        return measure(settings)
    with tempfile.TemporaryDirectory() as folder:
        settings.folder = folder
        return measure(settings)


def measure(settings: Settings) -> int:
    assert settings.folder is not None
    folder = Path(settings.folder)
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "policy").mkdir(parents=True, exist_ok=True)
    shape = grpo_step.Settings(shape=settings.shape, completion_length=settings.completion_length)
    device, _ = grpo_step.in_own_process(grpo_step.prepare, folder / "policy", shape)
    whole = launch(settings, folder)
    saved = step_of(newest_checkpoint(folder / "run"))
    resumed = launch(settings, folder)
    last_step = [row for row in read_jsonl(folder / "run" / "metrics.jsonl") if row["kind"] == "train"][-1]
    result = {
        "device": device,
        **asdict(settings),
        "lambda_equal_on_all_processes": alike(whole, "lambda") and alike(resumed, "lambda"),
        "weights_equal_on_all_processes": alike(whole, "weights") and alike(resumed, "weights"),
        "saved_after_step": saved,
        "steps_resumed": [row["step"] for row in resumed[0]],
        "resumed_lambda_as_before": [row["lambda"] for row in resumed[0]]
        == [row["lambda"] for row in whole[0][saved:]],
        "resumed_weights_as_before": resumed[0][-1]["weights"] == whole[0][-1]["weights"],
        "lambda": [float.fromhex(row["lambda"]) for row in whole[0]],
        "peak_gib": [rows[-1]["peak_gib"] for rows in whole],
        "seconds": last_step["seconds"],
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    print(json.dumps(result))
    return 0 if result["lambda_equal_on_all_processes"] and result["weights_equal_on_all_processes"] else 1


def alike(ranks: list[list[dict]], key: str) -> bool:
    return all([row.get(key) for row in rows] == [row.get(key) for row in ranks[0]] for rows in ranks)


def launch(settings: Settings, folder: Path) -> list[list[dict]]:
    """Every process's rows. Raises UserError when the launch fails."""
    count = str(settings.processes)
    if settings.config_file == "torchrun":
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", count]
    else:
        launcher = ["accelerate.commands.launch", "--config_file", settings.config_file, "--num_processes", count]
    flags = [f"--{name}={value}" for name, value in asdict(settings).items() if name != "worker"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *launcher, __file__, *flags, "--worker"])
    print(f"launch of {time.perf_counter() - began:.0f} s, exit code {done.returncode}", flush=True)
    if done.returncode:
        raise UserError(f"the launch on {count} processes failed with exit code {done.returncode}; its words are above")
    files = [folder / f"rank_{rank}.jsonl" for rank in range(settings.processes)]
    rows = [read_jsonl(file) for file in files]
    for file in files:
        file.unlink()
    return rows


if __name__ == "__main__":
    run_main(main)
