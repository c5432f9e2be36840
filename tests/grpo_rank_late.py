"""The training script, whose second process sees the newest checkpoint only from its LATE-th look on, as on another node."""

import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "alignment/GRPO"))

import train_grpo_alignment

from alignment.errors import run_main
from alignment.GRPO.checkpoints import checkpoints_of

looks = itertools.count(1)
train_grpo_alignment.LOOKS, train_grpo_alignment.LOOK_EVERY = 4, 0.1


def newest_seen(folder):
    late = next(looks) < int(os.environ["LATE"])
    return next(reversed(checkpoints_of(folder)[: -1 if late else None]), None)


if os.environ["RANK"] == "1":
    train_grpo_alignment.newest_checkpoint = newest_seen

if __name__ == "__main__":
    run_main(train_grpo_alignment.main)
