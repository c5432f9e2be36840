"""An experiment at a glance. slurm/status.sh runs this with the site's settings.

    bash slurm/status.sh slurm/pipeline.yaml
    bash slurm/status.sh slurm/pipeline.yaml --watch 30

The file is the experiment's: cp slurm/pipeline.example.yaml slurm/pipeline.yaml, and edit it.
A line a task: its job and state, how far it is, objective and safe ratio (of the last held-out evaluation, or of the training
prompts until there is one; of the classified answers), the job's time left. Below: the scorer's load, and the last error of
every job that did not end well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from experiment import Experiment, Stage
from pipeline import STOP_SCORER, Pipeline, QueuedTask

from alignment.config import script_parser
from alignment.errors import UserError, run_main
from alignment.records import read_object
from alignment.scoring.discovery import HEALTH_SECONDS, ask_state, read_addresses, read_secret

HEADINGS = ("stage", "job", "state", "progress", "objective", "safe %", "time left")
ENDED_WELL = {"done", "COMPLETED", "not submitted", "RUNNING", "PENDING", "CONFIGURING", "COMPLETING", "not needed"}
ERROR = re.compile(r"^(error: |slurmstepd: error: |srun: error: |\w+Error: |\w+Exception: |.*[Kk]illed)")
TAIL_BYTES = 65536


@dataclass
class Row:
    stage: str
    job: str = ""
    state: str = "not submitted"
    progress: str = ""
    objective: str = ""
    safe: str = ""
    time_left: str = ""
    error: str = ""

    def cells(self) -> tuple[str, ...]:
        return self.stage, self.job, self.state, self.progress, self.objective, self.safe, self.time_left


def main() -> None:
    parser = script_parser(__doc__, prog="status.sh")
    parser.add_argument("config", help="the experiment, as given to submit_pipeline.sh")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show it again and again")
    arguments = parser.parse_args()
    while True:
        text = overview(Experiment(arguments.config))
        if arguments.watch is not None and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print(text, flush=True)
        if arguments.watch is None:
            return
        time.sleep(arguments.watch)


def overview(experiment: Experiment) -> str:
    pipeline = Pipeline(experiment, dry_run=True)
    rows = [row for name, stage in experiment.stages.items() for row in stage_rows(experiment, pipeline, name, stage)]
    if STOP_SCORER in pipeline.jobs:
        rows.append(task_row(pipeline, Stage(STOP_SCORER, "", []), 0))
    widths = [
        max(len(text) for text in column) for column in zip(HEADINGS, *(row.cells() for row in rows), strict=True)
    ]
    lines = [f"experiment {experiment.name}, {experiment.folder}, {time.strftime('%F %T')}"]
    for cells in (HEADINGS, *(row.cells() for row in rows)):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    lines += scorer_lines(experiment.name)
    lines += [f"{row.stage}: {row.error}" for row in rows if row.error]
    return "\n".join(lines)


def stage_rows(experiment: Experiment, pipeline: Pipeline, name: str, stage: Stage) -> list[Row]:
    rows = [task_row(pipeline, stage, task) for task in range(len(stage.tasks))]
    if name == "es":
        show_training(rows[0], experiment.folder / "es", experiment.es_steps)
    elif name == "grpo":
        for row, beta in zip(rows, stage.tasks, strict=True):
            show_training(row, experiment.folder / "grpo" / f"beta_{beta}", experiment.grpo_steps)
    elif name == "classify":
        for row, sweep in zip(rows, experiment.sweeps, strict=True):
            if sweep.is_done():
                show_summary(row, read_object(sweep.summary))
    return rows


def task_row(pipeline: Pipeline, stage: Stage, task: int) -> Row:
    """What SLURM says of the task's newest job, or what its result says."""
    row = Row(f"{stage.name} {stage.tasks[task]}".strip())
    jobs = pipeline.jobs.get(stage.name, [])
    queued = next((entry for entry in pipeline.entries(stage.name) if entry.task == task), None)
    if queued is not None:
        row.job = f"{queued.job}_{task}" if stage.is_array else queued.job
        row.state, row.time_left = queued.state, queued.time_left if queued.state == "RUNNING" else ""
        if queued.state == "PENDING":
            row.progress = reason_in_words(queued)
        return row
    done = stage.is_done(task)
    if jobs:
        row.job = f"{jobs[-1]}_{task}" if stage.is_array else jobs[-1]
    if done:
        row.state = "done"
    elif jobs:
        row.state, log = ended_job(row.job)
        if row.state not in ENDED_WELL:
            row.error = f"{last_error(log)} ({log})" if log else f"no log (sacct -j {row.job})"
    return row


def reason_in_words(entry: QueuedTask) -> str:
    reason = entry.reason.strip("()")
    words = {
        "Dependency": "waits for other jobs",
        "BeginTime": "queued again, starts soon",
        "Resources": "waits for free nodes",
        "Priority": "waits behind others",
    }
    return words.get(reason, reason)


def show_training(row: Row, run: Path, steps: int) -> None:
    """Progress of a run from its metrics: the rows of what it did, the newest last."""
    rows = metrics_rows(run / "metrics.jsonl")
    taken = max((one["iteration"] for one in rows if one["kind"] == "train"), default=None)
    if taken is None:
        return
    # ES numbers its steps from 0, and GRPO as well: the row of step 0 says that one was taken.
    row.progress = row.progress or f"step {taken + 1}/{steps}"
    shown = next((one for one in reversed(rows) if one["kind"] == "eval"), rows[-1])
    row.objective, row.safe = number(shown.get("objective"), 3), number(shown.get("safe_ratio"), 1)


def metrics_rows(path: Path) -> list[dict]:
    """The whole rows of training and evaluation in a file that may just be written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict) and row.get("kind") in ("train", "eval") and isinstance(row.get("iteration"), int):
            rows.append(row)
    return rows


def show_summary(row: Row, summary: dict) -> None:
    row.progress = f"{summary.get('num_points', '?')} answers"
    objective = (summary.get("measures") or {}).get("objective") or {}
    row.objective, row.safe = number(objective.get("value"), 3), number(summary.get("safe_ratio"), 1)


def number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if type(value) in (int, float) else ""


def ended_job(job: str) -> tuple[str, Path | None]:
    """State and log of a job that has left the queue, as far as SLURM still knows them."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True)
    if shown.returncode == 0:
        named = re.search(r"JobState=(\w+)", shown.stdout)
        log = re.search(r"StdOut=(\S+)", shown.stdout)
        return named.group(1) if named else "unknown", Path(log.group(1)) if log and Path(
            log.group(1)
        ).exists() else None
    told = subprocess.run(["sacct", "-n", "-X", "-P", "-j", job, "-o", "State"], capture_output=True, text=True)
    state = told.stdout.split()[0] if told.returncode == 0 and told.stdout.split() else "ended"
    return state, next(iter(sorted(Path("logs").glob(f"*[a-z]_{job}.log"))), None)


def last_error(log: Path) -> str:
    """The last line of a log that tells an error; the last line where none does."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if ERROR.match(line) and not line.startswith(("slurmstepd:", "srun:"))]
    errors = errors or [line for line in lines if ERROR.match(line)]
    return (errors or lines or ["nothing"])[-1][:300]


def scorer_lines(experiment_id: str) -> list[str]:
    """Address, state and load of the experiment's scorer."""
    lines = []
    for address in read_addresses(os.environ.get("LOGS_DIR") or "logs").values():
        if address.experiment_id != experiment_id:
            continue
        state = ask_state(address)
        text = f"scorer {address.url}: {state.name}"
        if state.name == "ready":
            info = ask_info(address.url, address.token_file)
            text += (
                f", {info['queued_texts']} texts wait, {info['requests_under_way']} requests under way" if info else ""
            )
        elif state.reason:
            text += f" ({state.reason})"
        lines.append(text)
    return lines


def ask_info(url: str, token_file: str | None) -> dict | None:
    request = urllib.request.Request(url + "/info")
    try:
        if token_file:
            request.add_header("Authorization", f"Bearer {read_secret(token_file)}")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # inside a cluster
        with opener.open(request, timeout=HEALTH_SECONDS) as answer:
            return json.load(answer)
    except (OSError, ValueError, UserError):
        return None


if __name__ == "__main__":
    run_main(main)
