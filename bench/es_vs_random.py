"""Does ES learn more than chance? ES, shuffled fitness and random search at equal compute, on the demo's tiny models.

    python bench/es_vs_random.py [--seeds 0 1 2] [--models alignment/outputs/demo/models] [--output bench_es_vs_random]

Each method evaluates the same number of members on the same prompts:
- ES as in `make demo`;
- the same with each fitness handed to another member (`shuffle_fitness`), so that every step is noise of the same size;
- random search: the members around the base policy, of which the one with the highest fitness is kept.
Held-out objective E[R - lambda C] at lambda_cost and the safe ratio, base and after; for ES and the control of the last step,
not the best one, so that nothing is chosen on held-out prompts. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from alignment.config import read_yaml_mapping, script_parser
from alignment.demo.run import SETTINGS, scorer_service
from alignment.ES.weights import MasterWeights
from alignment.evaluation.held_out import score_held_out
from alignment.generation import TransformersEngine
from alignment.records import load_prompts, read_jsonl
from alignment.scoring.client import ScorerClient

SCRIPT = "alignment/ES/es-fine-tuning_alignment_accl_api.py"
METHODS = {"ES": {}, "shuffled": {"shuffle_fitness": "true"}, "random": {"alpha": "0"}}


def train(models: Path, url: str, run: Path, seed: int, changes: dict[str, str]) -> list[dict]:
    """Runs ES with the demo's settings and `changes`; returns the rows of metrics.jsonl."""
    flags = {
        "policy_model_path": models / "policy",
        "scorer_url": url,
        "train_jsonl": models / "custom_train.jsonl",
        "eval_jsonl": models / "custom_eval.jsonl",
        "experiment_dir": run,
        "global_seed": seed,
        **changes,
    }
    command = [sys.executable, SCRIPT, "--config", str(SETTINGS)]
    subprocess.run(command + [part for name, value in flags.items() for part in (f"--{name}", str(value))], check=True)
    return read_jsonl(run / "metrics.jsonl")


def best_random_member(models: Path, url: str, run: Path) -> dict:
    """The held-out measures of the member with the highest fitness in a run that took no steps."""
    steps = read_jsonl(run / "journal.jsonl")[1:]
    settings = read_yaml_mapping(SETTINGS)
    _, seed = max(
        (fitness, seed) for step in steps for fitness, seed in zip(step["fitness"], step["seeds"], strict=True)
    )
    engine = TransformersEngine(models / "policy")
    MasterWeights(engine.weights()).perturb(seed, settings["sigma"])
    prompts = [row["prompt"] for row in load_prompts(models / "custom_eval.jsonl")]
    answers = engine.generate(prompts, settings["max_new_tokens"])
    return score_held_out(prompts, answers, ScorerClient(url), settings.get("lambda_cost", 1.0))[1]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of each method")
    parser.add_argument("--models", type=Path, default=Path("alignment/outputs/demo/models"), help="made by make demo")
    parser.add_argument("--output", type=Path, default=Path("alignment/outputs/bench_es_vs_random"), help="folder")
    options = parser.parse_args()
    table = []
    with scorer_service(options.models, options.output) as url:
        for seed in options.seeds:
            for method, changes in METHODS.items():
                run = options.output / f"{method}-{seed}"
                held_out = [row for row in train(options.models, url, run, seed, changes) if row["kind"] == "eval"]
                before, after = held_out[0], held_out[-1]
                if method == "random":
                    after = best_random_member(options.models, url, run)
                kept = {name: (before[name], after[name]) for name in ("objective", "safe_ratio", "SH")}
                table.append({"method": method, "seed": seed, **kept})
    print(f"{'method':10} seed  objective        safe ratio, %    safe and helpful, %")
    for row in table:
        pairs = "  ".join(f"{row[name][0]:6.2f} -> {row[name][1]:6.2f}" for name in ("objective", "safe_ratio", "SH"))
        print(f"{row['method']:10} {row['seed']:4}  {pairs}")
    print(json.dumps(table))


if __name__ == "__main__":
    main()
