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
from recorded import read_jobs_file, record_asked

from alignment.errors import UserError

TASK_VARIABLE = {"grpo": "BETA", "classify": "SWEEP"}  # what an array's number is without SLURM


class Tasks:
    """Runs job scripts one after the other. TERM and Ctrl-C are passed on as TERM, and waited for: a training run saves.

    Ctrl-C in a terminal reaches the script as well; what trains hears of it through its script only.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.process: subprocess.Popen | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _frame: object) -> None:
        self.received = number
        if self.process is not None:
            self.process.terminate()

    def run(self, command: list[str], environment: dict[str, str], label: str) -> None:
        """Raises UserError when it fails, and SystemExit after a signal."""
        if self.received:  # between two
            sys.exit(128 + self.received)
        self.process = subprocess.Popen(command, env=os.environ | environment)
        if self.received:  # while it was started
            self.process.terminate()
        code = self.process.wait()
        self.process = None
        if self.received:
            print(f"{label} has stopped; the same command goes on from here", flush=True)
            sys.exit(128 + self.received)
        if code != 0:
            raise UserError(f"{label} ended with exit code {code}; the same command goes on from here")


def run_here(experiment: Experiment) -> None:
    """Raises UserError when a stage fails; the scripts' own output says why."""
    tasks = Tasks()
    if "classify" in experiment.stages:
        experiment.write_sweeps(experiment.sweep_file)
    log = Path("logs") / f"scorer_service_{experiment.name}.log"
    with scorer(experiment, log) if "scorer" in experiment.stages else contextlib.nullcontext():
        for name, stage in experiment.stages.items():
            for task in stage.todo() if name != "scorer" else ():
                run_task(experiment, stage, task, tasks)
    print(f"results are in {experiment.folder}")


def run_task(experiment: Experiment, stage: Stage, task: int, tasks: Tasks) -> None:
    label = f"{stage.name} {stage.tasks[task]}".strip()
    print(f"== {label}", flush=True)
    environment = experiment.environment(stage)
    if stage.is_array:
        environment[TASK_VARIABLE[stage.name]] = stage.tasks[task]
    tasks.run(["bash", stage.script, *stage.arguments], environment, label)


@contextlib.contextmanager
def scorer(experiment: Experiment, log: Path) -> Iterator[None]:
    """The experiment's scorer in the background; trainers find it by the experiment's name."""
    stage = experiment.stages["scorer"]
    environment = os.environ | experiment.environment(stage) | {"SCORER_BIND": "127.0.0.1"}
    content = read_jobs_file(experiment.jobs_file)
    record_asked(experiment, content["jobs"], content["asked"] | {"scorer": experiment.asked("scorer")})
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
