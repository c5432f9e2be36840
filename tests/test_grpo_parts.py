"""The pieces of a GRPO step against naive oracles and the published script's results, and TRL's trainer with them in it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from grpo_trainer import StubScorer, make_trainer, rows_of
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer

from alignment.errors import UserError
from alignment.generation import TransformersEngine
from alignment.GRPO.data import prompts_that_fit, run_order
from alignment.GRPO.reward import ConstrainedReward, group_advantages
from alignment.GRPO.settings import load_settings
from alignment.GRPO.turns import own_turn
from alignment.lagrangian import LagrangeMultiplier
from alignment.prompts import draw_rows

NAN = float("nan")
YAML = Path(__file__).resolve().parents[1] / "alignment/GRPO/grpo_alignment.yaml"
NEEDED = ["--model_name", "m", "--scorer_url", "http://x:1"]


# ---- reward and lambda ----


def test_published_lambda_and_rewards(goldens):
    golden = json.loads((goldens / "lambda" / "lambda.json").read_text())
    combined = 0
    for name, config in golden["configs"].items():
        for sequence, costs in golden["costs"].items():
            wanted = golden["grpo"][name][sequence]
            multiplier = LagrangeMultiplier.from_settings(SimpleNamespace(**config, lambda_rule="published"))
            constraint = ConstrainedReward(multiplier, group_size=golden["batch"])
            verdicts = [
                constraint.judge(np.array(r), np.array(c)) for r, c in zip(golden["rewards"], costs, strict=True)
            ]
            rows = [verdict.metrics for verdict in verdicts]
            assert [row["lambda_used"] for row in rows] == pytest.approx(wanted["lambda"], rel=1e-12)
            assert [row["cost_ema"] for row in rows] == pytest.approx(wanted["jc_ema"], rel=1e-6, abs=1e-9)
            for verdict, values in zip(verdicts, wanted.get("combined", []), strict=False):
                values = np.array(values)
                assert verdict.metrics["objective"] == pytest.approx(values.mean(), abs=1e-5)
                z = (values - values.mean()) / (values.std(ddof=1) + 1e-4)
                assert verdict.advantages == pytest.approx(z, abs=1e-4)
                combined += 1
    assert combined


def judge(rewards, costs, group_size=4, aggregation="combined"):
    multiplier = LagrangeMultiplier(value=0.5, learning_rate=0.1, positive_part=False)
    return ConstrainedReward(multiplier, group_size, aggregation).judge(np.array(rewards), np.array(costs))


def many(rewards, costs, groups=20):
    """The given group first, then others, so that what is missing in it stays below 5 %."""
    rng = np.random.default_rng(0)
    more = rng.normal(size=(2, (groups - 1) * len(rewards)))
    return [*rewards, *more[0]], [*costs, *more[1]]


@pytest.mark.parametrize("aggregation", ["combined", "separate"])
def test_advantages_against_a_naive_oracle(aggregation):
    rng = np.random.default_rng(1)
    rewards, costs = rng.normal(size=12), rng.normal(size=12)

    def normal(values):
        return (values - sum(values) / 4) / (np.sqrt(sum((values - sum(values) / 4) ** 2) / 3) + 1e-4)

    for lam in (0.0, 0.7, 3.0):
        wanted = []
        for g in range(3):
            r, c = rewards[4 * g : 4 * g + 4], costs[4 * g : 4 * g + 4]
            combined = normal(r - lam * c)
            wanted += list(combined if aggregation == "combined" else (normal(r) - lam * normal(c)) / (1 + lam))
        assert group_advantages(rewards, costs, lam, 4, aggregation) == pytest.approx(wanted)


@pytest.mark.parametrize("aggregation", ["combined", "separate"])
def test_what_has_no_score_teaches_nothing_and_leaves_the_rest_alone(aggregation):
    rewards, costs = many([1.0, NAN, 3.0, 4.0], [0.0, 1.0, 0.5, 2.0])
    verdict = judge(rewards, costs, aggregation=aggregation)
    assert verdict.advantages[1] == 0
    assert verdict.taught.tolist()[:4] == [True, False, True, True]
    assert (verdict.metrics["scores_missing"], verdict.metrics["groups_unscorable"]) == (1, 0)
    lam = verdict.metrics["lambda_used"]
    three = group_advantages(np.array([1.0, 3.0, 4.0]), np.array([0.0, 0.5, 2.0]), lam, 3, aggregation)
    assert verdict.advantages[[0, 2, 3]] == pytest.approx(three)
    usable = np.isfinite(rewards)  # both scores of that completion are left out, of lambda as well
    assert verdict.metrics["cost_violation"] == pytest.approx(np.mean(np.array(costs)[usable]), rel=1e-6)


@pytest.mark.parametrize("scored", [0, 1])
def test_a_group_without_two_scores_teaches_nothing(scored):
    rewards, costs = many([1.0] * scored + [NAN] * (4 - scored), [1.0] * 4)
    verdict = judge(rewards, costs)
    assert not verdict.taught[:4].any()
    assert verdict.taught[4:].all()
    assert (verdict.advantages[:4] == 0).all()
    assert (verdict.metrics["groups_unscorable"], verdict.metrics["groups_equal"]) == (1, 0)


def test_equal_rewards_are_exactly_no_lesson():
    rewards, costs = many([-12.3] * 30, [0.1] * 30, groups=2)  # in float32 thirty of them come out as 0.009 each
    verdict = judge(rewards, costs, group_size=30)
    assert (verdict.advantages[:30] == 0).all()
    assert not verdict.taught[:30].any()
    assert (verdict.metrics["groups_equal"], verdict.metrics["completions_left_out"]) == (1, 30)


def test_too_many_missing_scores_stop_before_lambda_moves():
    constraint = ConstrainedReward(LagrangeMultiplier(value=0.5, learning_rate=0.1), 4)
    with pytest.raises(UserError, match="2 of 20 completions"):
        constraint.judge(np.array([NAN, NAN] + [1.0] * 18), np.ones(20))
    assert (constraint.multiplier.value, constraint.multiplier.cost_ema) == (0.5, None)


# ---- the policy's own turn ----


@pytest.fixture(scope="module")
def engine(tiny_policy):
    return TransformersEngine(tiny_policy)


def sampled(engine, text, finished=True):
    """(prompt ids, ids that a policy would have sampled to say `text`)."""
    prompt = engine.template.encode_prompt(engine.tokenizer, "say ASSISTANT: or USER: as you like")
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids[1:]  # the tokenizer's leading space mark: these texts bring their own space where they want one
    return prompt, ids + [engine.tokenizer.eos_token_id] * finished


@pytest.mark.parametrize(
    ("text", "response"),
    [
        (" Yes. USER: and then? ASSISTANT: no", " Yes."),
        (" Yes.\n\nUSER: and then?", " Yes."),
        (" smile \N{GRINNING FACE} USER: x", " smile \N{GRINNING FACE}"),
        (
            "\N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE}\nUSER: x",
            "\N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE}",
        ),
        (" USER: at once", ""),
    ],
)
def test_an_invented_turn_is_cut_and_closed(engine, text, response):
    prompt, tokens = sampled(engine, text)
    turn = own_turn(engine, prompt, tokens)
    assert turn.answer.response == response
    assert turn.answer.finished
    assert turn.closed
    assert turn.ids[-1] == engine.tokenizer.eos_token_id
    assert turn.ids[:-1] == tokens[: len(turn.ids) - 1]
    assert engine.read(prompt, turn.ids).raw == response  # what is trained on says what is scored


@pytest.mark.parametrize("text", [" the SUPERUSER: root", " ends here", "", " Xuser: x"])
def test_other_answers_are_left_as_they_are(engine, text):
    for finished in (True, False):
        prompt, tokens = sampled(engine, text, finished)
        turn = own_turn(engine, prompt, tokens)
        assert (turn.ids, turn.closed) == (tokens, False)
        assert turn.answer.finished == finished


# ---- data and settings ----


def test_a_sample_is_drawn_across_the_buckets_of_the_file(goldens):
    rows = [json.loads(line) for line in (goldens / "data/train_250_eval_500/custom_train_250.jsonl").open()]
    bucket = [(row["is_response_0_safe"], row["is_response_1_safe"]) for row in rows]
    assert len(set(bucket[:50])) == 1  # the files are grouped: their first rows are of one kind
    drawn = draw_rows(rows, 50)
    assert len({(row["is_response_0_safe"], row["is_response_1_safe"]) for row in drawn}) == len(set(bucket))
    assert drawn == draw_rows(rows, 50)
    assert [rows.index(row) for row in drawn] == sorted(rows.index(row) for row in drawn)
    assert draw_rows(rows, None) == draw_rows(rows, 9999) == rows


def test_the_order_of_a_longer_run_begins_like_that_of_a_shorter_one():
    prompts = [f"p{i}" for i in range(7)]
    long = run_order(prompts, 2, 50, seed=3)
    short = run_order(prompts, 2, 9, seed=3)
    assert long["row"][: len(short)] == list(short["row"])
    steps = np.array(long["row"]).reshape(50, 2)
    assert (steps[:, 0] != steps[:, 1]).all()
    assert set(long["row"]) == set(range(7))
    assert [prompts[row] for row in long["row"]] == list(long["prompt"])


def test_long_prompts_are_left_out(engine):
    prompts = ["short", "long " * 40]
    assert prompts_that_fit(engine, prompts, 100) == ["short"]
    with pytest.raises(UserError, match="max_prompt_length 20"):
        prompts_that_fit(engine, prompts, 20)


def test_the_published_config_is_read_and_its_step_is_the_same_on_any_number_of_processes():
    settings = load_settings(["--config", str(YAML), *NEEDED, "--beta", "0.1", "--seed", "7"])
    assert (settings.beta, settings.seed, settings.num_generations, settings.learning_rate) == (0.1, 7, 30, 5e-6)
    assert {processes: settings.accumulation(processes) for processes in (1, 2, 3, 4, 6)} == {
        1: 60,
        2: 30,
        3: 20,
        4: 15,
        6: 10,
    }
    settings.per_device_train_batch_size = 5
    assert settings.accumulation(4) == 3
    with pytest.raises(UserError, match="60 is not a multiple of 7"):
        settings.accumulation(7)
    settings.per_device_train_batch_size = 8
    with pytest.raises(UserError, match=r"\[1, 3, 5, 15\]"):
        settings.accumulation(4)
    settings.per_device_train_batch_size, settings.gradient_accumulation_steps = 1, 15
    assert settings.accumulation(4) == 15
    with pytest.raises(UserError, match="need 60: leave it out"):
        settings.accumulation(1)


def test_a_step_that_needs_more_prompts_than_there_are():
    settings = load_settings([*NEEDED, "--prompts_per_step", "2"])
    settings.check_enough(["a", "b"])
    with pytest.raises(UserError, match="2, but there are only 1 training prompts$"):
        settings.check_enough(["a"])
    with pytest.raises(UserError, match=r"only 1 training prompts \(of at most max_prompt_length tokens\)$"):
        settings.check_enough(["a"], "training prompts (of at most max_prompt_length tokens)")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--num_train_epochs", "1"], "max_steps"),
        (["--per-device-eval-batch-size=2"], "eval_batch_size"),
        (["--project", "x"], "wandb_project"),
        (["--betta", "0.1"], "did you mean '--beta'"),
        (["--loss_type", "ppo"], "'ppo'"),
        (["--lr_scheduler_type", "constnat"], "constant"),
        (["--lambda_min", "9"], "lambda_min"),
        (["--use_vllm", "--vllm_mode", "server"], "vllm_server_base_url"),
        (["--lora_alpha", "16"], "lora_alpha is given, but lora_rank is 0"),
        (["--lora_targets", "q_proj"], "lora_targets is given, but lora_rank is 0"),
    ],
)
def test_mistakes_in_the_settings(flags, word):
    with pytest.raises(UserError, match=word):
        load_settings([*NEEDED, *flags])


def test_settings_that_a_run_does_not_use_do_not_decide_it():
    """A run that an earlier version began with them can be gone on with without them, as it was."""
    plain, warm, lora = (
        load_settings([*NEEDED, *flags]).deciding()
        for flags in ([], ["--warmup_steps", "3"], ["--lora_rank", "2", "--lora_alpha", "16"])
    )
    assert not {"warmup_steps", "lora_alpha", "lora_targets"} & plain.keys()
    assert (plain["lr_scheduler_type"], plain["lora_rank"]) == ("constant", 0)
    assert (warm["lr_scheduler_type"], warm["warmup_steps"]) == ("constant_with_warmup", 3)
    assert (lora["lora_rank"], lora["lora_alpha"], len(lora["lora_targets"])) == (2, 16.0, 7)


def test_a_retired_key_in_a_file_names_its_replacement(tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("scorer_batch_size_eval: 32\n")
    with pytest.raises(UserError, match=r"old.yaml: key 'scorer_batch_size_eval' is retired: scorer_batch_size"):
        load_settings(["--config", str(path), *NEEDED])


# ---- TRL's trainer with the constraint in it, one process, no service ----


def test_what_is_scored_and_what_is_trained_on(tiny_policy, tmp_path, monkeypatch):
    scorer = StubScorer()
    trainer = make_trainer(tiny_policy, tmp_path, scorer)
    said = [" a USER: x", " bc", "", " USER: y", " d", " e", " f ASSISTANT: g", " h"]
    whole = [sampled(trainer.engine, text, finished=text != " bc")[1] for text in said]
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", lambda self, ids, *more: ([list(i) for i in whole], None))
    inputs = rows_of(trainer)
    output = trainer._generate_and_score_completions(inputs)

    bare = [row["prompt"] for row in inputs]
    assert [prompt for prompt, _, _ in scorer.seen] == bare
    assert "ASSISTANT: or USER:" in bare[0]
    assert [response for _, response, _ in scorer.seen] == [" a", " bc", "", "", " d", " e", " f ASSISTANT: g", " h"]
    assert [finished for _, _, finished in scorer.seen] == [True, False] + [True] * 6
    for row, text in enumerate(bare):
        ids = output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist()
        assert ids == trainer.engine.template.encode_prompt(trainer.engine.tokenizer, text)
    trained = (output["completion_mask"] * output["tool_mask"]).sum(1).tolist()
    # Characters, and the EOS that the policy sampled itself; of a closed turn the EOS is not trained on.
    assert trained == [2, 3, 1, 0, 3, 3, len(" f ASSISTANT: g") + 1, 3]
    assert output["num_items_in_batch"] == sum(trained)
    assert trainer.step_metrics["cut_share"] == 2 / 8
    assert trainer.step_metrics["unfinished_share"] == 1 / 8
    trainer.current_gradient_accumulation_steps = 1
    assert torch.isfinite(trainer.compute_loss(trainer.model, output))


def test_missing_scores_and_flat_groups_in_the_trainer(tiny_policy, tmp_path):
    def change(prompts, responses, rewards, costs):
        rewards[0] = NAN  # one of the first group
        rewards[4:8], costs[4:8] = 1.5, 0.5  # the second is all equal
        return rewards, costs

    trainer = make_trainer(
        tiny_policy, tmp_path, StubScorer(change), prompts_per_step=8, per_device_train_batch_size=32
    )
    output = trainer._generate_and_score_completions(rows_of(trainer))
    assert (output["advantages"][[0, 4, 5, 6, 7]] == 0).all()
    assert output["tool_mask"][[0, 4, 5, 6, 7]].sum() == 0
    assert (output["tool_mask"].sum(1)[8:] > 0).any()
    metrics = trainer.step_metrics
    assert (metrics["scores_missing"], metrics["groups_equal"], metrics["completions_left_out"] >= 5) == (1, 1, True)


def test_a_whole_group_without_scores_in_the_trainer(tiny_policy, tmp_path):
    def change(prompts, responses, rewards, costs):
        rewards[:2] = NAN
        return rewards, costs

    changes = {"num_generations": 2, "prompts_per_step": 24, "per_device_train_batch_size": 48, "max_steps": 1}
    trainer = make_trainer(tiny_policy, tmp_path, StubScorer(change), **changes)
    trainer.train()
    metrics = trainer.step_metrics
    assert (metrics["scores_missing"], metrics["groups_unscorable"]) == (2, 1)
    assert not trainer._verdict.taught[:2].any() and trainer._verdict.taught.any()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())


def test_advantages_are_trls_own_where_all_is_well(tiny_policy, tmp_path, monkeypatch):
    trainer = make_trainer(tiny_policy, tmp_path, StubScorer())
    theirs = {}
    whole = GRPOTrainer._generate_and_score_completions

    def keep(self, inputs):
        output = whole(self, inputs)
        theirs["advantages"] = output["advantages"].clone()
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", keep)
    output = trainer._generate_and_score_completions(rows_of(trainer))
    assert output["advantages"].abs().max() > 0.5
    assert torch.allclose(output["advantages"], theirs["advantages"], atol=1e-4)


def test_equal_rewards_do_not_move_the_weights(tiny_policy, tmp_path):
    """With beta 0.1 and AdamW: the KL term and the momentum of earlier steps would both move them."""
    live = [True]

    def change(prompts, responses, rewards, costs):
        return (rewards, costs) if live[0] else (np.full(len(prompts), -12.3), np.full(len(prompts), 0.1))

    trainer = make_trainer(tiny_policy, tmp_path, StubScorer(change))
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append({name: value.detach().clone() for name, value in trainer.model.named_parameters()})
            live[0] = state.global_step < 2

    trainer.add_callback(Watch())
    trainer.train()
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert all(torch.equal(seen[1][name], seen[3][name]) for name in seen[0])


def test_a_step_of_answers_that_are_all_masked_does_not_move_the_weights(tiny_policy, tmp_path):
    """mask_truncated_completions: no token is left to train on, though advantages are not 0."""
    changes = {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 3}
    trainer = make_trainer(tiny_policy, tmp_path, StubScorer(), **changes)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    momentum = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, *_, **__):
            momentum.append(len(trainer.optimizer.state))

    trainer.add_callback(Watch())
    trainer.train()
    assert not trainer.teaches and trainer._verdict.taught.any()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert momentum == [0, 0, 0]  # not even AdamW's


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup"])
def test_a_constant_learning_rate_warms_up_when_told_to(tiny_policy, tmp_path, schedule):
    trainer = make_trainer(tiny_policy, tmp_path, StubScorer(), lr_scheduler_type=schedule, warmup_steps=2)
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.01])


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_checkpoint_is_not_begun_without_room_for_weights_and_moments(tiny_policy, tmp_path, monkeypatch, lora_rank):
    trainer = make_trainer(tiny_policy, tmp_path / "run", StubScorer(), lora_rank=lora_rank, max_steps=1)
    trainer.train()
    trained = sum(value.nbytes for value in trainer.model.parameters() if value.requires_grad)
    free = [3 * trained - 1]
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(total=2**40, free=free[0]))
    with pytest.raises(UserError, match=r"iteration_00001 needs \S+ GiB and its disk has \S+ GiB left"):
        trainer.save_whole(tmp_path / "iteration_00001")
    assert not (tmp_path / "iteration_00001").exists()
    free[0] += 1
    trainer.save_whole(tmp_path / "iteration_00001")
    written = (tmp_path / "iteration_00001").glob("*")
    assert sum(path.stat().st_size for path in written if path.suffix in (".safetensors", ".pt")) >= 3 * trained


def test_lora_starts_at_the_base_and_is_saved_merged(tiny_policy, tmp_path):
    trainer = make_trainer(tiny_policy, tmp_path, StubScorer(), lora_rank=2, max_steps=2)
    base = AutoModelForCausalLM.from_pretrained(str(tiny_policy)).state_dict()
    trainer.train()
    trainer.engine.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, base[name])}
    assert changed
    assert all("proj" in name for name in changed)
    ids = torch.tensor([[1, 300, 301, 302]])
    trainer.model.eval()
    assert torch.allclose(merged(ids).logits, trainer.model(ids).logits, atol=1e-4)
