"""Many low-rank ES members in one vLLM batch: where their factors lie, which token is whose, and the loop that answers.

All members share the base weights (EGGROLL, arXiv 2511.16652): member m's weight is W + left right^T and is never written.
A `MemberSlots` holds the factors of up to `count` members in buffers that never move and one slot number a token, so vLLM's
CUDA graphs stay as they are; vllm_member_worker.py puts both into vLLM's layers, member_kernels.py does the products.

Not vLLM's own LoRA: it takes an adapter from a folder and chooses adapters anew on the host for every step, and with it 30
members of rank 8 took twice the time of one set of weights (7B on an H100: 72 s, 34 s).

Nothing here imports vLLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from alignment.errors import UserError


class MemberSlots:
    """Slots 1 to `count` hold members, slot 0 none. `rank` is the largest that fits, `tokens` the most that a step has.

    Factors are rounded to `dtype`, the engine's: that is finer than a weight written out in it.
    """

    def __init__(self, count: int, rank: int, tokens: int, device: torch.device, dtype: torch.dtype):
        self.count, self.rank, self.bytes = count, rank, 0
        self.tokens = torch.zeros(tokens, dtype=torch.int32, device=device)  # the slots of a step's tokens
        self.rows = torch.zeros(tokens, dtype=torch.int32, device=device)  # of its requests: the rows of the logits
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._places: dict[str, _Place] = {}
        self._slot_of: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        """The Hugging Face parameters that members may be perturbed in."""
        return list(self._places)

    def add_layer(
        self, names: Sequence[str], widths: Sequence[int], inputs: int, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers for a layer of `rows` outputs and `inputs` inputs that holds the parameters `names`, of `widths` rows each,
        one below the other: right (count + 1, P * rank, inputs) and left (count + 1, rank, rows), P the number of names.
        """
        right = torch.zeros(self.count + 1, len(names) * self.rank, inputs, **self._options)
        left = torch.zeros(self.count + 1, self.rank, rows, **self._options)
        start = 0
        for part, (name, width) in enumerate(zip(names, widths, strict=True)):
            self._places[name] = _Place(
                right[:, part * self.rank : (part + 1) * self.rank], left[:, :, start : start + width]
            )
            start += width
        self.bytes += right.nbytes + left.nbytes
        return right, left

    def load(self, slot: int, factors: dict) -> None:
        """A member's factors (parameter name -> left (O, r), right (I, r) float32) into a slot; what it lacks becomes zero.

        Raises UserError for a parameter that has no place here, or factors of another shape.
        """
        for name in factors.keys() - self._places.keys():
            raise UserError(f"low-rank members of engine vllm cannot perturb {name}; leave it out with `trainable`")
        for name, place in self._places.items():
            right, left = place.right[slot], place.left[slot]  # (rank, I), (rank, O)
            rank = 0
            if name in factors:
                factor = factors[name]
                rank = factor.left.shape[1]
                expected = (left.shape[1], rank), (right.shape[1], rank)
                if (factor.left.shape, factor.right.shape) != expected or rank > self.rank:
                    raise UserError(
                        f"{name}: factors {tuple(factor.left.shape)} and {tuple(factor.right.shape)}, expected "
                        f"{expected[0]} and {expected[1]} of rank {self.rank} or less"
                    )
                left[:rank].copy_(factor.left.T)
                right[:rank].copy_(factor.right.T)
            left[rank:].zero_()
            right[rank:].zero_()

    def assign(self, request: str, slot: int) -> None:
        """The tokens of a request, by vLLM's internal id, belong to a slot until `release`; of any other request to slot 0."""
        self._slot_of[request] = slot

    def release(self, request: str) -> None:
        self._slot_of.pop(request, None)

    def mark(self, requests: Sequence[str], counts: np.ndarray) -> None:
        """Before a step: its requests in the order of its tokens, and how many tokens each has. Both lie on the device then.

        Tokens that pad a CUDA graph keep an old slot: what comes out of them is thrown away.
        """
        rows = np.fromiter((self._slot_of.get(request, 0) for request in requests), np.int32, len(requests))
        self._send(rows, self.rows)
        self._send(np.repeat(rows, counts), self.tokens)

    def _send(self, slots: np.ndarray, target: torch.Tensor) -> None:
        source = torch.from_numpy(slots)
        if target.is_cuda:
            source = source.pin_memory()  # a fresh one each time: the step before may not have read its own yet
        target[: len(slots)].copy_(source, non_blocking=True)


class _Place(NamedTuple):
    right: torch.Tensor  # (count + 1, rank, I), a view of the layer's buffer
    left: torch.Tensor  # (count + 1, rank, O)


def answer_members(
    engine: Any,
    slots: MemberSlots,
    prompts: Sequence[list[int]],
    choices: Sequence[object],
    members: Sequence[dict],
    on_tokens: Callable[[int, int, list[int]], None],
) -> None:
    """Every member's greedy tokens for `prompts` (token ids), `choices` being each prompt's SamplingParams.

    `engine` is vLLM's LLMEngine. Calls on_tokens(member, prompt index, tokens) as each answer ends. There is no barrier: a
    member starts when a slot is free, and all that have one share each step's batch. Before a step at most one member is
    loaded and queued, so that the GPU does not wait for the host. When anything raises, what is still running is aborted.
    """
    waiting, free = deque(enumerate(members)), deque(range(1, slots.count + 1))
    running: dict[str, _Request] = {}
    unanswered: dict[int, int] = {}
    try:
        while waiting or running:
            if waiting and free:
                member, factors = waiting.popleft()
                slot = free.popleft()
                slots.load(slot, factors)
                unanswered[member] = len(prompts)
                for index, (prompt, choice) in enumerate(zip(prompts, choices, strict=True)):
                    name = f"member {member} prompt {index}"
                    # vLLM's own name for the request comes back; the outputs carry ours.
                    own = engine.add_request(name, {"type": "token", "prompt_token_ids": prompt}, choice)
                    running[name] = _Request(member, index, slot, own)
                    slots.assign(own, slot)
            for output in engine.step():
                if not output.finished:
                    continue
                request = running.pop(output.request_id)
                slots.release(request.own)
                unanswered[request.member] -= 1
                if unanswered[request.member] == 0:
                    free.append(request.slot)
                on_tokens(request.member, request.index, list(output.outputs[0].token_ids))
    finally:
        if running:
            engine.abort_request(list(running))
            for request in running.values():
                slots.release(request.own)


@dataclass(frozen=True)
class _Request:
    member: int
    index: int
    slot: int
    own: str  # vLLM's internal id
