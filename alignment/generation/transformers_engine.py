"""Generation with transformers' own `generate`: the engine for a CPU, one GPU, and every model that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from alignment.errors import UserError
from alignment.generation.engine import Engine, Generation, Sampling, end_ids_of


class TransformersEngine(Engine):
    """`dtype` "auto" is float32 on a CPU and bfloat16 elsewhere. `first_turn_only=False` keeps the turns that the model
    invents for the user, as the published scripts do.
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
        super().__init__(model_path, template, first_turn_only, batch_size)
        self.device = torch.device(device)
        if dtype == "auto":
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        try:
            self.model = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=getattr(torch, dtype))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"cannot load the policy {model_path}: {' '.join(str(error).split())}") from error
        self.model.to(self.device).eval()
        self.context = getattr(self.model.config, "max_position_embeddings", None)
        self.end_ids = end_ids_of(self.model.generation_config, self.tokenizer)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0]

    def add_lora(self, rank: int, seed: int) -> None:
        """Puts LoRA adapters (peft, on all linear layers but the head) into the model; `parameters` are then theirs alone."""
        from peft import LoraConfig, get_peft_model  # slow to import, and only adapters need it

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = get_peft_model(self.model, config).eval()

    def parameters(self) -> dict[str, torch.Tensor]:
        adapted = hasattr(self.model, "peft_config")
        named = self.model.named_parameters()
        return {name: parameter.data for name, parameter in named if not adapted or "lora_" in name}

    @torch.inference_mode()
    def _answer(self, batch: dict[int, list[int]], max_new_tokens: int, sampling: Sampling) -> dict[int, Generation]:
        ids, mask = self._pad_left(list(batch.values()))  # (B, T) each
        choice = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if sampling.temperature > 0:
            torch.manual_seed(sampling.seed)
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.pad_id,
            **choice,
        )
        new = output[:, ids.shape[1] :].tolist()
        return {index: self.read(prompt, tokens) for (index, prompt), tokens in zip(batch.items(), new, strict=True)}

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
        """Adapters are merged into the model's weights, computed anew and not in place, so that nothing drifts."""
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


def _merged_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's state with each LoRA adapter added to its layer, under the names that the plain model has."""
    from peft.tuners.lora import LoraLayer

    state = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = state.pop(f"{name}.base_layer.weight")
            state[f"{name}.weight"] = weight + module.get_delta_weight("default").to(weight.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
