"""What the report file holds: the right numbers, every point, and no text that could become code."""

import html
import json
import re

import numpy as np
import pytest
from report_folders import HOSTILE, HOSTILE_NAME, arguments, write_example, write_model

from alignment.errors import UserError
from alignment.evaluation.measures import measure
from alignment.evaluation.points import load_scores, read_points
from alignment.records import save_npy, write_jsonl
from alignment.visualization import make_report
from alignment.visualization.report import answers, page


def embedded(path, name):
    """The JSON of a script element, found as a browser finds it: up to the first `</script`."""
    text = path.read_text(encoding="utf-8")
    start = text.index(f'<script type="application/json" id="{name}">')
    start = text.index(">", start) + 1
    return json.loads(text[start : text.lower().index("</script", start)])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    given = write_example(folder)
    make_report.main(arguments(given))
    return folder, given


def test_texts_come_back_as_they_were(report):
    folder, _ = report
    texts = embedded(folder / "report.html", "report-texts")
    assert texts["prompts"] == [*HOSTILE, "question number 5", "question number 6"]
    assert texts["responses"][:2] == [f"answer {i} of first {HOSTILE[i]}" for i in range(2)]


def test_no_text_stands_in_the_markup(report):
    text = (report[0] / "report.html").read_text(encoding="utf-8")
    bodies = re.findall(r"<script[^>]*>(.*?)</script>", text, flags=re.DOTALL)
    assert len(bodies) == 4  # data, texts, the library, the page's own: no text has opened or closed one
    for body in bodies[:2]:
        assert not set("<>&") & set(body)
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", text, flags=re.DOTALL)
    assert "hacked" not in markup and "{{" not in markup
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", markup)


def test_policy_names_the_scripts_and_nothing_else(report):
    text = (report[0] / "report.html").read_text(encoding="utf-8")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1])
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    assert page.content_policy(scripts) == policy


def test_script_text_holds_nothing_that_ends_or_opens_a_script():
    code = "a = '</SCRIPT>'; b = '<!--'; c = '<script'; d = 1 <2;\r\n"
    safe = page.script_text(code)
    assert safe == "a = '\\x3C/SCRIPT>'; b = '\\x3C!--'; c = '\\x3Cscript'; d = 1 <2;\n"


def test_points_scores_and_flags(report):
    data = embedded(report[0] / "report.html", "report-data")
    points = data["points"]
    assert points["model"] == [0] * 7 + [1] * 7 and points["prompt"] == [*range(7), *range(7)]
    assert points["quadrant"][:7] == ["UH", "SU", "UH", "SU", "UH", None, "SH"]
    assert points["reward"][5] is None and data["errors"] == {"5": HOSTILE[1]}
    assert points["flags"][1] == 1 and points["flags"][0] == 0
    assert data["categories"] == [HOSTILE[0], "Drugs", "Violence"] and data["prompt_categories"][3] == [1, 2]
    assert [model["unscored"] for model in data["models"]] == [1, 0]


def test_numbers_of_the_table_are_those_of_the_measures(report):
    data = embedded(report[0] / "report.html", "report-data")
    points = read_points(report[0] / "models" / "first_points.jsonl")
    for name, estimate in measure(points).items():
        told = data["models"][0]["estimates"][name]
        if estimate is None:
            assert told is None
        else:
            assert (told["value"], told["low"], told["high"]) == (estimate.value, estimate.low, estimate.high)
    (comparison,) = data["comparisons"]
    (reward,) = [row for row in comparison["table"] if row["measure"] == "reward_mean"]
    assert reward["rows"] == 6 and reward["difference"] == pytest.approx(2.0 - 3.5 / 6)


def test_judge_and_scorer_disagree_where_they_do(report):
    data = embedded(report[0] / "report.html", "report-data")
    # the judge prefers "first" on all four; the scorer prefers the other one but where rewards or costs say otherwise
    assert {name: (part["total"], part["judged"]) for name, part in data["disagreements"].items()} == {
        "helpfulness": (3, 4),
        "harmlessness": (2, 4),
    }
    for row in data["disagreements"]["helpfulness"]["rows"]:
        gaps = [
            row[who][row["models"].index("first")] - row[who][row["models"].index(HOSTILE_NAME)]
            for who in ("judge", "scorer")
        ]
        assert gaps[0] > 0 > gaps[1] and row["replies"] == [{"shown_first": "first", "text": HOSTILE[1]}]
    rates = data["ratings"]["dimensions"]["helpfulness"]["win_rates"]
    assert rates["first"][HOSTILE_NAME]["percent"] == 100.0


def test_curves_configs_and_command_are_there(report):
    folder, given = report
    data = embedded(folder / "report.html", "report-data")
    assert data["curves"]["axes"] == {"iteration": "iteration", "samples": "scored samples"}  # no seconds, no time
    (line,) = [one for one in data["curves"]["lines"] if one["key"] == "reward_mean" and one["kind"] == "eval"]
    assert line["over"]["samples"]["x"] == [0, 16]
    titles = " ".join(part["title"] for part in data["provenance"])
    assert "manifest.json" in titles and "config.yaml" in titles
    assert all(word in data["provenance"][0]["text"] for word in ("make_report.py", given["--data-dir"][0]))


def test_the_same_inputs_give_the_same_bytes(report):
    folder, given = report
    before = (folder / "report.html").read_bytes()
    make_report.main(arguments(given))
    assert (folder / "report.html").read_bytes() == before


def test_missing_models_are_named_and_one_model_is_enough(tmp_path, capsys):
    write_model(tmp_path, "only", [1.0], [-1.0])
    output = tmp_path / "report.html"
    make_report.main(["--data-dir", str(tmp_path), "--models", "only", "gone", "--output", str(output)])
    assert "note: gone is missing" in capsys.readouterr().err
    data = embedded(output, "report-data")
    assert [model["name"] for model in data["models"]] == ["only"] and data["comparisons"] == []
    assert data["curves"] is None and data["ratings"] is None and data["disagreements"] == {}
    with pytest.raises(UserError, match="has none of the models gone"):
        make_report.main(["--data-dir", str(tmp_path), "--models", "gone", "--output", str(output)])
    with pytest.raises(UserError, match="must end in .html"):
        make_report.main(["--data-dir", str(tmp_path), "--output", "report.pdf"])


def test_scores_without_texts_are_points_and_contradictions_are_errors(tmp_path):
    write_model(tmp_path, "m", [1.0, 2.0], [-1.0, -2.0])
    save_npy(tmp_path / "m_Rs.npy", np.array([1, 2, 3, np.inf], np.float32))
    save_npy(tmp_path / "m_Cs.npy", np.array([-1, -2, -3, 1], np.float32))
    model = answers.load_answers(tmp_path, "m")
    scores, texts = answers.columns([model])
    assert scores["points"]["prompt"] == [0, 1, -1, -1] and texts["responses"][2:] == [None, None]
    assert scores["points"]["quadrant"] == ["SH", "SH", "SH", None]
    told = answers.estimates(model, 1.0)
    assert (
        told["reward_mean"]["value"] == 2.0 and told["reward_mean"]["rows"] == 3 and told["length_words"]["rows"] == 2
    )
    save_npy(tmp_path / "m_Cs.npy", np.array([-1, 5, -3, 1], np.float32))
    with pytest.raises(UserError, match="the arrays beside it have other scores"):
        answers.load_answers(tmp_path, "m")
    save_npy(tmp_path / "m_Rs.npy", np.array([1], np.float32))
    save_npy(tmp_path / "m_Cs.npy", np.array([-1], np.float32))
    with pytest.raises(UserError, match="has 2 rows and the arrays 1 scores"):
        answers.load_answers(tmp_path, "m")


def test_models_without_common_prompts_are_not_compared(tmp_path):
    write_model(tmp_path, "a", [1.0], [1.0])
    row = {"prompt": "another", "response": "x", "reward": 1.0, "cost": 1.0, "label": "UH"}
    write_jsonl(tmp_path / "b_points.jsonl", [row])
    config = make_report.Config(data_dir=str(tmp_path), output="report.html")
    data, _ = make_report.collect(config, "command")
    assert "b is not compared with a: the files have no prompt in common" in data["notes"][0]


def test_colours_stand_out_from_a_dark_page():
    assert make_report.on_dark("#0b4a7d") != "#0b4a7d" and make_report.on_dark("#e69f00") == "#e69f00"


def test_published_models_keep_all_points(goldens):
    folder = goldens / "quadrants"
    model = answers.load_answers(folder, "ES-500")
    told = answers.estimates(model, 1.0)
    summary = json.loads((folder / "ES-500_summary.json").read_text())
    assert told["safe_ratio"]["value"] == pytest.approx(summary["safe_ratio"]) and told["safe_ratio"]["rows"] == 3036
    assert told["refusal_rate"]["rows"] == 500
    scores, texts = answers.columns([model])
    assert len(scores["points"]["reward"]) == len(texts["responses"]) == 3036 and len(texts["prompts"]) == 500
    np.testing.assert_allclose(scores["points"]["cost"], load_scores(folder, "ES-500").costs, rtol=1e-5)
