"""Scoring on one GPU at 7B shapes: pairs (reward and cost of one text) a second, beside the published way and the limit.

    python bench/scorer.py [--lengths FILE.csv] [--texts 1024] [--fp8] [--layers 32] [--max_length 576]

Published way: both models in float16, one after the other, batches of 32 in arrival order padded to their longest text, eager
attention kernels of transformers (sdpa). Ours: LocalScorer as the service has it, texts packed without padding, layers compiled,
bfloat16; with --fp8 also the float8 form. Then the same texts through the service's worker and HTTP interface, from several
clients at once. Weights are random. FILE.csv has rows "prompt,response" in tokens; the texts are a sample of it, made of the
demo's words.

Limit: the floating-point operations of the texts, without padding, at the measured rate of a large matrix product. The last
line is JSON.
"""

from __future__ import annotations

import copy
import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import uvicorn
from device_rates import median_seconds, product_rate
from llama_shapes import draw_lengths, llama_7b
from transformers import LlamaConfig, PreTrainedTokenizerBase

from alignment.config import script_parser
from alignment.demo.data import demo_data
from alignment.demo.vocabulary import train_tokenizer
from alignment.scoring.client import ScorerClient
from alignment.scoring.flops import llama_flops
from alignment.scoring.http_app import build_app
from alignment.scoring.local_scorer import Conversation, LocalScorer
from alignment.scoring.monitor import Monitor
from alignment.scoring.score_model import ScoreModel
from alignment.scoring.scorer_service import take_port
from alignment.scoring.service_settings import read_settings
from alignment.scoring.worker import TEXTS_A_ROUND, Worker, WorkQueue

CLIENTS = 4  # one a training GPU


class RandomScorer(LocalScorer):
    """The service's scorer with random models of a shape in place of files."""

    def __init__(self, config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, **settings: Any):
        self._shape, self._shared_tokenizer = config, tokenizer
        super().__init__("reward", "cost", **settings)

    def _load(self, name: str) -> tuple:
        model = random_model(self._shape, torch.bfloat16, len(name))
        return self._shared_tokenizer, model, {"name": name, "score_type": "reward", "normalize": False}


def random_model(config: LlamaConfig, dtype: torch.dtype, seed: int) -> ScoreModel:
    torch.manual_seed(seed)
    with torch.device("cuda"):
        model = ScoreModel(copy.deepcopy(config), dtype=dtype)  # its attention is chosen in its config
    return model.eval().requires_grad_(False)


def gemm_rate() -> float:
    """FLOP a second of an 8192^3 bfloat16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return product_rate(a, b, lambda product: median_seconds(product, 20))


def score_rounds(scorer: LocalScorer, rounds: list[list[Conversation]]) -> None:
    for one in rounds:
        scorer.score_encoded(one)


def make_texts(lengths: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Prompts and responses of about these lengths (N, 2) in tokens, no two alike."""
    words = " ".join(row["prompt"] for row in demo_data(0).train_rows).split()
    rng = np.random.default_rng(0)
    tokens_a_word = len(tokenizer(" ".join(words)).input_ids) / len(words)
    texts = [
        [" ".join(rng.choice(words, max(1, round(length / tokens_a_word)))) for length in pair] for pair in lengths
    ]
    return [prompt for prompt, _ in texts], [response for _, response in texts]


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
    return median_seconds(lambda: published(models, texts), 1)


def batch_mates(scorer: LocalScorer, conversations: list) -> dict[str, float]:
    """How far a reward moves between a batch of its own and one with all others, beside the rewards' own deviation."""
    whole = np.array([score.reward for score in scorer.score_encoded(conversations)])
    alone = np.array([scorer.score_encoded([one])[0].reward for one in conversations[:48]])
    moved = np.abs(whole[:48] - alone)
    return {"batch_mates_max": moved.max(), "batch_mates_mean": moved.mean(), "score_deviation": whole.std()}


def through_http(scorer: LocalScorer, prompts: list[str], responses: list[str]) -> float:
    """Seconds until CLIENTS clients, each with its share of the texts, have all scores."""
    settings, ready = read_settings({"SCORER_PROBES": "none"}), threading.Event()
    jobs = WorkQueue(settings.limits.max_queued_tokens)
    monitor = Monitor()
    monitor.watch(jobs)
    worker = Worker(settings, jobs, monitor, lambda _: ready.set(), print, load=lambda **_: scorer)
    worker.start()
    ready.wait()
    listener = take_port("127.0.0.1", 0)
    app = build_app(worker, None, settings.limits, "bench", {}, log_texts=False)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    serving = threading.Thread(target=server.run, args=([listener],))
    serving.start()
    client = ScorerClient(f"http://127.0.0.1:{listener.getsockname()[1]}")
    client.wait_until_ready()
    began = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [
            pool.submit(client.score, prompts[share::CLIENTS], responses[share::CLIENTS]) for share in range(CLIENTS)
        ]
        assert all(error is None for one in asked for error in one.result().errors)
    took = time.perf_counter() - began
    server.should_exit = True
    jobs.end()
    serving.join()
    worker.join()
    return took


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--lengths", help="CSV of prompt and response lengths; default lognormal around 300")
    parser.add_argument("--texts", type=int, default=1024, help="texts to score")
    parser.add_argument("--layers", type=int, default=32, help="of each 7B-shaped model")
    parser.add_argument("--max_length", type=int, default=576, help="tokens a text at most")
    parser.add_argument("--fp8", action="store_true", help="the float8 form as well")
    options = parser.parse_args()
    if options.lengths:
        pairs = draw_lengths(options.lengths, options.texts)
    else:
        long = np.random.default_rng(0).lognormal(5.4, 0.6, options.texts)
        pairs = np.stack([np.full(options.texts, 40), long], axis=1)
    config = llama_7b(options.layers)
    tokenizer = train_tokenizer(demo_data(0), 2400)
    prompts, responses = make_texts(pairs, tokenizer)
    result: dict = {"device": torch.cuda.get_device_name(), "texts": len(prompts)}
    work, rate = 0.0, gemm_rate()

    def report(name: str, took: float) -> None:
        row = {"pairs_per_second": len(prompts) / took, "share_of_gemm": work / took / rate}
        if name != "published":
            row["times_published"] = row["pairs_per_second"] / result["published"]["pairs_per_second"]
        result[name] = row
        print(name, json.dumps({key: round(value, 3) for key, value in row.items()}), flush=True)

    for fp8 in (False, True)[: 1 + options.fp8]:
        name = "fp8" if fp8 else "bf16"
        began = time.perf_counter()
        scorer = RandomScorer(config, tokenizer, max_length=options.max_length, dtype="bfloat16", fp8=fp8)
        result[f"{name}_start_seconds"] = time.perf_counter() - began
        conversations = [scorer.encode(*pair) for pair in zip(prompts, responses, strict=True)]
        if not work:
            texts = [one.reward_ids for one in conversations]
            lengths = [len(text) for text in texts]
            work = 2 * llama_flops(config, lengths)  # two models
            result |= {"mean_tokens": float(np.mean(lengths)), "gemm_tflops": rate / 1e12}
            result["limit_pairs_per_second"] = len(texts) * rate / work
            print(json.dumps(result), flush=True)
            report("published", measure_published(config, texts))
            gc.collect()
            torch.cuda.empty_cache()
        rounds = [conversations[at : at + TEXTS_A_ROUND] for at in range(0, len(conversations), TEXTS_A_ROUND)]
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        report(name, median_seconds(partial(score_rounds, scorer, rounds), 2))
        report(f"{name}_http", through_http(scorer, prompts, responses))
        share = result[f"{name}_http"]["pairs_per_second"] / result[name]["pairs_per_second"]
        result[name] |= {"http_share": share, **batch_mates(scorer, conversations)}
        result[name]["compiled_after_start"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
        if fp8:
            result[name] |= scorer.identity()["fp8"]
        print(name, json.dumps({key: float(f"{value:.4g}") for key, value in result[name].items()}), flush=True)
        del scorer
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
