"""The GRPO script as users run it, on one process and on two: what it writes, kills, signals, a scorer that fails."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_scorer import FakeScorer, score_of
from grpo_script import REPO, SMALL, command, run_script, same_run, write_prompts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.records import read_json, read_jsonl
from alignment.scoring.discovery import Publication, address_path, own_address


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def undisturbed(tiny_policy, prompts, tmp_path_factory):
    """A run from beginning to end, by number of processes; made when first asked for."""
    runs = {}

    def get(processes=1):
        if processes not in runs:
            run = tmp_path_factory.mktemp("undisturbed") / "run"
            with FakeScorer() as scorer:
                done = run_script(tiny_policy, scorer.url, prompts, run, processes=processes)
            assert done.returncode == 0, done.stderr
            runs[processes] = run, done
        return runs[processes][0]

    get.runs = runs
    return get


def test_the_run_folder_holds_what_it_promises(undisturbed, tiny_policy, prompts):
    run = undisturbed()
    done = undisturbed.runs[1][1]
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [(row["kind"], row["iteration"]) for row in metrics] == [
        ("eval", 0),
        ("train", 0),
        ("train", 1),
        ("eval", 2),
        ("train", 2),
        ("train", 3),
        ("eval", 4),
        ("train", 4),
        ("train", 5),
        ("eval", 6),
    ]
    for row in metrics:
        assert {"reward_mean", "cost_mean", "objective", "safe_ratio", "lambda"} <= row.keys()
        if row["kind"] == "train":
            assert len(set(row["prompt_rows"])) == 2
            assert {"kl", "loss", "grad_norm", "generate", "score", "train"} <= row.keys() | row["seconds"].keys()
        else:
            assert row["objective_low"] is row["objective_high"] is None  # so few prompts give no interval
    lambdas = [row["lambda"] for row in metrics if row["kind"] == "train"]
    assert len(set(lambdas)) == 6
    assert "beta: 0.1" in (run / "config.yaml").read_text()
    assert read_json(run / "manifest.json")["deciding"]["scorer"]["reward_model"] == "fake"
    assert list((run / "tensorboard").iterdir())
    assert len(read_jsonl(run / "eval" / "iteration_00006_points.jsonl")) == 5
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration_00004", "iteration_00006"]
    assert not [path for path in run.rglob("*") if ".tmp" in path.name or path.name == "stopped.json"]
    base = AutoModelForCausalLM.from_pretrained(str(tiny_policy)).state_dict()
    for name in ("final", "best", "checkpoints/iteration_00006"):
        AutoModelForCausalLM.from_pretrained(str(run / name))
    final = load_file(run / "final" / "model.safetensors")
    assert not all(torch.equal(base[name], tensor) for name, tensor in final.items())
    assert read_json(run / "final/trainer_state.json")["lambda_state"]["value"] == lambdas[-1]
    assert "step 6/6 objective" in done.stdout
    assert "Traceback" not in done.stderr

    before = (run / "metrics.jsonl").read_bytes()
    again = run_script(tiny_policy, "http://127.0.0.1:9", prompts, run)
    assert (again.returncode, "is finished" in again.stdout) == (0, True)
    other = run_script(tiny_policy, "http://127.0.0.1:9", prompts, run, beta=0.2)
    assert other.returncode == 2
    assert other.stderr.strip().endswith("or give another --output_dir")
    assert "beta (was 0.1, now 0.2)" in other.stderr
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_steps_are_five_a_stop_and_five(tiny_policy, prompts, tmp_path, processes):
    settings = {"max_steps": 10, "save_steps": 100, "processes": processes}
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, tmp_path / "whole", **settings)
        assert done.returncode == 0, done.stderr
    fifth, told = threading.Event(), threading.Event()

    def answer(number, body):
        if number == 3 + 5 * processes:  # three evaluations by the first process, then its and the others' fifth step
            fifth.set()
            told.wait(60)
        return FakeScorer.scores(body)

    run = tmp_path / "run"
    with FakeScorer(answer) as scorer:
        process = subprocess.Popen(
            command(tiny_policy, scorer.url, prompts, run, **settings),
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert fifth.wait(120)
        if processes == 1:
            process.send_signal(signal.SIGUSR1)
        else:  # the launcher would not hand it on
            (run / "stop").touch()
        told.set()
        output, errors = process.communicate(timeout=120)
        assert process.returncode == (138 if processes == 1 else 1), errors
        assert "go on with:" in output
        assert read_json(run / "stopped.json") == {"iteration": 5, "signal": "SIGUSR1" if processes == 1 else None}
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration_00005"]
        done = run_script(tiny_policy, scorer.url, prompts, run, **settings)
        assert done.returncode == 0, done.stderr
    assert not (run / "stopped.json").exists()
    assert not (run / "stop").exists()
    assert same_run(run, tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_of_one_process_while_answers_are_generated_stops_both(tiny_policy, prompts, tmp_path):
    run, settings = tmp_path / "run", {"processes": 2, "eval_batch_size": 1, "save_steps": 100}
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, script="tests/grpo_rank_signal.py", **settings)
        assert done.returncode == 1
        assert read_json(run / "stopped.json")["iteration"] == 2, done.stderr
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration_00002"]
        assert [row["iteration"] for row in read_jsonl(run / "metrics.jsonl")] == [0, 0, 1]
        for folder in (run, tmp_path / "whole"):
            done = run_script(tiny_policy, scorer.url, prompts, folder, **settings)
            assert done.returncode == 0, done.stderr
    assert same_run(run, tmp_path / "whole")


@pytest.mark.slow
def test_processes_agree_on_what_is_done_when_one_sees_files_late(tiny_policy, prompts, tmp_path):
    run, settings = tmp_path / "run", {"processes": 2, "save_steps": 1}
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, script="tests/grpo_rank_stale.py", **settings)
        assert done.returncode == 1
        assert read_json(run / "stopped.json")["iteration"] == 2, done.stderr
        assert [row["iteration"] for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "eval"] == [0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("late", [3, 1000])
def test_processes_go_on_from_the_same_checkpoint(undisturbed, tiny_policy, prompts, tmp_path, late):
    """One that sees the newest one late waits for it; otherwise it would train at another step, and then hang."""
    run, settings = tmp_path / "run", {"processes": 2, "save_steps": 1}
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **settings, max_steps=2)
        assert done.returncode == 0, done.stderr
        script = {"script": "tests/grpo_rank_late.py", "environment": {"LATE": str(late)}}
        done = run_script(tiny_policy, scorer.url, prompts, run, **settings, **script, max_steps=3)
    assert (done.returncode == 0) == (late == 3), done.stderr
    steps = [row["iteration"] for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == ([0, 1, 2] if late == 3 else [0, 1])
    if late == 1000:
        assert "as newest checkpoints those of the steps 2, 1: its file system shows files late" in done.stderr


@pytest.mark.slow
def test_a_run_goes_on_with_what_takes_less_memory(undisturbed, tiny_policy, prompts, tmp_path):
    """To the same weights but for the order of sums."""
    run, less = (
        tmp_path / "run",
        {"per_device_train_batch_size": 1, "eval_batch_size": 1, "gradient_checkpointing": "true"},
    )
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, max_steps=3, save_steps=3)
        assert done.returncode == 0, done.stderr
        done = run_script(tiny_policy, scorer.url, prompts, run, **less)
    assert done.returncode == 0, done.stderr
    ours, whole = (load_file(folder / "final" / "model.safetensors") for folder in (run, undisturbed()))
    for name, tensor in whole.items():
        assert torch.allclose(ours[name], tensor, atol=1e-5), name
    rows = read_jsonl(run / "starts.jsonl")
    assert rows[0]["changed"]["per_device_train_batch_size"] == [2, 1]


@pytest.mark.slow
def test_kill_9_costs_the_steps_since_the_last_checkpoint(undisturbed, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"

    def answer(number, body):
        if number == 6:  # in the fourth step
            time.sleep(60)
        return FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        process = subprocess.Popen(command(tiny_policy, scorer.url, prompts, run), cwd=REPO, stdout=subprocess.DEVNULL)
        scorer.wait_for_request(6)
        process.kill()
        process.wait()
    half_saved = run / "checkpoints" / f".iteration_00004.{process.pid}@{platform.node()}.tmp"
    half_saved.mkdir()  # as a kill while saving leaves one
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "iter')
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run)
        assert done.returncode == 0, done.stderr
    assert "going on after step 2" in done.stdout
    assert not half_saved.exists()
    assert same_run(run, undisturbed())


@pytest.mark.slow
def test_a_scorer_that_is_down_for_twenty_seconds_changes_nothing(undisturbed, tiny_policy, prompts, tmp_path):
    down = []

    def answer(number, body):
        if number >= 5 and time.monotonic() - (down or [time.monotonic()])[0] < 20:  # from the third step on
            down.append(time.monotonic())
            return (None, 503)[number % 2]
        return FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, tmp_path / "run", scorer_max_wait=120)
    assert done.returncode == 0, done.stderr
    assert len(down) > 3
    assert same_run(tmp_path / "run", undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_scorer_that_stays_away_ends_all_processes_with_their_state(
    undisturbed, tiny_policy, prompts, tmp_path, processes
):
    run = tmp_path / "run"
    good = 2 + 3 * processes  # two evaluations and three steps
    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number <= good else 503) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, processes=processes)
        assert done.returncode == (75 if processes == 1 else 1)  # torchrun makes it 1
        assert read_json(run / "stopped.json") == {"iteration": 3, "signal": None, "exit_code": 75}
        assert f"scorer {scorer.url} gave no answer" in done.stderr
        assert "Traceback (most" not in done.stderr.split("torch/distributed")[0]
        assert (run / "checkpoints" / "iteration_00003").exists()
        assert not (run / "final").exists()
        scorer.answer = lambda number, body: FakeScorer.scores(body)
        done = run_script(tiny_policy, scorer.url, prompts, run, processes=processes)
        assert done.returncode == 0, done.stderr
    assert same_run(run, undisturbed(processes))


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["refused", "wrong count"])
def test_one_process_failing_ends_both(undisturbed, tiny_policy, prompts, tmp_path, failure):
    run = tmp_path / "run"

    def answer(number, body):
        scores = FakeScorer.scores(body)
        if number != 9:  # two evaluations, three steps of two processes; then one request of the fourth
            return scores
        return 422 if failure == "refused" else {name: values[:-1] for name, values in scores.items()}

    with FakeScorer(answer) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, processes=2)
        assert done.returncode == 1
        assert {"refused": "refused the request, 422", "wrong count": "asked for 4 rewards, got 3"}[
            failure
        ] in done.stderr
        assert (run / "checkpoints" / "iteration_00003").exists()
        done = run_script(tiny_policy, scorer.url, prompts, run, processes=2)
        assert done.returncode == 0, done.stderr
    assert same_run(run, undisturbed(2))


def both_end(arguments: list, run: Path, **more: str) -> str:
    """The error that the two processes of a run end with, within a minute."""
    process = subprocess.Popen(
        command(*arguments, run, processes=2, **more),
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        errors = process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends both processes
        process.wait(60)
        raise
    assert process.returncode == 1
    assert "Traceback (most" not in errors.split("torch/distributed")[0]
    (line,) = {line for line in errors.splitlines() if line.startswith("error: ")}
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("eval", "", "cannot write {run}/eval/iteration_00000_points.jsonl"),
        ("best/trainer_state.json", "[]", "{run}/best/trainer_state.json: expected a JSON object"),
        ("checkpoints", "", "cannot write {run}/checkpoints/iteration_00002"),
    ],
)
def test_what_the_first_process_alone_cannot_write_ends_both(tiny_policy, prompts, tmp_path, path, content, said):
    run = tmp_path / "run"

    def answer(number, body):
        if number == 1:  # a file where a folder should be, or that is none of ours
            (run / path).parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (run / path).rmdir()
            (run / path).write_text(content)
        return FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        line = both_end([tiny_policy, scorer.url, prompts], run)
    assert said.format(run=run) in line
    assert (run / path).read_text() == content


@pytest.mark.slow
def test_weights_that_cannot_be_saved_end_both_before_all_save_together(tiny_policy, prompts, tmp_path, monkeypatch):
    run, log = tmp_path / "run", tmp_path / "log"
    log.mkdir()
    monkeypatch.setenv("RANK_LOG", str(log))
    with FakeScorer() as scorer:
        line = both_end([tiny_policy, scorer.url, prompts], run, script="tests/grpo_save_together.py")
    assert f"cannot write {run}/checkpoints/iteration_00002: Input/output error" in line
    assert not list(log.iterdir()) and not list((run / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_both(tiny_policy, prompts, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")

    def answer(number, body):
        if number == 7:  # two evaluations, two steps of two processes, then the third
            with contextlib.suppress(OSError), open(disk / "other", "wb") as file:
                file.write(bytes(2**24))
        return FakeScorer.scores(body)

    try:
        with FakeScorer(answer) as scorer:
            line = both_end([tiny_policy, scorer.url, prompts], disk / "run")
        assert f"{disk / 'run' / 'checkpoints' / 'iteration_0000'}" in line
        assert "its disk has 0 GiB left: make room" in line
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["iteration_00002"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_missing_scores_are_counted_and_too_many_stop_the_run(tiny_policy, prompts, tmp_path):
    settings = {"num_generations": 15, "per_device_train_batch_size": 30, "max_steps": 3, "eval_every": 100}

    def answer(number, body):
        scores = FakeScorer.scores(body)
        for row in {3: [4], 4: [0, 1]}.get(number, []):  # of 30 completions
            scores["rewards"][row] = None
        if number in (3, 4):
            scores["errors"] = [None if value is not None else "not finite" for value in scores["rewards"]]
        return scores

    with FakeScorer(answer) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, tmp_path / "run", **settings)
    assert done.returncode == 2
    assert "2 of 30 completions of this step have no score" in done.stderr
    rows = [row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if row["kind"] == "train"]
    assert [row["scores_missing"] for row in rows] == [0, 1]
    assert (tmp_path / "run/checkpoints/iteration_00002").exists()


@pytest.mark.slow
def test_lambda_is_one_number_on_all_processes_and_the_same_on_any_number(tiny_policy, prompts, tmp_path):
    def answer(number, body):  # scores of the prompt alone: the samples differ between 1 and 2 processes, these do not
        pairs = [score_of(prompt, "") for prompt in body["prompts"]]
        noise = [i / 977 for i in range(len(pairs))] if len(body["prompts"]) == 5 else [0.0] * len(pairs)
        return {"rewards": [r + n for (r, _), n in zip(pairs, noise, strict=True)], "costs": [c for _, c in pairs]}

    found = {}
    for processes in (1, 2):
        log = tmp_path / f"log{processes}"
        log.mkdir()
        with FakeScorer(answer) as scorer:
            done = run_script(
                tiny_policy,
                scorer.url,
                prompts,
                tmp_path / f"run{processes}",
                processes=processes,
                script="tests/grpo_rank_log.py",
                environment={"RANK_LOG": str(log)},
            )
        assert done.returncode == 0, done.stderr
        found[processes] = [(log / f"rank_{rank}.txt").read_text().split() for rank in range(processes)]
    assert found[2][0] == found[2][1] == found[1][0]
    assert len(set(found[1][0])) == SMALL["max_steps"]


@pytest.mark.slow
def test_adapters_resume_exactly_and_are_saved_merged(tiny_policy, prompts, tmp_path):
    settings = {"lora_rank": 2, "max_steps": 4}
    with FakeScorer() as scorer:
        assert run_script(tiny_policy, scorer.url, prompts, tmp_path / "whole", **settings).returncode == 0
    # one evaluation, two steps, one evaluation; the third step finds no scorer
    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number <= 4 else 503) as scorer:
        assert run_script(tiny_policy, scorer.url, prompts, tmp_path / "run", **settings).returncode == 75
        scorer.answer = lambda number, body: FakeScorer.scores(body)
        done = run_script(tiny_policy, scorer.url, prompts, tmp_path / "run", **settings)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/checkpoints/iteration_00004/adapter_model.safetensors").exists()
    assert same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_with_the_scorer_that_it_began_with(tiny_policy, prompts, tmp_path):
    run, settings = tmp_path / "run", {"eval_every": 100, "save_steps": 100}
    with FakeScorer() as begun, FakeScorer() as other:
        assert run_script(tiny_policy, begun.url, prompts, run, max_steps=1, **settings).returncode == 0
        other.identity = begun.identity | {"dtype": "bfloat16"}
        for fake in (begun, other):
            fake.instance = fake.url
            address = own_address(fake.url, fake.instance, {})
            Publication(address_path(tmp_path, address), address, None).write(fake.identity)
        environment = {"LOGS_DIR": str(tmp_path), "EXPERIMENT_ID": "", "SCORER_JOB_ID": ""}
        done = run_script(tiny_policy, "auto", prompts, run, max_steps=2, environment=environment, **settings)
        assert done.returncode == 0, done.stderr
        assert "going on after step 1" in done.stdout
        done = run_script(tiny_policy, other.url, prompts, run, max_steps=3, **settings)
        assert done.returncode == 2
        assert "bfloat16" in done.stderr and done.stderr.strip().endswith("start that one again, or begin another run")
        assert not other.requests


@pytest.mark.slow
def test_the_job_script_sweeps_saves_before_the_limit_and_is_queued_again(tiny_policy, prompts, tmp_path):
    accelerate = tmp_path / "cpu.yaml"  # one process: accelerate starts several on CPUs with mpirun only
    accelerate.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\nnum_machines: 1\n"
        "num_processes: 1\nuse_cpu: true\n"
    )
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "scontrol $*"\n')
    scontrol.chmod(0o755)
    run = tmp_path / "runs" / "beta_0.1"
    environment = {
        **os.environ,
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "ACCELERATE_CONFIG": str(accelerate),
        "OUTPUT_DIR": str(run.parent),
        "BETAS": "0.01 0.1",
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_JOB_ID": "77",
    }
    third = threading.Event()

    def answer(number, body):
        if number == 2 + 2 + 1:  # two evaluations, two steps, then the third
            third.set()
            while not (run / "stop.77.0").exists():
                time.sleep(0.05)
        return FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        flags = command(tiny_policy, scorer.url, prompts, run)[2:]
        where = flags.index("--output_dir")
        flags = flags[:where] + flags[where + 2 :]  # the script gives it, as it gives beta and seed
        for name in ("--beta", "--seed"):
            where = flags.index(name)
            flags = flags[:where] + flags[where + 2 :]
        job = ["bash", "alignment/GRPO/run_grpo_alignment.sh", *flags]
        process = subprocess.Popen(
            job, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert third.wait(120)
        process.send_signal(signal.SIGUSR1)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert "stopped after step 3, queued again" in output
        assert "scontrol requeue 70_1" in output
        again = subprocess.run(job, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0, again.stderr
    assert "going on after step 3" in again.stdout
    assert (run / "final" / "model.safetensors").exists()
    assert "beta: 0.1" in (run / "config.yaml").read_text()

    too_many = environment | {"SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(job, cwd=REPO, env=too_many, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "use --array=0-1" in done.stderr) == (2, True)


@pytest.mark.slow
def test_a_stop_during_start_up_is_heeded_and_an_old_one_is_not(tiny_policy, prompts, tmp_path):
    run, job = tmp_path / "run", {"LAUNCH_ID": "7.0"}  # as the job script says it
    run.mkdir()
    (run / "stop.7.0").touch()  # it came before the processes looked
    for name in ("stop", "stop.6.0"):  # of an earlier launch
        (run / name).touch()
    began = time.monotonic()
    away = run_script(tiny_policy, "http://127.0.0.1:9", prompts, run, environment=job, scorer_max_wait=60)
    assert (away.returncode, time.monotonic() - began < 50) == (143, True), away.stderr
    assert read_json(run / "stopped.json") == {"iteration": 0, "signal": None, "launch": "7.0"}
    assert {path.name for path in run.glob("stop*")} == {"stop.7.0", "stopped.json"}
    with FakeScorer() as scorer:
        early = run_script(tiny_policy, scorer.url, prompts, run, environment=job)
        assert early.returncode == 143, early.stderr
        told = read_json(run / "stopped.json")
        assert told == {"iteration": 0, "signal": None, "launch": "7.0"}  # in the held-out evaluation
        done = run_script(tiny_policy, scorer.url, prompts, run)
    assert done.returncode == 0, done.stderr
    assert not list(run.glob("stop*"))
