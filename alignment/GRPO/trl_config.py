"""The run's settings in TRL's and PEFT's words. Every value whose TRL default differs from the published run is set here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from trl import GRPOConfig

from alignment.errors import UserError
from alignment.GRPO.settings import GRPOSettings

if TYPE_CHECKING:
    from peft import LoraConfig

PROMPT_PADDING = 64  # tokens; with a static cache every other length of prompts is another compilation
SHORTEST_TIMEOUT = 1800  # seconds that processes wait for each other, PyTorch's default


def trl_config(settings: GRPOSettings, folder: Path) -> GRPOConfig:
    """Starts the process group, too, when a launcher has started several processes."""
    on_gpu = torch.cuda.is_available()
    static = on_gpu if settings.generation_cache == "auto" else settings.generation_cache == "static"
    static = static and not settings.use_vllm
    args = GRPOConfig(
        output_dir=str(folder / "checkpoints"),
        seed=settings.seed,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.accumulation(int(os.environ.get("WORLD_SIZE", 1))),
        num_generations=settings.num_generations,
        generation_batch_size=settings.prompts_per_step * settings.num_generations,
        num_iterations=1,
        shuffle_dataset=False,
        beta=settings.beta,
        loss_type=settings.loss_type,
        scale_rewards="group",
        use_bias_correction_kl=False,
        mask_truncated_completions=settings.mask_truncated_completions,
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        cache_implementation="static" if static else None,
        pad_to_multiple_of=PROMPT_PADDING if static else None,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=settings.warmup_steps,
        weight_decay=0.0,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=on_gpu if settings.gradient_checkpointing is None else settings.gradient_checkpointing,
        use_vllm=settings.use_vllm,
        vllm_mode=settings.vllm_mode,
        vllm_server_base_url=settings.vllm_server_base_url,
        vllm_gpu_memory_utilization=settings.vllm_gpu_memory_utilization,
        vllm_tensor_parallel_size=settings.vllm_tensor_parallel_size,
        vllm_max_model_length=settings.max_prompt_length + settings.max_completion_length,
        # Otherwise DDP lays its buckets anew after the first step, and a sum over three or more processes has another order
        # (and other last bits) in a run that goes on than in one that was never interrupted.
        ddp_find_unused_parameters=True,
        ddp_timeout=max(SHORTEST_TIMEOUT, int(settings.scorer_max_wait) + 600),  # the others wait for one that retries
        save_strategy="no",  # run.py saves
        eval_strategy="no",  # run.py evaluates
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    _check_sharding(args)
    if settings.dtype == "bfloat16" and not settings.lora_rank and args.deepspeed_plugin is None:
        raise UserError(
            "dtype is bfloat16, and all weights are trained: most steps of AdamW would be rounded away. Leave dtype out; where "
            "memory is short take lora_rank or DeepSpeed (accelerate_4gpu_zero2.yaml)"
        )
    return args


def adapter_config(settings: GRPOSettings) -> LoraConfig | None:
    """PEFT's LoraConfig, or None when all weights are trained."""
    if not settings.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # it is divided by r: any number
        lora_dropout=0.0,
        target_modules=list(settings.lora_targets),
        task_type="CAUSAL_LM",
    )


def weights_dtype(settings: GRPOSettings) -> str:
    """float32 for weights that are trained; bfloat16 for a base that LoRA leaves as it is, on a GPU."""
    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if settings.lora_rank and torch.cuda.is_available() else "float32"


def _check_sharding(args: GRPOConfig) -> None:
    """Raises UserError for what shards the weights: evaluation and saving read them whole on each process."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise UserError("DeepSpeed ZeRO-3 is not supported: use ZeRO-2 (accelerate_4gpu_zero2.yaml) or LoRA")
    if args.fsdp:
        raise UserError("FSDP is not supported: use DeepSpeed ZeRO-2 (accelerate_4gpu_zero2.yaml) or LoRA")
