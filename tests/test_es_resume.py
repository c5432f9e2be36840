"""ES runs that are started again: after bad scores, after a stop, from checkpoints with other names, without their journal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from broken_models import edit_tensors
from conftest import make_tokenizer
from fake_scorer import FakeScorer
from safetensors.torch import load_file
from script_here import ES, refused, run_script
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig

from alignment.records import write_jsonl

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
