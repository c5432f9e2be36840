"""Mistakes in YAML files and flags at every script: one line that names the key and the nearest valid one, exit code 2.

No model, no scorer and no data is there: whatever is wrong is told before anything is loaded.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPO
from script_here import CLASSIFY, ES, GRPO, RATE, bad_file, refused

PIPELINE = "slurm/pipeline.py"
SWEEPS = "slurm/sweep_tasks.py"

# script -> a setting misspelt, the right name, a value of the wrong kind for it, what is expected
WITH_SETTINGS = {
    ES: ("sigam", "sigma", "high", "finite number"),
    GRPO: ("num_generation", "num_generations", 2.5, "whole number"),
    CLASSIFY: ("polcy_model_path", "policy_model_path", [1], "text"),
    RATE: ("max_prompt", "max_prompts", "all", "whole number"),
    "alignment/ES/rebuild_checkpoint.py": ("iteratoin", "iteration", "last", "whole number"),
    "alignment/evaluation/compare_models.py": ("lambda_cots", "lambda_cost", True, "finite number"),
    "alignment/scoring/test_score_fixed_prompt.py": ("scorer_ulr", "scorer_url", 8000, "text"),
    "alignment/visualization/plot_reward_cost_grid.py": ("ouput", "output", 3, "text"),
    "alignment/visualization/plot_safety_ratios.py": ("model", "models", "Alpaca-7B", "list"),
    "alignment/visualization/plot_pareto.py": ("rating", "ratings", 1000, "text"),
    "alignment/visualization/plot_training_curves.py": ("label", "labels", "ES", "list"),
    "alignment/visualization/plot_gpt_elo_figure.py": ("crosshiar", "crosshair", "no way", "true or false"),
    "alignment/visualization/make_report.py": ("judgements", "judgments", [], "text"),
}

NO_YAML = {
    "a folder": (None, ["Is a directory"]),
    "Latin-1": ("name: caf\xe9\n".encode("latin-1"), ["not UTF-8"]),
    "NUL": (b"name: \0\n", ["not valid YAML"]),
    "open bracket": (b"models: [a, b\n", ["not valid YAML", "line"]),
    "tabs": (b"a:\n\tb: 1\n", ["not valid YAML", "line 2"]),
    "a key twice": (b"seed: 1\nseed: 2\n", ["'seed'", "twice", "line 1"]),
    "a list": (b"- seed: 1\n", ["key: value", "list"]),
    "a word": (b"seed\n", ["key: value", "str"]),
    "a number": (b"5\n", ["key: value", "int"]),
    "an object of Python": (b"seed: !!python/object/apply:os.getpid []\n", ["not valid YAML"]),
    "no such day": (b"seed: 2026-13-45\n", ["not valid YAML"]),
    "no such truth": (b"seed: !!bool perhaps\n", ["not valid YAML"]),
    "a list as a key": (b"? [a, b]\n: 1\n", ["not valid YAML"]),
    "an alias of nothing": (b"seed: *other\n", ["not valid YAML"]),
    "nested without end": (b"[" * 5000, ["not valid YAML"]),
}


@pytest.mark.parametrize("case", NO_YAML)
@pytest.mark.parametrize("script", [*WITH_SETTINGS, PIPELINE, SWEEPS])
def test_files_that_are_no_settings(tmp_path, script, case):
    content, words = NO_YAML[case]
    path = bad_file(tmp_path, "settings.yaml", content)
    command = {PIPELINE: [path, "--dry-run"], SWEEPS: ["last", path]}.get(script, ["--config", path])
    message = refused(script, *command)
    assert all(word in message for word in [*words, str(path)]), message


@pytest.mark.parametrize("script", [*WITH_SETTINGS, PIPELINE, SWEEPS])
def test_a_file_that_is_not_there(tmp_path, script):
    path = tmp_path / "settings.yaml"
    command = {PIPELINE: [path, "--dry-run"], SWEEPS: ["last", path]}.get(script, ["--config", path])
    assert str(path) in refused(script, *command)


@pytest.mark.parametrize("script", WITH_SETTINGS)
def test_settings_that_do_not_exist_or_do_not_fit(tmp_path, script):
    misspelt, name, value, expected = WITH_SETTINGS[script]
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump({misspelt: "x"}))
    message = refused(script, "--config", path)
    assert all(word in message for word in (str(path), f"'{misspelt}'", f"did you mean '{name}'?")), message
    message = refused(script, f"--{misspelt}", "x")
    assert all(word in message for word in (f"--{misspelt}", f"did you mean '--{name}'?")), message
    path.write_text(yaml.safe_dump({name: value}))
    message = refused(script, "--config", path)
    assert all(word in message for word in (str(path), f"'{name}'", expected)), message


@pytest.mark.parametrize("script", WITH_SETTINGS)
def test_flags_that_are_broken_off(script):
    name = WITH_SETTINGS[script][1]
    for argv in (["--config"], ["stray"], [f"--{name}=" + "x" * 1_000_000 + "\n", "--no_such"], ["--", "--x"]):
        message = refused(script, *argv)
        assert len(message) < 500, message[:600]


COMBINATIONS = {
    "ES without a model": (ES, ["--sigma", "0.1"], ["--policy_model_path"]),
    "ES lambda bounds": (ES, ["--policy_model_path", "m", "--lambda_min", "2", "--lambda_max", "1"], ["lambda_min"]),
    "ES pairs": (ES, ["--policy_model_path", "m", "--antithetic", "--population_size", "3"], ["antithetic", "even"]),
    "ES adapters and names": (ES, ["--policy_model_path", "m", "--lora_rank", "2", "--trainable", "q"], ["lora_rank"]),
    "ES expression": (ES, ["--policy_model_path", "m", "--trainable", "("], ["regular expression"]),
    "ES rank": (ES, ["--policy_model_path", "m", "--rank", "2"], ["low_rank"]),
    "ES template": (ES, ["--policy_model_path", "m", "--policy_template", "Q: A:"], ["{prompt}", "exactly once"]),
    "GRPO without a model": (GRPO, [], ["--model_name"]),
    "GRPO server": (GRPO, ["--model_name", "m", "--use_vllm", "--vllm_mode", "server"], ["vllm_server_base_url"]),
    "GRPO passes": (GRPO, ["--model_name", "m", "--per_device_train_batch_size", "7"], ["does not divide"]),
    "GRPO retired": (GRPO, ["--scatter_every", "5"], ["retired", "remove it"]),
    "GRPO template": (GRPO, ["--model_name", "m", "--policy_template", "{prompt}{prompt}"], ["exactly once"]),
    "classify both": (CLASSIFY, ["--policy_model_path", "m", "--responses_from", "f"], ["give one"]),
    "classify journal": (CLASSIFY, ["--policy_model_path", "m", "--journal", "f"], ["FILE@ITER"]),
    "classify journal alone": (CLASSIFY, ["--journal", "f@1"], ["--policy_model_path"]),
    "classify template": (CLASSIFY, ["--policy_model_path", "m", "--policy_template", "x"], ["{prompt}"]),
    "classify scorer template": (CLASSIFY, ["--responses_from", "f", "--scorer_template", "x"], ["{prompt}"]),
    "rate twice": (RATE, ["--judgments_in", "f", "--judge", "scorer"], ["--judgments_in"]),
    "rate template": (RATE, ["--template", "x"], ["--judgments_in"]),
    "rate key": (RATE, ["--api-key", "sk-1"], ["OPENAI_API_KEY"]),
    "rate figure": (RATE, ["--plot_out", "x.gif"], [".png or .pdf"]),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_settings_that_do_not_go_together(case):
    script, argv, words = COMBINATIONS[case]
    message = refused(script, *argv)
    assert all(word in message for word in words), message


FIGURES = [script for script in WITH_SETTINGS if "visualization" in script]


@pytest.mark.parametrize("script", FIGURES)
def test_a_figure_of_an_unknown_kind_is_refused_before_anything_is_read(script, tmp_path):
    flag = "--outfile" if script.endswith("elo_figure.py") else "--output"
    runs = ["--runs", tmp_path] if script.endswith("curves.py") else []
    message = refused(script, flag, tmp_path / "x.gif", *runs)
    assert "x.gif" in message
    assert "must end in" in message


SWEEP_FILES = {
    "nothing in it": (b"", ["'sweeps:'"]),
    "no sweeps": (b"defaults: {split: test}\n", ["'sweeps:'"]),
    "sweeps a mapping": (b"sweeps: {model_name: a}\n", ["'sweeps:'"]),
    "sweeps of words": (b"sweeps: [a, b]\n", ["sweep 0"]),
    "no name": (b"sweeps: [{policy_model_path: m}]\n", ["sweep 0", "model_name"]),
    "defaults a list": (b"defaults: [a]\nsweeps: [{model_name: a}]\n", ["defaults"]),
    "another key": (b"sweep: [{model_name: a}]\n", ["'sweep'", "did you mean 'sweeps'?"]),
}
SWEEP_ENTRIES = {
    "misspelt": ("{model_name: a, polcy_model_path: m}", ["'polcy_model_path'", "did you mean 'policy_model_path'?"]),
    "a list": ("{model_name: a, num_samples: [1]}", ["'num_samples'", "one value"]),
    "of the wrong kind": ("{model_name: a, num_samples: many}", ["num_samples", "whole number"]),
    "a key that is a number": ("{model_name: a, 5: m}", ["'5'"]),
    "together": ("{model_name: a, policy_model_path: m, responses_from: f}", ["give one"]),
    "a name twice": ("{model_name: a}\n  - {model_name: a, output_dir: null}", ["write the same files", "a"]),
}


@pytest.mark.parametrize("case", SWEEP_FILES)
def test_broken_sweep_files(tmp_path, case):
    content, words = SWEEP_FILES[case]
    path = bad_file(tmp_path, "sweeps.yaml", content)
    for command in ([SWEEPS, "last", path], [SWEEPS, "todo", path, "0"]):
        message = refused(*command)
        assert all(word in message for word in [*words, str(path)]), message
    if case != "no name":  # the classification names its files after the policy then; a job array needs the name
        assert str(path) in refused(CLASSIFY, "--sweep", "0", "--sweep_config", path)


@pytest.mark.parametrize("case", SWEEP_ENTRIES)
def test_broken_entries_of_a_sweep_file(tmp_path, case):
    text, words = SWEEP_ENTRIES[case]
    path = tmp_path / "sweeps.yaml"
    path.write_text(f"sweeps:\n  - {text}\n")
    message = refused(CLASSIFY, "--sweep", "0", "--sweep_config", path)
    assert all(word in message for word in [*words, str(path)]), message


def test_sweeps_that_are_not_there(tmp_path):
    path = tmp_path / "sweeps.yaml"
    path.write_text("sweeps: [{model_name: a}]\n")
    for command in ([SWEEPS, "todo", path, "7"], [CLASSIFY, "--sweep", "7", "--sweep_config", path]):
        assert "has no sweep 7; it has 0 a" in refused(*command)
    assert "which entry" in refused(SWEEPS, "todo", path)
    assert "'lost'" in refused(SWEEPS, "lost", path)


@pytest.fixture
def experiment(tmp_path) -> dict:
    """Content of an experiment that can be planned."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "p.jsonl").write_text('{"prompt": "p"}\n')
    prompts = {"train_jsonl": str(tmp_path / "p.jsonl"), "eval_jsonl": str(tmp_path / "p.jsonl")}
    models = {"policy": str(tmp_path / "policy"), "reward_model": "a/b", "cost_model": "a/b"}
    return models | prompts | {"output_dir": str(tmp_path / "out"), "scorer_url": "http://127.0.0.1:9"}


EXPERIMENTS = {
    "a stage that does not exist": ({"clasify": {}}, ["'clasify'", "did you mean 'classify'?"]),
    "no policy": ({"policy": None}, ["policy is missing"]),
    "policy a list": ({"policy": ["m"]}, ["policy", "text"]),
    "policy a folder that is not there": ({"policy": "models/none"}, ["policy", "models/none"]),
    "name a path": ({"name": "a/b"}, ["name", "'a/b'"]),
    "seed a word": ({"seed": "x", "es": {}}, ["seed", "whole number"]),
    "prompts not there": ({"train_jsonl": "none.jsonl"}, ["train_jsonl", "none.jsonl"]),
    "prompts a list": ({"eval_jsonl": ["a"]}, ["eval_jsonl", "text"]),
    "output a list": ({"output_dir": ["a"]}, ["output_dir", "text"]),
    "address a list": ({"scorer_url": ["a"], "es": {}}, ["scorer_url", "text"]),
    "no scorer": ({"scorer_url": None, "es": {}}, ["scorer_url"]),
    "a stage that is a word": ({"es": "yes"}, ["es", "key: value"]),
    "a key of a stage": ({"es": {"argument": {}}}, ["'argument'", "did you mean 'arguments'?"]),
    "arguments a list": ({"es": {"arguments": ["--sigma"]}}, ["es", "arguments", "key: value"]),
    "an argument misspelt": ({"es": {"arguments": {"sigam": 1}}}, ["es", "--sigam", "--sigma"]),
    "an argument of the wrong kind": ({"grpo": {"arguments": {"max_steps": "x"}}}, ["grpo", "max_steps"]),
    "betas a number": ({"grpo": {"betas": 0.1}}, ["grpo", "betas", "list"]),
    "betas in words": ({"grpo": {"betas": ["low"]}}, ["grpo", "beta", "low"]),
    "no betas": ({"grpo": {"betas": []}}, ["grpo", "betas", "list"]),
    "a config that is not there": ({"es": {"config": "none.yaml"}}, ["es", "none.yaml"]),
    "a config that is a list": ({"es": {"config": ["a"]}}, ["es", "config", "text"]),
    "settings a list": ({"classify": {"settings": [1]}}, ["classify", "settings", "key: value"]),
    "sweeps a mapping": ({"classify": {"sweeps": {"a": 1}}}, ["classify", "sweeps", "list"]),
    "a sweep without a name": ({"classify": {"sweeps": [{}]}}, ["classify", "model_name"]),
    "two models of one name": ({"base_name": "x", "classify": {"sweeps": [{"model_name": "x"}]}}, ["one name"]),
    "ratings of nothing": ({"ratings": {}}, ["ratings", "classify"]),
    "ratings' arguments": ({"classify": {}, "ratings": {"arguments": [1]}}, ["ratings", "arguments", "key: value"]),
    "environment a list": ({"scorer": {"environment": ["A=1"]}}, ["scorer", "environment", "key: value"]),
}


@pytest.mark.parametrize("case", EXPERIMENTS)
def test_broken_experiments(tmp_path, experiment, case):
    changed, words = EXPERIMENTS[case]
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment | changed))
    message = refused(PIPELINE, path, "--dry-run")
    assert all(word in message for word in [*words, str(path)]), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"jobs": []}', '{"jobs": {"es": 5}}', "{", ""])
def test_a_broken_list_of_jobs(tmp_path, experiment, content):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment | {"es": {}}))
    jobs = bad_file(tmp_path, "out/experiment/jobs.json", content.encode())
    for script in (PIPELINE, "slurm/status.py"):
        assert str(jobs) in refused(script, path, *(["--dry-run"] if script == PIPELINE else []))


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        (ES, ["--config", "{}"]),
        (GRPO, ["--config", "{}"]),
        (CLASSIFY, ["--sweep", "0", "--sweep_config", "{}"]),
        (SWEEPS, ["last", "{}"]),
    ],
)
def test_as_a_process_of_its_own(tmp_path, script, argv):
    path: Path = bad_file(tmp_path, "settings.yaml", b"models: [a\n")
    argv = [word.format(path) for word in argv]
    done = subprocess.run([sys.executable, script, *argv], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert str(path) in done.stderr
