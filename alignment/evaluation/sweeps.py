"""One entry of a sweep file as command-line arguments: `defaults:` hold for all, each entry of `sweeps:` is one run.

    defaults: {split: test, num_samples: 3036}
    sweeps:
      - {model_name: Alpaca-7B, policy_model_path: models/alpaca-7b}
      - {model_name: ES-500, policy_model_path: runs/es/checkpoint-500}

A SLURM array task takes the entry of its index. Keys are the flags of the script, checked like flags.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from alignment.config import nearest
from alignment.errors import UserError
from alignment.evaluation.points import file_stem


def sweep_arguments(content: dict, path: str | Path, which: str, config_class: type) -> list[str]:
    """`--key value` for the entry that `which` names, an index from 0 or a `model_name`, of the sweep file `path`.

    Raises UserError, which names file and entry, when there is no such entry or a key is not a setting of `config_class`.
    """
    defaults, sweeps = defaults_and_sweeps(content, path)
    entry, where = _find(path, sweeps, which)
    settings = {**defaults, **_mapping(entry, where)}
    _check_files_differ(path, [{**defaults, **one} for one in sweeps if isinstance(one, dict)])
    known = [field.name for field in dataclasses.fields(config_class) if field.name not in ("sweep", "sweep_config")]
    arguments = []
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{nearest(str(key), known)}")
        if isinstance(value, list | dict):
            raise UserError(f"{where}: key '{key}': expected one value, got {value!r}")
        text = str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)
        arguments.append(f"--{key}={text}")
    return arguments


def defaults_and_sweeps(content: dict, path: str | Path) -> tuple[dict, list]:
    """The two parts of a sweep file's content. Raises UserError naming `path` when it has others or they are of another kind."""
    for key in content:
        if key not in ("defaults", "sweeps"):
            raise UserError(f"{path}: unknown key '{key}'{nearest(str(key), ('defaults', 'sweeps'))}")
    sweeps = content.get("sweeps") or []
    if not isinstance(sweeps, list) or not sweeps:
        raise UserError(f"{path}: expected a list of runs under 'sweeps:', each with a model_name and its settings")
    return _mapping(content.get("defaults") or {}, f"{path}: defaults"), sweeps


def _check_files_differ(path: str | Path, runs: list[dict]) -> None:
    """Two array tasks must not write the same files."""
    seen: dict[tuple[str, str], str] = {}
    for run in runs:
        if (name := str(run.get("model_name") or "")) == "":
            continue
        files = (str(run.get("output_dir")), file_stem(name))
        if files in seen:
            raise UserError(
                f"{path}: the sweeps {seen[files]} and {name} write the same files ({files[1]}_summary.json and others); "
                "give each its own model_name or output_dir"
            )
        seen[files] = name


def _find(path: str | Path, sweeps: list, which: str) -> tuple[object, str]:
    names = [str(entry.get("model_name")) if isinstance(entry, dict) else "" for entry in sweeps]
    if which in names:
        if names.count(which) > 1:  # they may differ in output_dir
            raise UserError(f"{path}: {names.count(which)} sweeps have the model_name {which}; name one by its index")
        index = names.index(which)
    elif which.isdecimal() and int(which) < len(sweeps):
        index = int(which)
    else:
        listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        raise UserError(f"{path} has no sweep {which}; it has {listed}")
    return sweeps[index], f"{path}: sweep {index} ({names[index]})"


def _mapping(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected 'key: value' lines, got {value!r:.60}")
    return value
