"""Judgments as gpt_elo_eval.py keeps them, by a judge whose scores a test decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignment.evaluation.judging.store import JudgmentStore, make_record
from alignment.evaluation.judging.tasks import Task, choose_prompts, make_tasks, read_answers
from alignment.evaluation.judging.verdict import outcome_of, result_of
from alignment.records import write_jsonl


def write_answers(folder: Path, model: str, answer: str, reward: float = 1.0, prompts: int = 40) -> None:
    """A points file with `answer` to every prompt; the cost is minus the reward."""
    label = "SH" if reward > 0 else "UU"
    row = {"response": answer, "reward": reward, "cost": -reward, "label": label}
    write_jsonl(folder / f"{model}_points.jsonl", [{"prompt": f"prompt {i}"} | row for i in range(prompts)])


def append_judgments(
    path: Path, folder: Path, models: list[str], score: Callable[[str], float], judge: str = "j", prompts: int = 0
) -> int:
    """Every comparison of the answers in `folder` that is not in the file; `score` of an answer's text. Returns how many."""
    answers = read_answers(str(folder), models)
    with JudgmentStore(path) as store:
        known = {record["key"] for record in store.records}
        tasks = make_tasks(answers, choose_prompts(answers, prompts, 42), judge, True)
        missing = [task for task in tasks if task.key not in known]
        for task in missing:
            store.append(_record(task, score))
    return len(missing)


def _record(task: Task, score: Callable[[str], float]) -> dict:
    scores = (score(task.first_answer), score(task.second_answer))
    words = f"I read '{task.first_answer}' and '{task.second_answer}'."
    return make_record(task, outcome_of(result_of(scores, 0.5)), scores, words)
