"""Submits all jobs of an experiment. slurm/submit_pipeline.sh runs this with the site's settings.

    bash slurm/submit_pipeline.sh slurm/pipeline.yaml --dry-run    # the plan and every command, nothing submitted
    bash slurm/submit_pipeline.sh slurm/pipeline.yaml

The file is yours: cp slurm/pipeline.example.yaml slurm/pipeline.yaml, and edit it.

    scorer ──after it began──> es ─────┐
        └────────────────────> grpo[i] ┴─all succeeded─> classify[i] ─> ratings ─> report
    stop_scorer: when es, grpo and classify have ended, however they ended

Jobs that can never start are taken out of the queue by SLURM (--kill-on-invalid-dep). Once more submits only what has no
result and no job; what follows a stage that is submitted anew is submitted anew with it. Either all jobs are submitted or,
when SLURM refuses one, none stays.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from experiment import Experiment, Stage
from local_run import run_here
from recorded import OPTION, check_results, naming, read_jobs_file, record_asked
from sweep_tasks import Sweep

from alignment.config import read_yaml_mapping, script_parser
from alignment.errors import UserError, run_main
from alignment.runs import check_same_run

SUBMIT = ["bash", "slurm/submit.sh"]
STOP_SCORER = "stop_scorer"
NEW_JOB = "<id>"  # stands for a job number in a dry run
UPSTREAM = {
    "es": (),
    "grpo": (),
    "classify": ("es", "grpo"),
    "ratings": ("classify",),
    "report": ("classify", "ratings"),
}


@dataclass(frozen=True)
class QueuedTask:
    """A line of squeue: a job, or one task of an array."""

    job: str  # the array's number for a task
    task: int
    name: str
    state: str
    time_left: str
    reason: str


class Pipeline:
    """The plan for one experiment, and what becomes of it."""

    def __init__(self, experiment: Experiment, dry_run: bool) -> None:
        self.experiment, self.dry_run = experiment, dry_run
        content = read_jobs_file(experiment.jobs_file)
        self.jobs: dict[str, list[str]] = content["jobs"]  # stage -> its jobs, oldest first
        self.asked: dict[str, dict] = content["asked"]  # stage -> what decides its results, when it was last submitted
        self.queue = queued_tasks() if shutil.which("squeue") else []
        self.submitted: list[str] = []
        self.new: dict[str, list[int]] = {}  # stage -> tasks to submit
        self.lines: list[str] = []

    def plan(self) -> None:
        """Which tasks of which stage are to be submitted."""
        experiment = self.experiment
        for name, stage in experiment.stages.items():
            if name == "scorer":
                continue
            repeated = any(self.new.get(before) for before in UPSTREAM[name])
            running = [] if repeated else self.active(name)
            if name == "classify":
                waits = [
                    (before, task) for before in UPSTREAM[name] for task in self.new.get(before, self.active(before))
                ]
                due = [
                    n for n, sweep in enumerate(experiment.sweeps) if not sweep.is_done() or self._follows(sweep, waits)
                ]
            elif repeated or any(self.active(before) for before in UPSTREAM[name]):
                due = list(range(len(stage.tasks)))
            else:
                due = stage.todo()
            self.new[name] = [task for task in due if task not in running]
        asks = any(self.new[name] for name, stage in experiment.stages.items() if stage.asks_scorer)
        if "scorer" in experiment.stages:
            self.new["scorer"] = [0] if asks and not self.active("scorer") else []

    def _follows(self, sweep: Sweep, waits: list[tuple[str, int]]) -> bool:
        return any(
            policy == sweep.policy and (stage, task) in waits for stage, task, _, policy in self.experiment.trained
        )

    def job_name(self, stage: str) -> str:
        return f"{stage}.{self.experiment.name}"

    def entries(self, stage: str) -> list[QueuedTask]:
        """What is queued or runs of a stage. A number alone could be another cluster's, so the name must agree."""
        jobs, name = self.jobs.get(stage, []), self.job_name(stage)
        return [entry for entry in self.queue if entry.job in jobs and entry.name == name]

    def active(self, stage: str) -> list[int]:
        """Tasks of a stage that are queued or run."""
        return sorted({entry.task for entry in self.entries(stage)})

    def active_jobs(self, stage: str) -> list[str]:
        jobs = {entry.job for entry in self.entries(stage)}
        return [job for job in self.jobs.get(stage, []) if job in jobs]

    def check(self) -> None:
        """Asks SLURM about every job before the first one is queued. Raises UserError."""
        experiment = self.experiment
        if self.new.get("ratings") and experiment.judge == "gpt" and not os.environ.get("OPENAI_API_KEY"):
            raise UserError(
                f"{experiment.path}: ratings: OPENAI_API_KEY is not set: export it, or take 'judge: scorer' among the arguments"
            )
        if self.active("classify") and self._other_sweeps():
            raise UserError(
                f"{experiment.path} asks for other models than the classification that is queued: wait for it, or take it "
                f"away first (scancel {' '.join(self.active_jobs('classify'))})"
            )
        for name in ("scorer", "es", "grpo"):
            self._check_active(name)
        if shutil.which("sbatch") is None:
            if self.dry_run:
                return
            raise UserError(
                "sbatch not found: submit from a machine of the cluster (--dry-run shows the plan anywhere)"
            )
        for name, stage in experiment.stages.items():
            if self.new[name] and name != "classify":
                self._sbatch(stage, [*self._options(stage), "--test-only"])
        if self.new.get("classify"):
            self._check_classify(experiment.stages["classify"])

    def _check_active(self, name: str) -> None:
        """Raises UserError when a job that is queued or runs was asked for something else."""
        jobs = self.active_jobs(name)
        if jobs and name in self.asked:
            cancel = f"scancel {' '.join(jobs)}"
            with naming(f"{self.experiment.path}: {name}: end it first ({cancel})"):
                check_same_run(self.asked[name], self.experiment.asked(name), Path(f"job {', '.join(jobs)}"), OPTION)

    def _check_classify(self, stage: Stage) -> None:
        """With a sweep file of its own: the one that is there may be in use."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sweep_configs.yaml"
            self.experiment.write_sweeps(path)
            trial = replace(stage, environment=stage.environment | {"CONFIG_FILE": str(path)})
            self._sbatch(trial, [*self._options(stage), "--test-only"])

    def _other_sweeps(self) -> bool:
        path = self.experiment.sweep_file
        return path.exists() and read_yaml_mapping(path) != self.experiment.sweep_content

    def submit(self) -> None:
        """All that is new, with its dependencies. Raises UserError; then nothing of it stays queued."""
        try:
            for name, stage in self.experiment.stages.items():
                self._submit_stage(name, stage)
            self._submit_stop()
        except BaseException:
            if self.submitted:
                subprocess.run(["scancel", *self.submitted])
            raise

    def _submit_stage(self, name: str, stage: Stage) -> None:
        tasks = self.new[name]
        if not tasks:
            running = self.active_jobs(name)
            self.lines.append(f"{name:12} " + (f"job {', '.join(running)} is queued or runs" if running else "done"))
            if not running and name == "scorer":
                self.lines[-1] = f"{name:12} not needed"
            return
        if any(self.new.get(before) for before in UPSTREAM.get(name, ())):
            self._cancel(name)  # it waits for a job that is replaced
        dependencies, told = self._dependencies(name)
        options = self._options(stage) + dependencies
        job = self._sbatch(stage, options)
        self._record(name, job)
        labels = [stage.tasks[task] for task in tasks if stage.is_array]
        what = f" ({', '.join(labels)})" if labels else ""
        self.lines.append(f"{name:12} job {job}{what}{told}")

    def _submit_stop(self) -> None:
        """The job that ends the scorer waits for all that ask it; an older one, which waits for fewer, goes."""
        if "scorer" not in self.experiment.stages or not any(self.new.values()):
            return
        asking = [name for name, stage in self.experiment.stages.items() if stage.asks_scorer]
        scorers = self.active_jobs("scorer") or ([NEW_JOB] if self.dry_run and self.new["scorer"] else [])
        waits = [job for name in asking for job in self.jobs_of(name)]
        if not scorers or not waits:
            return
        self._cancel(STOP_SCORER)
        stage = Stage(STOP_SCORER, "slurm/stop_scorer.sh", [scorers[-1]])
        options = self._options(stage) + [f"--dependency=afterany:{':'.join(waits)}", "--kill-on-invalid-dep=yes"]
        job = self._sbatch(stage, options)
        self._record(STOP_SCORER, job)
        self.lines.append(f"{STOP_SCORER:12} job {job}, when all of {', '.join(asking)} have ended")

    def jobs_of(self, name: str) -> list[str]:
        """The jobs that a later stage waits for: those in the queue, among them the new one."""
        return self.active_jobs(name) + ([NEW_JOB] if self.dry_run and self.new.get(name) else [])

    def _dependencies(self, name: str) -> tuple[list[str], str]:
        """sbatch's options, and the same in words."""
        parts, told = [], []
        if self.experiment.stages[name].asks_scorer and (scorer := self.jobs_of("scorer")):
            parts.append(f"after:{scorer[-1]}")
            told.append("the scorer has begun")
        for before in UPSTREAM.get(name, ()):
            jobs = self.jobs_of(before)
            if jobs:
                # Ratings may fail (a judge that is away): the report then says that they are missing.
                kind = "afterany" if before == "ratings" else "afterok"
                parts.append(f"{kind}:{':'.join(jobs)}")
                told.append(f"{before} has {'ended' if kind == 'afterany' else 'succeeded'}")
        if not parts:
            return [], ""
        return [f"--dependency={','.join(parts)}", "--kill-on-invalid-dep=yes"], f", when {' and '.join(told)}"

    def _options(self, stage: Stage) -> list[str]:
        options = [f"--job-name={self.job_name(stage.name)}", *shlex.split(stage.sbatch)]
        if stage.is_array:
            options.append(f"--array={','.join(map(str, self.new[stage.name]))}")
        return options

    def _sbatch(self, stage: Stage, options: list[str]) -> str:
        command = [*SUBMIT, "--parsable", *options, stage.script, *stage.arguments]
        environment = self.experiment.environment(stage)
        if self.dry_run and "--test-only" not in options:
            given = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items() if value)
            print(f"$ {given} {shlex.join(command)}")
            return NEW_JOB
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        if done.returncode != 0:
            problem = done.stderr.strip().removeprefix("error: ") or f"sbatch ended with exit code {done.returncode}"
            raise UserError(problem.splitlines()[-1])
        return done.stdout.strip().split(";")[0]

    def _record(self, name: str, job: str) -> None:
        if self.dry_run:
            return
        self.submitted.append(job)
        self.jobs.setdefault(name, []).append(job)
        self.queue += [
            QueuedTask(job, task, self.job_name(name), "PENDING", "", "") for task in self.new.get(name, [0])
        ]
        if asked := self.experiment.asked(name):
            self.asked[name] = asked
        record_asked(self.experiment, self.jobs, self.asked)

    def _cancel(self, name: str) -> None:
        jobs = self.active_jobs(name)
        if jobs and not self.dry_run:
            subprocess.run(["scancel", *jobs], check=False)
        self.queue = [entry for entry in self.queue if entry.job not in jobs]


def queued_tasks() -> list[QueuedTask]:
    """All of this user's jobs that wait or run, array tasks one by one. Raises UserError when SLURM does not answer."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%F|%K|%j|%T|%L|%R"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(
            f"SLURM does not answer: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'squeue'}"
        )
    rows = [line.split("|", 5) for line in done.stdout.splitlines()]
    return [QueuedTask(job, int(task) if task.isdecimal() else 0, *rest) for job, task, *rest in rows]


def main() -> None:
    parser = script_parser(__doc__, prog="submit_pipeline.sh")
    parser.add_argument("config", help="the experiment: see slurm/pipeline.example.yaml")
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")
    parser.add_argument("--local", action="store_true", help="run everything here, one after the other, without SLURM")
    arguments = parser.parse_args()
    experiment = Experiment(arguments.config)
    experiment.folder.mkdir(parents=True, exist_ok=True)
    with open(experiment.folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another submit_pipeline.sh is at work on {experiment.folder}") from error
        check_results(experiment)
        if arguments.local:
            run_here(experiment)
            return
        pipeline = Pipeline(experiment, arguments.dry_run)
        pipeline.plan()
        pipeline.check()
        if pipeline.new.get("classify") and not arguments.dry_run:
            experiment.write_sweeps(experiment.sweep_file)
        pipeline.submit()
    print(f"experiment {experiment.name}, results in {experiment.folder}")
    for line in pipeline.lines:
        print(f"  {line}")
    if experiment.left_out:
        print(f"left out: {', '.join(experiment.left_out)} (not asked for in {experiment.path})")
    if arguments.dry_run:
        print("nothing was submitted")
    else:
        print(f"watch it: bash slurm/status.sh {experiment.path}")


if __name__ == "__main__":
    run_main(main)
