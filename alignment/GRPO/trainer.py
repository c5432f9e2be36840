"""TRL's GRPOTrainer with the constraint in it. What is not here is TRL's own.

One step, on all processes together:

    every process samples its share of prompts_per_step * num_generations completions
    each completion is reduced to the policy's own first turn                                       turns.py
    R and C come from the scorer, prompt and response as two fields; every process gets all of them
    lambda <- its update from all costs; advantages from R, C and lambda                            reward.py
    TRL's policy gradient step, with the KL divergence from the base policy at weight beta

Where this departs from the published script: lambda is one number for all processes and moves once a step (published: one a
process and reward call); a failed scorer stops the run (published: zeros); turns that the model invents for the user are
neither rewarded nor trained on; what cannot be scored, or is all equal within its group, leaves the weights alone.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

from alignment.errors import UserError
from alignment.generation import TransformersEngine
from alignment.GRPO.ranks import failing_together, folder_of_all
from alignment.GRPO.reward import ConstrainedReward
from alignment.GRPO.turns import own_turn
from alignment.pretrained import load_whole
from alignment.records import write_json
from alignment.scoring.scores import WaitingScorer

if TYPE_CHECKING:
    from peft import PeftConfig

# It would print prompt and completion of every text that the scorer could not score.
logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)


class BrokenStep(UserError):
    """A step that must not be saved."""


class ConstrainedGRPOTrainer(GRPOTrainer):
    """The rows of `train_dataset` are `data.run_order`'s.

    `phase(text)` is told what the trainer does now. After each step `step_metrics` is that step's row.
    """

    def __init__(
        self,
        args: GRPOConfig,
        engine: TransformersEngine,
        scorer: WaitingScorer,
        constraint: ConstrainedReward,
        train_dataset: Dataset,
        *,
        peft_config: PeftConfig | None = None,
        phase: Callable[[str], None] = lambda text: None,
    ):
        self.engine, self.scorer, self.constraint, self.phase = engine, scorer, constraint, phase
        self._scores: tuple[list, list] = ([], [])
        self._saving_in: Path | None = None
        self._pass: dict[str, torch.Tensor] = {}  # what a pass learns from
        # Sums over the tokens that this process has sampled for the step: of KL divergence, of entropy, and their number.
        self._sums = torch.zeros(3, dtype=torch.float64)
        self.step_metrics: dict = {}

        def reward(**_: Any) -> list:
            return self._scores[0]

        def cost(**_: Any) -> list:
            return self._scores[1]

        super().__init__(
            model=engine.model,
            reward_funcs=[reward, cost],
            args=args,
            train_dataset=train_dataset,
            processing_class=engine.tokenizer,
            peft_config=peft_config,
        )
        self.remove_callback(PrinterCallback)  # metrics.jsonl has what it would print
        self.add_callback(_SkipEmptySteps(self))
        engine.model, engine.device = self.model, self.accelerator.device
        if args.cache_implementation == "static":
            # TRL forbids compiling; with a cache of one shape it is what makes generation fast.
            self.generation_config.disable_compile = False
        # On Hopper, torch >= 2.11 prefers cuDNN's attention, whose backward pass gives NaN for padding on the left at lengths
        # of 64 more than a multiple of 128 (https://github.com/pytorch/pytorch/issues/196678).
        torch.backends.cuda.enable_cudnn_sdp(False)

    # -- what is sampled ------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        self._key_random_numbers()
        began = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        taught = torch.as_tensor(self._verdict.taught[mine], device=self.accelerator.device)
        output["advantages"] = torch.as_tensor(
            self._verdict.advantages[mine], dtype=torch.float32, device=self.accelerator.device
        )
        # TRL multiplies `tool_mask` into the mask of the loss, and into nothing else.
        mask = output["completion_mask"].clone()  # (B, T)
        for row, turn in enumerate(self._turns):
            if turn.closed:
                mask[row, len(turn.ids) - 1] = 0  # the EOS that was not sampled
        output["sampled_mask"] = mask
        output["tool_mask"] = mask * taught.unsqueeze(1)  # neither reward nor KL term of what teaches nothing
        trained = output["completion_mask"] * output["tool_mask"]
        output["num_items_in_batch"] = self.accelerator.gather(trained.sum()).sum()
        self.teaches = bool(output["num_items_in_batch"] > 0)
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        self._record(inputs, began)
        return output

    def _key_random_numbers(self) -> None:
        """Sampling depends on (seed, step, process) alone: not on an evaluation or a failed step before it."""
        key = [self.args.seed, self.state.global_step, self.accelerator.process_index]
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        return [self.engine.template.encode_prompt(self.engine.tokenizer, text) for text in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        self.phase("generates")
        began = time.perf_counter()
        completion_ids, log_probs, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        self._turns = [own_turn(self.engine, *pair) for pair in zip(prompt_ids, completion_ids, strict=True)]
        if log_probs is not None:  # vLLM's; NaN makes TRL take the closing EOS as sampled by the policy itself
            log_probs = [
                [*known[: len(turn.ids) - 1], float("nan")] if turn.closed else known[: len(turn.ids)]
                for turn, known in zip(self._turns, log_probs, strict=True)
            ]
        self._seconds = {"generate": time.perf_counter() - began}
        return ([turn.ids for turn in self._turns], log_probs, *rest)

    # -- what is rewarded -----------------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list[str], completions: list, completion_ids_list: list
    ) -> torch.Tensor:
        """The (N, 2) rewards and costs of all processes. `prompts` are the user's bare words; TRL's decoded `completions`
        are passed over for the engine's own reading, which keeps leading spaces."""
        self.phase("is scored")
        began = time.perf_counter()
        answers = [turn.answer for turn in self._turns]
        with failing_together(self.accelerator):  # before the gather in TRL, in which the others would wait for ever
            scores = self.scorer.score(prompts, [a.response for a in answers], [a.finished for a in answers])
            missing = ~(np.isfinite(scores.rewards) & np.isfinite(scores.costs))
            rewards, costs = (
                [None if gone else value for value, gone in zip(column.tolist(), missing, strict=True)]
                for column in (scores.rewards, scores.costs)
            )
            self._scores = rewards, costs
            self._truncated = sum(scores.truncated)
        both = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # (N, 2) float32
        self._seconds["score"] = time.perf_counter() - began
        rewards, costs = both.double().cpu().numpy().T
        self._verdict = self.constraint.judge(rewards, costs)
        self.reward_weights = torch.tensor([1.0, -self.constraint.multiplier.value])  # for TRL's own log
        self.phase("learns")
        return both

    def _record(self, inputs: list[dict], began: float) -> None:
        """This step's row so far; `metrics.jsonl` gets it with TRL's numbers when the step is done."""
        mine = [
            sum(not turn.answer.finished for turn in self._turns),
            sum(turn.answer.cut for turn in self._turns),
            self._truncated,
            sum(turn.answer.num_tokens for turn in self._turns),
        ]
        unfinished, cut, truncated, tokens = np.sum(gather_object([mine]), axis=0).tolist()
        count = len(self._verdict.taught)
        rows = gather_object([example["row"] for example in inputs])
        self._seconds["reference"] = time.perf_counter() - began - sum(self._seconds.values())
        self.step_metrics = {
            "kind": "train",
            "iteration": self.state.global_step,
            **self._verdict.metrics,
            "scored": count,
            "unfinished_share": unfinished / count,
            "cut_share": cut / count,
            "truncated_share": truncated / count,
            "tokens": tokens,
            "prompt_rows": list(dict.fromkeys(rows)),
            "seconds": self._seconds,
        }

    # -- what is learned ------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict) -> torch.Tensor:
        self._pass = inputs
        loss = super()._compute_loss(model, inputs)
        self._pass = {}
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        """TRL's (B, T) log-probabilities and entropies; here they are also summed for the step's row.

        TRL's own figures are means of passes, in which one whose completions teach nothing counts as 0.
        """
        log_probs, entropies, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if "sampled_mask" in self._pass:
            mask = self._pass["sampled_mask"]
            kl = torch.zeros_like(entropies)
            if self.beta != 0.0:
                less = self._pass["ref_per_token_logps"] - log_probs.detach()
                kl = less.exp() - less - 1  # the estimator of the loss
            self._sums += torch.stack([(values.detach() * mask).sum() for values in (kl, entropies, mask)])
        return (log_probs, entropies, *rest)

    def mean_kl_and_entropy(self) -> dict[str, float]:
        """Means over all tokens that the policy sampled in this step, in nats. On all processes together."""
        kl, entropy, count = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        means = {"kl": kl / count, "entropy": entropy / count} if count else {}
        return means if self.beta != 0.0 else {name: means[name] for name in means if name != "kl"}

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float | None:
        """Raises BrokenStep for gradients that are not finite, on all processes (the norm is theirs together).

        transformers would log the mean loss of other steps in place of NaN and go on with broken weights.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise BrokenStep(
                f"the gradients of step {self.state.global_step + 1} are not finite: the run stops and saves nothing of that "
                "step. The same command goes on from the last checkpoint; try --dtype float32 or a lower learning_rate"
            )
        return norm

    # -- what is saved and read back ------------------------------------------------------------------------------

    def save_whole(self, final: Path) -> None:
        """A checkpoint to resume from, which appears under its name when all processes have written their part."""
        # What is trained, and AdamW's two moments of it. DeepSpeed writes more: a float32 copy of weights in 16 bit.
        needed = 3 * sum(tensor.nbytes for tensor in self.engine.parameters().values())
        with folder_of_all(self.accelerator, final, needed) as folder:
            self._saving_in = folder
            try:
                with failing_together(self.accelerator):
                    super()._save_checkpoint(self.model, trial=None)
            finally:
                self._saving_in = None
            if self.accelerator.is_main_process:
                inner = folder / f"checkpoint-{self.state.global_step}"
                for path in inner.iterdir():
                    path.rename(folder / path.name)
                inner.rmdir()
                write_json(folder / "constraint.json", self.constraint.multiplier.state_dict())

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The first process writes the weights; what it fails at, all raise before they save together, as DeepSpeed does."""
        with failing_together(self.accelerator):
            super().save_model(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Reads the weights as `from_pretrained` does.

        transformers' own way leaves at their base values those that it has saved under other names, such as the experts of a
        Mixtral (https://github.com/huggingface/transformers/issues/48805).
        """
        if isinstance(self.model, PreTrainedModel):
            whole = load_whole(type(self.model), Path(resume_from_checkpoint), self.model.dtype)
            self.model.load_state_dict(whole.state_dict())
        else:  # adapters
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_in or self.args.output_dir)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No README.md by TRL: config.yaml and manifest.json tell more."""


class _SkipEmptySteps(TrainerCallback):
    """A step in which no token is trained on leaves the weights as they are.

    AdamW passes over weights without a gradient; with a gradient of 0 its momentum would move them. (DeepSpeed steps by
    itself, before this is called: there the momentum acts.)
    """

    def __init__(self, trainer: ConstrainedGRPOTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        if model is not None and not self.trainer.teaches:
            model.zero_grad(set_to_none=True)
