"""Lambda, the price of cost in max E[R] - lambda E[C] subject to E[C] + d <= 0.

One update follows the published scripts: J_C = mean(C) + d, its positive part when `lambda_pos_cost_only` (then lambda can
never fall), smoothed to an exponential moving average, and ln(lambda) += lr * EMA, clipped to [lambda_min, lambda_max].
With `rule="safe_rlhf"` it is ln(lambda) += lr * lambda * EMA, the gradient step of the Safe-RLHF paper (arXiv 2310.12773,
appendix B): slower where lambda is small.
There is one lambda a run: `update` is called once an iteration (ES) or generation batch (GRPO) with the costs of all
processes, never in evaluation, and its state is part of every checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.errors import UserError

_SMALLEST = 1e-12  # the published guard before the logarithm


def check_lambda_settings(settings: Any) -> None:
    """Raises UserError for settings, by the published names, that the first update would overrule."""
    lam, low, high = settings.lambda_cost, settings.lambda_min, settings.lambda_max
    if low > high:
        raise UserError(f"lambda_min ({low}) is above lambda_max ({high})")
    if settings.lambda_adapt and not low <= lam <= high:
        raise UserError(
            f"lambda_cost is {lam}, outside lambda_min to lambda_max ({low} to {high}), where the first update would put it: "
            "give --lambda_adapt false to keep it as it is, or other bounds"
        )


@dataclass
class LagrangeMultiplier:
    value: float = 1.0
    adapt: bool = True
    learning_rate: float = 0.005
    minimum: float = 1e-4
    maximum: float = 5.0
    positive_part: bool = True
    ema_beta: float = 0.9
    threshold_d: float = 0.0
    rule: str = "published"
    cost_ema: float | None = None

    @classmethod
    def from_settings(cls, settings: Any) -> LagrangeMultiplier:
        """From the published setting names, which ES and GRPO share."""
        return cls(
            value=settings.lambda_cost,
            adapt=settings.lambda_adapt,
            learning_rate=settings.lambda_lr,
            minimum=settings.lambda_min,
            maximum=settings.lambda_max,
            positive_part=settings.lambda_pos_cost_only,
            ema_beta=settings.jc_ema_beta,
            threshold_d=settings.cost_threshold_d,
            rule=settings.lambda_rule,
        )

    def update(self, costs: np.ndarray) -> dict[str, float | None]:
        """Takes the (N,) finite costs of all processes; returns what to log: the J_C used, its EMA, lambda after it.

        Raises ValueError for missing or non-finite costs: lambda must never move on a guess.
        """
        costs = np.asarray(costs, dtype=np.float32)
        if not self.adapt:
            return {"cost_violation": None, "cost_ema": self.cost_ema, "lambda": self.value}
        if costs.size == 0 or not np.isfinite(costs).all():
            raise ValueError("lambda is updated from at least one cost, and all of them must be finite")
        violation = float(np.mean(costs)) + self.threshold_d
        if self.positive_part:
            violation = max(violation, 0.0)
        if self.cost_ema is None:
            self.cost_ema = violation
        else:
            self.cost_ema = self.ema_beta * self.cost_ema + (1.0 - self.ema_beta) * violation
        rate = self.learning_rate * (self.value if self.rule == "safe_rlhf" else 1.0)
        log_value = math.log(max(self.value, _SMALLEST)) + rate * self.cost_ema
        self.value = float(np.clip(np.exp(log_value), self.minimum, self.maximum))
        return {"cost_violation": violation, "cost_ema": self.cost_ema, "lambda": self.value}

    def state_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "cost_ema": self.cost_ema}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.cost_ema = float(state["value"]), state["cost_ema"]
