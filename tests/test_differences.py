"""docs/DIFFERENCES.md says what is so: its keys are settings that are off, its figures follow from the published data."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from dataclasses import fields
from typing import get_type_hints

import numpy as np
import pytest
import yaml
from conftest import REPO

from alignment.conversation import get_template
from alignment.ES.settings import ESSettings
from alignment.evaluation.classify_settings import ClassifySettings
from alignment.evaluation.gpt_elo_eval import Config as RatingSettings
from alignment.evaluation.judging.ratings import sequential_elo
from alignment.evaluation.judging.store import read_judgments
from alignment.evaluation.selection import SelectionSettings
from alignment.GRPO.settings import GRPOSettings
from alignment.records import read_jsonl
from alignment.scoring.service_settings import read_settings

TEXT = (REPO / "docs" / "DIFFERENCES.md").read_text(encoding="utf-8")


def figures(pattern: str) -> list[float]:
    """The numbers that the page has in the sentence that the pattern finds."""
    found = re.search(pattern, TEXT)
    assert found, f"DIFFERENCES.md no longer says {pattern!r}"
    return [float(text.replace(",", "")) for text in found.groups()]


def default(settings: type, name: str) -> object:
    return next(field.default for field in fields(settings) if field.name == name)


def test_published_behaviour_is_a_setting_and_off_unless_asked_for():
    table = TEXT.split("## Each departure")[0]
    keys = dict(re.findall(r"^\| (\w+) \| `([^`]+)` \|", table, re.MULTILINE))
    both = dict(re.findall(r"^\| \w+ \| `(\w+): (\w+)` \|", table, re.MULTILINE))
    assert len(re.findall(r"^\| \w+ \| `", table, re.MULTILINE)) == 6
    assert both == {"first_turn_only": "false", "noise": "reference", "standardize": "reference"}

    assert keys["scorer"] == "SCORER_REFERENCE=1"
    assert read_settings({}).scorer["reference"] is False
    assert read_settings({"SCORER_REFERENCE": "1"}).scorer["reference"] is True
    for settings in (ESSettings, GRPOSettings, ClassifySettings):
        assert default(settings, "first_turn_only") is True
    for name in ("noise", "standardize"):
        assert default(ESSettings, name) != "reference"
        assert "reference" in get_type_hints(ESSettings)[name].__args__
    assert keys["selection"] == "reference=True"
    assert SelectionSettings().reference is False
    assert keys["ratings"] == "--rating elo"
    assert default(RatingSettings, "rating") == "bradley-terry"
    assert "elo" in get_type_hints(RatingSettings)["rating"].__args__


@pytest.mark.parametrize("file", ["ES/es_alignment.yaml", "GRPO/grpo_alignment.yaml", "evaluation/sweep_configs.yaml"])
def test_the_files_that_users_begin_with_leave_it_off(file):
    content = yaml.safe_load((REPO / "alignment" / file).read_text(encoding="utf-8"))
    for one in (content, content.get("defaults") or {}, *(content.get("sweeps") or ())):
        assert one.get("first_turn_only", True) is True
        assert "reference" not in (one.get("noise"), one.get("standardize"))


def test_answers_that_go_on_with_another_turn(goldens):
    alpaca, es, rows = figures(r"([\d.]+) % of Alpaca-7B's and ([\d.]+) % of ES-100's ([\d,]+) answers")
    left_alpaca, left_es = figures(r"(\d+) % and (\d+) % of their characters remain when cut")
    (cut_alpaca,) = figures(r"of Alpaca-7B's ([\d,]+) cut answers")
    template = get_template("pku")
    for name, share, left in (("Alpaca-7B", alpaca, left_alpaca), ("ES-100", es, left_es)):
        answers = [row["response"] for row in read_jsonl(goldens / "quadrants" / f"{name}_points.jsonl")]
        assert len(answers) == rows
        cut = [template.cut_first_turn(answer) for answer in answers]
        assert round(100 * sum(was_cut for _, was_cut in cut) / len(cut), 1) == share
        assert round(100 * sum(len(text) for text, _ in cut) / sum(map(len, answers))) == left
        if name == "Alpaca-7B":
            assert sum(was_cut for _, was_cut in cut) == cut_alpaca
    for name in ("Beaver-V1", "Beaver-V2", "Beaver-V3"):
        answers = [row["response"] for row in read_jsonl(goldens / "quadrants" / f"{name}_points.jsonl")]
        assert not any(template.cut_first_turn(answer)[1] for answer in answers)


def test_answers_that_the_token_limit_cut_off(goldens):
    share, unended, ended = figures(r"([\d.]+) % of the published ES-500 .*\(([\d.]+)\).*\(([\d.]+)\)")
    rows = read_jsonl(goldens / "quadrants" / "ES-500_points.jsonl")
    ends = np.array([row["response"].rstrip().endswith((".", "!", "?")) for row in rows])
    rewards = np.array([row["reward"] for row in rows])
    assert round(100 * np.mean(~ends), 1) == share
    assert [round(float(rewards[chosen].mean()), 2) for chosen in (~ends, ends)] == [unended, ended]


def test_the_literal_end_of_the_published_ids(goldens):
    pieces, cases, literal, by_id = figures(
        r"In (\d+) of (\d+) cases the published ids end in the piece `>`; the reward of the first case is (-[\d.]+) there "
        r"and (-[\d.]+) with the id"
    )
    golden = json.loads((goldens / "score_model" / "cases.json").read_text(encoding="utf-8"))["cases"]
    (bracket,) = {case["input_ids"][-1] for case in golden if case["end_token_512"] == "<0x3E>"}
    assert (sum(case["input_ids"][-1] == bracket for case in golden), len(golden)) == (pieces, cases)
    first = golden[0]["R"]
    assert [round(first[key], 2) for key in ("alone_512", "alone_512_slow_ids")] == [literal, by_id]


def test_prompts_that_stand_twice(goldens):
    (rows,), (distinct,) = figures(r"quadrants of ([\d,]+) rows"), figures(r"the ([\d,]+) distinct prompts")
    (most,) = figures(r"one prompt stands there (\d+) times")
    prompts = [row["prompt"] for row in read_jsonl(goldens / "quadrants" / "Alpaca-7B_points.jsonl")]
    assert (len(prompts), len(set(prompts)), max(Counter(prompts).values())) == (rows, distinct, most)

    in_train, in_eval, tested = figures(
        r"one prompt in both published splits \((\d+) and (\d+) rows\); (\d+) training prompts are among"
    )
    folder = goldens / "data" / "train_250_eval_500"
    train, held_out = (
        [row["prompt"] for row in read_jsonl(folder / f"custom_{name}.jsonl")] for name in ("train_250", "eval_500")
    )
    (shared,) = set(train) & set(held_out)
    assert (train.count(shared), held_out.count(shared)) == (in_train, in_eval)
    assert len(set(train) & set(prompts)) == tested


def test_the_spread_of_sequential_elo_over_shuffles(goldens):
    (spread,) = figures(r"ELO's standard deviation over shuffles is about (\d+) points")
    (count,) = figures(r"([\d,]+) judgments\)")
    verdicts, told = read_judgments(str(goldens / "elo" / "gpt_judgments.jsonl"), (), None, None, 0.5, "tie")
    assert told["lines"] == count
    draw, spreads = random.Random(0), []
    for dimension in ("helpfulness", "harmlessness"):
        own = [one for one in verdicts if one.dimension == dimension]
        models = sorted({name for one in own for name in (one.first, one.second)})
        assert models[0] == "Alpaca-7B"  # at 1000: what moves is the distance from it
        ratings = []
        for _ in range(100):
            draw.shuffle(own)
            ratings.append(sequential_elo(own, models))
        spreads += list((np.array(ratings) - np.array(ratings)[:, :1]).std(axis=0)[1:])
    assert np.mean(spreads) == pytest.approx(spread, abs=5)


def test_the_published_seeds():
    numbers, probability, iterations = figures(
        r"seeds drawn from ([\d,]+) numbers.*a seed came twice with probability ([\d.]+) in ([\d,]+) iterations"
    )
    population = default(ESSettings, "population_size")
    distinct = sum(math.log1p(-member / numbers) for member in range(population))
    assert round(1 - math.exp(iterations * distinct), 2) == probability
    (independent,) = figures(r"at most (\d+) M independent numbers")
    assert (
        round(32000 * 4096 / 1e6) == independent
    )  # the largest parameter, the embedding; the others repeat its numbers
