"""Batching on a CPU: texts a second of the scorer's batches beside padding in arrival order, on a real length mix.

    python bench/scorer_cpu.py --lengths FILE.csv [--texts 512] [--hidden 256] [--layers 4] [--threads 1]

FILE.csv has rows "prompt,response" in tokens. Arrival order: batches of 32 as they come, padded to their longest text, as the
published service does. Ours: rounds of as many texts as the worker takes, through BatchScorer, deterministic (the default on
a CPU) and not. Random weights; the models are small, but large enough that a forward pass is work and not overhead. Each way
runs `--repeats` times, in turn, and the best of them counts: other work on the machine can only slow a run down.

The limit is what a padding of zero would bring: padded tokens over tokens. The last line is JSON.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import LlamaConfig

from alignment.config import script_parser
from alignment.scoring.batching import WIDTH_STEP, BatchScorer
from alignment.scoring.score_model import ScoreModel
from alignment.scoring.worker import TEXTS_A_ROUND

REQUEST = 32  # texts, as published


def build_model(hidden: int, layers: int) -> ScoreModel:
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    return ScoreModel(config).eval()


def draw_texts(path: str, count: int, longest: int) -> list[tuple[int, ...]]:
    """Random ids with the lengths of `count` rows of the file, in a fixed random order. No two are the same."""
    rng = np.random.default_rng(0)
    lengths = np.loadtxt(path, delimiter=",", dtype=int).sum(axis=1)
    chosen = rng.choice(lengths, count, replace=count > len(lengths))
    return [tuple(rng.integers(4, 512, min(int(length), longest)).tolist()) for length in chosen]


@torch.inference_mode()
def arrival_order(model: ScoreModel, texts: list[tuple[int, ...]]) -> list[float]:
    scores = []
    for start in range(0, len(texts), REQUEST):
        batch = texts[start : start + REQUEST]
        width = max(map(len, batch))
        ids = torch.tensor([text + (0,) * (width - len(text)) for text in batch])  # (rows, width)
        scores += model(ids, torch.tensor([len(text) for text in batch])).tolist()
    return scores


def in_rounds(scorer: BatchScorer, texts: list[tuple[int, ...]]) -> list[float]:
    return [
        score
        for start in range(0, len(texts), TEXTS_A_ROUND)
        for score in scorer.score(texts[start : start + TEXTS_A_ROUND]).tolist()
    ]


def padded_tokens(texts: list[tuple[int, ...]]) -> int:
    """Tokens that arrival order computes."""
    batches = [texts[start : start + REQUEST] for start in range(0, len(texts), REQUEST)]
    return sum(len(batch) * max(map(len, batch)) for batch in batches)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--lengths", required=True, help="CSV of prompt and response lengths in tokens")
    parser.add_argument("--texts", type=int, default=512, help="how many are scored")
    parser.add_argument("--hidden", type=int, default=256, help="width of the models")
    parser.add_argument("--layers", type=int, default=4, help="of the models")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way; the best one counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(options.hidden, options.layers)
    texts = draw_texts(options.lengths, options.texts, longest=576)
    fixed, free = BatchScorer(model, deterministic=True), BatchScorer(model, deterministic=False)
    for length in {len(text) for text in texts}:
        fixed.rows_for(math.ceil(length / WIDTH_STEP) * WIDTH_STEP)  # checked once in a service's life
    ways: dict[str, Callable[[], list[float]]] = {
        "arrival_order": lambda: arrival_order(model, texts),
        "deterministic": lambda: in_rounds(fixed, texts),
        "sorted": lambda: in_rounds(free, texts),
    }
    best = dict.fromkeys(ways, math.inf)
    scores = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            scores[name] = way()
            best[name] = min(best[name], time.perf_counter() - began)

    tokens, padded = sum(map(len, texts)), padded_tokens(texts)
    result: dict = {"texts": len(texts), "tokens": tokens, "threads": options.threads, "limit_ratio": padded / tokens}
    print(
        f"{len(texts)} texts, {tokens} tokens, {padded} padded in arrival order: without padding {padded / tokens:.2f} times"
    )
    for name, seconds in best.items():
        apart = float(np.max(np.abs(np.subtract(scores[name], scores["arrival_order"]))))
        result[name] = {
            "texts_per_second": len(texts) / seconds,
            "ratio": best["arrival_order"] / seconds,
            "largest_difference": apart,
        }
        print(
            f"{name:14} {len(texts) / seconds:7.1f} texts/s  {best['arrival_order'] / seconds:.2f} times arrival order"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
