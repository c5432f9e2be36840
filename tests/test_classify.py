"""classify_reward_cost_unified.py run as its users run it, with tiny random models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_scorer import FakeScorer

from alignment.errors import UserError
from alignment.evaluation import classify_reward_cost_unified as script
from alignment.evaluation import compare_models
from alignment.evaluation.classify_settings import load_settings
from alignment.evaluation.points import load_scores, prompt_ids, read_points
from alignment.evaluation.scores import add_scores
from alignment.records import read_json, read_jsonl, write_jsonl
from alignment.scoring.scores import Scores

FILES = ("Rs.npy", "Cs.npy", "labels.npy", "points.jsonl", "scatter.png", "summary.json")
PUBLISHED = ["prompt", "response", "reward", "cost", "label"]
STRANGE = [
    "a\u2028b\u2029c\u0085d",
    "nul\x00inside",
    "\U0001f600 emoji \u00e9",
    "",
    " ",
    "x" * 50_000,
    "same",
    "same",
    "line\nbreak\r\n",
    "USER: x ASSISTANT:",
]


@pytest.fixture
def scorer_flags(tiny_scorers):
    return ["--reward_model", str(tiny_scorers[0]), "--cost_model", str(tiny_scorers[1]), "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = []
    for index in range(24):
        row = {"prompt": f"How do I {'very ' * (index % 7)}carefully do {index % 20}?"}
        row |= {f"response_{i}_harm_category": {"Drugs": index % 3 == 0, "Violence": i == 1} for i in (0, 1)}
        rows.append(row)
    rows[5]["prompt"] = "a\u2028b\x00\U0001f600"
    rows[7]["prompt"] = rows[6]["prompt"]
    write_jsonl(path, rows)
    return path


def results(folder: Path, name: str) -> dict[str, bytes]:
    return {ending: (folder / f"{name}_{ending}").read_bytes() for ending in (*FILES, "generations.jsonl")}


def test_policy_answers_are_classified_into_the_published_files(tmp_path, tiny_policy, scorer_flags, prompts):
    flags = ["--policy_model_path", tiny_policy, "--from_jsonl", prompts, "--policy_max_new_tokens", 12]
    target = ["--output_dir", tmp_path / "out", "--model_name", "org/Tiny $1_x", "--base_model_path", tiny_policy]
    script.main([*map(str, flags + target), *scorer_flags])

    folder, stem = tmp_path / "out", "org_Tiny__1_x"
    points = read_points(folder / f"{stem}_points.jsonl")
    asked = [row["prompt"] for row in read_jsonl(prompts)]
    assert [row["prompt"] for row in points] == asked
    assert [row["id"] for row in points] == prompt_ids(asked)
    assert all(list(row)[:5] == PUBLISHED for row in points)
    assert {"finished", "cut", "num_tokens", "truncated", "log_prob_base"} <= points[0].keys()
    assert points[0]["categories"] == ["Drugs", "Violence"] and points[1]["categories"] == ["Violence"]
    assert all(row["log_prob_base"] < 0 for row in points if row["num_tokens"])

    rewards, costs, labels = (np.load(folder / f"{stem}_{e}", allow_pickle=False) for e in FILES[:3])
    assert rewards.dtype == costs.dtype == np.float32 and labels.dtype == np.dtype("<U2")
    assert rewards.tolist() == [row["reward"] for row in points]
    assert labels.tolist() == [row["label"] for row in points]

    summary = read_json(folder / f"{stem}_summary.json")
    published = [
        "counts",
        "percents",
        "safe_ratio",
        "R_mean",
        "R_std",
        "C_mean",
        "C_std",
        "num_points",
        "used_policy_model",
    ]
    assert list(summary)[: len(published)] == published
    assert (summary["num_points"], summary["distinct_prompts"]) == (24, 23)
    assert summary["scorer"]["max_length"] == 576 and summary["sampling"]["max_new_tokens"] == 12
    assert summary["measures"]["safe_ratio"]["value"] == pytest.approx(summary["safe_ratio"])
    assert set(summary["per_category"]) == {"Drugs", "Violence"}


@pytest.mark.parametrize(("folder", "chosen"), [("best", 20), ("final", None)])
def test_prompts_that_chose_the_policy_are_told(tmp_path, tiny_policy, prompts, monkeypatch, capsys, folder, chosen):
    """RUN/best is the best of its run's evaluations on these very prompts: it beat its base in 10 % of runs without effect."""
    shutil.copytree(tiny_policy, tmp_path / "run" / folder)
    asked = [row["prompt"] for row in read_jsonl(prompts)]
    write_jsonl(tmp_path / "run" / "eval" / "iteration_00000_points.jsonl", [{"prompt": "of an earlier start"}])
    write_jsonl(tmp_path / "run" / "eval" / "iteration_00010_points.jsonl", [{"prompt": one} for one in asked[:21]])
    monkeypatch.setattr(script, "open_scorer", lambda config: Scorer(()))
    monkeypatch.setattr(script, "look_for_scorer", lambda config: None)
    flags = ["--policy_model_path", str(tmp_path / "run" / folder), "--from_jsonl", str(prompts), "--model_name", "m"]
    script.main([*flags, "--output_dir", str(tmp_path), "--device", "cpu", "--policy_max_new_tokens", "2"])
    assert read_json(tmp_path / "m_summary.json")["prompts_that_chose_it"] == chosen  # one of the 21 stands there twice
    said = "m is the best of its run's held-out evaluations, chosen on 20 of these 23 prompts, so it looks better"
    told = capsys.readouterr().out
    assert (said in told) == (chosen is not None)
    assert "23 prompts are too few for a bootstrap interval to be trusted" in told
    script.main(
        ["--responses_from", str(tmp_path / "m_points.jsonl"), "--model_name", "n", "--output_dir", str(tmp_path)]
    )
    assert read_json(tmp_path / "n_summary.json")["prompts_that_chose_it"] == chosen


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes(tmp_path, tiny_policy, scorer_flags, prompts):
    flags = ["--policy_model_path", str(tiny_policy), "--from_jsonl", str(prompts), "--policy_batch_size", "3"]
    flags += ["--policy_max_new_tokens", "120", "--policy_temperature", "0.8", "--model_name", "m", *scorer_flags]
    script.main([*flags, "--output_dir", str(tmp_path / "whole")])

    command = [sys.executable, "alignment/evaluation/classify_reward_cost_unified.py", *flags]
    saved = tmp_path / "killed" / "m_generations.jsonl"
    process = subprocess.Popen([*command, "--output_dir", str(saved.parent)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not saved.exists() or saved.read_bytes().count(b"\n") < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    content = saved.read_bytes()
    assert 8 <= content.count(b"\n") < 25, "the kill came too late to test anything"
    lines = content.split(b"\n")
    saved.write_bytes(b"\n".join(lines[:6]) + b"\n" + lines[6][:20])  # within a batch, and within a line
    assert not (saved.parent / "m_summary.json").exists()

    subprocess.run([*command, "--output_dir", str(saved.parent)], check=True, capture_output=True)
    assert results(saved.parent, "m") == results(tmp_path / "whole", "m")


@pytest.mark.slow
def test_killed_while_scoring_and_run_again_gives_the_same_bytes(tmp_path, tiny_policy, prompts):
    with FakeScorer() as scorer:
        scorer.identity = {"reward_model": {"name": "r"}, "cost_model": {"name": "c"}, "dtype": "float32"}
        flags = ["--policy_model_path", str(tiny_policy), "--from_jsonl", str(prompts), "--policy_max_new_tokens", "8"]
        flags += ["--scorer_url", scorer.url, "--scorer_batch_size", "1", "--model_name", "m", "--device", "cpu"]
        script.main([*flags, "--output_dir", str(tmp_path / "whole")])
        assert not (tmp_path / "whole" / "m_scores.jsonl").exists()

        killed = tmp_path / "killed"
        command = [
            sys.executable,
            "alignment/evaluation/classify_reward_cost_unified.py",
            *flags,
            "--output_dir",
            str(killed),
        ]
        scorer.requests.clear()
        scorer.answer = lambda number, body: time.sleep(0.05 if number < 12 else 600) or scorer.scores(body)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(scorer.requests) < 12:  # 8 texts of the first chunk are saved, 3 of the second are scored
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        with open(killed / "m_scores.jsonl", "ab") as file:
            file.write(b'{"start": 8, "rewards": [0.5')  # a torn line
        assert not (killed / "m_summary.json").exists()

        scorer.requests.clear()
        scorer.answer = lambda number, body: scorer.scores(body)
        subprocess.run(command, check=True, capture_output=True)
    assert len(scorer.requests) == 16  # the first chunk is not scored again
    assert results(killed, "m") == results(tmp_path / "whole", "m")
    assert {path.name for path in killed.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_scores_of_other_texts_or_scorers_are_not_taken_over(tmp_path, capsys):
    rows = [{"id": str(i), "prompt": f"p{i}", "response": "r", "finished": True} for i in range(20)]
    saved, scorer = tmp_path / "m_scores.jsonl", Counting()
    add_scores([dict(row) for row in rows], scorer, 1, saved)
    add_scores(again := [dict(row) for row in rows], scorer, 1, saved)
    assert scorer.asked == 20 and {row["reward"] for row in again} == {1.0}
    rows[3]["response"] = "another"
    add_scores([dict(row) for row in rows], scorer, 1, saved)
    assert scorer.asked == 40 and "all rows are scored anew" in capsys.readouterr().out
    scorer.name = "another"
    add_scores([dict(row) for row in rows], scorer, 1, saved)
    assert scorer.asked == 60
    with pytest.raises(UserError, match="20 of 20 rows have no score"):
        add_scores([dict(row) for row in rows], Counting({"r", "another"}), 1, saved)
    assert not saved.exists()  # nothing of a failed scorer is kept


def test_an_old_summary_never_stands_beside_new_files(tmp_path, scorer_flags, monkeypatch):
    write_jsonl(tmp_path / "given.jsonl", [{"prompt": "p", "response": "r"}])
    flags = ["--responses_from", str(tmp_path / "given.jsonl"), "--output_dir", str(tmp_path), *scorer_flags]
    script.main(flags)
    assert (tmp_path / "given_summary.json").exists()
    monkeypatch.setattr(script, "write_jsonl", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main(flags)
    assert (tmp_path / "given_Rs.npy").exists() and not (tmp_path / "given_summary.json").exists()


def test_two_models_of_one_name_do_not_share_files(tmp_path, scorer_flags):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": "p", "response": name}])
    flags = ["--output_dir", str(tmp_path), *scorer_flags, "--model_name"]
    script.main(["--responses_from", str(tmp_path / "a.jsonl"), *flags, "org/model"])
    for name in ("org/model", "org_model"):
        with pytest.raises(
            UserError, match="org_model_summary.json holds the responses in .*a.jsonl; .*another --model_name"
        ):
            script.main(["--responses_from", str(tmp_path / "b.jsonl"), *flags, name])


def test_pickled_arrays_are_refused(tmp_path):
    for ending in ("Rs.npy", "Cs.npy"):
        np.save(tmp_path / f"m_{ending}", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"m_Rs.npy is not a plain .npy array"):
        load_scores(tmp_path, "m")


def test_resume_with_other_settings_is_an_error(tmp_path, tiny_policy, scorer_flags, prompts):
    flags = [
        "--policy_model_path",
        str(tiny_policy),
        "--from_jsonl",
        str(prompts),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    flags += ["--model_name", "m", *scorer_flags]
    script.main([*flags, "--policy_max_new_tokens", "4"])
    before = results(tmp_path / "out", "m")
    with pytest.raises(UserError, match="was generated with max_new_tokens 4, now it is 5"):
        script.main([*flags, "--policy_max_new_tokens", "5"])
    with pytest.raises(UserError, match="was generated with prompts"):
        script.main([*flags, "--policy_max_new_tokens", "4", "--num_samples", "10"])
    assert results(tmp_path / "out", "m") == before
    with pytest.raises(UserError, match="holds the answers of .*give another --model_name"):
        script.main(
            ["--from_jsonl", str(prompts), "--output_dir", str(tmp_path / "out"), "--model_name", "m", *scorer_flags]
        )


def test_given_responses_keep_rows_and_order(tmp_path, scorer_flags):
    source = tmp_path / "given.jsonl"
    rows = [
        {"prompt": f"p {text[:20]}", "response": text, "finished": index % 2 == 0} for index, text in enumerate(STRANGE)
    ]
    write_jsonl(source, rows)
    script.main(["--responses_from", str(source), "--output_dir", str(tmp_path / "out"), *scorer_flags])
    points = read_points(tmp_path / "out" / "given_points.jsonl")
    assert [row["response"] for row in points] == STRANGE
    assert [row["prompt"] for row in points] == [f"p {text[:20]}" for text in STRANGE]
    assert [row["truncated"] for row in points] == [len(text) > 600 for text in STRANGE]
    assert all(np.isfinite(row["reward"]) for row in points)
    assert (tmp_path / "out" / "given_points.jsonl").read_bytes().count(b"\n") == len(STRANGE)

    # a points file scored again, ids and all, gives the same scores
    again = ["--responses_from", str(tmp_path / "out" / "given_points.jsonl"), "--model_name", "again"]
    script.main([*again, "--output_dir", str(tmp_path / "out"), *scorer_flags])
    second = read_points(tmp_path / "out" / "again_points.jsonl")
    assert [(row["id"], row["reward"], row["cost"]) for row in second] == [
        (r["id"], r["reward"], r["cost"]) for r in points
    ]
    assert load_scores(tmp_path / "out", "again").rewards.tolist() == [row["reward"] for row in points]


def first_published_rows(goldens, folder, name, count):
    with open(goldens / "quadrants" / f"{name}_points.jsonl", "rb") as file:
        (folder / f"{name}_points.jsonl").write_bytes(b"".join(next(file) for _ in range(count)))
    return folder / f"{name}_points.jsonl"


def test_published_points_are_accepted(goldens, tmp_path, scorer_flags):
    source = first_published_rows(goldens, tmp_path, "Alpaca-7B", 20)
    script.main(["--responses_from", str(source), "--output_dir", str(tmp_path / "out"), *scorer_flags])
    published, ours = read_points(source), read_points(tmp_path / "out" / "Alpaca-7B_points.jsonl")
    assert [(row["id"], row["response"]) for row in ours] == [(row["id"], row["response"]) for row in published]


@pytest.mark.slow
def test_stored_generations_are_scored_summarised_and_compared(goldens, tmp_path):
    """Measured on all 3,036 rows of both models: 51 s of wall time, one of two cores busy."""
    models = [f"--{kind}_model={goldens / 'score_model' / kind}" for kind in ("reward", "cost")]
    for name in ("Alpaca-7B", "Beaver-V1"):
        source = first_published_rows(goldens, tmp_path, name, 300)
        script.main(
            ["--responses_from", str(source), "--output_dir", str(tmp_path / "out"), "--device", "cpu", *models]
        )
    compare_models.main(["Alpaca-7B", "Beaver-V1", "--data-dir", str(tmp_path / "out")])
    (comparison,) = read_json(tmp_path / "out" / "comparison.json")["comparisons"]
    assert comparison["rows"] == {"paired": 300, "scored": 300, "a": 300, "b": 300}
    # the first published row's scores by goldens/score_model's tiny models do not depend on the other 299
    head = tmp_path / "head.jsonl"
    write_jsonl(head, read_points(tmp_path / "out" / "Alpaca-7B_points.jsonl")[:1])
    script.main(["--responses_from", str(head), "--output_dir", str(tmp_path / "out"), "--device", "cpu", *models])
    one, many = (load_scores(tmp_path / "out", name) for name in ("head", "Alpaca-7B"))
    assert (one.rewards[0], one.costs[0]) == (many.rewards[0], many.costs[0])


def test_ids_of_given_answers_are_made_from_their_prompts(tmp_path, monkeypatch):
    write_jsonl(
        tmp_path / "given.jsonl", [{"prompt": p, "response": "r", "id": i} for p, i in (("a", "1"), ("b", "1"))]
    )
    monkeypatch.setattr(script, "open_scorer", lambda config: Scorer(()))
    script.main(["--responses_from", str(tmp_path / "given.jsonl"), "--output_dir", str(tmp_path)])
    assert [row["id"] for row in read_jsonl(tmp_path / "given_points.jsonl")] == prompt_ids(["a", "b"])


def test_repeated_prompts_once(tmp_path, scorer_flags):
    source = tmp_path / "given.jsonl"
    write_jsonl(source, [{"prompt": p, "response": r} for p, r in (("a", "1"), ("b", "2"), ("a", "3"))])
    flags = ["--responses_from", str(source), "--output_dir", str(tmp_path), "--repeated_prompts", "once"]
    script.main([*flags, *scorer_flags])
    assert [row["response"] for row in read_points(tmp_path / "given_points.jsonl")] == ["1", "2"]


def test_without_policy_the_data_own_responses_are_scored(tmp_path, scorer_flags):
    source = tmp_path / "data.jsonl"
    safe = {"response_0_harm_category": {"Drugs": False}, "response_1_harm_category": {"Drugs": True}}
    write_jsonl(source, [{"prompt": "a", "response_0": "zero", "response_1": ""} | safe])
    script.main(["--from_jsonl", str(source), "--output_dir", str(tmp_path), *scorer_flags])
    points = read_points(tmp_path / "dataset_points.jsonl")
    assert [row["response"] for row in points] == ["zero", ""]  # an empty response is scored as such
    assert [row["id"][-3:] for row in points] == ["-r0", "-r1"]
    assert [row["categories"] for row in points] == [[], ["Drugs"]]
    again = ["--responses_from", str(tmp_path / "dataset_points.jsonl"), "--model_name", "again"]
    script.main([*again, "--output_dir", str(tmp_path), *scorer_flags])
    assert [row["id"] for row in read_points(tmp_path / "again_points.jsonl")] == [row["id"] for row in points]
    write_jsonl(source, [{"prompt": "a"}])
    with pytest.raises(UserError, match="has no 'response_0'; give --policy_model_path"):
        script.main(["--from_jsonl", str(source), "--output_dir", str(tmp_path), *scorer_flags])


class Scorer:
    """Scores of 1 and -1, none for the texts that `missing` names."""

    def __init__(self, missing):
        self.missing = missing

    def identity(self):
        return {"reward_model": {"name": "r"}, "cost_model": {"name": "c"}}

    def score(self, prompts, responses, finished):
        gone = np.array([text in self.missing for text in responses])
        errors = ["reward is nan" if one else None for one in gone]
        values = np.where(gone, np.nan, 1.0)
        return Scores(values, -np.ones(len(gone)), errors, [False] * len(gone))


class Counting(Scorer):
    """Counts the texts that it was asked for."""

    def __init__(self, missing=()):
        super().__init__(missing)
        self.asked, self.name = 0, "r"

    def identity(self):
        return {"reward_model": {"name": self.name}}

    def score(self, prompts, responses, finished):
        self.asked += len(prompts)
        return super().score(prompts, responses, finished)


@pytest.mark.parametrize("missing", [1, 6])
def test_missing_scores_are_null_and_too_many_are_an_error(tmp_path, monkeypatch, missing):
    source = tmp_path / "given.jsonl"
    write_jsonl(source, [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(100)])
    monkeypatch.setattr(script, "open_scorer", lambda config: Scorer({f"r{i}" for i in range(missing)}))
    flags = ["--responses_from", str(source), "--output_dir", str(tmp_path), "--model_name", "m"]
    if missing > 5:
        with pytest.raises(UserError, match=r"6 of 100 rows have no score.*reward is nan"):
            script.main(flags)
        assert not (tmp_path / "m_summary.json").exists()
        return
    script.main(flags)
    row = read_points(tmp_path / "m_points.jsonl")[0]
    assert row["reward"] is row["cost"] is row["label"] is None and row["error"] == "reward is nan"
    summary = read_json(tmp_path / "m_summary.json")
    assert (summary["missing_scores"], summary["num_points"], summary["counts"]["SH"]) == (1, 99, 99)
    assert np.isnan(np.load(tmp_path / "m_Rs.npy")[0]) and np.load(tmp_path / "m_labels.npy")[0] == ""


def test_sweep_entry_over_defaults_and_flags_over_it(tmp_path):
    sweeps = tmp_path / "sweeps.yaml"
    sweeps.write_text(
        "defaults: {num_samples: 7, bf16: true, seed: 1}\n"
        "sweeps:\n- {model_name: A, seed: 2}\n- {model_name: B, policy_model_path: x, base_model_path: null}\n"
    )
    read = lambda *flags: load_settings(["--sweep_config", str(sweeps), *flags])  # noqa: E731
    config = read("--sweep", "A", "--num_samples", "9")
    assert (config.name, config.num_samples, config.bf16, config.seed) == ("A", 9, True, 2)
    assert (read("--sweep", "1").name, read("--sweep", "1").seed) == ("B", 1)
    with pytest.raises(UserError, match="has no sweep C; it has 0 A, 1 B"):
        read("--sweep", "C")
    sweeps.write_text("sweeps:\n- {model_name: A, num_sample: 3}\n")
    with pytest.raises(UserError, match=r"sweep 0 \(A\): unknown key 'num_sample'; did you mean 'num_samples'"):
        read("--sweep", "0")
    sweeps.write_text("sweeps:\n- {model_name: A, num_samples: many}\n")
    with pytest.raises(UserError, match=r"sweeps.yaml, sweep A: .*num_samples"):
        read("--sweep", "A")
    sweeps.write_text("sweeps:\n- {model_name: a/b}\n- {model_name: a_b}\n")
    with pytest.raises(UserError, match="the sweeps a/b and a_b write the same files"):
        read("--sweep", "0")
    sweeps.write_text("sweeps:\n- {model_name: A, output_dir: x}\n- {model_name: A, output_dir: y}\n")
    assert read("--sweep", "1").output_dir == "y"


def test_the_sweep_file_and_its_script_fit_together(tmp_path):
    for name in ("Alpaca-7B", "Beaver-V1", "ES-500"):
        assert load_settings(["--sweep", name]).num_samples == 3036
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    job = "alignment/evaluation/classify_reward_cost_unified.sh"
    if shellcheck:
        subprocess.run([shellcheck, job], check=True)
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "SLURM_ARRAY_TASK_ID": "2", "CONFIG_FILE": "my.yaml"}
    done = subprocess.run(["bash", job, "--bf16"], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip().endswith("classify_reward_cost_unified.py --sweep 2 --sweep_config my.yaml --bf16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from_jsonl", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--policy_model_path", "a", "--responses_from", "b"], "give one"),
        (["--policy_use_vllm"], "--policy_use_vllm needs --policy_model_path"),
        (["--policy_vllm_ckpt", "a.pth"], "--policy_vllm_ckpt needs --policy_model_path"),
        (["--policy_model_path", "a", "--journal", "b"], "expected FILE@ITER"),
        (["--policy_model_path", "a", "--journal", "b@3", "--policy_vllm_ckpt", "c"], "give one"),
        (["--polcy_model_path", "a"], "policy_model_path"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(flags, message):
    with pytest.raises(UserError, match=message):
        script.main(flags)


def test_texts_that_no_tokenizer_can_read_are_named(tmp_path, scorer_flags):
    source = tmp_path / "given.jsonl"
    for row in (
        {"prompt": "ok", "response": "a\udfff"},
        {"prompt": "\ud800", "response": "b"},
        {"prompt": "x", "response": 1},
        {"prompt": None, "response": "y"},
        {"response": "no prompt"},
    ):
        write_jsonl(source, [row])
        with pytest.raises(UserError, match=r"given.jsonl:.*(half of a character|must be text|'prompt' is missing)"):
            script.main(["--responses_from", str(source), "--output_dir", str(tmp_path), *scorer_flags])


def test_local_data_set(tmp_path, tiny_policy, scorer_flags):
    pytest.importorskip("datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "test.jsonl", [{"prompt": f"question {i}"} for i in range(10)])
    flags = ["--dataset_name", str(folder), "--num_samples", "4", "--policy_model_path", str(tiny_policy)]
    flags += ["--policy_max_new_tokens", "2", "--output_dir", str(tmp_path), "--model_name", "m"]
    script.main([*flags, *scorer_flags])
    drawn = np.random.default_rng(42).choice(10, size=4, replace=False)  # the published draw
    points = json.loads(json.dumps(read_points(tmp_path / "m_points.jsonl")))
    assert [row["prompt"] for row in points] == [f"question {i}" for i in drawn]
    with pytest.raises(UserError, match="split 'train'.*test"):
        script.main([*flags, "--split", "train", "--model_name", "n", *scorer_flags])


def test_a_scorer_is_looked_for_before_answers_are_generated(tmp_path, tiny_policy, prompts, monkeypatch, capsys):
    flags = ["--policy_model_path", str(tiny_policy), "--from_jsonl", str(prompts), "--output_dir", str(tmp_path)]
    flags += ["--model_name", "m", "--device", "cpu", "--policy_max_new_tokens", "2", "--scorer_url"]
    with FakeScorer() as scorer:
        scorer.token = "another"
        with pytest.raises(UserError, match="wants its token"):
            script.main([*flags, scorer.url])
    assert not (tmp_path / "m_generations.jsonl").exists()

    # One that is not there may come later: it is told of, and the answers are kept.
    monkeypatch.setattr(script, "FIRST_LOOK", 0.0)
    monkeypatch.setattr(script, "open_scorer", lambda config: Scorer(()))
    script.main([*flags, scorer.url])
    assert "warning: scorer " in (told := capsys.readouterr().err) and "15 minutes" in told
    assert (tmp_path / "m_summary.json").exists()


def test_a_score_model_that_is_not_there_is_told_before_answers_are_generated(tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    flags = ["--policy_model_path", str(tmp_path / "no_policy"), "--from_jsonl", str(tmp_path / "prompts.jsonl")]
    with pytest.raises(UserError, match="no_reward"):
        script.main([*flags, "--reward_model", str(tmp_path / "no_reward"), "--output_dir", str(tmp_path)])
