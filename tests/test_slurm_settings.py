"""What an edited experiment or sweep file does to the results that are there: nothing of other settings passes for done."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_slurm_scripts import REPO, bash, fake

from alignment.config import as_yaml
from alignment.errors import UserError
from alignment.evaluation import classify_reward_cost_unified as classification
from alignment.prompts import text_hash
from alignment.records import read_json, read_jsonl, write_json, write_jsonl
from alignment.runs import write_run_files

CLASSIFY = "alignment/evaluation/classify_reward_cost_unified.sh"
LATER = 60.0  # seconds


def questions(path: Path, count: int, word: str = "question") -> Path:
    write_jsonl(path, [{"prompt": f"{path.stem} {word} {number}?"} for number in range(count)])
    return path


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


# -- sweep files


@pytest.fixture
def entry(tiny_policy, tiny_scorers, tmp_path) -> dict:
    return {
        "model_name": "m",
        "policy_model_path": str(tiny_policy),
        "reward_model": str(tiny_scorers[0]),
        "cost_model": str(tiny_scorers[1]),
        "from_jsonl": str(questions(tmp_path / "eval.jsonl", 6)),
        "policy_max_new_tokens": 4,
        "output_dir": str(tmp_path / "results"),
    }


def todo(path: Path, *flags: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "slurm/sweep_tasks.py", "todo", str(path), "0", *flags]
    done = subprocess.run(command, cwd=REPO, env=os.environ | environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_setting_that_changed_makes_a_sweep_undone(entry, tiny_policy, tmp_path):
    from sweep_tasks import sweeps_of

    flags = [f"--{key}={value}" for key, value in entry.items()]
    classification.main([*flags, "--device", "cpu"])

    def is_done(**changed: object) -> bool:
        return sweeps_of({"sweeps": [entry | changed]}, "x")[0].is_done()

    same = questions(tmp_path / "copy.jsonl", 6)
    same.write_bytes((tmp_path / "eval.jsonl").read_bytes())
    assert is_done() and is_done(from_jsonl=str(same), device="cpu", policy_batch_size=2, scorer_batch_size=3)
    changes = {
        "policy_max_new_tokens": 5,
        "policy_temperature": 0.5,
        "policy_top_p": 0.5,
        "policy_template": "alpaca",
        "policy_use_vllm": True,
        "first_turn_only": False,
        "seed": 1,
        "bf16": True,
        "num_samples": 5,
        "from_jsonl": str(questions(tmp_path / "other.jsonl", 6)),
        "dataset_name": "OWNER/DATA",
        "lambda_cost": 2.0,
        "repeated_prompts": "once",
        "base_model_path": str(tiny_policy),
        "reward_model": entry["cost_model"],
        "cost_model": entry["reward_model"],
        "max_length": 512,
    }
    for key, value in changes.items():
        own = {key: value} | ({"from_jsonl": None} if key == "dataset_name" else {})
        assert not is_done(**own), key
    questions(tmp_path / "eval.jsonl", 7)
    assert not is_done()  # the same file with other prompts


def test_what_cannot_be_gone_on_with_is_taken_away_and_the_reason_told(entry, tmp_path):
    path, folder = write(tmp_path / "sweeps.yaml", {"sweeps": [entry]}), tmp_path / "results"
    assert bash(CLASSIFY, "--device", "cpu", CONFIG_FILE=str(path)).returncode == 0
    made = read_jsonl(folder / "m_generations.jsonl")
    assert todo(path)[0] == 3
    assert todo(path, "--policy_max_new_tokens", "4")[0] == 3

    # Other results of the same answers: these are kept.
    code, told = todo(path, "--lambda_cost", "2")
    assert (code, told) == (0, "sweep 0 (m) is not done: lambda_cost (was 1.0, now 2.0)\n")
    assert read_jsonl(folder / "m_generations.jsonl") == made and (folder / "m_summary.json").exists()

    write(path, {"sweeps": [entry | {"policy_max_new_tokens": 6}]})
    done = bash(CLASSIFY, "--device", "cpu", CONFIG_FILE=str(path))
    assert done.returncode == 0, done.stderr
    assert (
        "sweep 0 (m) is not done, and its saved answers are moved to replaced/: policy_max_new_tokens (was 4, now 6)"
        in done.stdout
    )
    assert read_json(folder / "m_summary.json")["sampling"]["max_new_tokens"] == 6
    (replaced,) = (folder / "replaced").iterdir()
    assert read_jsonl(replaced / "m_generations.jsonl") == made and (replaced / "m_summary.json").exists()
    assert todo(path)[0] == 3


def test_answers_of_a_policy_that_was_trained_further_are_set_aside_before_there_is_a_summary(entry, tmp_path):
    policy = tmp_path / "best"
    policy.mkdir()
    (policy / "model.safetensors").write_bytes(b"1")
    (policy / "README.md").touch()
    path = write(tmp_path / "sweeps.yaml", {"sweeps": [entry | {"policy_model_path": str(policy)}]})
    saved = tmp_path / "results" / "m_generations.jsonl"
    write_jsonl(saved, [{"policy": str(policy), "max_new_tokens": 4}, {"id": "x"}])
    os.utime(policy / "README.md", (time.time() + LATER,) * 2)
    assert todo(path) == (0, "") and saved.exists()  # they are gone on with
    os.utime(policy / "model.safetensors", (time.time() + LATER,) * 2)
    assert todo(path) == (
        0,
        f"sweep 0 (m) is not done, and its saved answers are moved to replaced/: {policy} was written after them\n",
    )
    assert not saved.exists()
    write_jsonl(saved, [{"policy": "another"}])
    assert todo(path) == (0, "") and saved.exists()  # the classification refuses them


def test_force_begins_anew_once_a_job_however_often_it_is_queued_again(entry, tmp_path):
    path, saved = write(tmp_path / "sweeps.yaml", {"sweeps": [entry]}), tmp_path / "results" / "m_generations.jsonl"

    def is_kept(**environment: str) -> bool:
        write_jsonl(saved, [{"policy": entry["policy_model_path"]}])
        assert todo(path, FORCE="1", **environment) == (0, "")
        return saved.exists()

    # queued again before its first start had come so far
    assert not is_kept(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert is_kept(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")  # its own answers
    assert not is_kept(SLURM_JOB_ID="8", SLURM_RESTART_COUNT="0")
    assert not is_kept(SLURM_JOB_ID="8", SLURM_RESTART_COUNT="0")  # twice by hand in one allocation
    assert is_kept(SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1")
    assert not is_kept() and not is_kept()


# -- experiments


@pytest.fixture
def content(tmp_path) -> dict:
    for name in ("reward", "cost", "other/cost"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(name)
    return {
        "name": "e",
        "policy": "OWNER/NAME",
        "output_dir": str(tmp_path / "out"),
        "reward_model": str(tmp_path / "reward"),
        "cost_model": str(tmp_path / "cost"),
        "train_jsonl": str(questions(tmp_path / "train.jsonl", 4)),
        "eval_jsonl": str(questions(tmp_path / "eval.jsonl", 3)),
        "scorer": {},
        "es": {"arguments": {"num_iterations": 10, "sigma": 0.1}},
        "grpo": {"betas": [0.1], "accelerate_config": "torchrun", "arguments": {"max_steps": 10}},
        "classify": {},
    }


def as_if_finished(content: dict, path: Path) -> None:
    """What finished runs of the experiment leave, as far as it tells what they are."""
    from experiment import Experiment
    from recorded import record_asked

    from alignment.model_folder import config_hash, weights_hash

    experiment = Experiment(write(path, content))
    models = {
        key: {"name": key.split("_")[0], "config": config_hash(folder), "weights": weights_hash(folder)}
        for key in ("reward_model", "cost_model")
        for folder in [Path(content[key])]
    }
    scorer = models | {
        "max_length": 576,
        "dtype": "float32",
        "template": "pku",
        "deterministic": True,
        "reference": False,
    }
    for run in experiment.runs:
        files = {"prompts": {key: text_hash(prompts) for key, prompts in run.prompts().items()}}
        deciding = run.settings.deciding() | {"scorer": scorer}
        if run.stage == "es":
            deciding["train_prompts"] = files["prompts"]["train_jsonl"]
            start = {"kind": "start", "base_weights": "0", "settings": deciding}
            write_jsonl(run.folder / "journal.jsonl", [start])
        write_run_files(
            run.folder, as_yaml(run.settings), files | ({"deciding": deciding} if run.stage == "grpo" else {})
        )
        write_json(run.folder / "final" / "trainer_state.json", {"iteration": 10})
    record_asked(experiment, {}, {"scorer": experiment.asked("scorer")})


def edited(content: dict, keys: str, value: object) -> dict:
    *sections, last = keys.split("/")
    content = yaml.safe_load(yaml.safe_dump(content))
    inner = content
    for key in sections:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return content


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (
            "es/arguments/sigma",
            0.2,
            r"e.yaml: es: \S+/es was begun otherwise: sigma \(was 0.1, now 0.2\). .* give another name",
        ),
        ("es/arguments/num_iterations", 9, r"es: .* num_iterations \(was 10, now 9\)"),
        (
            "grpo/arguments/temperature",
            0.5,
            r"grpo: \S+/beta_0.1 was begun otherwise: temperature \(was 0.7, now 0.5\)",
        ),
        ("grpo/arguments/max_steps", 9, r"grpo: .* max_steps \(was 10, now 9\)"),
        ("seed", 1, r"es: .* global_seed \(was 42, now 1\)"),
        ("policy", "OWNER/OTHER", r"es: .* policy_model_path \(was 'OWNER/NAME', now 'OWNER/OTHER'\)"),
        (
            "eval_jsonl",
            "other.jsonl",
            r"es: .* eval_jsonl \(was '\S+eval.jsonl, prompts \w{8}', now '\S+other.jsonl, pro",
        ),
        ("train_jsonl", "other.jsonl", r"es: .* train_prompts \(was '\w+', now '\w+'\)"),
        ("es/arguments/eval_samples", 2, r"es: .* eval_jsonl \(was "),
        ("reward_model", "OWNER/R", r"scorer: \S+ was begun otherwise: reward_model \(was 'reward', now 'OWNER/R'\)"),
        ("cost_model", "other/cost", r"scorer: .* cost_model: weights \(was '\w{16}', now '\w{16}'\)"),
        ("scorer/environment/MAX_LENGTH", 512, r"scorer: .* max_length \(was 576, now 512\)"),
        ("scorer/environment/SCORER_DTYPE", "bfloat16", r"scorer: .* dtype \(was 'float32', now 'bfloat16'\)"),
        ("scorer/environment/MAX_LENGTH", "x", r"e.yaml: scorer: MAX_LENGTH is 'x'"),
    ],
)
def test_results_of_other_settings_are_told_before_anything_is_queued(content, tmp_path, keys, value, told):
    from experiment import Experiment
    from recorded import check_results

    as_if_finished(content, tmp_path / "e.yaml")
    questions(tmp_path / "other.jsonl", 3)
    check_results(Experiment(tmp_path / "e.yaml"))
    value = str(tmp_path / value) if value in ("other.jsonl", "other/cost") else value
    path = write(tmp_path / "e.yaml", edited(content, keys, value))
    with pytest.raises(UserError, match=told) as caught:
        check_results(Experiment(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("es/arguments/num_iterations", 11),
        ("grpo/arguments/max_steps", 11),
        ("es/arguments/eval_every", 5),
        ("es/sbatch", "--time=5"),
        ("eval_jsonl", "copy.jsonl"),
        ("cost_model", "moved/cost"),
        ("scorer/environment/MAX_LENGTH", 576),
        ("classify/settings/policy_max_new_tokens", 9),  # which is made anew
    ],
)
def test_what_decides_nothing_and_more_steps_may_change(content, tmp_path, keys, value):
    from experiment import Experiment
    from recorded import check_results

    as_if_finished(content, tmp_path / "e.yaml")
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "eval.jsonl").read_bytes())
    (tmp_path / "moved").mkdir()
    (tmp_path / "cost").rename(tmp_path / "moved" / "cost")
    if value != "moved/cost":
        (tmp_path / "moved" / "cost").rename(tmp_path / "cost")
    value = str(tmp_path / value) if value in ("copy.jsonl", "moved/cost") else value
    check_results(Experiment(write(tmp_path / "e.yaml", edited(content, keys, value))))


def test_jobs_that_were_asked_for_something_else_are_not_reused(content, tmp_path):
    for name in ("slurm", "alignment"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "logs").mkdir()
    count, names = tmp_path / "count", {"1": "scorer", "2": "es", "3": "grpo"}
    path = fake(tmp_path, "sbatch", f'case "$*" in *--test-only*) exit ;; esac\necho x >>{count}\nwc -l <{count}\n')
    fake(tmp_path, "squeue", f"cat {tmp_path}/queue 2>/dev/null || true\n")
    content.pop("classify")

    def submit(now: dict) -> subprocess.CompletedProcess:
        file = write(tmp_path / "e.yaml", now)
        return bash("slurm/submit_pipeline.sh", file, cwd=tmp_path, PATH=path, PYTHONPATH=str(REPO))

    first = submit(content)
    assert re.findall(r"^  (\w+) +job (\d)", first.stdout, re.MULTILINE) == [
        ("scorer", "1"),
        ("es", "2"),
        ("grpo", "3"),
        ("stop_scorer", "4"),
    ]
    (tmp_path / "queue").write_text(
        "".join(f"{job}|{'0' if job == '3' else 'N/A'}|{name}.e|RUNNING|1:00|n1\n" for job, name in names.items())
    )
    assert "es           job 2 is queued or runs" in submit(content).stdout
    for keys, value, told in (
        ("cost_model", str(tmp_path / "other/cost"), r"scorer: end it first \(scancel 1\): job 1 .* cost_model \(was "),
        (
            "scorer/environment/MAX_LENGTH",
            512,
            r"scorer: end it first \(scancel 1\): job 1 .* max_length \(was 576, now 512",
        ),
        (
            "es/arguments/sigma",
            0.5,
            r"es: end it first \(scancel 2\): job 2 was begun otherwise: sigma \(was 0.1, now 0.5",
        ),
    ):
        refused = submit(edited(content, keys, value))
        assert (refused.returncode, refused.stdout) == (2, "")
        assert re.match(rf"error: {tmp_path}/e.yaml: {told}", refused.stderr), refused.stderr
    assert submit(edited(content, "es/arguments/num_iterations", 20)).returncode == 0
    assert len(count.read_text().split()) == 4  # nothing new


TRAINER = """import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), open(sys.argv[1], "w").write("saved"), sys.exit(143)))
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_local_experiment_is_passed_on_and_waited_for(content, tmp_path, number):
    saved, trainer = tmp_path / "saved", tmp_path / "trainer.py"
    trainer.write_text(TRAINER)
    only = {key: content[key] for key in ("policy", "output_dir", "train_jsonl", "eval_jsonl", "es")}
    file = write(tmp_path / "e.yaml", only | {"scorer_url": "http://127.0.0.1:9"})
    path = fake(
        tmp_path,
        "python",
        f'case "$1" in alignment/ES/*) exec {sys.executable} {trainer} {saved} ;; esac\nexec {sys.executable} "$@"\n',
    )
    environment = os.environ | {"PATH": path, "PYTHON": "python", "SITE_ENV": "/dev/null"}
    with subprocess.Popen(
        ["bash", "slurm/submit_pipeline.sh", str(file), "--local"],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pipeline:
        while (line := pipeline.stdout.readline()) and line != "up\n":
            pass
        pipeline.send_signal(number)
        rest = pipeline.stdout.read()
    assert (pipeline.returncode, saved.exists()) == (128 + number, True), rest
    assert rest == "es has stopped; the same command goes on from here\n"


def test_ratings_of_other_arguments_are_made_again(content, tmp_path):
    from experiment import Experiment

    content = {key: value for key, value in content.items() if key not in ("es", "grpo")}
    content |= {"ratings": {"arguments": {"judge": "scorer"}}}
    experiment = Experiment(write(tmp_path / "e.yaml", content))
    write_json(experiment.sweeps[0].summary, {})
    out = experiment.folder / "ratings"
    write_json(out / "ratings.json", {})
    arguments = ["--concurrency", "8", *experiment.stages["ratings"].arguments]
    write_json(out / "ratings_details.json", {"source": {"arguments": arguments}})
    assert experiment.stages["ratings"].todo() == []
    content["ratings"]["arguments"]["judge"] = "gpt"
    assert Experiment(write(tmp_path / "e.yaml", content)).stages["ratings"].todo() == [0]


@pytest.mark.slow
def test_an_experiment_that_is_edited_and_trained_further(tiny_policy, tiny_scorers, tmp_path):
    """Run here with real models, then edited: nothing passes for done that was made otherwise."""
    es = {"population_size": 2, "batch_size": 2, "max_new_tokens": 4, "num_iterations": 1, "sigma": 0.05, "alpha": 0.05}
    content = {
        "policy": str(tiny_policy),
        "base_name": "base",
        "output_dir": str(tmp_path / "out"),
        "reward_model": str(tiny_scorers[0]),
        "cost_model": str(tiny_scorers[1]),
        "train_jsonl": str(questions(tmp_path / "train.jsonl", 4)),
        "eval_jsonl": str(questions(tmp_path / "eval.jsonl", 3)),
        "scorer": {"environment": {"SCORER_PROBES": "none"}},
        "es": {"arguments": es | {"scorer_max_wait": 300}},
        "classify": {"settings": {"policy_max_new_tokens": 4}},
    }
    results = tmp_path / "out" / "e" / "model_comparisons"
    own = {"LOGS_DIR": str(tmp_path / "logs"), "PYTHON": sys.executable, "SITE_ENV": "/dev/null"}

    def run(now: dict) -> subprocess.CompletedProcess:
        command = ["bash", "slurm/submit_pipeline.sh", str(write(tmp_path / "e.yaml", now)), "--local"]
        return subprocess.run(command, cwd=REPO, env=os.environ | own, capture_output=True, text=True, timeout=600)

    def made(name: str) -> tuple[int, str]:
        sampling = read_json(results / f"{name}_summary.json")["sampling"]
        return sampling["max_new_tokens"], sampling["weights_hash"]

    done = run(content)
    assert done.returncode == 0, done.stdout + done.stderr
    first, base = made("ES"), made("base")
    assert "== " not in run(content).stdout
    for keys, value, told in (
        ("cost_model", str(tiny_scorers[0]), r"e.yaml: scorer: .* cost_model"),
        ("es/arguments/sigma", 0.1, r"e.yaml: es: .* sigma \(was 0.05, now 0.1\)"),
        ("eval_jsonl", str(questions(tmp_path / "eval2.jsonl", 3)), r"e.yaml: es: .* eval_jsonl"),
    ):
        refused = run(edited(content, keys, value))
        assert refused.returncode == 2 and re.search(told, refused.stderr), refused.stdout + refused.stderr

    content = edited(content, "classify/settings/policy_max_new_tokens", 6)
    done = run(content)
    assert done.returncode == 0 and "policy_max_new_tokens (was 4, now 6)" in done.stdout, done.stdout + done.stderr
    assert "== es" not in done.stdout
    assert made("ES") == (6, first[1]) and made("base") == (6, base[1])

    content["es"]["arguments"] |= {"num_iterations": 3, "eval_every": 1, "alpha": 0.05}
    summary = results / "base_summary.json"
    before = summary.stat().st_mtime_ns
    done = run(content)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== es" in done.stdout and "== classify base" not in done.stdout
    assert summary.stat().st_mtime_ns == before
    best = read_json(tmp_path / "out" / "e" / "es" / "best" / "trainer_state.json")["iteration"]
    assert (made("ES")[1] != first[1]) == (best > 1)
