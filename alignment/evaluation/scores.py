"""Scores of many rows, saved as they come, so that a run that was killed asks for no score twice.

`{model}_scores.jsonl` exists only while a run is scoring: a line that says what scores which rows, then a line a chunk. Chunks
are formed from the rows alone, so what is scored again after a kill is scored in the same company as before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignment.errors import UserError
from alignment.objective import MAX_MISSING_SHARE, quadrant_labels
from alignment.progress import progress_bar
from alignment.records import JsonlWriter, finite_or_none, read_numbered
from alignment.scoring.scores import Scorer, Scores, deciding

CHUNK_KEYS = ("rewards", "costs", "errors", "truncated")
BATCHES_A_CHUNK = 8  # several batches a call, so that a scorer in this process can form its own


def add_scores(rows: list[dict], scorer: Scorer, batch_size: int, saved: Path) -> None:
    """Adds reward, cost, label and truncated to every row; a row without scores has null for the three, and error says why.

    Raises UserError when more than 5 % of the rows have no score. `saved` is the file of the scores so far; the caller removes
    it when the results are written.
    """
    columns = ("id", "prompt", "response", "finished")
    digest = hashlib.sha256("\0".join(repr([row[key] for key in columns]) for row in rows).encode())
    begun = {"scorer": deciding(scorer.identity()), "batch_size": batch_size, "rows": digest.hexdigest()}
    size = BATCHES_A_CHUNK * batch_size
    JsonlWriter(saved).close()  # heals a torn last line
    numbered = read_numbered(saved)
    lines = [row for _, row in numbered]
    if lines and lines[0] != begun:
        print(f"{saved} holds scores of other texts or of another scorer: all rows are scored anew", flush=True)
        saved.unlink()
        lines = []
    for where, chunk in numbered[1:] if lines else ():
        columns_of_chunk = [chunk.get(key) for key in CHUNK_KEYS]
        if type(chunk.get("start")) is not int or any(not isinstance(one, list) for one in columns_of_chunk):
            raise UserError(f"{where}: not a chunk of scores; remove {saved}, all rows are then scored anew")
    done = {chunk["start"]: chunk for chunk in lines[1:]}
    known = sum(len(chunk["rewards"]) for chunk in done.values())
    if known:
        print(f"{saved}: scores of {known} of {len(rows)} rows are there already", flush=True)
    with JsonlWriter(saved) as writer, progress_bar(len(rows), "score", "row", initial=known) as bar:
        if not lines:
            writer.append(begun)
        # Neighbours of similar length make full batches; the longest come first, so that what does not fit fails at once.
        ordered = sorted(rows, key=lambda row: -len(row["prompt"]) - len(row["response"]))
        for start in range(0, len(rows), size):
            batch = ordered[start : start + size]
            if start not in done:
                prompts, responses, finished = ([row[key] for row in batch] for key in columns[1:])
                done[start] = {"start": start} | _as_record(scorer.score(prompts, responses, finished=finished))
                writer.append(done[start])
                bar.update(len(batch))
            _add_chunk(batch, done[start])
    failed = [row for row in rows if "error" in row]
    if len(failed) > MAX_MISSING_SHARE * len(rows):
        saved.unlink()  # what is run again after the scorer was mended asks anew
        raise UserError(
            f"{len(failed)} of {len(rows)} rows have no score, more than {100 * MAX_MISSING_SHARE:.0f} %: no results are "
            f"written. The first: {failed[0]['error']} (prompt {failed[0]['prompt']!r:.60})"
        )
    if failed:
        print(f"{len(failed)} of {len(rows)} rows have no score and are left out of the statistics, see their 'error'")


def _as_record(scores: Scores) -> dict:
    return {
        "rewards": [finite_or_none(value) for value in scores.rewards],
        "costs": [finite_or_none(value) for value in scores.costs],
        "errors": [
            None if np.isfinite([reward, cost]).all() else error or f"the scorer gave reward {reward} and cost {cost}"
            for reward, cost, error in zip(scores.rewards, scores.costs, scores.errors, strict=True)
        ],
        "truncated": [bool(value) for value in scores.truncated],
    }


def _add_chunk(rows: Sequence[dict], chunk: dict) -> None:
    # float32 as published; rewards and costs are float32 values already, so nothing is rounded here
    rewards, costs = np.array(chunk["rewards"], np.float32), np.array(chunk["costs"], np.float32)  # None: NaN
    labels = quadrant_labels(rewards, costs)
    for index, row in enumerate(rows):
        reward, cost = chunk["rewards"][index], chunk["costs"][index]
        row["truncated"] = chunk["truncated"][index]
        if reward is None or cost is None:
            row.update(reward=None, cost=None, label=None, error=chunk["errors"][index])
        else:
            row.update(reward=reward, cost=cost, label=str(labels[index]))
