"""GRPO's benchmarks at a tiny size, as they are called on GPUs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from grpo_script import REPO


def bench(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPO, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="an arm must fail")
def test_an_arm_that_fails_is_told_and_the_others_are_measured(tmp_path):
    flags = ["--shape=tiny", "--completion_length=8", "--warmup=1", "--steps=1", f"--folder={tmp_path}"]
    done = bench("bench/grpo_step.py", *flags, "--arms", "published", "vllm", "ours")
    assert done.returncode == 1, done.stderr
    arms = json.loads(done.stdout.splitlines()[-1])["arms"]
    assert arms["vllm"]["failed"].startswith("ImportError: vLLM is not available")
    assert "vllm: failed, ImportError" in done.stdout
    for arm, completions in (("published", 15), ("ours", 60)):
        assert arms[arm]["completions_a_step"] == completions
        assert arms[arm]["seconds"].keys() == {"generate", "score", "reference", "train", "total"}
    assert arms["ours"]["ratio"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_agree_and_a_run_that_died_goes_on_as_it_was():
    done = bench("bench/grpo_ranks.py", "--shape=tiny", "--completion_length=6", "--processes=4")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["saved_after_step"], result["steps_resumed"]) == (3, [4, 5])
    assert len(set(result["lambda"])) == 5
    for name in ("lambda_equal_on_all_processes", "weights_equal_on_all_processes"):
        assert result[name] is True
    for name in ("resumed_lambda_as_before", "resumed_weights_as_before"):
        assert result[name] is True
