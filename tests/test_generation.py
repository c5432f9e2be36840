"""The transformers engine: order, greedy decoding, what counts as finished, log-probabilities against a naive loop."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignment.errors import UserError
from alignment.generation import TransformersEngine

PROMPTS = ["How do I bake bread?", "Hi", "A longer prompt that needs padding beside the others, to be sure.", "Hi"]


@pytest.fixture(scope="module")
def engine(tiny_policy):
    return TransformersEngine(tiny_policy, batch_size=2)


def test_greedy_answers_are_those_of_a_naive_loop(engine):
    answers = engine.generate(PROMPTS, max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        prompt_ids = engine.template.encode_prompt(engine.tokenizer, prompt)
        ids = list(prompt_ids)
        while len(ids) - len(prompt_ids) < 12 and (len(ids) == len(prompt_ids) or ids[-1] != 2):
            ids.append(int(engine.model(torch.tensor([ids])).logits[0, -1].argmax()))
        own = ids[len(prompt_ids) :]
        ended = own[-1] == 2
        whole = engine.tokenizer.decode(ids, skip_special_tokens=True)
        before = engine.tokenizer.decode(prompt_ids, skip_special_tokens=True)
        assert answer.raw == whole[len(before) :]
        assert answer.num_tokens == len(own) - ended
        assert answer.finished == ended
    assert answers[1] == answers[3]


def test_a_turn_is_cut_where_the_model_invents_the_users_next(engine):
    text = "Mix flour. USER: thanks ASSISTANT: bye"  # the tokenizer puts a space in front
    tokens = engine.tokenizer.encode(text, add_special_tokens=False)
    prompt = engine.template.encode_prompt(engine.tokenizer, "Hi")
    answer = engine.read(prompt, tokens)
    assert (answer.response, answer.raw, answer.finished, answer.cut) == (" Mix flour.", answer.raw, True, True)
    assert answer.raw.endswith("bye")
    assert answer.raw.startswith(" ")
    kept = engine.read(prompt, engine.tokenizer.encode("Mix flour.USER: x", add_special_tokens=False))
    assert (kept.cut, kept.finished) == (False, False)


def test_published_behaviour_keeps_the_invented_turns(tiny_policy):
    engine = TransformersEngine(tiny_policy, first_turn_only=False)
    prompt = engine.template.encode_prompt(engine.tokenizer, "Hi")
    answer = engine.read(prompt, [*engine.tokenizer.encode("A. USER: b", add_special_tokens=False), 2])
    assert answer.response == answer.raw
    assert answer.finished
    assert not answer.cut


def test_sampling_is_repeatable_and_differs_between_seeds(engine):
    runs = [engine.generate(PROMPTS, 12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_log_probabilities_are_those_of_a_naive_loop(engine):
    responses = [" Mix flour and water.", "", " no", " yes " * 9]
    finished = [True, True, False, False]
    got = engine.mean_log_probs(PROMPTS, responses, finished)
    for prompt, response, done, value in zip(PROMPTS, responses, finished, got, strict=True):
        prompt_ids = engine.template.encode_prompt(engine.tokenizer, prompt)
        ids = engine.template.encode_conversation(engine.tokenizer, prompt, response, finished=done).ids
        with torch.no_grad():
            logs = torch.log_softmax(engine.model(torch.tensor([ids])).logits[0].double(), -1)
        wanted = [float(logs[i - 1, ids[i]]) for i in range(len(prompt_ids), len(ids))]
        assert value == pytest.approx(np.mean(wanted), abs=1e-5)


def test_no_token_means_no_log_probability(engine):
    assert np.isnan(engine.mean_log_probs(["Hi"], [""], [False])).all()


def test_a_prompt_without_room_is_named(engine):
    with pytest.raises(UserError, match=r"prompt 2 has \d+ tokens.*context of 1024"):
        engine.generate(["Hi", "x" * 1020], max_new_tokens=8)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        TransformersEngine(tmp_path)


def test_saved_weights_are_those_given(engine, tmp_path):
    weights = {name: tensor + 1 for name, tensor in engine.weights().items()}
    engine.save_pretrained(tmp_path, weights)
    again = TransformersEngine(tmp_path)
    assert all(torch.equal(again.weights()[name], tensor) for name, tensor in weights.items())
    assert again.weights_hash() != engine.weights_hash()
    tied = again.model.get_output_embeddings().weight
    assert torch.equal(tied, weights["model.embed_tokens.weight"])


def test_adapters_are_merged_and_saved_in_float32(tiny_policy, tmp_path):
    """In bfloat16 most of this small a difference would be rounded away."""
    engine = TransformersEngine(tiny_policy, dtype="bfloat16")
    base = {name: tensor.float() for name, tensor in engine.parameters().items()}
    assert engine.num_parameters == sum(tensor.numel() for tensor in base.values())
    engine.add_lora(2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in engine.parameters().items():
        assert tensor.dtype == torch.float32
        if "lora_B" in name:
            tensor.copy_(1e-4 * torch.randn(tensor.shape, generator=generator))
    adapters = engine.parameters()
    engine.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    for name, tensor in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.default.weight"
        if key.format("A") in adapters:
            tensor = tensor + adapters[key.format("B")] @ adapters[key.format("A")]  # alpha is the rank
            assert not torch.equal(tensor, base[name])
        assert torch.equal(saved[name], tensor)
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert again.dtype == torch.float32
    assert TransformersEngine(tmp_path).holds_merged_adapters
    assert not engine.holds_merged_adapters
