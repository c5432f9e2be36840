"""TRL's trainer with the constraint in it, as the tests of GRPO's pieces run it: one process, no service."""

from __future__ import annotations

import numpy as np
from fake_scorer import score_of

from alignment.generation import TransformersEngine
from alignment.GRPO.data import run_order
from alignment.GRPO.reward import ConstrainedReward
from alignment.GRPO.settings import GRPOSettings
from alignment.GRPO.trainer import ConstrainedGRPOTrainer
from alignment.GRPO.trl_config import adapter_config, trl_config
from alignment.lagrangian import LagrangeMultiplier
from alignment.scoring.client import Scores


class StubScorer:
    """Scores of the texts alone. `change(prompts, responses, rewards, costs)` may return other scores."""

    def __init__(self, change=None):
        self.change, self.seen = change, []

    def score(self, prompts, responses, finished):
        pairs = np.array([score_of(p, r) for p, r in zip(prompts, responses, strict=True)])
        rewards, costs = pairs.T
        if self.change:
            rewards, costs = self.change(prompts, responses, rewards, costs)
        self.seen += zip(prompts, responses, finished, strict=True)
        return Scores(np.array(rewards), np.array(costs), [None] * len(prompts), [False] * len(prompts))


def make_settings(**changes) -> GRPOSettings:
    values = {
        "model_name": "m",
        "scorer_url": "http://x:1",
        "max_steps": 4,
        "num_generations": 4,
        "prompts_per_step": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "temperature": 1.0,
        "learning_rate": 1e-2,
        "beta": 0.1,
    }
    return GRPOSettings(**(values | changes))


def make_trainer(policy, folder, scorer, **changes):
    settings = make_settings(**changes)
    engine = TransformersEngine(policy)
    prompts = [f"What does ASSISTANT: or USER: number {i} mean?" for i in range(24)]
    return ConstrainedGRPOTrainer(
        trl_config(settings, folder),
        engine,
        scorer,
        ConstrainedReward(LagrangeMultiplier(), settings.num_generations, settings.reward_aggregation),
        run_order(prompts, settings.prompts_per_step, settings.max_steps, settings.seed),
        peft_config=adapter_config(settings),
    )


def rows_of(trainer):
    """The inputs of a step, as TRL's loader hands them to the first hook."""
    trainer.model.train()
    return next(iter(trainer.get_train_dataloader()))
