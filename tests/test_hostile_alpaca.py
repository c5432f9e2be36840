"""Damaged and mistyped files at the scripts of the Alpaca recovery: one line, before any weight is read or fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from script_here import bad_file, refused, run_script

RECOVER = "alignment/alpaca/recover_alpaca_weights.py"
VERIFY = "alignment/alpaca/verify_alpaca.py"
DOWNLOAD = "alignment/alpaca/download_models.py"
SUM = 152.8798  # of the golden pair

MANIFESTS = {
    "empty": b"",
    "a list": b"[]",
    "nothing in it": b"{}",
    "tensors a list": b'{"dtype": "float32", "tensors": []}',
    "an entry a word": b'{"dtype": "float32", "tensors": {"a": "b"}}',
    "an entry without file": b'{"dtype": "float32", "tensors": {"a": {"shape": [1], "sha256": "x", "sum": 1}}}',
    "not UTF-8": b"\xff",
}


@pytest.fixture
def pair(goldens, tmp_path) -> Path:
    """A folder with `base` and `diff`, to be damaged."""
    for name in ("base", "diff"):
        shutil.copytree(goldens / "alpaca" / name, tmp_path / name)
    return tmp_path


def recovery(pair: Path, *more: object, to: object = None) -> list:
    places = ["--path_raw", pair / "base", "--path_diff", pair / "diff", "--path_tuned", to or pair / "tuned"]
    return [RECOVER, *places, "--expected_sum", SUM, *more]


@pytest.mark.parametrize("case", MANIFESTS)
def test_damaged_manifests(pair, case):
    path = bad_file(pair, "reference.json", MANIFESTS[case])
    assert str(path) in refused(*recovery(pair, "--reference_manifest", path))
    assert run_script(*recovery(pair)).code == 0
    path = pair / "tuned" / "recovery_manifest.json"
    path.write_bytes(MANIFESTS[case])
    assert str(path) in refused(VERIFY, "--model_path", pair / "tuned")
    assert str(pair / "tuned") in refused(*recovery(pair))


CONFIGS = {
    "empty": b"",
    "a list": b"[]",
    "another model": b'{"model_type": "gpt2"}',
    "sizes in words": b'{"model_type": "llama", "hidden_size": "many"}',
    "rope a list": b'{"model_type": "llama", "rope_parameters": [1]}',
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("folder", ["base", "diff"])
def test_damaged_configs(pair, folder, case):
    path = pair / folder / "config.json"
    path.write_bytes(CONFIGS[case])
    assert str(path) in refused(*recovery(pair))
    assert not (pair / "tuned").exists()


def test_damaged_tokenizer_settings(pair):
    path = pair / "base" / "tokenizer_config.json"
    path.write_text("[]")
    assert str(path) in refused(*recovery(pair))


@pytest.mark.parametrize("content", [b"no sums\n", b"\xff\xfe\n", b"abc  model.safetensors\n"])
def test_damaged_checksums(pair, content):
    path = bad_file(pair / "base", "SHA256SUMS", content)
    assert f"{path}:1" in refused(*recovery(pair))


def test_weights_that_are_no_weights(pair):
    for file in (pair / "diff").glob("*.safetensors"):
        file.unlink()
    path = pair / "diff" / "pytorch_model.bin"
    torch.save([torch.zeros(2)], path)
    assert str(path) in refused(*recovery(pair))
    path.write_bytes(b"")
    assert str(path) in refused(*recovery(pair))


def test_places_that_cannot_be_written(pair):
    (pair / "file").write_text("")
    assert str(pair / "file") in refused(*recovery(pair, to=pair / "file" / "tuned"))
    assert str(pair / "file") in refused(DOWNLOAD, "--base", "owner/name", "--models_dir", pair / "file")


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"repo": "owner/name", "revision": "main", "commit": 1}'])
def test_a_damaged_receipt(tmp_path, content):
    path = bad_file(tmp_path, "name/download.json", content)
    assert str(path) in refused(DOWNLOAD, "--base", "owner/name", "--models_dir", tmp_path)


def test_a_log_of_finished_shards_that_was_edited_by_hand_begins_again(pair):
    first = run_script(*recovery(pair))
    assert first.code == 0, first.err
    plan = json.loads((pair / "tuned" / "recovery_manifest.json").read_text())["plan"]
    shutil.rmtree(pair / "tuned")
    rows = [{"plan": plan}, {"shard": 5}]
    bad_file(pair, "tuned.partial/recovery_progress.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    bad_file(pair, "tuned.partial/model.safetensors", b"")
    again = run_script(*recovery(pair))
    assert again.code == 0, again.err
    assert "beginning again" in again.out
