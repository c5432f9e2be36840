"""Scoring on one GPU at 7B shapes: pairs (reward and cost of one text) a second, beside the published way and the limit.

    python bench/scorer.py [--lengths FILE.csv] [--texts 1024] [--fp8] [--profile] [--layers 32] [--max_length 576]
    python bench/scorer.py --shape tiny --layers 2 --texts 60           # to try it, on a CPU

Published way: both models in float16, one after the other, batches of 32 in arrival order padded to their longest text, eager
attention kernels of transformers (sdpa). Ours: LocalScorer as the service has it, texts packed without padding, layers compiled,
bfloat16; with --fp8 also the float8 form. Then the same texts through the service's worker and HTTP interface, from several
clients at once: `http_share` is the rate of that beside the forward's, `http_share_steady` the same from the end of the first
round to the end of the last. --profile says how long the GPU was idle meanwhile. Weights are random. FILE.csv has rows
"prompt,response" in tokens; the texts are a sample of it, made of the demo's words.

Limit: the floating-point operations of the texts, without padding, at the measured rate of a large matrix product. The last
line is JSON.
"""

from __future__ import annotations

import copy
import gc
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
import uvicorn
from device_rates import device_name, median_seconds, product_rate, seconds_each
from llama_shapes import draw_lengths, llama, llama_7b
from torch.autograd import DeviceType
from transformers import LlamaConfig, PreTrainedTokenizerBase

from alignment.config import script_parser
from alignment.demo.data import demo_data
from alignment.demo.vocabulary import train_tokenizer
from alignment.errors import run_main
from alignment.scoring.client import ScorerClient
from alignment.scoring.flops import llama_flops
from alignment.scoring.http_app import build_app
from alignment.scoring.local_scorer import QUEUED_TOKENS, Conversation, LocalScorer, Pending, Score
from alignment.scoring.monitor import Monitor
from alignment.scoring.score_model import ScoreModel
from alignment.scoring.scorer_service import take_port
from alignment.scoring.service_settings import read_settings
from alignment.scoring.worker import Worker, WorkQueue

CLIENTS = 4  # one a training GPU
PUBLISHED_TEXTS = 256  # its rate does not depend on how many batches there are
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


class TimedRound(Pending):
    """Notes in `rounds` when the scores are there."""

    def __init__(self, conversations: list[Conversation], pairs: torch.Tensor, rounds: list[tuple[float, int]]):
        super().__init__(conversations, pairs)
        self.tokens, self.rounds = sum(len(one.reward_ids) for one in conversations), rounds

    def result(self) -> list[Score]:
        scores = super().result()
        self.rounds.append((time.perf_counter(), self.tokens))
        return scores


class RandomScorer(LocalScorer):
    """The service's scorer with random models of a shape in place of files. `rounds`: when each ended, and its tokens."""

    def __init__(self, config: LlamaConfig, tokenizer: PreTrainedTokenizerBase, **settings: Any):
        self._shape, self._shared_tokenizer = config, tokenizer
        self.rounds: list[tuple[float, int]] = []
        super().__init__("reward", "cost", packed=True, **settings)
        self.round_tokens = QUEUED_TOKENS  # on a CPU as well, so that the same code is tried there

    def _load(self, name: str) -> tuple:
        model = random_model(self._shape, DTYPE, len(name))
        return self._shared_tokenizer, model, {"name": name, "score_type": "reward", "normalize": False}

    def queue_encoded(self, conversations: list[Conversation]) -> TimedRound:
        usable = [one for one in conversations if one.error is None]
        return TimedRound(conversations, self._pairs(usable), self.rounds)


def random_model(config: LlamaConfig, dtype: torch.dtype, seed: int) -> ScoreModel:
    torch.manual_seed(seed)
    with DEVICE:
        model = ScoreModel(copy.deepcopy(config), dtype=dtype)  # its attention is chosen in its config
    return model.eval().requires_grad_(False)


def gemm_rate() -> float:
    """FLOP a second of an 8192^3 bfloat16 product on random data (512^3 float32 on a CPU)."""
    size = 8192 if DEVICE.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
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
            ids = torch.tensor([text + (0,) * (width - len(text)) for text in batch], device=DEVICE)
            mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in batch], device=DEVICE)
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            ends = mask.sum(1) - 1
            scores += model.end_scores(hidden[torch.arange(len(batch), device=DEVICE), ends]).tolist()
        results.append(scores)
    return results


def measure_published(config: LlamaConfig, texts: list[tuple[int, ...]]) -> float:
    models = [random_model(config, torch.float16 if DEVICE.type == "cuda" else DTYPE, seed) for seed in (1, 2)]
    published(models, texts[:64])
    return seconds_each(lambda: published(models, texts), 1)[0]


def batch_mates(scorer: LocalScorer, conversations: list) -> dict[str, float]:
    """How far a reward moves between a batch of its own and one with others, beside the rewards' own deviation."""
    whole = np.array([score.reward for score in scorer.score_encoded(conversations[:512])])
    alone = np.array([scorer.score_encoded([one])[0].reward for one in conversations[:48]])
    moved = np.abs(whole[:48] - alone)
    return {"batch_mates_max": moved.max(), "batch_mates_mean": moved.mean(), "score_deviation": whole.std()}


def through_http(scorer: RandomScorer, prompts: list[str], responses: list[str]) -> float:
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
    scorer.rounds.clear()
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


def steady_rate(rounds: list[tuple[float, int]]) -> float:
    """Tokens a second from the end of the first round to the end of the last."""
    (began, _), *rest = rounds
    return sum(tokens for _, tokens in rest) / (rest[-1][0] - began) if rest else float("nan")


def idle_gpu(work: Callable[[], float]) -> dict[str, float]:
    """How the GPU spends the seconds that `work` returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        took = work()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )  # microseconds
    return idle_times(spans, took)


def idle_times(spans: list[tuple[float, float]], took: float) -> dict[str, float]:
    """Of what a GPU did (start, end) in microseconds, in the order of the starts, in `took` seconds."""
    busy, gaps, reached = 0.0, [], spans[0][0]
    for start, end in spans:
        gaps.append(max(0.0, start - reached))
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {
        "gpu_busy": busy / 1e6 / took,
        "idle_before_and_after_ms": 1e3 * took - (reached - spans[0][0]) / 1e3,
        "idle_between_ms": sum(gaps) / 1e3,
        "longest_gap_ms": max(gaps) / 1e3,
        "gaps_over_1_ms": sum(gap > 1e3 for gap in gaps),
    }


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--lengths", help="CSV of prompt and response lengths; default 40 and a lognormal around 220")
    parser.add_argument("--texts", type=int, default=1024, help="texts to score")
    parser.add_argument("--shape", choices=("7b", "tiny"), default="7b", help="tiny: to try it")
    parser.add_argument("--layers", type=int, default=32, help="of each model")
    parser.add_argument("--max_length", type=int, default=576, help="tokens a text at most")
    parser.add_argument("--fp8", action="store_true", help="the float8 form as well")
    parser.add_argument("--profile", action="store_true", help="how long the GPU is idle while it serves")
    options = parser.parse_args()
    if options.profile and DEVICE.type != "cuda":
        parser.error("--profile looks at a GPU, and there is none: leave it out")
    if options.lengths:
        pairs = draw_lengths(options.lengths, options.texts)
    else:
        long = np.random.default_rng(0).lognormal(5.4, 0.6, options.texts)
        pairs = np.stack([np.full(options.texts, 40), long], axis=1)
    config = llama_7b(options.layers) if options.shape == "7b" else llama(64, 176, options.layers, 4, 4096)
    tokenizer = train_tokenizer(demo_data(0), 2400)
    prompts, responses = make_texts(pairs, tokenizer)
    result: dict = {"device": device_name(), "texts": len(prompts)}
    rate = gemm_rate()

    def report(name: str, texts: list[tuple[int, ...]], took: float) -> None:
        work = 2 * llama_flops(config, map(len, texts))  # two models
        row = {"pairs_per_second": len(texts) / took, "share_of_gemm": work / took / rate}
        if name != "published":
            row["times_published"] = row["pairs_per_second"] / result["published"]["pairs_per_second"]
        result[name] = row
        print(name, json.dumps({key: round(value, 3) for key, value in row.items()}), flush=True)

    for fp8 in (False, True)[: 1 + options.fp8]:
        name = "fp8" if fp8 else "bf16"
        began = time.perf_counter()
        scorer = RandomScorer(config, tokenizer, max_length=options.max_length, fp8=fp8)
        result[f"{name}_start_seconds"] = time.perf_counter() - began
        conversations = [scorer.encode(*pair) for pair in zip(prompts, responses, strict=True)]
        texts = [one.reward_ids for one in conversations]
        if not fp8:
            limit = len(texts) * rate / (2 * llama_flops(config, map(len, texts)))
            result |= {"mean_tokens": float(np.mean([*map(len, texts)])), "gemm_tflops": rate / 1e12}
            result["limit_pairs_per_second"] = limit
            print(json.dumps(result), flush=True)
            part = texts[:PUBLISHED_TEXTS]
            report("published", part, measure_published(config, part))
            gc.collect()
            torch.cuda.empty_cache()
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        scorer.score_encoded(conversations[:128])
        # The forward before and after HTTP: a GPU that grows warm, or a neighbour, must not pass for HTTP's doing.
        forward = seconds_each(partial(scorer.score_encoded, conversations), 1)
        served = through_http(scorer, prompts, responses)
        rounds = scorer.rounds.copy()
        forward += seconds_each(partial(scorer.score_encoded, conversations), 1)
        seconds = sum(forward) / 2
        report(name, texts, seconds)
        report(f"{name}_http", texts, served)
        result[name] |= {
            "forward_seconds": forward,
            "http_share": seconds / served,
            "http_share_steady": steady_rate(rounds) * seconds / sum(map(len, texts)),
            "http_rounds": len(rounds),
            **batch_mates(scorer, conversations),
            "compiled_after_start": torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled,
        }
        if fp8:
            result[name] |= scorer.identity()["fp8_error"]
        print(name, json.dumps(result[name]), flush=True)
        if options.profile:
            half = len(prompts) // 2
            found = idle_gpu(partial(through_http, scorer, prompts[:half], responses[:half]))
            result[f"{name}_http"] |= found
            print(f"{name}_http, {half} texts:", json.dumps({key: round(value, 4) for key, value in found.items()}))
        del scorer
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
