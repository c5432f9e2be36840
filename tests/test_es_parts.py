"""The pieces of an ES step against naive oracles and the published scripts' results."""

import json
from statistics import NormalDist

import numpy as np
import pytest
import torch

from alignment.ES.fitness import FitnessRule, shape, usable_scores, z_scores
from alignment.ES.noise import BLOCK, COUNTERS, member_seed, noise, philox, philox_words, stream_key
from alignment.ES.weights import MasterWeights, ReferenceWeights
from alignment.prompts import iteration_prompts


def test_published_fitness(goldens):
    golden = json.loads((goldens / "lambda" / "lambda.json").read_text())["es_fitness"]
    for case in golden["cases"]:
        rule = FitnessRule(
            standardize="reference" if case["standardize_within_batch"] else "none",
            safe_first=case["safe_first"],
            safe_first_factor=case["safe_first_factor"],
        )
        fitness = rule.member_fitness(np.array([golden["rewards"]]), np.array([golden["costs"]]), golden["lambda"])
        assert fitness == pytest.approx([case["mean_combined"]], rel=1e-6)


def test_published_z_scores(goldens):
    golden = json.loads((goldens / "es" / "es_worker.json").read_text())["update"]
    assert z_scores(np.array(golden["mean_combined"])) == pytest.approx(golden["norm_reward"], rel=1e-12)


def test_fitness_is_the_mean_of_the_combined_scores():
    rng = np.random.default_rng(0)
    rewards, costs = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    fitness = FitnessRule(safe_first=True, safe_first_factor=0.3).member_fitness(rewards, costs, 1.7)
    for i in range(5):
        total = 0.0
        for r, c in zip(rewards[i], costs[i], strict=True):
            total += (0.3 * r if c > 0 else r) - 1.7 * c
        assert fitness[i] == pytest.approx(total / 7)


def test_standardising_by_the_population_keeps_members_in_order():
    """A member whose scores are all higher must not lose by its spread, as it can under the published rule."""
    rewards = np.array([[1.0, 1.1, 0.9], [9.0, 1.0, 2.0]])
    costs = np.array([[-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]])
    population = FitnessRule("population").member_fitness(rewards, costs, 1.0)
    reference = FitnessRule("reference").member_fitness(rewards, costs, 1.0)
    assert population[1] > population[0]
    assert reference[1] < reference[0]


@pytest.mark.parametrize("shaping", ["z_score", "centered_rank"])
@pytest.mark.parametrize("fitness", [[1.5] * 4, [3.0], [0.1 + 0.2, 0.3, 0.3], [0.0, 0.0]])
def test_equal_members_give_no_step(fitness, shaping):
    assert shape(np.array(fitness), shaping).tolist() == [0.0] * len(fitness)


def test_centered_ranks_are_those_of_a_naive_loop():
    fitness = np.array([3.0, -1.0, 3.0, 100.0, 0.5, 0.5, 0.5])
    n = len(fitness)
    wanted = []
    for mine in fitness:
        below, equal = sum(other < mine for other in fitness), sum(other == mine for other in fitness)
        rank = sum(range(below, below + equal)) / equal
        wanted.append(rank / (n - 1) - 0.5)
    got = shape(fitness, "centered_rank")
    assert got / got.max() == pytest.approx(np.array(wanted) / max(wanted))
    distinct = shape(np.random.default_rng(0).normal(size=30), "centered_rank")
    assert distinct.mean() == pytest.approx(0, abs=1e-12)
    assert distinct.var() == pytest.approx(1)  # as z-scores have, so that alpha keeps its meaning


def test_a_lost_member_does_not_cost_the_others_their_prompts():
    rewards = np.ones((4, 3))
    costs = np.zeros((4, 3))
    rewards[1] = np.nan  # a member without any score
    costs[2, 0] = np.nan  # one prompt of another
    members, prompts = usable_scores(rewards, costs)
    assert members.tolist() == [True, False, True, True]
    assert prompts.tolist() == [False, True, True]


def test_noise_is_standard_normal_and_independent_between_parameters_and_members():
    shape = torch.Size([200, 500])
    first = noise(1, "a", shape)
    assert first.dtype == torch.float32
    values = first.double().flatten()
    n = values.numel()
    assert abs(values.mean()) < 4 / n**0.5
    assert abs(values.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((values**4).mean() - 3) < 4 * (96 / n) ** 0.5
    for other in (noise(1, "b", shape), noise(2, "a", shape), noise(1, "a", torch.Size([500, 200])).reshape(200, 500)):
        if torch.equal(other, first):
            continue  # the same name and number of values: the same stream in another shape
        assert abs((first * other).double().mean()) < 4 / n**0.5
    assert torch.equal(first, noise(1, "a", shape))


def test_the_generator_is_philox_with_seven_rounds():
    """The known answers that its authors publish with Random123 (philox4x32 7), and an independent implementation."""

    def reference(counter, key):
        a, b, c, d = counter
        for i in range(7):
            low, high = a * 0xD2511F53, c * 0xCD9E8D57
            k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
            a, b, c, d = (high >> 32) ^ b ^ k0, high % 2**32, (low >> 32) ^ d ^ k1, low % 2**32
        return a, b, c, d

    assert reference((0, 0, 0, 0), (0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    ones = 2**32 - 1
    for counter, key in (((0, 0, 0, 0), (0, 0)), ((ones,) * 4, (ones, ones)), ((1, 2, 3, 4), (5, 6))):
        words = philox_words(*(torch.tensor([word]) for word in counter), key)
        assert tuple(int(word) for word in words) == reference(counter, key)


def test_every_element_is_a_quantile_of_its_own_sixteen_bits():
    """A naive loop over the definition in the module's docstring."""
    count = 3 * BLOCK + 1234
    values = noise(7, "layer.weight", torch.Size([count]))
    key = stream_key(7, "layer.weight")
    deviation = 0.99998986  # of the exact quantiles at these 65,536 probabilities
    for index in (0, 1, 1023, 1024, 8191, 8192, 20_000, count - 1):
        block, place = divmod(index, BLOCK)
        j, c = divmod(place, COUNTERS)
        word = int(philox(torch.tensor([block * COUNTERS + c]), key)[j // 2])
        h = (word >> (16 * (j % 2))) & 0xFFFF
        m, negative = h & 0x7FFF, h >> 15
        z = -NormalDist().inv_cdf((2 * m + 1) / 2**17) / deviation
        assert float(values[index]) == pytest.approx(-z if negative else z, abs=4e-4)


def test_a_part_of_a_parameter_has_the_noise_it_has_in_the_whole():
    whole = noise(3, "w", torch.Size([40_000]))
    assert torch.equal(noise(3, "w", torch.Size([17, 1000])).flatten(), whole[:17_000])


def test_no_seed_comes_twice_in_a_run():
    seeds = {member_seed(42, iteration, member) for iteration in range(500) for member in range(30)}
    assert len(seeds) == 500 * 30
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert member_seed(43, 0, 0) not in seeds


@pytest.mark.parametrize(("num_prompts", "batch_size"), [(250, 64), (10, 10), (7, 3), (5, 64), (1, 1)])
def test_every_pass_uses_every_prompt_at_most_once(num_prompts, batch_size):
    size = min(num_prompts, batch_size)
    batches = num_prompts // size
    seen = []
    for epoch in range(3):
        used = []
        for place in range(batches):
            batch = iteration_prompts(num_prompts, batch_size, 1, epoch * batches + place)
            assert len(batch) == len(set(batch)) == size
            used += batch
        assert len(used) == len(set(used))
        seen.append(used)
    if num_prompts > 2:
        assert seen[0] != seen[1] != seen[2]


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (64, 32), "b": (64, 32), "c": (7,)}
    engine = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return engine, MasterWeights(engine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_thousand_members_leave_no_trace(weights, dtype):
    engine = {name: tensor.to(dtype) for name, tensor in weights[0].items()}
    before = {name: tensor.clone() for name, tensor in engine.items()}
    master = MasterWeights(engine)
    for seed in range(1000):
        master.perturb(seed, 0.001)
    master.restore()
    assert all(torch.equal(engine[name], before[name]) for name in engine)


def test_a_member_is_master_plus_scaled_noise(weights):
    engine, master = weights
    master.perturb(5, 0.1)
    for name, tensor in engine.items():
        assert torch.equal(tensor, master.master[name] + 0.1 * noise(5, name, tensor.shape))


def test_the_step_is_the_exact_sum(weights):
    engine, master = weights
    before = {name: tensor.double().clone() for name, tensor in master.master.items()}
    seeds = [member_seed(0, 0, member) for member in range(30)]
    coefficients = (0.0005 / 30 * np.random.default_rng(0).normal(size=30)).tolist()
    untouched = {name: tensor.clone() for name, tensor in engine.items()}
    master.step(seeds, coefficients)
    wanted, got = [], []
    for name, tensor in master.master.items():
        exact = sum(c * noise(seed, name, tensor.shape).double() for seed, c in zip(seeds, coefficients, strict=True))
        wanted.append(exact.flatten())
        got.append((tensor.double() - before[name]).flatten())
        assert torch.equal(engine[name], untouched[name])
    wanted, got = torch.cat(wanted), torch.cat(got)
    assert torch.nn.functional.cosine_similarity(wanted, got, dim=0) > 0.9999


def test_a_step_of_zeros_changes_no_bit(weights):
    _, master = weights
    before = master.hash()
    master.step([1, 2], [0.0, 0.0])
    assert master.hash() == before


def published_weights(values: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rows, dtype=torch.float32) for name, rows in values.items()}


def test_the_published_worker_on_request(goldens):
    golden = json.loads((goldens / "es" / "es_worker.json").read_text())
    case = golden["perturb"]
    engine = published_weights(case["initial"])
    weights = ReferenceWeights(engine)
    weights.perturb(case["seed"], case["sigma"])
    for name, wanted in published_weights(case["after_perturb"]).items():
        assert torch.equal(engine[name], wanted)
    weights.restore()
    drift = max(float((engine[n] - w).abs().max()) for n, w in published_weights(case["initial"]).items())
    assert drift == case["after_restore_max_abs_error"]

    case = golden["update"]
    engine = published_weights(case["initial"])
    ReferenceWeights(engine).step(case["seeds"], case["coefficients"])
    for name, wanted in published_weights(case["final"]).items():
        assert torch.equal(engine[name], wanted)


def test_a_fingerprint_sees_one_flipped_bit_and_two_swapped_weights(weights):
    _, master = weights
    before = master.fingerprint()
    assert master.fingerprint() == before
    tensor = master.master["a"].view(torch.int32)
    tensor[3, 4] ^= 1
    assert master.fingerprint() != before
    tensor[3, 4] ^= 1
    tensor[0, [1, 2]] = tensor[0, [2, 1]]
    assert master.fingerprint() != before
    tensor[0, [1, 2]] = tensor[0, [2, 1]]
    assert master.fingerprint() == before
