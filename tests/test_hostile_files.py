"""Broken data files at every script that reads them: one line with file and place, exit code 2, no trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from script_here import (
    CLASSIFY,
    COMPARE,
    CURVES,
    ES,
    GRID,
    GRPO,
    PARETO,
    RATE,
    RATIOS,
    REBUILD,
    REPORT,
    bad_file,
    refused,
)

from alignment.records import write_json, write_jsonl

NO_SCORER = ("--scorer_url", "http://127.0.0.1:9", "--scorer_max_wait", "0")

# name -> content, words of the error beside the file's name
NO_ROWS = {
    "empty": (b"", ["no rows"]),
    "blank lines": (b"\n \n\n", ["no rows"]),
}
NO_JSONL = {
    "a folder": (None, ["cannot read", "Is a directory"]),
    "cut off": (b'{"prompt": "a", "response": "b"}\n{"prompt": "b', [":2", "ends in the middle"]),
    "no JSON": (b"prompt,response\na,b\n", [":1", "not valid JSON"]),
    "no object": (b'["a"]\n', [":1", "expected a JSON object"]),
    "a number too long": (b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}\n", [":1", "not valid JSON"]),
    "nested without end": (b'{"prompt": ' + b"[" * 100_000 + b"\n", [":1", "not valid JSON"]),
    "Latin-1": ('{"prompt": "caf\xe9"}\n'.encode("latin-1"), [":1", "not UTF-8"]),
    "UTF-16": ('{"prompt": "a"}\n'.encode("utf-16"), [":1", "not UTF-8"]),
    "NUL bytes": (b"\0" * 4096, [":1", "not valid JSON"]),
}
BAD_PROMPTS = {
    "no prompt": (b'{"prompt": "a"}\n\n{"promt": "b"}\n', [":3", "'prompt' is missing", "promt"]),
    "a number": (b'{"prompt": "a"}\n{"prompt": 5}\n', [":2", "'prompt'", "5"]),
    "a list": (b'{"prompt": ["a"]}\n', [":1", "'prompt'"]),
    "null": (b'{"prompt": null}\n', [":1", "'prompt'", "None"]),
    "nothing but spaces": (b'{"prompt": "a"}\n{"prompt": " \\t\\n"}\n', [":2", "'prompt'"]),
    "nothing but separators": (b'{"prompt": "\\u2028\\u0085"}\n', [":1", "'prompt'"]),
    "half a character": (b'{"prompt": "a"}\n\n{"prompt": "b\\ud83d c"}\n', [":3", "'prompt'", "half of a character"]),
}
PROMPT_READERS = {
    "ES train": (ES, "--policy_model_path", "no/model", *NO_SCORER, "--eval_jsonl", "GOOD", "--train_jsonl"),
    "ES eval": (ES, "--policy_model_path", "no/model", *NO_SCORER, "--train_jsonl", "GOOD", "--eval_jsonl"),
    "GRPO train": (GRPO, "--model_name", "no/model", *NO_SCORER, "--eval_jsonl", "GOOD", "--train_jsonl"),
    "GRPO eval": (GRPO, "--model_name", "no/model", *NO_SCORER, "--train_jsonl", "GOOD", "--eval_jsonl"),
    "classify": (CLASSIFY, "--policy_model_path", "no/model", "--output_dir", "OUT", "--from_jsonl"),
}
POINTS_READERS = {
    "classify": (CLASSIFY, "--scorer_url", "http://127.0.0.1:9", "--output_dir", "OUT", "--responses_from", "FILE"),
    "compare": (COMPARE, "GOOD", "FILE", "--output", "OUT/x"),
    "rate": (RATE, "--judge", "scorer", "--data_dir", "FOLDER", "--models", "good", "bad"),
    "ask": (RATE, "--dry_run", "--data_dir", "FOLDER", "--models", "good", "bad"),
    "grid": (GRID, "--data_dir", "FOLDER", "--output", "OUT/x.png"),
    "ratios": (RATIOS, "--data_dir", "FOLDER", "--output", "OUT/x.png"),
    "pareto": (PARETO, "--data_dir", "FOLDER", "--output", "OUT/x.png"),
    "report": (REPORT, "--data_dir", "FOLDER", "--output", "OUT/x.html"),
}
POINT = {"prompt": "p", "response": "r", "reward": 1.0, "cost": -1.0, "label": "SH"}


def points(**changed) -> bytes:
    return json.dumps(POINT).encode() + b"\n" + json.dumps(POINT | {"prompt": "q"} | changed).encode() + b"\n"


BAD_POINTS = {
    "no label": (json.dumps({"prompt": "p", "response": "r", "reward": 1.0, "cost": 1.0}).encode(), ["'label'"]),
    "prompt a number": (points(prompt=3), [":2", "'prompt'"]),
    "response null": (points(response=None), [":2", "'response'"]),
    "reward a word": (points(reward="high"), [":2", "'reward'", "high"]),
    "cost a list": (points(cost=[1.0]), [":2", "'cost'"]),
    "reward true": (points(reward=True), [":2", "'reward'"]),
    "label of another quadrant": (points(label="UU"), [":2", "UU", "SH"]),
    "label a list": (points(label=["SH"]), [":2", "SH"]),
    "finished a word": (points(finished="no"), [":2", "'finished'", "true or false"]),
    "cut a number": (points(cut=1), [":2", "'cut'", "true or false"]),
    "tokens a word": (points(num_tokens="many"), [":2", "'num_tokens'", "number"]),
    "log-probability a list": (points(log_prob_base=[-1]), [":2", "'log_prob_base'", "number"]),
    "categories a number": (points(categories=5), [":2", "'categories'", "list of texts"]),
    "categories of numbers": (points(categories=[1, "a"]), [":2", "'categories'", "list of texts"]),
}


@pytest.fixture
def good(tmp_path) -> Path:
    write_jsonl(tmp_path / "points" / "good_points.jsonl", [POINT, POINT | {"prompt": "q", "label": "UH", "cost": 1.0}])
    return tmp_path / "points" / "good_points.jsonl"


def named(message: str, path: Path, words: list[str]) -> None:
    assert str(path) in message, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", NO_ROWS | NO_JSONL | BAD_PROMPTS)
@pytest.mark.parametrize("reader", PROMPT_READERS)
def test_prompts(tmp_path, good, reader, case):
    content, words = (NO_ROWS | NO_JSONL | BAD_PROMPTS)[case]
    path = bad_file(tmp_path, "bad.jsonl", content)
    command = [str(good) if word == "GOOD" else word.replace("OUT", str(tmp_path)) for word in PROMPT_READERS[reader]]
    named(refused(*command, path), path, words)


@pytest.mark.parametrize("reader", PROMPT_READERS)
def test_prompts_that_are_not_there(tmp_path, good, reader):
    command = [str(good) if word == "GOOD" else word.replace("OUT", str(tmp_path)) for word in PROMPT_READERS[reader]]
    message = refused(*command, tmp_path / "nothing.jsonl")
    named(message, tmp_path / "nothing.jsonl", [])


# The classification scores a points file anew: scores and labels in it do not matter.
ONLY_SCORES = {"no label", "reward a word", "cost a list", "reward true", "label of another quadrant", "label a list"}


@pytest.mark.parametrize(
    ("reader", "case"),
    [
        (reader, case)
        for reader in POINTS_READERS
        for case in NO_ROWS | NO_JSONL | BAD_POINTS
        if not (reader == "classify" and case in ONLY_SCORES)
    ],
)
def test_answers(tmp_path, good, reader, case):
    content, words = (NO_ROWS | NO_JSONL | BAD_POINTS)[case]
    path = bad_file(good.parent, "bad_points.jsonl", content)
    places = {"GOOD": good, "FILE": path, "FOLDER": good.parent}
    command = [str(places.get(word, word.replace("OUT", str(tmp_path)))) for word in POINTS_READERS[reader]]
    if case == "a folder":
        words = []
    if case == "cut off" and reader != "classify":
        words = [":1", "'reward' is missing"]
    named(refused(*command), path, words)


@pytest.mark.parametrize("key", ["prompt", "response"])
def test_half_a_character_cannot_be_sent_to_a_judge(tmp_path, good, key):
    row = POINT | {key: "half \ud83d"}
    for name in ("a", "b"):
        write_jsonl(good.parent / f"{name}_points.jsonl", [row])
    message = refused(RATE, "--dry_run", "--data_dir", good.parent, "--models", "a", "b")
    named(message, good.parent / "a_points.jsonl", [f"'{key}'", "half of a character"])


METRICS = {
    "no kind": (b'{"iteration": 1}\n', [":1", "'kind'"]),
    "no iteration": (b'{"kind": "train"}\n', ["iteration"]),
    "iteration a word": (b'{"kind": "train", "iteration": "1"}\n', ["iteration"]),
    "reward a word": (b'{"kind": "train", "iteration": 0, "reward_mean": "high"}\n', ["reward_mean", "high"]),
    "reward a list": (b'{"kind": "train", "iteration": 0, "reward_mean": [1]}\n', ["reward_mean"]),
    "only other rows": (b'{"kind": "note"}\n', ["no rows of the kind"]),
}


@pytest.mark.parametrize("case", NO_JSONL | METRICS)
@pytest.mark.parametrize("script", [CURVES, PARETO, REPORT])
def test_metrics(tmp_path, good, script, case):
    content, words = (NO_JSONL | METRICS)[case]
    path = bad_file(tmp_path / "run", "metrics.jsonl", content)
    if case == "cut off":
        words = [":1", "'kind' is missing"]
    output = tmp_path / ("x.html" if script == REPORT else "x.png")
    data = ["--data_dir", good.parent] if script == REPORT else []
    named(refused(script, "--runs", path.parent, "--output", output, *data), path, words)


@pytest.mark.parametrize("text", ["seconds: 5", "seconds: {total: soon}"])
def test_training_time_of_the_wrong_kind(tmp_path, text):
    row = {"kind": "train", "iteration": 0, "reward_mean": 1.0}
    row["seconds"] = 5 if text == "seconds: 5" else {"total": "soon"}
    write_jsonl(tmp_path / "metrics.jsonl", [row])
    message = refused(CURVES, tmp_path, "--x", "time", "--output", tmp_path / "x.png")
    named(message, tmp_path, ["seconds.total"])


JUDGMENT = {"model_a": "a", "model_b": "b", "dimension": "helpfulness", "question": "q", "scores": [7, 2]}
JUDGMENTS = {
    "no scores": ({"model_a": "a", "model_b": "b", "dimension": "helpfulness", "question": "q"}, ["'scores'"]),
    "a model against itself": (JUDGMENT | {"model_b": "a"}, ["two models"]),
    "a model that is a number": (JUDGMENT | {"model_b": 3}, [":1", "'model_b' must be text, got 3"]),
    "one score": (JUDGMENT | {"scores": [7]}, ["two scores"]),
    "scores in words": (JUDGMENT | {"scores": ["7", "2"]}, ["two scores"]),
    "another dimension": (JUDGMENT | {"dimension": "length"}, ["'length'", "helpfulness"]),
    "a key that is a list": (JUDGMENT | {"key": ["x"], "outcome": "win"}, [":1", "'key'"]),
    "a key without outcome": (JUDGMENT | {"key": "x"}, [":1", "'outcome'"]),
    "an outcome that is a list": (JUDGMENT | {"key": "x", "outcome": ["win"]}, [":1", "'outcome'"]),
}


@pytest.mark.parametrize("case", NO_JSONL | JUDGMENTS)
@pytest.mark.parametrize("script", [RATE, REPORT])
def test_judgments(tmp_path, good, script, case):
    content, words = (NO_JSONL | JUDGMENTS)[case]
    if isinstance(content, dict):
        content = json.dumps(content).encode() + b"\n"
    path = bad_file(tmp_path, "judgments.jsonl", content)
    if case == "cut off":
        words = [":1", "'question' is missing"]
    if script == RATE:
        places = ["--ratings_out", tmp_path / "r.json", "--plot_out", tmp_path / "r.png"]
        message = refused(RATE, "--judgments_in", path, "--data_dir", tmp_path, *places)
    else:
        message = refused(REPORT, "--data_dir", good.parent, "--judgments", path, "--output", tmp_path / "x.html")
    named(message, path, words)


@pytest.mark.parametrize("case", ["a key that is a list", "a key without outcome", "an outcome that is a list"])
def test_judgments_that_would_be_gone_on_with(tmp_path, good, case, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    content, words = JUDGMENTS[case]
    write_jsonl(tmp_path / "judgments.jsonl", [content])
    write_jsonl(good.parent / "b_points.jsonl", [POINT, POINT | {"prompt": "q"}])
    files = ["--judgments_out", tmp_path / "judgments.jsonl", "--ratings_out", tmp_path / "r.json"]
    files += ["--plot_out", tmp_path / "r.png"]
    message = refused(RATE, "--data_dir", good.parent, "--base_url", "http://127.0.0.1:9/v1", *files)
    named(message, tmp_path / "judgments.jsonl", words)


JOURNALS = {
    "not one": (b'{"kind": "step"}\n', [":1", "not an ES journal"]),
    "no settings": (b'{"kind": "start", "base_weights": "x"}\n', [":1", "settings"]),
    "settings a list": (b'{"kind": "start", "base_weights": "x", "settings": []}\n', [":1", "settings"]),
    "a step is gone": (
        b'{"kind": "start", "base_weights": "x", "settings": {}}\n{"kind": "step", "iteration": 1}\n',
        [":2", "expected iteration 0"],
    ),
    "a step without seeds": (
        b'{"kind": "start", "base_weights": "x", "settings": {}}\n{"kind": "step", "iteration": 0}\n',
        [":2", "seeds"],
    ),
}


@pytest.mark.parametrize("case", NO_JSONL | JOURNALS)
def test_journals(tmp_path, tiny_policy, case):
    content, words = (NO_JSONL | JOURNALS)[case]
    path = bad_file(tmp_path, "journal.jsonl", content)
    if case == "cut off":
        words = [":1", "'kind' is missing"]
    command = [REBUILD, "--journal", path, "--policy_model_path", tiny_policy, "--output", tmp_path / "out"]
    named(refused(*command), path, words)
    assert not (tmp_path / "out").exists()


def test_a_summary_that_is_no_object(tmp_path, good):
    for content in ([], "text", {"scorer": "x"}):
        write_json(good.with_name("good_summary.json"), content)
        other = good.with_name("other_points.jsonl")
        other.write_bytes(good.read_bytes())
        write_json(good.with_name("other_summary.json"), {"scorer": {"name": "y"}})
        named(refused(COMPARE, good, other, "--output", tmp_path / "x"), good.with_name("good_summary.json"), [])
