"""The job scripts on a real SLURM (slurm/local_cluster.sh): whatever happens to a job, its run ends as if nothing had."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from slurm_jobs import ES_SCRIPT, GRPO_SCRIPT, Cluster, field, is_back, queue, slurm, state, until, why_not

from alignment.records import read_json, read_jsonl, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
SCORER_SCRIPT = "slurm/run_scorer_service.sh"
LONG = 200  # ES steps of the run that meets its time limit: more than a quick machine takes in half a minute


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    for name, count in (("train", 12), ("eval", 4)):
        write_jsonl(folder / f"{name}.jsonl", [{"prompt": f"{name} question {number}?"} for number in range(count)])
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_policy, prompts):
    """Flags of a training script for a run in `folder`."""
    files = ["--train_jsonl", prompts / "train.jsonl", "--eval_jsonl", prompts / "eval.jsonl", "--scorer_max_wait", 200]

    def es(folder: Path, iterations: int = 40) -> list:
        flags = ["--policy_model_path", tiny_policy, "--experiment_dir", folder, *files, "--max_new_tokens", 12]
        flags += ["--num_iterations", iterations, "--population_size", 4, "--batch_size", 4, "--sigma", 0.05]
        return [*flags, "--alpha", 0.02, "--eval_every", 20, "--save_every", 15, "--lambda_lr", 0.1]

    def grpo() -> list:
        flags = ["--model_name", tiny_policy, *files, "--max_completion_length", 8, "--max_steps", 8]
        flags += ["--num_generations", 4, "--prompts_per_step", 2, "--per_device_train_batch_size", 4]
        return [*flags, "--eval_every", 4, "--save_steps", 4, "--learning_rate", 1e-3, "--lambda_lr", 0.1]

    return {"es": es, "grpo": grpo}


@pytest.fixture(scope="module")
def scorer_settings(tiny_scorers) -> dict[str, str]:
    return {"REWARD_MODEL": str(tiny_scorers[0]), "COST_MODEL": str(tiny_scorers[1]), "SCORER_PROBES": "none"}


@pytest.fixture
def cluster(tmp_path):
    """A cluster for one test; its jobs are cancelled at the end."""
    yield Cluster(tmp_path)
    cancel_all()


def cancel_all() -> None:
    subprocess.run(["scancel", f"--user={os.environ.get('USER') or 'root'}"], check=False)
    until(lambda: not slurm("squeue", "--noheader"), "the queue to be empty")


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def same_result(run: Path, other: Path) -> bool:
    """Weights, lambda, held-out answers and metrics (without their seconds)."""
    for name in ("final/model.safetensors", "final/trainer_state.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for path in (other / "eval").iterdir():
        assert (run / "eval" / path.name).read_bytes() == path.read_bytes(), path.name
    rows, others = (
        [{key: value for key, value in row.items() if key != "seconds"} for row in read_jsonl(folder / "metrics.jsonl")]
        for folder in (run, other)
    )
    assert rows == others
    return True


def published(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "published" / "scorer").glob("*.json"))]


@pytest.fixture(scope="module")
def storm(tmp_path_factory, arguments, scorer_settings):
    """Five runs at once on one scorer, each disturbed in its own way, the scorer too; and the same runs in peace."""
    cluster = Cluster(tmp_path_factory.mktemp("storm"))
    folder, ids = cluster.folder, {}
    common = {"EXPERIMENT_ID": "storm"}
    ids["scorer"] = cluster.submit(SCORER_SCRIPT, options=("--nodelist=node1",), **common, **scorer_settings)

    def es(name: str, *options: str, iterations: int = 40) -> None:
        ids[name] = cluster.submit(ES_SCRIPT, *arguments["es"](folder / name, iterations), options=options, **common)

    es("limit", "--ntasks-per-node=1", "--nodelist=node1", "--time=1", "--signal=B:USR1@30", iterations=LONG)
    es("usr1", "--ntasks-per-node=2", "--nodelist=node1")
    es("requeue", "--ntasks-per-node=1", "--nodelist=node1")
    es("down", "--ntasks-per-node=1", "--nodelist=node2")
    ids["grpo"] = cluster.submit(
        GRPO_SCRIPT, *arguments["grpo"](), options=("--array=1", "--nodelist=node1"), **common, **grpo_settings(folder)
    )
    report = lambda: cluster.report(*ids.values())  # noqa: E731
    runs = {
        "usr1": folder / "usr1",
        "requeue": folder / "requeue",
        "down": folder / "down",
        "grpo": folder / "beta_0.2",
    }
    until(lambda: steps(runs["down"]) >= 3, "steps of down", report=report)
    slurm("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    until(lambda: is_back("node2"), "node2 to be back", report=report)
    until(lambda: steps(runs["usr1"]) >= 3, "steps of usr1", report=report)
    slurm("scancel", "--signal=USR1", "--batch", ids["usr1"])
    until(lambda: steps(runs["requeue"]) >= 3, "steps of requeue", report=report)
    slurm("scontrol", "requeue", ids["requeue"])
    until(lambda: steps(runs["grpo"]) >= 1, "steps of grpo", report=report)
    slurm("scancel", "--signal=USR1", "--batch", ids["grpo"])

    # The scorer: killed, and started again within its job; then requeued, to another node.
    first = published(folder)[0]
    os.kill(first["pid"], signal.SIGKILL)
    until(
        lambda: any(one["pid"] != first["pid"] and one["identity"] for one in published(folder)),
        "the scorer",
        report=report,
    )
    slurm("scontrol", "requeue", ids["scorer"])
    slurm("scontrol", "update", f"jobid={ids['scorer']}", "reqnodelist=node2")
    until(lambda: field(ids["scorer"], "Restarts") == "1" and state(ids["scorer"]) == "RUNNING", "the scorer's job")

    peace = dict(EXPERIMENT_ID="storm", **grpo_settings(folder / "peace"))
    for name, iterations in (("es", 40), ("long", LONG)):
        done = cluster.plain(ES_SCRIPT, *arguments["es"](folder / "peace" / name, iterations), **peace)
        assert done.returncode == 0, done.stderr
    done = cluster.plain(GRPO_SCRIPT, *arguments["grpo"](), BETA="0.2", **peace)
    assert done.returncode == 0, done.stderr
    trainers = [job for name, job in ids.items() if name != "scorer"]
    states = cluster.finish(*trainers)
    states["scorer_before"] = state(ids["scorer"])
    stopped = cluster.plain("slurm/stop_scorer.sh", ids["scorer"])
    assert stopped.returncode == 0, stopped.stderr
    states |= cluster.finish(ids["scorer"])
    yield cluster, ids, states
    cancel_all()


def grpo_settings(folder: Path) -> dict[str, str]:
    return {"ACCELERATE_CONFIG": "torchrun", "OUTPUT_DIR": str(folder), "BETAS": "0.1 0.2"}


@pytest.mark.parametrize("name", ["usr1", "requeue", "down", "limit", "grpo"])
def test_a_disturbed_run_ends_like_an_undisturbed_one(storm, name):
    cluster, ids, states = storm
    log = cluster.log(ids[name] if name != "grpo" else f"{ids[name]}_1")
    assert states[ids[name]] == "COMPLETED", log
    run = cluster.folder / ("beta_0.2" if name == "grpo" else name)
    other = {"limit": "long", "grpo": "beta_0.2"}.get(name, "es")
    assert same_result(run, cluster.folder / "peace" / other)
    assert int(field(ids[name], "Restarts")) >= 1
    assert log.count("== job") >= 2  # one log for all starts
    assert "going on after step" in log
    if name in ("usr1", "limit", "grpo"):
        assert re.search(r"(stopped and saved|stopped after step \d+), queued again", log)


def test_a_scorer_that_was_killed_and_requeued_was_found_again(storm):
    cluster, ids, states = storm
    log = cluster.log(ids["scorer"])
    assert "the scorer ended with exit code 137" in log and "started again (1)" in log
    assert states["scorer_before"] == "RUNNING"
    assert states[ids["scorer"]] == "COMPLETED"  # by stop_scorer.sh
    assert field(ids["scorer"], "Restarts") == "1"
    assert re.findall(r"== job .* on (node\d)", log) == ["node1", "node2"]
    assert '"/score_batch", "status": 200' in log.split("== job")[-1]
    assert published(cluster.folder) == []  # it takes its address away


def test_two_experiments_at_once_keep_to_themselves(cluster, arguments, scorer_settings):
    scorers, trainers = {}, {}
    for name, length in (("a", "400"), ("b", "500")):
        settings = scorer_settings | {"EXPERIMENT_ID": name, "MAX_LENGTH": length}
        scorers[name] = cluster.submit(SCORER_SCRIPT, options=("--nodelist=node2",), **settings)
        trainers[name] = cluster.submit(
            ES_SCRIPT,
            *arguments["es"](cluster.folder / name, 4),
            options=("--nodelist=node1", "--ntasks-per-node=1"),
            EXPERIMENT_ID=name,
        )
    states = cluster.finish(*trainers.values())
    assert set(states.values()) == {"COMPLETED"}, cluster.report(*trainers.values())
    for name, length in (("a", 400), ("b", 500)):
        assert read_json(cluster.folder / name / "manifest.json")["scorer"]["max_length"] == length
    addresses = published(cluster.folder)
    assert {one["experiment_id"] for one in addresses} == {"a", "b"}
    assert len({one["url"] for one in addresses}) == 2
    tokens = [Path(one["token_file"]) for one in addresses]
    assert len({path.read_text() for path in tokens}) == 2
    assert all(path.stat().st_mode & 0o077 == 0 for path in tokens)
    gpus = [set(re.search(r"GPUs ([\d,]+)", cluster.log(job)).group(1).split(",")) for job in trainers.values()]
    assert len(gpus[0]) == len(gpus[1]) == 4 and not gpus[0] & gpus[1]
    assert all(f"Service will be available at {one['url']}" in cluster.log(one["job_id"]) for one in addresses)


def test_several_nodes_and_jobs_with_a_scorer_of_their_own(cluster, arguments, scorer_settings):
    es, grpo = arguments["es"], arguments["grpo"]
    scorer = cluster.submit(SCORER_SCRIPT, EXPERIMENT_ID="nodes", **scorer_settings)
    two = ("--nodes=2", "--ntasks-per-node=1")
    accelerate = cluster.folder / "accelerate.yaml"  # as for GPUs; where there are none it takes CPUs
    accelerate.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\ngpu_ids: all\nmixed_precision: 'no'\n"
        "num_machines: 1\nnum_processes: 1\n"
    )
    wide = cluster.submit(ES_SCRIPT, *es(cluster.folder / "wide", 6), options=two, EXPERIMENT_ID="nodes")
    wide_grpo = cluster.submit(
        GRPO_SCRIPT,
        *grpo(),
        options=(*two, "--array=0"),
        EXPERIMENT_ID="nodes",
        **grpo_settings(cluster.folder) | {"ACCELERATE_CONFIG": str(accelerate)},
    )
    joint = cluster.submit(
        "slurm/train_with_scorer.sh",
        "es",
        *es(cluster.folder / "joint", 6),
        options=("--ntasks-per-node=2",),
        **scorer_settings,
    )
    joint_grpo = cluster.submit(
        "slurm/train_with_scorer.sh",
        "grpo",
        *grpo(),
        **scorer_settings,
        **(grpo_settings(cluster.folder / "joint_grpo") | {"BETA": "0.2"}),
    )
    broken = cluster.submit(
        "slurm/train_with_scorer.sh",
        "es",
        *es(cluster.folder / "broken", 6),
        options=("--ntasks-per-node=1",),
        **scorer_settings | {"REWARD_MODEL": "/nowhere/reward"},
    )
    jobs = [wide, wide_grpo, joint, joint_grpo]
    states = cluster.finish(*jobs, broken)
    assert {states[job] for job in jobs} == {"COMPLETED"}, cluster.report(*jobs)
    assert same_result(cluster.folder / "wide", cluster.folder / "joint")
    assert read_json(cluster.folder / "beta_0.1" / "manifest.json")["deciding"]["processes"] == 2
    assert (cluster.folder / "joint_grpo" / "beta_0.2" / "final").exists()
    assert re.search(r"GPUs for training: \d,\d,\d,\d, for the scorer: \d;", cluster.log(joint))
    assert states[broken] == "FAILED"
    assert "error: the scorer has ended, see logs/scorer_service_" in cluster.log(broken)
    assert state(scorer) == "RUNNING"


def test_trainers_whose_scorer_waits_in_the_queue_are_queued_again(cluster, arguments, scorer_settings):
    """As when the scorer meets its time limit first and the cluster is full; without its job they fail."""
    scorer = cluster.submit(SCORER_SCRIPT, EXPERIMENT_ID="away", **scorer_settings)
    common = {"EXPERIMENT_ID": "away", "SCORER_PAUSE": "5", "MAX_RESTARTS": "90"}
    wait = ("--scorer_max_wait", 4)
    es = cluster.submit(
        ES_SCRIPT, *arguments["es"](cluster.folder / "es", 60), *wait, options=("--ntasks-per-node=2",), **common
    )
    runs = grpo_settings(cluster.folder)
    grpo = cluster.submit(
        GRPO_SCRIPT, *arguments["grpo"](), *wait, "--max_steps", 30, options=("--array=1",), **common, **runs
    )
    report = lambda: cluster.report(scorer, es, f"{grpo}_1")  # noqa: E731
    until(lambda: steps(cluster.folder / "es") >= 1, "a step of es", report=report)
    until(lambda: steps(cluster.folder / "beta_0.2") >= 1, "a step of grpo", report=report)
    slurm("scontrol", "requeuehold", scorer)
    for job in (es, grpo):
        until(
            lambda job=job: field(job, "Restarts") not in ("0", "unknown"), f"{job} to be queued again", report=report
        )
    slurm("scontrol", "release", scorer)
    assert cluster.finish(es, grpo) == {es: "COMPLETED", grpo: "COMPLETED"}, report()
    for job, step in ((es, "stopped and saved"), (f"{grpo}_1", r"stopped after step \d+")):
        assert re.search(step + " for want of a scorer, queued again", cluster.log(job)), report()
        assert "going on after step" in cluster.log(job), report()

    slurm("scancel", scorer)
    until(lambda: not queue(scorer), "the scorer's end")
    alone = cluster.submit(
        ES_SCRIPT, *arguments["es"](cluster.folder / "alone"), *wait, options=("--ntasks-per-node=1",), **common
    )
    assert cluster.finish(alone) == {alone: "FAILED"}
    assert "SLURM has no job of its scorer, scorer.away" in cluster.log(alone)


def test_no_more_restarts_is_a_failure_and_nothing_waits_for_it_for_ever(cluster, arguments, scorer_settings):
    scorer = cluster.submit(SCORER_SCRIPT, EXPERIMENT_ID="end", **scorer_settings)
    run = cluster.folder / "run"
    job = cluster.submit(
        ES_SCRIPT, *arguments["es"](run, 400), options=("--ntasks-per-node=1",), EXPERIMENT_ID="end", MAX_RESTARTS="0"
    )
    after = cluster.submit(
        "slurm/stop_scorer.sh", scorer, options=(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    )
    until(lambda: steps(run) >= 1, "a step", report=lambda: cluster.report(job))
    slurm("scancel", "--signal=USR1", "--batch", job)
    assert cluster.finish(job, after) == {job: "FAILED", after: "CANCELLED"}
    assert "queued again 0 times already (MAX_RESTARTS): submit it again to go on" in cluster.log(job)
    assert steps(run) >= 1 and not queue(job)

    # By hand, as published: a host instead of finding it. The token is the scorer's.
    address = published(cluster.folder)[0]
    host, port = re.fullmatch(r"http://(.*):(\d+)", address["url"]).groups()
    again = cluster.submit(
        ES_SCRIPT,
        *arguments["es"](run, steps(run) + 1),
        options=("--ntasks-per-node=1",),
        SCORER_HOST=host,
        SCORER_PORT=port,
        SCORER_TOKEN_FILE=address["token_file"],
    )
    assert cluster.finish(again) == {again: "COMPLETED"}, cluster.report(again)
    assert "going on after step" in cluster.log(again)


def test_one_task_of_an_array_is_queued_again_alone(cluster):
    """The last task to start has the array's own number for SLURM_JOB_ID, and requeue takes that for all tasks."""
    script = cluster.folder / "job.sh"
    script.write_text(
        "#!/bin/bash\n. slurm/common.sh\nbegin_job\n"
        'case "$SLURM_ARRAY_TASK_ID:${SLURM_RESTART_COUNT:-0}" in\n'
        '"$STOPS:0") run sleep 5; finish "$STOPPED" ;;\n'  # one of the others has ended by then, one runs
        "0:* | $STOPS:*) ;;\n*) run sleep 15 ;;\nesac\nfinish 0\n"
    )
    jobs = {
        stops: cluster.submit(str(script), options=("--array=0-2", "--requeue", "--open-mode=append"), STOPS=str(stops))
        for stops in (1, 2)
    }
    assert set(cluster.finish(*jobs.values()).values()) == {"COMPLETED"}, cluster.report(*jobs.values())
    for stops, job in jobs.items():
        starts = [cluster.log(f"{job}_{task}").count("== job") for task in range(3)]
        assert starts == [2 if task == stops else 1 for task in range(3)], cluster.report(job)


def test_a_job_that_is_cancelled_while_it_saves_is_not_queued_again_and_at_its_time_limit_it_is(cluster):
    script, trainer = cluster.folder / "job.sh", cluster.folder / "trainer.sh"
    trainer.write_text(
        "trap 'echo saving' USR1\ntrap stop=yes TERM\necho up\n"
        'until [ -n "${stop:-}" ]; do sleep 0.2; done\nsleep 3\nexit 138\n'
    )
    script.write_text(
        '#!/bin/bash\n. slurm/common.sh\nbegin_job\nif [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then finish 0; fi\n'
        f'run bash {trainer} || code=$?\nfinish "$code"\n'
    )
    options = ("--requeue", "--open-mode=append", "--signal=B:USR1@50")
    limited = cluster.submit(str(script), options=("--time=1", *options))
    cancelled = cluster.submit(str(script), options=options)
    until(lambda: "up" in cluster.log(cancelled), "the start of the job to be cancelled")
    slurm("scancel", "--signal=USR1", "--batch", cancelled)
    until(lambda: "saving" in cluster.log(cancelled), "the job that saves")
    slurm("scancel", cancelled)
    assert cluster.finish(cancelled, limited) == {cancelled: "CANCELLED", limited: "COMPLETED"}, cluster.report(
        cancelled, limited
    )
    assert "stopped and saved, and cancelled: not queued again" in cluster.log(cancelled)
    for job, starts in ((cancelled, 1), (limited, 2)):
        assert cluster.log(job).count("== job") == starts, cluster.report(job)


def test_an_array_index_past_the_sweeps_and_a_second_cluster_are_refused(cluster):
    job = "alignment/evaluation/classify_reward_cost_unified.sh"
    refused = cluster.plain("slurm/submit.sh", "--array=0-3", job)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "error: --array=0-3: there is no task 3, alignment/evaluation/sweep_configs.yaml has 3 sweeps: 0 to 2\n"
    )
    refused = cluster.plain("slurm/submit.sh", "--partition=nope", job)
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: SLURM refuses {job}: invalid partition specified: nope\n",
    )
    submitted = cluster.plain("slurm/submit.sh", "--parsable", "--hold", job)
    number = submitted.stdout.strip()
    assert slurm("squeue", "--noheader", "--array", f"--jobs={number}", "--format=%K").split() == ["0", "1", "2"]
    slurm("scancel", number)
    with tempfile.TemporaryDirectory() as folder:
        other = cluster.plain("slurm/local_cluster.sh", "start", LOCAL_SLURM_DIR=folder)
    assert other.returncode == 1 and "a SLURM daemon runs here already" in other.stderr
