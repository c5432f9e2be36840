"""The settings of an ES run. The names are the published flags; `es_alignment.yaml` holds the published values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from alignment.config import setting
from alignment.conversation import check_template
from alignment.errors import UserError
from alignment.lagrangian import check_lambda_settings

# What may change between the parts of a run without changing its weights (base weights, prompts and scorer have hashes).
_FREE = {"experiment_dir", "resume", "scorer_url", "scorer_batch_size", "scorer_max_wait", "policy_model_path"}
_FREE |= {
    "train_jsonl",
    "eval_jsonl",
    "eval_samples",
    "prompt_key",
    "num_iterations",
    "eval_every",
    "save_every",
    "keep_last",
}
_FREE |= {"num_engines", "cuda_devices", "master_device", "wandb_project", "wandb_run_name", "verbose"}

_LOW_RANK = {"perturbation", "rank", "members_at_once"}
_VLLM = {"engine", "max_num_seqs"}


@dataclass
class ESSettings:
    policy_model_path: str = setting("", "policy to align: a Hugging Face folder or hub name")
    scorer_url: str = setting("auto", "address of the scorer service, e.g. http://node12:8000; auto: its address file")
    experiment_dir: str = setting("alignment/outputs/es", "run folder; a run that is there already is gone on with")
    resume: bool = setting(True, "go on with the run in experiment_dir; with false an existing run is an error")
    train_jsonl: str = setting("alignment/data/custom_train_250.jsonl", "JSONL with the training prompts")
    eval_jsonl: str = setting("alignment/data/custom_eval_500.jsonl", "JSONL with the held-out prompts")
    prompt_key: str = setting("prompt", "key of the prompt in both files")
    train_samples: int | None = setting(None, "use this many training prompts, drawn once; default all", minimum=1)
    eval_samples: int | None = setting(None, "use this many held-out prompts, drawn once; default all", minimum=1)

    num_iterations: int = setting(500, "ES steps", minimum=1)
    population_size: int = setting(30, "members a step", minimum=2)
    sigma: float = setting(0.001, "standard deviation of the weights' perturbation", minimum=0.0)
    alpha: float = setting(0.0005, "step size: theta += alpha / N * sum z_i eps_i", minimum=0.0)
    batch_size: int = setting(64, "prompts a step, the same for all members", minimum=1)
    global_seed: int = setting(42, "seed of noise and data order", minimum=0)
    fitness_shaping: Literal["z_score", "centered_rank"] = setting(
        "z_score", "how fitnesses become weights of the step"
    )
    antithetic: bool = setting(False, "members in pairs theta +- sigma eps; population_size counts both")
    noise: Literal["independent", "reference"] = setting(
        "independent", "reference: the published noise, one seed restarted for every parameter, in place"
    )
    trainable: str | None = setting(None, "regular expression: only parameters whose name it finds are searched")
    lora_rank: int | None = setting(None, "search the weights of LoRA adapters of this rank only", minimum=1)
    perturbation: Literal["full_rank", "low_rank"] = setting(
        "full_rank",
        "low_rank: members differ by a low-rank matrix a linear layer and are generated in one batch (EGGROLL)",
    )
    rank: int = setting(1, "rank of a member's matrices with perturbation: low_rank", minimum=1)
    members_at_once: int | None = setting(
        None,
        "low_rank: members generated together; default: what suits the engine. It decides how a run is dealt out: "
        "with n processes there should be n groups of members or more",
        minimum=1,
    )
    shuffle_fitness: bool = setting(False, "control: hand the fitnesses to the wrong members; nothing should be learnt")

    max_new_tokens: int = setting(512, "longest response in tokens", minimum=1)
    policy_template: str = setting(
        "pku", "conversation template of the policy: pku, alpaca, chat, or text with {prompt}"
    )
    first_turn_only: bool = setting(True, "cut responses where the model begins the user's next turn")
    engine: Literal["transformers", "vllm"] = setting("transformers", "what generates; vllm: GPU clusters")
    generation_batch_size: int = setting(64, "transformers: prompts generated at once", minimum=1)
    max_num_seqs: int | None = setting(None, "vllm: prompts generated at once, default 384", minimum=1)
    scorer_batch_size: int = setting(32, "texts a request", minimum=1)
    scorer_max_wait: float = setting(
        600.0, "seconds to wait for a scorer that is away before the run stops", minimum=0.0
    )

    lambda_cost: float = setting(
        1.0, "lambda at the start; from lambda_min to lambda_max unless lambda_adapt is false", minimum=0.0
    )
    lambda_adapt: bool = setting(True, "adapt lambda to the constraint E[C] + d <= 0")
    lambda_lr: float = setting(0.005, "learning rate of ln(lambda)", minimum=0.0)
    lambda_min: float = setting(1e-4, "lower bound of lambda", minimum=0.0)
    lambda_max: float = setting(5.0, "upper bound of lambda", minimum=0.0)
    lambda_pos_cost_only: bool = setting(True, "use max(E[C] + d, 0): lambda then never falls")
    jc_ema_beta: float = setting(0.9, "decay of the moving average of the constraint", minimum=0.0, maximum=1.0)
    cost_threshold_d: float = setting(0.0, "d in the constraint E[C] + d <= 0")
    lambda_rule: Literal["published", "safe_rlhf"] = setting(
        "published", "ln(lambda) += lr EMA(J_C), or, as in the Safe-RLHF paper, += lr lambda EMA(J_C)"
    )

    standardize_within_batch: bool = setting(False, "divide rewards and costs by their standard deviation")
    standardize: Literal["population", "reference"] = setting(
        "population", "whose deviation: of all members together, or each member's own as published"
    )
    safe_first: bool = setting(False, "multiply the reward of unsafe responses (cost > 0) by safe_first_factor")
    safe_first_factor: float = setting(0.0, "factor for safe_first", minimum=0.0)

    eval_every: int = setting(
        50, "held-out evaluation every so many steps (and before the first, after the last)", minimum=1
    )
    save_every: int = setting(50, "checkpoint every so many steps", minimum=1)
    keep_last: int = setting(2, "checkpoints to keep besides best and final", minimum=1)
    num_engines: int | None = setting(
        None, "processes to start, each with a policy; default: as launched, or 1", minimum=1
    )
    cuda_devices: str | None = setting(None, "GPUs to use as CUDA_VISIBLE_DEVICES, unless the scheduler has set it")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", "dtype the policy generates in")
    master_device: Literal["auto", "cpu"] = setting(
        "auto", "where the float32 master lies: with the policy, or on the CPU"
    )
    wandb_project: str | None = setting(None, "Weights & Biases project; empty: not used")
    wandb_run_name: str | None = setting(None, "Weights & Biases name of the run")
    verbose: bool = setting(False, "print every member and sample responses at each evaluation")

    def __post_init__(self) -> None:
        if not self.policy_model_path:
            raise UserError("--policy_model_path is missing: give it on the command line or in the YAML file")
        check_template(self.policy_template, "policy_template")
        check_lambda_settings(self)
        if self.sigma == 0:
            raise UserError("sigma is 0: all members would be the same; the published value is 0.001")
        if self.antithetic and self.population_size % 2:
            raise UserError(f"antithetic needs an even population_size, got {self.population_size}")
        if self.trainable is not None and self.lora_rank is not None:
            raise UserError("trainable and lora_rank: give one of them")
        if self.perturbation == "low_rank" and (self.lora_rank is not None or self.noise == "reference"):
            other = "lora_rank" if self.lora_rank is not None else "noise: reference"
            raise UserError(f"perturbation: low_rank and {other}: give one of them")
        if self.perturbation == "full_rank" and (self.rank != 1 or self.members_at_once is not None):
            raise UserError("rank and members_at_once belong to perturbation: low_rank; give that as well")
        if self.standardize == "reference" and not self.standardize_within_batch:
            raise UserError("standardize: reference belongs to standardize_within_batch; give that as well")
        if self.safe_first_factor != 0.0 and not self.safe_first:
            raise UserError("safe_first_factor belongs to safe_first; give that as well")
        if self.engine == "vllm" and self.lora_rank is not None:
            raise UserError("engine: vllm does not search LoRA adapters (lora_rank); use engine: transformers")
        if self.engine != "vllm" and self.max_num_seqs is not None:
            raise UserError("max_num_seqs belongs to engine: vllm; with transformers it is generation_batch_size")
        if self.trainable is not None:
            try:
                re.compile(self.trainable)
            except re.error as error:
                raise UserError(f"trainable: {self.trainable!r} is not a regular expression: {error}") from error

    def deciding(self) -> dict:
        """The settings that decide the weights; the journal holds them, and going on with others is refused."""
        free = _FREE | (set() if self.perturbation == "low_rank" else _LOW_RANK)
        free |= {"generation_batch_size"} if self.engine == "vllm" else _VLLM
        return {name: value for name, value in vars(self).items() if name not in free}
