"""What an ES run stands on: the weights that it does not search, its base's hash, scores kept until their step, its best."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_tokenizer, tiny_llama_config
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.ES.journal import MembersFile, finished_members
from alignment.ES.noise import noise
from alignment.ES.policy_engine import open_engine
from alignment.ES.policy_weights import open_weights
from alignment.ES.settings import ESSettings
from alignment.evaluation.held_out import is_best
from alignment.generation import TransformersEngine
from alignment.records import write_json


def settings(folder, **options):
    return ESSettings(policy_model_path=str(folder), **options)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Two policies of one shape whose searched weights, with the settings below, could be mistaken for each other's."""
    folders = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp(f"policy{seed}")
        torch.manual_seed(seed)
        LlamaForCausalLM(tiny_llama_config(make_tokenizer(folder))).save_pretrained(str(folder))
        folders.append(folder)
    return folders


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"trainable": "layernorm"}, {}], ids=["lora", "part", "all"])
def test_the_hash_is_of_all_that_a_run_stands_on(policies, options):
    first, again, other = (
        open_weights(TransformersEngine(folder, dtype=dtype), vars(settings(folder, **options))).hash()
        for folder, dtype in ((policies[0], "bfloat16"), (policies[0], "float32"), (policies[1], "float32"))
    )
    assert first == again
    assert first != other


def test_weights_that_are_not_searched_are_saved_as_they_came(policies, tmp_path):
    """The engine computes with a rounded copy of them."""
    engine = TransformersEngine(policies[0], dtype="bfloat16")
    weights = open_weights(engine, vars(settings(policies[0], trainable="mlp")))
    weights.step([1], [0.01])
    engine.save_pretrained(tmp_path, weights.whole())
    base, saved = (load_file(folder / "model.safetensors") for folder in (policies[0], tmp_path))
    assert base.keys() == saved.keys()
    for name, tensor in base.items():
        expected = tensor + 0.01 * noise(1, name, tensor.shape) if "mlp" in name else tensor
        assert torch.equal(saved[name], expected)


def test_reference_noise_is_for_one_process(policies):
    processes = Processes()
    processes.world_size = 2
    with pytest.raises(UserError, match="noise: reference drifts .* run it on one"):
        open_engine(settings(policies[0], noise="reference"), ["Hi"], processes)


def test_scores_stay_until_the_next_iteration_begins(tmp_path):
    def row(iteration, member):
        rest = {key: [] for key in ("rewards", "costs", "errors")}
        counts = dict.fromkeys(("tokens", "unfinished", "cut", "truncated", "distinct"), 0)
        return {"iteration": iteration, "member": member, **rest, **counts}

    file = MembersFile(tmp_path, 0)
    file.begin(3)
    file.add(row(3, 1))
    file.begin(3)
    assert list(finished_members(tmp_path, 3)) == [1]
    file.close()
    file = MembersFile(tmp_path, 0)  # killed and started again, in the same iteration
    file.begin(3)
    assert list(finished_members(tmp_path, 3)) == [1]
    file.add(row(3, 2))
    file.begin(4)
    file.add(row(4, 0))
    assert not finished_members(tmp_path, 3)
    assert list(finished_members(tmp_path, 4)) == [0]
    file.close()


def test_the_best_is_the_best_on_the_same_prompts(tmp_path):
    assert is_best(tmp_path / "best", 1.0, "prompts")
    (tmp_path / "best").mkdir()
    write_json(tmp_path / "best" / "trainer_state.json", {"objective": 1.0, "held_out": "prompts"})
    assert is_best(tmp_path / "best", 1.1, "prompts")
    assert not is_best(tmp_path / "best", 1.0, "prompts")
    assert is_best(tmp_path / "best", 0.5, "others")
    (tmp_path / "best" / "trainer_state.json").write_text(json.dumps({"objective": 1.0}))  # of an earlier version
    assert not is_best(tmp_path / "best", 0.5, "prompts")


def test_a_main_process_that_is_gone_is_told_when_a_signal_is_looked_for():
    class Gone:
        def check(self, _):
            raise torch.distributed.DistNetworkError("Broken pipe")

    processes = Processes()
    processes._store = Gone()
    with pytest.raises(UserError, match="another process of this run ended"):
        processes.stop_requested()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [{}, {"perturbation": "low_rank"}], ids=["full_rank", "low_rank"])
def test_weights_on_a_gpu_that_is_not_the_current_one(policies, options):
    masters = []
    for device in ("cuda:1", "cpu"):
        engine = TransformersEngine(policies[0], device=device, dtype="float32")
        torch.cuda.set_device(0)
        weights = open_weights(engine, vars(settings(policies[0], **options)))
        weights.perturb(1, 0.01)
        weights.restore()
        weights.step([1, 2], [0.5, -0.25])
        masters.append({name: tensor.cpu() for name, tensor in weights.master.items()})
    for name, tensor in masters[0].items():
        torch.testing.assert_close(tensor, masters[1][name], rtol=0, atol=0 if not options else 1e-5)
