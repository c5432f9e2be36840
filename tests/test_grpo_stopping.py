"""Where a GRPO run is told to stop, or loses its scorer, and what is still done then: one process, in this one."""

from __future__ import annotations

import shutil

import pytest
from fake_scorer import FakeScorer
from grpo_script import command, same_run, write_prompts
from script_here import run_script

from alignment.generation import TransformersEngine
from alignment.GRPO.trainer import ConstrainedGRPOTrainer
from alignment.records import read_json, read_jsonl, write_jsonl
from alignment.scoring import client

STOPPED = 128 + 15
# Requests to the scorer: 1 evaluation, 2 and 3 steps, 4 evaluation, 5 step, 6 evaluation.
SETTINGS = {"max_steps": 3, "eval_every": 2, "save_steps": 100, "scorer_max_wait": 60}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts"))


def grpo(policy, prompts, run, answer=None, **settings):
    with FakeScorer(answer) as scorer:
        return run_script(*command(policy, scorer.url, prompts, run, **(SETTINGS | settings))[1:])


@pytest.fixture(scope="module")
def whole(tiny_policy, prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    done = grpo(tiny_policy, prompts, run)
    assert done.code == 0, done.err
    return run


def stop_at(run, request):
    """A scorer's answers; someone makes the file `stop` while it works on that request."""

    def answer(number, body):
        if number == request:
            (run / "stop").touch()
        return FakeScorer.scores(body)

    return answer


def evaluated(run):
    return [row["iteration"] for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "eval"]


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def same(run, whole):
    assert (run / "best/trainer_state.json").read_bytes() == (whole / "best/trainer_state.json").read_bytes()
    return same_run(run, whole)


def test_a_stop_in_the_last_step_puts_its_evaluation_off(tiny_policy, prompts, whole, tmp_path):
    run = tmp_path / "run"
    done = grpo(tiny_policy, prompts, run, stop_at(run, 5))
    assert (done.code, read_json(run / "stopped.json")["iteration"]) == (STOPPED, 3), done.err
    assert checkpoints(run) == ["iteration_00003"]
    assert not (run / "final").exists()
    done = grpo(tiny_policy, prompts, run)
    assert (done.code, "going on after step 3" in done.out) == (0, True), done.err
    assert same(run, whole)


def test_a_scorer_that_is_away_at_the_last_evaluation_puts_it_off(tiny_policy, prompts, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "SAY_AFTER", 0.0)
    run = tmp_path / "run"

    def answer(number, body):
        return FakeScorer.scores(body) if number < 6 else 503

    done = grpo(tiny_policy, prompts, run, answer, scorer_max_wait=1)
    assert done.err.count("waiting for the scorer, 0 min (503: as the test wants)\n") == 1  # in a job's log
    assert (done.code, checkpoints(run), (run / "final").exists()) == (75, ["iteration_00003"], False), done.err
    assert grpo(tiny_policy, prompts, run).code == 0
    assert same(run, whole)


def test_a_run_that_ended_without_its_last_evaluation_is_not_finished(tiny_policy, prompts, whole, tmp_path):
    """As earlier versions left them."""
    run = shutil.copytree(whole, tmp_path / "run")
    write_jsonl(run / "metrics.jsonl", read_jsonl(run / "metrics.jsonl")[:-1])
    shutil.rmtree(run / "best")
    done = grpo(tiny_policy, prompts, run)
    assert (done.code, "is finished" in done.out, evaluated(run)) == (0, False, [0, 2, 3]), done.err
    assert (run / "best").exists()


def test_the_end_of_a_shorter_run_is_not_that_of_a_longer_one(tiny_policy, prompts, whole, tmp_path):
    """A kill between the last checkpoint and final/, in a run that was gone on with."""
    run = tmp_path / "run"
    assert grpo(tiny_policy, prompts, run, max_steps=2).code == 0
    shutil.copytree(run / "final", tmp_path / "shorter")
    assert grpo(tiny_policy, prompts, run).code == 0
    shutil.rmtree(run / "final")
    shutil.copytree(tmp_path / "shorter", run / "final")
    assert grpo(tiny_policy, prompts, run).code == 0
    assert same(run, whole)
    assert "is finished" in grpo(tiny_policy, prompts, run).out


def stopped_after(run, step):
    assert read_json(run / "stopped.json")["iteration"] == step
    assert checkpoints(run)[-1] == f"iteration_{step:05d}"
    return True


@pytest.mark.parametrize("save_steps", [2, 100])
def test_a_stop_while_an_evaluation_is_scored_ends_that_step(tiny_policy, prompts, whole, tmp_path, save_steps):
    """Not the next one, with a second checkpoint: in what is left of a job's time these may not fit."""
    run = tmp_path / "run"
    done = grpo(tiny_policy, prompts, run, stop_at(run, 4), save_steps=save_steps)
    assert done.code == STOPPED, done.err
    assert stopped_after(run, 2) and evaluated(run) == [0, 2]
    assert grpo(tiny_policy, prompts, run, save_steps=save_steps).code == 0
    assert same(run, whole)


def test_a_stop_while_held_out_answers_are_generated_ends_that(tiny_policy, prompts, tmp_path, monkeypatch):
    run, batches = tmp_path / "run", []
    settings = {"eval_batch_size": 1}  # of five prompts
    answer = TransformersEngine._answer

    def stop_in_the_seventh(self, *arguments):
        batches.append(arguments)
        if len(batches) == 7:
            (run / "stop").touch()
        return answer(self, *arguments)

    monkeypatch.setattr(TransformersEngine, "_answer", stop_in_the_seventh)
    done = grpo(tiny_policy, prompts, run, **settings)
    assert (done.code, len(batches)) == (STOPPED, 7), done.err
    assert stopped_after(run, 2) and evaluated(run) == [0]
    assert grpo(tiny_policy, prompts, run, **settings).code == 0
    assert grpo(tiny_policy, prompts, tmp_path / "whole", **settings).code == 0
    assert same(run, tmp_path / "whole")


def test_a_stop_while_a_checkpoint_is_saved_needs_no_other(tiny_policy, prompts, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    save = ConstrainedGRPOTrainer.save_whole

    def save_and_stop(self, *arguments):
        (run / "stop").touch()
        save(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ConstrainedGRPOTrainer, "save_whole", save_and_stop)
        done = grpo(tiny_policy, prompts, run, save_steps=1)
    assert done.code == STOPPED, done.err
    assert stopped_after(run, 1) and checkpoints(run) == ["iteration_00001"]
    assert grpo(tiny_policy, prompts, run, save_steps=1).code == 0
    assert same(run, whole)


def test_a_stop_before_the_first_step_of_a_run_that_goes_on(tiny_policy, prompts, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert grpo(tiny_policy, prompts, run, stop_at(run, 2)).code == STOPPED
    load = ConstrainedGRPOTrainer._load_from_checkpoint

    def load_and_stop(self, *arguments):
        load(self, *arguments)
        (run / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(ConstrainedGRPOTrainer, "_load_from_checkpoint", load_and_stop)
        done = grpo(tiny_policy, prompts, run)
    assert done.code == STOPPED, done.err
    assert stopped_after(run, 1) and checkpoints(run) == ["iteration_00001"]
    assert grpo(tiny_policy, prompts, run).code == 0
    assert same(run, whole)


def test_a_stop_after_the_last_evaluation_is_too_late(tiny_policy, prompts, whole, tmp_path):
    run = tmp_path / "run"
    assert grpo(tiny_policy, prompts, run, stop_at(run, 6)).code == 0
    assert same(run, whole)


def test_a_folder_of_another_name_does_not_count_among_the_checkpoints_to_keep(tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "iteration_old").mkdir(parents=True)
    assert grpo(tiny_policy, prompts, run, save_steps=1, keep_last=1).code == 0
    assert checkpoints(run) == ["iteration_00003", "iteration_old"]
