"""Broken copies of a model folder: what a full disk, an interrupted download, a wrong upload or an enemy leaves behind.

    folder = broken(tiny_policy, tmp_path, "truncated safetensors")

Each breakage has the words that whoever loads the folder must say of it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 13476839424\n".format("0" * 64)
LAYER = "model.layers.0.mlp.up_proj.weight"


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, size // 2)


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _shard_missing(folder: Path) -> None:
    """Two shards with an index, of which one did not arrive."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()


class _RunsCode:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def _malicious(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({LAYER: _RunsCode(ran(folder))}, folder / "pytorch_model.bin")


def _malicious_old_format(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({LAYER: _RunsCode(ran(folder))}, protocol=2))


def _truncated_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    os.truncate(folder / "pytorch_model.bin", (folder / "pytorch_model.bin").stat().st_size // 2)


def _no_state_dict(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")


def _other_vocabulary(folder: Path) -> None:
    """The tokenizer of a larger vocabulary: a token added after the embedding was saved."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["\u20ac"] = max(content["model"]["vocab"].values()) + 1
    path.write_text(json.dumps(content))


def ran(folder: Path) -> Path:
    """The file that appears when code of the folder's pickle runs."""
    return folder.parent / "code ran"


# name: (what happens to the folder, the words that name it). For policies and score models alike.
BREAKAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (shutil.rmtree, ("no such model folder",)),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("x")), ("no such model folder",)),
    "empty": (lambda f: (shutil.rmtree(f), f.mkdir()), ("no config.json",)),
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "adapters alone": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        ("adapters alone; merge them into their base model",),
    ),
    "broken config": (lambda f: (f / "config.json").write_text("{"), ("config.json", "not a readable")),
    "config of nothing": (lambda f: (f / "config.json").write_text("{}"), ("config.json", "not a readable")),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "not a readable")),
    "config of another size": (lambda f: edit_config(f, intermediate_size=128), ("wrong shape", "up_proj")),
    "config with fewer layers": (lambda f: edit_config(f, num_hidden_layers=1), ("not expected", "model.layers.1.")),
    "config with more layers": (lambda f: edit_config(f, num_hidden_layers=3), ("missing", "model.layers.2.")),
    "config with words for numbers": (lambda f: edit_config(f, hidden_size="big"), ("config.json",)),
    "unknown activation": (lambda f: edit_config(f, hidden_act="what"), ("what",)),
    "heads that do not divide": (lambda f: edit_config(f, num_attention_heads=0), ("model",)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("no weights found",)),
    "shard missing": (_shard_missing, ("model-00002-of-00002.safetensors", "not in the folder")),
    "broken index": (
        lambda f: (_shard_missing(f), (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": 1}')),
        ("index.json", "not a weight index"),
    ),
    "truncated safetensors": (_truncate, (WEIGHTS, "damaged")),
    "empty safetensors": (lambda f: (f / WEIGHTS).write_bytes(b""), (WEIGHTS, "damaged")),
    "lfs pointer": (lambda f: (f / WEIGHTS).write_text(LFS_POINTER), (WEIGHTS, "git lfs pull")),
    "lfs pointer for a bin": (
        lambda f: (f / WEIGHTS).rename(f / "old") and (f / "pytorch_model.bin").write_text(LFS_POINTER),
        ("pytorch_model.bin", "git lfs pull"),
    ),
    "malicious bin": (_malicious, ("pytorch_model.bin", "could run code")),
    "malicious bin of the old format": (_malicious_old_format, ("pytorch_model.bin", "could run code")),
    "truncated bin": (_truncated_bin, ("pytorch_model.bin", "damaged")),
    "bin without names": (_no_state_dict, ("pytorch_model.bin", "expected tensors by name")),
    "no tokenizer": (_without_tokenizer, ("no tokenizer could be loaded",)),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), ("no tokenizer could be loaded",)),
    "other vocabulary": (_other_vocabulary, ("ids up to 355, the model knows 355",)),
    "layer tensor missing": (lambda f: edit_tensors(f, lambda t: t.pop(LAYER)), ("missing", LAYER)),
    "extra bias": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(64)})),
        ("not expected", "model.layers.0.mlp.up_proj.bias"),
    ),
    "misshapen": (
        lambda f: edit_tensors(f, lambda t: t.update({LAYER: torch.ones(64, 31)})),
        ("wrong shape", f"{LAYER} is (64, 31), the config asks for (64, 32)"),
    ),
    "nan": (lambda f: edit_tensors(f, lambda t: t[LAYER][3, 4].fill_(float("nan"))), ("not finite", LAYER)),
    "infinite": (
        lambda f: edit_tensors(f, lambda t: t["model.norm.weight"][0].fill_(float("-inf"))),
        ("not finite", "model.norm.weight"),
    ),
}

SCORE_HEADS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no head": (lambda f: edit_tensors(f, lambda t: t.pop("score_head.weight")), ("missing", "score_head.weight")),
    "wide head": (
        lambda f: edit_tensors(f, lambda t: t.update({"score_head.weight": torch.ones(2, 32)})),
        ("wrong shape", "score_head.weight is (2, 32)"),
    ),
    "nan head": (
        lambda f: edit_tensors(f, lambda t: t["score_head.weight"].fill_(float("nan"))),
        ("not finite", "score_head.weight"),
    ),
    "two scores a text": (lambda f: edit_config(f, score_dim=2), ("score_dim is 2",)),
    "unknown score type": (lambda f: edit_config(f, score_type="toxicity"), ("score_type is 'toxicity'",)),
}


def broken(model: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the model folder, called "model", with that breakage."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    change, _ = (BREAKAGES | SCORE_HEADS)[name]
    change(folder)
    return folder


def words(name: str) -> tuple[str, ...]:
    return (BREAKAGES | SCORE_HEADS)[name][1]
