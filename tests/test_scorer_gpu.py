"""The scorer on a GPU: the same quadrants whatever else is in the batch, the packed forward against the plain one."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch

from alignment.objective import quadrant_labels
from alignment.scoring.local_scorer import QUEUED_TOKENS, LocalScorer
from alignment.scoring.monitor import Monitor
from alignment.scoring.scores import deciding
from alignment.scoring.service_settings import read_settings
from alignment.scoring.worker import Job, Worker, WorkQueue

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


def check_that_nothing_waits(scorer, cases):
    conversations = [scorer.encode(*pair) for pair in zip(*cases, strict=True)]
    expected = scorer.score_encoded(conversations)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # clock cycles: the GPU is busy for about a second
        began = time.monotonic()
        pending = [scorer.queue_encoded(conversations) for _ in range(2)]
        seconds, arrived = time.monotonic() - began, pending[0]._arrived.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print(f"two rounds of {len(conversations)} texts queued in {1e3 * seconds:.0f} ms")
    assert not arrived
    assert [one.result() for one in pending] == [expected] * 2


def test_a_round_is_queued_without_waiting_for_the_gpu(scorer, cases):
    check_that_nothing_waits(scorer, cases)


def test_a_worker_that_runs_ahead_gives_the_scorers_scores(scorer, cases):
    assert scorer.round_tokens == QUEUED_TOKENS
    ready, settings = threading.Event(), read_settings({"SCORER_PROBES": "none"})
    worker = Worker(settings, WorkQueue(10**7), Monitor(), lambda _: ready.set(), pytest.fail, load=lambda **_: scorer)
    worker.start()
    assert ready.wait(10)
    conversations = [
        scorer.encode(f"{at} {prompt}", response) for at in range(20) for prompt, response in zip(*cases, strict=True)
    ]
    jobs = [Job(conversations[at::8]) for at in range(8)]
    for job in jobs:
        worker.jobs.put(job)
    for job in jobs:
        job.scores.result(60)
    worker.jobs.end()
    worker.join(60)
    assert not worker.is_alive()
    for at, job in enumerate(jobs):
        for given, alone in zip(job.scores.result(0), scorer.score_encoded(conversations[at::8]), strict=True):
            assert given.error == alone.error
            assert alone.error or abs(given.reward - alone.reward) < 1e-5 and abs(given.cost - alone.cost) < 1e-5


def test_float8_says_what_it_does_to_scores(goldens, scorer, cases):
    small = make(goldens, fp8=True)
    figures = small.identity()["fp8_error"]
    assert figures["texts"] == 24 and 0 < figures["reward_mean"] <= figures["reward_max"]
    assert deciding(small.identity()) == scorer.identity() | {"fp8": True}
    print(figures)
    check_that_nothing_waits(small, cases)
    assert np.abs(small.score(*cases).rewards - scorer.score(*cases).rewards).max() < 20 * figures["reward_max"]
