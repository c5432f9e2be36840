"""Runs that cannot be gone on with: another scorer, damaged journals and checkpoints. One line, exit code 2, nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from broken_models import edit_tensors
from conftest import make_tokenizer
from fake_scorer import FakeScorer
from grpo_script import SCRIPT as GRPO
from grpo_script import SMALL as GRPO_SMALL
from safetensors.torch import load_file
from script_here import ES, refused, run_script
from transformers import AutoModelForCausalLM, MixtralConfig

from alignment.records import read_json, read_jsonl, write_json, write_jsonl

ES_SMALL = {
    "population_size": 2,
    "batch_size": 2,
    "max_new_tokens": 4,
    "sigma": 0.02,
    "alpha": 0.05,
    "eval_every": 100,
    "save_every": 1,
    "scorer_max_wait": 1,
}
IDENTITY = {
    "reward_model": {"name": "reward", "weights": "0123456789abcdef"},
    "cost_model": {"name": "cost", "weights": "fedcba9876543210"},
    "dtype": "float32",
}
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"question {i}?"} for i in range(4)])
    return folder


@pytest.fixture(scope="module")
def scorer():
    with FakeScorer() as fake:
        fake.identity = IDENTITY
        yield fake


def flags_of(settings: dict) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def es(policy: Path, url: str, prompts: Path, run: Path, **settings) -> list:
    files = ["--train_jsonl", prompts / "prompts.jsonl", "--eval_jsonl", prompts / "prompts.jsonl"]
    where = ["--policy_model_path", policy, "--scorer_url", url, "--experiment_dir", run]
    return [ES, *where, *files, *flags_of(ES_SMALL | settings)]


def grpo(policy: Path, url: str, prompts: Path, run: Path, **settings) -> list:
    files = ["--train_jsonl", prompts / "prompts.jsonl", "--eval_jsonl", prompts / "prompts.jsonl"]
    where = ["--model_name", policy, "--scorer_url", url, "--output_dir", run]
    small = GRPO_SMALL | {"eval_every": 100, "save_steps": 1, "num_generations": 2, "scorer_max_wait": 1}
    return [GRPO, *where, *files, *flags_of(small | settings)]


@pytest.fixture(scope="module")
def es_run(tiny_policy, prompts, scorer, tmp_path_factory):
    """A run of two steps, with a checkpoint after each."""
    run = tmp_path_factory.mktemp("es") / "run"
    done = run_script(*es(tiny_policy, scorer.url, prompts, run, num_iterations=2))
    assert done.code == 0, done.err
    return run


@pytest.fixture(scope="module")
def grpo_run(tiny_policy, prompts, scorer, tmp_path_factory):
    run = tmp_path_factory.mktemp("grpo") / "run"
    done = run_script(*grpo(tiny_policy, scorer.url, prompts, run, max_steps=1))
    assert done.code == 0, done.err
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_line(path: Path, number: int, change) -> None:
    lines = path.read_text().splitlines()
    row = json.loads(lines[number])
    lines[number] = json.dumps(change(row) or row)
    path.write_text("\n".join(lines) + "\n")


# --- ES and its scorer


def test_es_goes_on_with_the_scorer_that_it_began_with_and_no_other(tiny_policy, prompts, scorer, es_run, tmp_path):
    run = shutil.copytree(es_run, tmp_path / "run")
    before = content(run)
    with FakeScorer() as other:
        other.identity = IDENTITY | {"reward_model": {"name": "reward", "weights": "1111111111111111"}}
        line = refused(*es(tiny_policy, other.url, prompts, run, num_iterations=3))
        assert "reward_model.weights was '0123456789abcdef', is '1111111111111111'" in line
        assert line.endswith("the run began with the former: start that one again, or begin another run")
        assert not other.requests
    assert content(run) == before
    with FakeScorer() as restarted:  # at another address, after a requeue
        restarted.identity = IDENTITY
        restarted.instance = "restarted"
        assert run_script(*es(tiny_policy, restarted.url, prompts, run, num_iterations=3)).code == 0
        assert restarted.requests
    assert len(read_jsonl(run / "journal.jsonl")) == 4


def test_runs_go_on_whose_scorer_named_less_of_itself(tiny_policy, prompts, es_run, grpo_run, tmp_path):
    with FakeScorer() as now:
        models = {key: IDENTITY[key] | {"tokenizer": "1a", "config": "2a"} for key in ("reward_model", "cost_model")}
        now.identity = IDENTITY | models | {"backend": "transformers"}
        for command, begun, steps in ((es, es_run, {"num_iterations": 3}), (grpo, grpo_run, {"max_steps": 2})):
            run = shutil.copytree(begun, tmp_path / command.__name__)
            done = run_script(*command(tiny_policy, now.url, prompts, run, **steps))
            assert done.code == 0, done.err


def test_what_a_scorer_measures_of_itself_decides_nothing(tiny_policy, prompts, es_run, tmp_path):
    run = shutil.copytree(es_run, tmp_path / "run")
    with FakeScorer() as other:
        other.identity = IDENTITY | {"fp8_error": {"reward_max": 0.013}}
        done = run_script(*es(tiny_policy, other.url, prompts, run, num_iterations=3))
    assert done.code == 0, done.err


def test_es_says_what_has_changed_before_it_asks_for_a_scorer(tiny_policy, prompts, es_run, tmp_path):
    before = content(es_run)
    line = refused(*es(tiny_policy, NOBODY, prompts, es_run, sigma=0.03))
    assert "was begun otherwise: sigma (was 0.02, now 0.03). Going on would not be that run" in line
    other = tmp_path / "other"
    other.mkdir()
    write_jsonl(other / "prompts.jsonl", [{"prompt": f"other {i}"} for i in range(4)])
    assert "train_prompts (was" in refused(*es(tiny_policy, NOBODY, other, es_run))
    assert content(es_run) == before


def test_es_with_other_base_weights(tiny_policy, prompts, scorer, es_run, tmp_path):
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    edit_tensors(policy, lambda tensors: tensors["model.norm.weight"][0].add_(1e-3))
    line = refused(*es(policy, scorer.url, prompts, es_run, num_iterations=3))
    assert "was begun otherwise: base_weights" in line and "another --experiment_dir" in line


@pytest.mark.parametrize("method", ["es", "grpo"])
def test_a_start_that_goes_on_is_recorded(
    tiny_policy, prompts, scorer, es_run, grpo_run, tmp_path, monkeypatch, method
):
    begun, command, steps = {"es": (es_run, es, "num_iterations"), "grpo": (grpo_run, grpo, "max_steps")}[method]
    run = shutil.copytree(begun, tmp_path / "run")
    assert not (run / "starts.jsonl").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    was = {"es": 2, "grpo": 1}[method]
    done = run_script(*command(tiny_policy, scorer.url, prompts, run, **{steps: was + 1}))
    assert done.code == 0, done.err
    (row,) = read_jsonl(run / "starts.jsonl")
    assert row["changed"].pop(steps) == [was, was + 1]
    assert row["changed"].keys() <= {"experiment_dir", "output_dir"}  # the copy lies elsewhere
    assert row["slurm_job_id"] == "77" and "torch" in row["versions"]
    for name in ("config.yaml", "manifest.json"):
        assert (run / name).read_bytes() == (begun / name).read_bytes()


# --- ES, damaged


JOURNALS = {
    "no start": (lambda path: path.write_text("".join(path.read_text().splitlines(True)[1:])), "journal.jsonl:1"),
    "start of something else": (lambda path: edit_line(path, 0, lambda row: {"kind": "start"}), "journal.jsonl:1"),
    "no base weights": (lambda path: edit_line(path, 0, lambda row: row.pop("base_weights") and None), ":1: not an ES"),
    "settings of no kind": (lambda path: edit_line(path, 0, lambda row: row.update(settings=[1])), "journal.jsonl:1"),
    "scorer of no kind": (lambda path: edit_line(path, 0, lambda row: row["settings"].update(scorer="x")), ":1"),
    "no json at the start": (lambda path: path.write_text("{\n" + path.read_text()), "journal.jsonl:1: not valid JSON"),
    "no json in the middle": (
        lambda path: path.write_text(path.read_text().replace('"kind":', '"kind"', 2).replace('"kind"', '"kind":', 1)),
        "journal.jsonl:2: not valid JSON",
    ),
    "a step left out": (
        lambda path: path.write_text("".join(path.read_text().splitlines(True)[::2])),
        "journal.jsonl:2: expected iteration 0, found 1",
    ),
    "no seeds": (
        lambda path: edit_line(path, 1, lambda row: row.pop("seeds") and None),
        ":2: the step's seeds is no list: None",
    ),
    "seeds of no kind": (
        lambda path: edit_line(path, 1, lambda row: row.update(seeds=["a", "b"])),
        ":2: expected whole",
    ),
    "a seed too many": (lambda path: edit_line(path, 1, lambda row: row["seeds"].append(3)), ":2: expected whole"),
    "nan coefficient": (
        lambda path: edit_line(path, 2, lambda row: row.update(coefficients=[float("nan"), 0.0])),
        "journal.jsonl:3: a coefficient is not a finite number",
    ),
    "no lambda": (
        lambda path: edit_line(path, 2, lambda row: row.pop("lambda_state") and None),
        ":3: the step has no lambda_state",
    ),
    "no metrics": (
        lambda path: edit_line(path, 2, lambda row: row.pop("metrics") and None),
        ":3: the step has no metrics",
    ),
}


@pytest.mark.parametrize("name", JOURNALS)
def test_damaged_journals(tiny_policy, prompts, scorer, es_run, tmp_path, name):
    run = shutil.copytree(es_run, tmp_path / "run")
    damage, said = JOURNALS[name]
    damage(run / "journal.jsonl")
    before = content(run)
    assert said in refused(*es(tiny_policy, scorer.url, prompts, run, num_iterations=3))
    assert content(run) == before


@pytest.mark.parametrize("name", ["no start", "no seeds", "nan coefficient"])
def test_nothing_is_rebuilt_from_a_damaged_journal(tiny_policy, es_run, tmp_path, name):
    journal = Path(shutil.copy(es_run / "journal.jsonl", tmp_path))
    damage, said = JOURNALS[name]
    damage(journal)
    flags = ["--journal", journal, "--policy_model_path", tiny_policy, "--output", tmp_path / "rebuilt"]
    assert said in refused("alignment/ES/rebuild_checkpoint.py", *flags)
    assert not (tmp_path / "rebuilt").exists()


@pytest.mark.parametrize(
    "name", ["no start", "start of something else", "no base weights", "settings of no kind", "scorer of no kind"]
)
def test_a_first_row_is_none_to_all_that_read_it_before_anything_is_loaded(prompts, es_run, tmp_path, name):
    run = shutil.copytree(es_run, tmp_path / "run")
    JOURNALS[name][0](run / "journal.jsonl")
    line = refused(*es("no/model", NOBODY, prompts, run, num_iterations=3))
    assert "journal.jsonl:1: not an ES journal" in line
    flags = ["--journal", run / "journal.jsonl", "--policy_model_path", "no/model", "--output", tmp_path / "rebuilt"]
    assert refused("alignment/ES/rebuild_checkpoint.py", *flags) == line


def test_a_journal_without_the_settings_that_a_step_needs(tiny_policy, es_run, tmp_path):
    journal = Path(shutil.copy(es_run / "journal.jsonl", tmp_path))
    edit_line(journal, 0, lambda row: row["settings"].pop("trainable") and None)
    flags = ["--journal", journal, "--policy_model_path", tiny_policy, "--output", tmp_path / "rebuilt"]
    assert "journal.jsonl:1: the settings of the run lack trainable" in refused(
        "alignment/ES/rebuild_checkpoint.py", *flags
    )


def test_a_journal_that_is_not_there(tiny_policy, prompts, scorer, es_run, tmp_path):
    flags = ["--journal", tmp_path / "none.jsonl", "--policy_model_path", tiny_policy, "--output", tmp_path / "rebuilt"]
    assert "none.jsonl" in refused("alignment/ES/rebuild_checkpoint.py", *flags)
    run = shutil.copytree(es_run, tmp_path / "run")
    (run / "journal.jsonl").unlink()
    line = refused(*es(tiny_policy, scorer.url, prompts, run))
    assert "checkpoints, eval, final, members.0.jsonl, metrics.jsonl, tensorboard but no journal" in line
    assert "another --experiment_dir" in line


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


WEIGHTS = "model.safetensors"
CHECKPOINTS = {
    "truncated weights": (lambda f: truncate(f / WEIGHTS), WEIGHTS),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "lacks the tensor"),
    "tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")),
        "lacks the tensor model.norm.weight",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "model.norm.weight is (31,), this run's (32,)",
    ),
    "nan": (
        lambda f: edit_tensors(f, lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "not finite: model.norm.weight",
    ),
    "no state": (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json"),
    "broken state": (lambda f: (f / "trainer_state.json").write_text("{"), "trainer_state.json"),
    "state of no kind": (lambda f: (f / "trainer_state.json").write_text("[]"), "trainer_state.json"),
    "iteration of no kind": (lambda f: write_json(f / "trainer_state.json", {"iteration": "2"}), "trainer_state.json"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_es_checkpoints(tiny_policy, prompts, scorer, es_run, tmp_path, name):
    run = shutil.copytree(es_run, tmp_path / "run")
    damage, said = CHECKPOINTS[name]
    damage(run / "checkpoints" / "iteration_00002")
    line = refused(*es(tiny_policy, scorer.url, prompts, run, num_iterations=3))
    assert said in line and "iteration_00002" in line and "Remove that checkpoint" in line
    assert len(read_jsonl(run / "journal.jsonl")) == 3


def test_without_the_damaged_checkpoint_the_weights_are_the_same(tiny_policy, prompts, scorer, es_run, tmp_path):
    whole, mended = (shutil.copytree(es_run, tmp_path / name) for name in ("whole", "mended"))
    shutil.rmtree(mended / "checkpoints")
    for run in (whole, mended):
        assert run_script(*es(tiny_policy, scorer.url, prompts, run, num_iterations=3)).code == 0
    first, second = (load_file(run / "final" / WEIGHTS) for run in (whole, mended))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- GRPO


GRPO_CHECKPOINTS = {
    "no optimizer": (lambda f: (f / "optimizer.pt").unlink(), "lacks optimizer.pt"),
    "no schedule": (lambda f: (f / "scheduler.pt").unlink(), "lacks scheduler.pt"),
    "no random state": (lambda f: (f / "rng_state.pth").unlink(), "lacks rng_state.pth"),
    "no trainer state": (lambda f: (f / "trainer_state.json").unlink(), "lacks trainer_state.json"),
    "no lambda": (lambda f: (f / "constraint.json").unlink(), "lacks constraint.json"),
    "truncated optimizer": (lambda f: truncate(f / "optimizer.pt"), "optimizer.pt is damaged"),
    "truncated random state": (lambda f: truncate(f / "rng_state.pth"), "rng_state.pth is damaged"),
    "broken trainer state": (lambda f: truncate(f / "trainer_state.json"), "trainer_state.json is not valid JSON"),
    "trainer state of no kind": (lambda f: (f / "trainer_state.json").write_text("[]"), "trainer_state.json: expected"),
    "another step's state": (
        lambda f: edit_json(f / "trainer_state.json", lambda s: s.update(global_step=7)),
        "global_step is 7",
    ),
    "lambda of no kind": (
        lambda f: write_json(f / "constraint.json", {"value": None, "cost_ema": 0.1}),
        "constraint.json",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no weights found"),
    "truncated weights": (lambda f: truncate(f / WEIGHTS), f"{WEIGHTS}: damaged"),
    "tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")),
        "weights for model.norm.weight",
    ),
    "another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        "weights for model.norm.weight",
    ),
}


@pytest.mark.parametrize("name", GRPO_CHECKPOINTS)
def test_damaged_grpo_checkpoints(tiny_policy, prompts, scorer, grpo_run, tmp_path, name):
    run = shutil.copytree(grpo_run, tmp_path / "run")
    damage, said = GRPO_CHECKPOINTS[name]
    damage(run / "checkpoints" / "iteration_00001")
    before = content(run)
    line = refused(*grpo(tiny_policy, scorer.url, prompts, run, max_steps=2))
    assert said in line and "iteration_00001" in line and "remove that checkpoint" in line
    assert content(run) == before


ADAPTERS = {
    "none": lambda f: (f / "adapter_model.safetensors").unlink(),
    "truncated": lambda f: truncate(f / "adapter_model.safetensors"),
}


def test_damaged_adapters(tiny_policy, prompts, scorer, tmp_path):
    run = tmp_path / "run"
    command = grpo(tiny_policy, scorer.url, prompts, run, lora_rank=2)
    assert run_script(*command, "--max_steps", 1).code == 0
    for name, damage in ADAPTERS.items():
        copy = shutil.copytree(run, tmp_path / name)
        damage(copy / "checkpoints" / "iteration_00001")
        line = refused(*grpo(tiny_policy, scorer.url, prompts, copy, lora_rank=2, max_steps=2))
        assert "adapter_model.safetensors: damaged" in line and "remove that checkpoint" in line
    assert run_script(*command, "--max_steps", 2).code == 0


@pytest.fixture(scope="module")
def tiny_mixtral(tmp_path_factory):
    """An architecture that transformers saves under other names: the experts one by one, which it computes with as one tensor."""
    folder = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(
        vocab_size=make_tokenizer(folder),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


def test_weights_that_are_saved_under_other_names(tiny_mixtral, prompts, scorer, tmp_path):
    whole, run, damaged = tmp_path / "whole", tmp_path / "run", tmp_path / "damaged"
    for folder, steps in ((whole, 2), (run, 1)):
        done = run_script(*grpo(tiny_mixtral, scorer.url, prompts, folder, max_steps=steps))
        assert done.code == 0, done.err
    shutil.copytree(run, damaged)
    assert run_script(*grpo(tiny_mixtral, scorer.url, prompts, run, max_steps=2)).code == 0
    base, first, second = (load_file(folder / WEIGHTS) for folder in (tiny_mixtral, whole / "final", run / "final"))
    expert = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert not torch.equal(base[expert], first[expert])
    assert all(torch.equal(first[name], second[name]) for name in first)

    for name in ("model.norm.weight", expert):
        edit_tensors(damaged / "checkpoints" / "iteration_00001", lambda tensors, name=name: tensors.pop(name))
        line = refused(*grpo(tiny_mixtral, scorer.url, prompts, damaged, max_steps=2))
        assert "iteration_00001" in line


@pytest.mark.parametrize("method", ["es", "grpo"])
def test_a_finished_run_in_a_folder_that_cannot_be_written(tiny_policy, prompts, es_run, grpo_run, tmp_path, method):
    begun, command, steps = {"es": (es_run, es, "num_iterations"), "grpo": (grpo_run, grpo, "max_steps")}[method]
    run = shutil.copytree(begun, tmp_path / "run")
    if os.geteuid() != 0:
        run.chmod(0o500)
    elif subprocess.run(["mount", "-o", "bind,ro", str(run), str(run)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = run_script(*command(tiny_policy, NOBODY, prompts, run, **{steps: 1}))
        assert (done.code, "is finished" in done.out) == (0, True)
        assert "cannot write" in refused(*command(tiny_policy, NOBODY, prompts, run, **{steps: 3}))
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", str(run)], check=True)
        else:
            run.chmod(0o700)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"deciding": []}', '{"deciding": {"scorer": 1}}'])
def test_manifests_that_say_nothing(tiny_policy, prompts, grpo_run, tmp_path, text):
    run = shutil.copytree(grpo_run, tmp_path / "run")
    (run / "manifest.json").write_text(text)
    assert "manifest.json" in refused(*grpo(tiny_policy, NOBODY, prompts, run, max_steps=2))


def test_checkpoints_of_a_run_without_its_manifest(tiny_policy, prompts, grpo_run, tmp_path):
    run = shutil.copytree(grpo_run, tmp_path / "run")
    (run / "manifest.json").unlink()
    line = refused(*grpo(tiny_policy, NOBODY, prompts, run, max_steps=2))
    assert "holds checkpoints, metrics.jsonl, eval, best, final but no manifest.json" in line
    assert "another --output_dir" in line
    shutil.rmtree(run / "checkpoints")  # the rest would be taken for the new run's
    line = refused(*grpo(tiny_policy, NOBODY, prompts, run, max_steps=2))
    assert "holds metrics.jsonl, eval, best, final but no manifest.json" in line


def test_a_checkpoint_of_deepspeed_is_not_gone_on_with_without_it(
    tiny_policy, prompts, grpo_run, tmp_path, monkeypatch
):
    """transformers would begin with a new optimizer and schedule, and say nothing."""
    run = shutil.copytree(grpo_run, tmp_path / "run")
    (checkpoint,) = (run / "checkpoints").iterdir()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    told = "this start is with DeepSpeed: start it with the ACCELERATE_CONFIG that the run began with"
    assert told in refused(*grpo(tiny_policy, NOBODY, prompts, run, max_steps=2))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink()
    (checkpoint / "latest").write_text("global_step1")
    assert told.replace("is with", "is without") in refused(*grpo(tiny_policy, NOBODY, prompts, run, max_steps=2))


def test_weights_that_are_trained_are_not_in_16_bits(tiny_policy, prompts, tmp_path):
    line = refused(*grpo(tiny_policy, NOBODY, prompts, tmp_path / "run", dtype="bfloat16"))
    assert "most steps of AdamW would be rounded away" in line and not (tmp_path / "run").exists()


def test_other_settings_or_base_weights_of_a_grpo_run(tiny_policy, prompts, scorer, grpo_run, tmp_path):
    before = content(grpo_run)
    assert "beta (was 0.1, now 0.2)" in refused(*grpo(tiny_policy, NOBODY, prompts, grpo_run, max_steps=2, beta=0.2))
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    edit_tensors(policy, lambda tensors: tensors["model.norm.weight"][0].add_(1e-3))
    line = refused(*grpo(policy, scorer.url, prompts, grpo_run, max_steps=2))
    assert "was begun otherwise: base_weights" in line and "another --output_dir" in line
    assert content(grpo_run) == before


def test_another_number_of_processes_is_no_reason_to_remove_a_checkpoint(tiny_policy, prompts, grpo_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(*grpo(tiny_policy, NOBODY, prompts, grpo_run, max_steps=2))
    assert "was begun otherwise: processes (was 1, now 2)" in line


def test_a_folder_that_is_no_checkpoint_is_passed_over(tiny_policy, prompts, scorer, grpo_run, tmp_path):
    run = shutil.copytree(grpo_run, tmp_path / "run")
    (run / "checkpoints" / "iteration_old").mkdir()
    done = run_script(*grpo(tiny_policy, scorer.url, prompts, run, max_steps=2))
    assert done.code == 0, done.err
    assert read_json(run / "final" / "trainer_state.json")["iteration"] == 2
