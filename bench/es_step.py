"""ES on one GPU at 7B shapes: the noise passes, the step and a whole iteration, beside the published way and the limits.

    python bench/es_step.py [--vllm] [--members 4] [--lengths FILE.csv] [--layers 32]

Published way: one seed's noise is drawn per parameter with torch.randn in the weights' dtype and added in place (perturb),
taken away again (restore), and the step is one such pass a seed. Ours: one Triton pass from a float32 master into the
working weights (restoring is part of the next member's pass), and one pass for the whole population's step.

Limits: bytes over the device's measured copy rate. First the kernels are checked bit for bit against the PyTorch path on the
CPU. With --vllm also: members that generate in vLLM (random weights), at the lengths of FILE.csv (rows "prompt,response" in
tokens). The last line is JSON.
"""

from __future__ import annotations

import json
import tempfile
import time

import numpy as np
import torch
from device_rates import copy_rate, median_seconds
from llama_shapes import draw_lengths, greedy_requests, policy_7b, shapes_of, start_vllm
from transformers import AutoModelForCausalLM

from alignment.config import script_parser
from alignment.ES.noise import noise
from alignment.ES.weights import KernelWeights, MasterWeights
from alignment.generation import Engine

SIGMA, ALPHA, POPULATION = 0.001, 0.0005, 30


def check_kernels() -> int:
    """Every element of several shapes and dtypes against the CPU; returns how many were compared. Raises on a difference."""
    compared = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        shapes = {
            "model.a.weight": (4096, 1031),
            "model.b.weight": (7,),
            "model.c.weight": (8192,),
            "model.d.weight": (3, 8193),
        }
        base = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
        on_cpu = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        on_gpu = {name: torch.full(shape, float("nan"), dtype=dtype, device="cuda") for name, shape in shapes.items()}
        cpu = MasterWeights(on_cpu, {name: tensor.clone() for name, tensor in base.items()})
        gpu = KernelWeights(on_gpu, {name: tensor.clone() for name, tensor in base.items()}, torch.device("cuda"))
        seeds = [2**63 + 17, 5, 1234567890123456789]
        for seed, scale in ((seeds[0], 0.03), (seeds[1], -0.001)):
            cpu.perturb(seed, scale)
            gpu.perturb(seed, scale)
            assert all(torch.equal(on_cpu[name], on_gpu[name].cpu()) for name in shapes), (dtype, seed)
        cpu.step(seeds, [1e-3, -2e-3, 0.7e-3])
        gpu.step(seeds, [1e-3, -2e-3, 0.7e-3])
        assert all(torch.equal(cpu.master[name], gpu.master[name].cpu()) for name in shapes), dtype
        assert cpu.fingerprint() == gpu.fingerprint()
        cpu.restore()
        gpu.restore()
        assert all(torch.equal(on_cpu[name], on_gpu[name].cpu()) for name in shapes), dtype
        compared += 4 * sum(tensor.numel() for tensor in base.values())
    drawn = noise(3, "x", torch.Size([100_003]), device="cuda").cpu()
    assert torch.equal(drawn, noise(3, "x", torch.Size([100_003])))  # the PyTorch path on the GPU
    return compared


def measure_passes(shapes: dict[str, torch.Size], device_name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    count = sum(shape.numel() for shape in shapes.values())
    rate = copy_rate(2**31, torch.device("cuda"), lambda copy: median_seconds(copy, 5))
    working = {
        name: torch.empty(shape, dtype=torch.float16, device="cuda").normal_(0, 0.02) for name, shape in shapes.items()
    }

    def published_pass() -> None:
        for tensor in working.values():
            generator = torch.Generator(device="cuda").manual_seed(7)
            tensor.add_(SIGMA * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device="cuda"))

    found["published_pass"] = median_seconds(published_pass, 5)
    base = {name: tensor.float() for name, tensor in working.items()}
    weights = KernelWeights(working, base, torch.device("cuda"))
    found["perturb"] = median_seconds(lambda: weights.perturb(7, SIGMA), 5)
    seeds, coefficients = list(range(POPULATION)), [ALPHA / POPULATION] * POPULATION
    found["step"] = median_seconds(lambda: weights.step(seeds, coefficients), 3)
    found["copy_bytes_per_second"] = rate
    found["perturb_limit"] = count * (4 + 2) / rate
    found["step_limit"] = count * (4 + 4) / rate
    found["published_member"] = 2 * found["published_pass"]
    found["published_step"] = POPULATION * found["published_pass"]
    found["parameters"] = count
    member, member_limit, member_published = (1e3 * found[k] for k in ("perturb", "perturb_limit", "published_member"))
    print(f"{device_name}, {count / 1e9:.2f} G parameters, copy {rate / 1e12:.2f} TB/s")
    print(f"member: {member:.1f} ms (limit {member_limit:.1f}), published {member_published:.1f}")
    print(
        f"step of {POPULATION}: {found['step']:.3f} s (limit {found['step_limit']:.3f}), "
        f"published {found['published_step']:.3f}"
    )
    return found


def measure_vllm(layers: int, members: int, lengths: np.ndarray, folder: str) -> dict[str, float]:
    """Members one after the other in vLLM: how much of the time is generation, and are weights and texts restored exactly."""
    count = sum(shape.numel() for shape in shapes_of(policy_7b(layers)).values())
    engine, start = start_vllm(folder, layers, max_num_seqs=128, reserved_bytes=4 * count)
    found = {"vllm_start": start}
    parameters = engine.parameters()
    weights = KernelWeights(parameters, {n: t.float() for n, t in parameters.items()}, torch.device("cuda"))
    prompts, choices = greedy_requests(lengths)
    requests = [{"prompt_token_ids": ids} for ids in prompts]

    def generate() -> tuple[list, float]:
        begin = time.perf_counter()
        outputs = engine._llm.generate(requests, choices, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - begin

    generate()
    base, found["generate"] = generate()
    again, _ = generate()
    found["greedy_repeats"] = float(np.mean([a == b for a, b in zip(base, again, strict=True)]))
    torch.cuda.synchronize()
    begin, generating = time.perf_counter(), 0.0
    for member in range(members):
        weights.perturb(member, SIGMA)
        texts, took = generate()
        generating += took
    found["members"] = time.perf_counter() - begin
    found["members_generating"] = generating
    found["texts_changed"] = float(np.mean([a != b for a, b in zip(base, texts, strict=True)]))
    weights.restore()
    exact = all(torch.equal(parameters[name], master.half()) for name, master in weights.master.items())
    found["restored_bit_equal"] = float(exact)
    back, _ = generate()
    found["texts_back"] = float(np.mean([a == b for a, b in zip(base, back, strict=True)]))
    tokens = int(sum(r for _, r in lengths))
    print(
        f"vLLM: {members} members of {len(lengths)} prompts in {found['members']:.2f} s, of it generating {generating:.2f} s; "
        f"{tokens / found['generate']:,.0f} tokens/s; restored bit-equal: {exact}; texts back {found['texts_back']:.0%}"
    )
    found["export_equal"] = check_export(engine, parameters, folder)
    return found


def check_export(engine: Engine, parameters: dict[str, torch.Tensor], folder: str) -> float:
    """The exported folder holds every Hugging Face parameter with the engine's bits, and transformers loads it."""
    exported = folder + "-exported"
    engine.save_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float16)
    named = dict(model.named_parameters())
    assert named.keys() == parameters.keys()
    return float(all(torch.equal(named[name].data, parameters[name].cpu()) for name in named))


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--layers", type=int, default=32, help="of the 7B model")
    parser.add_argument("--members", type=int, default=4, help="members that are measured")
    parser.add_argument("--lengths", help="CSV of prompt and response lengths; default 64 x (45, 255)")
    parser.add_argument("--vllm", action="store_true", help="generation as well")
    parser.add_argument("--no_passes", action="store_true", help="leave the passes out")
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    result: dict = {"device": device, "compared_elements": check_kernels()}
    print(f"kernels equal the PyTorch path in {result['compared_elements']:,} elements")
    if not options.no_passes:
        result |= measure_passes(shapes_of(policy_7b(options.layers)), device)
        torch.cuda.empty_cache()
    if options.vllm:
        lengths = draw_lengths(options.lengths, 64)
        with tempfile.TemporaryDirectory() as folder:
            result |= measure_vllm(options.layers, options.members, lengths, folder + "/policy")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
