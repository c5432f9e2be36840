"""Settings: defaults < YAML < flags, and what a user can get wrong."""

from dataclasses import dataclass
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from alignment.config import as_yaml, load_config, setting
from alignment.errors import UserError


@dataclass
class Example:
    sigma: float = setting(0.001, "spread", minimum=0.0)
    num_iterations: int = setting(10, "steps", minimum=1, maximum=1000)
    lambda_adapt: bool = setting(True, "adapt")
    name: str | None = setting(None, "name")
    mode: Literal["one", "two"] = setting("one", "mode")
    models: list[str] = setting([], "models")

    def __post_init__(self):
        if self.sigma > 1 and self.mode == "two":
            raise UserError("sigma above 1 does not go with mode 'two'")


def load(*argv, tmp_path=None, yaml_text=None):
    argv = list(map(str, argv))
    if yaml_text is not None:
        (tmp_path / "c.yaml").write_text(yaml_text)
        argv = ["--config", str(tmp_path / "c.yaml"), *argv]
    return load_config(Example, argv, prog="example", description="")


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    config = load("--sigma", "0.5", tmp_path=tmp_path, yaml_text="sigma: 0.25\nnum_iterations: 20\n")
    assert config == Example(sigma=0.5, num_iterations=20)


def test_resolved_settings_are_read_back(tmp_path):
    config = load("--models", "a", "b", "--no_lambda_adapt", "--name", "x: y # z")
    assert load(tmp_path=tmp_path, yaml_text=as_yaml(config)) == config


@pytest.mark.parametrize(
    ("argv", "value"),
    [(["--lambda_adapt"], True), (["--lambda-adapt", "false"], False), (["--no-lambda-adapt"], False), ([], True)],
)
def test_booleans(argv, value):
    assert load(*argv).lambda_adapt is value


def test_yaml_numbers_as_people_write_them(tmp_path):
    assert load(tmp_path=tmp_path, yaml_text="sigma: 5e-6").sigma == 5e-6  # YAML 1.1 reads this as text
    assert load(tmp_path=tmp_path, yaml_text="sigma: 1").sigma == 1.0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sigm", "1"], ["--sigm", "did you mean '--sigma'"]),
        (["--num-iteration=3"], ["--num_iterations"]),
        (["--sigma", "abc"], ["--sigma", "finite number", "abc"]),
        (["--sigma", "nan"], ["--sigma", "finite number"]),
        (["--sigma", "-1"], ["sigma", "at least 0"]),
        (["--num_iterations", "1.5"], ["--num_iterations", "whole number"]),
        (["--num_iterations", "1001"], ["from 1 to 1000"]),
        (["--lambda_adapt", "maybe"], ["--lambda_adapt", "true or false"]),
        (["--mode", "tow"], ["'tow'", "did you mean 'two'"]),
        (["stray"], ["stray"]),
        (["--sigma", "2", "--mode", "two"], ["sigma above 1"]),
        (["--config", "/does/not/exist.yaml"], ["/does/not/exist.yaml"]),
    ],
)
def test_wrong_flags_are_named(argv, words):
    with pytest.raises(UserError) as error:
        load(*argv)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sigam: 1", ["sigam", "did you mean 'sigma'"]),
        ("sigma: [1]", ["key 'sigma'", "finite number"]),
        ("sigma: true", ["key 'sigma'"]),
        ("num_iterations: 2.0", ["key 'num_iterations'", "whole number"]),
        ("lambda_adapt: 1", ["true or false"]),
        ("name: 3", ["key 'name'", "text"]),
        ("models: a", ["key 'models'", "list"]),
        ("- a\n- b", ["key: value"]),
        ("sigma: 1\nsigma: 2", ["sigma", "twice"]),
        ("sigma: [1", ["not valid YAML"]),
        ("sigma: !!python/object/apply:os.system ['true']", ["not valid YAML"]),
    ],
)
def test_wrong_yaml_is_named(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        load(tmp_path=tmp_path, yaml_text=text)
    assert all(word in str(error.value) for word in [*words, "c.yaml"]), str(error.value)
    assert "\n" not in str(error.value)


def test_the_value_of_an_unknown_flag_is_not_echoed():
    with pytest.raises(UserError) as error:
        load("--api_key=secret")
    assert "--api_key" in str(error.value)
    assert "secret" not in str(error.value)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "sigma": st.floats(0, 1, allow_nan=False),
            "num_iterations": st.integers(1, 1000),
            "lambda_adapt": st.booleans(),
            "name": st.none()
            | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).map(str.strip),
            "mode": st.sampled_from(["one", "two"]),
            "models": st.lists(st.sampled_from(["a", "b c", "d: e", "#", "- x", "yes", "1e3", "\u2028"]), max_size=3),
        },
    )
)
def test_any_settings_come_back_from_their_own_yaml(tmp_path_factory, values):
    if str(values.get("name")).lower() in ("none", "null", ""):
        values.pop("name", None)  # the words for no value
    config = Example(**values)
    assert load(tmp_path=tmp_path_factory.mktemp("yaml"), yaml_text=as_yaml(config)) == config


@given(
    st.text(min_size=1, max_size=20),
    st.one_of(st.text(max_size=20), st.integers(), st.floats(), st.booleans(), st.none()),
)
def test_an_unknown_key_or_a_wrong_value_is_one_line_and_never_a_trace(tmp_path_factory, key, value):
    text = yaml.safe_dump({key: value}, allow_unicode=True)
    try:
        load(tmp_path=tmp_path_factory.mktemp("yaml"), yaml_text=text)
    except UserError as error:
        assert "c.yaml" in str(error)
    else:
        assert key in Example.__dataclass_fields__


def test_an_empty_file_means_defaults(tmp_path):
    assert load(tmp_path=tmp_path, yaml_text="# nothing\n") == Example()
