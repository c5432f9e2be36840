"""Settings that make no sense, and prompts that do not fit, at ES, GRPO and classification: told before a model loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_scorer import FakeScorer
from script_here import CLASSIFY, ES, GRPO, refused, run_script

from alignment.records import read_jsonl, write_jsonl

NOBODY = "http://127.0.0.1:9"
NO_MODEL = "/absent/model"  # whatever is told was told before anybody looked for it


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Four short prompts; one among three that is longer than the tiny policy's context of 1024 tokens; none."""
    folder = tmp_path_factory.mktemp("prompts")
    short = [{"prompt": f"question {i}?", "response": "yes"} for i in range(4)]
    write_jsonl(folder / "short.jsonl", short)
    write_jsonl(folder / "long.jsonl", [*short[:2], {"prompt": "the long one " + "x" * 1000}, short[2]])
    write_jsonl(folder / "only_long.jsonl", [{"prompt": "the long one " + "x" * 1000}] * 3)
    write_jsonl(folder / "one.jsonl", short[:1])
    (folder / "empty.jsonl").write_text("\n")
    return folder


def es(prompts: Path, run: Path, policy=NO_MODEL, url=NOBODY, train="short", held_out="short", **settings) -> list:
    files = ["--train_jsonl", prompts / f"{train}.jsonl", "--eval_jsonl", prompts / f"{held_out}.jsonl"]
    flags = [text for name, value in settings.items() for text in (f"--{name}", value)]
    return [ES, "--policy_model_path", policy, "--scorer_url", url, "--experiment_dir", run, *files, *flags]


def grpo(prompts: Path, run: Path, policy=NO_MODEL, url=NOBODY, train="short", held_out="short", **settings) -> list:
    files = ["--train_jsonl", prompts / f"{train}.jsonl", "--eval_jsonl", prompts / f"{held_out}.jsonl"]
    flags = [text for name, value in settings.items() for text in (f"--{name}", value)]
    return [GRPO, "--model_name", policy, "--scorer_url", url, "--output_dir", run, *files, *flags]


SHARED = [
    ({"lambda_cost": -1}, "lambda_cost: -1.0 is out of range"),
    ({"lambda_lr": -0.1}, "lambda_lr: -0.1 is out of range"),
    ({"lambda_min": -1}, "lambda_min: -1.0 is out of range"),
    ({"lambda_max": 0}, "is above lambda_max (0.0)"),
    ({"lambda_cost": 10}, "lambda_cost is 10.0, outside lambda_min to lambda_max (0.0001 to 5.0)"),
    ({"lambda_cost": 0}, "give --lambda_adapt false to keep it as it is"),
    ({"lambda_cost": "nan"}, "--lambda_cost: expected a finite number, got 'nan'"),
    ({"cost_threshold_d": "inf"}, "--cost_threshold_d: expected a finite number"),
    ({"jc_ema_beta": 1.5}, "jc_ema_beta: 1.5 is out of range, expected from 0.0 to 1.0"),
    ({"scorer_batch_size": 0}, "scorer_batch_size: 0 is out of range"),
    ({"scorer_max_wait": -1}, "scorer_max_wait: -1.0 is out of range"),
    ({"eval_samples": 0}, "eval_samples: 0 is out of range"),
    ({"eval_every": 0}, "eval_every: 0 is out of range"),
    ({"keep_last": 0}, "keep_last: 0 is out of range"),
    ({"train": "empty"}, "empty.jsonl has no rows"),
    ({"held_out": "empty"}, "empty.jsonl has no rows"),
    ({"held_out": "absent"}, "absent.jsonl"),
    ({"prompt_key": "question"}, "short.jsonl:1: the key 'question' is missing"),
]
ES_ONLY = [
    ({"population_size": 1}, "population_size: 1 is out of range, expected at least 2"),
    ({"population_size": 2.5}, "--population_size: expected a whole number, got '2.5'"),
    ({"sigma": 0}, "sigma is 0: all members would be the same"),
    ({"sigma": -0.1}, "sigma: -0.1 is out of range"),
    ({"sigma": "1e400"}, "--sigma: expected a finite number"),
    ({"alpha": -1}, "alpha: -1.0 is out of range"),
    ({"max_new_tokens": 0}, "max_new_tokens: 0 is out of range"),
    ({"batch_size": 0}, "batch_size: 0 is out of range"),
    ({"num_iterations": 0}, "num_iterations: 0 is out of range"),
    ({"global_seed": -1}, "global_seed: -1 is out of range"),
    ({"safe_first_factor": -1}, "safe_first_factor: -1.0 is out of range"),
    ({"safe_first_factor": 0.3}, "safe_first_factor belongs to safe_first; give that as well"),
    ({"standardize": "reference"}, "standardize: reference belongs to standardize_within_batch"),
    ({"lora_rank": 0}, "lora_rank: 0 is out of range"),
    ({"trainable": "("}, "trainable: '(' is not a regular expression"),
    ({"num_engines": 0}, "num_engines: 0 is out of range"),
]
GRPO_ONLY = [
    ({"num_generations": 1}, "num_generations: 1 is out of range, expected at least 2"),
    ({"prompts_per_step": 5}, "prompts_per_step is 5, but there are only 4 training prompts"),
    ({"train": "one"}, "prompts_per_step is 2, but there are only 1 training prompts"),
    ({"prompts_per_step": 0}, "prompts_per_step: 0 is out of range"),
    ({"max_completion_length": 0}, "max_completion_length: 0 is out of range"),
    ({"max_prompt_length": 0}, "max_prompt_length: 0 is out of range"),
    ({"temperature": 0}, "temperature: 0.0 is out of range"),
    ({"top_p": 1.1}, "top_p: 1.1 is out of range"),
    ({"beta": -0.1}, "beta: -0.1 is out of range"),
    ({"learning_rate": -1}, "learning_rate: -1.0 is out of range"),
    ({"max_steps": 0}, "max_steps: 0 is out of range"),
    ({"save_steps": 0}, "save_steps: 0 is out of range"),
    ({"lora_rank": -1}, "lora_rank: -1 is out of range"),
    ({"per_device_train_batch_size": 7}, "per_device_train_batch_size 7 does not divide"),
]


@pytest.mark.parametrize(("settings", "said"), [*SHARED, *ES_ONLY], ids=str)
def test_es_settings(prompts, tmp_path, settings, said):
    assert said in refused(*es(prompts, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("settings", "said"), [*SHARED, *GRPO_ONLY], ids=str)
def test_grpo_settings(prompts, tmp_path, settings, said):
    assert said in refused(*grpo(prompts, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_grpo_as_several_tasks_of_srun(prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    line = refused(*grpo(prompts, tmp_path / "run"))
    assert "srun has started 4 tasks" in line and "accelerate launch --num_processes 4" in line
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")  # tasks that are launchers, one a node
    assert "nothing.jsonl" in refused(*grpo(prompts, tmp_path / "run"), "--train_jsonl", "nothing.jsonl")


@pytest.fixture
def scorer():
    with FakeScorer() as fake:
        yield fake


SHORT_RUN = {"batch_size": 64, "population_size": 2, "num_iterations": 1, "max_new_tokens": 4, "sigma": 0.02}


def test_a_run_folder_that_is_a_file(prompts, tmp_path):
    (tmp_path / "run").write_text("x")
    for command in (es, grpo):
        assert "run: Not a directory; choose another place" in refused(*command(prompts, tmp_path / "run"))


def test_a_file_in_the_place_of_the_checkpoints(prompts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("x")
    for command in (es, grpo):
        line = refused(*command(prompts, tmp_path / "run", scorer_max_wait=0))
        assert f"cannot write {tmp_path / 'run' / 'checkpoints'}: " in line
        assert "Not a directory; choose another place" in line


def test_a_step_of_es_has_all_prompts_where_there_are_fewer_than_it_asks_for(tiny_policy, prompts, scorer, tmp_path):
    done = run_script(*es(prompts, tmp_path / "run", tiny_policy, scorer.url, **SHORT_RUN))
    assert done.code == 0, done.err
    assert "note: batch_size is 64, but there are 4 training prompts: a step uses them all" in done.out
    (row,) = (row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train")
    assert row["scored"] == 3 * 4


TOO_LONG = "tokens; with max_new_tokens 4 that is more than the model's context of 1024"


@pytest.mark.parametrize("file", ["train", "held_out"])
def test_es_with_a_prompt_longer_than_the_context(tiny_policy, prompts, scorer, tmp_path, file):
    line = refused(*es(prompts, tmp_path / "run", tiny_policy, scorer.url, **SHORT_RUN, **{file: "long"}))
    assert f"{prompts / 'long.jsonl'}: the prompt 'the long one xxx" in line and TOO_LONG in line
    assert not scorer.requests and not (tmp_path / "run").exists()


def test_es_with_answers_longer_than_the_context(tiny_policy, prompts, scorer, tmp_path):
    settings = SHORT_RUN | {"max_new_tokens": 1024}
    line = refused(*es(prompts, tmp_path / "run", tiny_policy, scorer.url, **settings))
    assert "short.jsonl: the prompt 'question 0?' has" in line and "allow fewer new tokens" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train": "long", "max_prompt_length": 2000}, "long.jsonl: the prompt 'the long one xxx"),
        ({"held_out": "long"}, "long.jsonl: the prompt 'the long one xxx"),
        ({"max_completion_length": 1000}, "short.jsonl: the prompt 'question 0?' has"),
        ({"train": "only_long"}, "all 3 training prompts are longer than max_prompt_length 512 tokens"),
        ({"train": "long", "prompts_per_step": 4}, "there are only 3 training prompts (of at most max_prompt_length"),
    ],
    ids=str,
)
def test_grpo_with_prompts_and_answers_longer_than_the_context(tiny_policy, prompts, scorer, tmp_path, settings, said):
    settings = {"max_completion_length": 4, "num_generations": 2} | settings
    assert said in refused(*grpo(prompts, tmp_path / "run", tiny_policy, scorer.url, **settings))
    assert not scorer.requests and not (tmp_path / "run").exists()


def test_grpo_says_how_many_prompts_it_leaves_out(tiny_policy, prompts, scorer, tmp_path):
    settings = {"max_completion_length": 4, "num_generations": 2, "max_steps": 1, "train": "long"}
    done = run_script(*grpo(prompts, tmp_path / "run", tiny_policy, scorer.url, **settings))
    assert done.code == 0, done.err
    assert "1 of 4 training prompts are longer than max_prompt_length and left out" in done.out


def test_classification_of_a_prompt_longer_than_the_context(tiny_policy, prompts, scorer, tmp_path):
    flags = ["--from_jsonl", prompts / "long.jsonl", "--scorer_url", scorer.url, "--output_dir", tmp_path]
    line = refused(CLASSIFY, "--policy_model_path", tiny_policy, *flags, "--policy_max_new_tokens", 4)
    assert TOO_LONG in line and "the long one" in line
    assert not scorer.requests
