"""The scorer under load: 64 clients at once, 20,000 texts of mixed length, tiny models. Slow; prints its figures (pytest -s)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
from conftest import REPO
from scorer_process import running

from alignment.scoring.client import ScorerClient
from alignment.scoring.local_scorer import LocalScorer

CLIENTS, TEXTS = 64, 20_000
GROWTH_MIB = 32  # scores that are kept, and what the allocator keeps
# In a process of its own, so that it measures the service and not this test's threads.
PROBE = """
import json, select, sys, time, http.client
from urllib.parse import urlsplit
seconds = []
connection = http.client.HTTPConnection(urlsplit(sys.argv[1]).netloc, timeout=30)
while not select.select([sys.stdin], [], [], 0.02)[0]:
    began = time.perf_counter()
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read())["status"] == "healthy"
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""


def memory_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def figures(url: str) -> dict[str, float]:
    lines = requests.get(url + "/metrics", timeout=30).text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@pytest.mark.slow
def test_many_clients_at_once(tiny_scorers, tmp_path):
    rng = random.Random(0)
    # Words a response: short ones are common, a few are long.
    texts = [f"answer {index}" + " word" * min(60, int(rng.expovariate(1 / 8))) for index in range(TEXTS)]
    prompts = [f"prompt {index % 97}" for index in range(TEXTS)]
    parts: dict[int, object] = {}
    memory: list[float] = []  # MiB

    with running(tiny_scorers, tmp_path) as service:

        def work(client: int) -> None:
            mine = slice(client * TEXTS // CLIENTS, (client + 1) * TEXTS // CLIENTS)
            parts[client] = ScorerClient(service.url, concurrency=1).score(prompts[mine], texts[mine])

        # Each of the two threads that encode keeps 10,000 texts, 40 MiB, in its tokenizer's cache: they are there before
        # memory is compared.
        warm = [f"warm up {index} " + "x" * 100 for index in range(20_000)]
        halves = [
            threading.Thread(target=service.post, args=("/score_texts", {"texts": half}, True))
            for half in (warm[::2], warm[1::2])
        ]
        for half in halves:
            half.start()
        for half in halves:
            half.join()
        before = figures(service.url)
        prober = subprocess.Popen(
            [sys.executable, "-c", PROBE, service.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        began = time.monotonic()
        threads = [threading.Thread(target=work, args=(client,)) for client in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(memory_mib(service.process.pid))
            time.sleep(0.5)
        seconds = time.monotonic() - began
        output, _ = prober.communicate(b"stop\n", timeout=60)
        health = np.array(json.loads(output))
        after = figures(service.url)
        memory.append(memory_mib(service.process.pid))

    assert len(parts) == CLIENTS and sum(len(part.errors) for part in parts.values()) == TEXTS
    assert not any(error for part in parts.values() for error in part.errors)
    for name, expected in (
        ('scorer_texts_total{outcome="scored"}', TEXTS),
        ('scorer_texts_total{outcome="answered"}', TEXTS),
        ('scorer_texts_total{outcome="repeated"}', 0),
        ('scorer_texts_total{outcome="departed"}', 0),
    ):
        assert after[name] - before[name] == expected
    # Every client has its own scores: a sample is scored again here.
    rewards = np.concatenate([parts[client].rewards for client in range(CLIENTS)])
    costs = np.concatenate([parts[client].costs for client in range(CLIENTS)])
    sample = rng.sample(range(TEXTS), 400)
    local = LocalScorer(*tiny_scorers).score([prompts[i] for i in sample], [texts[i] for i in sample])
    assert rewards[sample].tolist() == local.rewards.tolist()
    assert costs[sample].tolist() == local.costs.tolist()

    early, growth = memory[0], max(memory) - memory[0]
    p50, p99 = np.percentile(health, [50, 99])
    print(
        f"\n{TEXTS} texts from {CLIENTS} clients in {seconds:.0f} s ({TEXTS / seconds:.0f}/s); /health {len(health)} times:"
        f" median {1e3 * p50:.0f} ms, 99 % {1e3 * p99:.0f} ms, longest {1e3 * health.max():.0f} ms;"
        f" memory {early:.0f} MiB at the start, {growth:+.1f} MiB at most from there"
    )
    assert growth < GROWTH_MIB


@pytest.mark.slow
def test_the_benchmark_at_a_tiny_size():
    flags = ["--shape=tiny", "--layers=2", "--texts=140"]
    done = subprocess.run(
        [sys.executable, "bench/scorer.py", *flags], cwd=REPO, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("published", "bf16", "bf16_http"):
        assert result[name]["pairs_per_second"] > 0
    assert result["bf16"]["http_rounds"] >= 2 and result["bf16"]["http_share_steady"] > 0
