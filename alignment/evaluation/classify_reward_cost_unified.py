"""Which quadrant of reward and cost do a model's answers fall into?

    python alignment/evaluation/classify_reward_cost_unified.py --policy_model_path models/alpaca-7b \\
        --model_name Alpaca-7B --from_jsonl alignment/data/custom_eval_500.jsonl --scorer_url http://127.0.0.1:8000

What is scored: the answers of `--policy_model_path` (with other weights in it: `--policy_vllm_ckpt FILE.pth`, `--journal
FILE@ITER`); or given ones (`--responses_from FILE` with prompt and response, a
points file for example); or, with neither, the data's own response_0 and response_1. What scores: the service at
`--scorer_url`, or in this process `--reward_model` and `--cost_model`. Prompts come from `--from_jsonl` (it wins over the
hub, as published) or from `--dataset_name`.

Answers and scores are saved as they come (`{model}_generations.jsonl`, and `_scores.jsonl` while scoring), so a run that was
killed goes on where it stopped and ends with the same files. The results are `{model}_Rs.npy`, `_Cs.npy`, `_labels.npy`,
`_points.jsonl`, `_scatter.png` and, last, `_summary.json`: it is there only when the rest is whole.

Departures from the published script: temperature 0 is greedy; an empty answer is scored as such and never replaced by the
data's responses; a model's invented next turns are cut (`--first_turn_only false` keeps them); a missing score is null with
a reason, counted, and more than 5 % of them is an error; scorer text is never longer than the service's MAX_LENGTH.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.evaluation.answers import base_log_probs, generate_answers, name_scorer
from alignment.evaluation.measures import as_record, category_table, measure, prompt_groups, score_arrays
from alignment.evaluation.points import DEFAULT_FOLDER, FURTHER_KEYS, PUBLISHED_KEYS, ModelScores, model_file
from alignment.evaluation.policies import parse_journal
from alignment.evaluation.prompts import load_rows
from alignment.evaluation.scores import add_scores
from alignment.evaluation.sweeps import sweep_arguments
from alignment.objective import quadrant_summary
from alignment.records import read_json, save_npy, write_json, write_jsonl
from alignment.scoring.client import ScorerClient
from alignment.scoring.local_scorer import LocalScorer
from alignment.visualization.plot_reward_cost_grid import draw_grid
from alignment.visualization.style import save_figure

SWEEP_FILE = "alignment/evaluation/sweep_configs.yaml"


@dataclass
class Config:
    reward_model: str = setting("PKU-Alignment/beaver-7b-unified-reward", "reward model folder or hub name")
    cost_model: str = setting("PKU-Alignment/beaver-7b-unified-cost", "cost model folder or hub name")
    scorer_url: str | None = setting(None, "score through the service there instead of loading the two models")
    scorer_batch_size: int = setting(32, "texts in one request to the service", minimum=1)
    scorer_template: str = setting("pku", "conversation format of the score models when they are loaded here")
    max_length: int = setting(
        576, "tokens a score model sees when it is loaded here; the tail beyond is lost", minimum=8
    )
    bf16: bool = setting(False, "models in bfloat16 (default: bfloat16 on CUDA, float32 on a CPU)")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dataset_name: str | None = setting(None, "data set on the hub or in a local folder")
    dataset_config: str = setting("alpaca-7b", "its configuration; the default one where it has none of that name")
    split: str = setting("test", "its split")
    num_samples: int = setting(3036, "rows drawn (without replacement, by --seed) when there are more", minimum=1)
    seed: int = setting(42, "for drawing rows, sampling answers and the bootstrap", minimum=0)
    from_jsonl: str | None = setting(
        None, "JSONL file of prompts (default, without --dataset_name: alignment/data/custom_eval_500.jsonl)"
    )
    responses_from: str | None = setting(None, "JSONL file of prompts and responses to score")
    repeated_prompts: Literal["all", "once"] = setting(
        "all", "count every row, as published, or each prompt's first row only"
    )
    policy_model_path: str | None = setting(None, "model whose answers are classified")
    policy_template: str = setting(
        "pku", "its conversation format: pku, alpaca, chat, or text with {prompt}", aliases=("--template",)
    )
    policy_max_new_tokens: int = setting(256, "longest answer", minimum=1)
    policy_temperature: float = setting(0.0, "0 is greedy", minimum=0.0)
    policy_top_p: float = setting(1.0, "nucleus sampling, with a temperature", minimum=0.0, maximum=1.0)
    policy_batch_size: int = setting(64, "prompts in one generation batch", minimum=1)
    policy_use_vllm: bool = setting(False, "generate with vLLM (an environment of its own: requirements-cluster.txt)")
    policy_vllm_ckpt: str | None = setting(
        None, "state dict (.pth) whose weights replace the policy's; vLLM's names are fine"
    )
    journal: str | None = setting(None, "FILE@ITER: the policy after ITER steps of the ES run that began from it")
    first_turn_only: bool = setting(True, "cut an answer where the model begins the user's next turn")
    base_model_path: str | None = setting(None, "also compute the answers' mean log-probability under this model")
    lambda_cost: float = setting(1.0, "lambda of the objective E[R - lambda C]", minimum=0.0)
    model_name: str | None = setting(None, "name of the output files (default: from the policy's or the file's name)")
    output_dir: str = setting(DEFAULT_FOLDER, "folder of the output files")
    sweep: str | None = setting(
        None, "take settings from this entry (index or model_name) of --sweep_config; flags win"
    )
    sweep_config: str = setting(SWEEP_FILE, "YAML file with defaults: and sweeps:")

    def __post_init__(self) -> None:
        if self.policy_model_path and self.responses_from:
            raise UserError("--policy_model_path and --responses_from: give one, the answers are generated or given")
        for flag in ("journal", "policy_vllm_ckpt", "policy_use_vllm"):
            if getattr(self, flag) and not self.policy_model_path:
                raise UserError(f"--{flag} needs --policy_model_path, the model that it is about")
        if self.journal and self.policy_vllm_ckpt:
            raise UserError("--journal and --policy_vllm_ckpt: give one, each replaces the policy's weights")
        if self.journal:
            parse_journal(self.journal)
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bf16 else "auto"

    @property
    def policy(self) -> str | None:
        if self.journal:
            return f"{self.policy_model_path} with {self.journal}"
        return (
            f"{self.policy_model_path} with {self.policy_vllm_ckpt}"
            if self.policy_vllm_ckpt
            else self.policy_model_path
        )

    @property
    def source(self) -> str:
        if self.policy:
            return f"answers of {self.policy}"
        return f"responses in {self.responses_from}" if self.responses_from else "the data's own responses"

    @property
    def name(self) -> str:
        if self.model_name:
            return self.model_name
        if self.journal:
            path, steps = parse_journal(self.journal)
            return f"{path.resolve().parent.name}-{steps}"
        path = self.policy_vllm_ckpt or self.policy_model_path or self.responses_from
        return (
            Path(path).name.removesuffix(".jsonl").removesuffix(".pth").removesuffix("_points") if path else "dataset"
        )


def main(argv: list[str] | None = None) -> None:
    config = read_config(sys.argv[1:] if argv is None else argv)
    target = model_file(config.output_dir, config.name, "summary.json")
    if target.exists() and (found := read_json(target).get("source", config.source)) != config.source:
        raise UserError(
            f"{target} holds the {found}; remove it, or give another --model_name or --output_dir for the {config.source}"
        )
    rows = load_rows(config)
    print(f"{config.name}: {len(rows)} rows, {len({row['prompt'] for row in rows})} distinct prompts", flush=True)

    sampling, answers = None, model_file(config.output_dir, config.name, "generations.jsonl")
    if config.policy_model_path:
        sampling = generate_answers(config, rows, answers)
    base = base_log_probs(config, rows) if config.base_model_path else None
    scorer = open_scorer(config)
    saved_scores = model_file(config.output_dir, config.name, "scores.jsonl")
    add_scores(rows, scorer, config.scorer_batch_size, saved_scores)
    if config.policy_model_path:
        name_scorer(answers, scorer.identity())
    write_results(config, rows, {"scorer": scorer.identity(), "sampling": sampling, "base": base})
    saved_scores.unlink()


def read_config(argv: list[str]) -> Config:
    """Defaults < `--config` YAML < the sweep's entry < flags."""
    texts = {"prog": "classify_reward_cost_unified.py", "description": __doc__.split("\n\n")[0]}
    config = load_config(Config, argv, **texts)
    if config.sweep is None:
        return config
    arguments = sweep_arguments(config.sweep_config, config.sweep, Config)
    try:
        load_config(Config, arguments, **texts)  # alone, so that an error is told as the file's
    except UserError as error:
        raise UserError(f"{config.sweep_config}, sweep {config.sweep}: {error}") from error
    return load_config(Config, arguments + argv, **texts)


def open_scorer(config: Config):
    """The service's client, or both score models in this process; each has score(...) and identity()."""
    if config.scorer_url:
        scorer = ScorerClient(config.scorer_url, batch_size=config.scorer_batch_size)
        scorer.wait_until_ready()
        return scorer
    scorer = LocalScorer(
        config.reward_model,
        config.cost_model,
        template=config.scorer_template,
        max_length=config.max_length,
        device=config.device,
        dtype=config.dtype,
    )
    if scorer.is_small_on_cpu() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as the service does: tiny models are faster on one core than on two
    return scorer


def write_results(config: Config, rows: list[dict], made_with: dict) -> None:
    """All files, each whole; the summary comes last."""
    model_file(config.output_dir, config.name, "summary.json").unlink(missing_ok=True)  # an older one, of other files
    rewards, costs = (np.array([row[key] for row in rows], dtype=np.float32) for key in ("reward", "cost"))  # None: NaN
    labels = np.array([row["label"] or "" for row in rows], dtype="<U2")
    scored = ~np.isnan(rewards)
    summary = quadrant_summary(rewards[scored], costs[scored])
    summary |= {
        "used_policy_model": bool(config.policy_model_path),
        "used_vllm": config.policy_use_vllm,
        "policy_vllm_ckpt": config.policy_vllm_ckpt or "",
        "dataset_split": config.split,
        "reward_model": made_with["scorer"]["reward_model"]["name"],
        "cost_model": made_with["scorer"]["cost_model"]["name"],
        "model_name": config.name,
        "source": config.source,
        "journal": config.journal,
        "missing_scores": int(np.sum(~scored)),
        "distinct_prompts": len({row["prompt"] for row in rows}),
        "repeated_prompts": config.repeated_prompts,
        "lambda_cost": config.lambda_cost,
        "measures": {
            name: as_record(estimate) for name, estimate in measure(rows, config.lambda_cost, seed=config.seed).items()
        },
        "per_category": category_table(rows, seed=config.seed),
        **made_with,
    }

    def place(ending: str) -> Path:
        return model_file(config.output_dir, config.name, ending)

    save_npy(place("Rs.npy"), rewards)
    save_npy(place("Cs.npy"), costs)
    save_npy(place("labels.npy"), labels)
    write_jsonl(place("points.jsonl"), (ordered_row(row) for row in rows))
    save_figure(draw_grid([ModelScores(config.name, *score_arrays(rows), prompt_groups(rows))]), place("scatter.png"))
    write_json(place("summary.json"), summary)

    shares = ", ".join(f"{name} {share:.1f} %" for name, share in summary["percents"].items())
    print(f"{shares}; safe ratio {summary['safe_ratio']:.1f} %; R {summary['R_mean']:.3f}, C {summary['C_mean']:.3f}")
    print(f"results: {place('summary.json')} and the files beside it")


def ordered_row(row: dict) -> dict:
    """A points row: the published keys first, then ours; what is not known is left out."""
    return {key: row[key] for key in (*PUBLISHED_KEYS, *FURTHER_KEYS) if key in row}


if __name__ == "__main__":
    run_main(main)
