"""The demo's models: what they must be able to do for the demo to mean something, and how the build is kept."""

import json
import random
import time

import pytest

from alignment.demo import build as demo_build
from alignment.demo.build import build
from alignment.demo.data import oracle
from alignment.errors import UserError
from alignment.records import load_prompts, read_json

EXPECTED = {
    "build.json",
    "cost",
    "custom_eval.jsonl",
    "custom_train.jsonl",
    "pairs_eval.jsonl",
    "pairs_train.jsonl",
    "policy",
    "probes.json",
    "reward",
}


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory):
    """Folder with the demo's data and models, built once (about a minute)."""
    folder = tmp_path_factory.mktemp("demo") / "models"
    build(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def base_answers(demo_models):
    """(prompts, greedy answers of the policy) on 200 held-out prompts."""
    from alignment.generation import TransformersEngine

    prompts = [row["prompt"] for row in load_prompts(demo_models / "custom_eval.jsonl", limit=200)]
    return prompts, TransformersEngine(demo_models / "policy").generate(prompts, max_new_tokens=24)


@pytest.mark.slow
def test_score_models_are_right_on_over_80_percent_of_held_out_pairs(demo_models):
    report = read_json(demo_models / "build.json")
    for name in ("reward", "cost"):
        assert report[name]["pairs"] > 1000
        assert report[name]["accuracy"] > 0.8
        assert report[name]["clean_accuracy"] > 0.8
    assert report["cost"]["sign_accuracy"] > 0.9
    reward, cost = report["reward"]["mean_scores"], report["cost"]["mean_scores"]
    assert (
        reward["SH"]
        > 0
        > reward["SU"]
        > max(reward[kind] for kind in ("garble", "off_topic", "repeat", "generic", "cut"))
    )
    assert cost["SH"] < 0 and cost["SU"] < 0 and cost["UH"] > 0 and cost["UU"] > 0 and cost["mixed"] > 0


@pytest.mark.slow
def test_policy_is_safe_in_30_to_55_percent_of_its_greedy_answers(demo_models, base_answers):
    from alignment.scoring.local_scorer import LocalScorer

    prompts, answers = base_answers
    scorer = LocalScorer(str(demo_models / "reward"), str(demo_models / "cost"), device="cpu")
    scores = scorer.score(prompts, [answer.response for answer in answers], [answer.finished for answer in answers])
    assert 0.30 <= (scores.costs <= 0).mean() <= 0.55
    assert scorer.warnings(read_json(demo_models / "probes.json")) == []


@pytest.mark.slow
def test_policy_writes_well_formed_answers_of_its_own(base_answers):
    prompts, answers = base_answers
    verdicts = [oracle(p, answer.response, answer.finished) for p, answer in zip(prompts, answers, strict=True)]
    assert verdicts.count("XX") / len(verdicts) < 0.05
    assert 0.30 <= sum(verdict in ("SH", "SU") for verdict in verdicts) / len(verdicts) <= 0.55
    assert all(answer.finished and not answer.cut for answer in answers)
    assert all(
        answer.response == answer.response.strip() for answer in answers
    )  # it stands directly after "ASSISTANT:"
    assert len({answer.response for answer in answers}) > 60


@pytest.mark.slow
def test_layouts(demo_models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert {path.name for path in demo_models.iterdir()} == EXPECTED
    policy = AutoModelForCausalLM.from_pretrained(demo_models / "policy")
    assert policy.config.max_position_embeddings == 2048 and policy.config.model_type == "llama"
    assert policy.generation_config.eos_token_id == 2
    for name in ("policy", "reward", "cost"):
        tokenizer = AutoTokenizer.from_pretrained(demo_models / name)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, len(tokenizer) - 1)
        text = "Sure, do it.\n“ASSISTANT:” ünïcode 你好 🙂  two  spaces USER: x"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text
    for name in ("reward", "cost"):
        config = json.loads((demo_models / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForScore"] and config["score_type"] == name
        assert config["score_bias"] is True and config["do_normalize"] is False


@pytest.mark.slow
def test_a_second_build_returns_at_once_and_changes_nothing(demo_models):
    before = {path: path.stat().st_mtime_ns for path in demo_models.rglob("*")}
    start = time.monotonic()
    build(demo_models, seed=0)
    assert time.monotonic() - start < 2
    assert before == {path: path.stat().st_mtime_ns for path in demo_models.rglob("*")}


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_build, "train_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "models")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "seed0-1234").mkdir()
    with pytest.raises(UserError, match="holds something else than a build"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["seed0-1234"]


def test_an_interrupted_rebuild_keeps_the_older_folder(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "build.json").write_text('{"key": "older"}')
    monkeypatch.setattr(demo_build, "train_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(folder)
    assert [path.name for path in folder.iterdir()] == ["build.json"]
    assert list(tmp_path.iterdir()) == [folder]


def test_tokenizer_is_a_function_of_the_data():
    data = demo_build.demo_data(0, train_per_topic=2, eval_per_topic=1)
    first, second = (demo_build.train_tokenizer(data, 800) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_batches_hold_every_item_of_a_pass_at_most_once():
    items = [[0] * length for length in range(1, 200)]
    batches = demo_build._batches(items, len, 8, random.Random(0))
    seen = [len(item) for _ in range(len(items) // 8) for item in next(batches)]
    assert len(seen) == len(set(seen))
