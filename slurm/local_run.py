"""Runs an experiment on this machine, without SLURM: `bash slurm/submit_pipeline.sh CONFIG --local` does this.

The job scripts are the same, one after the other; what has a result is passed over. The scorer listens on loopback and is
stopped at the end, however it comes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from experiment import Experiment, Stage

from alignment.errors import UserError

TASK_VARIABLE = {"grpo": "BETA", "classify": "SWEEP"}  # what an array's number is without SLURM


def run_here(experiment: Experiment) -> None:
    """Raises UserError when a stage fails; the scripts' own output says why."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the scorer is stopped
    experiment.write_sweeps(experiment.sweep_file)
    log = Path("logs") / f"scorer_service_{experiment.name}.log"
    with scorer(experiment, log) if "scorer" in experiment.stages else contextlib.nullcontext():
        for name, stage in experiment.stages.items():
            for task in stage.todo() if name != "scorer" else ():
                run_task(experiment, stage, task)
    print(f"results are in {experiment.folder}")


def run_task(experiment: Experiment, stage: Stage, task: int) -> None:
    label = f"{stage.name} {stage.tasks[task]}".strip()
    print(f"== {label}", flush=True)
    environment = experiment.environment(stage)
    if stage.is_array:
        environment[TASK_VARIABLE[stage.name]] = stage.tasks[task]
    done = subprocess.run(["bash", stage.script, *stage.arguments], env=os.environ | environment)
    if done.returncode != 0:
        raise UserError(f"{label} ended with exit code {done.returncode}; the same command goes on from here")


@contextlib.contextmanager
def scorer(experiment: Experiment, log: Path) -> Iterator[None]:
    """The experiment's scorer in the background; trainers find it by the experiment's name."""
    stage = experiment.stages["scorer"]
    environment = os.environ | experiment.environment(stage) | {"SCORER_BIND": "127.0.0.1"}
    print(f"scorer: log in {log}", flush=True)
    with open(log, "w") as file:
        process = subprocess.Popen(
            ["bash", stage.script], env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait()
