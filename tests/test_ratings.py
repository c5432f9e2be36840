"""Ratings: the published numbers, invariance, edge cases; verdicts and the judgments file."""

import itertools
import json
import random

import numpy as np
import pytest
from judgments import append_judgments, write_answers

from alignment.errors import UserError
from alignment.evaluation import gpt_elo_eval
from alignment.evaluation.judging.ratings import bradley_terry, rate, rating_warnings, sequential_elo
from alignment.evaluation.judging.scorer_judge import agreement, scorer_verdicts
from alignment.evaluation.judging.store import read_judgments
from alignment.evaluation.judging.verdict import Verdict
from alignment.records import read_json, read_jsonl, write_jsonl

MODELS = ["Beaver-V3", "Beaver-V2", "Beaver-V1", "Alpaca-7B", "ES-500"]
RENAMED = dict(zip(MODELS, ["m3", "z", "Alpaca", "a b", "$x_1$"], strict=True))


def verdict(first, second, result, prompt="p", dimension="helpfulness"):
    return Verdict(dimension, prompt, first, second, result)


def rate_file(tmp_path, judgments, *more: str) -> tuple[dict, dict]:
    """Ratings and details that the script writes for a file of judgments."""
    outputs = ["--ratings-out", str(tmp_path / "r.json"), "--plot-out", str(tmp_path / "r.png")]
    arguments = ["--judgments-in", str(judgments), "--data-dir", str(tmp_path), *outputs, *more]
    assert gpt_elo_eval.main(arguments) == 0
    return read_json(tmp_path / "r.json"), read_json(tmp_path / "r_details.json")


def test_elo_gives_the_published_ratings_exactly(goldens, tmp_path):
    ratings, _ = rate_file(tmp_path, goldens / "elo" / "gpt_judgments.jsonl", "--rating", "elo", "--draws", "100")
    assert ratings == read_json(goldens / "elo" / "gpt_elo_ratings.json")


def test_elo_variants_and_the_toy_example(goldens, tmp_path):
    golden = read_json(goldens / "elo" / "elo_golden.json")
    file, elo = goldens / "elo" / "gpt_judgments.jsonl", ["--rating", "elo", "--draws", "100"]
    assert rate_file(tmp_path, file, *elo, "--tie-threshold", "0")[0] == golden["elo_variants"]["tie_threshold_0"]
    assert rate_file(tmp_path, file, *elo, "--k-factor", "16")[0] == golden["elo_variants"]["k_16"]
    results = {"[8, 5]": 1.0, "[5, 5.5]": 0.5, "null": 0.5, "[9, 3]": 1.0, "[7, 6]": 1.0, "[2, 6]": 0.0}
    toy = [verdict(a, b, results[json.dumps(scores)]) for a, b, scores in golden["toy"]["judgments"]]
    strengths = sequential_elo(toy, ["A", "B", "C"])
    expected = golden["toy"]["elo_shuffled_seed_123_normalize_to_A"]
    assert strengths + (1000 - strengths[0]) == pytest.approx(list(expected.values()), abs=1e-9)


def test_bradley_terry_is_within_a_tenth_of_a_point_of_the_goldens(goldens, tmp_path):
    ratings, details = rate_file(tmp_path, goldens / "elo" / "gpt_judgments.jsonl", "--draws", "400")
    golden = read_json(goldens / "elo" / "elo_golden.json")
    for dimension, expected in golden["bradley_terry"].items():
        assert ratings[dimension] == pytest.approx(expected, abs=0.1)
        part, limits = details["dimensions"][dimension], golden["bradley_terry_bootstrap_over_questions_400"][dimension]
        for model, row in golden["wins_matrix_row_beats_column_ties_half"][dimension].items():
            for other, wins in row.items():
                if other != model:
                    assert part["win_rates"][model][other]["percent"] == pytest.approx(100 * wins / 50)
            low, high = part["ratings"][model]["low"], part["ratings"][model]["high"]
            assert (low, high) == pytest.approx(tuple(limits[model].values()), abs=35)  # both are bootstraps
        assert part["position_bias"]["first_wins"]["rows"] == 500
    assert details["source"]["without_scores"] == 5  # ties, as published; the next line leaves them out
    skipped, _ = rate_file(tmp_path, goldens / "elo" / "gpt_judgments.jsonl", "--unscored", "skip", "--draws", "100")
    assert skipped["harmlessness"] == ratings["harmlessness"] and skipped["helpfulness"] != ratings["helpfulness"]


def test_names_and_order_change_nothing(goldens, tmp_path):
    rows = read_jsonl(goldens / "elo" / "gpt_judgments.jsonl")
    before, details = rate_file(
        tmp_path, goldens / "elo" / "gpt_judgments.jsonl", "--models", *MODELS, "--draws", "200"
    )
    for row in rows:
        row |= {name: RENAMED[row[name]] for name in ("model_a", "model_b")}
    random.Random(5).shuffle(rows)
    write_jsonl(tmp_path / "renamed.jsonl", rows)
    names = [RENAMED[model] for model in reversed(MODELS)]
    more = ["--models", *names, "--normalize-to", "a b", "--draws", "200"]
    after, renamed = rate_file(tmp_path, tmp_path / "renamed.jsonl", *more)
    for dimension, part in before.items():
        assert {RENAMED[model]: rating for model, rating in part.items()} == after[dimension]
        one, other = details["dimensions"][dimension], renamed["dimensions"][dimension]
        assert {RENAMED[model]: value for model, value in one["ratings"].items()} == other["ratings"]
        for name in ("first_wins", "score_difference"):
            assert one["position_bias"][name] == pytest.approx(other["position_bias"][name])


@pytest.mark.parametrize("count", [1, 50, 100_000])
def test_a_model_that_wins_everything_stays_finite(count):
    wins = np.triu(np.full((4, 4), float(count)), 1)  # each beats all that follow
    ratings = bradley_terry(wins)
    assert np.isfinite(ratings).all() and (np.diff(ratings) < 0).all() and np.abs(ratings).max() < 10_000
    rated = rate(
        [verdict("a", "b", 1.0, f"p{i}") for i in range(min(count, 50))], ["a", "b"], "b", "bradley-terry", 100, 0
    )
    assert rated.ratings[0] > 1500 and np.isfinite(rated.ratings).all()
    assert any("a won all" in text for text in rating_warnings(rated))


def test_all_ties_and_no_comparison_give_equal_ratings():
    pairs = list(itertools.combinations("abc", 2))
    rated = rate(
        [verdict(*pair, 0.5, f"p{i}") for i, pair in enumerate(pairs * 4)], list("abcd"), "a", "bradley-terry", 100, 0
    )
    np.testing.assert_allclose(rated.ratings, 1000.0, atol=1e-6)
    assert any("no comparison links" in text and "a, b, c; d" in text for text in rating_warnings(rated))
    assert np.isfinite(rated.low).all()


def test_one_prompt_has_no_interval():
    rated = rate([verdict("a", "b", 1.0), verdict("b", "a", 0.5)], ["a", "b"], "a", "bradley-terry", 100, 0)
    assert np.isnan(rated.low).all() and np.isfinite(rated.ratings).all()


def test_the_fit_recovers_known_strengths():
    rng, true = np.random.default_rng(0), np.array([0.0, 100.0, 250.0, 400.0])
    verdicts = []
    for number in range(6000):
        first, second = rng.choice(4, size=2, replace=False)
        won = rng.random() < 1 / (1 + 10 ** ((true[second] - true[first]) / 400))
        verdicts.append(verdict(str(first), str(second), float(won), f"p{number % 500}"))
    rated = rate(verdicts, list("0123"), "0", "bradley-terry", 300, 0)
    assert rated.ratings == pytest.approx(true + 1000, abs=35)
    half_widths = (rated.high - rated.low)[1:] / 2
    assert (np.abs(rated.ratings - true - 1000)[1:] < 2 * half_widths).all() and (half_widths < 30).all()
    assert rated.ahead[3, 0] == 1.0 and rated.ahead[0, 3] == 0.0


def test_a_baseline_that_is_not_there_and_no_verdicts_are_errors():
    with pytest.raises(UserError, match="normalize_to x: not among the models, which are a, b"):
        rate([verdict("a", "b", 1.0)], ["a", "b"], "x", "bradley-terry", 100, 0)
    with pytest.raises(UserError, match="no verdict"):
        rate([], ["a", "b"], "a", "bradley-terry", 100, 0)


def record(first, second, scores, key, **more):
    own = {"key": key, "judge": "j", "template": "t", "outcome": "tie" if scores is None else "win"}
    names = {"model_a": first, "model_b": second, "dimension": "helpfulness", "question": "q", "scores": scores}
    return names | own | more


def test_a_file_of_ours_counts_each_comparison_once_and_only_verdicts(tmp_path):
    rows = [
        record("a", "b", None, "1", outcome="unparsed"),
        record("a", "b", [8, 3], "1"),
        record("a", "b", [1, 9], "1", outcome="loss"),  # a second verdict on the same key does not count
        record("b", "a", [2, 7], "2", outcome="loss"),
        record("b", "a", [6, 7], "3", outcome="loss"),  # a newer answer of the same model
        record("a", "c", None, "4", outcome="refused"),
    ]
    write_jsonl(tmp_path / "j.jsonl", rows)
    verdicts, told = read_judgments(tmp_path / "j.jsonl", [], None, None, 0.5, "tie")
    assert [(one.first, one.second, one.scores) for one in verdicts] == [("a", "b", (8, 3)), ("b", "a", (6, 7))]
    assert told["superseded"] == 1 and told["outcomes"] == {"win": 1, "loss": 2, "refused": 1}
    write_jsonl(tmp_path / "j.jsonl", [*rows, record("a", "b", [8, 3], "5", judge="k")])
    with pytest.raises(UserError, match=r"one judge and template, found j \(template t\): 6, k \(template t\): 1"):
        read_judgments(tmp_path / "j.jsonl", [], None, None, 0.5, "tie")
    assert len(read_judgments(tmp_path / "j.jsonl", [], "k", None, 0.5, "tie")[0]) == 1


SCORES = {"base": 5.0, "poor": 2.0, "good": 9.0}


def test_only_judgments_of_the_answers_that_are_there_count(tmp_path, capsys):
    """A model that was judged, trained on and classified again under its name: both versions made one rating."""
    path = tmp_path / "j.jsonl"
    write_answers(tmp_path, "A", "base")
    for answer in ("poor", "good"):
        write_answers(tmp_path, "B", answer)
        append_judgments(path, tmp_path, ["A", "B"], SCORES.__getitem__)
    ratings, details = rate_file(tmp_path, path, "--draws", "100")
    assert ratings["helpfulness"]["B"] > 1500 and details["source"]["on_other_answers"] == 160
    assert details["dimensions"]["helpfulness"]["ratings"]["B"]["comparisons"] == 80
    assert details["source"]["outcomes"] == {"win": 80, "loss": 80}
    assert f"160 verdicts in {path} are on other answers" in capsys.readouterr().err
    write_answers(tmp_path, "B", "poor")  # back to the first ones, whose judgments are not the latest lines
    assert rate_file(tmp_path, path, "--draws", "100")[0]["helpfulness"]["B"] < 500
    (tmp_path / "A_points.jsonl").unlink()  # the points of one model are enough to tell
    assert rate_file(tmp_path, path, "--draws", "100")[0]["helpfulness"]["B"] < 500
    write_answers(tmp_path, "B", "another")
    with pytest.raises(UserError, match="all 320 verdicts are on other answers than the points files hold"):
        rate_file(tmp_path, path)
    (tmp_path / "B_points.jsonl").unlink()
    with pytest.raises(UserError, match="several answers of B to one prompt, and no points file says which count"):
        rate_file(tmp_path, path)
    write_jsonl(path, read_jsonl(path)[:160])  # one version only: nothing to be told apart
    assert rate_file(tmp_path, path, "--draws", "100")[0]["helpfulness"]["B"] < 500


@pytest.mark.parametrize("change", [{"scores": "7, 8"}, {"scores": [7]}, {"dimension": "style"}, {"model_b": "a"}])
def test_a_judgment_that_makes_no_sense_is_an_error(tmp_path, change):
    row = {"model_a": "a", "model_b": "b", "dimension": "helpfulness", "question": "q", "scores": [7, 8]} | change
    write_jsonl(tmp_path / "j.jsonl", [row])
    with pytest.raises(UserError, match="j.jsonl"):
        read_judgments(tmp_path / "j.jsonl", [], None, None, 0.5, "tie")


def row(reward, cost):
    return {"response": "r", "reward": reward, "cost": cost}


def test_the_scorer_prefers_more_reward_and_less_cost():
    answers = {"a": {"p": row(2.0, 1.0), "q": row(None, None)}, "b": {"p": row(1.0, 1.0), "q": row(1.0, 1.0)}}
    verdicts, missing = scorer_verdicts(answers, ["p", "q"])
    assert [(one.dimension, one.result) for one in verdicts] == [("helpfulness", 1.0), ("harmlessness", 0.5)]
    assert missing == 2


def test_agreement_counts_a_pair_once_and_leaves_ties_out():
    answers = {"a": {"p": row(2.0, 0.0), "q": row(0.0, 0.0)}, "b": {"p": row(1.0, 0.0), "q": row(3.0, 0.0)}}
    verdicts = [
        verdict("a", "b", 1.0, "p"),
        verdict("b", "a", 0.0, "p"),  # a again
        verdict("a", "b", 1.0, "q"),  # the scorer prefers b
        verdict("b", "a", 0.5, "q"),
    ]
    told = agreement(verdicts, answers)
    assert told["share"]["value"] == 50.0 and told["share"]["rows"] == 2
    verdicts[3] = verdict("b", "a", 1.0, "q")  # both orders disagree: a tie of the judge
    assert agreement(verdicts, answers)["judge_ties"] == 1
    assert agreement(verdicts, {}) == {"share": None, "judge_ties": 0, "scorer_ties": 0, "without_scores": 2}


def test_the_scorer_judges_the_published_points_offline(goldens, tmp_path):
    outputs = ["--ratings-out", str(tmp_path / "s.json"), "--plot-out", str(tmp_path / "s.pdf"), "--draws", "200"]
    models = ["Alpaca-7B", "Beaver-V1", "Beaver-V3"]
    arguments = ["--judge", "scorer", "--data-dir", str(goldens / "quadrants"), "--models", *models, *outputs]
    assert gpt_elo_eval.main(arguments) == 0
    ratings = read_json(tmp_path / "s.json")
    assert 1000.0 == ratings["harmlessness"]["Alpaca-7B"] < ratings["harmlessness"]["Beaver-V1"]
    assert ratings["harmlessness"]["Beaver-V1"] < ratings["harmlessness"]["Beaver-V3"]
    part = read_json(tmp_path / "s_details.json")["dimensions"]["harmlessness"]
    assert part["ratings"]["Beaver-V3"]["comparisons"] == 600 and "position_bias" not in part
