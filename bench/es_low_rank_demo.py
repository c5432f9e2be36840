"""Learning curves of full-rank and low-rank ES at equal evaluations, side by side, on the demo's tiny models.

    python bench/es_low_rank_demo.py [--models alignment/outputs/demo/models] [--output alignment/outputs/bench_low_rank]
        [--seeds 0 1 2] [--arms NAME KEY=VALUE,... ...]

Every arm is the ES script with the demo's settings and the arm's changes, through the real scorer service: the same members,
prompts and iterations. `--arms "r1 alpha=0.02,perturbation=low_rank"` runs other arms (a sweep); the first is what the others
are compared with. Held-out prompts, after the last step, not the best one. Differences are paired by prompt, with 95 %
intervals from a bootstrap over prompts with all seeds of an arm together: they do not hold how much seeds differ, so each
seed's value stands beside them. The oracle (alignment/demo) judges by grammar. A run that is there is not run again. The last
line is JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from es_vs_random import train

from alignment.config import script_parser
from alignment.demo.data import oracle
from alignment.demo.run import scorer_service
from alignment.evaluation.measures import paired_differences
from alignment.records import read_jsonl

LOW_RANK = "perturbation=low_rank,rank="
ARMS = [
    "full",
    f"rank1 {LOW_RANK}1",
    f"rank2 {LOW_RANK}2",
    f"rank4 {LOW_RANK}4",
]


def arm_of(text: str) -> tuple[str, dict[str, str]]:
    """ "NAME KEY=VALUE,..." -> name and changes of settings."""
    name, _, changes = text.partition(" ")
    return name, dict(change.split("=", 1) for change in changes.split(",") if change)


def run_arm(models: Path, url: str, run: Path, seed: int, changes: dict[str, str]) -> dict:
    """One training: its held-out curve, the points after the last step, and seconds."""
    rows = train(models, url, run, seed, changes)
    evaluations = [row for row in rows if row["kind"] == "eval"]
    points = read_jsonl(run / "eval" / f"iteration_{evaluations[-1]['iteration']:05d}_points.jsonl")
    kinds = [oracle(point["prompt"], point["response"], point["finished"]) for point in points]
    last = {name: evaluations[-1][name] for name in ("objective", "safe_ratio", "SH", "distinct_2")}
    last |= {"oracle_SH": 100 * kinds.count("SH") / len(kinds), "nonsense": 100 * kinds.count("XX") / len(kinds)}
    return {
        "curve": {row["iteration"]: row["objective"] for row in evaluations},
        "last": last,
        "points": points,
        "seconds": sum(row["seconds"]["total"] for row in rows if row["kind"] == "train"),
    }


def summary(runs: list[dict], reference: list[dict]) -> dict:
    """An arm's seeds together, and their difference from the first arm's."""
    steps = list(runs[0]["curve"])
    pooled = [[point for run in one for point in run["points"]] for one in (reference, runs)]
    change = {row["measure"]: row for row in paired_differences(pooled[0], pooled[1])}
    return {
        "curve": {step: float(np.mean([run["curve"][step] for run in runs])) for step in steps},
        "curves": [list(run["curve"].values()) for run in runs],
        "last": {name: float(np.mean([run["last"][name] for run in runs])) for name in runs[0]["last"]},
        "difference": {
            name: [round(change[name][key], 3) for key in ("difference", "low", "high")]
            for name in ("objective", "safe_ratio", "SH")
        },
        "seconds": round(float(np.mean([run["seconds"] for run in runs])), 1),
    }


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of each arm")
    parser.add_argument("--arms", nargs="+", default=ARMS, metavar="ARM", help='"NAME KEY=VALUE,..."')
    parser.add_argument("--models", type=Path, default=Path("alignment/outputs/demo/models"), help="made by make demo")
    parser.add_argument("--output", type=Path, default=Path("alignment/outputs/bench_low_rank"), help="folder")
    options = parser.parse_args()
    arms = dict(arm_of(text) for text in options.arms)
    with scorer_service(options.models, options.output) as url:
        # Seed by seed, so that a bench that is stopped has whole comparisons.
        runs = {
            (name, seed): run_arm(options.models, url, options.output / f"{name}-{seed}", seed, changes)
            for seed in options.seeds
            for name, changes in arms.items()
        }
    by_arm = {name: [runs[name, seed] for seed in options.seeds] for name in arms}
    table = {name: summary(one, next(iter(by_arm.values()))) for name, one in by_arm.items()}
    steps = list(next(iter(table.values()))["curve"])
    print(f"\nheld-out objective E[R - C], mean of seeds {options.seeds}")
    print(f"{'after steps':24}" + "".join(f"{step:>7}" for step in steps) + "   s/run")
    for name, row in table.items():
        print(f"{name:24}" + "".join(f"{value:7.2f}" for value in row["curve"].values()) + f"{row['seconds']:8.1f}")
    print(
        f"\n{'after the last step':24} objective by seed          difference [95 %]      safe   SH  oracle SH  nonsense"
    )
    for name, row in table.items():
        seeds = " ".join(f"{curve[-1]:.2f}" for curve in row["curves"])
        change, low, high = row["difference"]["objective"]
        last = row["last"]
        print(
            f"{name:24} {seeds:24} {change:6.2f} [{low:5.2f}, {high:5.2f}]   {last['safe_ratio']:6.1f} {last['SH']:5.1f}"
            f" {last['oracle_SH']:8.1f} {last['nonsense']:9.1f}"
        )
    print(json.dumps(table))


if __name__ == "__main__":
    main()
