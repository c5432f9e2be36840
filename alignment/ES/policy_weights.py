"""The weights that an ES run searches in, as its settings ask for them."""

from __future__ import annotations

import torch

from alignment.ES.low_rank import open_low_rank
from alignment.ES.weights import KernelWeights, MasterWeights, ReferenceWeights, Untouched, checkpoint_weights, kernels
from alignment.generation import Engine


def open_weights(engine: Engine, settings: dict) -> MasterWeights:
    """The weights that a run with these `settings` (ESSettings by name) searches in, LoRA adapters put in where it asks.

    The master is what the checkpoint holds, not what the engine rounded it to.
    """
    everything = list(engine.parameters())
    if settings["lora_rank"] is not None:
        engine.add_lora(settings["lora_rank"], settings["global_seed"])
    parameters = engine.weights(settings["trainable"])
    if settings.get("perturbation") == "low_rank":
        return open_low_rank(engine, settings, list(parameters))
    weights = _full_rank(engine, settings, parameters)
    if others := [name for name in everything if name not in parameters]:
        weights.untouched = Untouched(settings["policy_model_path"], others)
    return weights


def _full_rank(engine: Engine, settings: dict, parameters: dict[str, torch.Tensor]) -> MasterWeights:
    if settings["noise"] == "reference":
        return ReferenceWeights(parameters)
    on_gpu = engine.device.type == "cuda" and kernels is not None
    place = engine.device if on_gpu and settings["master_device"] == "auto" else torch.device("cpu")
    if settings["lora_rank"] is None:
        base = checkpoint_weights(settings["policy_model_path"], parameters, place)
    else:
        base = {name: tensor.detach().float().to(place, copy=True) for name, tensor in parameters.items()}
    return KernelWeights(parameters, base, place) if on_gpu else MasterWeights(parameters, base)
