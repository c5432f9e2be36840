"""Which tensor of the base is added to which tensor of the difference, and everything that can be wrong with the pair.

The list of tensors and their shapes come from the difference's config.json, so that a shard missing on both sides shows.
Every mismatch is a UserError that names tensors, or a note where there is one right thing to do:

| what is found | outcome |
|---|---|
| rotary `inv_freq` tables on one side or both | left out: they follow from the config; noted |
| base without the pad row (as published) | a row is added to embeddings and head: the mean of the base's rows |
| base that has as many rows, its tokenizer names a pad token | taken as it stands, as published; noted |
| base that has as many rows, its tokenizer names none | last row replaced by the mean of the others, as published; noted |
| any other number of rows | error: another vocabulary |
| tied base (no head), head in the difference | the embeddings stand for the base's head, as published |
| tied difference | no head is written, a stored one is left out and noted; a base that is not tied is an error |
| any other tensor on one side only | error |
| config values that differ (LLaMA-2: rms_norm_eps 1e-5, 4096 positions) | error that names them |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignment.alpaca.llama_config import EMBEDDINGS, HEAD, LlamaConfig
from alignment.alpaca.shards import FLOATS, WeightFolder
from alignment.errors import UserError
from alignment.records import read_object

ROTARY = "rotary_emb.inv_freq"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
COMPARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
)
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Pair:
    """One tensor of the result: difference `name` plus base `base_name`, whose last row may be the mean of those before."""

    name: str
    shape: tuple[int, ...]
    base_name: str
    mean_row: bool


def pair_tensors(
    base: WeightFolder, diff: WeightFolder, base_config: LlamaConfig, config: LlamaConfig
) -> tuple[list[Pair], list[str]]:
    """All tensors of the result in the model's own order, and the notes to be kept with it. Raises UserError.

    `base_config` and `config` (the difference's) are as `read_llama_config` gives them.
    """
    _compare_configs(base, diff, base_config, config)
    expected = config.shapes()
    notes = []
    for side, folder in (("base", base), ("difference", diff)):
        tables = [name for name in folder.file_of if name.endswith(ROTARY)]
        if tables:
            notes.append(f"left out, as it follows from the config: {_some(tables)} of the {side}")
    if config.tie_word_embeddings:
        if not base_config.tie_word_embeddings:
            raise UserError(
                f"{base.folder}: has a head of its own ({HEAD}), the difference ties it to {EMBEDDINGS}: wrong base"
            )
        if HEAD in diff.file_of:
            notes.append(f"left out, as the config ties it to {EMBEDDINGS}: {HEAD} of the difference")
        expected.pop(HEAD, None)
    _compare_names(diff, expected, "difference", allowed={HEAD} if config.tie_word_embeddings else set())
    _compare_names(base, expected, "base", allowed={HEAD} if base_config.tie_word_embeddings else set())

    base_has_pad = pad_token(base.folder) is not None
    pairs = []
    for name, shape in expected.items():
        base_name = EMBEDDINGS if name == HEAD and base_config.tie_word_embeddings else name
        for folder, own_name in ((base, base_name), (diff, name)):
            if folder.tensor(own_name).dtype not in FLOATS:
                raise UserError(
                    f"{folder.file_of[own_name]}: {own_name} is {folder.tensor(own_name).dtype}, expected float32, "
                    f"float16 or bfloat16: take the weights that are not quantised"
                )
        if diff.shape(name) != shape:
            raise UserError(
                f"{diff.file_of[name]}: {name} is {diff.shape(name)}, {diff.folder}/config.json asks for {shape}"
            )
        mean_row = _needs_mean_row(base, base_name, name, shape, base_has_pad, notes)
        pairs.append(Pair(name, shape, base_name, mean_row))
    notes += _compare_tokenizers(base.folder, diff.folder)
    return pairs, notes


def pad_token(folder: Path) -> str | None:
    """The pad token that the folder's tokenizer names, or None."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            token = read_object(folder / file).get("pad_token")
            if token is not None:
                return token.get("content") if isinstance(token, dict) else token
    return None


def _needs_mean_row(
    base: WeightFolder, base_name: str, name: str, shape: tuple, base_has_pad: bool, notes: list
) -> bool:
    found = base.shape(base_name)
    if name not in (EMBEDDINGS, HEAD) or found[1:] != shape[1:]:
        if found != shape:
            raise UserError(
                f"{base.file_of[base_name]}: {base_name} is {found}, the difference has {shape}: wrong base"
            )
        return False
    if found[0] == shape[0] - 1:
        return True
    if found[0] != shape[0]:
        raise UserError(
            f"{base.file_of[base_name]}: {base_name} has {found[0]} rows, the difference {shape[0]}, expected "
            f"{shape[0] - 1} (or {shape[0]} with a pad row): the base has another vocabulary"
        )
    what = (
        "taken as it stands"
        if base_has_pad
        else "replaced by the mean of the others, as its tokenizer has no pad token"
    )
    notes.append(f"the base has a pad row already: row {shape[0] - 1} of {base_name} {what}")
    return not base_has_pad


def _compare_configs(base: WeightFolder, diff: WeightFolder, base_config: LlamaConfig, config: LlamaConfig) -> None:
    different = [
        f"{key} {getattr(base_config, key)} (difference: {getattr(config, key)})"
        for key in COMPARED
        if getattr(base_config, key) != getattr(config, key)
    ]
    if not different:
        return
    llama_2 = base_config.rms_norm_eps == 1e-5 and base_config.max_position_embeddings == 4096
    hint = (
        "these are LLaMA-2's values, and the difference was made against LLaMA (1)"
        if llama_2
        else "the difference was made against another base; take that one, or mend config.json if the file is wrong"
    )
    raise UserError(f"{base.folder}/config.json: wrong base: {', '.join(different)}; {hint}")


def _compare_names(folder: WeightFolder, expected: dict, side: str, allowed: set[str]) -> None:
    found = {name for name in folder.file_of if not name.endswith(ROTARY)}
    missing = [name for name in expected if name not in found and name not in allowed]
    extra = sorted(found - expected.keys() - allowed)
    if missing:
        raise UserError(
            f"{folder.folder}: the {side} lacks {_some(missing)}: a shard is missing, or it is another model"
        )
    if extra:
        raise UserError(f"{folder.folder}: the {side} has {_some(extra)}, which the difference's config does not know")


def _compare_tokenizers(base: Path, diff: Path) -> list[str]:
    """Notes on the tokenizers; UserError when the difference has none, as the result's is taken from there."""
    if not any((diff / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"{diff}: no tokenizer ({' or '.join(TOKENIZER_FILES)}), the result's is taken from the difference"
        )
    models = [folder / "tokenizer.model" for folder in (base, diff)]
    if all(file.is_file() for file in models) and models[0].read_bytes() != models[1].read_bytes():
        return ["tokenizer.model of base and difference differ: the base may have another vocabulary of the same size"]
    return []


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
