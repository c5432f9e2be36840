"""Which prompts a run uses, and in which order: functions of the files and the seed alone, so that resuming needs no state."""

from __future__ import annotations

import hashlib

import numpy as np


def draw_rows(rows: list[dict], count: int | None) -> list[dict]:
    """`count` of the rows in their order, always the same ones (so not the first, which may all be of one kind); or all."""
    if count is None or count >= len(rows):
        return rows
    chosen = np.random.default_rng(0).choice(len(rows), size=count, replace=False)
    return [rows[index] for index in sorted(chosen)]


def iteration_prompts(num_prompts: int, batch_size: int, global_seed: int, iteration: int) -> list[int]:
    """Indices of the `batch_size` different prompts of an iteration (all prompts when there are fewer).

    Each pass over the data is a shuffle of its own, cut into whole batches; the remainder of a pass is left out, so that no
    batch holds a prompt twice and all prompts come up equally often in the long run.
    """
    batch_size = min(batch_size, num_prompts)
    batches = num_prompts // batch_size
    epoch, place = divmod(iteration, batches)
    order = np.random.default_rng([global_seed, epoch]).permutation(num_prompts)
    return order[place * batch_size : (place + 1) * batch_size].tolist()


def text_hash(texts: list[str]) -> str:
    """SHA-256 over the texts: what a run's prompts are known by."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
