"""Where a run is: what it was begun with, its newest checkpoint, and whether that is whole."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.errors import UserError
from alignment.model_folder import open_safetensors, some_keys, tensor_shapes
from alignment.records import read_jsonl, read_object

if TYPE_CHECKING:  # slow to import, and most of this is asked before any model is loaded
    from torch import nn

_NAME = re.compile(r"iteration_\d+")
_REMOVE = "remove that checkpoint: the same command goes on from an older one, or begins again where there is none"


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, the newest last. They appear when they are whole."""
    found = (path for path in (folder / "checkpoints").glob("iteration_*") if _NAME.fullmatch(path.name))
    return sorted(found, key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    return next(reversed(checkpoints_of(folder)), None)


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("iteration_"))


def is_finished(folder: Path, max_steps: int) -> bool:
    """Whether nothing is left to do: final/ is the policy after `max_steps`, and its held-out evaluation is done.

    final/ may be that of a shorter run which was gone on with and killed before its new end was written.
    """
    state = folder / "final" / "trainer_state.json"
    if step_of(newest_checkpoint(folder)) < max_steps or not state.exists():
        return False
    step = read_object(state, iteration=int)["iteration"]
    if step < max_steps:
        return False
    try:
        rows = read_jsonl(folder / "metrics.jsonl")
    except UserError:  # a torn last line is mended, and anything else told, when the run goes on
        return False
    return any(row.get("kind") == "eval" and row.get("iteration") == step for row in rows)


def deciding_of(folder: Path) -> dict:
    """What decides the weights of the run in `folder`, as its manifest.json says. Raises UserError."""
    deciding = read_object(folder / "manifest.json").get("deciding")
    if not isinstance(deciding, dict) or not isinstance(deciding.get("scorer", {}), dict):
        raise UserError(
            f"{folder / 'manifest.json'} does not say what the run was begun with (key 'deciding'): it is not one of a GRPO "
            "run, or damaged; give another --output_dir"
        )
    return deciding


def check_whole(checkpoint: Path, processes: int, deepspeed: bool) -> None:
    """Raises UserError when a file is missing or damaged that going on needs, with DeepSpeed or without.

    transformers would begin with a new optimizer, schedule or random state, and say nothing of it.
    """
    of_deepspeed, plain = ((checkpoint / name).is_file() for name in ("latest", "optimizer.pt"))
    if of_deepspeed != plain and of_deepspeed != deepspeed:
        raise UserError(
            f"{checkpoint} keeps the optimizer as {'others do' if deepspeed else 'DeepSpeed does'}, and this start is "
            f"{'with' if deepspeed else 'without'} DeepSpeed: start it with the ACCELERATE_CONFIG that the run began with"
        )
    for path in _state_files(checkpoint, processes, deepspeed):
        if not path.is_file():
            raise UserError(f"{checkpoint} lacks {path.name}, without which going on is not exact; {_REMOVE}")
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            raise UserError(f"{path} is damaged; {_REMOVE}")
    try:
        state = read_object(checkpoint / "trainer_state.json")
        read_object(checkpoint / "constraint.json", value=(int, float), cost_ema=(int, float, type(None)))
    except UserError as error:
        raise UserError(f"{error}; {_REMOVE}") from error
    if state.get("global_step") != step_of(checkpoint):
        raise UserError(f"{checkpoint / 'trainer_state.json'}: global_step is {state.get('global_step')!r}; {_REMOVE}")


def check_weights(checkpoint: Path, model: nn.Module) -> None:
    """Raises UserError when the checkpoint's weights, or its adapters, are not those of `model`, by key and shape."""
    adapters = checkpoint / "adapter_model.safetensors"
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        if hasattr(model, "peft_config"):
            expected = {name.replace(".default.", "."): shape for name, shape in expected.items() if "lora_" in name}
            with open_safetensors(adapters) as tensors:
                found = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        else:
            found = tensor_shapes(checkpoint)
    except UserError as error:
        raise UserError(f"{error}; {_REMOVE}") from error
    # Some architectures are saved under other names: what has no counterpart in the files is then told when it is loaded.
    renamed = expected.keys() - found.keys() if found.keys() - expected.keys() else set()
    wrong = [key for key, shape in expected.items() if key not in renamed and found.get(key) != shape]
    if wrong:
        raise UserError(f"{checkpoint} holds no or other weights for {some_keys(sorted(wrong))}; {_REMOVE}")


def _state_files(checkpoint: Path, processes: int, deepspeed: bool) -> Iterator[Path]:
    ranks = [""] if processes == 1 else [f"_{rank}" for rank in range(processes)]
    yield from (checkpoint / f"rng_state{rank}.pth" for rank in ranks)
    # DeepSpeed keeps optimizer and schedule in a folder of its own, which `latest` names.
    yield from (checkpoint / name for name in (["latest"] if deepspeed else ["optimizer.pt", "scheduler.pt"]))
    yield from (checkpoint / name for name in ("trainer_state.json", "constraint.json"))
