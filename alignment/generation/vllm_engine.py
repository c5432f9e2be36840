"""Generation with vLLM (0.26) in this process, for GPU clusters: paged attention, CUDA graphs, continuous batching.

vLLM keeps some weights in another shape than the checkpoint: q, k and v in one matrix, gate and up in one, the vocabulary
padded. `parameters` gives every Hugging Face parameter as a view of the rows that hold it, so that what is written there is
what vLLM computes with. Prefix caching is off: a cached prefix would belong to the weights of another member.

Needs the environment of requirements-cluster.txt.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from alignment.errors import UserError
from alignment.generation.engine import Engine, Generation, Sampling, end_ids_of

# The model must live in this process, or its weights are out of reach. Read by vLLM when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

GIB = 2**30
_HEADROOM = 0.08  # of the card: CUDA's own memory, graphs, fragments
_SPACES = (" ", "\n", "\t", "\r")  # what may stand before the marker of the next turn; others are cut, only later


class VLLMEngine(Engine):
    """`reserved_bytes` of the card are left to others: the float32 master, a scorer. `dtype` "auto" is float16 or bfloat16
    as the checkpoint says, bfloat16 for float32 ones.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        template: str = "pku",
        device: str | torch.device = "cuda",
        dtype: str = "auto",
        first_turn_only: bool = True,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        reserved_bytes: int = 0,
        **options: object,
    ):
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(f"engine vllm: {error}; use the environment of requirements-cluster.txt") from error
        super().__init__(model_path, template, first_turn_only, batch_size=2**31)  # vLLM forms its own batches
        self.device = torch.device(device)
        torch.cuda.set_device(self.device.index or 0)
        self._config = AutoConfig.from_pretrained(str(model_path))
        self._path = str(model_path)
        total = torch.cuda.get_device_properties(self.device).total_memory
        share = 1 - _HEADROOM - reserved_bytes / total
        working = 2 * sum(shape.numel() for shape in self._shapes().values())
        print(
            f"GPU memory {total / GIB:.1f} GiB: policy {working / GIB:.1f}, reserved (float32 master) "
            f"{reserved_bytes / GIB:.1f}, KV cache about {max(0.0, share * total - working) / GIB:.1f} GiB",
            flush=True,
        )
        if share * total < 1.05 * working:
            raise UserError(
                f"the policy ({working / GIB:.1f} GiB) and what is reserved ({reserved_bytes / GIB:.1f} GiB) do not fit into "
                f"{total / GIB:.1f} GiB: use --master_device cpu or a larger card"
            )
        self._llm = LLM(
            model=self._path,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=share,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **options,
        )
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._model = runner.get_model()
        self.context = self._llm.llm_engine.model_config.max_model_len
        self.end_ids = end_ids_of(self._generation_config(), self.tokenizer)

    def parameters(self) -> dict[str, torch.Tensor]:
        own = {name: parameter.data for name, parameter in self._model.named_parameters()}
        fused = getattr(self._model, "packed_modules_mapping", {})
        shapes = self._shapes()
        views = {}
        for name, shape in shapes.items():
            holder, first = name, 0
            for whole, parts in fused.items():
                for number, part in enumerate(parts):
                    if f".{part}." in name:
                        siblings = [name.replace(f".{part}.", f".{earlier}.") for earlier in parts[:number]]
                        holder, first = name.replace(f".{part}.", f".{whole}."), sum(shapes[s][0] for s in siblings)
            if holder not in own:
                raise UserError(f"vLLM's model has no {holder}: this architecture is not supported by engine vllm")
            view = own[holder].narrow(0, first, shape[0])
            if view.shape != shape:
                raise UserError(f"vLLM keeps {name} as {tuple(view.shape)}, the checkpoint as {tuple(shape)}")
            views[name] = view
        return views

    def save_pretrained(self, folder: str | Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        state = {name: tensor.cpu() for name, tensor in (self.parameters() | (weights or {})).items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, str(folder), max_shard_size="50GB")
        self._config.save_pretrained(str(folder))
        self._generation_config().save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    def _answer(self, batch: dict[int, list[int]], max_new_tokens: int, sampling: Sampling) -> dict[int, Generation]:
        from vllm import SamplingParams

        marker = self.template.next_turn
        stop = [space + marker for space in _SPACES] if self.first_turn_only and marker else None
        choice = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed if sampling.temperature > 0 else None,
            max_tokens=max_new_tokens,
            stop=stop,
            stop_token_ids=self.end_ids,
            skip_special_tokens=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in batch.values()]
        outputs = self._llm.generate(prompts, choice, use_tqdm=False)
        return {
            index: self.read(ids, list(output.outputs[0].token_ids))
            for (index, ids), output in zip(batch.items(), outputs, strict=True)
        }

    def _shapes(self) -> dict[str, torch.Size]:
        """The checkpoint's parameters, tied ones once."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config)
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    def _generation_config(self) -> GenerationConfig:
        try:
            return GenerationConfig.from_pretrained(self._path)
        except OSError:
            return GenerationConfig.from_model_config(self._config)
