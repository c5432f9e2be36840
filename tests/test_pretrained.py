"""Models that are odd and right are let in; what is not finite is found; keys of one head are copied for all."""

from __future__ import annotations

import shutil
import socket
import threading

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.integrations import sdpa_attention

from alignment.errors import UserError
from alignment.generation import TransformersEngine
from alignment.pretrained import check_finite, tensors_hash
from alignment.scoring.client import ScorerClient, ScorerUnavailable


def test_a_token_that_was_added_may_lie_beyond_the_embeddings(tiny_policy, tmp_path):
    """As Gemma 3's for images and many a pad token do; only a prompt that holds it cannot be answered."""
    folder = shutil.copytree(tiny_policy, tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_special_tokens({"pad_token": "<new pad>", "additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(str(folder))
    engine, before = TransformersEngine(folder), TransformersEngine(tiny_policy)
    prompts = ["Hi", "A longer prompt than that."]
    assert engine.generate(prompts, 8) == before.generate(prompts, 8)
    with pytest.raises(UserError, match=r"prompt 2 has the token 35\d, the model knows 35\d: leave that prompt out"):
        engine.generate(["Hi", "What is on <image>?"], 8)


def test_buffers_that_older_checkpoints_hold_are_passed_over(tmp_path):
    vocabulary = make_tokenizer(tmp_path)
    config = GPT2Config(vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(str(tmp_path))
    path = tmp_path / "model.safetensors"
    state = load_file(path) | {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    save_file(state, path, metadata={"format": "pt"})
    TransformersEngine(tmp_path)
    del state["transformer.h.0.attn.c_attn.bias"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensors missing: transformer\.h\.0\.attn\.c_attn\.bias"):
        TransformersEngine(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype, value):
    tensors = {
        "whole": torch.arange(6),
        "empty": torch.empty(0, dtype=dtype),
        "single": torch.tensor(1.0, dtype=dtype),
        "broken": torch.ones(50, 70, dtype=dtype),
    }
    check_finite("folder", tensors)
    tensors["broken"][17, 3] = value
    with pytest.raises(UserError, match=r"folder: these weights are not finite: broken\."):
        check_finite("folder", tensors)


def test_the_hash_is_of_names_shapes_dtypes_and_bits():
    base = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor(2.0)}
    changed = [
        base | {"a": torch.tensor(2.5)},
        base | {"b": base["b"].view(3, 2)},
        base | {"a": base["a"].double()},
        {"b": base["b"], "c": base["a"]},
    ]
    hashes = [tensors_hash(one.items()) for one in (base, *changed)]
    assert len(set(hashes)) == 5
    assert tensors_hash({"b": base["b"].T.contiguous().T, "a": base["a"].clone()}.items()) == hashes[0]


def test_heads_that_share_one_key_get_a_copy_each():
    """Keys of stride 0 make a GPU's attention wrong at some lengths (https://github.com/pytorch/pytorch/issues/191937)."""
    states = torch.randn(2, 1, 5, 8)
    copies = sdpa_attention.repeat_kv(states, 4)
    assert copies.stride() == (160, 40, 8, 1)
    assert torch.equal(copies, states.repeat(1, 4, 1, 1))
    assert sdpa_attention.repeat_kv(states, 1) is states


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [32, 33, 34, 65])
def test_shared_keys_on_a_gpu(length):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, length, 16, generator=generator).cuda() for heads in (4, 1, 1))
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril().repeat(3, 1, 1, 1)
    mask[0, :, :, :7] = False
    mask[0, :, :7] = True  # a padding token's row must see something
    key, value = (sdpa_attention.repeat_kv(one, 4) for one in (key, value))
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    expected = (query @ key.mT / 4).masked_fill(~mask, -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_tls_proxy_that_is_restarted_is_waited_for():
    """It takes connections and ends them in the middle of the handshake; a mistake in the address is told at once instead."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        asked = []

        def hang_up():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                asked.append(connection.recv(1))
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        url = f"https://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ScorerUnavailable):
            ScorerClient(url, max_wait=1.5).wait_until_ready()
        assert len(asked) > 1
