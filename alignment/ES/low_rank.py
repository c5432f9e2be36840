"""Low-rank perturbations (`perturbation: low_rank`): EGGROLL, Sarkar et al. 2025, arXiv 2511.16652.

Member i adds to every (O, I) matrix W of a linear layer

    E_i = sigma A_i B_i^T / sqrt(r)        A_i (O, r), B_i (I, r), entries N(0, 1)

so a member is r (O + I) numbers a matrix in place of O I, and many members share one batch (generation/members.py). The step

    W <- W + (alpha / N) sum_i u_i A_i B_i^T / sqrt(r)
       = W + [c_1 A_1 ... c_N A_N] [B_1 ... B_N]^T,   c_i = alpha u_i / (N sqrt(r))

is one product of an (O, N r) and an (N r, I) matrix, accumulated in float32; its rank is up to N r, so what is learnt is not
low-rank. Each entry of A B^T / sqrt(r) has mean 0 and variance 1, as full-rank noise has, and different entries are
uncorrelated: sigma and alpha keep their meaning, and the expected step on a linear fitness is the full-rank one. The entries
are not independent, though: a member's whole effect on a matrix hangs on r numbers a row and a column, and the tails are
heavier (kurtosis 3 + 6 / r for an entry); r to infinity gives full-rank noise.

Searched is every matrix that a linear layer computes with: all projections and the head. A head that is tied to the embedding
has one matrix with it, and a member is a point among the weights, so that embedding changes as well; on the demo's models,
whose head is tied, leaving it out costs much of the speed of learning. Embeddings of their own, biases and norms stay as they
are (in the paper vectors may be perturbed in full; here a member must be no more than its pairs, so that nothing is written
between members).

A and B are noise.py's streams "NAME.left" and "NAME.right" of the member's seed, for a parameter NAME. The step has the same
bits on every process of the same kind of device: its order is that of the journal, and the product runs on one CPU thread,
in full float32 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from alignment.errors import UserError
from alignment.ES.noise import noise
from alignment.ES.weights import MasterWeights, checkpoint_weights, kernels
from alignment.generation import Engine, LowRank


class LowRankWeights(MasterWeights):
    """The float32 master of all parameters, where `base` lies; the engine's weights are written by `step` and `restore` alone.

    `matrices`: names of the parameters that are searched. `perturb` writes a member out, for those who want to see one.
    """

    def __init__(
        self,
        engine_weights: dict[str, torch.Tensor],
        base: dict[str, torch.Tensor] | None,
        matrices: Sequence[str],
        rank: int,
    ):
        super().__init__(engine_weights, base)
        self.matrices, self.rank = list(matrices), rank
        self._pairs_drawn: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}  # as _drawn
        self._device = next(iter(engine_weights.values())).device

    def member(self, seed: int, scale: float) -> dict[str, LowRank]:
        """What the member adds to each matrix: float32 on the engine's device, `scale` / sqrt(r) in `left`."""
        factor = scale / math.sqrt(self.rank)
        pairs = self._pairs([(seed, name) for name in self.matrices])
        return {name: LowRank(factor * left, right) for name, (left, right) in zip(self.matrices, pairs, strict=True)}

    def perturb(self, seed: int, scale: float) -> None:
        """engine <- master + the member's E, rounded once to the engine's dtype."""
        self.restore()
        with _same_bits():
            for name, (left, right) in self.member(seed, scale).items():
                self._engine[name].copy_(self.master[name].to(self._device) + left @ right.T)

    def step(self, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """master += sum_i coefficients[i] A_i B_i^T / sqrt(r), one product a matrix; the engine gets the new master."""
        terms = [
            (seed, factor / math.sqrt(self.rank)) for seed, factor in zip(seeds, coefficients, strict=True) if factor
        ]
        for name in self.matrices if terms else ():
            pairs = self._pairs([(seed, name) for seed, _ in terms])
            left = torch.cat([factor * a for (_, factor), (a, _) in zip(terms, pairs, strict=True)], dim=1)  # (O, N r)
            right = torch.cat([b for _, b in pairs], dim=1)  # (I, N r)
            with _same_bits():
                total = left @ right.T
            self.master[name] += total.to(self.master[name].device)
            self._engine[name].copy_(self.master[name])
        self._pairs_drawn.clear()

    def _pairs(self, wanted: list[tuple[int, str]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(A, B) of each (seed, matrix). On a CPU, where drawing is slow, they are kept until the step."""
        new = [pair for pair in wanted if pair not in self._pairs_drawn]
        streams = []
        for seed, name in new:
            rows, columns = self.master[name].shape
            streams += [(seed, f"{name}.left", (rows, self.rank)), (seed, f"{name}.right", (columns, self.rank))]
        drawn = _draw(streams, self._device)
        found = self._pairs_drawn if self._device.type == "cpu" else {}
        found |= zip(new, zip(drawn[::2], drawn[1::2], strict=True), strict=True)
        return [found[pair] for pair in wanted]


def open_low_rank(engine: Engine, settings: dict, searched: Sequence[str]) -> LowRankWeights:
    """The weights of a run with these `settings` (ESSettings by name); of `searched` those that members may perturb."""
    allowed = set(engine.linear_weights())
    matrices = [name for name in searched if name in allowed]
    if not matrices:
        raise UserError(
            "perturbation: low_rank searches the weights of linear layers, and "
            + (f"trainable {settings['trainable']!r} finds none" if settings["trainable"] else "this policy has none")
        )
    parameters = engine.weights()
    place = engine.device if settings["master_device"] == "auto" else torch.device(settings["master_device"])
    base = checkpoint_weights(settings["policy_model_path"], parameters, place)
    return LowRankWeights(parameters, base, matrices, settings["rank"])


def _draw(streams: list[tuple[int, str, tuple[int, int]]], device: torch.device) -> list[torch.Tensor]:
    """Standard normal noise of each (seed, stream name, shape); a GPU's kernel gives the bits of noise.py."""
    if device.type != "cuda" or kernels is None:
        return [noise(seed, name, torch.Size(shape), device) for seed, name, shape in streams]
    keys = kernels.keys([(seed, name) for seed, name, _ in streams], device)
    drawn = [torch.zeros(shape, device=device) for _, _, shape in streams]
    for number, tensor in enumerate(drawn):
        kernels.perturb(tensor, tensor, keys[number : number + 1], 1.0)  # 0 + 1 z
    return drawn


@contextmanager
def _same_bits() -> Iterator[None]:
    """Products do not depend on how many threads this process has, nor on a library that allowed TF32."""
    threads, precision = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.fp32_precision = precision
