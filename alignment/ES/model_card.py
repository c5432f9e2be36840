"""README.md of a saved policy: what it is, from what, by what; enough to tell it from others and to make it again."""

from __future__ import annotations

from alignment.ES.settings import ESSettings
from alignment.records import to_json


def model_card(settings: ESSettings, t: int, base_hash: str, lam: float, scorer: dict) -> str:
    """The card of the policy after `t` steps; `base_hash`: the base weights', `scorer`: its identity."""
    rank = f", rank {settings.rank}" if settings.perturbation == "low_rank" else ""
    return (
        f"---\nbase_model: {settings.policy_model_path}\n---\n\n# Policy after {t} ES steps\n\n"
        "Aligned with max E[R] - lambda E[C] subject to E[C] <= 0 by Evolution Strategies. A research model: a low cost\n"
        "score is no guarantee of safety. The licences of the base model, of the score models and of the prompts apply.\n\n"
        f"| | |\n|---|---|\n| base weights | SHA-256 {base_hash} |\n"
        f"| sigma, alpha, members, prompts a step | {settings.sigma}, {settings.alpha}, {settings.population_size}, "
        f"{settings.batch_size} |\n"
        f"| perturbation | {settings.perturbation}{rank} |\n"
        f"| lambda | {lam:.4f} |\n| conversation template | {settings.policy_template} |\n"
        f"| scorer | {to_json(scorer)} |\n| weights | float32; journal.jsonl of the run rebuilds them |\n"
    )
