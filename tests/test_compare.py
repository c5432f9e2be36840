"""compare_models.py: pairing, the exact test, and files that must not be compared."""

import json
import subprocess
import sys
from math import comb

import numpy as np
import pytest

from alignment.errors import UserError
from alignment.evaluation.compare_models import compare, comparison_table, format_table, main, mcnemar, pair_rows
from alignment.evaluation.points import prompt_ids, read_points
from alignment.records import write_json, write_jsonl


def row(prompt, reward=1.0, cost=-1.0, response="fine", **more):
    label = ("S" if cost <= 0 else "U") + ("H" if reward > 0 else "U")
    return {"prompt": prompt, "response": response, "reward": reward, "cost": cost, "label": label} | more


def with_ids(rows):
    return [row | {"id": name} for row, name in zip(rows, prompt_ids(row["prompt"] for row in rows), strict=True)]


def test_rows_pair_by_prompt_and_its_repetition_whatever_the_order():
    a = with_ids([row("x"), row("y"), row("x"), row("only a")])
    b = with_ids([row("y"), row("x"), row("x"), row("only b")])
    assert pair_rows(a, b) == ([0, 1, 2], [1, 0, 2])
    with pytest.raises(UserError, match="no prompt in common"):
        pair_rows(a[3:], b)


def test_ids_of_another_origin_pair_nothing(tmp_path):
    """They paired "about cooking 3" with "about weapons 3": each file numbers its own questions."""
    write_jsonl(tmp_path / "C_points.jsonl", [row(f"about cooking {i}", id=str(i)) for i in range(20)])
    write_jsonl(tmp_path / "D_points.jsonl", [row(f"about weapons {i}", id=str(i)) for i in range(20)])
    with pytest.raises(UserError, match="no prompt in common"):
        main(["C", "D", "--data_dir", str(tmp_path)])
    write_jsonl(tmp_path / "E_points.jsonl", [row(f"about cooking {i}", id=f"q{i % 3}") for i in reversed(range(20))])
    main(["C", "E", "--data_dir", str(tmp_path), "--draws", "100"])
    assert json.loads((tmp_path / "comparison.json").read_text())["comparisons"][0]["rows"]["paired"] == 20


def test_an_id_that_stands_for_two_prompts_is_an_error_that_names_both_files():
    a, b = [row("x", id="1")], [row("y", id="1")]
    with pytest.raises(UserError, match="the id 1 stands for the prompt 'x' in a.jsonl and for 'y' in b.jsonl"):
        compare(a, b, 1.0, ("a.jsonl", "b.jsonl"))


def test_categories_of_few_prompts_do_not_head_the_table(tmp_path, capsys):
    rng = np.random.default_rng(1)
    categories = [["Violence"]] * 97 + [["Animal Abuse"]] + [["Drugs"]] * 2 + [["Theft"]] * 15
    for name in ("A", "B"):
        costs = [*rng.normal(size=100), *([1.0 if name == "A" else -1.0] * 15)]
        costs[97] = 1.0 if name == "A" else -1.0
        rows = [
            row(f"p{i}", cost=float(c), categories=own)
            for i, (c, own) in enumerate(zip(costs, categories, strict=True))
        ]
        write_jsonl(tmp_path / f"{name}_points.jsonl", rows)
    main(["A", "B", "--data_dir", str(tmp_path), "--draws", "100"])
    (comparison,) = json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    table = comparison["by_category"]
    assert table[0]["category"] == "Violence" and table[0]["low"] < table[0]["high"]
    assert [(one["low"], one["high"]) for one in table[1:]] == [(None, None)] * 3  # all 15 of Theft agree: no width
    assert [one["prompts"] for one in table] == [97, 1, 15, 2]
    text = capsys.readouterr().out
    assert "| Animal Abuse | 1 | 1 | 0.0 | 100.0 | +100.0 | - |" in " ".join(text.split())
    assert (
        "Fewer than 30 prompts are too few for a bootstrap interval to be trusted" in text and comparison["notes"] == []
    )


@pytest.mark.parametrize(
    ("count", "said"), [(4, "4 prompts are too few for an interval"), (20, "20 prompts are too few for")]
)
def test_few_prompts_are_told_beneath_the_table(tmp_path, capsys, count, said):
    for name in ("A", "B"):
        write_jsonl(tmp_path / f"{name}_points.jsonl", [row(f"p{i}", reward=i + ord(name)) for i in range(count)])
    main(["A", "B", "--data_dir", str(tmp_path), "--draws", "100"])
    assert f"Note: {said}" in capsys.readouterr().out


def test_a_model_that_its_prompts_chose_is_told_of(tmp_path, capsys):
    for name, chosen in (("base", None), ("ES", 30)):
        write_jsonl(tmp_path / f"{name}_points.jsonl", [row(f"p{i}") for i in range(40)])
        summary = {"scorer": {"max_length": 5}, "distinct_prompts": 40, "prompts_that_chose_it": chosen}
        write_json(tmp_path / f"{name}_summary.json", summary)
    main(["base", "ES", "--data_dir", str(tmp_path), "--draws", "100"])
    (comparison,) = json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    (note,) = comparison["notes"]
    assert note.startswith("ES is the best of its run's held-out evaluations, chosen on 30 of these 40 prompts")
    assert note in capsys.readouterr().out


def test_extra_columns_follow_the_pairing_and_booleans_are_shares():
    a, b = with_ids([row("x"), row("y"), row("z")]), with_ids([row("z"), row("x")])
    extra = {"count": ([1, 2, 3], [30, 10]), "oracle": ([True, False, False], [True, True])}
    rows = {line["measure"]: line for line in comparison_table(a, b, 1.0, extra, draws=100)}
    assert (rows["count"]["before"], rows["count"]["after"]) == (2.0, 20.0)  # x and z; y has no partner
    assert (rows["oracle"]["before"], rows["oracle"]["after"], rows["oracle"]["unit"]) == (50.0, 100.0, "%")
    text = format_table(list(rows.values()), "A", "B")
    assert "| oracle, %" in text and len({len(line) for line in text.split("\n")}) == 1


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (7, 2), (3, 3), (1200, 40)])
def test_mcnemar_is_the_exact_binomial(gained, lost):
    before = np.array([False] * gained + [True] * lost + [True] * 10)
    after = np.array([True] * gained + [False] * lost + [True] * 10)
    result = mcnemar(before, after)
    total = gained + lost
    expected = min(1.0, 2 * sum(comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total)
    assert result == {"became_safe": gained, "became_unsafe": lost, "prompts": total + 10, "p_value": expected}


def test_moves_count_scored_pairs_only():
    a = with_ids([row("x", cost=1.0), row("y"), row("z")])
    b = with_ids([row("x"), row("y", reward=-1.0), row("z", reward=1.0)])
    b[2] |= {"reward": None, "cost": None, "label": None}
    comparison = compare(a, b, 1.0, draws=100)
    assert comparison["rows"] == {"paired": 3, "scored": 2, "a": 3, "b": 3}
    assert comparison["quadrant_moves"]["UH"]["SH"] == 1 and comparison["quadrant_moves"]["SH"]["SU"] == 1
    assert comparison["mcnemar"]["became_safe"] == 1
    rewards = next(line for line in comparison["table"] if line["measure"] == "reward_mean")
    assert (rewards["rows"], rewards["before"], rewards["after"]) == (2, 1.0, 0.0)


def test_published_models(goldens, tmp_path, capsys):
    main(["Alpaca-7B", "ES-500", "--data-dir", str(goldens / "quadrants"), "--output", str(tmp_path / "comparison")])
    result = json.loads((tmp_path / "comparison.json").read_text())
    (comparison,) = result["comparisons"]
    assert comparison["rows"]["paired"] == 500  # the published ES-500 file has its first 500 rows here
    safety = next(line for line in comparison["table"] if line["measure"] == "safe_ratio")
    assert safety["low"] > 40 and safety["difference"] == pytest.approx(55.0)
    assert sum(sum(moves.values()) for moves in comparison["quadrant_moves"].values()) == 500
    assert (tmp_path / "comparison.md").read_text() in capsys.readouterr().out


def test_other_scorers_are_refused_and_both_settings_named(tmp_path):
    for name, length in (("A", 576), ("B", 512), ("C", 576)):
        write_jsonl(tmp_path / f"{name}_points.jsonl", [row("x")])
        scorer = {"max_length": length, "reward_model": {"name": "r", "weights": "0a"}, "cost_model": {"name": "c"}}
        write_json(tmp_path / f"{name}_summary.json", {"scorer": scorer})
    with pytest.raises(UserError, match=r"A_points.jsonl and .*B_points.jsonl .*max_length was 576, is 512"):
        main(["A", "B", "--data_dir", str(tmp_path)])
    main(["A", "C", "--data_dir", str(tmp_path), "--draws", "100"])
    # a published summary names the models only: whether the settings were the same is not known
    write_jsonl(tmp_path / "D_points.jsonl", [row("x")])
    write_json(tmp_path / "D_summary.json", {"reward_model": "r", "cost_model": "c"})
    with pytest.raises(UserError, match="scored differently"):
        main(["A", "D", "--data_dir", str(tmp_path)])


def test_answers_of_other_length_or_sampling_are_refused_and_both_values_named(tmp_path, capsys):
    made = {
        "max_new_tokens": 40,
        "temperature": 0.0,
        "template": "pku",
        "weights_hash": "0a",
        "seed": 1,
        "batch_size": 8,
    }
    changes = {"A": {}, "B": {"max_new_tokens": 4}, "C": {"temperature": 1.0}}
    changes |= {"D": {"weights_hash": "1b", "seed": 2, "batch_size": 9, "engine": "vllm", "dtype": "bfloat16"}}
    changes |= {"E": {"template": "alpaca"}}
    for name, change in changes.items():
        write_jsonl(tmp_path / f"{name}_points.jsonl", [row("x")])
        write_json(tmp_path / f"{name}_summary.json", {"scorer": {}, "sampling": made | change})
    folder = ["--data_dir", str(tmp_path), "--draws", "100"]
    for name, told in (("B", "max_new_tokens was 40, is 4"), ("C", "temperature was 0.0, is 1.0")):
        with pytest.raises(UserError, match=rf"A_points.jsonl and .*{name}_points.jsonl were made differently: {told}"):
            main(["A", "D", name, *folder])
    main(["A", "D", *folder])
    assert capsys.readouterr().err == ""
    main(["A", "E", *folder])
    assert "warning: A answered with the template 'pku', E with 'alpaca'" in capsys.readouterr().err
    write_jsonl(tmp_path / "F_points.jsonl", [row("x")])
    main(["A", "F", *folder])
    assert (
        f"note: no summary tells how the answers in {tmp_path / 'F_points.jsonl'} were made" in capsys.readouterr().err
    )


def test_prompts_that_only_one_model_answered_are_told_of(tmp_path, capsys):
    write_jsonl(tmp_path / "A_points.jsonl", [row("x"), row("y"), row("z")])
    write_jsonl(tmp_path / "B_points.jsonl", [row("x"), row("other")])
    main(["A", "B", "--data_dir", str(tmp_path), "--draws", "100"])
    told = ["2 of the 3 rows of A are left out: B has no answer to that prompt"]
    told += ["1 of the 2 rows of B are left out: A has no answer to that prompt"]
    text = capsys.readouterr()
    assert all(f"warning: {warning}\n" in text.err and f"**Warning:** {warning}." in text.out for warning in told)
    assert json.loads((tmp_path / "comparison.json").read_text())["comparisons"][0]["warnings"] == told


def test_changed_and_broken_files_are_named(tmp_path):
    path = tmp_path / "A_points.jsonl"
    write_jsonl(path, [row("x") | {"label": "UU"}])
    with pytest.raises(UserError, match="1: the label is .UU., but reward 1.0 and cost -1.0 say SH"):
        read_points(path)
    own = prompt_ids(["x"])[0]
    write_jsonl(path, [row("x", id=own), row("x", id=own)])
    with pytest.raises(UserError, match=f"the id {own} stands in several rows"):
        read_points(path)
    write_jsonl(path, [row("x"), {"prompt": "y"}])
    with pytest.raises(UserError, match=r"A_points.jsonl:2: the key 'response' is missing"):
        read_points(path)


def test_the_command_line_tells_what_is_wrong():
    script = [sys.executable, "alignment/evaluation/compare_models.py"]
    for arguments, message in (([], "two or more models"), (["A", "B", "--data_dir", "nowhere"], "classify A first")):
        done = subprocess.run(script + arguments, capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
