"""A whole ES population on one GPU at 7B shapes: full rank, low-rank members in one batch, and the limit of both.

    python bench/es_population.py [--lengths FILE.csv] [--members 30] [--prompts 64] [--rank 1] [--lora] [--profile]
    python bench/es_population.py --linears [--sweep]

The same requests (64 prompts a member, answers of given lengths, random weights, greedy) in vLLM, four ways: one set of
weights for all of them, the limit; full rank, a member at a time (some are measured and scaled up; writing a member's weights,
20 ms of its 2.6 s in bench/es_step.py, is left out, in full rank's favour); low-rank members at once (drawing and loading
their factors counts); with --lora also vLLM's own LoRA. Each engine runs in a process of its own.

--linears times only the linear layers of one decode step as a CUDA graph, with and without members. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from llama_shapes import draw_lengths, greedy_requests, policy_7b, shapes_of, start_vllm

from alignment.config import script_parser

SIGMA = 0.001
# (parts of the output, inputs) of a 7B layer's linear layers as vLLM fuses them.
LINEARS = [([4096] * 3, 4096), ([4096], 4096), ([11008] * 2, 4096), ([4096], 11008)]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--lengths", help="CSV of prompt and response lengths; default 64 x (45, 255)")
    parser.add_argument("--layers", type=int, default=32, help="of the 7B model")
    parser.add_argument("--members", type=int, default=30, help="of the population")
    parser.add_argument("--prompts", type=int, default=64, help="a member")
    parser.add_argument("--rank", type=int, default=1, help="of the members' factors")
    parser.add_argument("--max_num_seqs", type=int, default=384, help="answers at once in vLLM")
    parser.add_argument(
        "--full_rank_members", type=int, default=3, help="measured; the others are taken to be like them"
    )
    parser.add_argument("--lora", action="store_true", help="vLLM's own LoRA as well, of that rank or the next it has")
    parser.add_argument("--profile", action="store_true", help="where the GPU's time goes with members at once")
    parser.add_argument(
        "--linears", action="store_true", help="only the linear layers of a step of --max_num_seqs tokens"
    )
    parser.add_argument("--sweep", action="store_true", help="with --linears: tile sizes as well")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
    elif options.linears:
        print(json.dumps(time_linears(options)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    found: dict = {}
    for part in ["members", "plain"] + ["lora"] * options.lora:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    found |= json.loads(line)
                else:
                    print(line, end="", flush=True)
        if process.returncode:
            sys.exit(f"{part} failed")
    tokens = found["tokens"]
    rows = {"one set of weights (limit)": "plain", "full rank": "full_rank", "low-rank members at once": "members"}
    rows |= {"vLLM's LoRA": "lora"} if options.lora else {}
    print(
        f"{found['device']}: {options.members} members x {options.prompts} prompts, {tokens:,} tokens, rank {options.rank}"
    )
    for title, name in rows.items():
        seconds = found[f"{name}_seconds"]
        found[f"{name}_tokens_per_second"] = tokens / seconds
        print(
            f"{title:28s} {seconds:6.1f} s {tokens / seconds:8,.0f} tokens/s, {found['plain_seconds'] / seconds:5.0%} of the "
            f"limit, {found['full_rank_seconds'] / seconds:.2f} x full rank"
        )
    print(json.dumps(found))


# ---- generation ----


def measure_plain(options: argparse.Namespace) -> dict:
    """One set of weights for all requests, and full rank: a member's requests alone."""
    engine, prompts, choices = start(options)
    generate = engine._llm.generate
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    generate(requests, choices, use_tqdm=False)
    times = []
    for _ in range(options.full_rank_members):
        begin = time.perf_counter()
        generate(requests, choices, use_tqdm=False)
        times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    outputs = generate(requests * options.members, choices * options.members, use_tqdm=False)
    seconds = time.perf_counter() - begin
    print(
        f"one set of weights: {seconds:.2f} s; full rank, a member: {', '.join(f'{t:.2f}' for t in times)} s",
        flush=True,
    )
    if options.profile:
        count = max(1, options.max_num_seqs // options.prompts)
        for choice in choices:
            choice.max_tokens = min(choice.max_tokens, 24)
        profiled(lambda: generate(requests * count, choices * count, use_tqdm=False))
    return {
        "device": torch.cuda.get_device_name(),
        "plain_seconds": seconds,
        "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        "full_rank_seconds": statistics.mean(times) * options.members,
        "full_rank_members_measured": len(times),
    }


def measure_members(options: argparse.Namespace) -> dict:
    from alignment.generation.vllm_members import answer_members

    engine, prompts, choices = start(options, members_at_once=options.members, member_rank=options.rank)
    shapes = {
        name: shape for name, shape in shapes_of(policy_7b(options.layers)).items() if name in engine._slots.names
    }

    def run(count: int, longest: int | None = None) -> tuple[float, int]:
        for choice in choices if longest else ():
            choice.max_tokens = min(choice.max_tokens, longest)
        begin = time.perf_counter()
        lengths: list[int] = []
        answer_members(
            engine._llm.llm_engine, engine._slots, prompts, choices, [factors(shapes, options.rank) for _ in range(count)],
            lambda member, index, tokens: lengths.append(len(tokens)),
        )  # fmt: skip
        return time.perf_counter() - begin, sum(lengths)

    run(1)
    seconds, tokens = run(options.members)
    print(f"{options.members} members at once: {tokens:,} tokens in {seconds:.2f} s", flush=True)
    if options.profile:
        profiled(lambda: run(max(1, options.max_num_seqs // options.prompts), longest=24))
    return {"members_seconds": seconds, "rank": options.rank}


def measure_lora(options: argparse.Namespace) -> dict:
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    rank = next(rank for rank in (1, 8, 16, 32) if rank >= options.rank)
    engine, prompts, choices = start(options, enable_lora=True, max_loras=options.members, max_lora_rank=rank)
    names = [name for name in engine.linear_weights() if "lm_head" not in name]
    shapes = shapes_of(policy_7b(options.layers))
    adapters = []
    with tempfile.TemporaryDirectory() as folder:
        for member in range(options.members):
            path = Path(folder) / str(member)
            path.mkdir()
            state = {}
            for name, pair in factors({name: shapes[name] for name in names}, rank).items():
                module = "base_model.model." + name.removesuffix(".weight")
                state[f"{module}.lora_A.weight"] = pair.right.T.half().contiguous().cpu()
                state[f"{module}.lora_B.weight"] = pair.left.half().cpu()
            save_file(state, path / "adapter_model.safetensors")
            targets = sorted({name.split(".")[-2] for name in names})
            config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
            (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
            adapters.append(LoRARequest(str(member), member + 1, str(path)))
        generate = engine._llm.generate
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        for adapter in adapters:  # loaded before the clock starts
            generate(requests[:1], choices[:1], lora_request=[adapter], use_tqdm=False)
        begin = time.perf_counter()
        generate(
            requests * options.members, choices * options.members,
            lora_request=[adapter for adapter in adapters for _ in prompts], use_tqdm=False,
        )  # fmt: skip
        return {"lora_seconds": time.perf_counter() - begin, "lora_rank": rank}


def profiled(work: Callable[[], object]) -> None:
    """Prints how long the GPU was busy while `work` ran, and with what."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in events) / 1e6
    print(f"  profile: {wall:.3f} s, kernels {busy:.3f} s")
    for event in events[:16]:
        print(f"  {event.self_device_time_total / 1e3:8.1f} ms {event.count:6d} x {event.key[:90]}", flush=True)


PARTS = {"plain": measure_plain, "members": measure_members, "lora": measure_lora}


def start(options: argparse.Namespace, **more: object) -> tuple:
    """An engine with random weights, the prompts (token ids) and each prompt's SamplingParams."""
    engine, took = start_vllm(tempfile.mkdtemp(), options.layers, max_num_seqs=options.max_num_seqs, **more)
    print(f"{options.part}: vLLM started in {took:.0f} s", flush=True)
    return engine, *greedy_requests(draw_lengths(options.lengths, options.prompts))


def factors(shapes: dict[str, torch.Size], rank: int) -> dict:
    """A member: LowRank by name, standard normal, the scale in `left`."""
    from alignment.generation import LowRank

    scale = SIGMA / math.sqrt(rank)
    return {
        name: LowRank(scale * torch.randn(rows, rank, device="cuda"), torch.randn(columns, rank, device="cuda"))
        for name, (rows, columns) in shapes.items()
    }


# ---- the linear layers alone ----


def time_linears(options: argparse.Namespace) -> dict:
    """Milliseconds of all layers' linear products for a step of --max_num_seqs tokens, without and with members."""
    from alignment.generation import member_kernels as kernels

    tokens, distinct = options.max_num_seqs, 8  # layers of their own: 3.2 GB of weights, more than any cache holds
    new: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    weights = [[torch.randn(sum(parts), inputs, **new) for parts, inputs in LINEARS] for _ in range(distinct)]
    xs = [torch.randn(tokens, inputs, **new) for _, inputs in LINEARS]
    slots = torch.randint(1, options.members + 1, (tokens,), device="cuda", dtype=torch.int32)
    scale = options.layers / distinct
    found = {"device": torch.cuda.get_device_name(), "tokens": tokens}

    def plain() -> None:
        for layer in weights:
            for x, weight in zip(xs, layer, strict=True):
                torch.nn.functional.linear(x, weight)

    found["linears_ms"] = scale * graph_milliseconds(plain)
    print(f"{found['device']}, {tokens} tokens, {options.layers} layers: {found['linears_ms']:.2f} ms without members")
    for rank, dtype in product((1, 2, 4, 8), (torch.float16, torch.float32)):
        buffers = [member_buffers(options.members, rank, dtype, distinct, number) for number in range(len(LINEARS))]

        def members(buffers: list[list[tuple]] = buffers) -> None:
            for number, layer in enumerate(weights):
                for x, weight, pair, (parts, _) in zip(xs, layer, buffers, LINEARS, strict=True):
                    torch.ops.alignment.member_linear(x, weight, None, *pair[number], slots, parts)

        name = f"rank_{rank}_{str(dtype).removeprefix('torch.')}"
        found[name] = scale * graph_milliseconds(members)
        print(f"{name}: {found[name]:.2f} ms, members add {found[name] - found['linears_ms']:.2f}", flush=True)
        if options.sweep and rank == 1 and dtype == torch.float16:
            sizes = product((4096, 8192, 16384), (4, 8), (4, 8, 16), (256, 512, 1024), (4, 8))
            names = ["SHRINK_TILE", "SHRINK_WARPS", "EXPAND_TOKENS", "EXPAND_COLUMNS", "EXPAND_WARPS"]
            chosen = [getattr(kernels, name) for name in names]
            for size in sizes:
                if sum(a != b for a, b in zip(size, chosen, strict=True)) != 1:
                    continue  # one at a time
                for attribute, value in zip(names, size, strict=True):
                    setattr(kernels, attribute, value)
                print(
                    f"  {dict(zip(names, size, strict=True))}: {scale * graph_milliseconds(members):.2f} ms", flush=True
                )
            for attribute, value in zip(names, chosen, strict=True):
                setattr(kernels, attribute, value)
    return found


def member_buffers(members: int, rank: int, dtype: torch.dtype, layers: int, number: int) -> list[tuple]:
    """(right, left) of one kind of linear layer, for each of `layers` layers."""
    parts, inputs = LINEARS[number]
    new: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    return [
        (torch.randn(members + 1, len(parts) * rank, inputs, **new), torch.randn(members + 1, rank, sum(parts), **new))
        for _ in range(layers)
    ]


def graph_milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median time of `work` as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    main()
