"""What a step's numbers are, in a line, and what they may mean: signs that a run learns nothing or learns the wrong thing."""

from __future__ import annotations

from tqdm import tqdm

from alignment.progress import step_text

FLAT = 1e-3  # spread of the fitness, in units of reward, below which ranking members is ranking noise
AT_LIMIT = 0.9
COLLAPSED = 0.25
EVERY_TIME = ("missing",)  # not a state of the run that lasts: other scores are missing each time


def summary(row: dict) -> str:
    """A train row of metrics.jsonl, for a progress bar."""
    return f"{step_text(row)}, {_speed(row)}"


def log_line(row: dict, num_iterations: int) -> str:
    """The same for a job's log, with where the time went and what is left."""
    seconds, done = row["seconds"], row["iteration"] + 1
    parts = " ".join(f"{name} {seconds[name]:.1f}" for name in ("generate", "wait_for_scores", "perturb", "step"))
    left = tqdm.format_interval(seconds["total"] * (num_iterations - done))
    return f"step {done}/{num_iterations} {step_text(row)} ({parts} s, {_speed(row)}, {left} left)"


def _speed(row: dict) -> str:
    return f"{row['tokens'] / max(row['seconds']['generate'], 1e-9):,.0f} tokens/s"


def warnings(row: dict, previous: dict | None) -> list[str]:
    """Warnings for a train row of metrics.jsonl; one that the `previous` row gave already is not repeated,
    but for those of EVERY_TIME."""
    new = _found(row)
    old = _found(previous) if previous is not None else {}
    return [text for name, text in new.items() if name not in old or name in EVERY_TIME]


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
    if row["scores_missing"]:
        found["missing"] = (
            f"{row['scores_missing']} of {row['scored']} scores are missing: {row['prompts_left_out']} prompts and "
            f"{row['members_lost']} members were left out"
        )
    return found
