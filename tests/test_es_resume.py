"""ES runs that are started again: after bad scores, after a stop, from checkpoints with other names, without their journal."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_models import edit_tensors
from conftest import REPO, make_tokenizer
from fake_scorer import FakeScorer, run_until_request
from safetensors.torch import load_file
from script_here import ES, refused, run_script
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig

from alignment.errors import UserError
from alignment.ES.advice import warnings
from alignment.ES.fitness import FitnessRule
from alignment.ES.journal import MembersFile
from alignment.ES.member_scores import MemberScores
from alignment.ES.settings import ESSettings
from alignment.ES.step import population_step
from alignment.generation import Generation
from alignment.records import read_jsonl, write_jsonl
from alignment.scoring.scores import Scores

SMALL = {
    "population_size": 4,
    "batch_size": 3,
    "num_iterations": 2,
    "max_new_tokens": 4,
    "sigma": 0.02,
    "alpha": 0.05,
    "eval_every": 100,
    "save_every": 1,
    "scorer_batch_size": 3,
    "scorer_max_wait": 1,
}
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"question {i}?"} for i in range(8)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held out {i}"} for i in range(3)])
    return folder


def es(policy: Path, url: str, prompts: Path, run: Path, **settings) -> list:
    files = ["--train_jsonl", prompts / "train.jsonl", "--eval_jsonl", prompts / "eval.jsonl"]
    where = ["--policy_model_path", policy, "--scorer_url", url, "--experiment_dir", run]
    flags = [text for name, value in (SMALL | settings).items() for text in (f"--{name}", str(value))]
    return [ES, *where, *files, *flags]


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    first, second = final_weights(one), final_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- checkpoints whose tensors have other names than the model's


def renamed_policy(folder: Path, kind: str) -> Path:
    """Of an architecture that is saved under other names: Mixtral's experts one by one, GPT-NeoX's head."""
    common = {
        "vocab_size": make_tokenizer(folder),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    config = {
        "mixtral": lambda: MixtralConfig(**common, num_key_value_heads=2, num_local_experts=2),
        "gpt_neox": lambda: GPTNeoXConfig(**common, max_position_embeddings=1024),
    }[kind]()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("options", [{}, {"trainable": "mlp"}], ids=["all", "part"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox"])
def test_weights_that_are_saved_under_other_names(prompts, tmp_path, kind, options):
    (tmp_path / "policy").mkdir()
    policy = renamed_policy(tmp_path / "policy", kind)
    own = {name for name, _ in AutoModelForCausalLM.from_pretrained(str(policy)).named_parameters()}
    assert own - load_file(policy / "model.safetensors").keys()
    whole, run = tmp_path / "whole", tmp_path / "run"
    with FakeScorer() as scorer:
        for folder, steps in ((whole, 3), (run, 2), (run, 3)):
            done = run_script(*es(policy, scorer.url, prompts, folder, num_iterations=steps, **options))
            assert done.code == 0, done.err
        assert "checkpoint 2, 0 steps replayed" in done.out
        assert same_weights(run, whole)
        base = load_file(policy / "model.safetensors")
        gone = next(name for name, tensor in final_weights(run).items() if not torch.equal(tensor, base[name]))
        edit_tensors(run / "checkpoints" / "iteration_00003", lambda tensors: tensors.pop(gone))
        line = refused(*es(policy, scorer.url, prompts, run, num_iterations=4, **options))
        assert "iteration_00003" in line and "Remove that checkpoint" in line


# --- scores that are missing


@pytest.mark.parametrize("missing", [99, 5], ids=["many", "few, of most prompts"])
def test_a_run_goes_on_once_its_scorer_is_mended(tiny_policy, prompts, tmp_path, missing):
    settings = {"population_size": 12, "batch_size": 8, "scorer_batch_size": 8, "scorer_max_wait": 5}
    whole, run = tmp_path / "whole", tmp_path / "run"
    broken = iter([])  # rows of the next answers that lack their cost

    def answer(number, body):
        scores = FakeScorer.scores(body)
        if body["prompts"][0].startswith("question") and (row := next(broken, None)) is not None:
            scores["costs"][row % 8] = None
            scores["errors"] = [None if value is not None else "cost is not finite" for value in scores["costs"]]
        return scores

    with FakeScorer(answer) as scorer:
        done = run_script(*es(tiny_policy, scorer.url, prompts, whole, **settings))
        assert done.code == 0, done.err
        in_whole = len(scorer.requests)
        for members in (
            13,
            min(missing, 13),
        ):  # the second time those are asked again that lacked a score, and no better
            broken, before = iter(range(missing)), len(scorer.requests)
            line = refused(*es(tiny_policy, scorer.url, prompts, run, **settings))
            assert "scores are missing (cost is not finite)" in line and "start the same command again" in line
            asked = scorer.requests[before:]
            assert sum(body["prompts"][0].startswith("question") for body in asked) == members
            assert len(read_jsonl(run / "journal.jsonl")) == 1
        broken, before = iter([]), len(scorer.requests)
        kept = read_jsonl(run / "members.0.jsonl")
        done = run_script(*es(tiny_policy, scorer.url, prompts, run, **settings))
        assert done.code == 0, done.err
        assert len(kept) == 13 - min(missing, 13)
        assert len(scorer.requests) - before == in_whole - 1 - len(kept)  # the first evaluation, and what was scored
    assert same_weights(run, whole)


def members(population: int, prompts: int, missing: int) -> dict[int, dict]:
    """Rows of a members file, `missing` prompts of which lack a score for one member each."""
    rng = np.random.default_rng(0)
    counts = {"errors": [], "tokens": 9, "unfinished": 0, "cut": 0, "truncated": 0, "distinct": prompts}
    rows = {
        member: {"rewards": rng.normal(size=prompts).tolist(), "costs": rng.normal(size=prompts).tolist(), **counts}
        for member in range(-1, population)
    }
    for prompt in range(missing):
        rows[prompt % population]["rewards"][prompt] = None
    return rows


def test_a_step_is_taken_from_half_of_its_prompts_or_more():
    settings = ESSettings(policy_model_path="policy")
    step = population_step(settings, FitnessRule(), 0, members(30, 64, 32), 1.0)
    assert (step.metrics["prompts_left_out"], step.metrics["scores_missing"]) == (32, 32)
    with pytest.raises(UserError, match=r"33 of 1984 scores are missing .* leaves 31 of 64 prompts: too little"):
        population_step(settings, FitnessRule(), 0, members(30, 64, 33), 1.0)


def test_missing_scores_are_told_of_at_every_step():
    settings = ESSettings(policy_model_path="policy")
    some, none = (population_step(settings, FitnessRule(), 0, members(30, 64, n), 1.0).metrics for n in (7, 0))
    said = ["7 of 1984 scores are missing: 7 prompts and 0 members were left out"]
    assert warnings(some, None) == warnings(some, some) == said
    assert warnings(none, some) == []
    flat = none | {"fitness_std": 0.0}
    assert len(warnings(flat, none)) == 1 and warnings(flat, flat) == []


# --- a stop


class SlowScorer:
    """Half a second a member; `fails` are members, by their prompts, whose scoring raises."""

    on_wait = None

    def __init__(self, fails: tuple[str, ...] = ()):
        self.fails, self.asked = fails, []

    def identity(self) -> dict:
        return {}

    def score(self, prompts, responses, finished=None) -> Scores:
        self.asked.append(responses[0])
        time.sleep(0.5)
        if responses[0] in self.fails:
            raise UserError(f"{responses[0]} failed")
        return Scores(np.ones(1), np.ones(1), [None], [False])


@pytest.mark.parametrize("fails", [(), ("1",)], ids=["stop", "failure"])
def test_what_is_queued_for_the_scorer_is_given_up_and_what_is_asked_is_kept(tmp_path, fails):
    file, scorer = MembersFile(tmp_path, 0), SlowScorer(fails)
    answer = {"raw": "", "num_tokens": 1, "finished": True, "cut": False}
    with ThreadPoolExecutor(2) as pool:
        scores = MemberScores(scorer, pool, file, 3, ["prompt"])
        for member in range(20):
            scores.ask(member, [Generation(response=str(member), **answer)])
        began = time.monotonic()
        if fails:
            with pytest.raises(UserError, match="1 failed"):
                scores.keep_all(lambda: False)
            scores.keep_begun()
        else:
            scores.keep_all(lambda: True)
        assert time.monotonic() - began < 4
    file.close()
    kept = [row["member"] for row in read_jsonl(tmp_path / "members.0.jsonl")]
    assert sorted(map(str, kept)) == sorted(set(scorer.asked) - set(fails))
    assert list(scores.rows) == kept and 0 < len(kept) < 7


@pytest.mark.parametrize("engines", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_does_not_wait_for_scores_that_are_queued(tiny_policy, prompts, tmp_path, engines):
    settings = {"population_size": 30, "num_iterations": 1, "num_engines": engines, "scorer_max_wait": 20}
    whole, run = tmp_path / "whole", tmp_path / "run"
    slow = False

    def answer(number, body):
        time.sleep(1.0 if slow and number > 1 else 0.0)
        return FakeScorer.scores(body)

    with FakeScorer(answer) as scorer:
        done = run_script(*es(tiny_policy, scorer.url, prompts, whole, **settings | {"num_engines": 1}))
        assert done.code == 0, done.err
        in_whole = len(scorer.requests)
        scorer.requests.clear()
        slow = True
        command = [sys.executable, *map(str, es(tiny_policy, scorer.url, prompts, run, **settings))]
        stopped = run_until_request(scorer, 4 * engines, signal.SIGTERM, command)
        assert (stopped.returncode, "Traceback" in stopped.stderr) == (143, False), stopped.stderr
        assert len(scorer.requests) < in_whole / 2
        slow = False
        done = run_script(*es(tiny_policy, scorer.url, prompts, run, **settings | {"num_engines": 1}))
        assert done.code == 0, done.err
        assert len(scorer.requests) == in_whole  # nothing was scored twice
    assert same_weights(run, whole)


# --- a folder that is not empty


@pytest.fixture(scope="module")
def finished(tiny_policy, prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    with FakeScorer() as scorer:
        done = run_script(*es(tiny_policy, scorer.url, prompts, run))
    assert done.code == 0, done.err
    return run


@pytest.mark.parametrize("journal", [None, ""], ids=["no journal", "an empty one"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "members.0.jsonl", "eval", "best", "final", "tensorboard"])
def test_a_new_run_does_not_take_over_what_another_left(tiny_policy, prompts, finished, tmp_path, name, journal):
    run = tmp_path / "run"
    run.mkdir()
    (shutil.copytree if (finished / name).is_dir() else shutil.copy)(finished / name, run / name)
    if journal is not None:
        (run / "journal.jsonl").write_text(journal)
    before = {*run.rglob("*"), run / ".lock"}
    line = refused(*es(tiny_policy, NOBODY, prompts, run))
    assert f"run holds {name} but no journal of their run: give another --experiment_dir" in line
    assert {*run.rglob("*")} == before


@pytest.mark.parametrize(
    "journal",
    [None, lambda row: "", lambda row: row[:40], lambda row: row],
    ids=["none", "empty", "torn", "no newline"],
)
def test_a_run_that_was_killed_between_its_first_files_goes_on(tiny_policy, prompts, finished, tmp_path, journal):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "manifest.json", ".lock"):
        shutil.copy(finished / name, run / name)
    if journal:
        (run / "journal.jsonl").write_text(journal((finished / "journal.jsonl").read_text().splitlines()[0]))
    with FakeScorer() as scorer:
        done = run_script(*es(tiny_policy, scorer.url, prompts, run))
    assert done.code == 0, done.err
    assert same_weights(run, finished)


@pytest.mark.parametrize("gone", ["final", "metrics.jsonl", "the last step's evaluation", "the journal's end"])
def test_a_run_that_lacks_something_of_its_end_is_not_finished(tiny_policy, prompts, finished, tmp_path, gone):
    run = shutil.copytree(finished, tmp_path / "run")
    if gone == "final":
        shutil.rmtree(run / "final")
    elif gone == "metrics.jsonl":
        (run / gone).unlink()
    elif gone == "the journal's end":
        (run / "journal.jsonl").write_text((run / "journal.jsonl").read_text()[:-9])
    else:
        rows = read_jsonl(run / "metrics.jsonl")
        assert rows[-1]["kind"] == "eval"
        write_jsonl(run / "metrics.jsonl", rows[:-1])
    with FakeScorer() as scorer:
        done = run_script(*es(tiny_policy, scorer.url, prompts, run))
    assert (done.code, "\nfinished: " in done.out) == (0, True), done.err
    assert same_weights(run, finished)
    again = run_script(*es(tiny_policy, NOBODY, prompts, run))
    assert (again.code, "is finished" in again.out) == (0, True), again.err


def test_a_finished_run_of_several_processes_ends_under_a_launcher(tiny_policy, prompts, finished):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, *map(str, es(tiny_policy, NOBODY, prompts, finished))]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.count("is finished")) == (0, 1), done.stderr
