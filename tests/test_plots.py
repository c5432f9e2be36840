"""What the figures show: artists, values and limits, never pixels."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb

from alignment.errors import UserError
from alignment.evaluation.points import ModelScores, load_scores
from alignment.records import save_npy, write_json, write_jsonl
from alignment.visualization import plot_pareto, plot_reward_cost_grid, plot_safety_ratios, plot_training_curves
from alignment.visualization.plot_gpt_elo_figure import draw_ratings
from alignment.visualization.plot_reward_cost_grid import common_limits, density, draw_grid
from alignment.visualization.plot_safety_ratios import draw_ratios
from alignment.visualization.plot_training_curves import draw_curves, load_runs
from alignment.visualization.style import (
    FAMILIES,
    MAX_NAME,
    MODEL_COLOURS,
    OTHER_COLOURS,
    model_colours,
    new_figure,
    paper_style,
    save_figure,
    short_name,
)
from alignment.visualization.training_runs import positions, seed_line

PUBLISHED = ["Alpaca-7B", "Beaver-V1", "Beaver-V2", "Beaver-V3", "ES-100", "ES-500"]


def scores(name, rewards, costs):
    return ModelScores(name, np.asarray(rewards, float), np.asarray(costs, float), np.arange(len(rewards)))


def points_drawn(panel):
    """Offsets of all scattered points, (N, 2), those within the limits first, then the marks at the border."""
    return [np.asarray(one.get_offsets()) for one in panel.collections if isinstance(one, PathCollection)]


def texts(panel):
    return [text.get_text() for text in panel.texts]


def test_grid_of_the_published_models_draws_every_point_on_common_axes(goldens):
    models = [load_scores(goldens / "quadrants", name) for name in PUBLISHED]
    figure = draw_grid(models)
    assert len(figure.axes) == 6
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in figure.axes}) == 1
    for panel, model in zip(figure.axes, models, strict=True):
        (drawn,) = points_drawn(panel)  # nothing lies beyond, so there are no marks
        expected = np.column_stack([model.costs, model.rewards])
        np.testing.assert_array_equal(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)])
        published = json.loads((goldens / "quadrants" / f"{model.name}_summary.json").read_text())
        for label, name in plot_reward_cost_grid.QUADRANT_NAMES.items():
            assert f"{name}\n{published['percents'][label]:.1f} %" in texts(panel)
        assert f"n = 3,036, safe {published['safe_ratio']:.1f} %" in texts(panel)
        (mean,) = [line.get_xydata()[0] for line in panel.lines if line.get_marker() == "D"]
        np.testing.assert_allclose(mean, [published["C_mean"], published["R_mean"]], rtol=1e-5)


def test_points_beyond_a_limit_are_marked_and_counted():
    model = scores("m", rewards=[0.5, 9.0, -9.0, 0.1, 0.2, 7.0], costs=[0.5, 0.0, 0.5, -30.0, -40.0, 50.0])
    panel = draw_grid([model], xlim=(-2, 2), ylim=(-3, 3)).axes[0]
    inside, *marks = points_drawn(panel)
    assert inside.tolist() == [[0.5, 0.5]]
    assert sum(len(one) for one in marks) == 5
    for one in marks:
        assert (np.isin(one[:, 0], [-2, 2]) | np.isin(one[:, 1], [-3, 3])).all()  # at the border
    assert sorted(text for text in texts(panel) if "beyond" in text) == ["1 beyond", "1 beyond", "1 beyond", "2 beyond"]


def test_an_outlier_does_not_press_the_rest_into_a_corner():
    rng = np.random.default_rng(0)
    costs = np.append(rng.normal(size=2000), 500.0)
    low, high = common_limits([costs])
    assert -10 < low < high < 10
    panel = draw_grid([scores("m", rng.normal(size=2001), costs)]).axes[0]
    assert "1 beyond" in texts(panel)
    assert sum(map(len, points_drawn(panel))) == 2001


def test_a_hundred_thousand_points_are_all_drawn(tmp_path):
    rng = np.random.default_rng(3)
    model = scores("m", rng.normal(size=100_000), rng.normal(size=100_000))
    figure = draw_grid([model])
    assert sum(map(len, points_drawn(figure.axes[0]))) == 100_000
    save_figure(figure, tmp_path / "grid.pdf")
    assert (tmp_path / "grid.pdf").stat().st_size < 3e6  # points are a picture in it, texts are texts


def test_no_point_lies_under_a_label():
    panel = draw_grid([scores("m", [1.0, -1.0], [1.0, -1.0])]).axes[0]
    points = [one for one in panel.collections if isinstance(one, PathCollection)]
    labels = [text for text in panel.texts if "\n" in text.get_text()]
    assert len(labels) == 4 and all(label.get_zorder() < points[0].get_zorder() for label in labels)


def test_missing_and_infinite_scores_are_counted_and_one_point_is_a_picture():
    panel = draw_grid([scores("m", [1.0, np.nan, 2.0, np.inf], [-1.0, 1.0, np.nan, 1.0])]).axes[0]
    assert "n = 1, safe 100.0 %, 3 without score" in texts(panel)
    assert points_drawn(panel)[0].tolist() == [[-1.0, 1.0]]
    one = draw_grid([scores("m", [1.0], [-1.0])]).axes[0]
    assert points_drawn(one)[0].tolist() == [[-1.0, 1.0]]
    assert not [line for line in one.lines if line.get_marker() == "D"]  # the mean's mark would hide it
    nothing = draw_grid([scores("m", [np.nan], [np.nan])]).axes[0]
    assert "n = 0, 1 without score" in texts(nothing) and not points_drawn(nothing)
    for limits in (common_limits([np.array([np.nan])]), common_limits([np.array([0.0])])):
        assert limits[0] < 0 < limits[1]


def test_density_is_highest_where_points_lie_thickest():
    rng = np.random.default_rng(1)
    x, y = np.append(rng.normal(size=3000), 4.5), np.append(rng.normal(size=3000), 4.5)
    shade = density(x, y, (-5, 5), (-5, 5))
    assert shade.min() >= 0 and shade.max() <= 1
    assert np.hypot(x, y)[shade > 0.95].max() < 1.5 and shade[-1] < 0.3
    assert not density(x[:50], y[:50], (-5, 5), (-5, 5)).any()


def test_ratios_of_the_published_models(goldens):
    names = ["Alpaca-7B", "Beaver-V1", "ES-500"]
    models = [load_scores(goldens / "quadrants", name) for name in names]
    panel = draw_ratios(models).axes[0]
    published = [json.loads((goldens / "quadrants" / f"{name}_summary.json").read_text()) for name in names]
    expected = [value for one in published for value in (one["safe_ratio"], one["percents"]["SH"])]
    np.testing.assert_allclose([bar.get_width() for bar in panel.patches], expected)
    assert texts(panel) == [f"{value:.1f}" for value in expected]
    assert [label.get_text() for label in panel.get_yticklabels()] == names
    assert panel.get_ylim()[0] > panel.get_ylim()[1]  # the first model on top
    whiskers = [
        np.diff([point[0] for point in segments])[0] for one in panel.collections for (segments) in one.get_segments()
    ]
    assert len(whiskers) == 6 and all(0 < width < 6 for width in whiskers)


def test_ratios_of_few_prompts_have_no_whiskers():
    few = draw_ratios([scores("few", [1.0] * 9, [-1.0, 1.0, 1.0] * 3)]).axes[0]
    assert not few.collections and "none where prompts are too few" in few.get_xlabel()
    assert texts(few) == ["33.3", "33.3"]
    enough = draw_ratios([scores("enough", [1.0] * 12, [-1.0, 1.0, 1.0] * 4)]).axes[0]
    assert len(enough.collections) == 2 and "too few" not in enough.get_xlabel()


def test_models_that_were_scored_differently_are_in_no_figure(tmp_path, capsys):
    for name, length in (("A", 576), ("B", 512)):
        for ending in ("Rs.npy", "Cs.npy"):
            save_npy(tmp_path / f"{name}_{ending}", np.ones(12, np.float32))
        write_json(tmp_path / f"{name}_summary.json", {"scorer": {"max_length": length}})
    for module in (plot_reward_cost_grid, plot_safety_ratios, plot_pareto):
        flags = ["--data-dir", str(tmp_path), "--output", str(tmp_path / "figure.png")]
        with pytest.raises(
            UserError, match=r"A_points.jsonl and .*B_points.jsonl were scored differently: max_length was 576"
        ):
            module.main(flags)
        module.main([*flags, "--models", "A"])
    for name, length in (("es", 576), ("grpo", 512)):
        write_run(tmp_path / name)
        scorer = {"scorer": {"max_length": length}}
        write_json(tmp_path / name / "manifest.json", scorer if name == "es" else {"deciding": scorer})
    flags = ["--output", str(tmp_path / "curves.png"), "--runs", str(tmp_path / "es")]
    plot_training_curves.main(flags)
    with pytest.raises(
        UserError, match="es and .*grpo were scored differently and do not compare: max_length was 576, is 512"
    ):
        plot_training_curves.main([*flags, str(tmp_path / "grpo")])
    with pytest.raises(UserError, match="A_points.jsonl and .*grpo were scored differently"):
        plot_pareto.main(["--data-dir", str(tmp_path), "--models", "A", "--runs", str(tmp_path / "grpo"), *flags[:2]])


def test_ratios_without_any_score():
    assert texts(draw_ratios([scores("m", [np.nan], [np.nan])]).axes[0]) == ["no scored answers"]


def test_ratings_beyond_the_limits_are_marked_and_named(capsys):
    """Of the model at 1000 there was a bar at the border and a line that came from nowhere."""
    ratings = {
        "helpfulness": {"base": 1000.0, "A": 1200.0, "B": 1300.0, "far": 1250.0},
        "harmlessness": {"base": 1000.0, "A": 1200.0, "B": 1300.0, "far": 1800.0},
    }
    spread = {name: {model: (one - 250, one + 250) for model, one in part.items()} for name, part in ratings.items()}
    named = {"base": "Base policy"}
    figure = draw_ratings(
        ratings, spread, baseline="base", order=["base", "A", "B"], names=named, xlim=(1100, 1400), ylim=(1100, 1400)
    )
    panel = figure.axes[0]
    assert panel.get_xlabel() == "Harmlessness (rating, Base policy = 1000)"
    assert capsys.readouterr().err == "beyond the limits, drawn at the border: Base policy, far\n"
    assert {"A", "B", "Base policy\n(1000, 1000)", "far\n(1800, 1250)"} == set(texts(panel))
    borders = {line.get_marker(): line.get_xydata().tolist() for line in panel.lines if line.get_marker() in ("<", ">")}
    assert borders == {"<": [[1100, 1100]], ">": [[1400, 1250]]}
    assert [line.get_xydata().tolist() for line in panel.lines if line.get_color() == "#444444"] == [
        [[1200, 1200], [1300, 1300]]
    ]
    bars = [segment for one in panel.collections for segment in one.get_segments()]
    assert len(bars) == 4  # those of A and B
    whole = draw_ratings(ratings, spread, order=["base", "A", "B"], xlim=(900, 1900)).axes[0]
    assert len([line for line in whole.lines if line.get_color() == "#444444"]) == 2 and not capsys.readouterr().err


def write_run(folder, steps=5):
    rows = []
    for step in range(steps):
        values = {"reward_mean": step, "cost_mean": 2.0 - step, "objective": 2.0 * step, "safe_ratio": 20.0 * step}
        if step % 2 == 0:
            bounds = {
                f"{key}_{side}": value + sign
                for key, value in values.items()
                for side, sign in (("low", -1), ("high", 1))
            }
            rows.append({"kind": "eval", "iteration": step, **values, **bounds, "lambda": 1.0})
        rows.append({"kind": "train", "iteration": step, **values, "lambda": 1.0 + step})
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def test_curves(tmp_path):
    runs = load_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two" / "one")])
    assert [run.name for run in runs] == [
        str(tmp_path / "one"),
        str(tmp_path / "two" / "one"),
    ]  # one name would mean two
    figure = draw_curves(runs[:1])
    panels = dict(zip(plot_training_curves.PANELS, figure.axes, strict=False))
    train, held_out = panels["reward_mean"].lines
    assert train.get_xydata().tolist() == [[step, step] for step in range(5)]
    assert held_out.get_xydata().tolist() == [[0, 0], [2, 2], [4, 4]]
    (intervals,) = panels["reward_mean"].collections
    assert [segment[:, 1].tolist() for segment in intervals.get_segments()] == [[-1, 1], [1, 3], [3, 5]]
    assert panels["lambda"].lines[0].get_ydata().tolist() == [1, 2, 3, 4, 5] and len(panels["lambda"].lines) == 1
    assert panels["cost_mean"].get_ylim()[0] < 0 < panels["cost_mean"].get_ylim()[1]
    figure.savefig(tmp_path / "drawn.png")


def test_curves_over_scored_samples_and_time(tmp_path):
    es, grpo = write_run(tmp_path / "es"), write_run(tmp_path / "grpo", steps=3)
    (es / "config.yaml").write_text("population_size: 9\nbatch_size: 4\n")
    (grpo / "config.yaml").write_text("num_generations: 5\nprompts_per_step: 2\n")
    runs = load_runs([es, grpo], ["ES", "GRPO"])
    panel = draw_curves(runs, "samples").axes[0]
    es_train, es_eval, grpo_train, grpo_eval = (line.get_xdata().tolist() for line in panel.lines)
    assert es_train == [0, 40, 80, 120, 160]  # nine members and theta itself, four prompts
    assert es_eval == [0, 80, 160]
    assert grpo_train == [0, 10, 20] and grpo_eval == [0, 20]
    with pytest.raises(UserError, match="no number as seconds.total; choose another --x"):
        draw_curves(runs, "time")
    rows = [{"kind": "train", "iteration": t, "reward_mean": 0.0, "seconds": {"total": 1800.0}} for t in range(3)]
    write_jsonl(es / "metrics.jsonl", [*rows, {"kind": "eval", "iteration": 3, "reward_mean": 1.0}])
    (run,) = load_runs([es])
    assert positions(run, run.train, "time").tolist() == [0, 0.5, 1.0]
    assert positions(run, run.eval, "time").tolist() == [1.5]  # after the last step
    (grpo / "config.yaml").write_text("other: 1\n")
    with pytest.raises(UserError, match="config.yaml: neither population_size and batch_size nor num_generations"):
        draw_curves(load_runs([grpo]), "samples")


def test_runs_of_one_label_are_a_band(tmp_path):
    for seed, last in ((0, 4), (1, 3)):
        rows = [{"kind": "eval", "iteration": t, "reward_mean": t + 2.0 * seed} for t in range(last)]
        rows += [{"kind": "train", "iteration": t, "reward_mean": 0.0, "lambda": 1.0 + seed} for t in range(last)]
        write_jsonl(tmp_path / f"s{seed}" / "metrics.jsonl", rows)
    runs = load_runs([tmp_path / "s0", tmp_path / "s1"], ["ES", "ES"])
    line = seed_line(runs, "eval", "reward_mean", "iteration")
    assert line.x.tolist() == [0, 1, 2]  # as far as both have come
    assert (line.mean.tolist(), line.low.tolist(), line.high.tolist()) == ([1, 2, 3], [0, 1, 2], [2, 3, 4])
    figure = draw_curves(runs)
    panels = dict(zip(plot_training_curves.PANELS, figure.axes, strict=False))
    assert panels["reward_mean"].lines[-1].get_ydata().tolist() == [1, 2, 3]
    (band,) = panels["reward_mean"].collections
    assert band.get_datalim(panels["reward_mean"].transData).bounds == (0, 0, 2, 4)
    assert panels["lambda"].lines[0].get_ydata().tolist() == [1.5, 1.5, 1.5] and len(panels["lambda"].collections) == 1
    assert "ES, 2 runs" in [text.get_text() for text in figure.axes[5].get_legend().get_texts()]
    with pytest.raises(UserError, match="--labels: expected one for each of the 2 runs, got 1"):
        load_runs([tmp_path / "s0", tmp_path / "s1"], ["ES"])


def test_many_runs_have_a_legend_that_fits(tmp_path):
    runs = load_runs([write_run(tmp_path / f"a_long_name_of_a_run_{number}", 2) for number in range(24)])
    figure = draw_curves(runs)
    figure.draw_without_rendering()
    extent = figure.axes[5].get_legend().get_window_extent()
    assert extent.y0 >= 0 and extent.y1 <= figure.bbox.y1


def test_curves_of_a_run_with_gaps_and_of_none(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"kind": "train", "iteration": 0, "reward_mean": None}])
    draw_curves(load_runs([tmp_path]))
    write_jsonl(tmp_path / "metrics.jsonl", [{"kind": "start"}])
    with pytest.raises(UserError, match="no rows of the kind train or eval yet"):
        load_runs([tmp_path])
    with pytest.raises(UserError, match="cannot read .*metrics.jsonl"):
        load_runs([tmp_path / "nothing" / "metrics.jsonl"])


def test_one_colour_a_model_everywhere():
    few, many = model_colours(["ES-500", "other"]), model_colours(["mine", "Beaver-V1", "other", "ES-500", "Alpaca-7B"])
    assert few["ES-500"] == many["ES-500"] and few["other"] == many["other"]  # whatever stands beside it
    assert len(set(many.values())) == 5
    assert len(model_colours([f"m{index}" for index in range(30)])) == 30


def test_the_pipelines_names_keep_their_hue():
    """They had the colours of their hashes: base green in one figure and orange in the next."""
    alone = {name: model_colours([name])[name] for name in ("base", "ES", "GRPO", "GRPO-0.01", "GRPO-0.1", "GRPO-0.3")}
    assert (alone["base"], alone["ES"]) == (MODEL_COLOURS["Alpaca-7B"], MODEL_COLOURS["ES-500"])
    assert all(alone[name] in FAMILIES["grpo"] for name in ("GRPO", "GRPO-0.01", "GRPO-0.1", "GRPO-0.3"))
    together = model_colours(["base", "ES", "GRPO-0.01", "GRPO-0.1", "es", "beta_0.01", "beta_0.1"])
    assert {name: together[name] for name in ("base", "ES", "GRPO-0.01", "GRPO-0.1")} == {
        name: alone[name] for name in ("base", "ES", "GRPO-0.01", "GRPO-0.1")
    }
    assert [together[run] for run in ("es", "beta_0.01", "beta_0.1")] == [
        alone[model] for model in ("ES", "GRPO-0.01", "GRPO-0.1")
    ]
    seven = model_colours(["alpaca-7b", "es1", "es_b", "estimate", "grpo1", "GRPO-0.3", "Alpaca-7B-tuned"])
    assert seven["alpaca-7b"] == MODEL_COLOURS["Alpaca-7B"] and seven["Alpaca-7B-tuned"] in FAMILIES["base|alpaca"]
    assert {seven["es1"], seven["es_b"]} < set(FAMILIES["es"]) and seven["estimate"] in OTHER_COLOURS
    assert len(set(seven.values())) == 7


# How colours look to readers without one kind of cones, in linear RGB (Machado et al. 2009, severity 1).
COLOUR_VISION = {
    "all cones": np.eye(3),
    "no red": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "no green": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "no blue": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}


def cielab(colour, vision):
    rgb = np.array(to_rgb(colour))
    rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    rgb = np.clip(np.array(vision) @ rgb, 0, 1)
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    xyz = to_xyz @ rgb / (0.9505, 1.0, 1.0888)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", COLOUR_VISION)
@pytest.mark.parametrize(
    "names",
    [
        PUBLISHED,
        ["ES", "GRPO"],
        ["base", "ES", "again"],
        ["base", "ES", "GRPO-0.01", "GRPO-0.1"],
        [f"m{number}" for number in range(len(OTHER_COLOURS))],
    ],
)
def test_colours_are_told_apart_with_any_colour_vision(names, vision):
    colours = [cielab(colour, COLOUR_VISION[vision]) for colour in model_colours(names).values()]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 12  # 2.3 is just noticeable side by side


def test_names_are_drawn_as_they_are(tmp_path):
    long = "a/very_long$name" * 6
    assert len(short_name(long)) == MAX_NAME and short_name("x" * MAX_NAME) == "x" * MAX_NAME
    models = [scores(name, [1.0, -1.0], [1.0, -1.0]) for name in ("$x^2$ and $\\frac", "\\alpha_{", long)]
    for number, figure in enumerate((draw_grid(models), draw_ratios(models))):
        save_figure(figure, tmp_path / f"{number}.pdf")
        save_figure(figure, tmp_path / f"{number}.png")


def test_the_same_data_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(2)
    model = scores("m", rng.normal(size=400), rng.normal(size=400))
    for kind in ("png", "pdf"):
        for name in ("a", "b"):
            save_figure(draw_grid([model]), tmp_path / f"{name}.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    with pytest.raises(UserError, match="must end in .png or .pdf"), paper_style():
        save_figure(new_figure(1, 1), tmp_path / "a.svg")


def test_scripts_write_figures_or_say_what_is_missing(tmp_path, capsys):
    for name in ("a", "b"):
        save_npy(tmp_path / f"{name}_Rs.npy", np.array([1.0, -1.0], np.float32))
        save_npy(tmp_path / f"{name}_Cs.npy", np.array([-1.0, 1.0], np.float32))
    for module in (plot_reward_cost_grid, plot_safety_ratios):
        module.main(["--data-dir", str(tmp_path), "--models", "a", "b", "--output", str(tmp_path / "figure.pdf")])
        assert (tmp_path / "figure.pdf").read_bytes().startswith(b"%PDF")
        with pytest.raises(UserError, match="has no c_Rs.npy and no c_points.jsonl; models there: a, b"):
            module.main(["--data-dir", str(tmp_path), "--models", "c", "--output", str(tmp_path / "figure.pdf")])
        module.main(["--data-dir", str(tmp_path), "--models", "a", "c", "--output", str(tmp_path / "figure.pdf")])
        assert f"not drawn, {tmp_path} has no scores of: c" in capsys.readouterr().err
    with open(tmp_path / "p_Rs.npy", "wb") as file:
        np.save(file, np.array([object()]), allow_pickle=True)
    save_npy(tmp_path / "p_Cs.npy", np.zeros(1, np.float32))
    with pytest.raises(UserError, match="p_Rs.npy is not a plain .npy array"):
        load_scores(tmp_path, "p")
    run = write_run(tmp_path / "run")
    script = [sys.executable, "alignment/visualization/plot_training_curves.py"]
    subprocess.run([*script, str(run), "--output", str(tmp_path / "curves.png")], check=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and "name one or more run folders" in done.stderr
