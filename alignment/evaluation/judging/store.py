"""The judgments file: one line a paid reply or a final failure, on disk before the next question is asked.

A line has the published keys model_a, model_b (A and B as shown), dimension, question, scores, order_ab, raw, and ours:
  key      names the judgment (tasks.py)      outcome  win, loss, tie (for A), refused, unparsed, failed
  judge, template, answers                    what the key was made of      options  what the endpoint was asked with
  usage, served_by, finish_reason, error, time
A key is decided once it has a win, loss or tie; the first one counts. Everything else is asked again by the next run.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from alignment.errors import UserError
from alignment.evaluation.judging.prompts import DIMENSIONS, TEMPLATE_HASH
from alignment.evaluation.judging.tasks import Answers, Task, short_hash
from alignment.evaluation.judging.verdict import TIE, Verdict, result_of
from alignment.records import JsonlWriter, read_numbered

DECIDED = ("win", "loss", "tie")
UNDECIDED = ("refused", "unparsed", "failed")
TOKEN_COUNTS = ("prompt_tokens", "completion_tokens")
COMPARISON = ("question", "model_a", "model_b", "dimension")
PUBLISHED_KEYS = (*COMPARISON, "scores")


class UnclearJudgments(UserError):
    """Which of a file's judgments count is not clear, or none does."""


class JudgmentStore:
    """The judgments file, open for appending, by one process at a time. Use as a context manager."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path, "ab")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; check folder and permissions") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(
                f"{path} is being written by another run; wait for it, or give another --judgments-out"
            ) from error
        except OSError:
            pass  # a file system without locks
        self._writer = JsonlWriter(self.path)  # only now: it mends a torn last line
        self.records = read_records(self.path)

    def append(self, record: dict) -> None:
        self._writer.append(record)
        self.records.append(record)

    def close(self) -> None:
        self._writer.close()
        self._lock.close()

    def __enter__(self) -> JudgmentStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: str | Path, required: Iterable[str] = ()) -> list[dict]:
    """The lines of a judgments file. Raises UserError for one of ours (with a key) that does not say how it ended."""
    rows = read_numbered(path, required)
    for where, row in rows:
        for name in COMPARISON:
            if not isinstance(row.get(name, ""), str):
                raise UserError(f"{where}: '{name}' must be text, got {row[name]!r:.60}")
        if "key" not in row:
            continue
        if not isinstance(row["key"], str):
            raise UserError(f"{where}: 'key' must be text, got {row['key']!r:.60}; remove the line, it is asked again")
        if row.get("outcome") not in (*DECIDED, *UNDECIDED):
            raise UserError(
                f"{where}: 'outcome' must be one of {', '.join((*DECIDED, *UNDECIDED))}, got {row.get('outcome')!r:.60}; "
                "remove the line, it is asked again"
            )
        hashes = row.get("answers", ["", ""])
        if not isinstance(hashes, list) or [type(one) for one in hashes] != [str, str]:
            raise UserError(
                f"{where}: 'answers' must be two texts, got {hashes!r:.60}; remove the line, it is asked again"
            )
        if not isinstance(row.get("options", {}), dict):
            raise UserError(f"{where}: 'options' must be an object, got {row['options']!r:.60}")
        usage = row.get("usage") or dict.fromkeys(TOKEN_COUNTS, 0)
        if not isinstance(usage, dict) or any(type(usage.get(name)) is not int for name in TOKEN_COUNTS):
            raise UserError(
                f"{where}: 'usage' must have whole numbers as {' and '.join(TOKEN_COUNTS)}, got {usage!r:.60}"
            )
    return [row for _, row in rows]


def make_record(task: Task, outcome: str, scores: tuple[float, float] | None, raw: str, **more: Any) -> dict:
    """A line of the file; `more` is what is known of the reply, without what is None."""
    record = {
        "model_a": task.first,
        "model_b": task.second,
        "dimension": task.dimension,
        "question": task.prompt,
        "scores": list(scores) if scores else None,
        "order_ab": [task.first, task.second],
        "raw": raw,
        "key": task.key,
        "outcome": outcome,
        "judge": task.judge,
        "template": TEMPLATE_HASH,
        "answers": task.answer_hashes,
    }
    more["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return record | {name: value for name, value in more.items() if value is not None}


def decided_by_key(records: Iterable[dict]) -> dict[str, dict]:
    """key -> its first record with a verdict."""
    decided: dict[str, dict] = {}
    for record in records:
        if "key" in record and record.get("outcome") in DECIDED:
            decided.setdefault(record["key"], record)
    return decided


def last_outcomes(records: Iterable[dict], keys: Iterable[str]) -> Counter:
    """How the judgments named by `keys` stand: win, loss, tie, else their last outcome, else missing."""
    records, wanted = list(records), list(keys)
    last = {record["key"]: record["outcome"] for record in records if "key" in record}
    last |= {key: record["outcome"] for key, record in decided_by_key(records).items()}
    return Counter(last.get(key, "missing") for key in wanted)


def options_found(records: Iterable[dict]) -> list[dict]:
    """With which options the records that were asked for were asked, each with its count; None where a record does not say."""
    asked = [record for record in records if record.get("scores") is not None]
    counts = Counter(json.dumps(record.get("options"), sort_keys=True) for record in asked)
    return [{"options": json.loads(options), "judgments": count} for options, count in counts.most_common()]


def verdict_of(record: dict, tie_threshold: float, where: object) -> Verdict:
    """A record with scores, or one that is a tie without scores. Raises UserError naming `where` for anything else."""
    scores, names = record["scores"], (record["model_a"], record["model_b"], record["question"])
    numbers = isinstance(scores, list) and len(scores) == 2 and all(type(score) in (int, float) for score in scores)
    if not (numbers or scores is None) or not all(isinstance(name, str) for name in names) or names[0] == names[1]:
        raise UserError(
            f"{where}: expected two models, a question and two scores or null, got {names} and {scores!r:.60}"
        )
    if record["dimension"] not in DIMENSIONS:
        raise UserError(f"{where}: the dimension {record['dimension']!r} is not one of {', '.join(DIMENSIONS)}")
    scores = (float(scores[0]), float(scores[1])) if scores else None
    result = result_of(scores, tie_threshold) if scores else TIE
    # Published lines, which have no key, say with null scores that the reply was not understood.
    asked = scores is not None or "key" not in record
    return Verdict(
        record["dimension"], names[2], names[0], names[1], result, scores, asked, str(record.get("raw") or "")
    )


def verdicts_of(records: Iterable[dict], tie_threshold: float, where: object) -> list[Verdict]:
    """Verdicts in an order that does not depend on when they came (sequential ELO depends on the order)."""
    verdicts = [verdict_of(record, tie_threshold, where) for record in records]
    return sorted(verdicts, key=lambda one: (one.prompt, *sorted((one.first, one.second)), one.first))


def models_and_judges(path: str | Path) -> tuple[list[str], list[tuple[Any, Any]]]:
    """The models that a judgments file names, each once, and judge and template of every line of ours."""
    rows = read_records(path, required=PUBLISHED_KEYS)
    names = dict.fromkeys(row[side] for row in rows for side in ("model_a", "model_b") if isinstance(row[side], str))
    return list(names), [(row.get("judge"), row.get("template")) for row in rows if "key" in row]


def read_judgments(
    path: str | Path,
    models: Sequence[str],
    judge: str | None,
    template: str | None,
    tie_threshold: float,
    unscored: str,
    answers: Answers | None = None,
) -> tuple[list[Verdict], dict]:
    """Verdicts of an existing file, the published format included, and what is to be told about them.

    Published lines (no key) keep their order and count one by one; one without scores is a tie, as published, or left out
    (`unscored`: "tie" or "skip"). Of our lines each comparison counts once, and only on the answers that the points files hold,
    as far as `answers` has them. Raises UnclearJudgments when the file mixes the judgments of several judges or templates, and
    `judge` and `template` do not choose, or those of several answers of a model without points.
    """
    rows = read_records(path, required=PUBLISHED_KEYS)
    if models:
        rows = [row for row in rows if row["model_a"] in models and row["model_b"] in models]
    if not rows:
        raise UnclearJudgments(f"{path} has no judgment{' between models of ' + ', '.join(models) if models else ''}")
    kinds = Counter(_kind(row) for row in rows)
    chosen = judge is not None or template is not None  # published lines do not say who judged
    ours = [row for row in rows if "key" in row]
    ours = [row for row in ours if judge in (None, row.get("judge")) and template in (None, row.get("template"))]
    published = [] if chosen else [row for row in rows if "key" not in row]
    found = ", ".join(f"{kind}: {count}" for kind, count in kinds.items())
    if chosen and not ours:
        flags = {"--judge_model": judge, "--template": template}
        wanted = " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)
        raise UserError(f"{path} has no judgment of {wanted}; it holds {found}")
    kinds = Counter(_kind(row) for row in [*ours, *published])
    if len(kinds) != 1:
        raise UnclearJudgments(
            f"{path}: expected the judgments of one judge and template, found {found}; choose with --judge_model and --template"
        )
    told: dict[str, Any] = {"kind": next(iter(kinds)), "lines": len(rows)}
    if published:
        without = sum(row["scores"] is None for row in published)
        told |= {"without_scores": without, "without_scores_count_as": "tie" if unscored == "tie" else "nothing"}
        kept = [row for row in published if row["scores"] is not None or unscored == "tie"]
        return [verdict_of(row, tie_threshold, path) for row in kept], told
    told |= {"judge": ours[0].get("judge"), "template": ours[0].get("template")}
    current = _on_current_answers(ours, answers or {}, path)
    decided = list(decided_by_key(current).values())
    others = len(decided_by_key(ours)) - len(decided)
    if others and not decided:
        raise UnclearJudgments(
            f"{path}: all {others} verdicts are on other answers than the points files hold; judge the new answers, or give the "
            "--data-dir of the old ones"
        )
    latest = {tuple(row[key] for key in COMPARISON): row for row in decided}
    told |= {"on_other_answers": others, "superseded": len(decided) - len(latest)}
    told["outcomes"] = dict(last_outcomes(current, {row["key"] for row in current}))
    told["options"] = options_found(latest.values())
    return verdicts_of(latest.values(), tie_threshold, path), told


def _kind(row: dict) -> str:
    return f"{row.get('judge')} (template {row.get('template')})" if "key" in row else "published format"


def _on_current_answers(rows: Sequence[dict], answers: Answers, path: str | Path) -> list[dict]:
    """Our lines without those on answers that the points files no longer hold: a judgment is of texts, not of names.

    A model without points may have one answer to a prompt, since nothing says which of several counts.
    """
    hashes = {
        (model, prompt): short_hash(row["response"]) for model, own in answers.items() for prompt, row in own.items()
    }
    kept, unknown = [], defaultdict[tuple[str, str], set[str]](set)
    for row in rows:
        sides = list(zip((row["model_a"], row["model_b"]), row.get("answers", ()), strict=False))
        if any(model in answers and hashes.get((model, row["question"])) != one for model, one in sides):
            continue
        kept.append(row)
        for model, one in sides:
            if model not in answers and row["outcome"] in DECIDED:
                unknown[model, row["question"]].add(one)
    several = sorted({model for (model, _), found in unknown.items() if len(found) > 1})
    if several:
        raise UnclearJudgments(
            f"{path} judges several answers of {', '.join(several)} to one prompt, and no points file says which count; give the "
            "--data-dir that has them, or leave them out with --models"
        )
    return kept
