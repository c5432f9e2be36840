"""Whole ES iterations at 7B shapes: the trainer itself with vLLM inside, scoring beside generation, on one or several GPUs.

    python bench/es_iteration.py --lengths FILE.csv
    python bench/es_iteration.py --lengths FILE.csv --gpus 1 2 --members 7 --iterations 3
    python bench/es_iteration.py --lengths FILE.csv --gpus 1 2 4 --iterations 3 --folder /dev/shm/es

ESTrainer and the engine of alignment/ES/policy_engine.py run as in training, on random weights (made first, 16 bit, 2 bytes a
parameter in --folder) and with two stand-ins. Answers have the lengths of FILE.csv (rows "prompt,response" in tokens, one
for each of the --prompts), whatever the weights. The scorer of all processes takes --pairs_per_second (default: two 7B score
models on an H100, docs/LOG.md) and gives scores that hang on iteration, member and prompt alone, so that every number of GPUs
must end in the same weights. Nothing is saved.

The limit is generation alone: the time of one member's answers times members + 1 (the policy itself is answered as well).
The published way is put together from its parts, measured in the same run: a GPU perturbs in place, answers, waits for the
scores of all GPUs' members and takes the noise away again, member after member; the step is one noise pass a seed. (Its
answers and scores come at the speed of ours, and its policy is not answered.)

With --folder the weights and what was measured stay there: a later call with more --gpus measures those alone and compares. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from device_rates import device_name
from llama_shapes import draw_lengths, policy_7b, shapes_of
from safetensors.torch import save_file

from alignment.config import script_parser
from alignment.distributed import Processes
from alignment.ES import trainer as es_trainer
from alignment.ES.member_scores import MemberScores
from alignment.ES.policy_engine import open_engine
from alignment.ES.settings import ESSettings
from alignment.ES.trainer import ESTrainer
from alignment.generation import Generation, vllm_engine
from alignment.generation.engine import Sampling
from alignment.records import read_json, read_jsonl, write_json, write_jsonl
from alignment.runs import StopSignal
from alignment.scoring.scores import Scores

GIB = 2**30
TEMPLATE_TOKENS = 5  # of "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:" with the tokenizer below


class LengthsEngine(vllm_engine.VLLMEngine):
    """Answers have the lengths in `lengths` (prompt's ids -> tokens); end-of-sequence tokens mean nothing."""

    lengths: dict[tuple[int, ...], int]

    def _choice(self, max_new_tokens: int, sampling: Sampling) -> Any:
        choice: Any = super()._choice(max_new_tokens, sampling)
        choice.ignore_eos, choice.stop_token_ids = True, []
        choice._all_stop_token_ids = set()
        return choice

    def _answer(self, batch: dict[int, list[int]], max_new_tokens: int, sampling: Sampling) -> dict[int, Generation]:
        choices = [self._choice(self.lengths[tuple(ids)], sampling) for ids in batch.values()]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in batch.values()], choices, use_tqdm=False)
        return {
            index: self.read(ids, list(output.outputs[0].token_ids))
            for (index, ids), output in zip(batch.items(), outputs, strict=True)
        }


class SteadyScorer:
    """Stands in for ScorerClient: a fixed rate, and scores drawn for `self.about.key`, which the scoring thread sets."""

    def __init__(self, pairs_per_second: float):
        self.rate, self.about, self.turn = pairs_per_second, threading.local(), threading.Lock()
        self.about.key = (0,)
        self.on_wait: Callable[[float], None] | None = None

    def identity(self) -> dict:
        return {"reward_model": "stand-in"}

    def score(self, prompts: list[str], responses: list[str], finished: list[bool] | None = None) -> Scores:
        with self.turn:
            time.sleep(len(prompts) / self.rate)
        drawn = np.random.default_rng(getattr(self.about, "key", (0,))).normal(size=(2, len(prompts)))
        return Scores(drawn[0], drawn[1], [None] * len(prompts), [False] * len(prompts))


class UnsavedTrainer(ESTrainer):
    """Writes no models (27 GB each)."""

    def _save_model(self, final: Path, t: int, **state: float | str) -> None:
        pass


class HashedScores(MemberScores):
    """Says to SteadyScorer which member it is about, and keeps a hash of each answer."""

    answers: ClassVar[list[dict]] = []  # of this process

    def _score(self, member: int, answers: Sequence[Generation]) -> dict:
        self._scorer.about.key = (self._iteration + 1, member + 1)  # type: ignore[attr-defined]
        hashes = [hashlib.sha256(answer.raw.encode()).hexdigest()[:16] for answer in answers]
        self.answers.append({"iteration": self._iteration, "member": member, "answers": hashes})
        return super()._score(member, answers)


def work(options: argparse.Namespace) -> None:
    """One process of a run. The main one writes result.json into options.inside."""
    run = Path(options.inside)
    lengths = np.loadtxt(run.parent / "lengths.csv", delimiter=",", dtype=int, ndmin=2)
    processes = Processes.from_environment()
    settings = ESSettings(
        policy_model_path=str(run.parent / "policy"),
        scorer_url="-",
        experiment_dir=str(run),
        engine="vllm",
        population_size=options.members,
        batch_size=len(lengths),
        num_iterations=options.iterations,
        eval_every=10**6,
        save_every=10**6,
        max_new_tokens=int(lengths[:, 1].max()),
        master_device=options.master_device,
    )
    rng = np.random.default_rng(0)
    words = [[f"w{word}" for word in rng.integers(3, options.words, max(1, n - TEMPLATE_TOKENS))] for n, _ in lengths]
    rows = [{"prompt": " ".join(one)} for one in words]
    prompts = [row["prompt"] for row in rows]
    start = time.perf_counter()
    vllm_engine.VLLMEngine = LengthsEngine  # type: ignore[misc]  # what open_engine takes
    engine = open_engine(settings, prompts, processes)
    assert isinstance(engine, LengthsEngine)
    encoded = [tuple(engine.template.encode_prompt(engine.tokenizer, prompt)) for prompt in prompts]
    engine.lengths = dict(zip(encoded, map(int, lengths[:, 1]), strict=True))
    loaded = time.perf_counter()
    scorer = SteadyScorer(options.pairs_per_second / processes.world_size)
    trainer = UnsavedTrainer(settings, engine, scorer, rows, rows, run, processes)
    es_trainer.MemberScores = HashedScores  # type: ignore[misc]  # what ESTrainer takes
    prepared = time.perf_counter()
    engine.generate(prompts, settings.max_new_tokens)
    alone = [_seconds(lambda: engine.generate(prompts, settings.max_new_tokens)) for _ in range(options.alone)]
    with StopSignal() as stop:
        assert trainer.run(stop)
    hashes = processes.gather(trainer.weights.hash())
    everyones = processes.gather(HashedScores.answers)
    memory = _memory(engine.device)
    published = statistics.median(
        _seconds(lambda: published_pass(engine)) for _ in range(3)
    )  # the weights are of no use now
    if processes.is_main:
        write_jsonl(
            run / "answers.jsonl", sorted(sum(everyones, []), key=lambda row: (row["iteration"], row["member"]))
        )
        steps = [row for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "train"]
        result = {
            "vllm_start": loaded - start,
            "master_and_base_hash": prepared - loaded,
            "prompt_tokens": sum(map(len, encoded)),
            "member_alone": statistics.median(alone),
            "published_pass": published,
            "iterations": [row["seconds"] for row in steps],
            "tokens": int(lengths[:, 1].sum()) * (options.members + 1),
            "hashes": hashes,
            **memory,
        }
        write_json(run / "result.json", result)
    engine.close()
    processes.close()


def published_pass(engine: vllm_engine.VLLMEngine) -> None:
    """One seed's noise added in place, in the weights' dtype."""
    for tensor in engine.parameters().values():
        generator = torch.Generator(tensor.device).manual_seed(7)
        tensor.add_(0.001 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device))
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _memory(device: torch.device) -> dict:
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"gpu_gib": total / GIB, "gpu_used_gib": (total - free) / GIB}


def make_policy(folder: Path, options: argparse.Namespace) -> None:
    """Random float16 weights in Llama-7B's shapes, shards of some layers, and a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = policy_7b(options.layers)
    if options.tiny:
        config.hidden_size, config.intermediate_size, config.num_attention_heads = 128, 256, 4
        config.num_key_value_heads, config.head_dim, config.vocab_size = 4, 32, options.words
    config.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{word}": word for word in range(3, options.words)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    number = 0
    shapes = list(shapes_of(config).items())
    for place, (name, shape) in enumerate(shapes, start=1):
        tensor = torch.ones(shape, dtype=torch.float16, device=device)
        shard[name] = (tensor.normal_(0, 0.02, generator=generator) if len(shape) > 1 else tensor).cpu()
        if sum(one.nbytes for one in shard.values()) > 2 * GIB or place == len(shapes):
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--lengths", help="CSV of prompt and response lengths; default --prompts x (45, 255)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of GPUs, a run for each")
    parser.add_argument("--members", type=int, default=30, help="of the population")
    parser.add_argument("--prompts", type=int, default=64, help="a member")
    parser.add_argument("--iterations", type=int, default=1, help="a run")
    parser.add_argument("--layers", type=int, default=32, help="of the 7B model")
    parser.add_argument("--pairs_per_second", type=float, default=74.6, help="what the scorer of all GPUs takes")
    parser.add_argument(
        "--master_device", choices=["auto", "cpu"], default="auto", help="where the float32 master lies"
    )
    parser.add_argument("--alone", type=int, default=5, help="how often generation alone is measured")
    parser.add_argument("--folder", help="kept, with the weights and what was measured; default: a temporary one")
    parser.add_argument("--words", type=int, default=32001, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=["work", "policy"], help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "work":
        work(options)
    elif options.part == "policy":
        make_policy(Path(options.inside), options)
    elif options.folder:
        compare(options, Path(options.folder))
    else:
        with tempfile.TemporaryDirectory() as folder:
            compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    itself = [__file__, *sys.argv[1:], "--inside"]
    if not (folder / "policy" / "model.safetensors.index.json").exists():
        np.savetxt(folder / "lengths.csv", draw_lengths(options.lengths, options.prompts), fmt="%d", delimiter=",")
        (folder / "policy").mkdir(exist_ok=True)
        start = time.perf_counter()
        subprocess.run([sys.executable, *itself, str(folder / "policy"), "--part", "policy"], check=True)
        print(f"random weights made in {time.perf_counter() - start:.0f} s", flush=True)
    found: dict = {"device": device_name()}
    for count in options.gpus:
        run = folder / f"gpus{count}"
        if not (run / "result.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            run.mkdir()
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
            subprocess.run([sys.executable, *launcher, *itself, str(run), "--part", "work"], check=True)
        found[str(count)] = read_json(run / "result.json")
        show(found["device"], count, found[str(count)], options)
    first, *others = options.gpus
    base = found[str(first)]
    found["same_weights"] = len({one for count in options.gpus for one in found[str(count)]["hashes"]}) == 1
    for count in others:
        one = found[str(count)]
        one["times_faster"] = _mean(base, "total") / _mean(one, "total")
        one["equal_answers"] = _equal(folder, first, count)
        print(
            f"{count} GPUs: {one['times_faster']:.2f} times as fast as {first}; {one['equal_answers']:.1%} of the answers equal; "
            f"weights' hash equal: {base['hashes'][0] == one['hashes'][0]}"
        )
    print(json.dumps(found))


def show(device: str, count: int, found: dict, options: argparse.Namespace) -> None:
    own = -(-(options.members + 1) // count)  # members that the busiest GPU answers, the policy itself among them
    limit = own * found["member_alone"]
    found["generation_alone"], found["over_generation"] = limit, _mean(found, "total") / limit - 1
    one_way = found["published_pass"]
    found["published_way"] = (
        -(-options.members // count) * (found["member_alone"] + 2 * one_way)
        + options.members * options.prompts / options.pairs_per_second
        + options.members * one_way
    )
    parts = ", ".join(f"{name} {_mean(found, name):.2f}" for name in ("generate", "perturb", "wait_for_scores", "step"))
    memory = f", {found['gpu_used_gib']:.1f} of {found['gpu_gib']:.1f} GiB used" if "gpu_gib" in found else ""
    print(
        f"{count} x {device}: {options.members} members x {options.prompts} prompts, {len(found['iterations'])} iterations: "
        f"{_mean(found, 'total'):.2f} s each ({parts}), generation alone {limit:.2f} s, {found['over_generation']:+.1%}; "
        f"{found['tokens'] / _mean(found, 'total'):,.0f} tokens/s{memory}; vLLM started in {found['vllm_start']:.0f} s; "
        f"published way {found['published_way']:.2f} s, {found['published_way'] / _mean(found, 'total'):.2f} times as long",
        flush=True,
    )


def _mean(found: dict, name: str) -> float:
    return statistics.fmean(seconds[name] for seconds in found["iterations"])


def _equal(folder: Path, first: int, second: int) -> float:
    """The share of answers that two runs have in common."""
    one, other = (read_jsonl(folder / f"gpus{count}" / "answers.jsonl") for count in (first, second))
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a["answers"], b["answers"], strict=True)]
    return statistics.fmean(a == b for a, b in pairs)


if __name__ == "__main__":
    main()
