"""Scoring on one GPU at 7B shapes: pairs (reward and cost of one text) a second, beside the published way and the limit.

    python bench/scorer.py [--lengths FILE.csv] [--texts 1024] [--fp8] [--layers 32] [--max_length 576]

Published way: both models in float16, one after the other, batches of 32 in arrival order padded to their longest text, eager
attention kernels of transformers (sdpa). Ours: texts packed without padding, layers compiled, bfloat16; with --fp8 also the
float8 form. Weights are random. FILE.csv has rows "prompt,response" in tokens; the texts are a sample of it.

Limit: the floating-point operations of the texts, without padding, at the measured rate of a large matrix product. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig

from alignment.scoring.flops import llama_flops
from alignment.scoring.packed import PackedForward
from alignment.scoring.score_model import ScoreModel


def config_7b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32001,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=2048,
    )


def random_model(config: LlamaConfig, dtype: torch.dtype, seed: int) -> ScoreModel:
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = ScoreModel(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def seconds(work, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def gemm_rate() -> float:
    """FLOP a second of an 8192^3 bfloat16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, 20)


@torch.inference_mode()
def published(models: list[ScoreModel], texts: list[tuple[int, ...]]) -> list[list[float]]:
    results = []
    for model in models:
        scores = []
        for start in range(0, len(texts), 32):
            batch = texts[start : start + 32]
            width = max(map(len, batch))
            ids = torch.tensor([text + (0,) * (width - len(text)) for text in batch]).cuda()
            mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in batch]).cuda()
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            ends = mask.sum(1) - 1
            scores += model.end_scores(hidden[torch.arange(len(batch), device="cuda"), ends]).tolist()
        results.append(scores)
    return results


def measure_published(config: LlamaConfig, texts: list[tuple[int, ...]]) -> float:
    models = [random_model(config, torch.float16, seed) for seed in (1, 2)]
    return seconds(lambda: published(models, texts), 2)


def ours(name: str, fp8: bool, config: LlamaConfig, texts: list[tuple[int, ...]], max_length: int, report) -> dict:
    """Reports the speed; returns seconds to warm up, and how far scores move with batch mates and with float8."""
    models = [random_model(config, torch.bfloat16, seed) for seed in (1, 2)]
    exact = PackedForward(models[0], max_length, compiled=False).score(texts[:256]) if fp8 else None
    forwards = [PackedForward(model, max_length, fp8=fp8) for model in models]
    start = time.perf_counter()
    for forward in forwards:
        forward.warm_up()
    found = {f"{name}_warm_up_seconds": time.perf_counter() - start}
    report(name, seconds(lambda: [forward.score(texts).tolist() for forward in forwards]))
    whole = forwards[0].score(texts)
    alone = torch.cat([forwards[0].score([text]) for text in texts[:64]])
    found[f"{name}_batch_mates"] = float((whole[:64] - alone).abs().max())
    found[f"{name}_score_std"] = float(whole.std())
    if exact is not None:
        found["fp8_error_on_random_weights"] = float((whole[:256] - exact).abs().max())
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", help="CSV of prompt and response lengths; default lognormal around 300")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=576)
    parser.add_argument("--fp8", action="store_true")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    if options.lengths:
        everything = np.loadtxt(options.lengths, delimiter=",", dtype=int).sum(1)
        lengths = rng.permutation(everything)[: options.texts]
    else:
        lengths = rng.lognormal(5.6, 0.5, options.texts)
    lengths = np.clip(lengths, 8, options.max_length).astype(int).tolist()
    texts = [tuple(rng.integers(3, 32000, n).tolist()) for n in lengths]
    config = config_7b(options.layers)
    work = 2 * llama_flops(config, lengths)  # two models
    rate = gemm_rate()
    result: dict = {
        "device": torch.cuda.get_device_name(),
        "texts": len(texts),
        "mean_tokens": float(np.mean(lengths)),
        "gemm_tflops": rate / 1e12,
        "limit_pairs_per_second": len(texts) * rate / work,
    }

    def report(name: str, took: float) -> None:
        result[name] = {
            "pairs_per_second": len(texts) / took,
            "share_of_gemm": work / took / rate,
            "tflops": work / took / 1e12,
        }
        if name != "published":
            result[name]["times_published"] = result[name]["pairs_per_second"] / result["published"]["pairs_per_second"]
        print(name, json.dumps({k: round(v, 3) for k, v in result[name].items()}), flush=True)

    print(json.dumps(result), flush=True)
    report("published", measure_published(config, texts))
    torch.cuda.empty_cache()
    for name, fp8 in (("packed_bf16", False), ("packed_fp8", True))[: 1 + options.fp8]:
        result |= ours(name, fp8, config, texts, options.max_length, report)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
