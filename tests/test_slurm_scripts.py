"""What the job scripts and the pipeline do before and beside SLURM: settings, signals, arrays, mistakes told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from alignment.errors import UserError
from alignment.records import write_json, write_jsonl

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "slurm"))
JOB_SCRIPTS = [
    "slurm/run_scorer_service.sh",
    "slurm/train_accl_alignment_api.sh",
    "slurm/train_with_scorer.sh",
    "slurm/report.sh",
    "alignment/GRPO/run_grpo_alignment.sh",
    "alignment/evaluation/classify_reward_cost_unified.sh",
    "alignment/evaluation/run_gpt_elo_eval.sh",
    "alignment/alpaca/recover_alpaca_job.sh",
]


def bash(*command: object, cwd: Path = REPO, **environment: str) -> subprocess.CompletedProcess:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    own |= {"PYTHON": sys.executable, "SITE_ENV": "/dev/null"} | environment
    return subprocess.run(["bash", *map(str, command)], cwd=cwd, env=own, capture_output=True, text=True, timeout=60)


def fake(folder: Path, name: str, text: str) -> str:
    """A command of that name; returns the PATH with it."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)
    return f"{path.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", JOB_SCRIPTS)
def test_every_job_script_survives_and_logs(script, tmp_path):
    text = (REPO / script).read_text()
    for line in ("--requeue", "--open-mode=append", "--output=logs/", "--signal=B:USR1@"):
        assert f"#SBATCH {line}" in text
    warning = 300 if "train" in script or "grpo" in script else 120  # trainers save weights twice, 27 GB each at 7B
    assert f"--signal=B:USR1@{warning}\n" in text
    done = bash(REPO / script, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.endswith(f" this from the repository root (now in {tmp_path})\n") and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "script",
    [
        "slurm/demo_slurm.sh",
        "slurm/report.sh",
        "alignment/GRPO/run_grpo_alignment.sh",
        "alignment/alpaca/recover_alpaca_full.sh",
        "alignment/alpaca/recover_alpaca_job.sh",
    ],
)
def test_help_shows_the_head_of_a_script_and_starts_nothing(script, tmp_path):
    done = bash(script, "--help", PATH=fake(tmp_path, "sinfo", f"touch {tmp_path}/asked\n"))
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "asked").exists()
    assert f"  bash {script}" in done.stdout or f"  sbatch {script}" in done.stdout
    assert "#SBATCH" not in done.stdout and "set -e" not in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["12", "13"], ["scorer"]])
def test_what_is_no_job_is_not_stopped(arguments, tmp_path):
    done = bash("slurm/stop_scorer.sh", *arguments, PATH=fake(tmp_path, "scancel", f"touch {tmp_path}/asked\n"))
    assert done.returncode == 2 and done.stderr.startswith("error: usage: stop_scorer.sh JOB")
    assert not (tmp_path / "asked").exists()


def test_a_folder_without_results_is_not_made_into_one(tmp_path):
    done = bash("slurm/report.sh", tmp_path / "nothing", "A", "B")
    assert done.returncode == 2 and "model_comparisons is not there" in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_deepspeed_that_is_missing_is_told_in_one_line(tmp_path):
    python = tmp_path / "python"  # knows the project, and no DeepSpeed
    python.write_text('#!/bin/bash\n[[ "$*" != *deepspeed* ]]\n')
    python.chmod(0o755)
    for file, told in (("alignment/GRPO/accelerate_4gpu_zero2.yaml", "wants DeepSpeed"), ("no.yaml", "is not there")):
        done = bash("alignment/GRPO/run_grpo_alignment.sh", PYTHON=str(python), ACCELERATE_CONFIG=file)
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1


# -- settings of the site


def load(site: Path, *, show: str, **environment: str) -> subprocess.CompletedProcess:
    return bash("-c", f". slurm/common.sh; load_site; echo {show}", SITE_ENV=str(site), **environment)


def test_the_environment_wins_over_site_env_and_export_is_for_others(tmp_path):
    site = tmp_path / "site.env"
    site.write_text('# a site\nMAX_RESTARTS=3\n  ES_SBATCH="--time=5 --mem=1G"\nexport NCCL_DEBUG=INFO\n')
    show = '"$MAX_RESTARTS|$ES_SBATCH|$NCCL_DEBUG"; env | grep -c "^MAX_RESTARTS="'
    assert load(site, show=show).stdout == "3|--time=5 --mem=1G|INFO\n1\n"
    assert load(site, show=show, MAX_RESTARTS="9").stdout.startswith("9|")
    assert load(site, show='"$SCORER_URL."', SCORER_URL="").stdout == ".\n"
    # What an experiment asks of its jobs is not for the site to change, also where it is exported for other programs.
    site.write_text("export OUTPUT_DIR=/scratch BETAS=9\n")
    assert load(site, show='"$OUTPUT_DIR|$BETAS"', OUTPUT_DIR="runs").stdout == "runs|9\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("A=1\n", "line 1: unknown setting A (all: "),
        ("\nSBATCH_ACOUNT=x\n", "line 2: unknown setting SBATCH_ACOUNT; did you mean SBATCH_ACCOUNT? (all: "),
        ("VENV = x\n", "line 1: no space before the = of VENV"),
        ("VENV='x\n", "unexpected EOF"),
        ("VENV=$(cat /nowhere)\n", "/nowhere: No such file"),
        ("mdoule load cuda\n", "mdoule: command not found"),
        ("[ -d /nowhere ] && export A=1\n", "its last command failed: instead of 'test && command' write if"),
    ],
)
def test_a_mistake_in_site_env_is_one_line(tmp_path, text, told):
    site = tmp_path / "site.env"
    site.write_text(text)
    done = load(site, show="never")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {site}") and told in done.stderr and done.stderr.count("\n") == 1


def test_the_example_names_only_known_settings_and_may_be_used_as_it_is():
    example = REPO / "slurm" / "site.env.example"
    assert load(example, show="fine").stdout == "fine\n"


def test_a_container_runs_the_scripts(tmp_path):
    path = fake(tmp_path, "apptainer", '[[ "$*" == *" -c "* ]] || echo "$*"\n')
    done = bash(
        "alignment/evaluation/run_gpt_elo_eval.sh", "--dry-run", PATH=path, CONTAINER="x.sif", CUDA_VISIBLE_DEVICES="0"
    )
    assert done.returncode == 0, done.stderr
    assert f"exec --nv --bind {REPO} x.sif {sys.executable} alignment/evaluation/gpt_elo_eval.py" in done.stdout


# -- signals and restarts

CHILD = "import signal,sys,time; signal.signal(signal.{0}, lambda *_: sys.exit({1})); print('up', flush=True); time.sleep(30)"
JOB = '. slurm/common.sh; begin_job; code=0; run "${python[@]}" -c "$CHILD" || code=$?; finish "$code"'


@pytest.mark.parametrize(
    ("name", "code", "restarts", "expected", "told"),
    [
        ("SIGUSR1", 138, "0", 0, "requeue 7"),
        ("SIGUSR1", 138, "2", 138, "queued again 2 times already (MAX_RESTARTS)"),
        ("SIGTERM", 143, "0", 143, ""),
        ("SIGUSR1", 2, "0", 2, ""),
    ],
)
def test_signals_reach_the_program_and_only_a_saved_run_is_queued_again(tmp_path, name, code, restarts, expected, told):
    environment = os.environ | {
        "PATH": fake(tmp_path, "scontrol", 'echo "$*"\n'),
        "PYTHON": sys.executable,
        "SITE_ENV": "/dev/null",
        "CHILD": CHILD.format(name, code),
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": restarts,
        "MAX_RESTARTS": "2",
    }
    with subprocess.Popen(
        ["bash", "-c", JOB], cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        while "up" not in job.stdout.readline():
            assert job.poll() is None
        began = time.monotonic()
        job.send_signal(getattr(signal, name))
        output = job.stdout.read()
    assert (job.returncode, time.monotonic() - began < 10) == (expected, True), output
    assert told in output
    assert ("requeue" in output) == (expected == 0)


SERVICE = """import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"stopping\\n"), time.sleep(1), sys.exit(0)))
print("up", flush=True)
time.sleep(30)
"""


def test_a_term_after_the_warning_does_not_take_its_place(tmp_path):
    """The time limit comes while the scorer still answers what it has: its job is queued again all the same."""
    path = fake(tmp_path, "scontrol", 'echo "$*"\n')
    fake(tmp_path, "python", f'[ "$1" = -c ] || exec {sys.executable} -c "$SERVICE"\n')
    environment = os.environ | {"PATH": path, "PYTHON": "python", "SITE_ENV": "/dev/null", "SERVICE": SERVICE}
    with subprocess.Popen(
        ["bash", "slurm/run_scorer_service.sh"],
        cwd=REPO,
        env=environment | {"SLURM_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        output = ""
        for word, number in (("up\n", signal.SIGUSR1), ("stopping\n", signal.SIGTERM)):
            while not output.endswith(word) and (line := job.stdout.readline()):
                output += line
            job.send_signal(number)
        output += job.stdout.read()
    assert (job.returncode, "requeue 7" in output) == (0, True), output


def test_a_term_to_the_program_alone_is_a_preemptions_grace_time(tmp_path):
    """srun's tasks hear it and save; the script does not, and nobody else would queue the job again."""
    path = fake(tmp_path, "scontrol", 'echo "$*"\n')
    job = '. slurm/common.sh; received=; code=0; run bash -c "exit 143" || code=$?; {}finish "$code"'
    for received in ("", "received=USR1; "):  # and the time limit, which comes while a warned run saves
        preempted = bash("-c", job.format(received), PATH=path, SLURM_JOB_ID="7")
        assert (preempted.returncode, "requeue 7" in preempted.stdout) == (0, True), preempted.stderr
    cancelled = bash("-c", job.format("received=TERM; "), PATH=path, SLURM_JOB_ID="7")
    assert (cancelled.returncode, "requeue" in cancelled.stdout) == (143, False)


@pytest.mark.parametrize(
    ("queue", "environment", "expected", "told"),
    [
        ("PENDING 12", {}, 0, "queued again\nrequeue 7\nupdate jobid=7 dependency=after:12\n"),
        ("RUNNING 13\nPENDING 12", {}, 0, "update jobid=7 starttime=now+900\n"),
        ("", {"SCORER_JOB_ID": "7"}, 0, "update jobid=7 starttime=now+900\n"),  # train_with_scorer.sh: in the same job
        (
            "RUNNING 12",
            {},
            0,
            "stopped and saved for want of a scorer, queued again\nrequeue 7\nupdate jobid=7 starttime=now+900\n",
        ),
        ("", {}, 75, "SLURM has no job of its scorer, scorer.e: submit one, and this again\n"),
        ("", {"EXPERIMENT_ID": ""}, 0, "queued again\nrequeue 7\n"),  # a scorer by hand: who knows
        ("RUNNING 12", {"SLURM_RESTART_COUNT": "2"}, 75, "queued again 2 times already (MAX_RESTARTS)"),
        (
            "RUNNING 12",
            {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SCORER_PAUSE": "3"},
            0,
            "jobid=5_1 starttime=now+3\n",
        ),
        ("RUNNING 12", {"received": "TERM"}, 75, ""),
    ],
)
def test_a_job_whose_scorer_stays_away_is_queued_again_while_one_may_come(tmp_path, queue, environment, expected, told):
    path = fake(tmp_path, "scontrol", 'echo "$*"\n')
    fake(tmp_path, "squeue", f"echo '{queue}'\n")
    environment = {"SLURM_JOB_ID": "7", "EXPERIMENT_ID": "e", "MAX_RESTARTS": "2"} | environment
    done = bash("-c", '. slurm/common.sh; finish "$PASSING"', PATH=path, **environment)
    assert (done.returncode, told in done.stdout + done.stderr) == (expected, True), done.stdout + done.stderr


def test_a_job_that_was_queued_again_too_often_ends_at_once(tmp_path):
    done = bash("-c", JOB, CHILD="print('never')", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="3", MAX_RESTARTS="2")
    assert done.returncode == 2 and "never" not in done.stdout
    assert "queued again 3 times, more than MAX_RESTARTS=2; submit it again to go on" in done.stderr


def test_a_scorer_named_by_hand_reaches_the_trainer(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)

    def flags(**environment: str) -> str:
        return bash("slurm/train_accl_alignment_api.sh", "--sigma", "1", PYTHON=str(python), **environment).stdout

    assert "--scorer_url http://node12:8000 --sigma 1" in flags(SCORER_HOST="node12")
    assert "--scorer_url http://a:1 --sigma 1" in flags(SCORER_URL="http://a:1", SCORER_HOST="node12")
    assert "--scorer_url" not in flags()  # the settings file, or the default: it is found
    assert "--wandb_project p --sigma 1" in flags(WANDB_PROJECT="p")


# -- GRPO's launchers

GRPO = "alignment/GRPO/run_grpo_alignment.sh"
ACCELERATE_FILES = ["accelerate_1gpu.yaml", "accelerate_4gpu_ddp.yaml", "accelerate_4gpu_zero2.yaml"]


def grpo_job(folder: Path, *arguments: str, **environment: str) -> list[str]:
    """The words after `python` with which GRPO's job script starts the launcher."""
    path = fake(folder, "srun", 'while [ "$1" != bash ]; do shift; done; "$@"\n')
    fake(folder, "scontrol", "echo node1\n")
    python = fake(folder, "recorder", f'[ "$1" = -c ] || printf "%s\\n" "$@" >{folder}/words\n').split(":")[0]
    settings = {"PATH": path, "PYTHON": f"{python}/recorder", "OUTPUT_DIR": str(folder)} | environment
    done = bash(GRPO, *arguments, **settings)
    assert done.returncode == 0, done.stderr
    return (folder / "words").read_text().splitlines()


def accelerate_says(words: list[str]):
    """What Accelerate makes of `-m accelerate.commands.launch ...`, and the command if it is not torchrun."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    command = None
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        command, _ = prepare_deepspeed_cmd_env(arguments)
    elif arguments.multi_gpu:
        prepare_multi_gpu_env(arguments)
    return arguments, command


@pytest.mark.parametrize("own_file", [False, True])
def test_deepspeed_on_two_nodes_is_one_group_of_torchrun(tmp_path, own_file):
    """Accelerate's default, pdsh, would start a run of its own on each node, and write all of the environment to a file."""
    file = REPO / "alignment" / "GRPO" / "accelerate_4gpu_zero2.yaml"
    nodes = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NODEID": "1"}
    if own_file:
        lines = [line for line in file.read_text().splitlines() if "multinode" not in line]
        file = tmp_path / "own.yaml"
        file.write_text("\n".join(lines))
    words = grpo_job(tmp_path, ACCELERATE_CONFIG=str(file), **nodes)
    arguments, command = accelerate_says(words)
    assert command is None  # not `deepspeed --launcher pdsh`
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "4", 1)
    if not own_file:  # for an `accelerate launch` by hand
        assert yaml.safe_load(file.read_text())["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize("name", ACCELERATE_FILES)
def test_two_runs_on_a_node_meet_at_ports_of_their_own(tmp_path, name):
    file = REPO / "alignment" / "GRPO" / name
    words = grpo_job(tmp_path, ACCELERATE_CONFIG=str(file))
    if name == "accelerate_1gpu.yaml":
        arguments, _ = accelerate_says(words)  # it takes the flag, and meets nobody
        assert arguments.training_script.endswith("train_grpo_alignment.py")
        return
    ports = {accelerate_says(words)[0].master_port for _ in range(2)}
    assert len(ports) == 2 and not ports & {"0", "29500"}
    own = tmp_path / "own.yaml"
    own.write_text(file.read_text() + "main_process_port: 31234\n")
    assert accelerate_says(grpo_job(tmp_path, ACCELERATE_CONFIG=str(own)))[0].master_port == "31234"


def test_nodes_that_are_runs_of_their_own_are_refused(tmp_path):
    """accelerate_1gpu.yaml on two nodes: Accelerate starts a process without a group on each."""
    script = "alignment/GRPO/train_grpo_alignment.py"
    told = subprocess.run(
        [sys.executable, script, "--model_name", "m", "--output_dir", str(tmp_path / "run")],
        cwd=REPO,
        env=os.environ | {"EXPECTED_PROCESSES": "2"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 2 and not (tmp_path / "run").exists()
    assert told.stderr.startswith("error: the launcher made a group of 1 processes where the job has 2: ")


def test_a_launch_neither_stops_nor_believes_another_one_in_its_folder(tmp_path):
    """The same job submitted twice: the second one waits for the lock, and is cancelled or warned meanwhile."""
    run = tmp_path / "beta_0.01"
    run.mkdir()
    (run / "stopped.json").write_text(of_another := '{"iteration": 3, "signal": null, "launch": "6.0"}')
    waits = 'while [ ! -e "$OUTPUT_DIR/beta_0.01/stop.$LAUNCH_ID" ]; do sleep 0.1; done; exit 1'
    fake(tmp_path, "python", f'[ "$1" = -c ] || {{ echo up; {waits}; }}\n')
    environment = {"PATH": fake(tmp_path, "scontrol", 'echo "$*"\n'), "PYTHON": "python", "SITE_ENV": "/dev/null"}
    environment |= {"OUTPUT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    with subprocess.Popen(
        ["bash", GRPO],
        cwd=REPO,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        while (line := job.stdout.readline()) not in ("up\n", ""):
            pass
        assert line
        job.send_signal(signal.SIGUSR1)
        output = job.stdout.read()
    assert (job.returncode, "requeue" in output) == (1, False), output
    assert [path.name for path in run.iterdir()] == ["stopped.json"]
    assert (run / "stopped.json").read_text() == of_another


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--output_dir", "x"], "--output_dir: the run's folder is OUTPUT_DIR/beta_<value>: set OUTPUT_DIR"),
        (
            ["--seed", "1", "--output-dir=x"],
            "--output-dir: the run's folder is OUTPUT_DIR/beta_<value>: set OUTPUT_DIR",
        ),
        (["--beta=0.5"], "--beta: it names the run's folder: set BETAS, one value an array task, or BETA"),
    ],
)
def test_what_names_the_folder_of_a_grpo_run_is_a_setting_of_the_job(tmp_path, arguments, told):
    """Otherwise the warning before the time limit would go to another folder than the run."""
    done = bash(GRPO, *arguments, PYTHON="true", OUTPUT_DIR=str(tmp_path / "runs"))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {told}\n")
    assert not (tmp_path / "runs").exists()


# -- submitting


@pytest.fixture
def checkout(tmp_path):
    """The repository's scripts in a folder without logs/, and an sbatch that writes down how it was called."""
    for name in ("slurm", "alignment"):
        (tmp_path / name).symlink_to(REPO / name)
    return tmp_path, fake(tmp_path, "sbatch", f'echo "$*" >>{tmp_path}/calls; echo "Submitted"\n')


def test_without_a_logs_folder_nothing_is_queued(checkout):
    folder, path = checkout
    done = bash("slurm/submit.sh", "slurm/run_scorer_service.sh", cwd=folder, PATH=path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "mkdir logs" in done.stderr and not (folder / "calls").exists()
    assert "no    logs/ is missing" in bash("slurm/check_site.sh", cwd=folder, PATH=path).stdout


def test_sbatch_gets_the_settings_of_the_site_and_arrays_that_fit(checkout):
    folder, path = checkout
    (folder / "logs").mkdir()
    site = {"ALL_SBATCH": "--exclude=n1", "GRPO_SBATCH": "--time=9", "CPU_SBATCH": "-p cpu", "MAIL_USER": "me@x"}

    def call(*command: str, **environment: str) -> str:
        done = bash("slurm/submit.sh", *command, cwd=folder, PATH=path, **site, **environment)
        return (folder / "calls").read_text().splitlines()[-1] if done.returncode == 0 else done.stderr

    grpo, mail = "alignment/GRPO/run_grpo_alignment.sh", "--mail-user=me@x --mail-type=FAIL,REQUEUE,END"
    assert call("--hold", grpo, "--seed", "1", BETAS="1 2 3") == (
        f"--exclude=n1 {mail} --time=9 --array=0-2 --hold {grpo} --seed 1"
    )
    assert call("--array=2%1", grpo, BETAS="1 2 3") == f"--exclude=n1 {mail} --time=9 --array=2%1 {grpo}"
    assert call("--array=1,3-5:2", grpo) == "error: --array=1,3-5:2: there is no task 3, BETAS has 2 values: 0 to 1\n"
    assert call("slurm/report.sh", "x") == f"--exclude=n1 {mail} -p cpu slurm/report.sh x"
    sweeps = folder / "sweeps.yaml"
    sweeps.write_text("sweeps: [{model_name: a}, {model_name: b}, {model_name: c}, {model_name: d}]\n")
    classify = "alignment/evaluation/classify_reward_cost_unified.sh"
    assert f"--array=0-3 {classify}" in call(classify, CONFIG_FILE=str(sweeps))
    assert call("nothing.sh") == "error: nothing.sh is not there\n"


def test_a_finished_sweep_is_skipped_unless_forced(tmp_path):
    policy, results = tmp_path / "policy", tmp_path / "results"
    policy.mkdir()
    (policy / "model.safetensors").write_bytes(b"1")
    sweeps = tmp_path / "sweeps.yaml"
    sweeps.write_text(
        yaml.safe_dump(
            {
                "defaults": {"output_dir": str(results)},
                "sweeps": [{"model_name": "a b", "policy_model_path": str(policy)}],
            }
        )
    )
    summary = results / "a_b_summary.json"
    write_json(summary, {"source": f"answers of {policy}"})

    def todo() -> int:
        return subprocess.run([sys.executable, "slurm/sweep_tasks.py", "todo", str(sweeps), "0"], cwd=REPO).returncode

    assert todo() == 3
    job = "alignment/evaluation/classify_reward_cost_unified.sh"
    done = bash(job, CONFIG_FILE=str(sweeps))
    assert (done.returncode, "FORCE=1 classifies it again" in done.stdout) == (0, True)
    os.utime(policy / "model.safetensors", (time.time() + 60,) * 2)
    assert todo() == 0  # trained further
    write_json(summary, {"source": "answers of another"})
    assert todo() == 0
    mistaken = bash(job, "--policy_max_new_tokens", "x", CONFIG_FILE=str(sweeps), FORCE="1")
    assert mistaken.returncode == 2 and summary.exists()
    forced = bash(job, "--from_jsonl", "nowhere.jsonl", CONFIG_FILE=str(sweeps), FORCE="1")
    assert forced.returncode == 2 and not summary.exists()
    missing = bash(job, CONFIG_FILE=str(sweeps), SWEEP="1")
    assert (missing.returncode, missing.stderr) == (2, f"error: {sweeps} has no sweep 1; it has 0 a b\n")


def test_a_sweep_is_done_only_by_a_summary_of_the_very_same_answers(tmp_path):
    from sweep_tasks import sweeps_of

    from alignment.evaluation.classify_settings import ClassifySettings

    policy, given, weights, journal = (tmp_path / name for name in ("checkpoint-50", "a.jsonl", "b.pth", "j.jsonl"))
    policy.mkdir()
    for file in (policy / "model.safetensors", given, weights, journal):
        file.touch()
    entries = [
        {"policy_model_path": str(policy)},
        {"policy_model_path": f"{policy}0"},
        {"policy_model_path": str(policy), "journal": f"{journal}@5"},
        {"policy_model_path": str(policy), "journal": f"{journal}@50"},
        {"policy_model_path": str(policy), "policy_vllm_ckpt": str(weights)},
        {"responses_from": str(given)},
        {},
    ]
    named = [entry | {"model_name": "m", "output_dir": str(tmp_path / str(n))} for n, entry in enumerate(entries)]
    sweeps = sweeps_of({"sweeps": named}, "x")
    for sweep, own in zip(sweeps, named, strict=True):
        for entry in named:
            write_json(sweep.summary, {"source": ClassifySettings(**entry).source})
            assert sweep.is_done() == (entry is own), (own, entry)
    for n in range(len(entries)):
        write_json(sweeps[n].summary, {"source": ClassifySettings(**named[n]).source})

    def outdated_by(file: Path) -> list[int]:
        os.utime(file, (time.time() + 60,) * 2)
        found = [n for n, sweep in enumerate(sweeps) if not sweep.is_done()]
        os.utime(file)
        for sweep in sweeps:
            os.utime(sweep.summary)
        return found

    assert outdated_by(policy / "model.safetensors") == [0, 2, 3, 4]
    assert (outdated_by(weights), outdated_by(given), outdated_by(journal)) == ([4], [5], [])  # a journal only grows


def test_a_sweep_that_is_named_wins_over_the_scripts_own_array(tmp_path, checkout):
    """`SWEEP=b sbatch SCRIPT` has task 0 of #SBATCH --array=0."""
    sweeps = tmp_path / "sweeps.yaml"
    sweeps.write_text("sweeps: [{model_name: a}, {model_name: b}]\n")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    job = "alignment/evaluation/classify_reward_cost_unified.sh"

    def classify(**environment: str) -> subprocess.CompletedProcess:
        return bash(job, CONFIG_FILE=str(sweeps), PYTHON=str(python), **environment)

    def array(tasks: int, task: int) -> dict[str, str]:
        return {"SLURM_ARRAY_TASK_COUNT": str(tasks), "SLURM_ARRAY_TASK_ID": str(task)}

    assert "--sweep b --sweep_config" in classify(SWEEP="b", **array(1, 0)).stdout
    assert "--sweep b --sweep_config" in classify(SWEEP="b").stdout
    assert "--sweep 1 --sweep_config" in classify(**array(2, 1)).stdout
    assert "--sweep 1 --sweep_config" in classify(SWEEP="", **array(2, 1)).stdout
    for one in (array(2, 0), array(1, 1)):
        done = classify(SWEEP="b", **one)
        assert done.returncode == 2
        assert done.stderr == (
            f"error: SWEEP is b, and this is array task {one['SLURM_ARRAY_TASK_ID']}: give SWEEP or --array\n"
        )
    folder, path = checkout
    (folder / "logs").mkdir()
    bash("slurm/submit.sh", job, cwd=folder, PATH=path, CONFIG_FILE=str(sweeps), SWEEP="b")
    assert (folder / "calls").read_text().splitlines()[-1] == f"--array=0-0 {job}"


# -- experiments


@pytest.fixture
def content(tmp_path) -> dict:
    for name in ("train", "eval"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "?"}])
    files = {f"{name}_jsonl": str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    return {
        "policy": "OWNER/NAME",
        "output_dir": str(tmp_path / "out"),
        **files,
        "scorer": None,
        "es": {},
        "classify": {},
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"polcy": 1}, "unknown key 'polcy'; did you mean 'policy'?"),
        ({"es": {"sigma": 1}}, "unknown es: key 'sigma'"),
        ({"es": {"arguments": {"sigmaa": 1}}}, "es: unknown option --sigmaa; did you mean '--sigma'?"),
        ({"grpo": {"arguments": {"num_generations": 1}}}, "grpo: num_generations: 1 is out of range"),
        ({"train_jsonl": "nowhere"}, "train_jsonl: nowhere is not there"),
        ({"policy": "models/none"}, "policy: the folder models/none is not there"),
        ({"policy": None}, "policy is missing"),
        ({"name": "a b"}, "name 'a b'"),
        ({"scorer": False}, "without the stage scorer, scorer_url must say where a scorer is"),
        ({"classify": False, "report": {}}, "the stage report needs the stage classify"),
        ({"classify": {"sweeps": [{"model_name": "ES"}]}}, "two models of one name"),
        ({"classify": {"sweeps": [{}]}}, "sweep 2 has no model_name"),
        ({"es": {"arguments": {"experiment_dir": "x"}}}, "es: arguments: experiment_dir is the experiment's to choose"),
        ({"grpo": {"arguments": {"output_dir": "x"}}}, "grpo: arguments: output_dir is the experiment's to choose"),
        ({"grpo": {"arguments": {"beta": 1}}}, "grpo: arguments: beta: give betas instead, a list"),
        ({"es": 3}, "es: expected 'key: value' lines, or false"),
    ],
)
def test_a_mistake_in_an_experiment_is_told_before_anything_is_queued(content, tmp_path, change, told):
    from experiment import Experiment

    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(content | change))
    with pytest.raises(UserError) as caught:
        Experiment(path)
    assert told in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("grpo", "told"),
    [
        ({"accelerate_config": "no.yaml"}, ["grpo: accelerate_config no.yaml is not there"]),
        ({}, ["grpo: alignment/GRPO/accelerate_4gpu_zero2.yaml wants DeepSpeed, which is not installed"]),
        ({"accelerate_config": "torchrun"}, []),
        ({"accelerate_config": "alignment/GRPO/accelerate_4gpu_ddp.yaml"}, []),
        (False, []),
    ],
)
def test_what_launches_grpo_is_looked_for(content, tmp_path, monkeypatch, grpo, told):
    import site_check
    from experiment import Experiment

    class Told(site_check.Report):
        def no(self, text):
            lines.append(text)

    lines: list[str] = []
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(content | {"grpo": grpo}))
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(site_check, "find_spec", lambda name: None)
    site_check.check_launcher(Told(), Experiment(path))
    assert [line[: len(start)] for line, start in zip(lines, told, strict=True)] == told


def test_an_experiment_names_what_it_leaves_out_and_what_is_done(content, tmp_path):
    from experiment import Experiment

    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(content | {"grpo": {"betas": [0.1, 0.3]}}))
    experiment = Experiment(path)
    assert experiment.left_out == ["ratings", "report"]
    assert experiment.stages["classify"].tasks == ["NAME", "ES", "GRPO-0.1", "GRPO-0.3"]
    assert experiment.stages["grpo"].todo() == [0, 1] and experiment.stages["es"].todo() == [0]
    write_json(experiment.folder / "grpo" / "beta_0.1" / "final" / "trainer_state.json", {"iteration": 500})
    write_json(experiment.folder / "es" / "final" / "trainer_state.json", {"iteration": 499})
    assert experiment.stages["grpo"].todo() == [1] and experiment.stages["es"].todo() == [0]


def test_the_example_experiment_is_valid_but_for_its_files(tmp_path):
    from experiment import Experiment

    with pytest.raises(UserError, match="train_jsonl|policy: the folder"):
        Experiment(REPO / "slurm" / "pipeline.example.yaml")
    content = yaml.safe_load((REPO / "slurm" / "pipeline.example.yaml").read_text())
    for name in ("train_jsonl", "eval_jsonl"):
        content[name] = str(tmp_path / name)
        write_jsonl(tmp_path / name, [{"prompt": "?"}])
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(content | {"policy": "OWNER/alpaca-7b"}))
    assert Experiment(path).left_out == []
