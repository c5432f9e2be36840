"""Whole experiments by sbatch on the local cluster: one that fails half-way and is gone on with, and the demo."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from slurm_jobs import Cluster, queue, slurm, state, until, why_not

from alignment.records import read_json, read_jsonl, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture
def experiment(tiny_policy, tiny_scorers, tmp_path) -> dict:
    """The content of a file for submit_pipeline.sh; small."""
    for name, count in (("train", 12), ("eval", 6)):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} question {number}?"} for number in range(count)])
    es = {"population_size": 4, "batch_size": 4, "max_new_tokens": 8, "sigma": 0.05, "alpha": 0.02}
    grpo = {"num_generations": 4, "max_completion_length": 8, "max_steps": 2, "eval_every": 2, "learning_rate": 0.001}
    return {
        "name": "again",
        "output_dir": str(tmp_path),
        "policy": str(tiny_policy),
        "base_name": "base",
        "reward_model": str(tiny_scorers[0]),
        "cost_model": str(tiny_scorers[1]),
        "train_jsonl": str(tmp_path / "train.jsonl"),
        "eval_jsonl": str(tmp_path / "eval.jsonl"),
        "scorer": {"environment": {"SCORER_PROBES": "none"}},
        "es": {"sbatch": "--ntasks-per-node=1", "arguments": es | {"num_iterations": 2000, "eval_every": 1000}},
        "grpo": {"accelerate_config": "torchrun", "betas": [0.1], "arguments": grpo},
        "classify": {"settings": {"policy_max_new_tokens": 8}},
        "ratings": {"arguments": {"judge": "scorer", "draws": 100}},
        "report": None,
    }


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_after_a_failure_the_same_command_submits_what_is_not_done(experiment, tmp_path):
    cluster, folder = Cluster(tmp_path), tmp_path / "again"
    config = write(tmp_path / "again.yaml", experiment)

    def submit(*more: str) -> str:
        done = cluster.plain("slurm/submit_pipeline.sh", config, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def newest(stage: str) -> str:
        return read_json(folder / "jobs.json")["jobs"][stage][-1]

    def steps() -> int:
        return len(read_jsonl(folder / "es" / "journal.jsonl")) - 1 if (folder / "es" / "journal.jsonl").exists() else 0

    def all_jobs() -> list[str]:
        return [job for jobs in read_json(folder / "jobs.json")["jobs"].values() for job in jobs]

    try:
        planned = submit("--dry-run")
        assert "nothing was submitted" in planned and not (folder / "jobs.json").exists()
        assert len(re.findall(r"^\$ ", planned, re.MULTILINE)) == 7
        submit()
        until(lambda: steps() > 1, "ES", report=lambda: cluster.report(newest("es")))
        assert "is queued or runs" in submit()  # nothing is submitted twice
        assert len(all_jobs()) == 7
        shown = cluster.plain("slurm/status.sh", config).stdout
        assert re.search(r"^es +\d+ +RUNNING +step \d+/2000", shown, re.MULTILINE)
        assert re.search(r"^scorer http://\S+: ready, \d+ texts wait", shown, re.MULTILINE)

        # ES ends badly: what needs it goes, GRPO ends well, and then the scorer is stopped. Nothing stays in the queue.
        slurm("scancel", newest("es"))
        until(lambda: not queue(*all_jobs()), "an empty queue", report=lambda: slurm("squeue"))
        states = {
            stage: state(newest(stage)) for stage in ("scorer", "es", "classify", "ratings", "report", "stop_scorer")
        }
        assert states == {
            "scorer": "COMPLETED",
            "es": "CANCELLED",
            "classify": "CANCELLED",
            "ratings": "CANCELLED",
            "report": "CANCELLED",
            "stop_scorer": "COMPLETED",
        }
        assert re.search(r"^es +\d+ +CANCELLED", cluster.plain("slurm/status.sh", config).stdout, re.MULTILINE)

        taken = steps()
        experiment["es"]["arguments"] |= {"num_iterations": taken + 1}
        write(config, experiment)
        told = submit()
        assert re.search(r"^  grpo +done", told, re.MULTILINE)
        assert re.search(r"^  classify +job \d+ \(base, ES, GRPO-0.1\)", told, re.MULTILINE)
        jobs = [newest(stage) for stage in ("scorer", "es", "classify", "ratings", "report", "stop_scorer")]
        assert set(cluster.finish(*jobs).values()) == {"COMPLETED"}
        assert steps() == taken + 1  # it went on
        assert (folder / "report.html").exists() and (folder / "ratings" / "ratings.json").exists()

        # Trained further, only what depends on that is made again.
        base = folder / "model_comparisons" / "base_summary.json"
        before = base.stat().st_mtime_ns
        experiment["es"]["arguments"] |= {"num_iterations": taken + 2, "eval_every": 1}
        write(config, experiment)
        assert re.search(r"^  classify +job \d+ \(ES\)", submit(), re.MULTILINE)
        jobs = [newest(stage) for stage in ("scorer", "es", "classify", "ratings", "report", "stop_scorer")]
        assert set(cluster.finish(*jobs).values()) == {"COMPLETED"}
        assert base.stat().st_mtime_ns == before
        assert re.findall(r"^  (\w+) +done", submit(), re.MULTILINE) == ["es", "grpo", "classify", "ratings", "report"]
        assert steps() == taken + 2
    finally:
        if (folder / "jobs.json").exists():
            subprocess.run(["scancel", *all_jobs()], check=False)


def test_a_job_that_slurm_refuses_leaves_none_behind(experiment, tmp_path):
    experiment["report"] = {"sbatch": "--partition=nope"}
    config = write(tmp_path / "refused.yaml", experiment | {"name": "refused"})
    done = Cluster(tmp_path).plain("slurm/submit_pipeline.sh", config)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: SLURM refuses slurm/report.sh: invalid partition specified: nope\n"
    assert not (tmp_path / "refused" / "jobs.json").exists()
    assert "refused" not in slurm("squeue", "--noheader", "--format=%j")


def test_the_demo_completes_and_gives_the_results_of_a_plain_run(tmp_path):
    done = Cluster(tmp_path).plain("slurm/demo_slurm.sh", timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all jobs completed after" in done.stdout
    assert (
        "17 files (weights, held-out answers, classified answers, ratings) are the same with SLURM and without"
        in done.stdout
    )
