"""The training script, with every process's lambda after each step written to RANK_LOG/rank_N.txt."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "alignment/GRPO"))

import train_grpo_alignment

from alignment.errors import run_main
from alignment.GRPO.reward import ConstrainedReward

judge = ConstrainedReward.judge


def judge_and_tell(self, rewards, costs):
    verdict = judge(self, rewards, costs)
    with open(Path(os.environ["RANK_LOG"]) / f"rank_{os.environ.get('RANK', 0)}.txt", "a") as file:
        file.write(self.multiplier.value.hex() + "\n")
    return verdict


ConstrainedReward.judge = judge_and_tell

if __name__ == "__main__":
    run_main(train_grpo_alignment.main)
