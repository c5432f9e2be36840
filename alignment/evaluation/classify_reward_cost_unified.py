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
from pathlib import Path

import numpy as np
import torch

from alignment.errors import UserError, run_main
from alignment.evaluation.answers import base_log_probs, generate_answers, name_scorer
from alignment.evaluation.classify_settings import DATA_KEYS, ClassifySettings, load_settings
from alignment.evaluation.measures import as_record, category_table, few_prompts, measure, prompt_groups, score_arrays
from alignment.evaluation.points import FURTHER_KEYS, PUBLISHED_KEYS, ModelScores, chosen_note, model_file
from alignment.evaluation.prompts import load_rows, prompts_that_chose, rows_hash
from alignment.evaluation.scores import add_scores
from alignment.model_folder import read_config, resolve_folder
from alignment.objective import quadrant_summary
from alignment.records import check_writable_file, read_object, save_npy, write_json, write_jsonl
from alignment.scoring.client import ScorerClient, ScorerUnavailable
from alignment.scoring.local_scorer import LocalScorer
from alignment.scoring.scores import Scorer
from alignment.visualization.plot_reward_cost_grid import draw_grid
from alignment.visualization.style import save_figure

FIRST_LOOK = 5.0  # seconds


def main(argv: list[str] | None = None) -> None:
    config = load_settings(sys.argv[1:] if argv is None else argv, __doc__)
    target = model_file(config.output_dir, config.name, "summary.json")
    if target.exists() and (found := read_object(target).get("source", config.source)) != config.source:
        raise UserError(
            f"{target} holds the {found}; remove it, or give another --model_name or --output_dir for the {config.source}"
        )
    check_writable_file(target)
    rows = load_rows(config)
    if config.policy_model_path:  # a mistake is told before answers are generated, which takes hours
        look_for_scorer(config)
    prompts, chosen = len({row["prompt"] for row in rows}), prompts_that_chose(config, rows)
    print(f"{config.name}: {len(rows)} rows, {prompts} distinct prompts", flush=True)
    for note in (few_prompts(prompts), chosen_note(config.name, chosen, prompts)):
        if note:
            print(f"note: {note}", flush=True)

    sampling, answers = None, model_file(config.output_dir, config.name, "generations.jsonl")
    if config.policy_model_path:
        sampling = generate_answers(config, rows, answers)
    base = base_log_probs(config, config.base_model_path, rows) if config.base_model_path else None
    scorer = open_scorer(config)
    saved_scores = model_file(config.output_dir, config.name, "scores.jsonl")
    add_scores(rows, scorer, config.scorer_batch_size, saved_scores)
    if config.policy_model_path:
        name_scorer(answers, scorer.identity())
    made_with = {"scorer": scorer.identity(), "sampling": sampling, "base": base, "prompts_that_chose_it": chosen}
    write_results(config, rows, made_with)
    saved_scores.unlink()


def look_for_scorer(config: ClassifySettings) -> None:
    """Raises UserError where the score models or a service that answers cannot be used. One that is not there may yet come."""
    if not config.scorer_url:
        for score_model in (config.reward_model, config.cost_model):
            read_config(resolve_folder(score_model))
        return
    client = ScorerClient(config.scorer_url)
    try:
        client.wait_until_ready(max_wait=FIRST_LOOK)
    except ScorerUnavailable as error:
        print(
            f"warning: {error}. Answers are generated first; after that it has {client.max_wait / 60:.0f} minutes to come",
            file=sys.stderr,
        )


def open_scorer(config: ClassifySettings) -> Scorer:
    """The service's client, or both score models in this process."""
    if config.scorer_url:
        client = ScorerClient(config.scorer_url, batch_size=config.scorer_batch_size)
        client.wait_until_ready()
        return client
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


def write_results(config: ClassifySettings, rows: list[dict], made_with: dict) -> None:
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
        "data": {"prompts": rows_hash(rows)} | {key: getattr(config, key) for key in DATA_KEYS},
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
