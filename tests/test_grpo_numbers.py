"""What goes wrong on GPUs first: the static cache, attention kernels, gradients that are not finite."""

from __future__ import annotations

import shutil

import pytest
import torch
from grpo_trainer import StubScorer, make_settings, make_trainer, rows_of
from torch.nn import functional

from alignment.GRPO.run import Run
from alignment.GRPO.trainer import BrokenStep, ConstrainedGRPOTrainer
from alignment.records import read_json, read_jsonl, write_json
from alignment.runs import StopSignal


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_static_cache_samples_what_the_dynamic_one_does(tiny_policy, tmp_path, lora_rank):
    said = {}
    for cache in ("dynamic", "static"):
        changes = {"generation_cache": cache, "lora_rank": lora_rank, "max_completion_length": 12}
        trainer = make_trainer(tiny_policy, tmp_path / cache, StubScorer(), **changes)
        assert trainer.generation_config.disable_compile == (cache == "dynamic")
        inputs = rows_of(trainer)
        for row in inputs[4:]:
            row["prompt"] = "a longer one: " + row["prompt"]  # so that the first are padded
        for step in range(2):  # the second with the cache's length known
            trainer.state.global_step = step
            output = trainer._generate_and_score_completions(inputs)
            said[cache, step] = [
                ids[mask.bool()].tolist()
                for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)
            ]
            assert output["prompt_ids"].shape[1] % 64 == 0 or cache == "dynamic"
    assert said["static", 0] == said["dynamic", 0]
    assert said["static", 1] == said["dynamic", 1]
    assert said["static", 0] != said["static", 1]


def test_the_policys_generation_config_does_not_bend_what_is_sampled(tiny_policy, tmp_path):
    """TRL leaves what it does not set to the model's own: the loss would be of another distribution than the samples."""
    policy = shutil.copytree(tiny_policy, tmp_path / "policy")
    bent = {"do_sample": True, "min_p": 0.99, "no_repeat_ngram_size": 1, "num_beams": 2}
    write_json(policy / "generation_config.json", read_json(policy / "generation_config.json") | bent)
    samples = []
    for number, folder in enumerate((tiny_policy, policy)):
        trainer = make_trainer(folder, tmp_path / str(number), StubScorer())
        samples.append(trainer._generate_and_score_completions(rows_of(trainer))["completion_ids"])
    assert torch.equal(*samples)


def test_kl_and_entropy_are_of_all_sampled_tokens(tiny_policy, tmp_path):
    """TRL's are means of passes, and one whose completions teach nothing counts as 0: both fall when scores grow equal."""
    rows = {}
    for name, changes in (("live", {}), ("one group equal", {}), ("passes", {"per_device_train_batch_size": 1})):

        def change(prompts, responses, rewards, costs, equal=name != "live"):
            if equal:
                rewards[:4] = costs[:4] = 1.0
            return rewards, costs

        trainer = make_trainer(tiny_policy, tmp_path / name, StubScorer(change), max_steps=2, **changes)
        with StopSignal() as stop:
            Run(make_settings(max_steps=2, eval_every=100), trainer, ["held out"], tmp_path / name, stop).train()
        rows[name] = [row for row in read_jsonl(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
    first = [rows[name][0] for name in rows]
    assert all(row["entropy"] == pytest.approx(first[0]["entropy"], rel=1e-5) for row in first)  # the same samples
    assert all(row["kl"] == pytest.approx(0.0, abs=1e-9) for row in first)
    assert (
        rows["passes"][1]["kl"] == pytest.approx(rows["one group equal"][1]["kl"], rel=1e-3)
        and rows["passes"][1]["kl"] > 0
    )


def test_attention_of_cudnn_is_not_used(tiny_policy, tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    make_trainer(tiny_policy, tmp_path, StubScorer())
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [64, 128, 192, 320, 333])
def test_padding_on_the_left_gives_finite_gradients(length):
    torch.backends.cuda.enable_cudnn_sdp(False)
    states = torch.randn(3, 2, 4, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(length, length, device="cuda", dtype=torch.bool).tril().repeat(2, 1, 1, 1)  # (B, 1, T, T)
    mask[1, :, :, :20] = False  # queries 0..19 see nothing
    output = functional.scaled_dot_product_attention(*states, attn_mask=mask)
    assert torch.isfinite(output).all()
    output[:, :, 20:].float().sum().backward()
    assert torch.isfinite(states.grad).all()


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_take_it(tiny_policy, tmp_path):
    changes = {"max_steps": 3, "eval_every": 100, "save_steps": 1}
    trainer = make_trainer(tiny_policy, tmp_path, StubScorer(), **changes)
    weight = trainer.model.model.layers[0].self_attn.q_proj.weight
    seen = []

    def spoil(gradient):
        if trainer.state.global_step == 2:
            seen.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
            return gradient * float("nan")
        return gradient

    weight.register_hook(spoil)
    with StopSignal() as stop, pytest.raises(BrokenStep, match="gradients of step 3 are not finite"):
        Run(make_settings(**changes), trainer, ["held out"], tmp_path, stop).train()
    assert all(torch.equal(value, seen[0][name]) for name, value in trainer.model.named_parameters())
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "iteration_00001",
        "iteration_00002",
    ]
    assert not (tmp_path / "final").exists()


def test_without_the_check_such_a_gradient_would_break_the_policy(tiny_policy, tmp_path, monkeypatch):
    """What a run on a GPU met: the next step's sampling fails, far from the cause."""
    monkeypatch.setattr(ConstrainedGRPOTrainer, "_get_grad_norm", lambda self, model, grad_norm=None: grad_norm)
    trainer = make_trainer(tiny_policy, tmp_path, StubScorer())
    trainer.model.model.layers[0].self_attn.q_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        trainer.train()
    assert trainer.state.global_step == 1
