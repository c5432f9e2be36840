"""The plane of helpfulness and harmlessness: who is on the front, what is drawn of whom, what is left out aloud."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_hex

from alignment.errors import UserError
from alignment.evaluation.points import ModelScores, load_scores
from alignment.records import write_json, write_jsonl
from alignment.visualization import plot_pareto
from alignment.visualization.plot_pareto import (
    Candidate,
    draw_pareto,
    from_models,
    from_ratings,
    from_runs,
    pareto_front,
)
from alignment.visualization.style import MODEL_COLOURS, save_figure
from alignment.visualization.training_runs import load_runs

NAN = float("nan")


def candidate(name, x, y, **more):
    return Candidate(name, (x, x - 0.1, x + 0.1), (y, y - 0.2, y + 0.2), more.pop("label", name), **more)


def marks(panel):
    return {line.get_label(): line for line in panel.lines if line.get_marker() == "o"}


def test_front():
    x, y = np.array([0.0, 1.0, 2.0, 1.0, 0.5, 2.0]), np.array([3.0, 2.0, 1.0, 1.0, 1.5, 1.0])
    assert pareto_front(x, y).tolist() == [True, True, True, False, False, True]  # equal points are both on it
    assert pareto_front(np.array([1.0]), np.array([1.0])).tolist() == [True]


def test_front_of_random_points_is_what_the_definition_says():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (2, 40)).astype(float)
    dominated = [
        any(a >= x[i] and b >= y[i] and (a > x[i] or b > y[i]) for a, b in zip(x, y, strict=True)) for i in range(40)
    ]
    assert pareto_front(x, y).tolist() == [not one for one in dominated]


def test_published_models(goldens):
    models = [load_scores(goldens / "quadrants", name) for name in ("Alpaca-7B", "Beaver-V3", "ES-500")]
    figure = draw_pareto(from_models(models))
    panel = figure.axes[0]
    drawn = marks(panel)
    for model in models:
        summary = json.loads((goldens / "quadrants" / f"{model.name}_summary.json").read_text())
        np.testing.assert_allclose(
            drawn[model.name].get_xydata()[0], [-summary["C_mean"], summary["R_mean"]], rtol=1e-5
        )
        assert drawn[model.name].get_color() == MODEL_COLOURS[model.name]
    filled = {name: to_hex(line.get_markerfacecolor()) != "#ffffff" for name, line in drawn.items()}
    assert filled == {"Alpaca-7B": False, "Beaver-V3": False, "ES-500": True}
    (front,) = [line for line in panel.lines if line.get_label() == "front"]
    assert front.get_drawstyle() == "steps-pre" and len(front.get_xdata()) == 3
    assert len(panel.collections) == 6  # an interval each way
    assert {text.get_text() for text in panel.texts} == {"Alpaca-7B", "Beaver-V3", "ES-500", "E[C] > 0"}


def test_a_run_is_the_path_of_its_evaluations(tmp_path, capsys):
    rows = [
        {
            "kind": "eval",
            "iteration": t,
            "reward_mean": 1.0 * t,
            "cost_mean": 1.0 - t,
            "cost_mean_low": 0.5 - t,
            "cost_mean_high": 2.0 - t,
        }
        for t in (0, 5, 10)
    ]
    write_jsonl(tmp_path / "run" / "metrics.jsonl", rows)
    write_jsonl(tmp_path / "young" / "metrics.jsonl", [{"kind": "train", "iteration": 0, "reward_mean": 0.0}])
    found = from_runs(load_runs([tmp_path / "run", tmp_path / "young"]))
    assert [one.label for one in found] == [None, None, "run, 10"]
    assert found[1].x == (4.0, 3.0, 4.5)  # lower cost is more harmless: the interval turns round
    assert "not drawn, young has no held-out evaluation" in capsys.readouterr().err
    panel = draw_pareto(found).axes[0]
    assert [-1.0, 4.0, 9.0] in [line.get_xdata().tolist() for line in panel.lines]
    assert len(panel.collections) == 3  # the rewards have no intervals


def write_answers(folder, name, prompts, longest):
    rows = [
        {"prompt": p, "response": "r", "reward": 1.0 + i, "cost": -1.0, "label": "SH"} for i, p in enumerate(prompts)
    ]
    write_jsonl(folder / f"{name}_points.jsonl", rows)
    write_json(
        folder / f"{name}_summary.json", {"scorer": {}, "sampling": {"max_new_tokens": longest, "temperature": 0.0}}
    )


def write_evaluated_run(folder, prompts, longest):
    row = {"kind": "eval", "iteration": 5, "reward_mean": 9.0, "cost_mean": -9.0, "reward_mean_low": None}
    write_jsonl(folder / "metrics.jsonl", [row])
    write_jsonl(folder / "eval" / "iteration_00005_points.jsonl", [{"prompt": one} for one in prompts])
    (folder / "config.yaml").write_text(f"max_completion_length: {longest}\n")


def test_models_and_runs_with_other_prompts_or_lengths_have_a_front_each(tmp_path, capsys, monkeypatch):
    """The run's easier prompts put it in front of models that were never asked them."""
    figures = []
    monkeypatch.setattr(plot_pareto, "save_figure", lambda figure, _: figures.append(figure))
    asked = [f"p{i}" for i in range(12)]
    write_answers(tmp_path, "A", asked, 24)
    for prompts, longest, fronts in ((asked, 24, 1), (asked[:11], 24, 2), (asked, 64, 2)):
        write_evaluated_run(tmp_path / "run", prompts, longest)
        plot_pareto.main(["--data-dir", str(tmp_path), "--models", "A", "--runs", str(tmp_path / "run")])
        panel = figures[-1].axes[0]
        assert len([line for line in panel.lines if line.get_label() == "front"]) == fronts
        filled = {name: to_hex(line.get_markerfacecolor()) != "#ffffff" for name, line in marks(panel).items()}
        assert filled == {"A": fronts == 2, "run, 5": True}
        keys = [text.get_text() for text in figures[-1].legends[0].get_texts()]
        assert keys == (["Pareto front"] if fronts == 1 else ["front of A", "front of run"]) + ["behind it"]
        assert ("a front for each group" in capsys.readouterr().err) == (fronts == 2)
    (tmp_path / "run" / "config.yaml").unlink()  # what is not known keeps nobody apart
    plot_pareto.main(["--data-dir", str(tmp_path), "--models", "A", "--runs", str(tmp_path / "run")])
    assert len(figures[-1].legends[0].get_texts()) == 2


def test_few_prompts_are_a_mark_without_intervals():
    few = ModelScores("few", np.arange(9.0), np.arange(9.0), np.arange(9))
    (found,) = from_models([few])
    assert np.isnan([*found.x[1:], *found.y[1:]]).all() and found.y[0] == 4.0
    assert not draw_pareto([found]).axes[0].collections


def test_ratings_with_and_without_details(tmp_path, capsys):
    path = tmp_path / "ratings.json"
    ratings = {"helpfulness": {"a": 1000.0, "b": 1200.0}, "harmlessness": {"a": 1000.0, "b": 1100.0}}
    write_json(path, ratings)
    (a, b) = from_ratings(path)
    assert (b.x[0], b.y[0]) == (1100.0, 1200.0) and np.isnan(b.x[1:]).all()
    dimensions = {
        name: {"ratings": {model: {"rating": one, "low": one - 50, "high": one + 50} for model, one in part.items()}}
        for name, part in ratings.items()
    }
    write_json(
        tmp_path / "ratings_details.json", {"rating": {"method": "elo", "baseline": "A"}, "dimensions": dimensions}
    )
    assert from_ratings(path, ["b"])[0].y == (1200.0, 1150.0, 1250.0)
    with pytest.raises(UserError, match="has no ratings of c; it has a, b"):
        from_ratings(path, ["c"])
    write_json(path, {"helpfulness": 3})
    with pytest.raises(UserError, match="expected 'helpfulness' with a rating for each model"):
        from_ratings(path)


def test_names_labels_and_one_point(tmp_path):
    names = ["$x_{", "a/b\\frac{1}{2}", "x" * 80, "<b>&amp;"]
    several = [candidate(name, 0.01 * number, 0.01 * number) for number, name in enumerate(names)]
    for number, figure in enumerate((draw_pareto(several), draw_pareto([candidate("one", -3.0, 2.0)]))):
        for kind in ("png", "pdf"):
            save_figure(figure, tmp_path / f"{number}.{kind}")
    (label,) = [text for text in figure.axes[0].texts if text.get_text() == "one"]
    assert figure.axes[0].get_window_extent().contains(*label.get_window_extent().min)


def test_the_same_data_give_the_same_bytes(tmp_path):
    some = [candidate("a", 1.0, 2.0), candidate("b", 2.0, 1.0)]
    for kind in ("png", "pdf"):
        for name in ("first", "second"):
            save_figure(draw_pareto(some), tmp_path / f"{name}.{kind}")
        assert (tmp_path / f"first.{kind}").read_bytes() == (tmp_path / f"second.{kind}").read_bytes()


def test_what_cannot_be_drawn_is_named(tmp_path, capsys):
    unscored = ModelScores("m", np.array([NAN, np.inf]), np.array([0.0, 0.0]), np.arange(2))
    assert from_models([unscored]) == []
    assert "not drawn, m has no scored answer" in capsys.readouterr().err
    with pytest.raises(UserError, match="different units"):
        plot_pareto.main(["--ratings", "r.json", "--runs", "run"])
    write_jsonl(tmp_path / "run" / "metrics.jsonl", [{"kind": "train", "iteration": 0}])
    with pytest.raises(UserError, match="nothing to draw"):
        plot_pareto.main(["--runs", str(tmp_path / "run"), "--output", str(tmp_path / "a.png")])
