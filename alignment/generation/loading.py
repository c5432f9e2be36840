"""Policies are loaded whole or not at all.

transformers fills a tensor that a checkpoint lacks with random numbers and says so in a log: such a policy trains and answers,
and is wrong. Here it is refused by key, as are tensors of another shape, those of layers that the config does not know, and
values that are not finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from alignment.errors import UserError, first_line
from alignment.model_folder import read_config, some_keys, tensor_shapes

_SCORE_MODELS = ("ForScore", "ForSequenceClassification", "ForTokenClassification")


def read_policy_config(folder: Path) -> PretrainedConfig:
    """The config of a policy whose weight files are there and can be read. Loads no weights. Raises UserError."""
    config = read_config(folder)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith(_SCORE_MODELS):
        raise UserError(f"{folder}: a score model ({architecture} in its config.json), not a policy that writes text")
    tensor_shapes(folder)
    return config


def check_vocabulary(folder: Path, tokenizer, config: PretrainedConfig) -> None:
    """Raises UserError when the tokenizer has ids that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values())
    known = config.get_text_config().vocab_size
    if largest >= known:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {largest}, the model knows {known}: they do not belong together"
        )


def load_policy(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in `folder`, on the CPU. Raises UserError naming the tensors that do not fit."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of keys that do not fit becomes the error below
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        # A config may hold anything: which of these it causes depends on the architecture.
        raise UserError(f"cannot load the policy {folder}: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    own = f"{model.base_model_prefix}."
    misshapen = [
        f"{key} is {tuple(found)}, the config asks for {tuple(asked)}" for key, found, asked in info["mismatched_keys"]
    ]
    _refuse(
        folder,
        missing=info["missing_keys"],
        # Heads for other purposes (a PPO value head) do not change what the policy writes; its own layers would.
        unexpected=[key for key in info["unexpected_keys"] if key.startswith(own)],
        misshapen=misshapen,
    )
    check_finite(folder, model.state_dict())
    return model


def check_headers(folder: Path, config: PretrainedConfig) -> None:
    """As `load_policy`, from the files' headers alone: for an engine that reads the weights itself.

    Values are not looked at. Checkpoints that transformers renames on loading have other keys and are let through.
    """
    model = on_meta(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found, prefix = tensor_shapes(folder), f"{model.base_model_prefix}."
    if not any(key.startswith(prefix) for key in found):
        found = {prefix + key: shape for key, shape in found.items()}  # saved from the backbone alone
    if not found.keys() & expected.keys():
        return
    _refuse(
        folder,
        missing=expected.keys() - found.keys(),
        unexpected=(),
        misshapen=[
            f"{key} is {found[key]}, the config asks for {shape}"
            for key, shape in expected.items()
            if found.get(key, shape) != shape
        ],
    )


def check_finite(where: Path | str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises UserError naming `where` and the tensors that hold NaN or infinities."""
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{where}: these weights are not finite: {some_keys(broken)}. The checkpoint is damaged, or too large for the dtype"
        )


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shapes_of(config: PretrainedConfig) -> dict[str, torch.Size]:
    """A model's parameters by Hugging Face name, tied ones once, without loading it."""
    return {name: parameter.shape for name, parameter in on_meta(config).named_parameters()}


def _refuse(folder: Path, missing: Iterable[str], unexpected: Iterable[str], misshapen: Iterable[str]) -> None:
    problems = [("missing", missing), ("not expected", unexpected), ("of the wrong shape", misshapen)]
    found = "; ".join(f"{what}: {some_keys(sorted(keys))}" for what, keys in problems if keys)
    if found:
        raise UserError(f"{folder}: the weights do not fit config.json, tensors {found}")
