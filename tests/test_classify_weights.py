"""Policies with other weights in them: vLLM's fused state dicts, and iterations rebuilt from an ES journal."""

import importlib.util
import pickle
import subprocess
import sys

import pytest
import torch
from fake_scorer import FakeScorer

from alignment.errors import UserError
from alignment.ES.journal import Journal
from alignment.ES.noise import member_seed
from alignment.ES.policy_weights import open_weights
from alignment.ES.settings import ESSettings
from alignment.evaluation import classify_reward_cost_unified as script
from alignment.evaluation.classify_settings import ClassifySettings
from alignment.evaluation.policies import load_vllm_checkpoint, open_policy
from alignment.generation import TransformersEngine
from alignment.records import read_json, read_jsonl, write_jsonl


@pytest.fixture
def other_weights(tiny_policy, tmp_path):
    """A folder with other weights for the same model, and its state by Hugging Face name."""
    engine = TransformersEngine(tiny_policy)
    generator = torch.Generator().manual_seed(5)
    state = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in engine.weights().items()
    }
    engine.save_pretrained(tmp_path / "other", state)
    return tmp_path / "other", state


def fused(state: dict) -> dict:
    """As vLLM holds it: projections joined, the vocabulary padded to a multiple of 64, tensors as parameters."""
    result = dict(state)
    for layer in range(2):
        stem = f"model.layers.{layer}."
        for joined, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            where = stem + joined.split(".")[0]
            pieces = [result.pop(f"{where}.{part}_proj.weight") for part in parts]
            result[f"{stem}{joined}_proj.weight"] = torch.nn.Parameter(torch.cat(pieces))
    table = result["model.embed_tokens.weight"]
    result["model.embed_tokens.weight"] = torch.cat([table, torch.zeros(-len(table) % 64, table.shape[1])])
    return result


def config(policy, **more):
    return ClassifySettings(policy_model_path=str(policy), device="cpu", **more)


def test_a_fused_state_dict_is_the_model_that_it_was_saved_from(tiny_policy, other_weights, tmp_path):
    folder, state = other_weights
    expected = open_policy(config(folder))[1]
    for name, content in (("fused.pth", fused(state)), ("plain.pth", state)):
        torch.save(content, tmp_path / name)
        assert open_policy(config(tiny_policy, policy_vllm_ckpt=str(tmp_path / name)))[1] == expected
    assert open_policy(config(tiny_policy))[1] != expected


def test_state_dicts_that_do_not_fit_are_refused(tiny_policy, other_weights, tmp_path):
    _, state = other_weights
    engine, path = TransformersEngine(tiny_policy), tmp_path / "weights.pth"
    before = engine.weights_hash()
    good, key = fused(state), "model.layers.1.self_attn.qkv_proj.weight"

    def refuses(content, message):
        torch.save(content, path)
        with pytest.raises(UserError, match=message):
            load_vllm_checkpoint(engine, path)

    refuses(
        {name: tensor for name, tensor in good.items() if name != key}, r"lacks model.layers.1.self_attn.*\(3 in all\)"
    )
    refuses(
        good | {"model.layers.2.mlp.down_proj.weight": torch.zeros(1)}, "unknown model.layers.2.mlp.down_proj.weight"
    )
    refuses(good | {key: good[key][:-1]}, r"has 95 rows, the model's q_proj, k_proj, v_proj \[32, 32, 32\]")
    refuses(good | {"model.norm.weight": torch.zeros(31)}, r"model.norm.weight has the shape \[31\], the model \[32\]")
    refuses([1, 2], "expected a state dict")
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match="cannot read the state dict"):
        load_vllm_checkpoint(engine, path)
    with pytest.raises(UserError, match="cannot read the state dict .*No such file"):
        load_vllm_checkpoint(engine, tmp_path / "nowhere.pth")
    assert engine.weights_hash() == before


def write_journal(folder, policy, **settings):
    """A run of three steps; returns the weights after each of them."""
    run = ESSettings(policy_model_path=str(policy), scorer_url="-", dtype="float32", **settings)
    engine = TransformersEngine(policy, dtype="float32")
    weights = open_weights(engine, vars(run))
    folder.mkdir()
    journal = Journal(folder, weights.hash(), run.deciding() | {"device": "cpu"})
    masters = []
    for t in range(3):
        seeds, coefficients = [member_seed(1, t, member) for member in range(4)], [0.03, -0.02, 0.0, -0.01]
        weights.step(seeds, coefficients)
        journal.add_step({"iteration": t, "seeds": seeds, "coefficients": coefficients, "lambda_state": {}})
        masters.append({name: tensor.clone() for name, tensor in weights.master.items()})
    journal.close()
    return engine, masters


def test_an_iteration_is_rebuilt_from_its_journal(tiny_policy, tmp_path):
    engine, masters = write_journal(tmp_path / "run", tiny_policy)
    for steps in (1, 3):
        engine.save_pretrained(tmp_path / f"saved{steps}", masters[steps - 1])
        rebuilt = open_policy(config(tiny_policy, journal=f"{tmp_path}/run/journal.jsonl@{steps}"))[1]
        assert rebuilt == open_policy(config(tmp_path / f"saved{steps}"))[1]
    assert (
        open_policy(config(tiny_policy, journal=f"{tmp_path}/run/journal.jsonl@0"))[1]
        == open_policy(config(tiny_policy))[1]
    )
    with pytest.raises(UserError, match="journal.jsonl has 3 steps"):
        open_policy(config(tiny_policy, journal=f"{tmp_path}/run/journal.jsonl@4"))
    with pytest.raises(UserError, match="does not hold the base weights that .*journal.jsonl was begun from"):
        open_policy(config(tmp_path / "saved1", journal=f"{tmp_path}/run/journal.jsonl@1"))


@pytest.mark.slow
def test_the_journal_of_a_real_run(tiny_policy, tmp_path):
    for name in ("train", "eval"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(3)])
    flags = "--num_iterations 2 --population_size 4 --batch_size 2 --max_new_tokens 4 --sigma 0.02 --alpha 0.05".split()
    files = ["--train_jsonl", tmp_path / "train.jsonl", "--eval_jsonl", tmp_path / "eval.jsonl"]
    with FakeScorer() as scorer:
        where = ["--policy_model_path", tiny_policy, "--scorer_url", scorer.url, "--experiment_dir", tmp_path / "run"]
        script_file = "alignment/ES/es-fine-tuning_alignment_accl_api.py"
        subprocess.run([sys.executable, script_file, *map(str, where + files), *flags], check=True, capture_output=True)
    rebuilt = open_policy(config(tiny_policy, journal=f"{tmp_path}/run/journal.jsonl@2"))[1]
    assert rebuilt == open_policy(config(tmp_path / "run" / "final"))[1]


def test_a_journal_of_adapters_names_what_they_stand_on(tiny_policy, tmp_path):
    pytest.importorskip("peft")
    _, masters = write_journal(tmp_path / "run", tiny_policy, lora_rank=2)
    engine, rebuilt = open_policy(config(tiny_policy, journal=f"{tmp_path}/run/journal.jsonl@2"))
    assert all(torch.equal(tensor, masters[1][name]) for name, tensor in engine.weights().items())
    assert rebuilt != engine.weights_hash()  # the base model is in it as well
    assert rebuilt != open_policy(config(tiny_policy, journal=f"{tmp_path}/run/journal.jsonl@3"))[1]


def test_a_drifting_run_has_no_journal_to_trust(tiny_policy, tmp_path):
    write_journal(tmp_path / "run", tiny_policy, noise="reference")
    with pytest.raises(UserError, match="noise: reference drifts"):
        open_policy(config(tiny_policy, journal=f"{tmp_path}/run/journal.jsonl@1"))


def test_saved_answers_name_everything_that_made_them(tiny_policy, tiny_scorers, tmp_path):
    write_journal(tmp_path / "es1", tiny_policy)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}"} for i in range(3)])
    flags = [
        "--policy_model_path",
        str(tiny_policy),
        "--from_jsonl",
        str(tmp_path / "prompts.jsonl"),
        "--device",
        "cpu",
    ]
    flags += [
        "--journal",
        f"{tmp_path}/es1/journal.jsonl@2",
        "--policy_max_new_tokens",
        "3",
        "--output_dir",
        str(tmp_path),
    ]
    script.main([*flags, "--reward_model", str(tiny_scorers[0]), "--cost_model", str(tiny_scorers[1])])
    head, summary = read_jsonl(tmp_path / "es1-2_generations.jsonl")[0], read_json(tmp_path / "es1-2_summary.json")
    sampling = {
        "template": "pku",
        "max_new_tokens": 3,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 42,
        "engine": "transformers",
    }
    assert sampling.items() <= head.items() and sampling.items() <= summary["sampling"].items()
    assert head["policy"] == f"{tiny_policy} with {tmp_path}/es1/journal.jsonl@2"
    assert len(head["weights_hash"]) == 64 and head["scorer"] == summary["scorer"]
    assert head["scorer"]["reward_model"]["weights"] and head["scorer"]["template"] == "pku"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_absent_is_said_in_one_line(tiny_policy):
    with pytest.raises(UserError, match=r"vllm: No module named 'vllm'; .*requirements-cluster.txt"):
        open_policy(config(tiny_policy, policy_use_vllm=True))
