"""The training script, whose second process sees the run folder as it was: on another node, a shared file system may be late.

The file `stop` appears while the second checkpoint is saved.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "alignment/GRPO"))

import train_grpo_alignment

import alignment.GRPO.run
from alignment.errors import run_main
from alignment.GRPO.trainer import ConstrainedGRPOTrainer

save = ConstrainedGRPOTrainer.save_whole
exists = Path.exists


def save_and_stop(self, final):
    save(self, final)
    if self.state.global_step == 2:
        (final.parent.parent / "stop").touch()


ConstrainedGRPOTrainer.save_whole = save_and_stop
if os.environ["RANK"] == "1":
    Path.exists = lambda self: exists(self) and not self.name.startswith("iteration_")
    # A row that the first process has just dropped.
    alignment.GRPO.run.read_jsonl = lambda path: [{"kind": "eval", "iteration": 2}]

if __name__ == "__main__":
    run_main(train_grpo_alignment.main)
