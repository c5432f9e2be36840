"""Which model's answers does a judge prefer, for helpfulness and for harmlessness? Ratings with intervals, baseline at 1000.

    export OPENAI_API_KEY=...                     # OPENAI_BASE_URL or --base_url for another OpenAI-compatible server
    python alignment/evaluation/gpt_elo_eval.py --data-dir alignment/outputs/model_comparisons \\
        --models Alpaca-7B Beaver-V1 ES-500 --max-prompts 200 --dry-run      # then without --dry-run

Reads `{model}_points.jsonl`, asks the judge about every pair on every prompt, and writes `gpt_elo_ratings.json` as published,
details beside it, and a scatter. Every reply is in --judgments-out before the next question: the same command goes on after
a kill and asks only for what is missing. --judgments-in rates existing judgments; with --judge scorer the reward and cost models
decide. Departures from the published script stand in the modules of alignment/evaluation/judging, how to read the results in
its README.md.
Exit codes: 0, 2 for a mistake or an endpoint that refuses, 3 when --budget ended the run early, 128 + n after signal n.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.evaluation.compare_models import require_same_sampling, require_same_scorer
from alignment.evaluation.judging.client import JudgeClient
from alignment.evaluation.judging.cost import (
    Budget,
    Price,
    count_bytes,
    expected_usage,
    find_price,
    mean_reply_tokens,
    name_unpriced,
    total_usage,
    worst_usage,
)
from alignment.evaluation.judging.loop import LoopSettings, ask_all
from alignment.evaluation.judging.prompts import DIMENSIONS, TEMPLATE_HASH, build_messages
from alignment.evaluation.judging.ratings import PRIOR_SD, PUBLISHED_BASELINE, choose_baseline, rate
from alignment.evaluation.judging.report import (
    describe_ratings,
    position_bias,
    print_ratings,
    temperature_notes,
)
from alignment.evaluation.judging.scorer_judge import agreement, scorer_verdicts
from alignment.evaluation.judging.store import (
    UNDECIDED,
    JudgmentStore,
    decided_by_key,
    last_outcomes,
    models_and_judges,
    options_found,
    read_judgments,
    read_records,
    verdicts_of,
)
from alignment.evaluation.judging.tasks import (
    Answers,
    Task,
    answers_there,
    choose_prompts,
    make_tasks,
    points_files,
    points_hash,
    read_answers,
)
from alignment.evaluation.judging.verdict import Verdict
from alignment.evaluation.points import DEFAULT_FOLDER, model_file, models_in
from alignment.records import check_writable_file, write_json
from alignment.visualization.plot_gpt_elo_figure import details_path, draw_ratings, intervals_of
from alignment.visualization.style import check_figure, save_figure

OUTPUTS = "alignment/outputs/gpt_elo"
DEFAULT_JUDGE = "gpt-4.1-mini"  # published
BUDGET_SPENT = 3


@dataclass
class Config:
    data_dir: str = setting(DEFAULT_FOLDER, "folder with the models' points files")
    models: list[str] = setting([], "models to compare (default: all in the folder, or in the judgments)")
    judge: Literal["gpt", "scorer"] = setting("gpt", "an endpoint's model, or the reward and cost in the points files")
    judge_model: str | None = setting(None, f"the endpoint's model (default: {DEFAULT_JUDGE})")
    base_url: str | None = setting(None, "OpenAI-compatible endpoint (default: OPENAI_BASE_URL, then OpenAI)")
    max_prompts: int = setting(300, "prompts that are judged, of those that all models answered; 0: all")
    seed: int = setting(42, "of the choice of prompts and of the bootstrap", minimum=0)
    orders: Literal["both", "one"] = setting("both", "show each pair in both orders, or in one drawn at random")
    concurrency: int = setting(8, "most calls at once; fewer when the endpoint limits the rate", minimum=1, maximum=512)
    temperature: float = setting(0.2, "of the judge", minimum=0.0, maximum=2.0)
    timeout: float = setting(60.0, "seconds for one call", minimum=0.1)
    max_output_tokens: int = setting(1000, "most tokens of one reply", minimum=16)
    structured: bool = setting(True, "ask for JSON by a schema where the endpoint has it")
    tries: int = setting(8, "calls for one judgment that fail in transport before it counts as failed", minimum=1)
    reasks: int = setting(2, "further calls for one judgment without a verdict (refused, unparsed)", minimum=0)
    retry_wait: float = setting(1.0, "seconds before the first repetition; doubles up to 60", minimum=0.0)
    max_wait: float = setting(600.0, "longest Retry-After in seconds that is waited for", minimum=0.0)
    dry_run: bool = setting(False, "say how many calls are missing and what they cost, and stop")
    budget: float | None = setting(None, "most dollars for all that the judgments file holds", minimum=0.0)
    price_in: float | None = setting(None, "dollars per million prompt tokens of the judge that is asked", minimum=0.0)
    price_out: float | None = setting(None, "dollars per million of its reply tokens", minimum=0.0)
    judgments_out: str = setting(f"{OUTPUTS}/gpt_judgments.jsonl", "where judgments are kept, appended")
    judgments_in: str | None = setting(
        None, "rate this file of judgments, ours or the published format; nothing is asked"
    )
    template: str | None = setting(None, "with --judgments_in: the hash of the judge prompts to be rated")
    unscored: Literal["tie", "skip"] = setting(
        "tie", "a published judgment without scores is a tie, as published, or left out"
    )
    rating: Literal["bradley-terry", "elo"] = setting("bradley-terry", "elo: sequential, order-dependent, as published")
    normalize_to: str | None = setting(
        None, f"model at 1000 (default: {PUBLISHED_BASELINE} if present, else the first)"
    )
    tie_threshold: float = setting(0.5, "scores of the judge that differ by no more than this are a tie", minimum=0.0)
    k_factor: float = setting(32.0, "step of --rating elo", minimum=0.0)
    draws: int = setting(1000, "bootstrap draws over prompts", minimum=100)
    ratings_out: str | None = setting(
        None, f"ratings (default: {OUTPUTS}/gpt_elo_ratings.json, scorer: scorer_ratings.json)"
    )
    plot_out: str | None = setting(
        None, f"scatter (default: {OUTPUTS}/gpt_elo_scatter.png, scorer: scorer_scatter.png)"
    )

    def __post_init__(self) -> None:
        prefix = "scorer" if self.judge == "scorer" else "gpt_elo"
        self.ratings_out = self.ratings_out or f"{OUTPUTS}/{prefix}_ratings.json"
        self.plot_out = self.plot_out or f"{OUTPUTS}/{prefix}_scatter.png"
        if self.judgments_in and (self.judge == "scorer" or self.dry_run):
            raise UserError("--judgments_in only rates what is there: it does not go with --judge scorer or --dry_run")
        if self.judge == "scorer" and self.dry_run:
            raise UserError("--dry_run: --judge scorer costs nothing, run it")
        if self.template and not self.judgments_in:
            raise UserError(
                "--template chooses among the judgments of --judgments_in; new ones follow the current prompts"
            )


@dataclass
class Evidence:
    """What the ratings are made from: verdicts of both dimensions, and what the details file says of their origin."""

    models: list[str]
    verdicts: list[Verdict]
    source: dict
    answers: Answers  # for the agreement with the scorer; may be empty
    exit_code: int = 0


def main(argv: list[str] | None = None) -> int:
    refuse_key_in_arguments(sys.argv[1:] if argv is None else argv)
    config = load_config(Config, argv, prog="gpt_elo_eval.py", description=__doc__)
    assert config.ratings_out and config.plot_out  # Config gave them names
    check_figure(config.plot_out)
    check_writable_file(config.ratings_out)
    if config.judgments_in:
        evidence: Evidence | None = from_file(config, config.judgments_in)
    elif config.judge == "scorer":
        evidence = from_scorer(config)
    else:
        evidence = from_endpoint(config)
    if evidence is None:
        return 0
    evidence.source["arguments"] = sys.argv[1:] if argv is None else argv
    write_results(config, evidence)
    return evidence.exit_code


def refuse_key_in_arguments(argv: list[str]) -> None:
    """The published --api-key is gone: arguments stand in process lists, job logs and shell histories."""
    if any(re.match(r"--?(openai[-_])?api[-_]key", word, re.IGNORECASE) for word in argv):
        raise UserError(
            "--api-key is not taken, others can read arguments: export OPENAI_API_KEY (and change a key once shown)"
        )


def from_file(config: Config, path: str) -> Evidence:
    answers = answers_there(config.data_dir, config.models or models_and_judges(path)[0])
    verdicts, told = read_judgments(
        path, config.models, config.judge_model, config.template, config.tie_threshold, config.unscored, answers
    )
    if told.get("on_other_answers"):
        print(
            f"note: {told['on_other_answers']} verdicts in {path} are on other answers than the points files in "
            f"{config.data_dir} hold, and do not count",
            file=sys.stderr,
        )
    found = list(dict.fromkeys(name for one in verdicts for name in (one.first, one.second)))
    missing = [model for model in config.models if model not in found]
    if missing:
        raise UserError(f"{path} has no verdict on {', '.join(missing)}")
    return Evidence(config.models or found, verdicts, {"judgments": path, **told}, answers)


def models_to_judge(config: Config) -> list[str]:
    """The models that were named, or all in the folder whose answers are there; --normalize_to must be one of them."""
    models = config.models
    if not models:
        found = models_in(config.data_dir)
        models = [model for model in found if model_file(config.data_dir, model, "points.jsonl").exists()]
        for model in found:
            if model not in models:
                print(
                    f"note: {config.data_dir} has scores of {model} but no answers, so it is left out", file=sys.stderr
                )
    require_same_sampling(points_files(config.data_dir, models))
    choose_baseline(models, config.normalize_to)
    return models


def from_scorer(config: Config) -> Evidence:
    models = models_to_judge(config)
    require_same_scorer(points_files(config.data_dir, models))
    answers = read_answers(config.data_dir, models)
    prompts = choose_prompts(answers, config.max_prompts, config.seed)
    verdicts, missing = scorer_verdicts(answers, prompts)
    return Evidence(models, verdicts, {"judge": "scorer", "missing_scores": missing}, answers)


def from_endpoint(config: Config) -> Evidence | None:
    """Asks for what is missing; None after a dry run. After a signal the process ends once what was under way is kept."""
    judge = config.judge_model or DEFAULT_JUDGE
    models = models_to_judge(config)
    answers = read_answers(config.data_dir, models)
    prompts = choose_prompts(answers, config.max_prompts, config.seed)
    tasks = make_tasks(answers, prompts, judge, config.orders == "both")
    price = find_price(judge, config.price_in, config.price_out)
    path = Path(config.judgments_out)
    if config.dry_run:
        print_plan(config, tasks, read_records(path) if path.exists() else [], judge, price)
        return None
    client = JudgeClient(
        judge,
        base_url=config.base_url,
        timeout=config.timeout,
        temperature=config.temperature,
        max_output_tokens=config.max_output_tokens,
        structured=config.structured,
    )
    settings = LoopSettings(**{field.name: getattr(config, field.name) for field in dataclasses.fields(LoopSettings)})
    with JudgmentStore(path) as store:
        budget = Budget(config.budget, price, total_usage(store.records, judge, price))
        missing = print_plan(config, tasks, store.records, judge, price)
        progress = ask_all(missing, client, store, budget, settings)
        records = store.records
    outcomes = last_outcomes(records, [task.key for task in tasks])
    decided = decided_by_key(records)
    records_used = [decided[task.key] for task in tasks if task.key in decided]
    listed = "".join(f", {outcomes[name]} {name}" for name in (*UNDECIDED, "missing") if outcomes[name])
    print(f"{len(records_used)} of {len(tasks)} judgments have a verdict{listed}")
    options = options_found(records_used)
    for note in temperature_notes(options, config.temperature):
        print(f"note: {note}", file=sys.stderr)
    if client.left_out:
        print(f"note: {client.address} does not take {', '.join(client.left_out)}: left out", file=sys.stderr)
    if progress.signal is not None:
        print("stopped: run the same command again for the rest, then come the ratings", file=sys.stderr)
        raise SystemExit(128 + progress.signal)
    if progress.budget_spent:
        print(f"--budget {config.budget:g} is spent: only what was judged is rated", file=sys.stderr)
    source = {
        "judgments": str(path),
        "judge": judge,
        "served_by": sorted({record["served_by"] for record in records_used if "served_by" in record}),
        "endpoint": client.address,
        "template": TEMPLATE_HASH,
        "options": options,
        "orders": config.orders,
        "outcomes": dict(outcomes),
        "repeated_calls": dict(progress.repeated),
        "usage": total_usage(records, judge, price),
    }
    verdicts = verdicts_of(records_used, config.tie_threshold, path)
    return Evidence(models, verdicts, source, answers, BUDGET_SPENT if progress.budget_spent else 0)


def print_plan(config: Config, tasks: list[Task], records: list[dict], judge: str, price: Price | None) -> list[Task]:
    """Says what is there, what is missing and what that will cost; returns the tasks that are missing."""
    decided = decided_by_key(records)
    missing = [task for task in tasks if task.key not in decided]
    asked = [task for task in missing if task.first_answer != task.second_answer]
    sizes = [
        count_bytes(
            build_messages(task.dimension, task.prompt, task.first_answer, task.second_answer, config.structured)
        )
        for task in asked
    ]
    reply_tokens = mean_reply_tokens(records, judge)
    expected = [expected_usage(size, reply_tokens) for size in sizes]
    worst = [worst_usage(size, config.max_output_tokens) for size in sizes]
    tokens = [sum(usage[name] for usage in expected) for name in ("prompt_tokens", "completion_tokens")]
    same = len(missing) - len(asked)
    ties = f", {same} ties of equal answers" if same else ""
    print(
        f"{len(tasks)} judgments: {len(tasks) - len(missing)} in {config.judgments_out}{ties}, {len(asked)} calls to make"
    )
    print(f"about {tokens[0]:,} prompt tokens and {tokens[1]:,} reply tokens", end="")
    if price:
        likely, most = (sum(map(price.of, usage)) for usage in (expected, worst))
        print(f": ${likely:.2f}, at most ${most:.2f} if no call is repeated", end="")
    before = total_usage(records, judge, price)
    spent = f"; ${before['dollars']:.2f} spent before" if "dollars" in before else ""
    unpriced = f"; not counted: {name_unpriced(before)}" if "without_price" in before else ""
    print(spent + unpriced + ("" if price else "; give --price_in and --price_out to see the cost"))
    return missing


def write_results(config: Config, evidence: Evidence) -> None:
    models, baseline = evidence.models, choose_baseline(evidence.models, config.normalize_to)
    ratings, dimensions = {}, {}
    for dimension in DIMENSIONS:
        verdicts = [one for one in evidence.verdicts if one.dimension == dimension]
        if not verdicts:
            raise UserError(f"no verdict on {dimension}, so nothing to rate; {evidence.source}")
        rated = rate(verdicts, models, baseline, config.rating, config.draws, config.seed, config.k_factor)
        ratings[dimension] = dict(zip(models, rated.ratings.tolist(), strict=True))
        dimensions[dimension] = describe_ratings(rated)
        if config.judge != "scorer":
            dimensions[dimension]["position_bias"] = position_bias(verdicts)
            dimensions[dimension]["agreement_with_scorer"] = agreement(verdicts, evidence.answers)
    method: dict[str, Any] = {"method": config.rating, "baseline": baseline}
    method |= {"k_factor": config.k_factor} if config.rating == "elo" else {"prior_sd": PRIOR_SD}
    if config.judge != "scorer":
        method["tie_threshold"] = config.tie_threshold
    method |= {"interval": "95 %, bootstrap over prompts", "draws": config.draws, "seed": config.seed}
    points = {model: points_hash(rows.values()) for model, rows in evidence.answers.items() if model in models}
    details = {"rating": method, "source": evidence.source | {"points": points}, "dimensions": dimensions}
    assert config.ratings_out and config.plot_out  # Config gave them names
    out = Path(config.ratings_out)
    write_json(out, ratings)
    write_json(details_path(out), details)
    save_figure(draw_ratings(ratings, intervals_of(details), rating=config.rating, baseline=baseline), config.plot_out)
    print_ratings(details)
    print(f"wrote {out}, {details_path(out)}, {config.plot_out}")


if __name__ == "__main__":
    run_main(main)
