"""The ES script as users run it: what it writes, kills and signals in the middle, a scorer that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_scorer import FakeScorer, run_until_request
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.ES.noise import noise
from alignment.records import read_jsonl, write_jsonl

REPO = Path(__file__).resolve().parents[1]
slow = partial(pytest.param, marks=pytest.mark.slow)
SCRIPT = "alignment/ES/es-fine-tuning_alignment_accl_api.py"
SMALL = {
    "population_size": 4,
    "batch_size": 3,
    "num_iterations": 4,
    "max_new_tokens": 6,
    "sigma": 0.02,
    "alpha": 0.05,
    "eval_every": 2,
    "save_every": 2,
    "scorer_batch_size": 2,
    "scorer_max_wait": 3,
    "global_seed": 7,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"question {i}?"} for i in range(8)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held out {i}"} for i in range(5)])
    return folder


def command(policy, url, prompts, run, **settings):
    settings = SMALL | settings
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    files = ["--train_jsonl", str(prompts / "train.jsonl"), "--eval_jsonl", str(prompts / "eval.jsonl")]
    where = ["--policy_model_path", str(policy), "--scorer_url", url, "--experiment_dir", str(run)]
    return [sys.executable, SCRIPT, *where, *files, *flags]


def run_script(*arguments, **settings):
    return subprocess.run(command(*arguments, **settings), cwd=REPO, capture_output=True, text=True, timeout=120)


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    first, second = final_weights(a), final_weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_times(rows: list[dict]) -> list[dict]:
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return [row | {"metrics": without_times([row["metrics"]])[0]} if "metrics" in row else row for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tiny_policy, prompts, tmp_path_factory):
    """A run from beginning to end."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run)
    assert done.returncode == 0, done.stderr
    return run, done


def test_the_run_folder_holds_what_it_promises(undisturbed, tiny_policy):
    run, done = undisturbed
    journal = read_jsonl(run / "journal.jsonl")
    assert [row["iteration"] for row in journal[1:]] == [0, 1, 2, 3]
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [row["iteration"] for row in metrics if row["kind"] == "train"] == [0, 1, 2, 3]
    assert [row["iteration"] for row in metrics if row["kind"] == "eval"] == [0, 2, 4]
    assert all(row["objective_low"] is None for row in metrics if row["kind"] == "eval")  # five prompts: none
    assert "sigma: 0.02" in (run / "config.yaml").read_text()
    assert json.loads((run / "manifest.json").read_text())["scorer"]["reward_model"] == "fake"
    assert list((run / "tensorboard").iterdir())
    assert len(read_jsonl(run / "eval" / "iteration_00004_points.jsonl")) == 5
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["iteration_00002", "iteration_00004"]
    assert not [path for path in run.rglob("*") if ".tmp" in path.name]
    for name in ("final", "best"):
        AutoModelForCausalLM.from_pretrained(str(run / name))
        assert str(tiny_policy) in (run / name / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(str(tiny_policy)).state_dict()
    assert not all(torch.equal(base[name], tensor) for name, tensor in final_weights(run).items())
    assert "step 4/4 objective" in done.stdout


def test_the_weights_are_base_plus_the_journals_steps(undisturbed, tiny_policy):
    """A naive oracle: float64, straight from the journal's seeds, fitness and the published rule."""
    run, _ = undisturbed
    base = dict(AutoModelForCausalLM.from_pretrained(str(tiny_policy)).named_parameters())
    final = final_weights(run)
    steps = read_jsonl(run / "journal.jsonl")[1:]
    for name, parameter in base.items():
        theta = parameter.detach().double()
        for step in steps:
            fitness = np.array(step["fitness"])
            z = (fitness - fitness.mean()) / (fitness.std() + 1e-8)
            for seed, weight in zip(step["seeds"], z, strict=True):
                theta += SMALL["alpha"] / len(z) * weight * noise(seed, name, parameter.shape).double()
        assert torch.allclose(final[name].double(), theta, atol=1e-6)


def test_any_iteration_is_rebuilt_from_base_and_journal(undisturbed, tiny_policy, tmp_path):
    run, _ = undisturbed
    for number, saved in ((2, "checkpoints/iteration_00002"), (4, "checkpoints/iteration_00004"), (None, "final")):
        output = tmp_path / str(number)
        flags = [
            "--journal",
            str(run / "journal.jsonl"),
            "--policy_model_path",
            str(tiny_policy),
            "--output",
            str(output),
        ]
        flags += ["--iteration", str(number)] if number else []
        script = "alignment/ES/rebuild_checkpoint.py"
        done = subprocess.run([sys.executable, script, *flags], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rebuilt, wanted = load_file(output / "model.safetensors"), load_file(run / saved / "model.safetensors")
        assert rebuilt.keys() == wanted.keys()
        assert all(torch.equal(rebuilt[name], wanted[name]) for name in wanted)


def test_a_journal_of_other_base_weights_is_refused(undisturbed, tmp_path):
    run, _ = undisturbed
    flags = [
        "--journal",
        str(run / "journal.jsonl"),
        "--policy_model_path",
        str(run / "final"),
        "--output",
        str(tmp_path / "x"),
    ]
    done = subprocess.run(
        [sys.executable, "alignment/ES/rebuild_checkpoint.py", *flags], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "does not hold the base weights" in done.stderr
    assert not (tmp_path / "x").exists()


OPTIONS = [
    {"antithetic": "true"},
    {"fitness_shaping": "centered_rank", "standardize_within_batch": "true", "safe_first": "true"},
    {"lora_rank": 2, "dtype": "bfloat16"},
    {"trainable": "mlp", "dtype": "bfloat16"},
    {"noise": "reference"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_options_end_to_end(tiny_policy, prompts, tmp_path, options):
    """Each runs, moves what it should and nothing else, goes on after a stop to the same weights, and can be rebuilt."""
    run, parts = tmp_path / "run", tmp_path / "parts"
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **options)
        assert done.returncode == 0, done.stderr
        assert run_script(tiny_policy, scorer.url, prompts, parts, **options, num_iterations=2).returncode == 0
        done = run_script(tiny_policy, scorer.url, prompts, parts, **options)
        assert done.returncode == 0, done.stderr
    if options != {"noise": "reference"}:  # its drift is not in the journal
        assert same_weights(run, parts)
        flags = ["--journal", str(run / "journal.jsonl"), "--policy_model_path", str(tiny_policy)]
        flags += ["--output", str(tmp_path / "rebuilt" / "final")]
        rebuild = [sys.executable, "alignment/ES/rebuild_checkpoint.py", *flags]
        (tmp_path / "rebuilt").mkdir()
        subprocess.run(rebuild, cwd=REPO, check=True, capture_output=True)
        assert same_weights(run, tmp_path / "rebuilt")
    base = dict(AutoModelForCausalLM.from_pretrained(str(tiny_policy)).named_parameters())
    final = final_weights(run)
    assert list((run / "final").glob("*.safetensors")) == [run / "final" / "model.safetensors"]
    if "lora_rank" in options:  # adapters stand on the base as the policy generates with it
        base = {name: tensor.bfloat16().float() for name, tensor in base.items()}
    moved = {name for name, tensor in base.items() if not torch.equal(tensor, final[name])}
    if "trainable" in options:
        assert moved == {name for name in base if "mlp" in name}
    elif "lora_rank" in options:
        assert moved == {name for name in base if "_proj" in name}
    else:
        assert moved == set(base)
    steps = read_jsonl(run / "journal.jsonl")[1:]
    if "antithetic" in options:
        assert all(len(step["seeds"]) == 2 and len(step["fitness"]) == 4 for step in steps)
    assert all(np.isfinite(step["coefficients"]).all() for step in steps)


def test_a_finished_run_has_nothing_left_to_do(undisturbed, tiny_policy, prompts):
    """It asks for no scorer, loads no policy and writes nothing."""
    run, _ = undisturbed
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    for settings in ({}, {"num_iterations": 3}, {"num_engines": 2}):
        done = run_script(tiny_policy, "http://127.0.0.1:9", prompts, run, **settings)
        assert done.returncode == 0, done.stderr
        assert "is finished; a larger --num_iterations would go on with it" in done.stdout
        assert {
            path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()
        } == before


def test_kill_9_in_the_middle_of_an_iteration_changes_nothing(undisturbed, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"

    def answer(number, body):
        if number == 20:  # the fourth of five members of iteration 1
            time.sleep(60)
        return FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        process = subprocess.Popen(command(tiny_policy, scorer.url, prompts, run), cwd=REPO, stdout=subprocess.DEVNULL)
        scorer.wait_for_request(20)
        deadline = time.monotonic() + 20  # the members before the one that hangs are kept as their scores come in
        while not (run / "members.0.jsonl").read_bytes() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert not (run / "final").exists()
    finished = [row["member"] for row in read_jsonl(run / "members.0.jsonl")]
    steps = len(read_jsonl(run / "journal.jsonl")) - 1
    assert finished
    assert 0 < steps < SMALL["num_iterations"]
    with open(run / "members.0.jsonl", "a") as file:
        file.write('{"iteration": 1, "memb')  # a torn line, as a kill can leave one

    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run)
        assert done.returncode == 0, done.stderr
        requests_a_member = 2  # three prompts in requests of two
        members = (SMALL["num_iterations"] - steps) * (SMALL["population_size"] + 1) - len(finished)
        evaluations = 3 * sum(it > steps for it in (2, 4))
        assert len(scorer.requests) == members * requests_a_member + evaluations
    reference = undisturbed[0]
    assert same_weights(run, reference)
    for name in ("journal.jsonl", "metrics.jsonl"):
        assert without_times(read_jsonl(run / name)) == without_times(read_jsonl(reference / name))
    for name in ("iteration_00002_points.jsonl", "iteration_00004_points.jsonl"):
        assert (run / "eval" / name).read_bytes() == (reference / "eval" / name).read_bytes()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), slow(signal.SIGTERM, 143), slow(signal.SIGUSR1, 138)]
)
def test_a_signal_saves_and_says_how_to_go_on(undisturbed, tiny_policy, prompts, tmp_path, number, code):
    run = tmp_path / "run"
    with FakeScorer(pause=0.02) as scorer:
        stopped = run_until_request(scorer, 20, number, command(tiny_policy, scorer.url, prompts, run))
        assert stopped.returncode == code, stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert "go on with:" in stopped.stdout
        assert "--experiment_dir" in stopped.stdout
        again = run_script(tiny_policy, scorer.url, prompts, run)
        assert again.returncode == 0, again.stderr
    assert same_weights(run, undisturbed[0])


@pytest.mark.slow
def test_a_scorer_that_stays_away_stops_the_run_with_its_state_saved(undisturbed, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number < 15 else 503) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run)
        assert done.returncode == 75
        assert scorer.url in done.stderr
        assert "Traceback" not in done.stderr
        assert not (run / "final").exists()
        assert read_jsonl(run / "journal.jsonl")[1:]
        scorer.answer = lambda number, body: FakeScorer.scores(body)
        assert run_script(tiny_policy, scorer.url, prompts, run).returncode == 0
    assert same_weights(run, undisturbed[0])


@pytest.mark.slow
def test_a_scorer_that_hangs_up_now_and_then_changes_nothing(undisturbed, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer(lambda number, body: FakeScorer.scores(body) if number % 5 else (None, 503)[number % 2]) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run)
    assert done.returncode == 0, done.stderr
    assert same_weights(run, undisturbed[0])


def with_missing(every: int):
    """Every so-many-th request has its first reward missing, with a reason."""

    def answer(number, body):
        scores = FakeScorer.scores(body)
        if number % every == 0:
            scores["rewards"][0] = None
            scores["errors"] = ["reward is not finite"] + [None] * (len(body["prompts"]) - 1)
        return scores

    return answer


def test_a_prompt_with_a_missing_score_is_left_out_for_all_members(tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    settings = {"batch_size": 8, "population_size": 6, "num_iterations": 1, "scorer_batch_size": 8}
    answers = {}

    def answer(number, body):
        scores = FakeScorer.scores(body)
        if number == 4:  # after the held-out evaluation and theta: one prompt of one member
            scores["rewards"][2] = None
            scores["errors"] = [None, None, "reward is not finite"] + [None] * 5
            answers["prompt"] = body["prompts"][2]
        if number > 1:
            answers.setdefault("rows", []).append((body["prompts"], scores))
        return scores

    with FakeScorer(answer) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **settings)
    assert done.returncode == 0, done.stderr
    row = next(row for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "train")
    assert (row["prompts_left_out"], row["scores_missing"]) == (1, 1)
    wanted = []
    for texts, scores in answers["rows"][:7]:  # of theta and the members, in whatever order two threads ask
        kept = [i for i, text in enumerate(texts) if text != answers["prompt"]]
        assert len(kept) == 7
        wanted.append(np.mean([scores["rewards"][i] - scores["costs"][i] for i in kept]))
    fitness = read_jsonl(run / "journal.jsonl")[1]["fitness"]
    assert len(set(fitness)) == 6
    assert all(any(value == pytest.approx(one) for one in wanted) for value in fitness)


@pytest.mark.slow
def test_many_missing_scores_stop_the_run_before_it_learns_from_the_rest(tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"

    def answer(number, body):
        return with_missing(4)(number, body) if number > 3 else FakeScorer.scores(body)  # not the held-out evaluation

    with FakeScorer(answer) as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run)
    assert done.returncode == 2
    assert "scores are missing" in done.stderr
    assert "reward is not finite" in done.stderr
    assert len(read_jsonl(run / "journal.jsonl")) == 1


@pytest.mark.slow
def test_other_settings_or_base_weights_are_refused(undisturbed, tiny_policy, prompts, tmp_path):
    run, _ = undisturbed
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, sigma=0.03)
        assert done.returncode == 2
        assert "sigma (was 0.02, now 0.03)" in done.stderr
        begun_with, scorer.identity = scorer.identity, scorer.identity | {"dtype": "bfloat16"}
        done = run_script(tiny_policy, scorer.url, prompts, run, num_iterations=5)
        assert done.returncode == 2
        assert "dtype was 'float32', is 'bfloat16'" in done.stderr
        scorer.identity = begun_with
        done = run_script(undisturbed[0] / "final", scorer.url, prompts, run, num_iterations=5)
        assert done.returncode == 2
        assert "was begun otherwise: base_weights" in done.stderr
        done = run_script(tiny_policy, scorer.url, prompts, run, resume="false")
        assert done.returncode == 2
        assert "holds a run already" in done.stderr


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"sigmaa": 1}, "did you mean '--sigma'"),
        ({"scorer_url": "127.0.0.1:8000"}, "expected something like http://"),
        ({"train_jsonl": "nothing.jsonl"}, "nothing.jsonl"),
        ({"lambda_min": 6}, "lambda_min"),
        ({"antithetic": "true", "population_size": 3}, "even population_size"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny_policy, prompts, tmp_path, settings, word):
    done = run_script(tiny_policy, "http://127.0.0.1:9", prompts, tmp_path / "run", **settings)
    assert done.returncode == 2
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
