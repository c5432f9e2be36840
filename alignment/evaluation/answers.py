"""Answers of a policy, saved as they come, and their log-probability under another model.

`{model}_generations.jsonl` begins with one line that names the policy, its weights, template, sampling and, once they are
scored, the scorer; a line with an answer follows for each prompt. A run that was killed goes on after the last whole line.
Batches are formed from the prompts alone, so a batch that was half saved is made again as it was and its missing rows are
added: the file is the same as without the kill.
"""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch

from alignment.errors import UserError
from alignment.evaluation.classify_settings import ClassifySettings
from alignment.evaluation.policies import open_policy
from alignment.evaluation.prompts import rows_hash
from alignment.generation import Engine, Generation, TransformersEngine
from alignment.progress import progress_bar
from alignment.records import JsonlWriter, read_jsonl, read_numbered, write_jsonl


def generate_answers(config: ClassifySettings, rows: list[dict], path: Path) -> dict:
    """Adds response, finished, cut, num_tokens (and raw, where it differs) to every row; returns the settings it used.

    Raises UserError when `path` was begun with other settings, weights or prompts.
    """
    engine, weights_hash = open_policy(config)
    settings = {
        "weights_hash": weights_hash,
        **config.sampling,
        "dtype": str(next(iter(engine.weights().values())).dtype).removeprefix("torch."),
        "prompts": rows_hash(rows),
    }
    with JsonlWriter(path) as writer:
        done = _saved_answers(path, settings)
        if done is None:
            writer.append({"policy": config.policy} | settings)
            done = {}
        if done:
            print(f"{path}: {len(done)} of {len(rows)} answers are there already", flush=True)
        # Longest first, so that what does not fit fails at once; characters need no tokenizer and never change.
        order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]["prompt"]), index))
        with progress_bar(len(rows), "generate", "prompt", initial=len(done)) as bar:
            for number, start in enumerate(range(0, len(order), config.policy_batch_size)):
                batch = [rows[index] for index in order[start : start + config.policy_batch_size]]
                missing = [row["id"] for row in batch if row["id"] not in done]
                if not missing:
                    continue
                for row, answer in zip(batch, _generate_batch(config, engine, batch, number), strict=True):
                    if row["id"] in missing:
                        done[row["id"]] = _as_record(answer)
                        writer.append({"id": row["id"]} | done[row["id"]])
                bar.update(len(missing))
    for row in rows:
        row.update(done[row["id"]])
    del engine
    _free_gpu()  # the score models need the room
    return settings


def base_log_probs(config: ClassifySettings, base_model_path: str, rows: list[dict]) -> dict:
    """Adds log_prob_base, nats a token, to every row (None where a response has no token); returns what the base was."""
    engine = TransformersEngine(
        base_model_path,
        template=config.policy_template,
        device=config.device,
        dtype=config.dtype,
        batch_size=config.policy_batch_size,
    )
    with progress_bar(len(rows), "log-prob under base", "row") as bar:
        for start in range(0, len(rows), config.policy_batch_size):
            batch = rows[start : start + config.policy_batch_size]
            columns = [[row[key] for row in batch] for key in ("prompt", "response", "finished")]
            for row, value in zip(batch, engine.mean_log_probs(*columns), strict=True):
                row["log_prob_base"] = float(value) if np.isfinite(value) else None
            bar.update(len(batch))
    base = {"model": base_model_path, "weights_hash": engine.weights_hash()}
    del engine
    _free_gpu()
    return base


def name_scorer(path: Path, identity: dict) -> None:
    """Writes into the first line of saved answers what scored them."""
    first, *answers = read_jsonl(path)
    write_jsonl(path, [first | {"scorer": identity}, *answers])


def _generate_batch(config: ClassifySettings, engine: Engine, batch: list[dict], number: int) -> list[Generation]:
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])  # of its own, whatever ran before
    try:
        return engine.generate(
            [row["prompt"] for row in batch],
            config.policy_max_new_tokens,
            temperature=config.policy_temperature,
            top_p=config.policy_top_p,
            seed=seed,
        )
    except UserError as error:
        raise UserError(f"{error} (in the batch that begins with the prompt {batch[0]['prompt']!r:.60})") from error


def _as_record(answer: Generation) -> dict:
    record = {
        "response": answer.response,
        "finished": answer.finished,
        "cut": answer.cut,
        "num_tokens": answer.num_tokens,
    }
    return record | ({"raw": answer.raw} if answer.raw != answer.response else {})


def _saved_answers(path: Path, settings: dict) -> dict[str, dict] | None:
    """id -> answer from a file that an earlier run began; None when there is nothing yet."""
    lines = read_numbered(path)
    if not lines:
        return None
    (_, found), answers = lines[0], lines[1:]
    for key, value in settings.items():
        if found.get(key) != value:
            raise UserError(
                f"{path} was generated with {key} {found.get(key)!r}, now it is {value!r}; "
                "remove the file, or give another --model_name or --output_dir"
            )
    for where, row in answers:
        if missing := [key for key in ("id", "response", "finished", "cut", "num_tokens") if key not in row]:
            raise UserError(f"{where}: an answer without '{missing[0]}'; remove the line, it is generated again")
    return {row["id"]: {key: value for key, value in row.items() if key != "id"} for _, row in answers}


def _free_gpu() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
