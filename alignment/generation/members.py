"""Many members of an ES population in one batch: each is the policy plus a low-rank matrix in each of its linear layers.

With W the policy's (O, I) matrix, the member's is W + left right^T, so its layer gives

    y = x W^T + (x right) left^T

and all members share the product with W, which is nearly all of the work (EGGROLL: Sarkar et al. 2025, arXiv 2511.16652).
An embedding that is tied to the head has that matrix too: a token's row is W[token] + left[token] right^T.

Here with PyTorch modules: the members are a dimension of the batch, and a hook adds each one's second term. This is the
plain form, which faster ones are checked against.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from alignment.errors import UserError


class LowRank(NamedTuple):
    """What a member adds to one (O, I) matrix: left @ right.T. Scale and sign are in `left`."""

    left: torch.Tensor  # (O, r) float32
    right: torch.Tensor  # (I, r) float32


def linear_weights(model: nn.Module) -> list[str]:
    """Names of the matrices that linear layers compute with, the head's as well; a tied head's is called the embedding's."""
    used = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in used]


class MembersInBatch:
    """While it is entered, `model` computes with member m's weights in rows m B to (m + 1) B of every batch of M B rows.

    `members`: one dict a member, Hugging Face parameter name -> LowRank; {} is the model as it is. A matrix that an embedding
    and the head share is changed in both. `rows` must be set to M B before each batch. Raises UserError for a name that is no
    linear layer's or embedding's of `model`, and for a layer that is not given the batch as (rows, tokens, features): a layer
    that sees other rows cannot know whose they are.
    """

    def __init__(self, model: nn.Module, members: Sequence[dict[str, LowRank]]):
        self.rows = 0
        self._handles: list = []
        self._members = members
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._layers = [
            (names[id(module.weight)], module)
            for module in model.modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
        ]
        if unknown := {name for member in members for name in member} - {name for name, _ in self._layers}:
            raise UserError(f"low-rank members: {min(unknown)} is not the matrix of a linear layer of this policy")

    def __enter__(self) -> MembersInBatch:
        stacked: dict[str, LowRank] = {}
        for name, layer in self._layers:
            if not any(name in member for member in self._members):
                continue
            if name not in stacked:
                stacked[name] = self._stack(name, layer.weight)
            add = self._add if isinstance(layer, nn.Linear) else self._look_up
            self._handles.append(layer.register_forward_hook(partial(add, name, stacked[name])))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _stack(self, name: str, weight: torch.Tensor) -> LowRank:
        """All members' left (M, O, r) and right (M, I, r), in the dtype and on the device of the weight."""
        rank = next(member[name].left.shape[1] for member in self._members if name in member)
        nothing = LowRank(*(torch.zeros(size, rank) for size in weight.shape))
        pairs = [member.get(name, nothing) for member in self._members]
        return LowRank(*(torch.stack([side.to(weight) for side in sides]) for sides in zip(*pairs, strict=True)))

    def _add(self, name: str, pair: LowRank, _layer: nn.Linear, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]  # (M B, T, I)
        if x.dim() != 3 or len(x) != self.rows:
            raise UserError(
                f"low-rank members: {name} is not given whole sequences (mixture-of-experts layers are not), so members "
                "cannot share a batch; leave it out with --trainable, or use perturbation: full_rank"
            )
        grouped = x.reshape(len(pair.left), -1, x.shape[-1])  # (M, B T, I)
        added = grouped @ pair.right @ pair.left.mT  # (M, B T, O)
        return output + added.view_as(output)

    def _look_up(
        self, _name: str, pair: LowRank, layer: nn.Embedding, inputs: tuple, output: torch.Tensor
    ) -> torch.Tensor:
        tokens = inputs[0].reshape(len(pair.left), -1, 1)  # (M, B T, 1) of (M B, T)
        rows = pair.left.gather(1, tokens.expand(-1, -1, pair.left.shape[2]))  # (M, B T, r)
        added = rows @ pair.right.mT * getattr(layer, "embed_scale", 1.0)  # Gemma's and others' scale what is looked up
        return output + added.view_as(output)
