"""Members in vLLM's batches: slots and the loop with a small engine of our own, and, where vLLM is installed (GPU or CPU
build), a member's tokens in a mixed batch against transformers with its weights written out.

With the CPU build: OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 pytest tests/test_vllm_members.py
"""

from __future__ import annotations

import importlib.util
import os
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alignment.errors import UserError
from alignment.generation import LowRank
from alignment.generation.members import linear_weights
from alignment.generation.vllm_members import MemberSlots, answer_members

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
on_gpu = torch.cuda.is_available()


def factors_of(shapes, seed, rank, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LowRank(
            scale / rank**0.5 * torch.randn(rows, rank, generator=generator),
            torch.randn(columns, rank, generator=generator),
        )
        for name, (rows, columns) in shapes.items()
    }


# ---- slots ----


def test_factors_lie_where_their_rows_are():
    slots = MemberSlots(count=2, rank=3, tokens=8, device=torch.device("cpu"), dtype=torch.float32)
    right, left = slots.add_layer(["q", "k"], [4, 2], inputs=5, rows=6)
    assert (right.shape, left.shape) == ((3, 6, 5), (3, 3, 6))
    assert slots.names == ["q", "k"]
    member = factors_of({"q": (4, 5), "k": (2, 5)}, seed=0, rank=2)
    slots.load(1, member)
    slots.load(2, {"k": member["k"]})
    for slot, name, part, rows in ((1, "q", 0, slice(0, 4)), (1, "k", 1, slice(4, 6)), (2, "k", 1, slice(4, 6))):
        added = left[slot, :, rows].T @ right[slot, 3 * part : 3 * part + 3]
        torch.testing.assert_close(added, member[name].left @ member[name].right.T)
    assert not left[2, :, :4].any()
    assert not left[0].any()
    slots.load(1, {})
    assert not left[1].any()
    assert not right[1].any()


def test_what_does_not_fit_is_refused():
    slots = MemberSlots(count=1, rank=1, tokens=8, device=torch.device("cpu"), dtype=torch.float32)
    slots.add_layer(["q"], [4], inputs=5, rows=4)
    with pytest.raises(UserError, match=r"cannot perturb norm"):
        slots.load(1, factors_of({"norm": (4, 5)}, 0, 1))
    with pytest.raises(UserError, match=r"q: factors \(4, 2\) and \(5, 2\), expected .* rank 1 or less"):
        slots.load(1, factors_of({"q": (4, 5)}, 0, 2))
    with pytest.raises(UserError, match="q: factors"):
        slots.load(1, factors_of({"q": (5, 4)}, 0, 1))


# ---- the loop ----


class SmallEngine:
    """Continuous batching: `at_once` requests, prompts in pieces, one step of delay. A token is 1000 m + the sum of all
    tokens before it modulo 1000, m being the left factor of the slot that the step's mark gives the token.
    """

    def __init__(self, slots, left, at_once=5, piece=3):
        self.slots, self.left, self.at_once, self.piece = slots, left, at_once, piece
        self.queue, self.batch, self.delayed, self.aborted = deque(), {}, [], []

    def add_request(self, name, prompt, choice):
        own = f"{name}-{len(self.queue)}"
        self.queue.append(
            (own, SimpleNamespace(name=name, tokens=list(prompt["prompt_token_ids"]), left=choice, seen=0))
        )
        return own

    def abort_request(self, names):
        self.aborted += names

    def step(self):
        while self.queue and len(self.batch) < self.at_once:
            own, request = self.queue.popleft()
            request.new = []
            self.batch[own] = request
        counts = [min(self.piece, len(r.tokens) - r.seen) for r in self.batch.values()]
        self.slots.mark(list(self.batch), np.array(counts, dtype=np.int32))
        marks, finished, at = self.slots.tokens, [], 0
        for row, ((own, request), count) in enumerate(zip(list(self.batch.items()), counts, strict=True)):
            assert set(marks[at : at + count].tolist()) == {int(self.slots.rows[row])}
            request.seen += count
            at += count
            if request.seen == len(request.tokens):
                member = round(float(self.left[marks[at - 1], 0, 0]))
                request.new.append(1000 * member + sum(request.tokens) % 1000)
                request.tokens.append(request.new[-1])
            if len(request.new) == request.left:
                del self.batch[own]
                output = SimpleNamespace(token_ids=request.new)
                finished.append(SimpleNamespace(request_id=request.name, finished=True, outputs=[output]))
        ready, self.delayed = self.delayed, finished
        return ready


def small(count):
    slots = MemberSlots(count=count, rank=1, tokens=64, device=torch.device("cpu"), dtype=torch.float32)
    _, left = slots.add_layer(["w"], [1], inputs=1, rows=1)
    members = [{"w": LowRank(torch.full((1, 1), float(m)), torch.ones(1, 1))} for m in range(1, 8)] + [{}]
    return slots, SmallEngine(slots, left), members


PROMPTS, LENGTHS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9]], [4, 1, 6]


@pytest.mark.parametrize("count", [1, 3, 20])
def test_every_member_answers_every_prompt(count):
    slots, engine, members = small(count)
    found, ends = {}, []

    def on_tokens(member, index, tokens):
        found[member, index] = tokens
        if sum(m == member for m, _ in found) == len(PROMPTS):
            ends.append(member)

    answer_members(engine, slots, PROMPTS, LENGTHS, members, on_tokens)
    for member in range(len(members)):
        value = (member + 1) % len(members)
        for index, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
            tokens = list(prompt)
            for _ in range(length):
                tokens.append(1000 * value + sum(tokens) % 1000)
            assert found[member, index] == tokens[len(prompt) :]
    assert sorted(ends) == list(range(len(members)))
    assert not engine.aborted
    slots.mark(["another"], np.array([2], dtype=np.int32))
    assert slots.tokens[:2].tolist() == [0, 0]


def test_running_requests_are_aborted_when_something_raises():
    slots, engine, members = small(2)

    def on_tokens(member, index, tokens):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        answer_members(engine, slots, PROMPTS, LENGTHS, members, on_tokens)
    assert engine.aborted
    assert not slots._slot_of or set(slots._slot_of.values()) == {0}


# ---- vLLM ----


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tiny(request, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=131,  # vLLM pads it
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=request.param,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path


@needs_vllm
@pytest.mark.slow
def test_mixed_batch_equals_weights_written_out(tiny):
    """float32: every token of every member, ranks mixed, more members than slots, one not perturbed."""
    import alignment.generation.vllm_engine  # noqa: F401  vLLM in this process

    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # or attention on a GPU rounds to TF32
    if not on_gpu:
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False  # its products are not quite PyTorch's
    from vllm import LLM, SamplingParams

    from alignment.generation.vllm_member_worker import member_options

    model, folder = tiny
    llm = LLM(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=16,  # prompts come in pieces
        enable_prefix_caching=False,
        enforce_eager=not on_gpu,
        disable_log_stats=True,
        **({"gpu_memory_utilization": 0.1} if on_gpu else {}),
        **member_options(3, 2),
    )
    slots = llm.llm_engine.model_executor.driver_worker.worker.model_runner.member_slots
    assert sorted(slots.names) == sorted(linear_weights(model))
    weights = {name: tensor for name, tensor in model.named_parameters() if name in slots.names}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    members = [factors_of(shapes, seed, 1 + seed % 2) for seed in range(6)] + [{}]
    members[3] = {name: pair for name, pair in members[3].items() if "q_proj" in name or "down_proj" in name}
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 131, (n,), generator=generator).tolist() for n in (3, 29, 11, 2, 20, 7, 15)]
    choices = [
        SamplingParams(temperature=0.0, max_tokens=6 + 3 * i, ignore_eos=True, detokenize=False) for i in range(7)
    ]
    found = {}
    answer_members(
        llm.llm_engine, slots, prompts, choices, members, lambda m, i, tokens: found.update({(m, i): tokens})
    )
    different, texts = [], set()
    base = {name: tensor.detach().clone() for name, tensor in weights.items()}
    for member, factors in enumerate(members):
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(base[name] + factors[name].left @ factors[name].right.T if name in factors else base[name])
        for index, prompt in enumerate(prompts):
            count = choices[index].max_tokens
            text = model.generate(
                torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            texts.add(tuple(text[0].tolist()))
            if found[member, index] != text[0, len(prompt) :].tolist():
                different.append((member, index))
    assert not different
    assert len(texts) > 40  # of 49: members differ
    plain = llm.generate([{"prompt_token_ids": ids} for ids in prompts], choices, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in plain] == [found[6, index] for index in range(7)]
    llm.llm_engine.engine_core.shutdown()


@needs_vllm
@pytest.mark.slow
@pytest.mark.skipif(not on_gpu, reason="needs a GPU")
def test_engine_in_16_bit_agrees_as_far_as_plain_runs_do(tmp_path):
    """VLLMEngine, float16, CUDA graphs: a member in the mixed batch against its weights written into the engine, beside what
    the same weights give alone and in a larger batch. Weights and factors are such that their sums are exact in float16.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from alignment.generation.vllm_engine import VLLMEngine

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.05, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_((tensor * 1024).round() / 1024)
    model.half().save_pretrained(tmp_path)
    vocabulary = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>"])}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.ByteFallback()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path)
    total = torch.cuda.get_device_properties(0).total_memory
    engine = VLLMEngine(
        tmp_path, dtype="float16", max_model_len=512, max_num_seqs=128, reserved_bytes=int(0.7 * total),
        members_at_once=6, member_rank=2,
    )  # fmt: skip
    weights = engine.parameters()
    assert set(engine.linear_weights()) == set(engine._slots.names)
    shapes = {name: weights[name].shape for name in engine.linear_weights()}
    members = [
        {
            name: LowRank(pair.left.sign() / 1024, pair.right.sign())
            for name, pair in factors_of(shapes, seed, 1 + seed % 2).items()
        }
        for seed in range(8)
    ] + [{}]
    prompts = [f"question {number} " + "x" * (number % 17) for number in range(24)]
    found = {}

    def run(members, prompts=prompts):
        found.clear()
        kept = []
        # Tokens rather than text: the read of a test model's bytes loses some.
        read, engine.read = engine.read, lambda prompt, tokens: tuple(tokens)
        engine.generate_members(prompts, 60, members, lambda member, answers: kept.append((member, answers)))
        engine.read = read
        return dict(kept)

    mixed = run(members)
    assert sorted(mixed) == list(range(len(members)))
    again = run(members)
    base = {name: weights[name].clone() for name in shapes}
    alone, larger = {}, {}
    for number, member in enumerate(members):
        for name, tensor in base.items():
            added = member[name].left @ member[name].right.T if member else torch.zeros(tensor.shape)
            weights[name].copy_(tensor.float() + added.cuda())
        alone[number] = run([{}])[0]
        larger[number] = run([{}] * 5)[2]
    ours, repeated, plain = (
        np.mean([equal_tokens(a[m][i], b[m][i]) for m in alone for i in range(len(prompts))])
        for a, b in ((mixed, alone), (mixed, again), (alone, larger))
    )
    different = np.mean([equal_tokens(mixed[m][i], mixed[8][i]) for m in range(8) for i in range(len(prompts))])
    print(
        f"\n{torch.cuda.get_device_name()}: tokens equal before the first difference: mixed batch and written out {ours:.1%}, "
        f"two plain runs {plain:.1%}, mixed batch twice {repeated:.1%}, a member and the base policy {different:.1%}"
    )
    assert different < 0.5
    assert ours > plain - 0.05


def equal_tokens(first, second):
    """The share of an answer before two first differ."""
    length = max(len(first), len(second), 1)
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), length) / length
