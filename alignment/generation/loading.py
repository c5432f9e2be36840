"""What a folder must be before its model answers: a policy, all of it, with the tokenizer that belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from alignment.errors import UserError, first_line
from alignment.model_folder import check_ids, read_config, tensor_shapes
from alignment.pretrained import BUFFERS, CONFIG_ERRORS, load_whole, misshapen, refuse_keys

_SCORE_MODELS = ("ForScore", "ForSequenceClassification", "ForTokenClassification")


def read_policy_config(folder: Path) -> PretrainedConfig:
    """The config of a policy; its weights are not looked at. Raises UserError."""
    config = read_config(folder)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith(_SCORE_MODELS):
        raise UserError(f"{folder}: a score model ({architecture} in its config.json), not a policy that writes text")
    return config


def known_ids(config: PretrainedConfig) -> int | None:
    """How many token ids the model has an embedding for, if the config says."""
    return getattr(config.get_text_config(), "vocab_size", None)


def check_vocabulary(folder: Path, tokenizer: Any, config: PretrainedConfig) -> None:
    """Raises UserError when the tokenizer's own ids, or its end of sequence, have no embedding in the model.

    Tokens that were added to it may lie beyond (a pad token, one for images): prompts that hold such an id are refused.
    """
    added = tokenizer.added_tokens_decoder
    own = [index for index in tokenizer.get_vocab().values() if index not in added]
    largest = max([*own, -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id])
    known = known_ids(config)
    if known is not None:
        check_ids(folder, largest, known)


def load_policy(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The causal language model in `folder`, in eval mode. Raises UserError naming the tensors that do not fit."""
    return load_whole(AutoModelForCausalLM, folder, dtype, device, other_heads=True)


def check_headers(folder: Path, config: PretrainedConfig) -> None:
    """Refuses what `load_policy` would, from the files' headers alone: for an engine that reads the weights itself.

    Values are not looked at. Checkpoints that transformers renames on loading have other keys and are let through.
    """
    try:
        model = on_meta(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{folder}/config.json: no model can be made from it: {first_line(error)}") from error
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found, prefix = tensor_shapes(folder), f"{model.base_model_prefix}."
    if not any(key.startswith(prefix) for key in found):
        found = {prefix + key: shape for key, shape in found.items()}  # saved from the backbone alone
    found = {key: shape for key, shape in found.items() if not BUFFERS.search(key)}
    if any(key.startswith(prefix) and key not in expected for key in found) or not found.keys() & expected.keys():
        return
    refuse_keys(
        folder,
        missing=expected.keys() - found.keys(),
        unexpected=(),
        misshapen=[
            misshapen(key, found[key], shape) for key, shape in expected.items() if found.get(key, shape) != shape
        ],
    )


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shapes_of(config: PretrainedConfig) -> dict[str, torch.Size]:
    """A model's parameters by Hugging Face name, tied ones once, without loading it."""
    return {name: parameter.shape for name, parameter in on_meta(config).named_parameters()}
