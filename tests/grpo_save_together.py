"""The training script where the first process cannot write its weights. A process that goes on to save the optimizer, which
with DeepSpeed all must do together, leaves RANK_LOG/rank_N.
"""

import errno
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "alignment/GRPO"))

import train_grpo_alignment
from transformers import Trainer

from alignment.errors import run_main


def save_weights(self, *_args, **_more):
    if self.args.should_save:  # the first process
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def save_optimizer(self, output_dir):
    (Path(os.environ["RANK_LOG"]) / f"rank_{os.environ['RANK']}").touch()


Trainer._save = save_weights
Trainer._save_optimizer_and_scheduler = save_optimizer

if __name__ == "__main__":
    run_main(train_grpo_alignment.main)
