"""What every generation engine is: prompts to token ids, batches by a rule of the prompts alone, tokens to an answer.

The response is the model's own first turn; it is cut here and nowhere else.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from alignment.conversation import Template, get_template, load_tokenizer
from alignment.errors import UserError
from alignment.generation.loading import check_vocabulary, known_ids, read_policy_config
from alignment.generation.members import LowRank
from alignment.model_folder import resolve_folder
from alignment.pretrained import tensors_hash
from alignment.progress import progress_bar

# A key of config.json: adapters were merged into these weights. What they have learnt is so small beside them that 16 bits would
# round most of it away, so that such a policy is saved, and by default loaded, in float32.
MERGED_ADAPTERS = "merged_adapters"

_CONTEXT_TOKENS = 8  # enough for a decoder to see that a response stands in the middle of a text


@dataclass(frozen=True)
class Generation:
    """One answer. `raw` is the decoded text; `response` is `raw` up to where the model began the user's next turn."""

    raw: str
    response: str
    finished: bool  # the end-of-sequence token came, or the turn was cut
    cut: bool
    num_tokens: int  # tokens generated before the end of sequence, those after a cut included


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy; otherwise sampling that `seed` makes repeatable."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Engine(ABC):
    """A policy that answers prompts. Subclasses load it and implement `_answer`, `parameters` and `save_pretrained`."""

    device: torch.device
    dtype: torch.dtype  # that the policy computes in
    end_ids: list[int]
    context: int | None  # longest prompt and answer together, in tokens; None when the model has no limit
    members_at_once: int  # how many members one call of `generate_members` should get
    num_parameters: int  # of the policy, adapters not counted

    def __init__(self, model_path: str | Path, template: str, first_turn_only: bool, batch_size: int):
        """Raises UserError for a folder without a policy's config or tokenizer; its weights are looked at when they are read."""
        self.folder = resolve_folder(model_path)
        self.config = read_policy_config(self.folder)
        self.tokenizer = load_tokenizer(self.folder)
        self.holds_merged_adapters = bool(getattr(self.config, MERGED_ADAPTERS, False))
        check_vocabulary(self.folder, self.tokenizer, self.config)
        self._ids_known = known_ids(self.config)
        if self._ids_known is not None and (self.tokenizer.pad_token_id or 0) >= self._ids_known:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # a token that was added and has no embedding
        self.template = get_template(template, self.tokenizer)
        self.first_turn_only = first_turn_only
        self.batch_size = batch_size

    @abstractmethod
    def add_lora(self, rank: int, seed: int) -> None:
        """Puts LoRA adapters, drawn from `seed`, into the model; `parameters` are then theirs alone. UserError if it cannot."""

    @abstractmethod
    def parameters(self) -> dict[str, torch.Tensor]:
        """The tensors that the engine computes with (views of them), by Hugging Face parameter name; tied ones once."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """The model in Hugging Face layout (safetensors) with its tokenizer; `weights` by name in place of its own.

        Adapters are merged, and all weights are then saved in float32 (see MERGED_ADAPTERS).
        """

    @abstractmethod
    def _answer(self, batch: dict[int, list[int]], max_new_tokens: int, sampling: Sampling) -> dict[int, Generation]:
        """Answers to a batch of encoded prompts, by index."""

    @abstractmethod
    def linear_weights(self) -> list[str]:
        """Names of the matrices that linear layers compute with (members.linear_weights): what members are perturbed in."""

    @abstractmethod
    def generate_members(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        members: Sequence[dict[str, LowRank]],
        on_answers: Callable[[int, list[Generation]], None],
    ) -> None:
        """Greedy answers of many members to the same `prompts`; all share the engine's weights, which stay as they are.

        Each member is what it adds to the weights, by Hugging Face parameter name; {} is the engine's own policy.
        `on_answers(index, answers)` gets a member's answers, in the order of the prompts, as soon as it has them all;
        members come in any order. Raises UserError as `generate` does.
        """

    def close(self) -> None:  # noqa: B027 (most engines have nothing to do)
        """Gives back what would outlive the object. The engine is not used after it."""

    def weights(self, pattern: str | None = None) -> dict[str, torch.Tensor]:
        """`parameters`, with a regular expression only those whose name it finds (UserError when there is none)."""
        everything = self.parameters()
        found = {name: tensor for name, tensor in everything.items() if pattern is None or re.search(pattern, name)}
        if not found:
            raise UserError(
                f"no parameter's name matches {pattern!r}; there are {', '.join(list(everything)[:4])}, ..."
            )
        return found

    def weights_hash(self) -> str:
        """`tensors_hash` of all parameters."""
        return tensors_hash(self.parameters().items())

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: bool = False,
    ) -> list[Generation]:
        """Answers `prompts`, in their order.

        Raises UserError for a prompt that leaves no room for `max_new_tokens` in the model's context.
        """
        answers: dict[int, Generation] = {}
        with progress_bar(len(prompts), "generate", "prompt", disable=not progress) as bar:
            for number, batch in enumerate(self._batches(prompts, max_new_tokens)):
                answers |= self._answer(batch, max_new_tokens, Sampling(temperature, top_p, seed + number))
                bar.update(len(batch))
        return [answers[index] for index in range(len(prompts))]

    def generate_share(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        rank: int,
        world_size: int,
        before_batch: Callable[[], None] = lambda: None,
    ) -> dict[int, Generation]:
        """Greedy answers to this process's share of `prompts`, by index. What `before_batch` raises ends it.

        Whole batches are dealt out, so that an answer does not depend on how many processes there are.
        """
        answers: dict[int, Generation] = {}
        for batch in self._batches(prompts, max_new_tokens)[rank::world_size]:
            before_batch()
            answers |= self._answer(batch, max_new_tokens, Sampling())
        return answers

    def read(self, prompt: list[int], tokens: list[int]) -> Generation:
        """The answer that a prompt's ids and the tokens generated behind them (with what follows their end) make."""
        length = next((index for index, token in enumerate(tokens) if token in self.end_ids), None)
        ended = length is not None
        own = tokens[:length]
        # A SentencePiece decoder drops the space that a text begins with, so a response decoded alone would lose its own:
        # decode it behind the end of the prompt and take what was added.
        before = self._decode(prompt[-_CONTEXT_TOKENS:])
        whole = self._decode(prompt[-_CONTEXT_TOKENS:] + own)
        raw = whole[len(before) :] if whole.startswith(before) else self._decode(own)
        response, cut = self.template.cut_first_turn(raw) if self.first_turn_only else (raw, False)
        return Generation(raw=raw, response=response, finished=ended or cut, cut=cut, num_tokens=len(own))

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(  # type: ignore[return-value]  # one list of ids is one text
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _batches(
        self, prompts: Sequence[str], max_new_tokens: int, size: int | None = None
    ) -> list[dict[int, list[int]]]:
        """Batches of {index: ids}, of `size` or batch_size prompts.

        Neighbours of similar length share one: little padding, by a rule of the prompts alone.
        """
        size = size or self.batch_size
        encoded = self.check_room(prompts, max_new_tokens)
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        starts = range(0, len(order), size)
        return [{index: encoded[index] for index in order[start : start + size]} for start in starts]

    def check_room(self, prompts: Sequence[str], max_new_tokens: int, source: str = "") -> list[list[int]]:
        """The ids of each prompt. Raises UserError, which names the `source` of the prompts, for one without room to answer."""
        encoded = [self.template.encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            named = f"{source}: the prompt {prompt!r:.60}" if source else f"prompt {index + 1}"
            if self._ids_known is not None and max(ids, default=0) >= self._ids_known:
                raise UserError(
                    f"{named} has the token {max(ids)}, the model knows {self._ids_known}: leave that prompt out"
                )
            if self.context is not None and len(ids) + max_new_tokens > self.context:
                raise UserError(
                    f"{named} has {len(ids)} tokens; with max_new_tokens {max_new_tokens} that is more than the model's "
                    f"context of {self.context}: leave that prompt out, or allow fewer new tokens"
                )
        return encoded


def complete(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, template: Template) -> GenerationConfig:
    """A folder's generation config with all end tokens in `eos_token_id`, so that a saved policy ends where this one does:
    its own (one or several), the tokenizer's and the chat template's.

    Raises UserError when it could not be saved.
    """
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    config.eos_token_id = list(dict.fromkeys([*ends, tokenizer.eos_token_id, *template.stops]))
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True  # a temperature without it (Vicuna's): transformers loads that but does not save it
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise UserError(f"generation_config.json: {' '.join(str(error).split())}") from error
    return config
