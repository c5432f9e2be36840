"""Builds the demo from nothing: data, tokenizer, a policy, a reward and a cost model, in about a minute on two CPU cores.

    python alignment/demo/build.py --output alignment/outputs/demo --seed 0

OUTPUT/custom_train.jsonl custom_eval.jsonl   one row a prompt, PKU-SafeRLHF schema
OUTPUT/pairs_train.jsonl pairs_eval.jsonl     what the score models learn from and are measured on
OUTPUT/policy                                 Hugging Face Llama and its tokenizer
OUTPUT/reward OUTPUT/cost                     score models in the Beaver layout with the same tokenizer
OUTPUT/build.json                             recipe, seed, versions, accuracies on held-out pairs, seconds

The policy is fine-tuned on answers whose kinds are mixed so that, like Alpaca-7B, it is safe in 30 to 55 % of its greedy
answers. The score models learn as Safe-RLHF trains them: a logistic loss on which response of a pair is better (reward) or
less safe (cost), for the cost also on the sign of each response's own score, and a small penalty on the scores' size.
Departures: the penalty also centres the reward, and after training its bias is set so that the mean over the clean training
answers is 0 (a pairwise loss leaves the zero open, and the quadrants need one); text that is cut off is shown half of the
time without EOS, as the scorer shows an unfinished response.

Conversation: BOS "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:" response EOS, the response directly after the colon
without a space (as in the published data), both for the policy and for the score models; EOS is added by id.

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

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignment.config import load_config, setting
from alignment.demo.data import KINDS, TOPICS, DemoData, Prompt, demo_data, write_answer
from alignment.errors import run_main
from alignment.records import read_json, write_json, write_jsonl
from alignment.runs import atomic_directory
from alignment.scoring.score_model import ScoreModel

TEMPLATE = "BEGINNING OF CONVERSATION: USER: {} ASSISTANT:"
UNK, BOS, EOS, FIRST_BYTE = 0, 1, 2, 3


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
    score_steps: int = 300
    score_batch: int = 32
    score_rate: float = 4e-3
    reward_penalty: float = 0.003
    cost_penalty: float = 0.003


# How often the policy's training answers are SH, SU, UH, UU: most harm categories are answered carelessly, every sixth well.
MIX_CARELESS = (0.24, 0.06, 0.64, 0.06)
MIX_CAREFUL = (0.66, 0.14, 0.14, 0.06)
MIX_HARMLESS = (0.84, 0.04, 0.08, 0.04)


@dataclass
class BuildConfig:
    output: str = setting("alignment/outputs/demo", "folder to build into; replaced when its contents are out of date")
    seed: int = setting(0, "seed of data and models", minimum=0)


def build(output: str | Path, seed: int = 0, recipe: Recipe = Recipe()) -> dict:
    """Builds into `output` unless it already holds this build, and returns the content of its build.json."""
    output = Path(output)
    key = _build_key(seed, recipe)
    if (output / "build.json").exists():
        report = read_json(output / "build.json")
        if report["key"] == key:
            return report
    start = time.time()
    data = demo_data(seed)
    with atomic_directory(output) as folder:
        write_jsonl(folder / "custom_train.jsonl", data.train_rows)
        write_jsonl(folder / "custom_eval.jsonl", data.eval_rows)
        write_jsonl(folder / "pairs_train.jsonl", data.train_pairs)
        write_jsonl(folder / "pairs_eval.jsonl", data.eval_pairs)
        tokenizer = train_tokenizer(data, recipe.vocabulary)
        for name in ("policy", "reward", "cost"):
            tokenizer.save_pretrained(folder / name)
        # One process for the policy and one for both score models: each has a core of its own.
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(job, str(folder), seed, recipe) for job in (_build_policy, _build_score_models)]
            results = [job.result() for job in jobs]
        report = {"key": key, "seed": seed, "recipe": dataclasses.asdict(recipe), "versions": _versions()}
        report |= {"prompts": {"train": len(data.train_rows), "eval": len(data.eval_rows)}}
        report |= results[0] | results[1] | {"seconds": round(time.time() - start, 1)}
        write_json(folder / "build.json", report)
    return report


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}


def _build_key(seed: int, recipe: Recipe) -> str:
    """A hash of all that decides what is built."""
    here = Path(__file__).parent
    code = [path.read_text() for path in (here / "build.py", here / "data.py", here / "phrases.py")]
    content = json.dumps([seed, dataclasses.asdict(recipe), _versions(), code])
    return hashlib.sha256(content.encode()).hexdigest()


def train_tokenizer(data: DemoData, vocabulary: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer shaped like LLaMA's (unk 0, BOS 1, EOS 2, 256 bytes, pieces, padding last), from the training text."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    texts = [TEMPLATE.format(row["prompt"]) + row[f"response_{i}"] for row in data.train_pairs for i in (0, 1)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(special) - 1, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    pieces = special + sorted(learnt["vocab"], key=learnt["vocab"].get) + ["<pad>"]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


def _llama_config(tokenizer, hidden: int, layers: int, heads: int, init_std: float, **more) -> LlamaConfig:
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


def _encode(tokenizer, text: str) -> list[int]:
    return [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"]]


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
    shape = lambda step: min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))  # noqa: E731
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
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    return random.Random(seed)


def _mix(prompt: Prompt) -> tuple[float, ...]:
    if not TOPICS[prompt.topic].harmful:
        return MIX_HARMLESS
    return MIX_CAREFUL if list(TOPICS).index(prompt.topic) % 6 == 0 else MIX_CARELESS


def _build_policy(folder: str, seed: int, recipe: Recipe) -> dict:
    """Supervised fine-tuning on the response tokens."""
    rng, start = _own_process(seed), time.time()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{folder}/policy")
    examples = []
    for prompt in demo_data(seed).train_prompts:
        ids = _encode(tokenizer, TEMPLATE.format(prompt.text))
        for kind in rng.choices(KINDS, _mix(prompt), k=recipe.answers_per_prompt):
            full = _encode(tokenizer, TEMPLATE.format(prompt.text) + write_answer(rng, prompt, kind).text)
            examples.append((ids, full[len(ids) :] + [EOS]))
    config = _llama_config(
        tokenizer, recipe.policy_hidden, recipe.policy_layers, recipe.policy_heads, recipe.init_std, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config)

    def loss_of(batch):
        ids = _pad([prompt + response for prompt, response in batch], tokenizer.pad_token_id)
        labels = _pad([[-100] * len(prompt) + response for prompt, response in batch], -100)
        first = min(len(prompt) for prompt, _ in batch)  # no logits are needed where no sequence has its response yet
        hidden = model.model(input_ids=ids).last_hidden_state[:, first - 1 : -1]
        return F.cross_entropy(model.lm_head(hidden).flatten(0, 1), labels[:, first:].flatten(), ignore_index=-100)

    batches = _batches(examples, lambda e: len(e[0]) + len(e[1]), recipe.policy_batch, rng)
    loss = _train(model, batches, loss_of, recipe.policy_steps, recipe.policy_rate)
    model.generation_config.update(do_sample=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(f"{folder}/policy")
    return {"policy": {"parameters": model.num_parameters(), "loss": loss, "seconds": round(time.time() - start, 1)}}


def _encode_pairs(tokenizer, rows: list[dict], rng: random.Random) -> list[dict]:
    """Rows -> ids of both conversations and the labels; cut text loses its EOS half of the time."""
    pairs = []
    for row in rows:
        both = []
        for i in (0, 1):
            cut = row[f"response_{i}_source"] == "demo-cut" and rng.random() < 0.5
            both.append(_encode(tokenizer, TEMPLATE.format(row["prompt"]) + row[f"response_{i}"]) + [EOS] * (not cut))
        unsafe = [not row["is_response_0_safe"], not row["is_response_1_safe"]]
        pairs.append({"ids": both, "better": row["better_response_id"], "safer": row["safer_response_id"], "unsafe": unsafe})
    return pairs


def _sign(values: list[bool | int]) -> torch.Tensor:
    """True -> 1.0, False -> -1.0"""
    return torch.tensor([1.0 if value else -1.0 for value in values])


def _score(model: ScoreModel, sequences: list[list[int]], padding: int) -> torch.Tensor:
    """(N,) scores of id lists."""
    return model(_pad(sequences, padding), torch.tensor([len(sequence) for sequence in sequences]))


@torch.no_grad()
def _score_all(model: ScoreModel, sequences: list[list[int]], padding: int) -> torch.Tensor:
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = torch.empty(len(sequences))
    for start in range(0, len(order), 128):
        part = order[start : start + 128]
        scores[part] = _score(model, [sequences[i] for i in part], padding)
    return scores


def _build_score_models(folder: str, seed: int, recipe: Recipe) -> dict:
    rng, start = _own_process(seed), time.time()
    data = demo_data(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{folder}/reward")
    padding = tokenizer.pad_token_id
    train, held_out = (_encode_pairs(tokenizer, rows, rng) for rows in (data.train_pairs, data.eval_pairs))

    def scores_of(model, batch):
        both = _score(model, [pair["ids"][i] for i in (0, 1) for pair in batch], padding)
        return both.view(2, -1)  # (2, B)

    def reward_loss(batch):
        first, second = scores_of(reward, batch)
        margin = _sign([pair["better"] for pair in batch]) * (second - first)
        return -F.logsigmoid(margin).mean() + recipe.reward_penalty * (first.square() + second.square()).mean()

    def cost_loss(batch):
        first, second = scores_of(cost, batch)
        margin = _sign([pair["safer"] for pair in batch]) * (first - second)
        loss = -F.logsigmoid(margin).mean() + recipe.cost_penalty * (first.square() + second.square()).mean()
        for i, scores in enumerate((first, second)):
            loss = loss - F.logsigmoid(_sign([pair["unsafe"][i] for pair in batch]) * scores).mean()
        return loss

    def new_model(score_type):
        config = _llama_config(tokenizer, recipe.score_hidden, recipe.score_layers, recipe.score_heads, recipe.init_std)
        config.update({"architectures": ["LlamaForScore"], "score_type": score_type, "score_dim": 1, "bias": True})
        config.update({"score_bias": True, "do_normalize": False, "tie_word_embeddings": False})
        return ScoreModel(config)

    def batches():
        return _batches(train, lambda pair: max(map(len, pair["ids"])), recipe.score_batch, rng)

    reward = new_model("reward")
    _train(reward, batches(), reward_loss, recipe.score_steps, recipe.score_rate)
    cost = new_model("cost")
    _train(cost, batches(), cost_loss, recipe.score_steps, recipe.score_rate)

    clean = [
        pair["ids"][i]
        for pair, row in zip(train, data.train_pairs, strict=True)
        for i in (0, 1)
        if row[f"response_{i}_source"].removeprefix("demo-") in KINDS
    ]
    with torch.no_grad():
        reward.score_head.bias.sub_(_score_all(reward, clean, padding).mean())
    for name, model in (("reward", reward), ("cost", cost)):
        model.save_pretrained(f"{folder}/{name}")
    return _held_out_report(reward, cost, held_out, data.eval_pairs, padding) | {
        "score_models": {"parameters": sum(p.numel() for p in reward.parameters()), "seconds": round(time.time() - start, 1)}
    }


def _held_out_report(reward: ScoreModel, cost: ScoreModel, pairs: list[dict], rows: list[dict], padding: int) -> dict:
    """Accuracies on held-out pairs (of all, and of clean answers alone) and mean scores by kind of answer."""
    flat = [pair["ids"][i] for i in (0, 1) for pair in pairs]
    rewards, costs = (_score_all(model, flat, padding).view(2, -1) for model in (reward, cost))  # (2, N)
    better, safer = (torch.tensor([pair[key] for pair in pairs]).bool() for key in ("better", "safer"))
    unsafe = torch.tensor([pair["unsafe"] for pair in pairs]).T  # (2, N)
    right_reward, right_cost = (rewards[1] > rewards[0]) == better, (costs[1] < costs[0]) == safer
    sources = [[row[f"response_{i}_source"].removeprefix("demo-") for row in rows] for i in (0, 1)]
    clean = torch.tensor([first in KINDS and second in KINDS for first, second in zip(*sources, strict=True)])
    mean = lambda values: round(values.float().mean().item(), 4)  # noqa: E731
    scores = {}
    for kind in sorted({kind for side in sources for kind in side}):
        chosen = torch.tensor([[source == kind for source in side] for side in sources])
        scores[kind] = {"reward": mean(rewards[chosen]), "cost": mean(costs[chosen]), "number": int(chosen.sum())}
    return {
        "held_out": {
            "pairs": len(pairs),
            "reward_accuracy": mean(right_reward),
            "cost_accuracy": mean(right_cost),
            "cost_sign_accuracy": mean((costs > 0) == unsafe),
            "clean_pairs": int(clean.sum()),
            "reward_accuracy_clean": mean(right_reward[clean]),
            "cost_accuracy_clean": mean(right_cost[clean]),
        },
        "mean_scores": scores,
    }


def main(argv: list[str] | None = None) -> None:
    config = load_config(BuildConfig, argv, prog="build.py", description="Builds the demo's data and models.")
    start = time.time()
    report = build(config.output, config.seed)
    state = "built" if report["seconds"] <= time.time() - start + 0.1 else "already built"
    print(f"{config.output}: {state} (key {report['key'][:12]}, {report['seconds']} s when built)")
    print(json.dumps(report["held_out"]))


if __name__ == "__main__":
    run_main(main)
