"""Generation with transformers' own `generate`: the engine for a CPU, one GPU, and every model that transformers loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig
from transformers.utils import logging

from alignment.device import find_device
from alignment.generation.engine import MERGED_ADAPTERS, Engine, Generation, Sampling, complete
from alignment.generation.loading import load_policy
from alignment.generation.members import LowRank, MembersInBatch, linear_weights
from alignment.records import read_json, write_json

MEMBERS_AT_ONCE = 8  # enough to share the product with the weights, few enough that several processes get a group


class TransformersEngine(Engine):
    """`dtype` "auto" is bfloat16, but float32 on a CPU and for a policy that adapters were merged into.

    `first_turn_only=False` keeps the turns that the model invents for the user, as the published scripts do.
    """

    model: Any  # transformers' PreTrainedModel that generates, or peft's around it

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
        self.device = find_device(device)
        super().__init__(model_path, template, first_turn_only, batch_size)
        if self.device.type == "cuda" and self.device.index is not None:  # of several processes each has its own GPU
            torch.cuda.set_device(self.device)
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" or self.holds_merged_adapters else "bfloat16"
        self.dtype = getattr(torch, dtype)
        self.model = load_policy(self.folder, self.dtype, self.device)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.members_at_once = min(MEMBERS_AT_ONCE, batch_size)
        self._folders_config = complete(self.model.generation_config, self.tokenizer, self.template)
        self.end_ids = self._folders_config.eos_token_id
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0]
        # The folder's is for saving: whatever a call leaves open would be taken from it, in TRL's sampling as well.
        self.model.generation_config = GenerationConfig(
            eos_token_id=self.end_ids, pad_token_id=self.pad_id, bos_token_id=self._folders_config.bos_token_id
        )

    def add_lora(self, rank: int, seed: int) -> None:
        """Puts LoRA adapters (peft, on all linear layers but the head) into the model; `parameters` are then theirs alone."""
        from peft import LoraConfig, get_peft_model  # slow to import, and only adapters need it

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            self.model = get_peft_model(self.model, config).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in sorted(self.parameters().items()):
            if ".lora_A." in name:  # drawn anew: peft draws in the base's dtype, which is not the same on every device
                drawn = nn.init.kaiming_uniform_(torch.empty(tensor.shape), a=math.sqrt(5), generator=generator)
                tensor.copy_(drawn)

    def parameters(self) -> dict[str, torch.Tensor]:
        adapted = hasattr(self.model, "peft_config")
        named = self.model.named_parameters()
        return {name: parameter.data for name, parameter in named if not adapted or "lora_" in name}

    def linear_weights(self) -> list[str]:
        return linear_weights(self.model)

    def generate_members(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        members: Sequence[dict[str, LowRank]],
        on_answers: Callable[[int, list[Generation]], None],
    ) -> None:
        """A batch is some prompts, similar in length, for all members: batch_size rows, or one prompt's when they are more.

        So it depends on nothing but the prompts and the number of members; all of them are complete at the end.
        """
        answers: list[dict[int, Generation]] = [{} for _ in members]
        with MembersInBatch(self.model, members) as in_batch:
            for batch in self._batches(prompts, max_new_tokens, max(1, self.batch_size // len(members))):
                sequences = list(batch.values()) * len(members)  # member 0's rows, member 1's, ...
                in_batch.rows = len(sequences)
                tokens = self._generate(sequences, max_new_tokens, Sampling())
                for number, own in enumerate(answers):
                    rows = tokens[number * len(batch) : (number + 1) * len(batch)]
                    own |= self._read_all(batch, rows)
        for number, own in enumerate(answers):
            on_answers(number, [own[index] for index in range(len(prompts))])

    def _answer(self, batch: dict[int, list[int]], max_new_tokens: int, sampling: Sampling) -> dict[int, Generation]:
        return self._read_all(batch, self._generate(list(batch.values()), max_new_tokens, sampling))

    def _read_all(self, batch: dict[int, list[int]], tokens: list[list[int]]) -> dict[int, Generation]:
        return {index: self.read(prompt, new) for (index, prompt), new in zip(batch.items(), tokens, strict=True)}

    @torch.inference_mode()
    def _generate(self, sequences: list[list[int]], max_new_tokens: int, sampling: Sampling) -> list[list[int]]:
        """The tokens that follow each sequence, with what stands behind their end."""
        ids, mask = self._pad_left(sequences)  # (B, T) each
        choice: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        output = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **choice)
        return output[:, ids.shape[1] :].tolist()

    @torch.inference_mode()
    def mean_log_probs(self, prompts: Sequence[str], responses: Sequence[str], finished: Sequence[bool]) -> np.ndarray:
        """(N,) float64: the mean log-probability of each response's tokens given its prompt, in nats a token.

        The end of sequence counts as a token of a finished response. NaN where there is no token.
        """
        encoded = []
        for prompt, response, done in zip(prompts, responses, finished, strict=True):
            one = self.template.encode_conversation(self.tokenizer, prompt, response, finished=done)
            # A chat template may go on behind the token that ends an answer; no policy generates that.
            encoded.append((one.ids[: len(one.ids) - max(0, one.closing - 1)], one.prompt_length))
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
        """Merged weights are computed anew and not in place, so that nothing drifts."""
        merged = hasattr(self.model, "peft_config")
        if merged:
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
        self._folders_config.save_pretrained(str(folder))
        if merged:
            config = Path(folder) / "config.json"
            write_json(config, read_json(config) | {"dtype": "float32", MERGED_ADAPTERS: True})
        self.tokenizer.save_pretrained(str(folder))

    def _pad_left(self, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.pad_id)
        mask = torch.zeros((len(sequences), width), dtype=torch.long)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.tensor(sequence)
            mask[row, width - len(sequence) :] = 1
        return ids.to(self.device), mask.to(self.device)


def _merged_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's state in float32 with each LoRA adapter added to its layer, under the names that the plain model has.

    In 16 bits most of what adapters have learnt would be rounded away: it is small beside the weights.
    """
    from peft.tuners.lora import LoraLayer

    state = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = state.pop(f"{name}.base_layer.weight")
            state[f"{name}.weight"] = weight.float() + module.get_delta_weight("default").float()  # type: ignore[attr-defined]
    return {
        name.replace(".base_layer.", "."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
