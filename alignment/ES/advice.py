"""What a step's numbers may mean, in words: signs that a run learns nothing or learns the wrong thing."""

from __future__ import annotations

FLAT = 1e-3  # spread of the fitness, in units of reward, below which ranking members is ranking noise
AT_LIMIT = 0.9
COLLAPSED = 0.25


def warnings(row: dict, previous: dict | None) -> list[str]:
    """Warnings for a train row of metrics.jsonl; one that the `previous` row gave already is not repeated."""
    new = _found(row)
    old = _found(previous) if previous is not None else {}
    return [text for name, text in new.items() if name not in old]


def _found(row: dict) -> dict[str, str]:
    found = {}
    if row["fitness_std"] < FLAT:
        found["flat"] = (
            f"the members' fitnesses differ by {row['fitness_std']:.1e} only: sigma is too small for this policy, "
            "or the scorer gives every answer the same score"
        )
    if row["unfinished_share"] > AT_LIMIT:
        found["limit"] = (
            f"{row['unfinished_share']:.0%} of the answers reach max_new_tokens unfinished: raise it, or look whether the "
            "policy still ends its turns"
        )
    if row["distinct_share"] < COLLAPSED:
        found["collapse"] = (
            f"only {row['distinct_share']:.0%} of the policy's answers on this batch are different from each other: "
            "it may be collapsing into a few answers that the score models like; lower alpha or sigma"
        )
    if row["prompts_left_out"]:
        found["missing"] = (
            f"{row['scores_missing']} scores are missing: {row['prompts_left_out']} prompts were left out"
        )
    return found
