"""What the report says of a judge: of the answers that are here, by one judge, on one scale."""

import json

import pytest
from judgments import append_judgments, write_answers

from alignment.errors import UserError
from alignment.evaluation import gpt_elo_eval
from alignment.evaluation.judging.prompts import TEMPLATE_HASH
from alignment.records import read_json, write_json, write_jsonl
from alignment.visualization import make_report

SCORES = {"base": 5.0, "poor": 2.0, "good": 9.0}


def judge(text):
    return SCORES[text]


def opposite(text):
    return 10 - SCORES[text]


def report(folder, **settings) -> dict:
    given = {name: str(value) for name, value in settings.items()} | {"models": settings.get("models", [])}
    given |= {"data_dir": str(folder), "judgments": str(folder / "j.jsonl")}
    return make_report.collect(make_report.Config(**given), "command")[0]


def rate(folder, *more: str) -> None:
    outputs = ["--ratings-out", str(folder / "r.json"), "--plot-out", str(folder / "r.png"), "--draws", "100"]
    gpt_elo_eval.main(["--data-dir", str(folder), "--judgments-in", str(folder / "j.jsonl"), *outputs, *more])


def test_old_verdicts_are_not_shown_with_new_answers(tmp_path):
    write_answers(tmp_path, "A", "base", reward=0.5)
    write_answers(tmp_path, "B", "poor", reward=-2.0)
    append_judgments(tmp_path / "j.jsonl", tmp_path, ["A", "B"], judge)
    rate(tmp_path)
    assert report(tmp_path, ratings=tmp_path / "r.json")["notes"] == []
    write_answers(tmp_path, "B", "good", reward=2.0)
    data = report(tmp_path, ratings=tmp_path / "r.json")
    assert data["disagreements"] == {}
    changed, left_out = data["notes"]
    assert changed.startswith("The answers or scores of B have changed since")
    assert "all 160 verdicts are on other answers than the points files hold" in left_out
    append_judgments(
        tmp_path / "j.jsonl", tmp_path, ["A", "B"], opposite, prompts=10
    )  # a judge that the scorer contradicts
    data = report(tmp_path)
    assert data["ratings"]["dimensions"]["helpfulness"]["ratings"]["B"]["comparisons"] == 20
    part = data["disagreements"]["helpfulness"]
    assert (part["total"], part["judged"]) == (10, 10)
    assert {reply["text"] for row in part["rows"] for reply in row["replies"]} == {
        "I read 'base' and 'good'.",
        "I read 'good' and 'base'.",
    }
    assert data["notes"] == [
        f"160 verdicts in {tmp_path / 'j.jsonl'} are on other answers than those here, and are left out."
    ]


def test_a_judgments_file_without_lines_is_a_note(tmp_path):
    """As it is while the first replies are on their way."""
    write_answers(tmp_path, "A", "base")
    (tmp_path / "j.jsonl").touch()
    data = report(tmp_path)
    assert data["notes"] == [f"Judgments are left out: {tmp_path / 'j.jsonl'} has no judgment."]
    assert data["ratings"] is None


def test_of_two_judges_the_ratings_say_which_or_a_flag_or_a_note(tmp_path):
    path = tmp_path / "j.jsonl"
    write_answers(tmp_path, "A", "base")
    write_answers(tmp_path, "B", "good")
    append_judgments(path, tmp_path, ["A", "B"], judge, judge="first")
    append_judgments(path, tmp_path, ["A", "B"], opposite, judge="second")

    def better(data):
        part = data["ratings"]["dimensions"]["helpfulness"]["ratings"]
        return max(part, key=lambda name: part[name]["rating"])

    data = report(tmp_path)  # it is made all the same
    (note,) = data["notes"]
    assert data["ratings"] is None and data["disagreements"] == {}
    assert "first (template" in note and "second (template" in note and "--judge_model and --template" in note
    for name, winner in (("first", "B"), ("second", "A")):
        data = report(tmp_path, judge_model=name, template=TEMPLATE_HASH)
        assert better(data) == winner and data["notes"] == []
        assert f"{name} (template {TEMPLATE_HASH})" in data["ratings"]["method"]
    with pytest.raises(UserError, match="no judgment of --judge_model third; it holds first"):
        report(tmp_path, judge_model="third")
    rate(tmp_path, "--judge-model", "second")
    data = report(tmp_path, ratings=tmp_path / "r.json")
    assert data["notes"] == [] and data["ratings"]["method"] == "bradley-terry, judge: second"
    assert data["disagreements"]["helpfulness"]["judged"] == 40
    (note,) = report(tmp_path, ratings=tmp_path / "r.json", judge_model="first")["notes"]
    assert "r.json rates by second" in note and "the judgments shown are by first" in note
    details = read_json(tmp_path / "r_details.json")
    details["source"]["judge"] = "a third, in another file"
    write_json(tmp_path / "r_details.json", details)
    data = report(tmp_path, ratings=tmp_path / "r.json")
    assert data["ratings"]["dimensions"] == details["dimensions"] and "Judgments are left out" in data["notes"][0]


def published(folder, prompts=40) -> None:
    rows = [
        {"model_a": a, "model_b": b, "dimension": dimension, "question": f"prompt {i}", "scores": [3, 4 + i % 2]}
        for dimension in ("helpfulness", "harmlessness")
        for a, b in (("A", "B"), ("A", "C"), ("C", "B"))
        for i in range(prompts)
    ]
    write_jsonl(folder / "j.jsonl", rows)


def test_ratings_of_the_file_and_of_the_judgments_stand_on_one_scale(tmp_path, capsys):
    for name in "AB":
        write_answers(tmp_path, name, name)
    published(tmp_path)
    for at_1000 in ("B", "C"):
        table = {"A": 900.0, "B": 1100.0, "C": 1080.0} | {at_1000: 999.9999999999999}
        write_json(tmp_path / "r.json", dict.fromkeys(("helpfulness", "harmlessness"), table))
        data = report(tmp_path, ratings=tmp_path / "r.json")
        assert data["ratings"]["scale"] == f"{at_1000} = 1000"
        for part in data["ratings"]["dimensions"].values():
            assert part["ratings"][at_1000]["rating"] == 1000.0
            assert part["ratings"]["A"]["published"] == 900.0 and part["ratings"]["A"]["low"] is not None
    error = capsys.readouterr().err
    assert "the figure has no intervals" not in error and "intervals come from the judgments" in error
    write_json(tmp_path / "r.json", dict.fromkeys(("helpfulness", "harmlessness"), {"A": 1.0, "B": 2.0}))
    assert report(tmp_path, ratings=tmp_path / "r.json")["ratings"]["scale"] == (
        "A = 1000; in the file no model is at 1000"
    )


def test_a_model_without_points_may_have_one_answer_or_be_left_out(tmp_path):
    for name in "AB":
        write_answers(tmp_path, name, "base")
    for answer in ("poor", "good"):
        write_answers(tmp_path, "C", answer)
        append_judgments(tmp_path / "j.jsonl", tmp_path, ["A", "B", "C"], judge)
    (tmp_path / "C_points.jsonl").unlink()
    (note,) = report(tmp_path)["notes"]
    assert "several answers of C to one prompt" in note and "leave them out with --models" in note
    data = report(tmp_path, models=["A", "B"])
    assert data["notes"] == [] and list(data["ratings"]["dimensions"]["helpfulness"]["ratings"]) == ["A", "B"]


def test_without_a_ratings_file_alpaca_is_at_1000_as_in_the_ratings(tmp_path):
    for name in ("A", "Alpaca-7B"):
        write_answers(tmp_path, name, {"A": "base", "Alpaca-7B": "good"}[name])
    append_judgments(tmp_path / "j.jsonl", tmp_path, ["A", "Alpaca-7B"], judge)
    data = report(tmp_path)
    assert data["ratings"]["scale"] == "Alpaca-7B = 1000"
    assert data["ratings"]["dimensions"]["helpfulness"]["ratings"]["Alpaca-7B"]["rating"] == 1000.0
    rate(tmp_path)
    assert report(tmp_path, ratings=tmp_path / "r.json")["ratings"]["scale"] == ("Alpaca-7B = 1000")
    assert json.dumps(data["ratings"])
