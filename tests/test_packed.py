"""The forward without padding against the plain one, and the FLOP count against torch's own counter."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import tiny_llama_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, masking_utils

from alignment.conversation import get_template, load_tokenizer
from alignment.errors import UserError
from alignment.records import write_jsonl
from alignment.scoring.calibration import Calibration, read_calibration
from alignment.scoring.flops import llama_flops
from alignment.scoring.local_scorer import LocalScorer
from alignment.scoring.packed import STEP, TOKENS, PackedForward, batches, can_pack, pack
from alignment.scoring.score_model import ScoreModel
from alignment.scoring.service_settings import read_settings


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
    packed = PackedForward(model, max_length=576).score(texts)
    assert torch.allclose(packed, alone, atol=1e-5, rtol=0)
    assert packed.dtype == torch.float32


def test_a_text_that_does_not_fit_is_refused():
    model = ScoreModel(tiny_llama_config(355)).eval()
    packed = PackedForward(model, max_length=20)
    for length in (21, 0):
        with pytest.raises(ValueError, match=f"text 1 has {length} tokens, expected 1 to 20"):
            packed.score(texts_of_lengths([20, length, 3]))


def test_no_mask_is_made_for_the_packed_attention(monkeypatch):
    """transformers looks for packed texts in the positions, which waits for the GPU, wherever it makes a mask."""
    looked = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked.append)
    model = ScoreModel(tiny_llama_config(355)).eval()
    packed = PackedForward(model, max_length=20)
    packed.score(texts_of_lengths([20, 3]))
    assert not looked


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
    packed = PackedForward(model, max_length=512).score(texts)
    assert torch.allclose(packed, alone, atol=1e-5, rtol=0)


def test_a_batch_is_filled_up_and_every_text_is_in_one():
    lengths = [576, 3, 1000, 16384, 40, 1, 576] * 30
    groups = batches(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in group) <= TOKENS for group in groups)
    # Short texts fill what long ones leave: no batch is left for the last few of them.
    assert sorted(map(len, batches([576] * 28 + [100] * 162 + [8] * 55))) == [28 + 2 + 7, 160 + 48]
    tokens, starts = pack(texts_of_lengths([5, 7, 1000]), max_length=576)
    assert len(tokens) == starts[-1] == 2 * STEP
    assert starts == [0, 5, 12, 1012, 1024]
    assert len(pack(texts_of_lengths([STEP]), max_length=576)[0]) == STEP


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


def test_a_scorer_that_packs_scores_as_one_that_does_not(tiny_scorers):
    prompts = ["hi", "what is this?", "hi", "x" * 600, "hi"] * 7
    responses = ["yes", "", "yes", "lost", "longer, " * 30] * 7
    finished = [True, True, True, True, False] * 7
    plain = LocalScorer(*tiny_scorers).score(prompts, responses, finished)
    packing = LocalScorer(*tiny_scorers, packed=True)
    packed = packing.score(prompts, responses, finished)
    np.testing.assert_allclose(packed.rewards, plain.rewards, atol=1e-5, rtol=0)
    np.testing.assert_allclose(packed.costs, plain.costs, atol=1e-5, rtol=0)
    assert packed.errors == plain.errors and packed.truncated == plain.truncated
    assert packed.errors[3].startswith("the prompt alone fills") and np.isnan(packed.rewards[3])
    assert len(packing.score([], []).rewards) == 0


def test_a_score_that_is_not_finite_stays_its_own_in_a_packed_batch(tiny_scorers):
    scorer = LocalScorer(*tiny_scorers, packed=True)
    embedding = scorer._models[0].model.model.embed_tokens.weight
    [letter] = {*scorer.encode("hi", "Z").reward_ids} - {*scorer.encode("hi", "Y").reward_ids}
    embedding[letter] = float("nan")
    scores = scorer.score(["hi"] * 3, ["yes", "Z", "no"])
    assert np.isfinite(scores.rewards).tolist() == [True, False, True]
    assert scores.errors == [None, "reward is nan", None]


def test_only_a_beaver_model_on_llama_is_packed():
    model = ScoreModel(tiny_llama_config(355)).eval()
    assert can_pack(model)
    windowed = MistralConfig(
        vocab_size=355, hidden_size=32, intermediate_size=64, num_hidden_layers=1, sliding_window=8
    )
    windowed.num_attention_heads = windowed.num_key_value_heads = 2
    assert not can_pack(ScoreModel(windowed).eval())
    assert not can_pack(model.model)


def test_float8_is_refused_where_it_cannot_be_had(tiny_scorers):
    with pytest.raises(UserError, match="SCORER_FP8 needs an NVIDIA GPU"):
        LocalScorer(*tiny_scorers, device="cpu", fp8=True)
    assert read_settings({"SCORER_FP8": "1", "SCORER_CALIBRATION": "mine.jsonl"}).scorer["calibration"] == "mine.jsonl"
    with pytest.raises(UserError, match="SCORER_FP8 is 'maybe'"):
        read_settings({"SCORER_FP8": "maybe"})


def test_calibration_figures_and_texts(tmp_path):
    before = np.array([[1.0, -0.004, 2.0], [-1.0, 0.5, 3.0]])
    after = np.array([[1.0123, 0.004, 2.0], [-1.0, 0.5, 2.25]])
    found = Calibration.between(before, after)
    assert found == Calibration(3, 0.012, 0.0068, 0.75, 0.25, quadrants_changed=1)
    assert "1 change their quadrant" in str(found)
    assert len(set(read_calibration(None))) == 24
    path = tmp_path / "texts.jsonl"
    write_jsonl(path, [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": 3}])
    with pytest.raises(UserError, match=r"texts.jsonl: row 2: prompt and response must be strings"):
        read_calibration(str(path))
    path.write_text("")
    with pytest.raises(UserError, match="holds no texts"):
        read_calibration(str(path))
