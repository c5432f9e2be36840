"""Fixtures that several test files share: the goldens, and tiny random models that need no download and no training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPO = Path(__file__).resolve().parents[1]

# A busy machine is no finding.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder with the reference implementations' results; they are not in git, so tests on them skip where it is absent."""
    folder = Path(os.environ.get("ALIGNMENT_GOLDENS", REPO.parent / "shared" / "goldens"))
    if not folder.is_dir():
        pytest.skip(f"no goldens at {folder} (set ALIGNMENT_GOLDENS)")
    return folder


def make_tokenizer(folder: Path) -> int:
    """Saves a tokenizer in LLaMA's style: <unk> 0, <s> 1, </s> 2, <pad> 3, 256 bytes, and each printable ASCII character.

    Returns the vocabulary size.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    vocabulary |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    vocabulary |= {character: 260 + index for index, character in enumerate(["▁", *map(chr, range(33, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names).save_pretrained(str(folder))
    return len(vocabulary)


def tiny_llama_config(vocab_size: int, hidden_size: int = 32, **more):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        **more,
    )


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """A random two-layer Llama with a byte tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("policy")
    config = tiny_llama_config(make_tokenizer(folder), tie_word_embeddings=True, initializer_range=0.5)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_scorers(tmp_path_factory) -> tuple[Path, Path]:
    """A random reward and a random cost model in the Beaver layout, with the policy's tokenizer."""
    import torch

    from alignment.scoring.score_model import ScoreModel

    folders = []
    for seed, kind in ((1, "reward"), (2, "cost")):
        folder = tmp_path_factory.mktemp(kind)
        config = tiny_llama_config(make_tokenizer(folder), score_type=kind, initializer_range=0.3)
        torch.manual_seed(seed)
        ScoreModel(config).save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]
