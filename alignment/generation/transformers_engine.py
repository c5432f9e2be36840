"""Generation with transformers' own `generate`: the engine for a CPU, one GPU, and every model that transformers loads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from alignment.conversation import get_template, load_tokenizer
from alignment.errors import UserError
from alignment.progress import progress_bar

_CONTEXT_TOKENS = 8  # enough for a decoder to see that a response stands in the middle of a text


@dataclass(frozen=True)
class Generation:
    """One answer. `raw` is the decoded text; `response` is `raw` up to where the model began the user's next turn."""

    raw: str
    response: str
    finished: bool  # the end-of-sequence token came, or the turn was cut
    cut: bool
    num_tokens: int  # tokens generated before the end of sequence, those after a cut included


class TransformersEngine:
    """A causal language model and its tokenizer.

    `dtype` "auto" is float32 on a CPU and bfloat16 elsewhere. `first_turn_only=False` keeps the turns that the model invents
    for the user, as the published scripts do.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        template: str = "pku",
        device: str | torch.device = "cpu",
        dtype: str = "auto",
        first_turn_only: bool = True,
        batch_size: int = 64,
    ):
        logging.disable_progress_bar()  # the scripts' own bar is the only one
        self.device = torch.device(device)
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        self.tokenizer = load_tokenizer(model_path)
        self.template = get_template(template, self.tokenizer)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=getattr(torch, dtype))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load the policy {model_path}: {' '.join(str(error).split())}") from error
        self.model.to(self.device).eval()
        self.first_turn_only = first_turn_only
        self.batch_size = batch_size
        self.end_ids = _end_ids(self.model, self.tokenizer)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0]

    def add_lora(self, rank: int, seed: int) -> None:
        """Puts LoRA adapters (peft, on all linear layers but the head) into the model; `weights` are then theirs alone."""
        from peft import LoraConfig, get_peft_model  # slow to import, and only adapters need it

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(self.model, config).eval()

    def weights(self, pattern: str | None = None) -> dict[str, torch.Tensor]:
        """The parameters that the model computes with, by Hugging Face name; tied ones appear once.

        With adapters only theirs; with a regular expression only those whose name it finds (UserError when there is none).
        """
        adapted = hasattr(self.model, "peft_config")
        found = {
            name: parameter.data
            for name, parameter in self.model.named_parameters()
            if (not adapted or "lora_" in name) and (pattern is None or re.search(pattern, name))
        }
        if not found:
            names = list(dict(self.model.named_parameters()))
            raise UserError(f"no parameter's name matches {pattern!r}; there are {', '.join(names[:4])}, ...")
        return found

    def weights_hash(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of all parameters, in the order of their names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.weights().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        progress: bool = False,
    ) -> list[Generation]:
        """Answers `prompts`, in their order. Temperature 0 is greedy; otherwise sampling that `seed` makes repeatable.

        Raises UserError for a prompt that leaves no room for `max_new_tokens` in the model's context.
        """
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
            torch.manual_seed(seed)
        answers: dict[int, Generation] = {}
        with progress_bar(len(prompts), "generate", "prompt", disable=not progress) as bar:
            for batch in self._batches(prompts, max_new_tokens):
                answers |= self._answer(batch, max_new_tokens, sampling)
                bar.update(len(batch))
        return [answers[index] for index in range(len(prompts))]

    def generate_share(
        self, prompts: Sequence[str], max_new_tokens: int, rank: int, world_size: int
    ) -> dict[int, Generation]:
        """Greedy answers to this process's share of `prompts`, by index.

        Whole batches are dealt out, so that an answer does not depend on how many processes there are.
        """
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        answers: dict[int, Generation] = {}
        for batch in self._batches(prompts, max_new_tokens)[rank::world_size]:
            answers |= self._answer(batch, max_new_tokens, greedy)
        return answers

    def _batches(self, prompts: Sequence[str], max_new_tokens: int) -> list[dict[int, list[int]]]:
        """Batches of {index: ids}. Neighbours of similar length share one: little padding, by a rule of the prompts alone."""
        encoded = [self.template.encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        self._check_room(encoded, max_new_tokens)
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        starts = range(0, len(order), self.batch_size)
        return [{index: encoded[index] for index in order[start : start + self.batch_size]} for start in starts]

    @torch.inference_mode()
    def _answer(self, batch: dict[int, list[int]], max_new_tokens: int, sampling: dict) -> dict[int, Generation]:
        ids, mask = self._pad_left(list(batch.values()))  # (B, T) each
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.pad_id,
            **sampling,
        )
        new = output[:, ids.shape[1] :].tolist()
        return {index: self._read(prompt, tokens) for (index, prompt), tokens in zip(batch.items(), new, strict=True)}

    def _read(self, prompt: list[int], tokens: list[int]) -> Generation:
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
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @torch.inference_mode()
    def mean_log_probs(self, prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]) -> np.ndarray:
        """(N,) float64: the mean log-probability of each response's tokens given its prompt, in nats a token.

        The end of sequence counts as a token of a finished response. NaN where there is no token.
        """
        encoded = []
        for prompt, response, done in zip(prompts, responses, finished, strict=True):
            one = self.template.encode_conversation(self.tokenizer, prompt, response, finished=done)
            encoded.append((one.ids, one.prompt_length))
        result = np.full(len(encoded), np.nan)
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]))
        for begin in range(0, len(order), self.batch_size):
            rows = order[begin : begin + self.batch_size]
            width = max(len(encoded[row][0]) for row in rows)
            ids = torch.full((len(rows), width), self.pad_id, device=self.device)
            counted = torch.zeros((len(rows), width), dtype=torch.bool, device=self.device)
            for i, row in enumerate(rows):
                tokens, start = encoded[row]
                ids[i, : len(tokens)] = torch.tensor(tokens, device=self.device)
                counted[i, max(start, 1) : len(tokens)] = True
            # Attention is causal and padding stands on the right, so no mask is needed: no counted token sees a pad.
            logits = self.model(input_ids=ids).logits[:, :-1].float()  # (B, T-1, V)
            losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            weights = counted[:, 1:].double()
            totals = (-losses.view(len(rows), -1).double() * weights).sum(1)
            result[rows] = (totals / weights.sum(1)).cpu().numpy()  # 0 / 0 is NaN: no token
        return result

    def save_pretrained(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """The model in Hugging Face layout (safetensors) with its tokenizer; `weights` by parameter name in place of its own.

        Adapters are merged into the model's weights, computed anew and not in place, so that nothing drifts.
        """
        if hasattr(self.model, "peft_config"):
            model = self.model.get_base_model()
            state = _merged_state(model)
        else:
            model = self.model
            state = model.state_dict()
            # A tied parameter has several names and one tensor: all of them get the given one.
            first_name = {parameter: name for name, parameter in model.named_parameters()}
            for name, parameter in model.named_parameters(remove_duplicate=False):
                state[name] = (weights or {}).get(first_name[parameter], parameter)
        model.save_pretrained(str(folder), state_dict=state)
        self.tokenizer.save_pretrained(str(folder))

    def _pad_left(self, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.pad_id)
        mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _check_room(self, encoded: list[list[int]], max_new_tokens: int) -> None:
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is None:
            return
        for index, ids in enumerate(encoded):
            if len(ids) + max_new_tokens > context:
                raise UserError(
                    f"prompt {index + 1} has {len(ids)} tokens; with max_new_tokens {max_new_tokens} that is more than the "
                    f"model's context of {context}: leave that prompt out or lower max_new_tokens"
                )


def _end_ids(model: torch.nn.Module, tokenizer: object) -> list[int]:
    """Every id that ends a sequence: the generation config's (one or several) and the tokenizer's."""
    configured = model.generation_config.eos_token_id
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise UserError("neither the policy's generation config nor its tokenizer names an end-of-sequence token")
    return ids


def _merged_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's state with each LoRA adapter added to its layer, under the names that the plain model has."""
    from peft.tuners.lora import LoraLayer

    state = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = state.pop(f"{name}.base_layer.weight")
            state[f"{name}.weight"] = weight + module.get_delta_weight("default")
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
