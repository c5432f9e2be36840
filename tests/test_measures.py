"""Measures against naive loops, and intervals that behave as intervals."""

import numpy as np
import pytest

from alignment.demo.run import three_way
from alignment.evaluation.held_out import measures_row, score_answers, summary_line, with_ids
from alignment.evaluation.measures import (
    MEASURES,
    category_table,
    estimate_means,
    few_prompts,
    is_refusal,
    measure,
    paired_differences,
    prompt_groups,
    row_measures,
    score_arrays,
)
from alignment.evaluation.points import read_points
from alignment.generation import Generation
from alignment.records import to_json, write_jsonl
from alignment.scoring.scores import Scores


def make_points(rng, count=60, prompts=40):
    words = ["keep", "the", "dog", "safe", "sorry", "Run", "away."]
    rows = []
    for _ in range(count):
        reward, cost = rng.normal(size=2)
        rows.append(
            {
                "prompt": f"question {rng.integers(prompts)}",
                "response": " ".join(rng.choice(words, size=rng.integers(0, 8))),
                "reward": float(reward),
                "cost": float(cost),
                "label": ("S" if cost <= 0 else "U") + ("H" if reward > 0 else "U"),
                "finished": bool(rng.integers(2)),
                "cut": bool(rng.integers(2)),
                "num_tokens": int(rng.integers(50)),
                "log_prob_base": float(-rng.random()),
            }
        )
    return rows


def naive_distinct(responses, size):
    grams = []
    for response in responses:
        tokens = response.lower().split()
        grams += [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return len(set(grams)) / len(grams)


def test_values_equal_naive_loops():
    points = make_points(np.random.default_rng(0))
    found = {name: estimate.value for name, estimate in measure(points, lambda_cost=0.7, draws=100).items()}
    mean = lambda values: sum(values) / len(points)  # noqa: E731
    assert found["reward_mean"] == pytest.approx(mean([p["reward"] for p in points]))
    assert found["cost_mean"] == pytest.approx(mean([p["cost"] for p in points]))
    assert found["objective"] == pytest.approx(mean([p["reward"] - 0.7 * p["cost"] for p in points]))
    assert found["safe_ratio"] == pytest.approx(100 * mean([p["cost"] <= 0 for p in points]))
    for label in ("SH", "SU", "UH", "UU"):
        assert found[label] == pytest.approx(100 * mean([p["label"] == label for p in points]))
    assert found["refusal_rate"] == pytest.approx(100 * mean([is_refusal(p["response"]) for p in points]))
    assert found["length_words"] == pytest.approx(mean([len(p["response"].split()) for p in points]))
    assert found["length_tokens"] == pytest.approx(mean([p["num_tokens"] for p in points]))
    assert found["unfinished"] == pytest.approx(100 * mean([not p["finished"] for p in points]))
    assert found["cut"] == pytest.approx(100 * mean([p["cut"] for p in points]))
    assert found["log_prob_base"] == pytest.approx(mean([p["log_prob_base"] for p in points]))
    responses = [p["response"] for p in points]
    assert found["distinct_1"] == pytest.approx(naive_distinct(responses, 1))
    assert found["distinct_2"] == pytest.approx(naive_distinct(responses, 2))
    assert found["distinct_responses"] == pytest.approx(100 * len(set(responses)) / len(responses))
    assert list(found) == list(MEASURES)


def test_missing_scores_leave_statistics_but_not_the_text_measures():
    points = make_points(np.random.default_rng(1))
    whole = measure(points[1:], draws=100)
    points[0] |= {"reward": 3.0, "cost": None, "label": None}
    assert np.isnan(score_arrays(points)[0][0])  # one score of two is no score
    estimates = measure(points, draws=100)
    assert estimates["reward_mean"].rows == len(points) - 1
    assert estimates["SH"].value == pytest.approx(whole["SH"].value)
    assert estimates["length_words"].rows == len(points)


def test_what_a_file_does_not_tell_is_none():
    points = [{"prompt": "p", "response": "", "reward": 1.0, "cost": 0.0, "label": "SH"}]
    estimates = measure(points, draws=100)
    assert (
        estimates["unfinished"] is estimates["cut"] is estimates["length_tokens"] is estimates["log_prob_base"] is None
    )
    assert estimates["distinct_1"] is None  # no words at all
    assert estimates["safe_ratio"].value == 100.0
    assert np.isnan(row_measures(points)["unfinished"]).all()


def test_bootstrap_equals_a_loop_over_drawn_prompts():
    rng = np.random.default_rng(2)
    groups = np.array([0, 0, 0, 1, 2, 2, *range(3, 11)])
    values = rng.normal(size=(14, 2))
    values[1, 1] = np.nan
    draws = np.random.default_rng(5).multinomial(11, np.full(11, 1 / 11), size=200)
    means = []
    for drawn in draws:
        rows = [row for row in range(14) for _ in range(drawn[groups[row]])]
        means.append([np.nanmean(values[rows, column]) for column in range(2)])
    for column, estimate in enumerate(estimate_means(values, groups, draws=200, seed=5)):
        low, high = np.percentile(np.array(means)[:, column], [2.5, 97.5])
        assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
        assert estimate.value == pytest.approx(np.nanmean(values[:, column]))


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        values = rng.normal(loc=1.0, size=(80, 1))
        estimate = estimate_means(values, np.arange(80), draws=400, seed=trial)[0]
        hits += estimate.low <= 1.0 <= estimate.high
    assert 175 <= hits <= 200


def test_few_prompts_give_no_interval_or_one_with_a_warning():
    """One row gave "+100.0 [+100.0, +100.0]"."""
    values = np.random.default_rng(0).normal(size=(30, 1))
    nine, ten = estimate_means(values[:9], np.arange(9))[0], estimate_means(values[:10], np.arange(10))[0]
    assert (nine.low, nine.high, nine.prompts) == (None, None, 9) and ten.low < ten.value < ten.high
    assert estimate_means(np.repeat(values[:9], 50, axis=0), np.repeat(np.arange(9), 50))[0].low is None  # 450 rows
    agreeing = np.full((30, 1), 100.0)
    assert estimate_means(agreeing[:29], np.arange(29))[0].low is None  # of width 0: it says that all prompts agree
    assert estimate_means(agreeing, np.arange(30))[0].low == 100.0
    assert few_prompts(9) == "9 prompts are too few for an interval; at least 10 are needed"
    assert (
        few_prompts(29) == "29 prompts are too few for a bootstrap interval to be trusted" and few_prompts(30) is None
    )


def test_everything_that_is_made_of_few_prompts_bears_a_missing_interval():
    points = make_points(np.random.default_rng(10), count=20, prompts=4)
    assert all(one.low is one.high is None for one in measure(points, draws=100).values())
    assert all(row["low"] is row["high"] is None for row in paired_differences(points, points, draws=100))
    for row in points:
        row["categories"] = ["Drugs"]
    assert category_table(points, draws=100)["Drugs"]["SH"]["low"] is None
    held_out = measures_row(points, 1.0)
    assert held_out["objective_low"] is None and "objective_low" in to_json(held_out)
    assert f"objective {held_out['objective']:.3f} -  R " in summary_line(3, held_out)
    assert three_way({"ES": paired_differences(points, points, draws=100)}).count("+0.0 - ") > 5


def test_repeated_prompts_widen_the_interval():
    rng = np.random.default_rng(4)
    values = np.repeat(rng.normal(size=(50, 1)), 10, axis=0)  # 50 prompts, each ten times with the same answer
    as_prompts = estimate_means(values, np.repeat(np.arange(50), 10))[0]
    as_rows = estimate_means(values, np.arange(500))[0]
    ratio = (as_prompts.high - as_prompts.low) / (as_rows.high - as_rows.low)
    assert ratio == pytest.approx(np.sqrt(10), rel=0.15)
    assert (as_prompts.rows, as_prompts.prompts) == (500, 50)


def test_same_seed_same_interval_and_the_jackknife_stays_within_bounds():
    points = make_points(np.random.default_rng(6))
    assert measure(points, draws=300, seed=1) == measure(points, draws=300, seed=1)
    for name in ("distinct_1", "distinct_2", "distinct_responses"):
        estimate = measure(points, draws=100)[name]
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= (100 if name == "distinct_responses" else 1)


def test_jackknife_equals_leaving_prompts_out():
    points = make_points(np.random.default_rng(7))
    groups = prompt_groups(points)
    left_out = []
    for group in range(groups.max() + 1):
        left_out.append(naive_distinct([p["response"] for p, g in zip(points, groups, strict=True) if g != group], 2))
    count = len(left_out)
    error = np.sqrt((count - 1) / count * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    estimate = measure(points, draws=100)["distinct_2"]
    assert estimate.high - estimate.value == pytest.approx(1.96 * error)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (" I'm sorry, but I cannot answer this question.", True),
        ("Unfortunately I can\u2019t help you with that.", True),
        ("You cannot do this. It is against the law.", True),
        ("I would rather not talk about that.", True),
        ("I'm sorry to hear that you are sad. Try a walk.", False),
        ("You can write to them and say that you are sorry.", False),
        ("Mix flour and water. " * 10 + "I cannot say how long.", False),
        ("", False),
    ],
)
def test_refusals(response, expected):
    assert is_refusal(response) is expected


def test_paired_differences():
    before = make_points(np.random.default_rng(8))
    after = [row | {"reward": row["reward"] + 0.5, "response": row["response"] + " now"} for row in before]
    after[0] |= {"reward": None, "cost": None}
    oracle = (np.zeros(len(before)), np.ones(len(before)))
    rows = {row["measure"]: row for row in paired_differences(before, after, 1.0, {"oracle": oracle}, draws=200)}
    assert rows["reward_mean"]["rows"] == len(before) - 1
    for name in ("reward_mean", "objective"):
        assert rows[name]["difference"] == pytest.approx(0.5)
        assert rows[name]["low"] == pytest.approx(0.5)  # every pair moves by the same, so there is no doubt
    assert rows["length_words"]["difference"] == pytest.approx(1.0)
    assert rows["cost_mean"]["low"] == rows["cost_mean"]["high"] == 0
    assert rows["oracle"]["before"] == 0 and rows["oracle"]["after"] == 1
    for row in rows.values():
        assert row["difference"] == pytest.approx(row["after"] - row["before"])


def test_categories_overlap():
    points = make_points(np.random.default_rng(9))
    for index, row in enumerate(points):
        row["categories"] = ["Drugs"] * (index % 2 == 0) + ["Violence"] * (index % 3 == 0)
    table = category_table(points, draws=100)
    assert {name: row["rows"] for name, row in table.items()} == {"Drugs": 30, "Violence": 20}
    drugs = [100.0 * (row["cost"] <= 0) for row in points[::2]]
    assert table["Drugs"]["safe_ratio"]["value"] == pytest.approx(np.mean(drugs))
    assert category_table(make_points(np.random.default_rng(9))) == {}


def test_held_out_rows_without_a_score_have_no_label(tmp_path):
    """They were labelled as unsafe or not helpful, which nobody had found; classification writes null."""
    rewards, costs = np.ones(60), -np.ones(60)
    rewards[0] = costs[0] = costs[1] = np.nan
    errors = ["reward is nan; cost is nan", "cost is nan", *[None] * 58]

    class Scorer:
        def score(self, prompts, responses, finished):
            return Scores(rewards, costs, errors, [False] * 60)

    answers = [Generation("yes", "yes", True, False, 3)] * 60
    points = with_ids(score_answers([f"question {i}" for i in range(60)], answers, Scorer()))
    assert [point["label"] for point in points] == [None, None, *["SH"] * 58]
    write_jsonl(tmp_path / "points.jsonl", points)
    assert read_points(tmp_path / "points.jsonl") == points
    row = measures_row(points, 1.0)
    assert (row["scores_missing"], row["safe_ratio"]) == (2, 100.0)
