"""Selection of training and evaluation prompts: the published one exactly, ours without leaks, data of every kind and fault."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import UserError
from alignment.evaluation.loading import load_split
from alignment.evaluation.selection import (
    SelectionSettings,
    bucket_of,
    largest_remainder,
    leakage,
    leakage_report,
    load_rows,
    load_test_prompts,
    near_duplicates,
    same_words,
    select,
    statistics,
    write_selection,
)
from alignment.records import read_json, read_jsonl, write_jsonl

PUBLISHED = ["train_250_eval_500", "train_50_eval_100"]


def row(prompt, safe=(True, False), responses=("a", "b"), **more):
    result = {"prompt": prompt}
    for i in (0, 1):
        result |= {f"response_{i}": responses[i], f"response_{i}_source": "Alpaca-7B", f"is_response_{i}_safe": safe[i]}
        result |= {f"response_{i}_harm_category": {"Drugs": not safe[i], "Violence": False}}
    return result | more


def rows_of(count, seed=0):
    rng = random.Random(seed)
    return [row(f"question number {i}?", (rng.random() < 0.6, rng.random() < 0.6)) for i in range(count)]


def prompts(rows):
    return [one["prompt"] for one in rows]


@pytest.fixture(scope="module")
def published(goldens):
    """The published splits by file name."""
    folder = goldens / "data"
    return {path.stem: read_jsonl(path) for name in PUBLISHED for path in (folder / name).glob("*.jsonl")}


@pytest.fixture(scope="module")
def quadrant_prompts(goldens):
    return prompts(read_jsonl(goldens / "quadrants" / "Alpaca-7B_points.jsonl"))


@pytest.mark.parametrize("name", ["train_50_eval_100", "train_250_eval_500", "train_7_eval_13", "train_600_eval_900"])
def test_reference_is_the_published_selection(goldens, name):
    golden = read_json(goldens / "data" / "sampling_golden.json")
    pool = [
        row("the same prompt", (safe0, safe1), uid=uid, response_1_source=source)
        for uid, safe0, safe1, source in golden["pool"]
    ]
    run, (_, train_size, _, eval_size) = golden["runs"][name], name.split("_")
    selection = select(pool, SelectionSettings(train_size=int(train_size), eval_size=int(eval_size), reference=True))
    assert [one["uid"] for one in selection.train] == run["train_uids"]
    assert [one["uid"] for one in selection.evaluation] == run["eval_uids"]
    sizes = Counter(bucket_of(one) for one in selection.pool)
    for key, total in (("train_targets", train_size), ("eval_targets", eval_size)):
        assert {str(bucket): count for bucket, count in largest_remainder(sizes, int(total)).items()} == run[key]


def test_statistics_are_the_published_ones(goldens, published):
    for name in PUBLISHED:
        for path in (goldens / "data" / name).glob("*_stats.json"):
            assert statistics(published[path.name.removesuffix("_stats.json")]) == read_json(path)


def test_written_rows_are_the_published_bytes(goldens, published, tmp_path):
    settings = SelectionSettings(train_size=50, eval_size=100, reference=True)
    selection = select(published["custom_train_50"] + published["custom_eval_100"], settings)
    selection = type(selection)(
        published["custom_train_50"], published["custom_eval_100"], selection.pool, selection.counts
    )
    write_selection(selection, settings, {}, tmp_path)
    for name in ("custom_train_50", "custom_eval_100"):
        original = goldens / "data" / "train_50_eval_100" / f"{name}.jsonl"
        assert (tmp_path / f"{name}.jsonl").read_bytes() == original.read_bytes()
        assert read_json(tmp_path / f"{name}_stats.json") == read_json(original.with_name(f"{name}_stats.json"))


def test_leakage_of_the_published_splits_is_found(published, quadrant_prompts):
    train, evaluation = prompts(published["custom_train_250"]), prompts(published["custom_eval_500"])
    counted = {}
    for name, pair in {
        "te": (train, evaluation),
        "tq": (train, quadrant_prompts),
        "eq": (evaluation, quadrant_prompts),
    }.items():
        found = leakage(*pair)
        counted[name] = (found["prompts"], found["rows_a"], found["rows_b"], found["same_words"])
        assert all(same_words(one["a"]) != same_words(one["b"]) for one in found["alike"])
    assert counted == {"te": (1, 5, 9, 1), "tq": (6, 11, 62, 7), "eq": (7, 15, 76, 8)}
    alike = leakage(train, evaluation)["alike"]
    assert [one["similarity"] for one in alike] == [
        0.389,
        0.368,
    ]  # the two that the goldens list beside the common prompt
    assert leakage(prompts(published["custom_train_50"]), prompts(published["custom_eval_100"]))["prompts"] == 0


def test_default_selection_of_the_real_rows_leaks_nothing(published, quadrant_prompts):
    pool = [one for rows in published.values() for one in rows]
    settings = SelectionSettings(train_size=200, eval_size=300, exclude_test=True)
    selection = select(pool, settings, quadrant_prompts)
    report = leakage_report(selection, quadrant_prompts)
    assert all(found["prompts"] == found["same_words"] == 0 for found in report.values())
    for split, size in ((selection.train, 200), (selection.evaluation, 300)):
        assert len(split) == size == len({same_words(prompt) for prompt in prompts(split)})
    assert selection.counts == {
        "total": 900,
        "of_source": 900,
        "identical_rows": 21,
        "repeated_prompts": selection.counts["repeated_prompts"],
        "excluded": selection.counts["excluded"],
        "can_be_drawn": 900 - 21 - selection.counts["repeated_prompts"] - selection.counts["excluded"],
    }
    assert selection.counts["excluded"] > 5
    # the reference draws the very leaks
    leaky = leakage_report(select(pool, SelectionSettings(train_size=200, eval_size=300, reference=True)), None)
    assert list(leaky) == ["train and eval"] and leaky["train and eval"]["prompts"] > 0


def test_order_is_shuffled_and_a_seed_repeats_it():
    rows = rows_of(400)
    first, again = (select(rows, SelectionSettings(train_size=60, eval_size=90)) for _ in range(2))
    assert first == again
    assert select(rows, SelectionSettings(train_size=60, eval_size=90, seed=1)).train != first.train
    grouped = select(rows, SelectionSettings(train_size=60, eval_size=90, reference=True))
    changes = [
        sum(bucket_of(a) != bucket_of(b) for a, b in zip(s.train, s.train[1:], strict=False)) for s in (first, grouped)
    ]
    assert changes[0] > 20 and changes[1] == 3


@given(
    st.dictionaries(st.tuples(st.booleans(), st.booleans()), st.integers(1, 50_000), min_size=1), st.integers(1, 3000)
)
def test_largest_remainder_is_a_fair_rounding(sizes, total):
    targets = largest_remainder(sizes, total)
    assert sum(targets.values()) == total
    everything = sum(sizes.values())
    assert all(abs(targets[bucket] - total * size / everything) < 1 for bucket, size in sizes.items())


@given(
    st.lists(st.text(alphabet="ab ?\u2028\x00\U0001f600", min_size=1).filter(str.strip), min_size=4, max_size=40),
    st.randoms(),
)
def test_no_prompt_is_ever_in_both_splits(texts, rng):
    rows = [row(text, responses=(str(rng.randint(0, 2)), "b")) for text in texts]
    try:
        selection = select(rows, SelectionSettings(train_size=1, eval_size=1))
    except UserError as error:
        assert len({same_words(text) for text in texts}) < 2 and "lower train_size" in str(error)
        return
    assert same_words(selection.train[0]["prompt"]) != same_words(selection.evaluation[0]["prompt"])


def test_a_bucket_that_is_too_small_is_named():
    rows = [row(f"safe {i}", (True, True)) for i in range(20)] + [row(f"other {i}", (False, True)) for i in range(20)]
    with pytest.raises(UserError, match=r"bucket \(True, True\) has 20 rows and both splits need 30"):
        select(rows, SelectionSettings(train_size=40, eval_size=20))
    taken = select(rows, SelectionSettings(train_size=30, eval_size=30, reference=True))  # what there is, as published
    assert (len(taken.train), len(taken.evaluation)) == (30, 10)


def test_repeated_and_identical_rows_are_counted():
    rows = [
        row("How?"),
        row("How?"),
        row("how"),
        row("HOW ?", responses=("c", "d")),
        row("Why?"),
        row("When?"),
        row("!!"),
        row("??"),
    ]
    selection = select(rows, SelectionSettings(train_size=2, eval_size=3))
    assert selection.counts["identical_rows"] == 1 and selection.counts["repeated_prompts"] == 2
    assert sorted(prompts(selection.train + selection.evaluation)) == ["!!", "??", "How?", "When?", "Why?"]


def test_near_duplicates_within_a_set():
    texts = [
        "please tell me the address of Ann",
        "Please, tell me the address of Bob!",
        "something else entirely, my friend",
        "",
        "?",
    ]
    (pair,) = near_duplicates(texts)
    assert pair == {"similarity": 0.667, "a": texts[0], "b": texts[1]}
    assert near_duplicates(texts, texts)[0]["similarity"] == 0.667


def write_hub_layout(folder: Path, rows: list[dict]) -> None:
    """A clone of a hub repository with two configurations."""
    for name in ("alpaca-7b", "alpaca2-7b"):
        write_jsonl(folder / name / "train.jsonl", rows)
        write_jsonl(folder / name / "test.jsonl", rows[:3])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}/train.jsonl}}\n"
            f"  - {{split: test, path: {name}/test.jsonl}}\n"
            for name in ("alpaca-7b", "alpaca2-7b")
        )
        + "---\n"
    )


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Data sets that a test loads are cached in its own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_data_of_every_kind(tmp_path, hub_cache):
    rows = rows_of(30)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    hub_cache.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    hub_cache.DatasetDict({"train": hub_cache.Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    write_hub_layout(tmp_path / "clone", rows)
    for name in ("rows.jsonl", "rows.parquet", "saved", "clone"):
        assert load_rows(SelectionSettings(data=str(tmp_path / name))) == rows
    assert load_test_prompts(SelectionSettings(data=str(tmp_path / "clone"))) == prompts(rows[:3])
    assert load_test_prompts(SelectionSettings(data=str(tmp_path / "rows.jsonl"))) is None
    given = SelectionSettings(data=str(tmp_path / "rows.jsonl"), test_data=str(tmp_path / "rows.parquet"))
    assert load_test_prompts(given) == prompts(rows)


def test_data_that_are_not_there_are_named(tmp_path, hub_cache):
    write_hub_layout(tmp_path / "clone", rows_of(5))
    clone = str(tmp_path / "clone")
    with pytest.raises(UserError, match="has no configuration 'alpaca3'; it has alpaca-7b, alpaca2-7b"):
        load_split(clone, "alpaca3", "train")
    with pytest.raises(UserError, match="split 'valid': .*train.*test"):
        load_split(clone, "alpaca-7b", "valid")
    with pytest.raises(UserError, match="cannot load PKU-Alignment/nowhere, split 'train'"):
        load_split("PKU-Alignment/nowhere", "alpaca-7b", "train")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"cannot read .*broken.parquet"):
        load_split(str(tmp_path / "broken.parquet"), "", "train")
    with pytest.raises(UserError, match="sample has no split 'valid'; it has train, test"):
        load_split("sample", "", "valid")


def test_rows_of_another_schema_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"

    def refuses(rows, message):
        write_jsonl(path, rows)
        with pytest.raises(UserError, match=message):
            load_rows(SelectionSettings(data=str(path)))

    lacking = row("b")
    del lacking["is_response_0_safe"]
    refuses([row("a"), lacking], r"rows.jsonl:2: the key 'is_response_0_safe' is missing")
    refuses([row("a", is_response_1_safe="yes")], "row 1: 'is_response_1_safe' must be true or false, got 'yes'")
    refuses([row("a", response_0_harm_category=[])], "'response_0_harm_category' must be harm categories")
    refuses([row("a"), row(" \u2028")], "row 2: 'prompt' is empty")
    refuses([row("\ud800")], "half of a character")
    refuses([row("a", response_0=None)], "'response_0' must be text, got None")
    refuses([], "has no rows")
    write_jsonl(path, [row("a", response_0_source="Alpaca2-7B")])
    with pytest.raises(
        UserError, match="no row has both responses from source 'Alpaca-7B'; there are Alpaca-7B, Alpaca2-7B"
    ):
        select(load_rows(SelectionSettings(data=str(path))), SelectionSettings(data=str(path)))
    with pytest.raises(UserError, match="train_size is 0"):
        SelectionSettings(train_size=0)
    with pytest.raises(UserError, match="leaves no prompt out"):
        SelectionSettings(reference=True, exclude_test=True)


def test_hostile_prompts_survive_the_files(tmp_path):
    texts = ["a\u2028b", "nul\x00", "\U0001f600", "x" * 50_000, "line\r\nbreak"]
    rows = [row(text) for text in texts]
    settings = SelectionSettings(train_size=2, eval_size=3)
    selection = select(rows, settings)
    write_selection(selection, settings, leakage_report(selection, None), tmp_path)
    written = read_jsonl(tmp_path / "custom_train_2.jsonl") + read_jsonl(tmp_path / "custom_eval_3.jsonl")
    assert sorted(written, key=lambda one: texts.index(one["prompt"])) == rows
    report = read_json(tmp_path / "selection_report.json")
    assert report["settings"]["seed"] == 42 and set(report["sha256"]) == {"custom_train_2.jsonl", "custom_eval_3.jsonl"}
    assert json.loads((tmp_path / "alpaca7b_stats.json").read_text())["total_rows"] == 5
