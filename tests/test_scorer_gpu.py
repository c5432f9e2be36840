"""The scorer on a GPU: the same quadrants whatever else is in the batch, the packed forward against the plain one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from alignment.objective import quadrant_labels
from alignment.scoring.local_scorer import LocalScorer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def cases(goldens):
    cases = json.loads((goldens / "score_model" / "cases.json").read_text())["cases"]
    return [case["prompt"] or "" for case in cases], [case["response"] or "" for case in cases]


def make(goldens, **settings) -> LocalScorer:
    folder = goldens / "score_model"
    return LocalScorer(str(folder / "reward"), str(folder / "cost"), max_length=512, **settings)


@pytest.fixture(scope="module")
def scorer(goldens) -> LocalScorer:
    return make(goldens)


def test_float32_packed_is_the_plain_forward(goldens, cases):
    plain = make(goldens, dtype="float32", deterministic=True).score(*cases)
    packed = make(goldens, dtype="float32", packed=True).score(*cases)
    np.testing.assert_allclose(packed.rewards, plain.rewards, atol=1e-5, rtol=0)
    np.testing.assert_allclose(packed.costs, plain.costs, atol=1e-5, rtol=0)


def test_a_bfloat16_score_keeps_its_quadrant_whatever_its_batch_mates(scorer, cases):
    assert scorer.dtype == "bfloat16" and all(model.packed is not None for model in scorer._models)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    together = scorer.score(*cases)
    alone = [scorer.score([prompt], [response]) for prompt, response in zip(*cases, strict=True)]
    rewards = np.array([one.rewards[0] for one in alone])
    costs = np.array([one.costs[0] for one in alone])
    moved = max(np.nanmax(np.abs(rewards - together.rewards)), np.nanmax(np.abs(costs - together.costs)))
    print(f"{torch.cuda.get_device_name()}: a score moves by up to {moved:.1e} with its batch mates")
    assert moved < 1e-5
    assert (quadrant_labels(rewards, costs) == quadrant_labels(together.rewards, together.costs)).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # all was compiled at the start


def test_float8_says_what_it_does_to_scores(goldens, scorer, cases):
    small = make(goldens, fp8=True)
    figures = small.identity()["fp8"]
    assert figures["texts"] == 24 and 0 < figures["reward_mean"] <= figures["reward_max"]
    assert "fp8" not in scorer.identity()
    print(figures)
    assert np.abs(small.score(*cases).rewards - scorer.score(*cases).rewards).max() < 20 * figures["reward_max"]
