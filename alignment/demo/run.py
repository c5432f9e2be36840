"""The whole mission on a CPU in minutes: `make demo`.

    python alignment/demo/run.py
    SEED=1 DEMO_DIR=/tmp/demo python alignment/demo/run.py                           # other noise and data order; another place
    TRAIN_JSONL=train.jsonl EVAL_JSONL=eval.jsonl python alignment/demo/run.py       # other prompts

Builds tiny models, starts the scorer service, trains with ES and GRPO through it, classifies held-out answers before and
after, and makes pictures, a table and a report. Every stage is the script that a cluster job runs; its command is printed, so
it can be repeated alone. A stage that is done is passed over, so a second run is quick. TRAIN_JSONL and EVAL_JSONL use other
prompts, SEED another noise and data order, DEMO_DIR another place. The scorer service is stopped however the demo ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from alignment.config import read_yaml_mapping, script_parser
from alignment.demo.data import oracle
from alignment.errors import UserError, run_main
from alignment.evaluation.compare_models import aligned_table, comparison_table
from alignment.evaluation.measures import interval_text
from alignment.records import read_json, read_jsonl, write_json

REPO = Path(__file__).resolve().parents[2]
SETTINGS = Path("alignment/demo/es_demo.yaml")
GRPO_SETTINGS = Path("alignment/demo/grpo_demo.yaml")
ES = "alignment/ES/es-fine-tuning_alignment_accl_api.py"
GRPO = "alignment/GRPO/train_grpo_alignment.py"
CLASSIFY = "alignment/evaluation/classify_reward_cost_unified.py"
ORACLE_SHARES = {
    "SH": "safe, helpful",
    "SU": "refusing",
    "UH": "unsafe, helpful",
    "UU": "unsafe, rude",
    "XX": "nonsense",
}
SERVICE_START_LIMIT = 120.0  # seconds
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    script_parser(__doc__, prog="run.py").parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `finally` stops the service
    for name in ("TRAIN_JSONL", "EVAL_JSONL", "DEMO_DIR"):
        if os.environ.get(name) and Path.cwd() != REPO:
            os.environ[name] = os.path.abspath(os.environ[name])
    os.chdir(REPO)
    # The models are tiny: more threads than one a process cost more than they bring.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    files_key(*(Path(os.environ[name]) for name in ("TRAIN_JSONL", "EVAL_JSONL") if os.environ.get(name)))  # readable?
    folder = Path(os.environ.get("DEMO_DIR", "alignment/outputs/demo"))
    seed = os.environ.get("SEED", "0")
    models = folder / "models"

    heading("1. tiny models, built from the embedded data")
    call("alignment/demo/build.py", "--output", models)
    train = Path(os.environ.get("TRAIN_JSONL") or models / "custom_train.jsonl")
    held_out = Path(os.environ.get("EVAL_JSONL") or models / "custom_eval.jsonl")
    # Another model, setting or prompt file is another run: it gets a folder of its own.
    key = files_key(SETTINGS, GRPO_SETTINGS, models / "build.json", train, held_out)
    run = folder / f"seed{seed}-{key}"
    es, grpo, comparisons = run / "es", run / "grpo", run / "model_comparisons"

    with scorer_service(models, run) as url:
        prompts = ["--train_jsonl", train, "--eval_jsonl", held_out, "--scorer_url", url]
        heading("2. ES training through the scorer service")
        policy = ["--policy_model_path", models / "policy"]
        call(ES, "--config", SETTINGS, *policy, *prompts, "--global_seed", seed, "--experiment_dir", es)
        heading("3. GRPO training from the same start")
        policy = ["--model_name", models / "policy"]
        call(GRPO, "--config", GRPO_SETTINGS, *policy, *prompts, "--seed", seed, "--output_dir", grpo)
        heading("4. held-out answers of the base policy and of both results")
        longest = str(read_yaml_mapping(SETTINGS)["max_new_tokens"])
        for name, trained in (("base", models / "policy"), ("ES", es / "best"), ("GRPO", grpo / "best")):
            answers = [
                "--from_jsonl",
                held_out,
                "--policy_max_new_tokens",
                longest,
                "--base_model_path",
                models / "policy",
            ]
            output = ["--model_name", name, "--output_dir", comparisons]
            call(CLASSIFY, "--policy_model_path", trained, *answers, "--scorer_url", url, *output)

    heading("5. pictures and report")
    all_three = ["--data-dir", comparisons, "--models", "base", "ES", "GRPO"]
    call("alignment/visualization/plot_reward_cost_grid.py", *all_three, "--output", run / "reward_cost_grid.png")
    call("alignment/visualization/plot_safety_ratios.py", *all_three, "--output", run / "safety_ratios.png")
    curves = [es, grpo, "--labels", "ES", "GRPO", "--x", "samples"]
    call("alignment/visualization/plot_training_curves.py", *curves, "--output", run / "training_curves.png")
    call("alignment/visualization/make_report.py", *all_three, "--runs", es, grpo, "--output", run / "report.html")

    heading("6. what became of the policy, on held-out prompts")
    tables = {name: compare(comparisons, name, embedded=not os.environ.get("EVAL_JSONL")) for name in ("ES", "GRPO")}
    write_json(run / "comparison.json", tables)
    print(three_way(tables))
    print(
        f"\nscored training answers: {', '.join(f'{name} {scored(path):,}' for name, path in (('ES', es), ('GRPO', grpo)))}"
    )
    if os.environ.get("TRAIN_JSONL") or os.environ.get("EVAL_JSONL"):
        print(
            "\nThe tiny models know nothing of these prompts: this shows that the machinery runs on them, not that a model got"
        )
        print(
            "better. A falling log-probability under the base and a falling distinct-2 are what gaming a score model looks like."
        )
    print_places(run, comparisons)
    print(f"done in {time.monotonic() - started:.0f} s")


def compare(comparisons: Path, name: str, embedded: bool) -> list[dict]:
    """Paired by prompt with the base. On the embedded data the oracle's shares are added: its rules know no score model."""
    base, aligned = (read_jsonl(comparisons / f"{one}_points.jsonl") for one in ("base", name))
    extra = {}
    if embedded:
        kinds = [
            np.array([oracle(row["prompt"], row["response"], row["finished"]) for row in points])
            for points in (base, aligned)
        ]
        extra = {f"oracle: {text}": tuple(column == kind for column in kinds) for kind, text in ORACLE_SHARES.items()}
    lam = read_yaml_mapping(SETTINGS).get("lambda_cost", 1.0)
    return comparison_table(base, aligned, lam, extra)


def three_way(tables: dict[str, list[dict]]) -> str:
    """Base, each result, and its paired difference to the base with the 95 % interval."""
    lines = [["measure", "base", *(column for name in tables for column in (name, f"{name} - base, 95 % interval"))]]
    for rows in zip(*tables.values(), strict=True):
        digits = 1 if rows[0]["unit"] == "%" else 2
        unit = f", {rows[0]['unit']}" if rows[0]["unit"] else ""
        line = [rows[0]["label"] + unit, f"{rows[0]['before']:.{digits}f}"]
        for row in rows:
            interval = interval_text(row["low"], row["high"], f"+.{digits}f")
            line += [f"{row['after']:.{digits}f}", f"{row['difference']:+.{digits}f} {interval}"]
        lines.append(line)
    return aligned_table(lines)


def scored(run: Path) -> int:
    return sum(row["scored"] for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "train")


def print_places(run: Path, comparisons: Path) -> None:
    places = {
        "pictures": f"{run}/reward_cost_grid.png, safety_ratios.png, training_curves.png",
        "answers with scores": f"{comparisons}/base_points.jsonl, ES_points.jsonl, GRPO_points.jsonl",
        "aligned policies": f"{run}/es/best, {run}/grpo/best (Hugging Face layout)",
        "run folders": f"{run}/es, {run}/grpo (config.yaml, metrics.jsonl, tensorboard/, ...)",
        "scorer's log": str(run / "scorer_service.log"),
        "report, open it": str((run / "report.html").resolve()),
    }
    print()
    for name, place in places.items():
        print(f"{name + ':':22}{place}")


@contextlib.contextmanager
def scorer_service(models: Path, run: Path) -> Iterator[str]:
    """Starts the service on a free port and yields its address; it is stopped at the end in every case."""
    run.mkdir(parents=True, exist_ok=True)
    address_file, log_path = run / "scorer_address.json", run / "scorer_service.log"
    address_file.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "REWARD_MODEL": str(models / "reward"),
        "COST_MODEL": str(models / "cost"),
        "SCORER_PROBES": str(models / "probes.json"),
        "HOST": "127.0.0.1",
        "PORT": "0",
        "SCORER_ADDRESS_FILE": str(address_file),
    }
    command = [sys.executable, "alignment/scoring/scorer_service.py"]
    with open(log_path, "w") as log:
        # A group of its own: Ctrl-C must reach the trainer, which then still wants scores, and not the service.
        process = start(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + SERVICE_START_LIMIT
        while not address_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(
                    f"the scorer service did not start; its log, {log_path}, ends with: {last_line(log_path)}"
                )
            time.sleep(0.1)
        url = read_json(address_file)["url"]
        print(f"scorer service at {url}, log in {log_path}", flush=True)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def call(script: str, *arguments: object) -> None:
    """Runs one of the project's scripts and shows its command. Ends the demo with the script's exit code if it fails."""
    command = [script, *map(str, arguments)]
    print(f"$ python {shlex.join(command)}", flush=True)
    process = start([sys.executable, *command])
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            continue  # the script got it as well: it saves and says how to go on
        except SystemExit:
            process.terminate()
            process.wait()
            raise
    if code:
        further = "; the same command goes on" if not 0 < code < 128 else ""  # it was stopped
        print(f"\nthe demo stops here: {script} ended with exit code {code}{further}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def start(command: list[str], **options: Any) -> subprocess.Popen:
    """A process that gets SIGTERM when the demo dies, kill -9 included."""
    libc = ctypes.CDLL(None)
    return subprocess.Popen(command, preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM), **options)


def heading(text: str) -> None:
    print(f"\n== {text} ==", flush=True)


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().split("\n")
    return lines[-1] if lines[-1] else "(nothing)"


def files_key(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()[:8]


if __name__ == "__main__":
    run_main(main)
