"""transformers' models are loaded whole or not at all.

transformers fills a tensor that a checkpoint lacks with random numbers and says so in a log: such a policy trains and answers,
and is wrong. Here it is refused by key, as are tensors of another shape, those of layers that the config does not know, and
values that are not finite.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations import sdpa_attention
from transformers.utils import logging

from alignment.errors import UserError, first_line
from alignment.model_folder import some_keys, tensor_shapes

HASHING_THREADS = 16
# Older checkpoints hold these as well; they follow from the config. Not a layer's bias: c_attn.bias is a weight.
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(attention\.)?(masked_)?bias|decoder\.version|\.position_ids)$")
# What a config that makes no sense causes depends on the architecture: a size of 0, an unknown activation, a missing key.
CONFIG_ERRORS = (ValueError, RuntimeError, KeyError, TypeError, AttributeError, ZeroDivisionError)

# Where all heads share one key and value head (multi-query attention), transformers hands them to torch's attention as one copy
# that all heads look at. On a GPU, with a mask, torch's memory-efficient kernel then gives wrong numbers at some lengths (seen
# with torch 2.11; https://github.com/pytorch/pytorch/issues/191937). With a copy for each head it does not.
_one_for_all = sdpa_attention.repeat_kv


def _one_each(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    repeated = _one_for_all(hidden_states, n_rep)
    return repeated.contiguous() if n_rep > 1 else repeated


sdpa_attention.repeat_kv = _one_each


def load_whole(
    kind: Any, folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", other_heads: bool = False
) -> PreTrainedModel:
    """The model in `folder` as the auto class `kind` loads it, on `device`, in eval mode.

    With `other_heads`, tensors outside the backbone that the model has no place for are passed over: a value head beside a
    policy does not change what it writes. Raises UserError naming the folder and the tensors that do not fit.
    """
    tensor_shapes(folder)  # names a file that cannot be read
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of keys that do not fit becomes the error below
    try:
        model, info = kind.from_pretrained(
            str(folder), dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ImportError, *CONFIG_ERRORS) as error:
        raise UserError(f"{folder}: could not be loaded: {first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    backbone = f"{model.base_model_prefix}."
    refuse_keys(
        folder,
        missing=info["missing_keys"],
        unexpected=[
            key
            for key in info["unexpected_keys"]
            if not BUFFERS.search(key) and (not other_heads or key.startswith(backbone))
        ],
        misshapen=[misshapen(*mismatch) for mismatch in info["mismatched_keys"]],
    )
    try:
        model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise UserError(f"{folder}: does not fit into the memory of {device}: {first_line(error)}") from error
    check_finite(folder, model.state_dict())
    return model


def tensors_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over the SHA-256 of each (name, tensor)'s name, shape, dtype and bytes, in the order of their names.

    Some are hashed side by side, since a 7B model has 13 to 27 GB; no more than those need be in memory at once.
    """

    def one(item: tuple[str, torch.Tensor]) -> tuple[str, bytes]:
        name, tensor = item
        digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return name, digest.digest()

    remaining = iter(tensors)
    digests: dict[str, bytes] = {}
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        while some := list(islice(remaining, HASHING_THREADS)):
            digests |= dict(pool.map(one, some))
    return hashlib.sha256(b"".join(digest for _, digest in sorted(digests.items()))).hexdigest()


def refuse_keys(
    folder: Path, missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str]
) -> None:
    """Raises UserError naming the first of the keys, when there are any."""
    problems = [("missing", missing), ("not expected", unexpected), ("of the wrong shape", misshapen)]
    found = "; ".join(f"{what}: {some_keys(sorted(keys))}" for what, keys in problems if keys)
    if found:
        raise UserError(f"{folder}: the weights do not fit config.json, tensors {found}")


def misshapen(key: str, found: Collection[int], asked: Collection[int]) -> str:
    return f"{key} is {tuple(found)}, the config asks for {tuple(asked)}"


def check_finite(where: Path | str, tensors: dict[str, torch.Tensor]) -> None:
    """Raises UserError naming `where` and the tensors that hold NaN or infinities."""
    # NaN and infinities come through as the smallest or the largest; isfinite takes forty times as long and a copy.
    broken = [
        key
        for key, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all()
    ]
    if broken:
        raise UserError(
            f"{where}: these weights are not finite: {some_keys(broken)}. The checkpoint is damaged, or too large for the dtype"
        )
