"""The demo models' tokenizer: byte-pair pieces with bytes to fall back on, learnt from the training text."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from alignment.conversation import get_template
from alignment.demo.data import DemoData

TEMPLATE = get_template("pku")
BOS, EOS = 1, 2


def train_tokenizer(data: DemoData, vocabulary: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer shaped like LLaMA's (unk 0, BOS 1, EOS 2, 256 bytes, pieces, padding last), from the training text."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    texts = [TEMPLATE.render(row["prompt"]) + row[f"response_{i}"] for row in data.train_pairs for i in (0, 1)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - len(special) - 1, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    pieces = special + sorted(learnt["vocab"], key=learnt["vocab"].get) + ["<pad>"]
    model = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
    )
