"""Lambda against the published scripts' own trajectories, ES's and GRPO's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO

from alignment.config import load_config
from alignment.errors import UserError
from alignment.ES.settings import ESSettings
from alignment.GRPO.settings import GRPOSettings, load_settings
from alignment.lagrangian import LagrangeMultiplier


def test_published_trajectories(goldens):
    golden = json.loads((goldens / "lambda" / "lambda.json").read_text())
    compared = 0
    for method in ("es", "grpo"):
        for name, config in golden["configs"].items():
            for sequence, costs in golden["costs"].items():
                wanted = golden[method][name][sequence]
                lam = LagrangeMultiplier.from_settings(SimpleNamespace(**config, lambda_rule="published"))
                rows = [lam.update(np.array(batch)) for batch in costs]
                assert [row["lambda"] for row in rows] == pytest.approx(wanted["lambda"], rel=1e-12, abs=0)
                assert [row["cost_ema"] for row in rows] == pytest.approx(wanted["jc_ema"], rel=1e-6, abs=1e-9)
                if "jc" in wanted:  # the GRPO trajectories do not have it
                    assert [row["cost_violation"] for row in rows] == pytest.approx(wanted["jc"], rel=1e-6, abs=1e-9)
                compared += len(rows)
    assert compared == 2 * len(golden["configs"]) * 3 * golden["T"]


def test_without_adaptation_it_stays():
    lam = LagrangeMultiplier(value=2.0, adapt=False)
    assert lam.update(np.array([100.0]))["lambda"] == 2.0


def test_state_goes_on_where_it_was():
    costs = np.random.default_rng(0).normal(1, 2, (20, 8))
    whole, first = LagrangeMultiplier(), LagrangeMultiplier()
    for batch in costs:
        whole.update(batch)
    for batch in costs[:9]:
        first.update(batch)
    second = LagrangeMultiplier()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in costs[9:]:
        second.update(batch)
    assert second == whole


def test_with_the_negative_part_lambda_can_fall():
    lam = LagrangeMultiplier(positive_part=False)
    assert lam.update(np.array([-3.0, -1.0]))["lambda"] < 1.0
    assert LagrangeMultiplier().update(np.array([-3.0, -1.0]))["lambda"] == 1.0


@pytest.mark.parametrize("costs", [[], [np.nan], [1.0, np.inf]])
def test_it_never_moves_on_a_guess(costs):
    lam = LagrangeMultiplier()
    with pytest.raises(ValueError):
        lam.update(np.array(costs))
    assert lam == LagrangeMultiplier()


def test_the_papers_rule_moves_in_proportion_to_lambda():
    paper = LagrangeMultiplier(value=0.1, learning_rate=0.5, rule="safe_rlhf")
    published = LagrangeMultiplier(value=0.1, learning_rate=0.5)
    assert paper.update(np.array([2.0]))["lambda"] == pytest.approx(0.1 * np.exp(0.5 * 0.1 * 2.0))
    assert published.update(np.array([2.0]))["lambda"] == pytest.approx(0.1 * np.exp(0.5 * 2.0))


@pytest.mark.parametrize("settings", [ESSettings, GRPOSettings])
def test_lambda_begins_where_it_may_stay(settings):
    policy = {"policy_model_path" if settings is ESSettings else "model_name": "policy"}
    for given in ({"lambda_cost": 10.0}, {"lambda_cost": 0.0}, {"lambda_max": 0.5}):
        with pytest.raises(UserError, match=r"lambda_cost is .*, outside .* give --lambda_adapt false"):
            settings(**policy, **given)
        assert settings(**policy, **given, lambda_adapt=False).lambda_cost == given.get("lambda_cost", 1.0)
    for bound in (1e-4, 5.0):
        assert settings(**policy, lambda_cost=bound).lambda_adapt


@pytest.mark.parametrize("file", ["ES/es_alignment", "demo/es_demo", "GRPO/grpo_alignment", "demo/grpo_demo"])
def test_files_of_settings_that_are_given_out_are_taken(file):
    path = str(REPO / "alignment" / f"{file}.yaml")
    if "es_" in file:
        flags = ["--config", path, "--policy_model_path", "policy"]
        assert load_config(ESSettings, flags, prog="es", description="").lambda_cost == 1.0
    else:
        assert load_settings(["--config", path, "--model_name", "policy"]).lambda_cost == 1.0
