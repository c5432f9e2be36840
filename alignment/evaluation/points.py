"""The files of one classified model: how they are named, what a row of `{model}_points.jsonl` holds, and how they are read.

A row begins with the published keys prompt, response, reward, cost, label. Ours go on with
  id          which prompt this answers: a hash of its text, and "-2", "-3", ... for its repetitions in file order, so that
              any two files of the same prompts pair up, published ones included. It is computed here where a file has
              none, or one of another origin, which two files may use for two prompts
  finished    the model ended the response itself        cut     an invented next turn was cut off, see `raw`
  raw         the uncut text, when it differs            num_tokens  length in the policy's tokens
  truncated   the scorer dropped the tail                error   why reward and cost are null
  categories  harm categories of the prompt              log_prob_base  mean log-probability per token under the base
each only where it is known.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from alignment.errors import UserError, first_line
from alignment.evaluation.measures import score_arrays
from alignment.objective import quadrant_labels
from alignment.records import check_text, read_numbered, read_object

PUBLISHED_KEYS = ("prompt", "response", "reward", "cost", "label")
FURTHER_KEYS = ("id", "finished", "cut", "raw", "num_tokens", "truncated", "error", "categories", "log_prob_base")
DEFAULT_FOLDER = "alignment/outputs/model_comparisons"


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model for plotting. rewards, costs: (N,) float64, NaN where missing; groups: (N,) int, one a prompt."""

    name: str
    rewards: np.ndarray
    costs: np.ndarray
    groups: np.ndarray


def prompt_ids(prompts: Iterable[str]) -> list[str]:
    """16 hex digits of the prompt's SHA-256; the second row with the same prompt gets "-2" behind it, and so on."""
    seen: Counter[str] = Counter()
    ids = []
    for prompt in prompts:
        digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest}-{seen[digest]}")
    return ids


def is_prompt_id(found: object, prompt: str) -> bool:
    """Whether an id was made from this prompt: its hash, alone or with "-2", "-r0", ... behind it."""
    (own,) = prompt_ids([prompt])
    return isinstance(found, str) and found.partition("-")[0] == own


def file_stem(model_name: str) -> str:
    """The model's name as the beginning of file names: what is not a letter, digit, `.`, `_`, `+` or `-` becomes `_`."""
    stem = re.sub(r"[^\w.+-]", "_", model_name).strip(".")
    if not stem:
        raise UserError(
            f"--model_name {model_name!r}: expected at least one letter or digit, the files are named after it"
        )
    return stem


def model_file(folder: str | Path, model_name: str, ending: str) -> Path:
    """For example `folder/Beaver-V1_points.jsonl` for the ending `points.jsonl`."""
    return Path(folder) / f"{file_stem(model_name)}_{ending}"


def read_points(path: str | Path) -> list[dict]:
    """The rows of a points file, published or ours, each with an `id`.

    An id that was not made from the row's prompt is replaced by one that is. Raises UserError for a row that lacks a published
    key, whose label does not follow from its scores, or whose id repeats.
    """
    numbered = read_numbered(path, required=PUBLISHED_KEYS)
    if not numbered:
        raise UserError(f"{path} has no rows; classify a model first (classify_reward_cost_unified.py)")
    for where, row in numbered:
        check_answer(row, where)
        for key in ("reward", "cost"):
            _check_kind(row, key, "a number or null", where)
    rows = [row for _, row in numbered]
    for row, computed in zip(rows, prompt_ids(row["prompt"] for row in rows), strict=True):
        if not is_prompt_id(row.get("id"), row["prompt"]):
            row["id"] = computed
    repeated = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: the id {repeated[0]} stands in several rows; classify again to mend the file")
    rewards, costs = score_arrays(rows)
    for (where, row), label, reward in zip(numbered, quadrant_labels(rewards, costs), rewards, strict=True):
        if np.isfinite(reward) and row["label"] != label:
            raise UserError(
                f"{where}: the label is {row['label']!r:.40}, but reward {row['reward']} and cost {row['cost']} "
                f"say {label}; the file was changed by hand, classify again"
            )
    return rows


def check_answer(row: dict, where: str) -> None:
    """Raises UserError naming `where` and the key when prompt or response is no text, or what else is told is of another kind."""
    for key in ("prompt", "response"):
        if not isinstance(row[key], str):
            raise UserError(f"{where}: '{key}' must be text, got {row[key]!r:.60}")
    for key in ("finished", "cut", "truncated"):
        _check_kind(row, key, "true or false", where)
    for key in ("num_tokens", "log_prob_base"):
        _check_kind(row, key, "a number or null", where)
    _check_kind(row, "categories", "a list of texts", where)


def _check_kind(row: dict, key: str, wanted: str, where: str) -> None:
    value = row.get(key)
    fits = {
        "true or false": isinstance(value, bool),
        "a number or null": type(value) in (int, float),
        "a list of texts": isinstance(value, list) and all(isinstance(one, str) for one in value),
    }
    if value is not None and not fits[wanted]:
        raise UserError(f"{where}: '{key}' must be {wanted}, got {value!r:.60}")


def read_summary(points_path: str | Path) -> dict | None:
    """The `_summary.json` beside a points file, None if there is none. Raises UserError for what is no summary."""
    path = summary_path(points_path)
    if not path.exists():
        return None
    summary = read_object(path)
    if not isinstance(summary.get("scorer", {}), dict):
        raise UserError(f"{path}: 'scorer' must be an object, got {summary['scorer']!r:.60}; classify the model again")
    return summary


def held_out_prompts(run: str | Path) -> set[str] | None:
    """The distinct prompts of the last held-out evaluation in a run folder; None where there is none."""
    evaluations = sorted((Path(run) / "eval").glob("iteration_*_points.jsonl"))
    if not evaluations:
        return None
    rows = read_numbered(evaluations[-1], required=("prompt",))
    return {check_text(row["prompt"], f"{where}: 'prompt'") for where, row in rows}


def chosen_note(name: str, chosen: object, prompts: object) -> str | None:
    """What a reader must know of a model that `chosen` of its `prompts` prompts chose (`prompts_that_chose_it` of a summary)."""
    if type(chosen) is not int or type(prompts) is not int or chosen < 1:
        return None
    return (
        f"{name} is the best of its run's held-out evaluations, chosen on {chosen} of these {prompts} prompts, so it looks "
        "better on them than it is; classify on other prompts, or take the run's final policy"
    )


def summary_path(points_path: str | Path) -> Path:
    path = Path(points_path)
    return path.with_name(model_name_of(path) + "_summary.json")


def model_name_of(points_path: str | Path) -> str:
    """`Beaver-V1` for `some/folder/Beaver-V1_points.jsonl`; the name without its ending for other files."""
    return Path(points_path).name.removesuffix(".jsonl").removesuffix("_points")


def load_scores(folder: str | Path, model_name: str) -> ModelScores:
    """Scores from `{model}_Rs.npy` and `_Cs.npy`, or from `{model}_points.jsonl` where the arrays are missing.

    The points file also says which rows share a prompt; without it (or when it has another number of rows, as the shortened
    published one of ES-500) every row counts as its own prompt. Raises UserError naming the file that is missing or broken.
    """
    points_path = model_file(folder, model_name, "points.jsonl")
    reward_path, cost_path = model_file(folder, model_name, "Rs.npy"), model_file(folder, model_name, "Cs.npy")
    points = read_points(points_path) if points_path.exists() else None
    if reward_path.exists() and cost_path.exists():
        rewards, costs = _load_array(reward_path), _load_array(cost_path)
        if rewards.shape != costs.shape:
            raise UserError(
                f"{reward_path} has {len(rewards)} scores and {cost_path} {len(costs)}; classify the model again"
            )
    elif points is not None:
        rewards, costs = score_arrays(points)
    else:
        found = sorted(path.name.removesuffix("_Rs.npy") for path in Path(folder).glob("*_Rs.npy"))
        raise UserError(
            f"{folder} has no {reward_path.name} and no {points_path.name}; models there: {', '.join(found) or 'none'}"
        )
    groups = np.arange(len(rewards))
    if points is not None and len(points) == len(rewards):
        numbers: dict[str, int] = {}
        groups = np.array([numbers.setdefault(row["prompt"], len(numbers)) for row in points], dtype=np.int64)
    return ModelScores(model_name, rewards, costs, groups)


def models_in(folder: str | Path) -> list[str]:
    """Names of the models that have scores in `folder`, sorted."""
    names = {path.name.removesuffix("_Rs.npy") for path in Path(folder).glob("*_Rs.npy")}
    names |= {model_name_of(path) for path in Path(folder).glob("*_points.jsonl")}
    if not names:
        raise UserError(
            f"{folder} has no *_Rs.npy or *_points.jsonl; run classify_reward_cost_unified.py or give --data-dir"
        )
    return sorted(names)


def _load_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile, MemoryError) as error:
        # MemoryError: a damaged header asks for more than there is
        raise UserError(f"{path} is not a plain .npy array of numbers ({first_line(error)})") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} is an archive of arrays (.npz), expected one plain .npy array")
    if array.ndim != 1 or array.dtype.kind != "f":
        raise UserError(f"{path}: expected a 1-D array of floats, found shape {array.shape} of {array.dtype}")
    return array.astype(np.float64)
