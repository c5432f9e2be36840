"""The policy's weights during ES: an untouched float32 master, and what is written into the engine from it.

A perturbed weight is always computed from the master, never undone by subtraction, so going back is exact however often a
member is tried (in place in 16 bits the published way drifts). The step is summed in float32. Products and sums are rounded
one by one (no fused multiply-add), so that every device gets the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from alignment.errors import UserError
from alignment.ES.noise import noise
from alignment.generation.loading import load_policy
from alignment.model_folder import open_safetensors, resolve_folder, weight_files
from alignment.pretrained import check_finite, tensors_hash

try:
    # Not called kernels.py: a script's folder comes first on Python's path, and transformers imports a package `kernels`.
    from alignment.ES import noise_kernels as kernels
except ImportError:  # no Triton on this machine: the PyTorch path does it
    kernels = None  # type: ignore[assignment]

KEPT_NOISE_BYTES = 2**28  # a small model's noise is drawn once a member, not again for the step


class Untouched:
    """The parameters `names` of the checkpoint `model_path`, which a run stands on and does not search.

    They are read when they are asked for: at 7B they are up to 27 GB.
    """

    def __init__(self, model_path: str, names: Iterable[str]):
        self.model_path, self.names = model_path, list(names)

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, float32 tensor on the CPU), one after the other."""
        return read_checkpoint(self.model_path, self.names)


class MasterWeights:
    """`engine_weights`: Hugging Face parameter name -> the tensor the engine computes with, of any dtype and device.

    `base`: the same names -> float32 tensors that become the master; without it the master is a copy of the engine's.
    """

    untouched: Untouched | None = None  # the policy's other parameters

    def __init__(self, engine_weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor] | None = None):
        self._engine = engine_weights
        if base is None:
            base = {name: tensor.detach().float().cpu().clone() for name, tensor in engine_weights.items()}
        self.master = base
        self._drawn: dict[tuple[int, str], torch.Tensor] = {}  # noise of this iteration's members, for their step
        self._room = KEPT_NOISE_BYTES

    def perturb(self, seed: int, scale: float) -> None:
        """engine <- master + scale * noise(seed), rounded once to the engine's dtype."""
        for name, master in self.master.items():
            self._engine[name].copy_(master + scale * self._noise(seed, name))

    def restore(self) -> None:
        """engine <- master."""
        for name, master in self.master.items():
            self._engine[name].copy_(master)

    def step(self, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """master += sum_i coefficients[i] * noise(seeds[i]), summed in float32 in that order. The engine is not touched."""
        pairs = [(seed, factor) for seed, factor in zip(seeds, coefficients, strict=True) if factor != 0.0]
        for name, master in self.master.items() if pairs else ():
            total = torch.zeros_like(master)
            for seed, factor in pairs:
                total += factor * self._noise(seed, name)
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
        """master <- the safetensors of a checkpoint, in subfolders as well, that holds every parameter in float32.

        The engine is not touched.

        Raises UserError for a checkpoint that lacks one, is damaged or has another shape: it is not this run's.
        """
        missing, others = set(self.master), False
        for path in sorted(folder.rglob("*.safetensors")):
            with open_safetensors(path) as file:
                others |= not self.master.keys() >= set(file.keys())
                for name in missing.intersection(file.keys()):
                    self._take(path, name, file.get_tensor(name))
                    missing.discard(name)
        if missing and others:
            for name, tensor in _as_computed_with(folder, missing):
                self._take(folder, name, tensor)
                missing.discard(name)
        if missing:
            raise UserError(f"{folder} lacks the tensor {min(missing)} ({len(missing)} in all)")

    def _take(self, place: Path, name: str, saved: torch.Tensor) -> None:
        own = self.master[name]
        if saved.shape != own.shape:
            raise UserError(f"{place}: {name} is {tuple(saved.shape)}, this run's {tuple(own.shape)}")
        check_finite(place, {name: saved})
        own.copy_(saved)

    def hash(self) -> str:
        """What a run's base weights are known by: all parameters of the policy, those that it does not search as well."""
        return tensors_hash(chain(self.master.items(), self.untouched.read() if self.untouched else ()))

    def whole(self) -> dict[str, torch.Tensor]:
        """The master, with the policy's other parameters as its checkpoint has them."""
        return self.master | dict(self.untouched.read() if self.untouched else ())

    def fingerprint(self) -> int:
        """A quick check that processes hold equal weights: the bits as integers, summed with weights modulo 2^64.

        Integer sums are exact, so the order in which a device takes them does not matter.
        """
        total = 0
        for _, tensor in sorted(self.master.items()):
            own, start = 0, 0
            for bits in tensor.contiguous().view(torch.int32).flatten().split(2**24):  # in pieces: a GPU is nearly full
                places = torch.arange(start, start + len(bits), device=bits.device) % 65521 + 1
                own += int((bits.long() * places).sum())
                start += len(bits)
            total = (total * 31 + own) % 2**64
        return total


class KernelWeights(MasterWeights):
    """On a GPU with Triton: each parameter in one pass over memory (noise_kernels.py), the same bits as MasterWeights.

    The master lies on `device`: the engine's, or the CPU where the GPU's memory is short; it is then sent over a parameter
    at a time.
    """

    def __init__(self, engine_weights: dict[str, torch.Tensor], base: dict[str, torch.Tensor], device: torch.device):
        super().__init__(engine_weights, {name: tensor.to(device) for name, tensor in base.items()})
        self._device = next(iter(engine_weights.values())).device
        self.restore()  # also compiles the kernel before anything is timed

    def restore(self) -> None:
        self.perturb(0, 0.0)

    def perturb(self, seed: int, scale: float) -> None:
        keys = kernels.keys([(seed, name) for name in self.master], self._device)
        for number, (name, master) in enumerate(self.master.items()):
            kernels.perturb(self._engine[name], master.to(self._device), keys[number : number + 1], scale)

    def step(self, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        pairs = [(seed, factor) for seed, factor in zip(seeds, coefficients, strict=True) if factor != 0.0]
        if not pairs:
            return
        factors = torch.tensor([factor for _, factor in pairs], dtype=torch.float32).to(self._device)
        keys = kernels.keys([(seed, name) for name in self.master for seed, _ in pairs], self._device)
        for number, master in enumerate(self.master.values()):
            here = master.to(self._device)  # the master itself when it lies there
            kernels.step(here, keys[number * len(pairs) : (number + 1) * len(pairs)], factors)
            if here is not master:
                master.copy_(here)


class ReferenceWeights(MasterWeights):
    """The published worker, for comparisons (`noise: reference`): the noise of one seed, restarted for every parameter, is
    added in place in the weights' own dtype and taken away again, and each seed's share of the step is rounded on its own.

    Parameters of a size move alike and the weights drift; a run of this kind resumes to its steps, not to its drift.
    """

    def __init__(self, engine_weights: dict[str, torch.Tensor]):
        self._engine = engine_weights
        self.master = engine_weights  # there is no other copy
        self._added: tuple[int, float] | None = None

    def perturb(self, seed: int, scale: float) -> None:
        self.restore()
        self._add(seed, scale)
        self._added = (seed, scale)

    def restore(self) -> None:
        if self._added is not None:
            seed, scale = self._added
            self._add(seed, -scale)
            self._added = None

    def step(self, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        self.restore()
        for seed, coefficient in zip(seeds, coefficients, strict=True):
            self._add(seed, coefficient)

    def _add(self, seed: int, scale: float) -> None:
        for tensor in self._engine.values():
            generator = torch.Generator(device=tensor.device).manual_seed(seed % 2**63)
            drawn = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)
            tensor.add_(scale * drawn)


def checkpoint_weights(
    model_path: str, names: Iterable[str], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """The parameters `names` of a checkpoint in float32 on `device`, tied ones under the name that is asked for.

    A tensor at a time, so that a master on a GPU needs no copy in main memory.
    """
    found = dict(read_checkpoint(model_path, names, device))
    return {name: found[name] for name in names}


def read_checkpoint(
    model_path: str, names: Iterable[str], device: torch.device | str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor on `device`) of a checkpoint's parameters `names`, one after the other, in any order.

    Only the files that the model is loaded from are read: others may lie beside them.
    """
    wanted = set(names)
    folder = resolve_folder(model_path)
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with open_safetensors(path) as file:
                for name in sorted(wanted.intersection(file.keys())):
                    wanted.discard(name)
                    yield name, file.get_tensor(name).to(device).float()
    if wanted:
        for name, tensor in _as_computed_with(folder, wanted):
            yield name, tensor.to(device)


def _as_computed_with(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor on the CPU) of those of `names` that transformers finds in `folder`.

    Some architectures are saved under other names than they compute with, or with tensors taken apart (experts): only
    transformers knows how they belong together. It reads the whole model for that.
    """
    wanted = set(names)
    for name, parameter in load_policy(folder, torch.float32).named_parameters():
        if name in wanted:
            yield name, parameter.data
