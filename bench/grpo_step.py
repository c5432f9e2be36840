"""Completions a second of GRPO training on one GPU, a step's time split up, beside the published way in the same run.

    python bench/grpo_step.py                                    # 7B shapes, LoRA, random weights; about 10 minutes, 65 GiB
    python bench/grpo_step.py --completion_length 256 --warmup 1 --steps 2 --arms published ours --folder /dev/shm  # 5 minutes
    python bench/grpo_step.py --shape tiny --completion_length 16       # tries the code on a CPU
    python bench/grpo_step.py --arms published ours vllm                # vllm where it is installed

The policy is a Llama of the given shape with random weights (it ends an answer with probability 1 / 32000 a token, so all
answers are as long as they may be: the worst case) and LoRA adapters; the reward and the cost model are two more of that
shape, in this process. Every arm trains with the project's own trainer, settings and reward code:

    published    1 completion a pass, 15 passes and 15 completions a step, dynamic cache: one GPU's part of the published run
    same15       the same 15 completions a step in one pass, static compiled cache
    ours         2 prompts x 30 completions a step, 15 a pass, static compiled cache: the whole published step on one GPU
    vllm         as ours, sampled by colocated vLLM

Each arm has a process of its own: one that fails (no memory, an assertion on the GPU, gradients that are not finite) is told
in words, and the others are measured all the same.

Limits, from this GPU's measured copy bandwidth and matrix-multiplication speed: generating reads all weights and the cache
so far for every token; scoring is 2 FLOP, the reference pass 2 and training 6 (forward, recomputed forward, backward to the
activations; the frozen weights get no gradient) a weight and token. Prints a table and, as the last line, one JSON object;
exits with 1 when an arm failed.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_rates import copy_rate, device_name, product_rate, seconds_each, synchronise
from llama_shapes import llama
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from alignment.config import load_config, setting
from alignment.conversation import get_template
from alignment.demo.build import train_tokenizer
from alignment.demo.data import demo_data
from alignment.errors import UserError, run_main
from alignment.generation import TransformersEngine
from alignment.GRPO.data import run_order
from alignment.GRPO.reward import ConstrainedReward
from alignment.GRPO.settings import GRPOSettings
from alignment.GRPO.trainer import ConstrainedGRPOTrainer
from alignment.GRPO.trl_config import PROMPT_PADDING, adapter_config, trl_config
from alignment.lagrangian import LagrangeMultiplier
from alignment.scoring.batching import BatchScorer
from alignment.scoring.client import Scores
from alignment.scoring.score_model import ScoreModel

SHAPES = {  # hidden, MLP, layers, heads, vocabulary
    "7b": (4096, 11008, 32, 32, 32000),
    "1b": (2048, 5504, 22, 16, 32000),
    "tiny": (64, 128, 2, 2, 4000),
}
ARMS: dict[str, dict[str, Any]] = {
    "published": {
        "num_generations": 15,
        "prompts_per_step": 1,
        "per_device_train_batch_size": 1,
        "generation_cache": "dynamic",
    },
    "same15": {"num_generations": 15, "prompts_per_step": 1, "per_device_train_batch_size": 15},
    "ours": {"num_generations": 30, "prompts_per_step": 2, "per_device_train_batch_size": 15},
    "vllm": {"num_generations": 30, "prompts_per_step": 2, "per_device_train_batch_size": 15, "use_vllm": True},
}


@dataclass
class Settings:
    shape: str = setting("7b", "size of policy and score models", choices=tuple(SHAPES))
    arms: list[str] = setting(["published", "same15", "ours"], "what to measure: published, same15, ours, vllm")
    completion_length: int = setting(512, "tokens a completion", minimum=2)
    warmup: int = setting(2, "steps before those that count (compilation)", minimum=1)
    steps: int = setting(3, "steps that count", minimum=1)
    lora_rank: int = setting(16, "rank of the adapters", minimum=1)
    passes: int = setting(15, "completions a pass in our arms; lower it where memory is short", minimum=1)
    folder: str | None = setting(None, "where the policy's files go (13.5 GB for 7b); default: a temporary folder")


class RandomScorer:
    """Two score models of the policy's shape on its device, with the interface of LocalScorer.

    They read each prompt and `length` random tokens: most of what a random policy says is no text in the small vocabulary.
    """

    on_wait: Callable[[float], None] | None = None

    def __init__(
        self, config: LlamaConfig, engine: TransformersEngine, length: int, device: torch.device, dtype: torch.dtype
    ):
        self.engine, self.length, self.vocabulary, self.models = engine, length, config.vocab_size, []
        for kind in ("reward", "cost"):
            with torch.device(device):
                model = ScoreModel(LlamaConfig(**(config.to_dict() | {"score_type": kind})), dtype=dtype)
            self.models.append(BatchScorer(model.to(device).eval(), deterministic=False))
        self.tokens = 0

    def identity(self) -> dict:
        return {"reward_model": "random"}

    def score(self, prompts: list[str], responses: list[str], finished: list[bool] | None = None) -> Scores:
        random = np.random.default_rng(0)
        texts = [
            (
                *self.engine.template.encode_prompt(self.engine.tokenizer, prompt),
                *random.integers(3, self.vocabulary, self.length).tolist(),
            )
            for prompt in prompts
        ]
        self.tokens = sum(map(len, texts))
        rewards, costs = (np.array(model.score(texts).tolist()) for model in self.models)
        return Scores(rewards, costs, [None] * len(texts), [False] * len(texts))


class Watch(TrainerCallback):
    """Seconds of every step, and of its parts."""

    def __init__(self, trainer: ConstrainedGRPOTrainer):
        self.trainer = trainer
        self.rows: list[dict] = []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        synchronise()
        self.began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        synchronise()
        total = time.perf_counter() - self.began
        parts = dict(self.trainer.step_metrics["seconds"])
        self.rows.append(parts | {"train": total - sum(parts.values()), "total": total})


def main() -> int:
    settings = load_config(Settings, prog="grpo_step.py", description=__doc__)
    results = {}
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        name, limits = in_own_process(prepare, Path(folder), settings)
        print(
            f"{name}: {limits['bytes'] / 1e12:.2f} TB/s copied, {limits['flops'] / 1e12:.0f} TFLOP/s multiplied",
            flush=True,
        )
        for arm in settings.arms:
            try:
                results[arm] = in_own_process(measure_arm, arm, Path(folder), settings, limits)
                show(arm, results[arm])
            except Exception as error:  # whatever it is, the other arms are measured
                traceback.print_exception(error)
                results[arm] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
                print(f"{arm}: failed, {results[arm]['failed']}", flush=True)
    measured = {arm: result for arm, result in results.items() if "failed" not in result}
    for arm in measured:
        if "published" in measured and arm != "published":
            measured[arm]["ratio"] = measured[arm]["completions_per_s"] / measured["published"]["completions_per_s"]
            print(f"{arm}: {measured[arm]['ratio']:.2f} times the published way's completions a second")
    print(json.dumps({"device": name, **asdict(settings), "measured": limits, "arms": results}))
    return 0 if len(measured) == len(results) else 1


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns or raises; an assertion on the GPU ends CUDA for the process that meets it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def prepare(folder: Path, settings: Settings) -> tuple[str, dict]:
    """Saves a random policy and a tokenizer made from the demo's texts; returns the device's name and its limits."""
    device, dtype = here()
    limits = measure_limits(device, dtype)
    tokenizer = train_tokenizer(demo_data(0), 2400)
    config = llama(*SHAPES[settings.shape], pad_token_id=tokenizer.pad_token_id, dtype=dtype)
    check_fits(tokenizer, config, settings)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]
    disable_progress_bar()
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return device_name(), limits


def check_fits(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig, settings: Settings) -> None:
    """Raises UserError where an id would be outside the embedding or a position outside the model's context."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} ids, the policy only {config.vocab_size}")
    longest = max(len(get_template("pku").encode_prompt(tokenizer, text)) for text in train_prompts())
    padded = -(-longest // PROMPT_PADDING) * PROMPT_PADDING
    if padded + settings.completion_length > config.max_position_embeddings:
        raise UserError(
            f"completion_length {settings.completion_length} and prompts of up to {padded} tokens do not fit into the "
            f"policy's context of {config.max_position_embeddings}"
        )


def train_prompts() -> list[str]:
    return [row["prompt"] for row in demo_data(0).train_rows][:200]


def here() -> tuple[torch.device, torch.dtype]:
    """The device, and the dtype of the frozen weights on it."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def measure_arm(arm: str, folder: Path, settings: Settings, limits: dict) -> dict:
    """Trains a few steps one way; mean seconds of the parts and their limits, completions a second, peak memory."""
    device, dtype = here()
    changes = ARMS[arm] | ({} if arm == "published" else {"per_device_train_batch_size": settings.passes})
    grpo = GRPOSettings(
        model_name=str(folder),
        scorer_url="http://in.this.process",
        output_dir=str(folder / arm),
        max_steps=settings.warmup + settings.steps,
        max_completion_length=settings.completion_length,
        lora_rank=settings.lora_rank,
        vllm_gpu_memory_utilization=0.35,
        beta=0.01,
        **changes,
    )
    engine = TransformersEngine(folder, dtype=str(dtype).removeprefix("torch."))
    config = engine.model.config
    args = trl_config(grpo, folder / arm)
    scorer = RandomScorer(config, engine, settings.completion_length, device, dtype)
    trainer = ConstrainedGRPOTrainer(
        args,
        engine,
        scorer,
        ConstrainedReward(LagrangeMultiplier(), grpo.num_generations),
        run_order(train_prompts(), grpo.prompts_per_step, grpo.max_steps, 0),
        peft_config=adapter_config(grpo),
    )
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    counted = watch.rows[settings.warmup :]
    seconds = {name: float(np.mean([row[name] for row in counted])) for name in counted[0]}
    completions = grpo.prompts_per_step * grpo.num_generations
    result = {
        "completions_a_step": completions,
        "completions_per_s": completions / seconds["total"],
        "seconds": seconds,
        "steps": [row["total"] for row in watch.rows],
        "tokens_a_step": trainer.step_metrics["tokens"],
        "scored_tokens": scorer.tokens,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }
    return result | {"limits": step_limits(config, result, limits)}


def step_limits(config: LlamaConfig, result: dict, limits: dict) -> dict:
    """Seconds that the parts of a step need at least on this device."""
    per_layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * per_layer + config.vocab_size * config.hidden_size  # without the embedding
    width = 2 if limits["dtype"] == "bfloat16" else 4
    length = result["tokens_a_step"] / result["completions_a_step"]
    context = result["scored_tokens"] / result["completions_a_step"] - length  # the prompt's tokens
    cache = 2 * config.num_hidden_layers * config.hidden_size * width * (context + length / 2)  # bytes a row, half-way
    read = length * (weights * width + result["completions_a_step"] * cache)
    forward = 2 * weights * result["scored_tokens"]
    return {
        "generate": read / limits["bytes"],
        "score": 2 * forward / limits["flops"],
        "reference": forward / limits["flops"],
        "train": 3 * forward / limits["flops"],
    }


def measure_limits(device: torch.device, dtype: torch.dtype) -> dict:
    """Bytes a second read and written by a copy, FLOP a second of a matrix multiplication."""
    big = device.type == "cuda"
    size = 8192 if big else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    return {
        "bytes": copy_rate(2**30 if big else 2**25, device, fastest),
        "flops": product_rate(a, a, fastest),
        "dtype": str(dtype).removeprefix("torch."),
    }


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ten runs."""
    return min(seconds_each(work, 10))


def show(arm: str, result: dict) -> None:
    seconds, limits = result["seconds"], result["limits"]
    peak = "" if result["peak_gib"] is None else f", peak {result['peak_gib']:.0f} GiB"
    print(f"{arm}: {result['completions_per_s']:.2f} completions/s, {result['completions_a_step']} a step{peak}")
    for part in ("generate", "score", "reference", "train"):
        share = 100 * seconds[part] / seconds["total"]
        print(f"  {part:10} {seconds[part]:8.2f} s  {share:3.0f} %   limit {limits[part]:.2f} s")
    print(
        f"  {'total':10} {seconds['total']:8.2f} s         of steps {[round(one, 1) for one in result['steps']]}",
        flush=True,
    )


if __name__ == "__main__":
    run_main(main)
