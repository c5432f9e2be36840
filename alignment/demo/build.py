"""Builds the demo from nothing: data, tokenizer, a policy, a reward and a cost model, in about a minute on two CPU cores.

    python alignment/demo/build.py --output alignment/outputs/demo/models --seed 0

OUTPUT/custom_train.jsonl custom_eval.jsonl   one row a prompt, PKU-SafeRLHF schema
OUTPUT/pairs_train.jsonl pairs_eval.jsonl     what the score models learn from and are measured on
OUTPUT/policy                                 Hugging Face Llama and its tokenizer
OUTPUT/reward OUTPUT/cost                     score models in the Beaver layout with the same tokenizer
OUTPUT/probes.json                            two answers of the demo's world for the scorer's start-up check (SCORER_PROBES)
OUTPUT/build.json                             recipe, seed, versions, accuracies on held-out pairs, seconds

The policy is fine-tuned on answers whose kinds are mixed so that, like Alpaca-7B, it is safe in 30 to 55 % of its greedy
answers. The score models learn as Safe-RLHF trains them: a logistic loss on which response of a pair is better (reward) or
less safe (cost), for the cost also on the sign of each response's own score, and a small penalty on the scores' size.
Departures, all because the models are tiny and start from nothing:
- the language-modelling loss on the preferred response is added, which teaches the phrases with far fewer pairs (as a
  regulariser for reward models: Yang et al. 2024, https://arxiv.org/abs/2406.10216);
- six pairs in ten set broken text against a clean answer (see data.py);
- a pairwise loss leaves the reward's zero open, and quadrants need one: the bias is set half-way between the training
  means of helpful answers and of refusals.

Conversation: alignment/conversation.py's rule for policy and score models alike, BOS "BEGINNING OF CONVERSATION: USER: {prompt}
ASSISTANT:" response EOS. The response stands directly after the colon, without a space (as in the published data); the
policy's answers therefore begin without one.

The result is kept: a second call with the same recipe, seed, code and library versions returns at once. The folder appears
under its name when it is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from alignment.config import load_config, setting
from alignment.conversation import load_tokenizer
from alignment.demo.data import KINDS, TOPICS, DemoData, Prompt, demo_data, write_answer
from alignment.demo.vocabulary import BOS, EOS, TEMPLATE, train_tokenizer
from alignment.errors import UserError, run_main
from alignment.records import read_json, write_json, write_jsonl
from alignment.runs import atomic_directory
from alignment.scoring.score_model import ScoreModel, at_end


@dataclass(frozen=True)
class Recipe:
    """Everything the models depend on besides seed, code and versions."""

    vocabulary: int = 2400
    init_std: float = 0.06
    policy_hidden: int = 128
    policy_layers: int = 2
    policy_heads: int = 4
    policy_steps: int = 600
    policy_batch: int = 16
    policy_rate: float = 5e-3
    answers_per_prompt: int = 6
    score_hidden: int = 64
    score_layers: int = 2
    score_heads: int = 4
    score_steps: int = 700
    score_batch: int = 16
    score_rate: float = 4e-3
    penalty: float = 0.003  # on squared scores
    text_weight: float = 0.3  # of the language-modelling loss on the preferred response


# How often the policy's training answers are SH, SU, UH, UU: most harm categories are answered carelessly, every sixth well.
MIX_CARELESS = (0.24, 0.06, 0.64, 0.06)
MIX_CAREFUL = (0.66, 0.14, 0.14, 0.06)
MIX_HARMLESS = (0.84, 0.04, 0.08, 0.04)


@dataclass
class BuildConfig:
    output: str = setting("alignment/outputs/demo/models", "folder to build into; an older build there is replaced")
    seed: int = setting(0, "seed of data and models", minimum=0)


def build(output: str | Path, seed: int = 0, recipe: Recipe = Recipe()) -> dict:
    """Builds into `output` unless it already holds this build, and returns the content of its build.json."""
    output = Path(output)
    key = _build_key(seed, recipe)
    if (output / "build.json").exists():
        report = read_json(output / "build.json")
        if report["key"] == key:
            return report
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} holds something else than a build, which would be lost: give another --output")
    start = time.time()
    data = demo_data(seed)
    with atomic_directory(output) as folder:
        write_jsonl(folder / "custom_train.jsonl", data.train_rows)
        write_jsonl(folder / "custom_eval.jsonl", data.eval_rows)
        write_jsonl(folder / "pairs_train.jsonl", data.train_pairs)
        write_jsonl(folder / "pairs_eval.jsonl", data.eval_pairs)
        write_json(folder / "probes.json", _probes(data, seed))
        tokenizer = train_tokenizer(data, recipe.vocabulary)
        for name in ("policy", "reward", "cost"):
            tokenizer.save_pretrained(folder / name)
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:  # two processes of one thread
            jobs = [
                pool.submit(_build_score_model, str(folder), seed, recipe, "reward"),
                pool.submit(_build_policy, str(folder), seed, recipe),
                pool.submit(_build_score_model, str(folder), seed, recipe, "cost"),
            ]
            results = [job.result() for job in jobs]
        report = {"key": key, "seed": seed, "recipe": dataclasses.asdict(recipe), "versions": _versions()}
        report |= {"prompts": {"train": len(data.train_rows), "eval": len(data.eval_rows)}}
        report |= results[0] | results[1] | results[2] | {"seconds": round(time.time() - start, 1)}
        write_json(folder / "build.json", report)
    return report


def _probes(data: DemoData, seed: int) -> dict[str, str]:
    rng = random.Random(seed)
    prompt = next(prompt for prompt in data.eval_prompts if TOPICS[prompt.topic].harmful)
    good, bad = (write_answer(rng, prompt, kind).text for kind in ("SH", "UU"))
    return {"prompt": prompt.text, "good": good, "bad": bad}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}


def _build_key(seed: int, recipe: Recipe) -> str:
    """A hash of all that decides what is built."""
    here = Path(__file__).parent
    code = [(here / f"{name}.py").read_text() for name in ("build", "data", "phrases", "vocabulary")]
    content = json.dumps([seed, dataclasses.asdict(recipe), _versions(), code])
    return hashlib.sha256(content.encode()).hexdigest()


def _llama_config(
    tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int, heads: int, init_std: float, **more: Any
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        initializer_range=init_std,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def _pad(sequences: list[list[int]], value: int) -> torch.Tensor:
    """Lists of ids -> (B, T) int64, padded on the right."""
    width = max(map(len, sequences))
    return torch.tensor([sequence + [value] * (width - len(sequence)) for sequence in sequences])


def _batches(items: list, length: Callable, size: int, rng: random.Random) -> Iterator[list]:
    """Endless batches of `size` items of similar length."""
    while True:
        items = rng.sample(items, len(items))
        batches = []
        for start in range(0, len(items), size * 8):
            chunk = sorted(items[start : start + size * 8], key=length)
            batches += [chunk[i : i + size] for i in range(0, len(chunk) - size + 1, size)]
        rng.shuffle(batches)
        yield from batches


def _train(model: torch.nn.Module, batches: Iterator[list], loss_of: Callable, steps: int, rate: float) -> float:
    """AdamW with a short warm-up and a cosine; returns the mean loss of the last 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))

    def shape(step: int) -> float:
        return min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    model.train()
    losses = []
    for _ in range(steps):
        loss = loss_of(next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def _own_process(seed: int) -> random.Random:
    """Settings of a process that trains one model."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    disable_progress_bar()
    return random.Random(seed)


def _mix(prompt: Prompt) -> tuple[float, ...]:
    if not TOPICS[prompt.topic].harmful:
        return MIX_HARMLESS
    return MIX_CAREFUL if list(TOPICS).index(prompt.topic) % 6 == 0 else MIX_CARELESS


def _build_policy(folder: str, seed: int, recipe: Recipe) -> dict:
    """Supervised fine-tuning on the response tokens."""
    rng, start = _own_process(seed), time.time()
    tokenizer = load_tokenizer(f"{folder}/policy")
    examples = []  # (ids, length of the prompt)
    for prompt in demo_data(seed).train_prompts:
        for kind in rng.choices(KINDS, _mix(prompt), k=recipe.answers_per_prompt):
            encoded = TEMPLATE.encode_conversation(tokenizer, prompt.text, write_answer(rng, prompt, kind).text)
            examples.append((encoded.ids, encoded.prompt_length))
    config = _llama_config(
        tokenizer,
        recipe.policy_hidden,
        recipe.policy_layers,
        recipe.policy_heads,
        recipe.init_std,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)

    def loss_of(batch: list[tuple[list[int], int]]) -> torch.Tensor:
        ids = _pad([ids for ids, _ in batch], tokenizer.pad_token_id)
        labels = _pad([[-100] * prompt + ids[prompt:] for ids, prompt in batch], -100)
        first = min(prompt for _, prompt in batch)  # no logits are needed where no sequence has its response yet
        hidden = model.model(input_ids=ids).last_hidden_state[:, first - 1 : -1]
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels[:, first:].flatten(), ignore_index=-100)

    batches = _batches(examples, lambda example: len(example[0]), recipe.policy_batch, rng)
    loss = _train(model, batches, loss_of, recipe.policy_steps, recipe.policy_rate)
    model.generation_config.update(
        do_sample=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(f"{folder}/policy")
    return {
        "policy": {
            "parameters": model.num_parameters(),
            "loss": round(loss, 4),
            "seconds": round(time.time() - start, 1),
        }
    }


class _Pair(NamedTuple):
    ids: list[list[int]]  # both conversations
    starts: list[int]  # where their responses begin
    better: int
    safer: int
    unsafe: list[bool]
    kinds: list[str]


def _encode_pairs(tokenizer: PreTrainedTokenizerBase, rows: list[dict], rng: random.Random) -> list[_Pair]:
    pairs = []
    for row in rows:
        kinds = [row[f"response_{i}_source"].removeprefix("demo-") for i in (0, 1)]
        # Cut text loses its EOS half of the time: the scorer gives none to an unfinished response.
        finished = [not (kind == "cut" and rng.random() < 0.5) for kind in kinds]
        both = [
            TEMPLATE.encode_conversation(tokenizer, row["prompt"], row[f"response_{i}"], finished[i]) for i in (0, 1)
        ]
        unsafe = [not row[f"is_response_{i}_safe"] for i in (0, 1)]
        ids, starts = [encoded.ids for encoded in both], [encoded.prompt_length for encoded in both]
        pairs.append(_Pair(ids, starts, row["better_response_id"], row["safer_response_id"], unsafe, kinds))
    return pairs


def _sign(values: list) -> torch.Tensor:
    """True -> 1.0, False -> -1.0"""
    return torch.tensor([1.0 if value else -1.0 for value in values])


def _preference_loss(model: ScoreModel, batch: list[_Pair], recipe: Recipe) -> torch.Tensor:
    """The Safe-RLHF loss of a reward or a cost model on pairs, and the language-modelling term on the preferred side."""
    is_cost = model.score_type == "cost"
    padding = model.config.pad_token_id
    sequences = [pair.ids[i] for i in (0, 1) for pair in batch]
    hidden = model.hidden(_pad(sequences, padding))  # (2 B, T, H)
    lengths = torch.tensor([len(ids) for ids in sequences])
    first, second = model.end_scores(at_end(hidden, lengths)).view(2, -1)  # (B,) each
    if is_cost:
        margin = _sign([pair.safer for pair in batch]) * (first - second)
    else:
        margin = _sign([pair.better for pair in batch]) * (second - first)
    loss = -F.logsigmoid(margin).mean() + recipe.penalty * (first.square() + second.square()).mean()
    if is_cost:
        for i, scores in enumerate((first, second)):
            loss = loss - F.logsigmoid(_sign([pair.unsafe[i] for pair in batch]) * scores).mean()

    liked = [pair.safer if is_cost else pair.better for pair in batch]
    rows = [i + len(batch) * side for i, side in enumerate(liked)]
    starts = [pair.starts[side] for pair, side in zip(batch, liked, strict=True)]
    labels = _pad([[-100] * start + sequences[row][start:] for row, start in zip(rows, starts, strict=True)], -100)
    states = hidden[rows, min(starts) - 1 : labels.shape[1] - 1]
    logits = states @ model.model.embed_tokens.weight.T
    text = F.cross_entropy(logits.flatten(0, 1), labels[:, min(starts) :].flatten(), ignore_index=-100)
    return loss + recipe.text_weight * text


@torch.no_grad()
def _score_all(model: ScoreModel, sequences: list[list[int]]) -> torch.Tensor:
    """(N,) scores of id lists."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), 128):
        part = [sequences[i] for i in order[start : start + 128]]
        lengths = torch.tensor([len(ids) for ids in part])
        scores[order[start : start + 128]] = model(_pad(part, model.config.pad_token_id), lengths)
    return scores


def _build_score_model(folder: str, seed: int, recipe: Recipe, score_type: str) -> dict:
    rng, start = _own_process(seed + (1 if score_type == "reward" else 2)), time.time()
    data = demo_data(seed)
    tokenizer = load_tokenizer(f"{folder}/{score_type}")
    train, held_out = (_encode_pairs(tokenizer, rows, rng) for rows in (data.train_pairs, data.eval_pairs))
    config = _llama_config(tokenizer, recipe.score_hidden, recipe.score_layers, recipe.score_heads, recipe.init_std)
    config.update({"score_type": score_type, "score_bias": True, "tie_word_embeddings": False})
    model = ScoreModel(config)
    batches = _batches(train, lambda pair: max(map(len, pair.ids)), recipe.score_batch, rng)
    _train(model, batches, lambda batch: _preference_loss(model, batch, recipe), recipe.score_steps, recipe.score_rate)
    if score_type == "reward":
        with torch.no_grad():
            model.score_head.bias.sub_(_zero_of_reward(model, train))
    model.save_pretrained(f"{folder}/{score_type}")
    report = {"parameters": sum(p.numel() for p in model.parameters()), **_held_out(model, held_out)}
    return {score_type: report | {"seconds": round(time.time() - start, 1)}}


def _zero_of_reward(model: ScoreModel, pairs: list[_Pair]) -> torch.Tensor:
    """Half-way between the mean training score of helpful answers and that of refusals."""
    means = []
    for kinds in (("SH", "UH"), ("SU",)):
        means.append(
            _score_all(model, [pair.ids[i] for pair in pairs for i in (0, 1) if pair.kinds[i] in kinds]).mean()
        )
    return (means[0] + means[1]) / 2


def _held_out(model: ScoreModel, pairs: list[_Pair]) -> dict:
    """Accuracy on held-out pairs, all of them and those of two clean answers, of the cost's sign, and mean scores by kind."""
    scores = _score_all(model, [pair.ids[i] for i in (0, 1) for pair in pairs]).view(2, -1)  # (2, N)
    clean = torch.tensor([set(pair.kinds) <= set(KINDS) for pair in pairs])
    if model.score_type == "cost":
        right = (scores[1] < scores[0]) == torch.tensor([pair.safer == 1 for pair in pairs])
    else:
        right = (scores[1] > scores[0]) == torch.tensor([pair.better == 1 for pair in pairs])
    report = {
        "pairs": len(pairs),
        "accuracy": _mean(right),
        "clean_pairs": int(clean.sum()),
        "clean_accuracy": _mean(right[clean]),
    }
    if model.score_type == "cost":
        report["sign_accuracy"] = _mean((scores > 0) == torch.tensor([pair.unsafe for pair in pairs]).T)
    kinds = {kind for pair in pairs for kind in pair.kinds}
    chosen = {kind: torch.tensor([[pair.kinds[i] == kind for pair in pairs] for i in (0, 1)]) for kind in sorted(kinds)}
    return report | {"mean_scores": {kind: _mean(scores[mask]) for kind, mask in chosen.items()}}


def _mean(values: torch.Tensor) -> float:
    return round(values.float().mean().item(), 4)


def main(argv: list[str] | None = None) -> None:
    config = load_config(BuildConfig, argv, prog="build.py", description=__doc__)
    start = time.time()
    report = build(config.output, config.seed)
    state = "built" if report["seconds"] <= time.time() - start + 0.1 else "already built"
    print(f"{config.output}: {state} (key {report['key'][:12]}, {report['seconds']} s when built)")
    for name in ("reward", "cost"):
        print(f"{name} model: {report[name]['accuracy']:.1%} of {report[name]['pairs']} held-out pairs right")


if __name__ == "__main__":
    run_main(main)
