"""The policy's weights during ES: an untouched float32 master, and what is written into the engine from it.

A perturbed weight is always computed from the master, never undone by subtraction, so going back is exact however often a
member is tried (in place in 16 bits the published way drifts). The step is summed in float32. Products and sums are rounded
one by one (no fused multiply-add), so that every device gets the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from alignment.errors import UserError
from alignment.ES.noise import noise

KEPT_NOISE_BYTES = 2**28  # a small model's noise is drawn once a member, not again for the step


class MasterWeights:
    """`engine_weights`: Hugging Face parameter name -> the tensor the engine computes with, of any dtype and device."""

    def __init__(self, engine_weights: dict[str, torch.Tensor]):
        self._engine = {name: tensor for name, tensor in engine_weights.items() if tensor.is_floating_point()}
        self.master = {name: tensor.detach().float().cpu().clone() for name, tensor in self._engine.items()}
        self._drawn: dict[tuple[int, str], torch.Tensor] = {}  # noise of this iteration's members, for their step
        self._room = KEPT_NOISE_BYTES

    def perturb(self, seed: int, sigma: float) -> None:
        """engine <- master + sigma * noise(seed), rounded once to the engine's dtype."""
        for name, master in self.master.items():
            self._engine[name].copy_(master + sigma * self._noise(seed, name))

    def restore(self) -> None:
        """engine <- master."""
        for name, master in self.master.items():
            self._engine[name].copy_(master)

    def step(self, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """master += sum_i coefficients[i] * noise(seeds[i]), summed in float32 in the order given. The engine is not touched."""
        pairs = [
            (seed, coefficient) for seed, coefficient in zip(seeds, coefficients, strict=True) if coefficient != 0.0
        ]
        if not pairs:
            return
        for name, master in self.master.items():
            total = torch.zeros_like(master)
            for seed, coefficient in pairs:
                total += coefficient * self._noise(seed, name)
            master += total
        self._drawn.clear()
        self._room = KEPT_NOISE_BYTES

    def _noise(self, seed: int, name: str) -> torch.Tensor:
        drawn = self._drawn.get((seed, name))
        if drawn is None:
            drawn = noise(seed, name, self.master[name].shape)
            size = drawn.numel() * drawn.element_size()
            if size <= self._room:
                self._drawn[seed, name] = drawn
                self._room -= size
        return drawn

    def load(self, folder: Path) -> None:
        """master <- the safetensors of a checkpoint that holds every parameter in float32. The engine is not touched.

        Raises UserError for a checkpoint that lacks one: it is not this run's.
        """
        missing = set(self.master)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in missing.intersection(file.keys()):
                    self.master[name].copy_(file.get_tensor(name))
                    missing.discard(name)
        if missing:
            raise UserError(
                f"{folder} lacks the tensor {min(missing)} ({len(missing)} in all): remove that checkpoint and start again"
            )

    def hash(self) -> str:
        """SHA-256 over names, shapes and bytes of the master."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.master.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
