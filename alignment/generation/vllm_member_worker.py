"""vLLM's worker with low-rank members: after the weights are loaded, before anything is compiled or captured, every linear
layer and the head (with embeddings that are tied to it) are given the factors' buffers, and the model runner tells a step's
tokens their slots.

Named to vLLM as `worker_cls` (see `member_options`), imported by vLLM 0.26 alone.

The runner is followed where it has put a step's requests in order: `prepare_inputs` of the newer runner, `_prepare_inputs`
of the older one (CPU). Asynchronous scheduling, chunked prefill and preemption need nothing more: whatever the step, its
tokens are marked by request, in the order of the stream that computes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from alignment.errors import UserError
from alignment.generation.member_kernels import MAX_PARTS, add_members, embed_members
from alignment.generation.vllm_members import MemberSlots

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


def member_options(count: int, rank: int) -> dict:
    """Options of vllm.LLM for `count` members at once. They are part of the key of vLLM's cache of compiled models, which
    otherwise would hand out one that knows no members."""
    return {
        "worker_cls": f"{__name__}.MemberWorker",
        "additional_config": {"members": {"count": count, "rank": rank}},
    }


class MemberWorker(Worker):
    """The platform's own worker; its `model_runner.member_slots` is the MemberSlots."""

    def load_model(self, **options: object) -> None:
        super().load_model(**options)
        runner, config = self.model_runner, self.vllm_config
        if config.parallel_config.world_size > 1:
            raise UserError("low-rank members need one GPU an engine (tensor_parallel_size 1)")
        slots = MemberSlots(
            tokens=max(config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs),
            device=self.device,
            dtype=config.model_config.dtype,
            **config.additional_config["members"],
        )
        install(runner.get_model(), slots)
        follow(runner, slots)
        runner.member_slots = slots
        runner.model_memory_usage = getattr(runner, "model_memory_usage", 0) + slots.bytes  # not left to the KV cache


def install(model: torch.nn.Module, slots: MemberSlots) -> None:
    """Gives the layers of a loaded model their members: all linear ones, the head, and the embeddings where they are tied
    to the head: one matrix, changed in both places.

    Raises UserError for a model whose weights are quantised.
    """
    fused = getattr(model, "packed_modules_mapping", {})
    tied = getattr(model.config, "tie_word_embeddings", False)
    shared = None
    for name, module in model.named_modules():
        folder, _, leaf = name.rpartition(".")
        if isinstance(module, LinearBase):
            parts = fused.get(leaf, [leaf])
            widths = list(getattr(module, "output_partition_sizes", [module.output_size]))
            widths = widths if len(widths) == len(parts) else [sum(widths)]
            if type(module.quant_method) is not UnquantizedLinearMethod or not len(widths) == len(parts) <= MAX_PARTS:
                raise UserError(f"low-rank members of engine vllm do not support the layer {name}")
            names = [f"{folder}.{part}.weight" for part in parts]
            pair = slots.add_layer(names, widths, module.input_size, sum(widths))
            module.quant_method = MemberLinear(module.quant_method, *pair, slots.tokens, widths)
        elif isinstance(module, VocabParallelEmbedding) and (tied or isinstance(module, ParallelLMHead)):
            if type(module.quant_method) is not UnquantizedEmbeddingMethod:
                raise UserError(f"low-rank members of engine vllm do not support the layer {name}")
            rows, inputs = module.weight.shape  # the vocabulary is padded
            pair = shared or slots.add_layer([f"{name}.weight"], [module.org_vocab_size], inputs, rows)
            shared = pair if tied else None  # the embeddings come first, and the matrix has their name
            module.quant_method = MemberTable(module.quant_method, *pair, slots)


def follow(runner: Any, slots: MemberSlots) -> None:
    """Has a model runner mark the tokens of each step."""
    if hasattr(runner, "prepare_inputs"):
        prepare = runner.prepare_inputs

        def prepare_inputs(scheduled: Any, description: Any) -> Any:
            batch = prepare(scheduled, description)
            slots.mark(batch.req_ids, batch.num_scheduled_tokens)
            return batch

        runner.prepare_inputs = prepare_inputs
    else:
        prepare = runner._prepare_inputs

        def _prepare_inputs(scheduled: Any, counts: np.ndarray) -> Any:
            slots.mark(runner.input_batch.req_ids, counts)
            return prepare(scheduled, counts)

        runner._prepare_inputs = _prepare_inputs


class MemberLinear:
    """A layer's linear method with the members' share added."""

    def __init__(self, plain: Any, right: torch.Tensor, left: torch.Tensor, slots: torch.Tensor, parts: list[int]):
        self.plain, self.right, self.left, self.slots, self.parts = plain, right, left, slots, parts

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.is_cuda:
            return torch.ops.alignment.member_linear(
                x, layer.weight, bias, self.right, self.left, self.slots, self.parts
            )
        return add_members(self.plain.apply(layer, x, bias), x, self.right, self.left, self.slots, self.parts)


class MemberTable(MemberLinear):
    """The head's method, whose rows are the requests', and the embeddings' where they share its matrix."""

    def __init__(self, plain: Any, right: torch.Tensor, left: torch.Tensor, slots: MemberSlots):
        super().__init__(plain, right, left, slots.rows, [left.shape[2]])
        self.tokens = slots.tokens

    def embedding(self, layer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        if ids.is_cuda:
            return torch.ops.alignment.member_embedding(ids, layer.weight, self.right, self.left, self.tokens)
        return embed_members(self.plain.embedding(layer, ids), ids, self.right, self.left, self.tokens)
