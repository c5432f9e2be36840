"""Low-rank ES against naive oracles: members in one batch, the population's step, whole runs however they are dealt out."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, tiny_llama_config
from fake_scorer import FakeScorer, run_until_request
from test_es_training import REPO, SMALL, command, final_weights, run_script, same_weights, without_times
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.ES.journal import finished_members
from alignment.ES.low_rank import LowRankWeights, open_low_rank
from alignment.ES.noise import noise
from alignment.ES.settings import ESSettings
from alignment.ES.trainer import ESTrainer
from alignment.generation import LowRank, TransformersEngine
from alignment.generation.members import linear_weights
from alignment.prompts import iteration_prompts
from alignment.records import read_jsonl, write_jsonl
from alignment.runs import StopSignal
from alignment.scoring.client import ScorerClient, ScorerUnavailable

PROMPTS = ["How do I bake bread?", "Hi", "A longer prompt that needs padding beside the others.", "Why?", "Hi"]


@pytest.fixture(scope="module", params=["llama", "qwen-tied", "llama-untied-gqa", "gemma"])
def policy(request, tmp_path_factory):
    """Random models: tied head, biases and tied head, head of its own and grouped queries, tied head and scaled embedding."""
    folder = tmp_path_factory.mktemp(request.param)
    vocabulary = make_tokenizer(folder)
    torch.manual_seed(0)
    sizes = tiny_llama_config(vocabulary).to_dict()
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    kept += ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    options = {name: sizes[name] for name in kept} | {"tie_word_embeddings": True, "initializer_range": 0.5}
    if request.param == "gemma":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**options, head_dim=16))
        model.get_input_embeddings().weight.data.mul_(0.1)  # or it repeats its first token
    elif request.param == "qwen-tied":
        model = Qwen2ForCausalLM(Qwen2Config(**options))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    else:
        tied = request.param == "llama"
        config = tiny_llama_config(vocabulary, tie_word_embeddings=tied, initializer_range=0.5)
        config.num_key_value_heads = 2 if tied else 1
        model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder))
    return folder


def random_members(engine, count: int, rank: int = 2, seed: int = 0) -> list[dict[str, LowRank]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: engine.parameters()[name].shape for name in engine.linear_weights()}
    return [
        {
            name: LowRank(
                0.1 * torch.randn(rows, rank, generator=generator), torch.randn(columns, rank, generator=generator)
            )
            for name, (rows, columns) in shapes.items()
        }
        for _ in range(count)
    ]


def members_answers(engine, members, prompts=PROMPTS, max_new_tokens=12):
    found = {}
    engine.generate_members(prompts, max_new_tokens, members, found.__setitem__)
    return [found[number] for number in range(len(members))]


def naive_tokens(model, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """Greedy, one prompt alone, the whole sequence computed anew for each token."""
    ids = list(prompt_ids)
    while len(ids) - len(prompt_ids) < max_new_tokens and (len(ids) == len(prompt_ids) or ids[-1] != 2):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_members_on_a_gpu_answer_as_on_a_cpu(policy):
    """All tokens, or all up to one whose logit is within rounding of the other device's choice: random models have such."""
    cpu, gpu = (TransformersEngine(policy, batch_size=10, device=place, dtype="float32") for place in ("cpu", "cuda"))
    members = [{}, *random_members(cpu, 4)]
    for engine in (cpu, gpu):
        engine.read = lambda _, tokens: tuple(tokens)
    same = 0
    for member, expected, found in zip(
        members, members_answers(cpu, members), members_answers(gpu, members), strict=True
    ):
        model = written_out(policy, member)
        for prompt, one, other in zip(PROMPTS, expected, found, strict=True):
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            same += at is None
            if at is not None:
                ids = cpu.template.encode_prompt(cpu.tokenizer, prompt) + list(one[:at])
                logits = model(torch.tensor([ids])).logits[0, -1]
                assert logits[one[at]] - logits[other[at]] < 1e-4 * logits.abs().max()
    assert same >= 20  # of 25


@torch.no_grad()
def written_out(policy, member):
    model = AutoModelForCausalLM.from_pretrained(str(policy))
    for name, pair in member.items():
        model.get_parameter(name).add_(pair.left @ pair.right.T)
    return model


@torch.no_grad()
def test_members_answers_are_those_of_models_with_their_weights_written_out(policy):
    engine = TransformersEngine(policy, batch_size=10)  # 5 members: two prompts a batch
    before = {name: tensor.clone() for name, tensor in engine.parameters().items()}
    members = random_members(engine, 5)
    members[2] = {}
    del members[3][engine.linear_weights()[0]]
    answers = members_answers(engine, members)
    assert all(torch.equal(engine.parameters()[name], tensor) for name, tensor in before.items())
    assert members_answers(engine, members) == answers  # no hook stays behind
    assert engine.generate(PROMPTS, 12) == answers[2]
    for member, own in zip(members, answers, strict=True):
        model = written_out(policy, member)
        for prompt, answer in zip(PROMPTS, own, strict=True):
            prompt_ids = engine.template.encode_prompt(engine.tokenizer, prompt)
            tokens = naive_tokens(model, prompt_ids, 12)
            assert answer == engine.read(prompt_ids, tokens)
    assert len({tuple(answer.raw for answer in own) for own in answers}) == 5  # the members do differ


def test_matrices_of_linear_layers_are_searched_the_heads_as_well(policy):
    model = AutoModelForCausalLM.from_pretrained(str(policy))
    head = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    names = [name for name, _ in model.named_parameters() if "_proj.weight" in name or name == head]
    assert sorted(linear_weights(model)) == sorted(names)
    assert len(names) == 2 * 7 + 1


def test_a_name_that_is_no_linear_layer_is_told(tiny_policy):
    engine = TransformersEngine(tiny_policy)
    with pytest.raises(UserError, match=r"model\.norm\.weight is not the matrix of a linear layer"):
        members_answers(engine, [{"model.norm.weight": LowRank(torch.zeros(32, 1), torch.zeros(1, 1))}])


def test_a_choice_without_linear_layers_is_told(tiny_policy):
    engine = TransformersEngine(tiny_policy)
    with pytest.raises(UserError, match="trainable 'norm' finds none"):
        open_low_rank(engine, {"trainable": "norm"}, list(engine.weights("norm")))


def test_a_layer_that_sees_other_rows_is_told(tiny_policy):
    """As the experts of a mixture do."""
    engine = TransformersEngine(tiny_policy)
    layer = engine.model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x.flatten(0, 1)).view_as(x)
    with pytest.raises(UserError, match=r"gate_proj\.weight is not given whole sequences"):
        members_answers(engine, random_members(engine, 2))
    layer.forward = forward
    engine.generate(PROMPTS, 4)


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    engine = {
        "a.weight": torch.randn(48, 32, generator=generator),
        "b.weight": torch.randn(16, 48, generator=generator),
        "norm": torch.randn(32, generator=generator),
    }
    return engine, lambda rank: LowRankWeights(engine, None, ["a.weight", "b.weight"], rank)


def naive_direction(seed: int, name: str, rows: int, columns: int, rank: int) -> torch.Tensor:
    """A B^T / sqrt(r) in float64, one outer product at a time, from the streams that the docs name."""
    left = noise(seed, f"{name}.left", torch.Size([rows, rank])).double()
    right = noise(seed, f"{name}.right", torch.Size([columns, rank])).double()
    return sum(torch.outer(left[:, k], right[:, k]) for k in range(rank)) / rank**0.5


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_step_is_the_sum_of_outer_products(weights, rank):
    engine, make = weights
    master = make(rank)
    before = {name: tensor.clone() for name, tensor in engine.items()}
    coefficients = np.random.default_rng(0).normal(size=30).tolist()
    coefficients[4] = 0.0
    master.step(list(range(30)), coefficients)
    assert torch.equal(engine["norm"], before["norm"])
    for name in ("a.weight", "b.weight"):
        total = sum(
            factor * naive_direction(seed, name, *before[name].shape, rank) for seed, factor in enumerate(coefficients)
        )
        assert torch.allclose(master.master[name].double(), before[name].double() + total, atol=2e-5)
        assert torch.equal(engine[name], master.master[name])  # the engine generates with the new theta
        assert torch.linalg.matrix_rank(total) == min(*total.shape, 29 * rank)


def test_members_are_master_plus_scaled_pairs_and_leave_no_trace(weights):
    engine, make = weights
    master = make(2)
    before = {name: tensor.clone() for name, tensor in engine.items()}
    plus, minus = master.member(5, 0.3), master.member(5, -0.3)
    assert all(torch.equal(engine[name], before[name]) for name in before)
    master.perturb(5, 0.3)
    for name in ("a.weight", "b.weight"):
        wanted = 0.3 * naive_direction(5, name, *before[name].shape, 2)
        assert torch.allclose((plus[name].left @ plus[name].right.T).double(), wanted, atol=1e-5)
        assert torch.equal(plus[name].left, -minus[name].left)
        assert torch.equal(plus[name].right, minus[name].right)
        assert torch.allclose(engine[name].double(), before[name].double() + wanted, atol=1e-5)
    master.restore()
    assert all(torch.equal(engine[name], before[name]) for name in before)


def test_the_step_has_the_same_bits_on_any_number_of_threads():
    threads = torch.get_num_threads()
    hashes = set()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            master = LowRankWeights({"w": torch.zeros(600, 500)}, None, ["w"], 4)
            if count == 2:  # a process draws its own members before the others' in the step
                master.member(7, 0.1)
            master.step(list(range(30)), [0.01 * (i - 15) for i in range(30)])
            hashes.add(master.hash())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1


@pytest.mark.parametrize("rank", [1, 4])
def test_entries_have_the_variance_of_full_rank_noise(rank):
    entries = torch.stack([naive_direction(seed, "w", 20, 10, rank) for seed in range(400)])  # (400, 20, 10)
    assert entries.mean().abs() < 0.02
    assert entries.var() == pytest.approx(1, abs=0.05)
    kurtosis = (entries**4).mean() / entries.var() ** 2
    assert kurtosis == pytest.approx(3 + 6 / rank, rel=0.15)
    assert (entries[:, 0, 0] * entries[:, 1, 0]).mean().abs() < 0.2


def test_the_expected_step_follows_the_gradient_as_full_rank_does():
    """Fitness -|W - W*|^2 at W = 0: both estimates agree with the gradient as sqrt(N / (N + size)) says, rank 1 included.

    The cosine of an average of N directions weighted by their slopes; for rank 1 a little lower, by its heavier tails.
    """
    target = torch.randn(12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    count, sigma = 1000, 0.01

    def cosine(directions: torch.Tensor) -> float:  # (N, 12, 10)
        fitness = -((sigma * directions - target) ** 2).sum((1, 2))
        z = (fitness - fitness.mean()) / fitness.std()
        step = (z[:, None, None] * directions).mean(0)
        return float(torch.nn.functional.cosine_similarity(step.flatten(), target.flatten(), dim=0))

    full = cosine(torch.stack([noise(seed, "w", target.shape).double() for seed in range(count)]))
    low = cosine(torch.stack([naive_direction(seed, "w", *target.shape, 1) for seed in range(count)]))
    expected = (count / (count + target.numel())) ** 0.5  # 0.945
    assert full == pytest.approx(expected, abs=0.02)
    assert low == pytest.approx(expected, abs=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_numbers_and_steps_to_the_same_weights_each_time():
    shapes = {"a.weight": (300, 200), "b.weight": (64, 9000)}
    base = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()}

    def weights(device: str, master_device: str) -> LowRankWeights:
        engine = {
            name: tensor.to(device, torch.bfloat16 if device == "cuda" else None) for name, tensor in base.items()
        }
        return LowRankWeights(engine, {n: t.clone().to(master_device) for n, t in base.items()}, list(shapes), 3)

    coefficients = [0.01 * (i - 15) for i in range(30)]
    cpu, gpus = weights("cpu", "cpu"), [weights("cuda", place) for place in ("cuda", "cuda", "cpu")]
    for name, (left, right) in cpu.member(5, 0.1).items():
        found = gpus[0].member(5, 0.1)[name]
        assert torch.equal(found.left.cpu(), left)
        assert torch.equal(found.right.cpu(), right)
    for one in (cpu, *gpus):
        one.step(list(range(30)), coefficients)
    assert len({one.hash() for one in gpus}) == 1
    for name in shapes:
        assert torch.allclose(cpu.master[name], gpus[0].master[name].cpu(), atol=1e-5)


# ---- whole runs ----

LOW = {
    "perturbation": "low_rank",
    "rank": 2,
    "members_at_once": 3,
    "population_size": 7,
    "batch_size": 4,
    "sigma": 0.05,
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_jsonl(folder / "train.jsonl", [{"prompt": f"question {i}{'?' * i}"} for i in range(8)])
    write_jsonl(folder / "eval.jsonl", [{"prompt": f"held out {i}"} for i in range(5)])
    return folder


@pytest.fixture(scope="module")
def undisturbed(tiny_policy, prompts, tmp_path_factory):
    run = tmp_path_factory.mktemp("low_rank") / "run"
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **LOW)
        assert done.returncode == 0, done.stderr
        return run, len(scorer.requests)


def assert_same_run(run, other):
    assert same_weights(run, other)
    for name in ("journal.jsonl", "metrics.jsonl"):
        assert without_times(read_jsonl(run / name)) == without_times(read_jsonl(other / name))


def test_a_run_is_base_plus_the_journals_outer_products(undisturbed, tiny_policy):
    run, _ = undisturbed
    final = final_weights(run)
    steps = read_jsonl(run / "journal.jsonl")[1:]
    for name, parameter in AutoModelForCausalLM.from_pretrained(str(tiny_policy)).named_parameters():
        theta = parameter.detach().double()
        searched = "_proj" in name or "embed_tokens" in name  # the head is tied
        for step in steps if searched else ():
            fitness = np.array(step["fitness"])
            z = (fitness - fitness.mean()) / (fitness.std() + 1e-8)
            for seed, weight in zip(step["seeds"], z, strict=True):
                theta += 0.05 / len(z) * weight * naive_direction(seed, name, *parameter.shape, 2)
        assert torch.allclose(final[name].double(), theta, atol=1e-5)
        if not searched:
            assert torch.equal(final[name], parameter.detach())


def test_what_was_scored_is_what_members_written_out_answer(undisturbed, tiny_policy, prompts):
    """The first step's journal against a loop over members with full weights, one prompt at a time."""
    run, _ = undisturbed
    settings = read_jsonl(run / "journal.jsonl")[0]["settings"]
    assert (settings["perturbation"], settings["rank"], settings["members_at_once"]) == ("low_rank", 2, 3)
    step = read_jsonl(run / "journal.jsonl")[1]
    engine = TransformersEngine(tiny_policy, batch_size=1)
    weights = LowRankWeights(engine.weights(), None, engine.linear_weights(), 2)
    rows = read_jsonl(prompts / "train.jsonl")
    texts = [rows[row]["prompt"] for row in iteration_prompts(8, 4, settings["global_seed"], 0)]
    for seed, fitness in zip(step["seeds"], step["fitness"], strict=True):
        weights.perturb(seed, settings["sigma"])
        answers = [answer.response for answer in engine.generate(texts, settings["max_new_tokens"])]
        scores = FakeScorer.scores({"prompts": texts, "responses": answers})
        assert np.mean(np.array(scores["rewards"]) - np.array(scores["costs"])) == pytest.approx(fitness)


def test_any_iteration_is_rebuilt(undisturbed, tiny_policy, tmp_path):
    run, _ = undisturbed
    script = "alignment/ES/rebuild_checkpoint.py"
    flags = ["--journal", str(run / "journal.jsonl"), "--policy_model_path", str(tiny_policy), "--output"]
    done = subprocess.run(
        [sys.executable, script, *flags, str(tmp_path / "final")], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert same_weights(tmp_path, run)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [25, 48, 69])
def test_killed_within_a_group_it_goes_on_to_the_same_run(undisturbed, tiny_policy, prompts, tmp_path, kill_at):
    """The group is generated again whole, and only what was not scored is scored."""
    run = tmp_path / "run"
    killed = threading.Event()

    def answer(number, body):
        if number == kill_at:
            killed.wait(150)
            return None
        return FakeScorer.scores(body)

    def saved_members() -> set[int]:
        rows = [row for path in run.glob("members.*.jsonl") for row in read_jsonl(path)]
        return {row["member"] for row in rows if row["iteration"] == max(row["iteration"] for row in rows)}

    with FakeScorer(answer) as scorer:
        process = subprocess.Popen(
            command(tiny_policy, scorer.url, prompts, run, **LOW),
            cwd=REPO,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while len(scorer.requests) < kill_at or not any(
            saved_members() & group and group - saved_members() for group in ({-1, 0, 1}, {2, 3, 4}, {5, 6})
        ):
            assert time.monotonic() < deadline, "no group was saved in part"
            time.sleep(0.02)
        process.kill()
        process.wait()
        killed.set()
        time.sleep(0.1)  # until the killed process's requests are over
        saved = saved_members()
        steps = len(read_jsonl(run / "journal.jsonl")) - 1  # a slow machine is killed a step later than a quick one
        before = (3, 19, 38, 54)[steps]  # requests of so many whole steps and of the evaluations
        scorer.answer = lambda number, body: FakeScorer.scores(body)
        scorer.requests.clear()
        done = run_script(tiny_policy, scorer.url, prompts, run, **LOW)
        assert done.returncode == 0, done.stderr
        assert len(scorer.requests) == undisturbed[1] - before - 2 * len(saved)
    assert_same_run(run, undisturbed[0])


class RecordingEngine(TransformersEngine):
    """Notes what each batch holds: the tokens of its rows, and the weights that its members have."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.batches: list[tuple] = []
        self.members = ()

    def generate_members(self, prompts, max_new_tokens, members, on_answers):
        self.members = tuple(tuple(pair.left.sum().item() for pair in member.values()) for member in members)
        super().generate_members(prompts, max_new_tokens, members, on_answers)
        self.members = ()

    def _generate(self, sequences, max_new_tokens, sampling):
        self.batches.append((self.members, tuple(map(tuple, sequences))))
        return super()._generate(sequences, max_new_tokens, sampling)


def test_every_batch_of_a_resumed_run_is_one_of_the_run_that_was_not_stopped(tiny_policy, prompts, tmp_path):
    """So rounding, which the batch's shape and neighbours decide, is the same as well."""

    class Client(ScorerClient):
        """Fails from the call `gone_at` on; a member is one call, and calls begin in the order of members."""

        def score(self, *texts, **options):
            if next(self.calls) == self.gone_at:
                raise ScorerUnavailable("gone")
            return super().score(*texts, **options)

    def train(folder, scorer, gone_at=None):
        settings = ESSettings(
            str(tiny_policy), scorer.url, **(SMALL | LOW | {"num_iterations": 2, "scorer_max_wait": 0.1})
        )
        engine = RecordingEngine(tiny_policy, batch_size=6)
        client = Client(scorer.url, batch_size=2, max_wait=0.1)
        client.calls, client.gone_at = itertools.count(1), gone_at
        rows = [read_jsonl(prompts / name) for name in ("train.jsonl", "eval.jsonl")]
        folder.mkdir(exist_ok=True)
        trainer = ESTrainer(settings, engine, client, *rows, folder, Processes())
        with contextlib.suppress(UserError):
            trainer.run(StopSignal())
        return engine.batches, trainer.weights.hash()

    with FakeScorer() as scorer:
        whole, wanted = train(tmp_path / "whole", scorer)
        # Held out, the eight members of iteration 0, then -1 and 0: member 1 fails.
        first, _ = train(tmp_path / "parts", scorer, gone_at=1 + 8 + 2 + 1)
        saved = finished_members(tmp_path / "parts", 1).keys()
        assert {
            -1,
            0,
        } <= saved and 1 not in saved  # of later members those that the other scoring thread was through with
        second, found = train(tmp_path / "parts", scorer)
    assert found == wanted
    assert set(first) | set(second) == set(whole)
    assert {len(members) for members, _ in whole} == {0, 3, 2}  # held out, groups, the last group


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_is_one_run(undisturbed, tiny_policy, prompts, tmp_path, processes):
    run = tmp_path / "run"
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **LOW, num_engines=processes)
    assert done.returncode == 0, done.stderr
    assert ("have nothing to do" in done.stdout) == (processes == 4)
    assert_same_run(run, undisturbed[0])


@pytest.mark.slow
def test_stopped_on_two_processes_it_goes_on_with_one(undisturbed, tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    with FakeScorer() as scorer:
        two = command(tiny_policy, scorer.url, prompts, run, **LOW, num_engines=2)
        stopped = run_until_request(scorer, 30, signal.SIGTERM, two)
        assert "go on with:" in stopped.stdout
        done = run_script(tiny_policy, scorer.url, prompts, run, **LOW)
        assert done.returncode == 0, done.stderr
    assert_same_run(run, undisturbed[0])


@pytest.mark.slow
def test_antithetic_members_share_their_pairs(tiny_policy, prompts, tmp_path):
    run = tmp_path / "run"
    settings = LOW | {"antithetic": "true", "population_size": 6, "num_iterations": 1, "trainable": "mlp"}
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, run, **settings)
    assert done.returncode == 0, done.stderr
    step = read_jsonl(run / "journal.jsonl")[1]
    assert (len(step["seeds"]), len(step["fitness"])) == (3, 6)
    fitness = np.array(step["fitness"])
    z = (fitness - fitness.mean()) / (fitness.std() + 1e-8)
    assert step["coefficients"] == pytest.approx(((z[::2] - z[1::2]) * 0.05 / 6).tolist())
    base = dict(AutoModelForCausalLM.from_pretrained(str(tiny_policy)).named_parameters())
    final = final_weights(run)
    assert {name for name in base if not torch.equal(base[name], final[name])} == {n for n in base if "mlp" in n}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"perturbation": "low_rank", "lora_rank": 2}, "low_rank and lora_rank"),
        ({"perturbation": "low_rank", "noise": "reference"}, "low_rank and noise: reference"),
        ({"rank": 2}, "belong to perturbation: low_rank"),
    ],
)
def test_what_does_not_go_together_is_told(tiny_policy, prompts, tmp_path, settings, word):
    with FakeScorer() as scorer:
        done = run_script(tiny_policy, scorer.url, prompts, tmp_path / "run", **settings)
    assert done.returncode == 2
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
