"""The conversation rule: how a prompt and a response become text and token ids, and where the assistant's turn ends.

One rule for policy and scorer: `BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:` + response + EOS. Prompt and
response are two fields from beginning to end; a text is never split on markers, because users write "ASSISTANT:" too.

    template = get_template("pku")
    encoded = template.encode_conversation(tokenizer, prompt, response, finished=True, max_length=576)

Where it departs from the published scripts (all of it comes back with `get_template(..., reference=True)`):
- EOS is appended by id. The published scorer appends the text `</s>`, which the fast tokenizer of the Beaver folders
  turns into four literal pieces unless a space precedes it, so that the score was read at `>`. Training used the id.
- Truncation takes the tail of the response and keeps EOS; the published one lost EOS with the tail.
- A response that was cut off by the token limit (`finished=False`) gets no EOS.
- Ids are those of the slow LLaMA tokenizer that the Beaver models were trained with: the text is split at added
  tokens such as `<pad>` and every piece between them gets its own leading space mark.
A prompt that already is a whole rendered frame (it starts and ends as the template does) is taken as it stands, as the
published service does; the border to the response is its end either way.

"chat" is the tokenizer's own chat template. What it writes around an answer is read off a rendered conversation: what ends
an answer (`<|im_end|>` and a line break, where ChatML is spoken) is appended in place of EOS, and the special tokens between
an answer and the user's next words end what is generated, whatever the generation config says. The template writes BOS
where the model wants it, so none is added, as in transformers' own `apply_chat_template(..., tokenize=True)`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PKU = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{prompt}\n\n### Response:"
)
PLACEHOLDER = "{prompt}"
LONG_TEXT = 10_000  # characters
SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
_TURNS = ("Q1first", "A1answer", "Q2second")  # words that no chat template writes by itself


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation. `ids[:prompt_length]` are ids of the prompt's own encoding."""

    ids: list[int]
    truncated: bool
    prompt_length: int
    closing: int = 0  # how many of the ids stand behind a finished response


@dataclass(frozen=True)
class Template:
    """How one prompt becomes the text in front of the response. Made by `get_template`."""

    name: str
    before: str
    after: str
    next_turn: str  # what the next user turn begins with; "" when special tokens alone tell
    chat_tokenizer: Any = field(default=None, repr=False)  # set for "chat": its template is applied instead
    closing: tuple[int, ...] = ()  # the ids behind a finished response; () means EOS
    stops: tuple[int, ...] = ()  # special tokens that end the assistant's turn, beside the model's own

    def render(self, prompt: str) -> str:
        """The text up to where the response begins."""
        if self.chat_tokenizer is not None:
            turns = [{"role": "user", "content": prompt}]
            return self.chat_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if self.before and self.after and prompt.startswith(self.before) and prompt.endswith(self.after):
            return prompt
        return self.before + prompt + self.after

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """Ids up to where the response begins, with BOS when the tokenizer adds one (a chat template writes its own)."""
        return self._start_ids(tokenizer) + encode_text(tokenizer, self.render(prompt))

    def encode_conversation(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        response: str,
        finished: bool = True,
        max_length: int | None = None,
    ) -> Encoded:
        """Ids of the whole conversation, encoded as one text (as in the score models' training).

        Where a token of that text reaches over the border (`:` + `//`), it counts as the response's.
        A finished response ends with EOS, also when its tail had to go to keep `max_length` ids.
        """
        prompt_text = self.render(prompt)
        start = self._start_ids(tokenizer)
        ids = start + encode_text(tokenizer, prompt_text + response)
        prompt_length = common_prefix(ids, start + encode_text(tokenizer, prompt_text))
        closing = self.closing_ids(tokenizer) if finished else []
        ids, truncated = end_ids(ids, closing, max_length)
        return Encoded(ids, truncated, min(prompt_length, len(ids)), len(closing))

    def encode_whole(
        self, tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True, max_length: int | None = None
    ) -> Encoded:
        """Ids of a text that already is a whole conversation (POST /score_texts). Its prompt length is unknown: 0."""
        ids = self._start_ids(tokenizer) + encode_text(tokenizer, text)
        closing = self.closing_ids(tokenizer) if finished else []
        ids, truncated = end_ids(ids, closing, max_length)
        return Encoded(ids, truncated, 0, len(closing))

    def closing_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The ids behind a finished response: EOS, or what the chat template writes there. The first one ends it."""
        return list(self.closing) or [tokenizer.eos_token_id]

    def cut_first_turn(self, raw: str) -> tuple[str, bool]:
        """The model's own first turn, and whether anything was cut.

        The cut is at the first whitespace that the next user turn's marker follows; that whitespace goes too. The marker of a
        chat template (`[INST]`) needs no whitespace: it is no word that a text would hold, and some write it without.
        """
        space = "" if self.chat_tokenizer is not None else r"\s"
        match = re.search(space + re.escape(self.next_turn), raw) if self.next_turn else None
        return (raw[: match.start()].rstrip(), True) if match else (raw, False)

    def _start_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        return bos_ids(tokenizer) if self.chat_tokenizer is None else []


class ReferenceTemplate(Template):
    """The published scorer's text and ids: literal EOS text, plain truncation, prompts with both markers untouched.

    Needs `load_tokenizer(folder, reference=True)`. Kept for comparisons with published numbers only.
    """

    def render(self, prompt: str) -> str:
        formatted = "BEGINNING OF CONVERSATION:" in prompt and "ASSISTANT:" in prompt
        return prompt if formatted else self.before + prompt + self.after

    def encode_conversation(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        response: str,
        finished: bool = True,
        max_length: int | None = None,
    ) -> Encoded:
        encoded = self.encode_whole(tokenizer, self.render(prompt) + response, finished, max_length)
        prompt_length = common_prefix(encoded.ids, self.encode_prompt(tokenizer, prompt))
        return Encoded(encoded.ids, encoded.truncated, prompt_length)

    def encode_whole(
        self, tokenizer: PreTrainedTokenizerBase, text: str, finished: bool = True, max_length: int | None = None
    ) -> Encoded:
        if finished and not text.endswith(tokenizer.eos_token):
            text += tokenizer.eos_token
        ids = bos_ids(tokenizer) + backend_ids(tokenizer.backend_tokenizer, text)
        limit = len(ids) if max_length is None else max_length
        return Encoded(ids[:limit], len(ids) > limit, 0)

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        text = self.render(prompt)
        return bos_ids(tokenizer) + backend_ids(tokenizer.backend_tokenizer, text)


def get_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None, reference: bool = False) -> Template:
    """The template called "pku", "alpaca" or "chat" (the tokenizer's own), or a format text that contains {prompt}.

    Raises UserError for anything else, and for "chat" without a tokenizer that has a chat template.
    """
    before, after = PKU.split(PLACEHOLDER)
    if reference:
        if name != "pku":
            raise UserError(f"template {name!r}: the reference behaviour exists for 'pku' only")
        return ReferenceTemplate("pku-reference", before, after, next_turn="USER:")
    if name == "pku" or name == PKU:
        return Template("pku", before, after, next_turn="USER:")
    if name == "chat":
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise UserError("template 'chat': the tokenizer has no chat template; use 'pku', 'alpaca' or a format text")
        return _chat_template(tokenizer)
    check_template(name)
    text = ALPACA if name == "alpaca" else name
    before, after = text.split(PLACEHOLDER)
    # The line that leads to the user's words is what the next user turn would begin with.
    next_turn = before.rstrip().rsplit("\n", 1)[-1].strip()
    return Template(name, before, after, next_turn=next_turn)


def check_template(name: str, key: str = "template") -> None:
    """Raises UserError when `name` can be no template, whatever the tokenizer; settings ask it before a model is loaded."""
    if name not in ("pku", "alpaca", "chat") and name.count(PLACEHOLDER) != 1:
        raise UserError(
            f"{key} {name!r:.80}: expected 'pku', 'alpaca', 'chat' or a text that contains {PLACEHOLDER} exactly once"
        )


def load_tokenizer(folder: str | Path, reference: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; `reference=True` takes tokenizer.json untouched, as the published scorer did.

    Raises UserError when the folder has none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if Path(folder).is_dir() and not any(any(Path(folder).glob(name)) for name in ("tokenizer*", "vocab*", "*.model")):
        raise UserError(
            f"{folder}: no tokenizer could be loaded: there are no tokenizer files; copy them from the base model's folder"
        )
    kind = PreTrainedTokenizerFast if reference else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder))
    except Exception as error:  # transformers raises many kinds; all mean the same to a user
        reason = str(error).strip().split("\n")[0]
        if (Path(folder) / "tokenizer.model").is_file():
            reason += " (a tokenizer.model alone needs: pip install sentencepiece protobuf)"
        raise UserError(f"{folder}: no tokenizer could be loaded: {reason}") from error
    settings = Path(folder) / "tokenizer_config.json"
    if hasattr(tokenizer, "legacy") and settings.is_file():
        # A LLaMA folder older than the key `legacy` means legacy, though transformers 5.x assumes the opposite.
        # Folders written by 5.x (they say `backend`) leave the key out too and mean what 5.x assumes.
        said = json.loads(settings.read_text(encoding="utf-8")).keys()
        tokenizer.legacy = tokenizer.legacy or not {"legacy", "backend"} & said
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # so that a saved copy says it and gives the same ids
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer names no eos_token, which marks a finished response")
    return tokenizer


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text without BOS and EOS, as the slow tokenizer of the model's training gives them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    pattern, added, mark = _added_tokens(tokenizer)
    if pattern is None:
        return backend_ids(backend, text)
    ids: list[int] = []
    for piece in pattern.split(text):
        if piece in added:
            ids.append(added[piece])
        elif piece:
            ids.extend(backend_ids(backend, mark + piece))
    return ids


def backend_ids(backend: Tokenizer, text: str) -> list[int]:
    """Ids of a text as the Rust tokenizer gives them, without special tokens."""
    if len(text) > LONG_TEXT:
        # `encode` keeps Python's lock for as long as it takes, seconds for a megabyte; this one lets other threads run.
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return backend.encode(text, add_special_tokens=False).ids


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts in front of every text: BOS, or nothing."""
    return list(_bos_ids(tokenizer))


def end_ids(ids: list[int], closing: list[int], max_length: int | None) -> tuple[list[int], bool]:
    """Ends `ids` with `closing` (never twice) and keeps `max_length` of them: (ids, truncated)."""
    if closing and ids[-len(closing) :] != closing:
        ids = ids + closing
    if max_length is None or len(ids) <= max_length:
        return ids, False
    return ids[: max(0, max_length - len(closing))] + closing, True


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many leading ids two lists share."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The tokenizer's chat template, with what it writes behind an answer and in front of the user's next words."""
    user, answer, again = _TURNS
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    try:
        ending = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(answer)[2]
        turns.append({"role": "user", "content": again})
        between = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(answer)[2].partition(again)[0]
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split())
        raise UserError(f"template 'chat': the tokenizer's chat template cannot render two turns: {reason}") from error
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    first = pattern.search(ending)
    closing = encode_text(tokenizer, ending[first.start() :]) if first else []
    # The user's turn: where special tokens open it they are stops, and the words between them no marker to look for.
    marker = between.removeprefix(ending).lstrip()
    marker = "" if pattern.match(marker) else pattern.split(marker)[0].split("\n")[0].strip()
    stops = dict.fromkeys(special[text] for text in pattern.findall(between))
    return Template("chat", "", "", marker, chat_tokenizer=tokenizer, closing=tuple(closing), stops=tuple(stops))


@lru_cache(maxsize=16)
def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    encoded = tokenizer("a", return_special_tokens_mask=True)
    mask = encoded["special_tokens_mask"]
    return tuple(encoded["input_ids"][: mask.index(0)])


@lru_cache(maxsize=16)
def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern | None, dict[str, int], str]:
    """How to split a text at added tokens, their ids, and the mark to put in front of each piece between them.

    Only SentencePiece tokenizers that mark the beginning of a text need this (LLaMA's "legacy" ones): the pattern is
    None for all others, which encode a text as a whole.
    """
    backend = tokenizer.backend_tokenizer
    if "Prepend" in repr(backend.normalizer):
        mark = ""  # tokenizer.json as converted by transformers 4.x: its normalizer adds the mark
    elif getattr(tokenizer, "legacy", False) or getattr(backend.pre_tokenizer, "prepend_scheme", None) == "always":
        # As built by transformers 5.x. It leaves the mark out where a piece begins with a space; the slow one does not.
        mark = SPACE_MARK
    else:
        return None, {}, ""
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    longest_first = sorted(added, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")"), added, mark
