"""Verification of a recovered model, and the whole script from two folders to an answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.alpaca import verify_alpaca
from alignment.alpaca.integrity import MANIFEST
from alignment.alpaca.recover_alpaca_weights import Settings, recover
from alignment.errors import UserError

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / "alignment" / "alpaca"


@pytest.fixture(scope="module")
def recovered(goldens, tmp_path_factory) -> Path:
    source = goldens / "alpaca"
    place = tmp_path_factory.mktemp("alpaca") / "tuned"
    both = {"path_raw": str(source / "base"), "path_diff": str(source / "diff")}
    return recover(Settings(**both, path_tuned=str(place), expected_sum=152.8798, max_shard_gb=0.0001))


@pytest.fixture
def model(recovered, tmp_path) -> Path:
    return Path(shutil.copytree(recovered, tmp_path / "tuned"))


def verify(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["verify_alpaca.py", "--max_new_tokens", "8", *flags])
    return verify_alpaca.main()


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_good_model_is_verified_in_both_templates(model, monkeypatch, capsys):
    assert verify(monkeypatch, "--model_path", str(model)) == 0
    out = capsys.readouterr().out
    assert "21 of 21 tensors" in out and "513 rows, bos 1, eos 2, pad 512" in out
    assert "alpaca: '" in out and "pku: '" in out and out.endswith("verified\n")


def test_an_answer_that_is_not_the_expected_one(model, monkeypatch, capsys):
    assert verify(monkeypatch, "--path_tuned", str(model), "--expect", "Paris") == 1
    assert "does not contain 'Paris'" in capsys.readouterr().out


def test_a_flipped_byte_names_shard_and_tensor(model, monkeypatch, capsys):
    shard = model / "model-00002-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(bytes(content))
    last = [
        name
        for name, entry in json.loads((model / MANIFEST).read_text())["tensors"].items()
        if entry["file"] == shard.name
    ][-1]
    assert verify(monkeypatch, "--model_path", str(model)) == 1
    assert f"FAILED: {shard.name}: {last} is corrupt" in capsys.readouterr().out
    shard.unlink()
    assert verify(monkeypatch, "--model_path", str(model)) == 1
    assert f"FAILED: {shard.name}: cannot be read" in capsys.readouterr().out


def test_ids_that_do_not_fit(model, monkeypatch, capsys):
    edit(model / "config.json", eos_token_id=7)
    (model / "added_tokens.json").unlink()
    edit(model / "tokenizer_config.json", pad_token=None, added_tokens_decoder={})
    (model / "special_tokens_map.json").unlink()
    assert verify(monkeypatch, "--model_path", str(model)) == 1
    out = capsys.readouterr().out
    assert "eos_token_id: the tokenizer says 2, config.json 7" in out
    assert "the tokenizer has 512 tokens, the embeddings 513 rows" in out
    assert "no pad token" in out


def test_a_folder_that_is_no_model(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no config.json"):
        verify(monkeypatch, "--model_path", str(tmp_path))
    with pytest.raises(UserError, match="--model_path is needed"):
        verify(monkeypatch)


@pytest.mark.slow
def test_the_whole_script_and_a_rerun(goldens, tmp_path):
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "BASE_MODEL": str(goldens / "alpaca" / "base"),
        "DIFF_MODEL": str(goldens / "alpaca" / "diff"),
        "MODELS_DIR": str(tmp_path),
        "EXPECTED_SUM": "152.8798",
        "EXPECT_ANSWER": "",
        "DTYPE": "bfloat16",
    }
    for job in ("recover_alpaca_job.sh", "recover_alpaca_full.sh"):
        done = subprocess.run(["bash", str(FOLDER / job)], env=environment, cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.rstrip().endswith(f"verified\nAlpaca-7B is in {tmp_path}/alpaca-7b")
    assert "already recovered" in done.stdout
    wrong = {**environment, "EXPECTED_SUM": "", "ALPACA_PATH": str(tmp_path / "other")}
    failed = subprocess.run(
        ["bash", str(FOLDER / "recover_alpaca_full.sh")], env=wrong, cwd=REPO, capture_output=True, text=True
    )
    assert failed.returncode == 2 and "integrity check failed" in failed.stderr and "== 3" not in failed.stdout
    assert not (tmp_path / "other").exists()


def test_scripts_say_where_to_run_them(tmp_path):
    for job in ("recover_alpaca_job.sh", "recover_alpaca_full.sh"):
        done = subprocess.run(["bash", str(FOLDER / job)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "repository root" in done.stderr
