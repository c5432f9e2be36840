"""Jobs on the local SLURM cluster, for tests: submit, wait, look."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
ES_SCRIPT = "slurm/train_accl_alignment_api.sh"
GRPO_SCRIPT = "alignment/GRPO/run_grpo_alignment.sh"
PATIENCE = 300.0  # seconds; the machine may be busy with other tests


def why_not() -> str | None:
    """Why tests on SLURM cannot run here; None when they can."""
    try:
        shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True)
    except FileNotFoundError:
        return "no SLURM: bash slurm/local_cluster.sh start"
    if shown.returncode != 0:
        return "SLURM does not answer: bash slurm/local_cluster.sh start"
    if not re.search(r"ClusterName\s*= local\b", shown.stdout):
        return "this is a real cluster: the tests are for slurm/local_cluster.sh"
    return None


@dataclass
class Cluster:
    """Submits jobs that log to `folder`, with an environment of their own."""

    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        own |= {"PYTHON": sys.executable, "SITE_ENV": "/dev/null", "LOGS_DIR": str(self.folder / "published")}
        return own | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more

    def submit(self, script: str, *arguments: object, options: tuple[str, ...] = (), **environment: str) -> str:
        """Job id."""
        command = [
            "sbatch",
            "--parsable",
            f"--output={self.folder}/%x_%A_%a.log",
            *options,
            script,
            *map(str, arguments),
        ]
        if not any(option.startswith("--array") for option in options):
            command[2] = f"--output={self.folder}/%x_%j.log"
        done = subprocess.run(
            command, cwd=REPO, env=self.environment(**environment), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def plain(self, *command: object, timeout: float = PATIENCE, **environment: str) -> subprocess.CompletedProcess:
        """A script by bash, without SLURM."""
        return subprocess.run(
            ["bash", *map(str, command)],
            cwd=REPO,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def log(self, job: str) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"*[a-z]_{job}.log")))

    def finish(self, *jobs: str, patience: float = PATIENCE) -> dict[str, str]:
        """Waits until the jobs have left the queue; returns their last states."""
        until(lambda: not queue(*jobs), f"jobs {', '.join(jobs)} to end", patience, lambda: self.report(*jobs))
        return {job: state(job) for job in jobs}

    def report(self, *jobs: str) -> str:
        return "\n".join(f"--- {job} {state(job)}\n{self.log(job)[-1500:]}" for job in jobs)


def queue(*jobs: str) -> list[str]:
    """States of those of the jobs that wait or run."""
    done = subprocess.run(
        ["squeue", "--noheader", "--array", f"--jobs={','.join(jobs)}", "--format=%T"], capture_output=True, text=True
    )
    return done.stdout.split()


def state(job: str) -> str:
    return field(job, "JobState")


def field(job: str, name: str) -> str:
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout
    found = re.search(rf"\b{name}=(\S*)", shown)
    return found.group(1) if found else "unknown"


def slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def is_back(node: str) -> bool:
    """Whether a node that was set down can run jobs again; asks for it. A daemon that registers first makes the request void."""
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True)
    return slurm("sinfo", "--noheader", f"--nodes={node}", "--format=%T").strip() in ("idle", "mixed", "allocated")


def until(condition, what: str, patience: float = PATIENCE, report=lambda: "") -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience:.0f} s for {what}\n{report()}"
        time.sleep(0.25)
