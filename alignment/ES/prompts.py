"""Which prompts an iteration uses: a function of (global seed, iteration), so that resuming needs no state."""

from __future__ import annotations

import numpy as np


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
