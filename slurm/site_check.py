"""What is missing on this site? slurm/check_site.sh runs this with the site's settings.

    bash slurm/check_site.sh                        # what the job scripts need
    bash slurm/check_site.sh slurm/pipeline.yaml    # and this experiment

The experiment's file is yours: cp slurm/pipeline.example.yaml slurm/pipeline.yaml, and edit it.
A line a finding: `ok`, `no` (must be mended: exit code 1) or `note` (may be as you want it).
"""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from experiment import CLASSIFY_SCRIPT, ES_SCRIPT, GRPO_SCRIPT, RATINGS_SCRIPT, Experiment, looks_like_path
from packaging.requirements import Requirement
from packaging.version import Version
from pipeline import Pipeline

from alignment.config import read_yaml_mapping, script_parser
from alignment.errors import UserError, run_main
from alignment.scoring.service_settings import DEFAULT_COST, DEFAULT_REWARD

PROJECT = "constrained-alignment"
SCRIPTS = ["slurm/run_scorer_service.sh", ES_SCRIPT, "slurm/train_with_scorer.sh", GRPO_SCRIPT, CLASSIFY_SCRIPT]
SCRIPTS += [RATINGS_SCRIPT, "slurm/report.sh"]
SECRETS = re.compile(r"^\s*(?:export\s+)?(\w*(?:KEY|TOKEN|SECRET|SCORER_AUTH))=\S", re.MULTILINE)
DEFAULT_ACCELERATE = "alignment/GRPO/accelerate_4gpu_zero2.yaml"  # of run_grpo_alignment.sh
COPIES = 5  # of a policy in float32 that a training run keeps: two checkpoints, best, final, and the one being written


class Report:
    """Prints findings and counts those that must be mended."""

    def __init__(self) -> None:
        self.missing = 0

    def ok(self, text: str) -> None:
        print(f"ok    {text}")

    def no(self, text: str) -> None:
        self.missing += 1
        print(f"no    {text}")

    def note(self, text: str) -> None:
        print(f"note  {text}")


def main() -> int:
    parser = script_parser(__doc__, prog="check_site.sh")
    parser.add_argument("config", nargs="?", help="an experiment: see slurm/pipeline.example.yaml")
    config = parser.parse_args().config
    experiment = Experiment(config) if config else None
    report = Report()
    check_folders(report)
    check_settings_file(report)
    check_versions(report)
    if experiment is not None:
        check_launcher(report, experiment)
    check_slurm(report, experiment)
    models = experiment.models if experiment else models_of_environment()
    for key, model in models.items():
        check_model(report, key, str(model))
    check_space(report, experiment)
    check_dashboards(report)
    print("nothing is missing" if report.missing == 0 else f"{report.missing} to mend")
    return int(report.missing > 0)


def check_folders(report: Report) -> None:
    if Path("logs").is_dir() and os.access("logs", os.W_OK):
        report.ok("logs/ can be written")
    else:
        report.no("logs/ is missing or cannot be written: SLURM would drop every job without a word; mkdir logs")


def check_settings_file(report: Report) -> None:
    path = Path(os.environ.get("SITE_ENV") or "slurm/site.env")
    if not path.exists():
        report.note("no slurm/site.env: jobs get the cluster's defaults (slurm/site.env.example shows what can be set)")
        return
    report.ok(f"{path} has known settings only")
    text, mode = path.read_text() if path.is_file() else "", stat.S_IMODE(path.stat().st_mode)
    if (secrets := SECRETS.findall(text)) and mode & 0o077:
        report.no(f"others can read {path}, which holds {', '.join(secrets)}: chmod 600 {path}")


def check_versions(report: Report) -> None:
    version = platform.python_version()
    if Version("3.11") <= Version(version) < Version("3.14"):
        report.ok(f"Python {version} ({sys.executable})")
    else:
        report.no(f"Python {version} ({sys.executable}): 3.11 to 3.13 is needed")
    try:
        needed = [Requirement(text) for text in importlib.metadata.requires(PROJECT) or ()]
    except importlib.metadata.PackageNotFoundError:
        report.no("this project is not installed in this environment: make install")
        return
    wrong = []
    for one in needed:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        if not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} {found} ({one.specifier} is needed)")
    if wrong:
        report.no(f"packages: {'; '.join(wrong)}")
    else:
        report.ok(f"torch {importlib.metadata.version('torch')} and {len(needed) - 1} other packages fit")


def check_launcher(report: Report, experiment: Experiment) -> None:
    """Whether Accelerate's file for GRPO is there, and DeepSpeed where that file wants it."""
    if (stage := experiment.stages.get("grpo")) is None:
        return
    name = stage.environment.get("ACCELERATE_CONFIG") or os.environ.get("ACCELERATE_CONFIG") or DEFAULT_ACCELERATE
    if name == "torchrun":
        return
    if not Path(name).is_file():
        report.no(f"grpo: accelerate_config {name} is not there")
    elif read_yaml_mapping(name).get("distributed_type") == "DEEPSPEED" and not find_spec("deepspeed"):
        report.no(
            f"grpo: {name} wants DeepSpeed, which is not installed: pip install deepspeed, or another accelerate_config"
        )


def check_slurm(report: Report, experiment: Experiment | None) -> None:
    """Whether SLURM would take each job, without queueing it, and whether there are nodes with enough GPUs."""
    if shutil.which("sbatch") is None:
        report.no("sbatch not found: run this on a login node of the cluster")
        return
    jobs = [(script, ["--test-only", script]) for script in SCRIPTS]
    if experiment is not None:
        pipeline = Pipeline(experiment, dry_run=True)
        pipeline.new = {name: list(range(len(stage.tasks))) for name, stage in experiment.stages.items()}
        try:
            pipeline.check()
            report.ok(f"SLURM takes the jobs of {experiment.path}: {', '.join(experiment.stages)}")
        except UserError as error:
            report.no(str(error))
    else:
        for script, arguments in jobs:
            done = subprocess.run(["bash", "slurm/submit.sh", *arguments], capture_output=True, text=True)
            problem = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
            if done.returncode == 0:
                report.ok(f"SLURM takes {script}")
            else:
                report.no(problem)
    check_gpus(report)
    shown = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True).stdout
    if re.search(r"JobRequeue\s*=\s*0", shown):
        report.note("the cluster does not requeue by default; the job scripts ask for it (#SBATCH --requeue)")


def check_gpus(report: Report) -> None:
    command = ["sinfo", "--noheader", "--format=%P|%G"]
    partition = os.environ.get("SBATCH_PARTITION")
    command += [f"--partition={partition}"] if partition else []
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    counts = [int(number) for line in lines for number in re.findall(r"gpu(?::[^:,(]+)*:(\d+)", line.split("|")[-1])]
    most, where = max(counts, default=0), partition or "any partition"
    if most >= 5:
        report.ok(f"nodes with up to {most} GPUs in {where}")
    elif most == 4:
        report.note(
            f"nodes have 4 GPUs in {where}: train_with_scorer.sh needs 5; --ntasks-per-node=3 --gpus-per-node=4 fits"
        )
    elif most:
        report.no(
            f"nodes have {most} GPUs in {where}, training asks for 4: --ntasks-per-node and --gpus-per-node in ES_SBATCH"
        )
    else:
        report.no(f"no node with GPUs in {where}: set SBATCH_PARTITION (sinfo -o '%P %G' lists them)")


def models_of_environment() -> dict[str, str]:
    env = os.environ
    return {
        "REWARD_MODEL": env.get("REWARD_MODEL") or DEFAULT_REWARD,
        "COST_MODEL": env.get("COST_MODEL") or DEFAULT_COST,
    }


def check_model(report: Report, key: str, model: str) -> None:
    if looks_like_path(model):
        folder = Path(model)
        weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
        if not folder.is_dir():
            report.no(f"{key}: the folder {model} is not there")
        elif not (folder / "config.json").exists() or not weights:
            report.no(f"{key}: {model} has no config.json, or no weights (*.safetensors, *.bin)")
        else:
            report.ok(f"{key}: {model}, {sum(file.stat().st_size for file in weights) / 1e9:.2f} GB")
        return
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        report.ok(f"{key}: {model} is in the hub's cache")
    elif os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "yes"):
        report.no(
            f"{key}: {model} is not in the hub's cache and HF_HUB_OFFLINE is set: HF_HUB_OFFLINE=0 hf download {model}"
        )
    else:
        report.note(
            f"{key}: {model} is not downloaded yet; the first job would do it, on its node: hf download {model}"
        )


def check_space(report: Report, experiment: Experiment | None) -> None:
    """Room for results, caches and scratch, and what the quota says."""
    places = {"results": str(experiment.folder if experiment else "alignment/outputs")}
    places |= {name: os.environ[name] for name in ("SCRATCH_DIR", "HF_HOME", "WANDB_DIR") if os.environ.get(name)}
    needed = bytes_needed(experiment) if experiment else 0
    for name, place in places.items():
        existing = Path(place).absolute()
        while not existing.exists():
            existing = existing.parent
        free = shutil.disk_usage(existing).free
        text = f"{name}: {place}, {free / 1e9:.0f} GB free"
        if not os.access(existing, os.W_OK):
            report.no(f"{name}: {existing} cannot be written")
        elif name == "results" and free < needed:
            report.no(f"{text}, but its training runs keep up to {needed / 1e9:.0f} GB")
        else:
            report.ok(text)
    if shutil.which("quota"):
        told = subprocess.run(["quota", "-Q", "-p"], capture_output=True, text=True).stdout
        for line in told.splitlines():
            if "*" in line:  # quota marks what is over
                report.no(f"over quota: {' '.join(line.split())}")


def bytes_needed(experiment: Experiment) -> int:
    """What the training runs keep on disk: copies of the policy in float32. 0 where its size is not known here."""
    folder = Path(str(experiment.policy))
    size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    return size * 2 * COPIES * len(experiment.trained)  # its own weights may be 16 bit


def check_dashboards(report: Report) -> None:
    if not os.environ.get("WANDB_PROJECT"):
        return
    try:
        importlib.metadata.version("wandb")
    except importlib.metadata.PackageNotFoundError:
        report.no("WANDB_PROJECT is set, but wandb is not installed: pip install wandb")
        return
    if os.environ.get("WANDB_MODE") == "offline" or os.environ.get("WANDB_API_KEY"):
        report.ok("W&B: offline, or with a key from the environment")
        return
    try:
        known = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    if known:
        report.ok("W&B: logged in")
    else:
        report.no("WANDB_PROJECT is set, but nobody is logged in: wandb login, or WANDB_MODE=offline")


if __name__ == "__main__":
    run_main(main)
