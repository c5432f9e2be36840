"""Rows of a data set, wherever it is: the Hugging Face hub, a local folder, a Parquet or JSONL file, or the embedded sample.

    load_split("PKU-Alignment/PKU-SafeRLHF", "alpaca-7b", "train") -> list of dicts

A name that exists on disk is taken from there, so a clone of a hub repository works without a network.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from alignment.config import nearest
from alignment.errors import UserError
from alignment.records import read_jsonl

SAMPLE = "sample"  # the demo's own data: PKU-SafeRLHF's schema, mild wording, no download
SAMPLE_PER_TOPIC = 40  # training prompts a topic, 1,080 in all: enough for the published 250 and 500


def load_split(data: str, configuration: str, split: str, required: Iterable[str] = ()) -> list[dict]:
    """All rows of one split, each with the `required` keys. A single file has no configurations and no splits.

    Raises UserError for data that cannot be read, a configuration or split that does not exist (it names those that do),
    and a row without a required key (file and line, or row number).
    """
    path = Path(data)
    if data == SAMPLE:
        rows = _sample_rows(split)
    elif path.suffix in (".jsonl", ".json") and not path.is_dir():
        return read_jsonl(path, required)
    elif path.suffix == ".parquet" and not path.is_dir():
        rows = _parquet_rows(path)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        rows = _saved_rows(path, split)
    else:
        rows = _dataset_rows(data, configuration, split)
    required = tuple(required)
    for number, row in enumerate(rows, start=1):
        for key in required:
            if key not in row:
                raise UserError(f"{data}: row {number}: the key '{key}' is missing{nearest(key, row)}")
    return rows


def _sample_rows(split: str) -> list[dict]:
    from alignment.demo.data import demo_data

    data = demo_data(0, train_per_topic=SAMPLE_PER_TOPIC, clean_pairs=0, broken_pairs=0)
    splits = {"train": data.train_rows, "test": data.eval_rows}
    if split not in splits:
        raise UserError(f"the embedded sample has no split '{split}'; it has train, test")
    return splits[split]


def _parquet_rows(path: Path) -> list[dict]:
    _need_datasets(path)
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def _saved_rows(path: Path, split: str) -> list[dict]:
    """A folder written by `save_to_disk`."""
    _need_datasets(path)
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"{path} has no split '{split}'; it has {', '.join(data)}")
        data = data[split]
    return data.to_list()


def _dataset_rows(name: str, configuration: str, split: str) -> list[dict]:
    """From the hub or a folder in the hub's layout. A data set with one unnamed configuration ignores `configuration`."""
    _need_datasets(name)
    from datasets import get_dataset_config_names, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        configurations = get_dataset_config_names(name)
        chosen = configuration if configuration in configurations else None
        if chosen is None and configurations != ["default"]:
            raise UserError(f"{name} has no configuration '{configuration}'; it has {', '.join(configurations)}")
        return load_dataset(name, chosen, split=split).to_list()
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = error.__cause__ or error  # of rows that cannot be read the error itself says no more than that
        raise UserError(f"cannot load {name}, split '{split}': {' '.join(str(reason).split())}") from error


def _need_datasets(data: str | Path) -> None:
    try:
        import datasets  # noqa: F401  (slow to import, so only where it is needed)
    except ImportError as error:
        raise UserError(f"{data} needs the package datasets: pip install datasets, or give a JSONL file") from error
