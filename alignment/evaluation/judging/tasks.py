"""Which comparisons there are: prompts that all models answered, pairs of models, and the order in which a pair is shown.

A prompt that stands in a file several times counts once, with its last answer, as published. Departures from the published
script: each pair is shown in both orders by default (published: one, drawn at random); the prompts are drawn by a hash of seed
and text (published: a shuffled set, another one in each process), so that a larger --max-prompts contains the smaller one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from alignment.errors import UserError
from alignment.evaluation.judging.prompts import DIMENSIONS, TEMPLATE_HASH
from alignment.evaluation.points import model_file, read_points
from alignment.records import check_text

Answers = dict[str, dict[str, dict]]  # model -> prompt -> row of its points file


@dataclass(frozen=True)
class Task:
    """One question to the judge: `first` is shown as A, `second` as B."""

    dimension: str
    prompt: str
    first: str
    second: str
    first_answer: str
    second_answer: str
    judge: str

    @cached_property
    def answer_hashes(self) -> list[str]:
        return [short_hash(self.first_answer), short_hash(self.second_answer)]

    @cached_property
    def key(self) -> str:
        """Names this judgment among all: prompt, pair and order, dimension, judge, template, and the answers' texts."""
        parts = [self.prompt, self.first, self.second, self.dimension, self.judge, TEMPLATE_HASH, *self.answer_hashes]
        return short_hash(json.dumps(parts), 32)


def short_hash(text: str, digits: int = 16) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:digits]


def points_files(folder: str, models: Sequence[str]) -> list[Path]:
    """The points file of each model. Raises UserError for fewer than two models, a repeated one, or a missing file."""
    if len(models) < 2 or len(set(models)) < len(models):
        raise UserError(f"--models: expected at least two different models, got {', '.join(models) or 'none'}")
    paths = [model_file(folder, model, "points.jsonl") for model in models]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; make it with classify_reward_cost_unified.py, or mend --models")
    return paths


def read_answers(folder: str, models: Sequence[str]) -> Answers:
    points_files(folder, models)
    return answers_there(folder, models)


def answers_there(folder: str, models: Sequence[str]) -> Answers:
    """The answers of those models that have a points file in `folder`."""
    answers: Answers = {}
    for model in models:
        path = model_file(folder, model, "points.jsonl")
        if not path.exists():
            continue
        answers[model] = {}
        for row in read_points(path):
            for key in ("prompt", "response"):
                check_text(row[key], f"{path}: '{key}' of {row['prompt']!r:.40}")
            answers[model][row["prompt"]] = row
    return answers


def points_hash(rows: Iterable[dict]) -> str:
    """Of a model's answers and scores, prompts in any order: ratings and points with different ones do not belong together."""
    told = sorted(json.dumps([row[key] for key in ("prompt", "response", "reward", "cost")]) for row in rows)
    return short_hash("\n".join(told))


def choose_prompts(answers: Answers, max_prompts: int, seed: int) -> list[str]:
    """Prompts that every model answered, in the order of the draw; `max_prompts` of them, or all if it is not above 0."""
    common = set.intersection(*(set(rows) for rows in answers.values()))
    if not common:
        raise UserError(f"no prompt was answered by all of {', '.join(answers)}; classify them on the same prompts")
    drawn = sorted(common, key=lambda prompt: short_hash(f"{seed} {prompt}", 64))
    return drawn[:max_prompts] if max_prompts > 0 else drawn


def make_tasks(answers: Answers, prompts: Sequence[str], judge: str, both_orders: bool) -> list[Task]:
    """All comparisons, prompt after prompt, so that a run that is stopped early leaves whole prompts behind."""
    tasks = []
    pairs = list(itertools.combinations(sorted(answers), 2))
    for prompt, dimension, pair in itertools.product(prompts, DIMENSIONS, pairs):
        orders = [pair, pair[::-1]]
        if not both_orders:
            orders = [orders[int(short_hash(json.dumps([prompt, dimension, *pair]), 8), 16) % 2]]
        for first, second in orders:
            texts = (answers[first][prompt]["response"], answers[second][prompt]["response"])
            tasks.append(Task(dimension, prompt, first, second, *texts, judge))
    return tasks
