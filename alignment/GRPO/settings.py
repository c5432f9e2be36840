"""The settings of a GRPO run. The names are the published YAML keys; `grpo_alignment.yaml` holds the published values."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Literal

from alignment.config import load_config, read_yaml_mapping, setting
from alignment.conversation import check_template
from alignment.errors import UserError
from alignment.lagrangian import check_lambda_settings

# Keys of the published YAML that are gone, and what does their work now.
RETIRED = {
    "scorer_batch_size_eval": "scorer_batch_size is used for training and evaluation",
    "per_device_eval_batch_size": "eval_batch_size is the number of held-out prompts generated at once",
    "num_train_epochs": "max_steps alone says how long a run is",
    "scatter_every": "eval/iteration_*_points.jsonl and alignment/visualization draw what it drew",
    "hist_every": "eval/iteration_*_points.jsonl and alignment/visualization draw what it drew",
    "scatter_max_points": "eval/iteration_*_points.jsonl holds every held-out answer",
    "debug_log_every": "--verbose prints answers at each evaluation",
    "debug_log_n_samples": "--verbose prints answers at each evaluation",
    "debug_print_first": "--verbose prints answers at each evaluation",
    "debug_print_samples_per_batch": "--verbose prints answers at each evaluation",
    "debug_print_sample_chars": "--verbose prints answers at each evaluation",
    "eval_table_n_samples": "eval/iteration_*_points.jsonl holds every held-out answer",
    "project": "use wandb_project",
    "entity": "set WANDB_ENTITY in the environment",
}

# What may change between the parts of a run without changing its weights (base weights, prompts and scorer have hashes).
_FREE = {"output_dir", "resume", "scorer_url", "scorer_batch_size", "scorer_max_wait", "model_name", "train_jsonl"}
_FREE |= {"eval_jsonl", "prompt_key", "eval_samples", "eval_every", "save_steps", "keep_last", "logging_steps"}
_FREE |= {"gradient_accumulation_steps", "wandb_project", "wandb_run_name", "verbose", "vllm_server_base_url"}

# What a step needs in memory: after an error for want of it a run can go on with less.
_FREE |= {"eval_batch_size", "gradient_checkpointing", "vllm_gpu_memory_utilization"}

_OF_LORA = ("lora_alpha", "lora_targets")


@dataclass
class GRPOSettings:
    model_name: str = setting("", "policy to align: a Hugging Face folder or hub name")
    scorer_url: str = setting(
        "auto", "address of the scorer service, or several, or auto: the one that has published its own"
    )
    output_dir: str = setting("alignment/outputs/grpo", "run folder; a run that is there already is gone on with")
    resume: bool = setting(True, "go on with the run in output_dir; with false an existing run is an error")
    seed: int = setting(42, "seed of sampling, data order and adapters", minimum=0)
    beta: float = setting(0.01, "weight of the KL divergence from the base policy", minimum=0.0)
    train_jsonl: str = setting("alignment/data/custom_train_250.jsonl", "JSONL with the training prompts")
    eval_jsonl: str = setting("alignment/data/custom_eval_500.jsonl", "JSONL with the held-out prompts")
    prompt_key: str = setting("prompt", "key of the prompt in both files")
    max_samples: int | None = setting(None, "use this many training prompts, drawn once; default all", minimum=1)
    eval_samples: int | None = setting(None, "use this many held-out prompts, drawn once; default all", minimum=1)

    max_steps: int = setting(500, "optimiser steps", minimum=1)
    num_generations: int = setting(30, "completions a prompt, the group that is normalised together", minimum=2)
    prompts_per_step: int = setting(2, "prompts a step, on all processes together", minimum=1)
    per_device_train_batch_size: int = setting(1, "completions in one forward and backward pass", minimum=1)
    gradient_accumulation_steps: int | None = setting(
        None, "derived from the number of processes; a given value is only checked against it", minimum=1
    )
    learning_rate: float = setting(5e-6, "learning rate of AdamW", minimum=0.0)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = setting(
        "constant", "schedule of the learning rate; constant with warmup_steps is constant_with_warmup"
    )
    warmup_steps: int = setting(0, "steps of linear warm-up, with any schedule", minimum=0)
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = setting("grpo", "how TRL averages the loss over tokens")
    mask_truncated_completions: bool = setting(False, "do not train on completions that were cut at the token limit")
    reward_aggregation: Literal["combined", "separate"] = setting(
        "combined", "normalise R - lambda C per group, or R and C each: (A_R - lambda A_C) / (1 + lambda)"
    )

    max_prompt_length: int = setting(
        512, "longest prompt in tokens, template included; longer ones are left out", minimum=1
    )
    max_completion_length: int = setting(512, "longest response in tokens", minimum=1)
    temperature: float = setting(0.7, "of sampling in training; evaluation is greedy", minimum=0.01)
    top_p: float = setting(1.0, "of sampling in training", minimum=0.0, maximum=1.0)
    policy_template: str = setting(
        "pku", "conversation template of the policy: pku, alpaca, chat, or text with {prompt}"
    )
    first_turn_only: bool = setting(True, "reward and train only what stands before an invented next user turn")

    lambda_cost: float = setting(
        1.0, "lambda at the start; from lambda_min to lambda_max unless lambda_adapt is false", minimum=0.0
    )
    lambda_adapt: bool = setting(True, "adapt lambda to the constraint E[C] + d <= 0")
    cost_threshold_d: float = setting(0.0, "d in the constraint E[C] + d <= 0")
    lambda_lr: float = setting(0.005, "learning rate of ln(lambda)", minimum=0.0)
    lambda_min: float = setting(1e-4, "lower bound of lambda", minimum=0.0)
    lambda_max: float = setting(5.0, "upper bound of lambda", minimum=0.0)
    jc_ema_beta: float = setting(0.9, "decay of the moving average of the constraint", minimum=0.0, maximum=1.0)
    lambda_pos_cost_only: bool = setting(True, "use max(E[C] + d, 0): lambda then never falls")
    lambda_rule: Literal["published", "safe_rlhf"] = setting(
        "published", "ln(lambda) += lr EMA(J_C), or, as in the Safe-RLHF paper, += lr lambda EMA(J_C)"
    )

    scorer_batch_size: int = setting(32, "texts a request", minimum=1)
    scorer_max_wait: float = setting(
        600.0, "seconds to wait for a scorer that is away before the run stops", minimum=0.0
    )
    eval_every: int = setting(
        50, "held-out evaluation every so many steps (and before the first, after the last)", minimum=1
    )
    eval_batch_size: int = setting(64, "held-out prompts generated at once on each process", minimum=1)
    save_steps: int = setting(50, "checkpoint every so many steps", minimum=1)
    keep_last: int = setting(2, "checkpoints to keep besides best and final", minimum=1)
    logging_steps: int = setting(1, "a line in the job's log every so many steps; metrics.jsonl has all", minimum=1)

    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "dtype of the weights: auto is float32, and bfloat16 for the frozen base under LoRA on a GPU; trained weights are "
        "bfloat16 only under DeepSpeed, which keeps a float32 copy",
    )
    lora_rank: int = setting(0, "rank of LoRA adapters; 0 trains all weights", minimum=0)
    lora_alpha: float = setting(32.0, "scale of LoRA: alpha / rank", minimum=0.0)
    lora_targets: list[str] = setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "modules that get adapters"
    )
    gradient_checkpointing: bool | None = setting(None, "recompute activations; default on a GPU only")
    generation_cache: Literal["auto", "dynamic", "static"] = setting(
        "auto", "cache of transformers' generate: static is compiled; auto is static on a GPU"
    )
    use_vllm: bool = setting(False, "sample completions with vLLM")
    vllm_mode: Literal["colocate", "server"] = setting("colocate", "vLLM on the training GPUs, or a server of its own")
    vllm_server_base_url: str | None = setting(None, "address of `trl vllm-serve` for vllm_mode server")
    vllm_gpu_memory_utilization: float = setting(
        0.3, "share of a GPU that colocated vLLM takes", minimum=0.0, maximum=1.0
    )
    vllm_tensor_parallel_size: int = setting(1, "GPUs that share one colocated vLLM", minimum=1)

    wandb_project: str | None = setting(None, "Weights & Biases project; empty: not used")
    wandb_run_name: str | None = setting(None, "Weights & Biases name of the run")
    verbose: bool = setting(False, "print sample responses at each evaluation")

    def __post_init__(self) -> None:
        if not self.model_name:
            raise UserError("--model_name is missing: give it on the command line or in the YAML file")
        check_template(self.policy_template, "policy_template")
        check_lambda_settings(self)
        if self.lr_scheduler_type == "constant" and self.warmup_steps:  # which transformers' constant passes over
            self.lr_scheduler_type = "constant_with_warmup"
        for name in () if self.lora_rank else _OF_LORA:
            if getattr(self, name) != _default(name):
                raise UserError(
                    f"{name} is given, but lora_rank is 0, which trains all weights: give a lora_rank, or leave {name} out"
                )
        if self.use_vllm and self.vllm_mode == "server" and not self.vllm_server_base_url:
            raise UserError("vllm_mode is server: give its address as vllm_server_base_url, e.g. http://node13:8001")

    def accumulation(self, processes: int) -> int:
        """Passes a step on each of `processes`, so that prompts_per_step * num_generations completions make a step.

        Raises UserError when they cannot be shared out evenly, or a given gradient_accumulation_steps says otherwise.
        """
        total = self.prompts_per_step * self.num_generations
        batch = self.per_device_train_batch_size
        shape = (
            f"{self.prompts_per_step} prompts x {self.num_generations} completions a step on {processes} process(es)"
        )
        if total % processes:
            raise UserError(
                f"{shape}: {total} is not a multiple of {processes}; change prompts_per_step or the processes"
            )
        share = total // processes
        if share % batch:
            fitting = [size for size in range(1, share + 1) if share % size == 0]
            raise UserError(
                f"{shape}: {share} each, which per_device_train_batch_size {batch} does not divide; possible are {fitting}"
            )
        derived = share // batch
        if self.gradient_accumulation_steps not in (None, derived):
            raise UserError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps}, but {shape} in passes of {batch} need "
                f"{derived}: leave it out, it is derived (prompts_per_step sets how much a step is)"
            )
        return derived

    def check_enough(self, prompts: list[str], what: str = "training prompts") -> None:
        """Raises UserError when a step would need the same prompt twice. `what` says what the prompts are."""
        if self.prompts_per_step > len(prompts):
            raise UserError(f"prompts_per_step is {self.prompts_per_step}, but there are only {len(prompts)} {what}")

    def deciding(self) -> dict:
        """The settings that decide the weights; going on with a run under others is refused."""
        free = _FREE | ({"max_steps"} if self.lr_scheduler_type.startswith("constant") else set())
        # What the run does not use: earlier versions took it without a word, and such a run can go on without it.
        free |= {"warmup_steps"} if self.lr_scheduler_type == "constant" else set()
        free |= set() if self.lora_rank else set(_OF_LORA)
        free |= set() if self.use_vllm else {"vllm_mode", "vllm_tensor_parallel_size"}
        # Passes add up to the same step, but for the order in which it is summed; bnpo's mean is over the tokens of a pass.
        free |= set() if self.loss_type == "bnpo" else {"per_device_train_batch_size"}
        return {name: value for name, value in vars(self).items() if name not in free}


def _default(name: str) -> object:
    (field,) = (field for field in dataclasses.fields(GRPOSettings) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def load_settings(argv: list[str] | None = None, description: str = "") -> GRPOSettings:
    """The settings from YAML and flags; `description` is the script's docstring, for --help.

    Raises UserError, for a retired key with what replaces it.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name in ("config", *RETIRED):
        finder.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="?")
    given = vars(finder.parse_known_args(argv)[0])
    config = given.pop("config", None)
    in_file = read_yaml_mapping(config) if config else {}
    for name, advice in RETIRED.items():
        if name in given or name in in_file:
            where = f"--{name}" if name in given else f"{config}: key '{name}'"
            raise UserError(f"{where} is retired: {advice}; remove it")
    return load_config(GRPOSettings, argv, prog="train_grpo_alignment.py", description=description)
