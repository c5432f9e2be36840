"""The training script, whose second process alone gets a signal: in the second evaluation, with its first batch of answers."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "alignment/GRPO"))

import train_grpo_alignment

from alignment.errors import run_main
from alignment.generation import TransformersEngine

answer = TransformersEngine._answer
batches = []


def answer_and_signal(self, *arguments):
    batches.append(arguments)
    if os.environ["RANK"] == "1" and len(batches) == 3:  # two in the first evaluation
        os.kill(os.getpid(), signal.SIGUSR1)
    return answer(self, *arguments)


TransformersEngine._answer = answer_and_signal

if __name__ == "__main__":
    run_main(train_grpo_alignment.main)
