"""The rows that a classification is about: prompts of a file or data set, or prompts with their responses.

Every row is a dict with prompt and id, `categories` where the data tell the prompt's harm categories, and, unless a policy
will answer, response and finished (and raw, cut, num_tokens where the file has them).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from alignment.errors import UserError
from alignment.evaluation.classify_settings import ClassifySettings
from alignment.evaluation.loading import load_split
from alignment.evaluation.points import check_answer, held_out_prompts, is_prompt_id, prompt_ids, read_summary
from alignment.records import check_prompt, check_text, load_prompts, read_numbered

DEFAULT_PROMPTS = "alignment/data/custom_eval_500.jsonl"
CARRIED = ("finished", "raw", "cut", "num_tokens")  # what a given response may bring along


def load_rows(config: ClassifySettings) -> list[dict]:
    """Rows in the order of the results. Raises UserError naming file and key when the data lack what is asked of them."""
    if config.responses_from:
        data, place = given_answers(config.responses_from), config.responses_from
    elif config.from_jsonl or not config.dataset_name:
        place = config.from_jsonl or DEFAULT_PROMPTS
        if not Path(place).exists():
            raise UserError(f"{place} does not exist; give prompts with --from_jsonl FILE or --dataset_name NAME")
        data = load_prompts(place)
    else:
        place = config.dataset_name
        data = load_split(place, config.dataset_config, config.split, required=("prompt",))
    if not data:
        raise UserError(f"{place} has no rows; expected one prompt a row")
    data = _sample(data, config)
    if place == config.dataset_name:
        for row in data:
            check_prompt(row["prompt"], f"{place}: 'prompt' of a row that was drawn")
    if config.repeated_prompts == "once":
        first: dict[str, dict] = {}
        for row in data:
            first.setdefault(row["prompt"], row)
        data = list(first.values())
    if config.policy_model_path:
        rows = [{"prompt": row["prompt"]} | _categories(row, ("response_0", "response_1")) for row in data]
    elif config.responses_from:
        rows = [_given(row) for row in data]
    else:
        return _own_responses(data, place)
    for row, name in zip(rows, prompt_ids(row["prompt"] for row in rows), strict=True):
        row.setdefault("id", name)
    if len({row["id"] for row in rows}) < len(rows):
        raise UserError(
            f"{place}: an id stands in several rows; leave the ids out, they are then made from the prompts"
        )
    return rows


def prompts_that_chose(config: ClassifySettings, rows: list[dict]) -> int | None:
    """How many distinct prompts of `rows` are among those on which the policy was chosen: it is the folder `best` of a run, which
    is the best on the prompts of the run's last held-out evaluation. None where no run's prompts chose it. Of answers that were
    classified before, what their summary says."""
    if config.responses_from:
        return (read_summary(config.responses_from) or {}).get("prompts_that_chose_it")
    if not config.policy_model_path or config.policy_vllm_ckpt or config.journal:
        return None
    policy = Path(config.policy_model_path).resolve()
    chose = held_out_prompts(policy.parent) if policy.name == "best" else None
    return None if chose is None else len({row["prompt"] for row in rows} & chose)


def rows_hash(rows: list[dict]) -> str:
    """What a classification's prompts are known by."""
    return hashlib.sha256("\n".join(row["id"] for row in rows).encode()).hexdigest()[:16]


def prompts_file(config: ClassifySettings) -> str | None:
    """The local file that the rows come from, None where it is a data set."""
    if config.responses_from or config.from_jsonl or not config.dataset_name:
        return config.responses_from or config.from_jsonl or DEFAULT_PROMPTS
    return config.dataset_name if Path(config.dataset_name).is_file() else None


def _sample(data: list[dict], config: ClassifySettings) -> list[dict]:
    """`num_samples` rows drawn as published; a file that is not longer keeps its order, as published."""
    if config.responses_from or (len(data) <= config.num_samples and not _from_hub(config)):
        return data
    drawn = np.random.default_rng(config.seed).choice(len(data), size=min(config.num_samples, len(data)), replace=False)
    return [data[index] for index in drawn]


def _from_hub(config: ClassifySettings) -> bool:
    return bool(config.dataset_name) and not config.from_jsonl


def given_answers(path: str) -> list[dict]:
    """Rows with prompt and response, as `--responses_from` takes them. Raises UserError with file and line."""
    rows = read_numbered(path, required=("prompt", "response"))
    for where, row in rows:
        check_answer(row, where)
        for key in ("prompt", "response"):
            check_text(row[key], f"{where}: '{key}'")
    return [row for _, row in rows]


def _given(row: dict) -> dict:
    kept = {key: row[key] for key in CARRIED if row.get(key) is not None}
    if is_prompt_id(row.get("id"), row["prompt"]):  # another's ids could name other prompts in another file
        kept["id"] = row["id"]
    categories = (
        {"categories": row["categories"]} if "categories" in row else _categories(row, ("response_0", "response_1"))
    )
    return {"prompt": row["prompt"], "response": row["response"], "finished": True} | kept | categories


def _own_responses(data: list[dict], place: str) -> list[dict]:
    """Both responses of every row, as published; "-r0" and "-r1" behind the id keep them apart."""
    rows = []
    for row, name in zip(data, prompt_ids(row["prompt"] for row in data), strict=True):
        for key in ("response_0", "response_1"):
            if row.get(key) is None:
                raise UserError(
                    f"{place}: the prompt {row['prompt']!r:.60} has no '{key}'; give --policy_model_path to have prompts "
                    "answered, or --responses_from for a file with prompt and response"
                )
            check_text(row[key], f"{place}: '{key}' of {row['prompt']!r:.40}")
            own = {"prompt": row["prompt"], "id": f"{name}-r{key[-1]}", "response": row[key], "finished": True}
            rows.append(own | _categories(row, (key,)))
    return rows


def _categories(row: dict, responses: Iterable[str]) -> dict:
    """{"categories": [...]}: harm categories that the data name for any of the responses; {} where they name none at all."""
    tables = [row[key] for name in responses if isinstance(row.get(key := f"{name}_harm_category"), dict)]
    if not tables:
        return {}
    return {"categories": sorted({category for table in tables for category, present in table.items() if present})}
