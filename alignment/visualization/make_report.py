"""One HTML file to explore all results with: answers, scores, quadrants, training, ratings. It needs no network.

    python alignment/visualization/make_report.py --data-dir alignment/outputs/model_comparisons --runs runs/es_a runs/grpo_b \\
        --judgments alignment/outputs/gpt_elo/gpt_judgments.jsonl --output alignment/outputs/report.html

Draws what is there and names what is missing: models (`{model}_points.jsonl`, `_Rs.npy`, `_Cs.npy`), runs (`metrics.jsonl`),
ratings and judgments of gpt_elo_eval.py. Every text stands in the file as data and is never run (report/page.py); prompts and
unsafe answers are folded until a reader clicks. The same inputs and command give the same file, byte for byte.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex, to_rgb

from alignment.config import load_config, setting
from alignment.errors import UserError, run_main
from alignment.evaluation.compare_models import comparison_table, sampling_difference, sampling_of, scorer_of
from alignment.evaluation.measures import MEASURES
from alignment.evaluation.points import DEFAULT_FOLDER, model_file, models_in, prompt_ids
from alignment.records import atomic_open, check_writable_file
from alignment.scoring.scores import difference, same_scorer
from alignment.visualization.inputs import has_scores
from alignment.visualization.report import answers, judge
from alignment.visualization.report.answers import ModelAnswers
from alignment.visualization.report.curves import curves
from alignment.visualization.report.page import page
from alignment.visualization.style import OTHER_COLOURS, model_colours
from alignment.visualization.training_runs import Run, load_runs

RATINGS = "alignment/outputs/gpt_elo/gpt_elo_ratings.json"
JUDGMENTS = "alignment/outputs/gpt_elo/gpt_judgments.jsonl"
RUN_FILES = ("manifest.json", "config.yaml", "starts.jsonl")


@dataclass
class Config:
    data_dir: str = setting(DEFAULT_FOLDER, "folder with the files of the classified models")
    models: list[str] = setting(
        [], "models, in this order; others are compared with the first (default: all in the folder)"
    )
    runs: list[str] = setting([], "run folders, for the training curves")
    labels: list[str] = setting([], "one a run; runs of one label are drawn as a band")
    ratings: str | None = setting(
        None, f"ratings file of gpt_elo_eval.py (default: {RATINGS}, if --data-dir is not given)"
    )
    judgments: str | None = setting(None, f"judgments file of gpt_elo_eval.py (default: {JUDGMENTS}, likewise)")
    judge_model: str | None = setting(None, "of several judges in the judgments file, this one (default: the ratings')")
    template: str | None = setting(None, "of several wordings of the judge prompts, the one with this hash (likewise)")
    lambda_cost: float = setting(1.0, "lambda of the objective E[R - lambda C]", minimum=0.0)
    title: str = setting("Alignment report", "head of the page")
    output: str = setting("alignment/outputs/report.html", "where the page is written")

    def __post_init__(self) -> None:
        if Path(self.output).suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--output {self.output}: the report's name must end in .html")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    config = load_config(Config, argv, prog="make_report.py", description=__doc__)
    check_writable_file(config.output)
    command = shlex.join(["python", "alignment/visualization/make_report.py", *argv])
    data, texts = collect(config, command)
    with atomic_open(config.output) as file:
        file.write(page(config.title, data, texts))
    for note in data["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(config.output)


def collect(config: Config, command: str) -> tuple[dict, dict]:
    """All that the page shows: (data, texts), JSON values. js/store.js reads them."""
    notes: list[str] = []
    models = load_all(config, notes)
    runs = load_runs(config.runs, config.labels)
    ratings_file, judgments_file = (
        _given(path, default, config.data_dir)
        for path, default in ((config.ratings, RATINGS), (config.judgments, JUDGMENTS))
    )
    rated = judge.read_ratings(ratings_file, models, notes) if ratings_file else None
    judged = judge.Judged([])
    if judgments_file:
        judged = judge.read_verdicts(
            judgments_file,
            models,
            config.data_dir,
            only=config.models,
            judge=config.judge_model,
            template=config.template,
            rated=rated,
            notes=notes,
        )
    ratings = judge.ratings(rated, judged, models)
    disagreements = judge.disagreements(judged.verdicts, models)
    names_rated = [name for part in (ratings or {"dimensions": {}})["dimensions"].values() for name in part["ratings"]]
    names = [model.name for model in models]
    colours = model_colours([*names, *names_rated, *(run.label for run in runs)])

    scores, texts = answers.columns(models)
    places = {one: number for number, one in enumerate(prompt_ids(texts["prompts"]))}
    for part in disagreements.values():
        for row in part["rows"]:
            row["prompt"] = places[row["prompt"]]
    data = {
        **scores,
        "flags": answers.FLAGS,
        "lambda_cost": config.lambda_cost,
        "models": [
            {
                "name": model.name,
                "colour": colours[model.name],
                "colour_dark": on_dark(colours[model.name]),
                "rows": len(model.scores.rewards),
                "unscored": answers.unscored(model),
                "estimates": answers.estimates(model, config.lambda_cost),
            }
            for model in models
        ],
        "colours": {name: [colour, on_dark(colour)] for name, colour in colours.items()},
        "palette": [[colour, on_dark(colour)] for colour in OTHER_COLOURS],
        "measures": [{"key": key, "label": label, "unit": unit} for key, (label, unit) in MEASURES.items()],
        "comparisons": comparisons(models, config.lambda_cost, notes),
        "curves": curves(runs),
        "ratings": ratings,
        "disagreements": disagreements,
        "provenance": provenance(config, models, runs, command),
        "notes": notes,
    }
    return data, texts


def load_all(config: Config, notes: list[str]) -> list[ModelAnswers]:
    """The models that are there. Raises UserError when none is; what is missing or does not fit together becomes a note."""
    models = []
    for name in dict.fromkeys(config.models or models_in(config.data_dir)):
        if not has_scores(config.data_dir, name):
            notes.append(f"{name} is missing: {config.data_dir} has no scores of it.")
            continue
        model = answers.load_answers(config.data_dir, name)
        models.append(model)
        rows, points = len(model.scores.rewards), len(model.points)
        if points < rows:
            notes.append(
                f"{name}: texts of {points:,} of {rows:,} answers are saved; the others are points without text."
            )
    if not models:
        raise UserError(
            f"{config.data_dir} has none of the models {', '.join(config.models)}; see --models and --data-dir"
        )
    scorers = [(model.name, scorer_of(model_file(config.data_dir, model.name, "points.jsonl"))) for model in models]
    known = [(name, scorer) for name, scorer in scorers if scorer is not None]
    for name, scorer in known[1:]:
        if not same_scorer(known[0][1], scorer):
            notes.append(
                f"{known[0][0]} and {name} were scored differently and do not compare: {difference(known[0][1], scorer)}."
            )
    answered = [(model.name, sampling_of(model_file(config.data_dir, model.name, "points.jsonl"))) for model in models]
    made = [(name, sampling) for name, sampling in answered if sampling is not None]
    for name, sampling in made[1:]:
        if changed := sampling_difference(made[0][1], sampling):
            notes.append(f"{made[0][0]} and {name} were sampled differently and do not compare: {changed}.")
    return models


def comparisons(models: Sequence[ModelAnswers], lambda_cost: float, notes: list[str]) -> list[dict]:
    """Every model against the first, paired by prompt; a note where there is nothing to pair."""
    found = []
    for model in models[1:]:
        try:
            table = comparison_table(models[0].points, model.points, lambda_cost)
        except UserError as error:
            notes.append(f"{model.name} is not compared with {models[0].name}: {error}.")
            continue
        found.append({"before": models[0].name, "after": model.name, "table": table})
    return found


def provenance(config: Config, models: Sequence[ModelAnswers], runs: Sequence[Run], command: str) -> list[dict]:
    """Titles and texts: this command and its versions, each model's summary, each run's manifest, settings and later starts."""
    versions = "\n".join(f"{name} {version(name)}" for name in ("bokeh", "matplotlib", "numpy"))
    parts = [{"title": "this report", "text": f"{command}\n\n{versions}"}]
    for model in models:
        path = model_file(config.data_dir, model.name, "summary.json")
        if path.exists():
            parts.append({"title": f"{model.name}: {path}", "text": path.read_text(encoding="utf-8", errors="replace")})
    for run in runs:
        for path in (run.folder / name for name in RUN_FILES):
            if path.exists():
                parts.append(
                    {"title": f"{run.name}: {path}", "text": path.read_text(encoding="utf-8", errors="replace")}
                )
    return parts


def on_dark(colour: str) -> str:
    """The colour, or as much lighter as it must be to stand out from a dark page."""
    rgb = np.array(to_rgb(colour))
    for white in np.linspace(0.0, 0.9, 19):
        mixed = rgb + white * (1.0 - rgb)
        if mixed @ (0.2126, 0.7152, 0.0722) >= 0.38:
            break
    return to_hex(mixed)


def _given(path: str | None, default: str, data_dir: str) -> Path | None:
    """The file that was named, or the usual one: it judges the usual folder's answers and no others."""
    if path is not None:
        return Path(path)
    return Path(default) if data_dir == DEFAULT_FOLDER and Path(default).exists() else None


if __name__ == "__main__":
    run_main(main)
