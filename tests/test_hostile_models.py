"""Model folders that are broken, absent or not what they seem, at every script that loads one: one line, exit code 2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from broken_models import BREAKAGES, SCORE_HEADS, broken, edit_tensors, ran, words
from conftest import REPO, make_tokenizer, tiny_llama_config
from fake_scorer import FakeScorer
from safetensors.torch import load_file, save_file
from script_here import CLASSIFY, ES, FIXED, GRPO, REBUILD, SERVICE, refused
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from alignment import model_folder
from alignment.device import find_device
from alignment.errors import UserError
from alignment.ES.weights import checkpoint_weights
from alignment.generation import TransformersEngine
from alignment.generation.loading import check_headers
from alignment.model_folder import read_config
from alignment.records import write_jsonl
from alignment.scoring.local_scorer import LocalScorer


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"question {i}?", "response": "yes"} for i in range(4)])
    write_jsonl(folder / "journal.jsonl", [{"kind": "start", "base_weights": "0" * 64, "settings": {}}])
    return folder


@pytest.fixture(scope="module")
def scorer():
    with FakeScorer() as fake:
        yield fake


def policy_command(script: str, policy: Path, prompts: Path, scorer: FakeScorer, run: Path) -> list:
    file = prompts / "prompts.jsonl"
    data = ["--train_jsonl", file, "--eval_jsonl", file, "--scorer_url", scorer.url]
    return {
        ES: [ES, "--policy_model_path", policy, *data, "--experiment_dir", run],
        GRPO: [GRPO, "--model_name", policy, *data, "--output_dir", run],
        REBUILD: [
            *(REBUILD, "--policy_model_path", policy, "--journal", prompts / "journal.jsonl", "--output", run),
        ],
        CLASSIFY: [
            *(CLASSIFY, "--policy_model_path", policy, "--from_jsonl", file, "--scorer_url", scorer.url),
            *("--output_dir", run),
        ],
    }[script]


@pytest.mark.parametrize("script", [ES, GRPO, REBUILD, CLASSIFY], ids=lambda path: Path(path).stem[:10])
@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_policies(tiny_policy, prompts, scorer, tmp_path, script, name):
    policy = broken(tiny_policy, tmp_path, name)
    line = refused(*policy_command(script, policy, prompts, scorer, tmp_path / "run"))
    assert all(word in line for word in (*words(name), str(policy))), line
    assert not ran(policy).exists()
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("script", [ES, GRPO, REBUILD, CLASSIFY], ids=lambda path: Path(path).stem[:10])
def test_nothing_but_the_line_is_on_stderr(tiny_policy, prompts, scorer, tmp_path, script):
    policy = broken(tiny_policy, tmp_path, "layer tensor missing")
    command = policy_command(script, policy, prompts, scorer, tmp_path / "run")
    done = subprocess.run([sys.executable, *map(str, command)], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith(
        f"error: {policy}: the weights do not fit config.json, tensors missing: model.layers.0"
    )


def test_the_policy_that_the_drift_is_measured_under(tiny_policy, prompts, scorer, tmp_path):
    base = broken(tiny_policy, tmp_path, "nan")
    flags = ["--responses_from", prompts / "prompts.jsonl", "--base_model_path", base, "--scorer_url", scorer.url]
    assert f"{base}: these weights are not finite" in refused(CLASSIFY, *flags, "--output_dir", tmp_path / "run")


def test_a_state_dict_in_the_policys_place_that_is_not_finite(tiny_policy, prompts, scorer, tmp_path):
    tensors = load_file(tiny_policy / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    torch.save(tensors, tmp_path / "weights.pth")
    command = policy_command(CLASSIFY, tiny_policy, prompts, scorer, tmp_path / "run")
    line = refused(*command, "--policy_vllm_ckpt", tmp_path / "weights.pth")
    assert f"{tmp_path / 'weights.pth'}: these weights are not finite: model.norm.weight" in line


def test_a_score_model_is_no_policy(tiny_scorers):
    with pytest.raises(UserError, match=r"a score model \(LlamaForScore in its config.json\)"):
        TransformersEngine(tiny_scorers[0])


@pytest.fixture
def untied(tiny_policy, tmp_path):
    """The tiny policy with a head of its own."""
    model = LlamaForCausalLM.from_pretrained(str(tiny_policy), tie_word_embeddings=False)
    folder = tmp_path / "untied"
    shutil.copytree(tiny_policy, folder)
    model.save_pretrained(str(folder))
    return folder


def test_a_head_may_be_missing_only_where_it_is_tied(tiny_policy, untied):
    assert "lm_head.weight" not in load_file(tiny_policy / "model.safetensors")
    TransformersEngine(tiny_policy)
    TransformersEngine(untied)
    edit_tensors(untied, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"tensors missing: lm_head\.weight$"):
        TransformersEngine(untied)


def test_what_belongs_to_others_is_no_reason_to_refuse(tiny_policy, tmp_path):
    """Rotary tables of old checkpoints, and a value head beside the policy."""
    folder = shutil.copytree(tiny_policy, tmp_path / "old")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "v_head.summary.weight": torch.ones(1, 32)}
    edit_tensors(folder, lambda tensors: tensors.update(more))
    assert TransformersEngine(folder).weights_hash() == TransformersEngine(tiny_policy).weights_hash()


def test_values_too_large_for_the_dtype(untied):
    edit_tensors(untied, lambda tensors: tensors["lm_head.weight"][0].fill_(1e6))
    TransformersEngine(untied)
    with pytest.raises(UserError, match=r"not finite: lm_head\.weight\. .* too large for the dtype"):
        TransformersEngine(untied, dtype="float16")


@pytest.mark.parametrize("layout", ["bin", "shards beside a stale one", "a stale shard beside the whole"])
def test_only_the_files_that_the_model_is_loaded_from_are_read(tiny_policy, tmp_path, layout):
    folder = shutil.copytree(tiny_policy, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    stale = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif layout == "shards beside a stale one":
        LlamaForCausalLM.from_pretrained(str(tiny_policy)).save_pretrained(str(folder), max_shard_size="50KB")
        (folder / "model.safetensors").unlink(missing_ok=True)
    if layout != "bin":
        save_file(stale, folder / "model-00009-of-00009.safetensors", metadata={"format": "pt"})
        save_file(stale, folder / "z.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(folder)
    master = checkpoint_weights(str(folder), engine.parameters())
    assert master.keys() == tensors.keys()
    for name, tensor in engine.parameters().items():
        assert torch.equal(tensor, tensors[name]) and torch.equal(master[name], tensors[name])


@pytest.mark.parametrize(
    "name", ["layer tensor missing", "misshapen", "config with more layers", "config of another size"]
)
def test_headers_tell_what_an_engine_that_reads_the_weights_itself_would_not(tiny_policy, tmp_path, name):
    folder = broken(tiny_policy, tmp_path, name)
    with pytest.raises(UserError) as refusal:
        check_headers(folder, read_config(folder))
    assert all(word in str(refusal.value) for word in words(name))


def test_headers_are_read_once(tiny_policy, monkeypatch):
    read = []
    monkeypatch.setattr(
        model_folder, "weight_files", lambda folder, find=model_folder.weight_files: read.append(0) or find(folder)
    )
    TransformersEngine(tiny_policy)
    assert len(read) == 1


def test_headers_of_whole_policies_pass(tiny_policy, untied, tmp_path):
    check_headers(tiny_policy, read_config(tiny_policy))
    check_headers(untied, read_config(untied))
    backbone = shutil.copytree(
        tiny_policy, tmp_path / "backbone"
    )  # as LlamaModel saves it: no "model." before the names

    def rename(tensors: dict) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    edit_tensors(backbone, rename)
    check_headers(backbone, read_config(backbone))
    assert TransformersEngine(backbone).weights_hash() == TransformersEngine(tiny_policy).weights_hash()


# --- score models


def score_command(script: str, models: tuple[Path, Path], prompts: Path, run: Path) -> list:
    pair = ["--reward_model", models[0], "--cost_model", models[1]]
    data = ["--responses_from", prompts / "prompts.jsonl", "--output_dir", run]
    return {CLASSIFY: [CLASSIFY, *pair, *data], FIXED: [FIXED, *pair], SERVICE: [SERVICE]}[script]


@pytest.fixture
def service_environment(monkeypatch, tmp_path):
    """What the service is told; signal handlers, which it sets, are put back."""
    for name in [name for name in os.environ if name.startswith(("SCORER_", "SLURM_"))]:
        monkeypatch.delenv(name)
    for name, value in {"PORT": "0", "SCORER_ADDRESS_FILE": str(tmp_path / "address.json")}.items():
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("script", [CLASSIFY, FIXED, SERVICE], ids=lambda path: Path(path).stem[:10])
@pytest.mark.parametrize("name", [*BREAKAGES, *SCORE_HEADS])
def test_broken_score_models(tiny_scorers, prompts, service_environment, tmp_path, script, name):
    """The reward model is broken, or the cost model: they are read by the same code, so each of them here and there."""
    reward, cost = tiny_scorers
    folder = broken(reward if script != FIXED else cost, tmp_path, name)
    models = (folder, cost) if script != FIXED else (reward, folder)
    service_environment.setenv("REWARD_MODEL", str(models[0]))
    service_environment.setenv("COST_MODEL", str(models[1]))
    line = refused(*score_command(script, models, prompts, tmp_path / "run"))
    assert all(word in line for word in (*words(name), str(folder))), line
    assert not ran(folder).exists()
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*_summary.json"))


def test_a_policy_is_no_score_model(tiny_policy, tiny_scorers):
    with pytest.raises(UserError, match=r"missing: score_head\.weight"):
        LocalScorer(tiny_policy, tiny_scorers[1])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    LlamaForSequenceClassification(tiny_llama_config(make_tokenizer(folder), num_labels=1)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    ["truncated safetensors", "lfs pointer", "malicious bin", "layer tensor missing", "extra bias", "misshapen", "nan"],
)
def test_broken_classifiers(classifier, tiny_scorers, tmp_path, name):
    folder = broken(classifier, tmp_path, name)
    with pytest.raises(UserError) as refusal:
        LocalScorer(folder, tiny_scorers[1])
    assert all(word in str(refusal.value) for word in (*words(name), str(folder)))
    assert not ran(folder).exists()


# --- devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_gpu_where_there_is_none(device):
    with pytest.raises(UserError, match=f"device {device}: PyTorch finds no CUDA GPU here; use cpu"):
        find_device(device)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "", "cuda:0,1", "meta"])
def test_no_device_at_all(device):
    with pytest.raises(UserError, match=f"device {device!r}: expected cpu, cuda"):
        find_device(device)


def test_a_gpu_beyond_those_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [find_device(name) for name in ("cuda", "cuda:3", "cpu")] == [
        torch.device(d) for d in ("cuda", "cuda:3", "cpu")
    ]
    with pytest.raises(UserError, match=r"device cuda:4: PyTorch finds cuda:0 to cuda:3 here"):
        find_device("cuda:4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_at_the_scripts(tiny_policy, tiny_scorers, prompts, scorer, tmp_path):
    said = "device cuda: PyTorch finds no CUDA GPU here"
    command = policy_command(CLASSIFY, tiny_policy, prompts, scorer, tmp_path / "run")
    assert said in refused(*command, "--device", "cuda")
    assert "device 'gpu'" in refused(*command, "--device", "gpu")
    command = score_command(CLASSIFY, tiny_scorers, prompts, tmp_path / "run")
    assert "device cuda:7" in refused(*command, "--device", "cuda:7")
    command = policy_command(REBUILD, tiny_policy, prompts, scorer, tmp_path / "run")
    assert said in refused(*command, "--device", "cuda")
    assert said in refused("alignment/alpaca/verify_alpaca.py", "--model_path", tiny_policy, "--device", "cuda")
    command = policy_command(ES, tiny_policy, prompts, scorer, tmp_path / "run")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")  # the script sets it
        assert "cuda_devices" in refused(*command, "--cuda_devices", "0,1")
