"""The policy whose answers are classified: a Hugging Face model as it is, or with other weights in it.

--policy_model_path MODEL                                   the model
--policy_model_path BASE --policy_vllm_ckpt weights.pth     a state dict with vLLM's fused names, as the published ES run saves
--policy_model_path BASE --journal RUN/journal.jsonl@120    the weights after 120 steps of an ES run, rebuilt from its journal
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch

from alignment.errors import UserError
from alignment.ES.replay import replay
from alignment.evaluation.classify_settings import ClassifySettings, parse_journal
from alignment.generation import Engine, TransformersEngine
from alignment.pretrained import check_finite

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
VOCABULARY_MULTIPLE = 64  # vLLM pads the vocabulary's rows to a multiple of it


def open_policy(config: ClassifySettings) -> tuple[Engine, str]:
    """The policy with its weights, and their hash. Raises UserError when a weights file does not fit the model."""
    base = config.policy_model_path
    assert base is not None  # there is a policy to open
    engine = _open_engine(config, base)
    if config.journal:
        return engine, load_journal(engine, base, config.journal)
    if config.policy_vllm_ckpt:
        load_vllm_checkpoint(engine, config.policy_vllm_ckpt)
    return engine, engine.weights_hash()


def _open_engine(config: ClassifySettings, path: str) -> Engine:
    settings: dict[str, Any] = {
        "template": config.policy_template,
        "device": config.device,
        "dtype": config.dtype,
        "first_turn_only": config.first_turn_only,
    }
    if config.policy_use_vllm:
        from alignment.generation.vllm_engine import VLLMEngine  # it sets vLLM's environment variables

        return VLLMEngine(path, **settings)
    return TransformersEngine(path, batch_size=config.policy_batch_size, **settings)


def load_vllm_checkpoint(engine: Engine, path: str | Path) -> None:
    """Puts a saved state dict into the engine: names as vLLM fuses them (qkv_proj, gate_up_proj) or as transformers has them.

    Raises UserError for a file that is no plain state dict of tensors, and for tensors that are missing, unknown or of
    another shape.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot read the state dict {path} (plain tensors, torch.save): {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(
            f"{path}: expected a state dict, name -> tensor, as torch.save(model.state_dict(), path) writes it"
        )
    own = engine.weights()
    given = _unfused(state, own, path)
    # A tied head has no parameter of its own; old checkpoints hold rotary tables, which the model computes.
    unknown = [name for name in given if name not in own and name != "lm_head.weight" and "rotary_emb" not in name]
    missing = own.keys() - given.keys()
    if unknown or missing:
        found = [f"lacks {min(missing)} ({len(missing)} in all)"] if missing else []
        found += [f"has the unknown {unknown[0]} ({len(unknown)} in all)"] if unknown else []
        raise UserError(f"{path} does not fit the model of --policy_model_path: it {' and '.join(found)}")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            raise UserError(f"{path}: {name} has the shape {list(given[name].shape)}, the model {list(tensor.shape)}")
    for name, tensor in own.items():
        tensor.copy_(given[name])
    check_finite(path, own)


def _unfused(state: dict[str, torch.Tensor], own: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """The state by Hugging Face names: fused tensors split by the rows of the model's own, padded vocabularies cut."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        stem, _, module = stem.rpartition(".")
        parts = [f"{stem}.{part}.{kind}" for part in FUSED.get(module, ())]
        if parts and all(part in own for part in parts):
            rows = [own[part].shape[0] for part in parts]
            if sum(rows) != len(tensor):
                raise UserError(f"{path}: {name} has {len(tensor)} rows, the model's {', '.join(FUSED[module])} {rows}")
            result |= dict(zip(parts, tensor.split(rows), strict=True))
        elif name.endswith(VOCABULARY) and name in own:
            known = own[name].shape[0]
            padded = -(-known // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            result[name] = tensor[:known] if len(tensor) == padded else tensor
        else:
            result[name] = tensor
    return result


def load_journal(engine: Engine, base: str, text: str) -> str:
    """Puts the weights after ITER steps of a journal into the engine, which holds those of the folder `base`; returns a hash.

    `text` is FILE@ITER. Raises UserError when the journal is shorter, began from other weights, or is one of a drifting run.
    """
    path, iteration = parse_journal(text)
    # With adapters the engine's weights are theirs alone: what they stand on belongs to the hash as well.
    base_hash = engine.weights_hash()
    replay(engine, base, path, iteration)
    own = engine.weights_hash()
    adapters = any("lora_" in name for name in engine.parameters())
    return hashlib.sha256((base_hash + own).encode()).hexdigest() if adapters else own
