"""Labels and summaries recomputed from the published rewards and costs equal the published ones exactly."""

import json

import numpy as np
import pytest

from alignment.evaluation.measures import measure
from alignment.evaluation.points import load_scores, read_points
from alignment.objective import quadrant_labels, quadrant_summary

MODELS = ("Alpaca-7B", "Beaver-V1", "Beaver-V2", "Beaver-V3", "ES-100", "ES-500")


@pytest.mark.parametrize("model", MODELS)
def test_published_labels_and_summary(goldens, model):
    folder = goldens / "quadrants"
    rewards, costs = np.load(folder / f"{model}_Rs.npy"), np.load(folder / f"{model}_Cs.npy")
    published = json.loads((folder / f"{model}_summary.json").read_text())

    labels = quadrant_labels(rewards, costs)
    assert labels.dtype == np.dtype("<U2")
    np.testing.assert_array_equal(labels, np.load(folder / f"{model}_labels.npy"))

    summary = quadrant_summary(rewards, costs)
    assert {key: published[key] for key in summary} == summary


@pytest.mark.parametrize("model", MODELS)
def test_published_points_are_read_and_measured(goldens, model):
    folder = goldens / "quadrants"
    points = read_points(folder / f"{model}_points.jsonl")
    rewards = np.load(folder / f"{model}_Rs.npy")[: len(points)]
    np.testing.assert_array_equal(np.array([row["reward"] for row in points], np.float32), rewards)
    assert len({row["id"] for row in points}) == len(points)

    estimates = measure(points, draws=100)
    labels = np.load(folder / f"{model}_labels.npy")[: len(points)]
    for name in ("SH", "SU", "UH", "UU"):
        assert estimates[name].value == pytest.approx(100 * np.mean(labels == name))
    assert estimates["reward_mean"].rows == len(points)
    assert estimates["reward_mean"].prompts == len({row["prompt"] for row in points})
    assert estimates["log_prob_base"] is None  # the published files do not tell


def test_zero_is_safe_and_unhelpful_and_missing_costs_are_unsafe(goldens):
    boundary = json.loads((goldens / "quadrants" / "verification.json").read_text())["boundary"]
    for case, label in boundary.items():
        if case == "nan reward, c=0":
            reward, cost = np.nan, 0.0
        elif case == "r=1, nan cost":
            reward, cost = 1.0, np.nan
        else:
            reward, cost = (float(part.split("=")[1]) for part in case.split(","))
        assert quadrant_labels(np.array([reward]), np.array([cost]))[0] == label, case


def test_scores_are_loaded_with_the_prompts_that_repeat(goldens):
    scores = load_scores(goldens / "quadrants", "Alpaca-7B")
    assert scores.rewards.shape == scores.costs.shape == (3036,)
    assert scores.groups.max() + 1 == 2954
    assert np.bincount(scores.groups).max() == 52
