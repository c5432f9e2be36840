"""Where a run is: its newest checkpoint, whether that is whole, and whether going on with it would still be that run."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.errors import UserError
from alignment.model_folder import open_safetensors, some_keys, tensor_shapes
from alignment.records import read_json, read_object
from alignment.scoring.scores import asked_of

if TYPE_CHECKING:  # slow to import, and most of this is asked before any model is loaded
    from torch import nn

_NAME = re.compile(r"iteration_\d+")
_REMOVE = "remove that checkpoint: the same command goes on from an older one, or begins again where there is none"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run. They appear when they are whole."""
    found = (path for path in (folder / "checkpoints").glob("iteration_*") if _NAME.fullmatch(path.name))
    return max(found, default=None, key=step_of)


def step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("iteration_"))


def deciding_of(folder: Path) -> dict:
    """What decides the weights of the run in `folder`, as its manifest.json says. Raises UserError."""
    manifest = read_json(folder / "manifest.json")
    deciding = manifest.get("deciding") if isinstance(manifest, dict) else None
    if not isinstance(deciding, dict) or not isinstance(deciding.get("scorer", {}), dict):
        raise UserError(
            f"{folder / 'manifest.json'} does not say what the run was begun with (key 'deciding'): it is not one of a GRPO "
            "run, or damaged; give another --output_dir"
        )
    return deciding


def check_same_run(begun_with: dict, now: dict, folder: Path) -> None:
    """Raises UserError naming what of `now` (settings, weights, prompts, scorer, processes) the run was not begun with."""
    if begun_with.get("scorer") and now.get("scorer"):
        now = now | {"scorer": asked_of(begun_with["scorer"], now["scorer"])}
    changed = [
        f"{name} (was {begun_with.get(name)!r}, now {value!r})"
        for name, value in now.items()
        if begun_with.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{folder} was begun otherwise: {', '.join(changed)}. Going on would not be that run: undo the change, or give "
            "another --output_dir"
        )


def check_whole(checkpoint: Path, processes: int) -> None:
    """Raises UserError when a file is missing or damaged that going on needs.

    transformers would begin with a new optimizer, schedule or random state, and say nothing of it.
    """
    for path in _state_files(checkpoint, processes):
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


def _state_files(checkpoint: Path, processes: int) -> Iterator[Path]:
    ranks = [""] if processes == 1 else [f"_{rank}" for rank in range(processes)]
    yield from (checkpoint / f"rng_state{rank}.pth" for rank in ranks)
    if not (checkpoint / "latest").is_file():  # DeepSpeed's, which keeps optimizer and schedule in a folder of its own
        yield from (checkpoint / name for name in ("optimizer.pt", "scheduler.pt"))
    yield from (checkpoint / name for name in ("trainer_state.json", "constraint.json"))
