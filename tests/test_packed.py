"""The forward without padding against the plain one, and the FLOP count against torch's own counter."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_llama_config
from torch.utils.flop_counter import FlopCounterMode

from alignment.conversation import get_template, load_tokenizer
from alignment.scoring.flops import llama_flops
from alignment.scoring.packed import BUCKETS, PackedForward, batches, pack
from alignment.scoring.score_model import ScoreModel


def texts_of_lengths(lengths, vocabulary=355):
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(4, vocabulary, (n,), generator=generator).tolist()) for n in lengths]


@pytest.mark.parametrize("key_value_heads", [4, 2])
def test_packed_scores_are_those_of_texts_alone(key_value_heads):
    torch.manual_seed(0)
    config = tiny_llama_config(355, hidden_size=64, initializer_range=0.3)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, key_value_heads, 16
    model = ScoreModel(config).eval()
    texts = texts_of_lengths([1, 2, 17, 300, 64, 65, 1, 576, 128])
    with torch.inference_mode():
        alone = torch.cat([model(torch.tensor([text]), torch.tensor([len(text)])) for text in texts])
    packed = PackedForward(model, max_length=576, compiled=False).score(texts)
    assert torch.allclose(packed, alone, atol=1e-5, rtol=0)
    assert packed.dtype == torch.float32


@pytest.mark.parametrize("name", ["reward", "cost"])
def test_packed_scores_of_the_published_cases(goldens, name):
    folder = goldens / "score_model" / name
    tokenizer, template = load_tokenizer(folder), get_template("pku")
    cases = json.loads((goldens / "score_model" / "cases.json").read_text())["cases"]
    texts = [
        tuple(template.encode_conversation(tokenizer, c["prompt"] or "", c["response"] or "").ids[:512]) for c in cases
    ]
    model = ScoreModel.from_pretrained(folder)
    with torch.inference_mode():
        alone = torch.cat([model(torch.tensor([text]), torch.tensor([len(text)])) for text in texts])
    packed = PackedForward(model, max_length=512, compiled=False).score(texts)
    assert torch.allclose(packed, alone, atol=1e-5, rtol=0)


def test_a_batch_fills_a_bucket_and_every_text_is_in_one():
    lengths = [576, 3, 1000, 16384, 40, 1, 576] * 30
    groups = batches(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in group) <= BUCKETS[-1] for group in groups)
    tokens, starts = pack(texts_of_lengths([5, 7, 1000]), max_length=576)
    assert len(tokens) == starts[-1] == 1024
    assert starts[:4] == [0, 5, 12, 1012]
    assert all(end - start <= 1000 for start, end in zip(starts, starts[1:], strict=False))


def test_the_flop_count_is_torchs():
    torch.manual_seed(0)
    config = tiny_llama_config(355, hidden_size=64)
    config.num_key_value_heads, config.num_hidden_layers = 1, 3
    model = ScoreModel(config).eval()
    model.model.set_attn_implementation("eager")
    length = 50
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.hidden(torch.ones(1, length, dtype=torch.long))
    # torch counts the square of pairs and the rotary's outer product (2 * head_dim / 2 * length), ours the causal half.
    heads, head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    square = config.num_hidden_layers * 4 * heads * head * (length**2 - length * (length + 1) // 2)
    rotary = 2 * (head // 2) * length
    assert llama_flops(config, [length]) + square == pytest.approx(counter.get_total_flops() - rotary, rel=1e-3)
