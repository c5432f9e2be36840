"""Array tasks of the classification: one an entry of a sweep file, which are done, and whose results are of other settings.

    python slurm/sweep_tasks.py last alignment/evaluation/sweep_configs.yaml           # index of the last entry
    python slurm/sweep_tasks.py todo alignment/evaluation/sweep_configs.yaml 2         # exit code 3: entry 2 is done

An entry is done when its summary tells of what the entry asks for now: the same answers (policy, checkpoint, journal and step,
or file) to the same prompts, made and scored with the same settings, and newer than the files of policy and answers. A journal
is only added to: what it says up to a step stays. `todo` takes the flags of the classification too, which win over the file.
Where an entry is not done, `todo` moves saved answers that cannot be gone on with, and all that was made from them, to
`replaced/` in their folder (hours of a GPU may be in them): those of other settings, and of the policy as it was before it was
trained further. FORCE=1 has it move any; a job that is queued again with it keeps what it has made since.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from alignment.config import read_yaml_mapping, script_parser
from alignment.errors import UserError, run_main
from alignment.evaluation.classify_settings import DATA_KEYS, SAMPLED, ClassifySettings, sweep_settings
from alignment.evaluation.points import model_file
from alignment.evaluation.prompts import load_rows, prompts_file, rows_hash
from alignment.evaluation.sweeps import defaults_and_sweeps
from alignment.model_folder import config_hash, known_as, weights_hash
from alignment.records import atomic_open, read_object

DONE = 3
RESULTS = ("generations.jsonl", "scores.jsonl", "Rs.npy", "Cs.npy", "labels.npy", "points.jsonl", "scatter.png")
SPEED = "policy_batch_size"  # finished results are not made again for it; answers of two of them are not mixed


@dataclass(frozen=True)
class Sweep:
    """One entry of a sweep file, its defaults filled in."""

    config: ClassifySettings

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def policy(self) -> str | None:
        return self.config.policy_model_path

    @property
    def summary(self) -> Path:
        return self._file("summary.json")

    @property
    def answers(self) -> Path:
        return self._file("generations.jsonl")

    def is_done(self) -> bool:
        return self.summary.exists() and self.other_results() is None and self.other_answers(SPEED) is None

    def other_answers(self, *free: str) -> str | None:
        """Why the saved answers are not those that are asked for; None when they are, or there are none."""
        head = first_row(self.answers)
        if not head or head.get("policy") != self.config.policy:  # another model's: the classification refuses them
            return None
        return self._older(self.answers) or self._changes(self._of_answers(head), free)

    def other_results(self) -> str | None:
        """The same of the results, whose answers may be the right ones all the same."""
        summary = read_object(self.summary)
        if summary.get("source", self.config.source) != self.config.source:
            return f"they are of the {summary['source']}"
        sampling, data, base, scorer = (part_of(summary, key) for key in ("sampling", "data", "base", "scorer"))
        recorded = self._of_answers(sampling) | self._of_data(data)
        recorded |= {key: summary[key] for key in ("lambda_cost", "repeated_prompts") if key in summary}
        if self.config.base_model_path:
            recorded["base_model_path"] = base.get("model")
        if not self.config.scorer_url:  # what a service scores with, it alone knows
            for key in ("reward_model", "cost_model"):
                if identity := part_of(scorer, key):
                    recorded[key] = self._if_known(getattr(self.config, key), identity)
            recorded |= {"max_length": scorer["max_length"]} if "max_length" in scorer else {}
        return self._older(self.summary) or self._changes(recorded, (SPEED,))

    def set_aside(self) -> None:
        """The summary goes first: it says that the rest is whole."""
        files = [file for ending in ("summary.json", *RESULTS) if (file := self._file(ending)).exists()]
        place = self._file(time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime()))
        place = place.parent / "replaced" / place.name
        for file in files:
            place.mkdir(parents=True, exist_ok=True)
            file.replace(place / file.name)

    def begin_anew(self, job: str, restarts: str) -> None:
        """Sets everything aside, once a job: what is there when it is queued again is its own."""
        mark = self._file("forced_by")
        if restarts != "0" and mark.exists() and mark.read_text() == job:
            return
        self.set_aside()
        if job:
            with atomic_open(mark) as file:
                file.write(job)

    def _file(self, ending: str) -> Path:
        return model_file(self.config.output_dir, self.config.name, ending)

    def _older(self, result: Path) -> str | None:
        made = result.stat().st_mtime
        for file in (self.config.policy_model_path, self.config.policy_vllm_ckpt, self.config.responses_from):
            if newest(file) > made:
                return f"{file} was written after them"
        return None

    def _changes(self, recorded: dict, free: tuple[str, ...]) -> str | None:
        """What of `recorded`, by the names of the settings, is not as asked: "seed (was 1, now 2), ..."."""
        asked = vars(self.config)
        if "prompts" in recorded:
            asked = asked | {"prompts": rows_hash(load_rows(self.config))}
        changes = [
            f"{key} (was {value!r}, now {asked[key]!r})"
            for key, value in recorded.items()
            if key not in free and value != asked[key]
        ]
        return ", ".join(changes) or None

    @staticmethod
    def _if_known(model: str, identity: dict) -> str:
        """`model` when the identity is that model's, otherwise what the identity names."""
        folder = Path(model).expanduser()
        same = identity.get("name") == known_as(model)
        if same and folder.is_dir():  # of another folder of that name
            hashes = (("config", config_hash), ("weights", weights_hash))
            same = all(identity[key] == of(folder) for key, of in hashes if key in identity)
        return model if same else f"{identity.get('name')} {identity.get('weights', '')}".strip()

    def _of_answers(self, sampling: dict) -> dict:
        """What `sampling`, or the first line of saved answers, records, by the names of the settings."""
        recorded = {setting: sampling[name] for name, setting in SAMPLED.items() if name in sampling}
        if "engine" in sampling:
            recorded["policy_use_vllm"] = sampling["engine"] == "vllm"
        if self.config.bf16 and "dtype" in sampling:  # without it, the device decided
            recorded["bf16"] = sampling["dtype"] == "bfloat16"
        return recorded | self._of_data({key: sampling[key] for key in ("prompts",) if key in sampling})

    def _of_data(self, data: dict) -> dict:
        """Prompts of a local file are known by their hash; a data set, which is slow to read, by its settings."""
        keys = ("prompts",) if prompts_file(self.config) else DATA_KEYS
        return {key: data[key] for key in keys if key in data}


def newest(path: str | None) -> float:
    """When a file, or the files of a local model, were last written (seconds since 1970); 0 for a hub name."""
    place = Path(path) if path else None
    if place is None or not place.exists():
        return 0.0
    files = [place] if place.is_file() else [file for file in place.iterdir() if file.is_file()]
    return max((file.stat().st_mtime for file in files if file.suffix != ".md"), default=0.0)


def part_of(content: dict, key: str) -> dict:
    """The object under that key; empty where there is none, as in published summaries."""
    part = content.get(key)
    return part if isinstance(part, dict) else {}


def first_row(path: Path) -> dict:
    """The first line of saved answers; empty where there is none, or no whole one."""
    try:
        with open(path, "rb") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) else {}


def sweeps_of(content: dict, path: str | Path) -> list[Sweep]:
    """The entries of a sweep file's content, in order. Raises UserError naming `path`: no entry, no name, a wrong setting."""
    return [find_sweep(content, path, str(index)) for index in range(len(defaults_and_sweeps(content, path)[1]))]


def find_sweep(content: dict, path: str | Path, which: str, flags: tuple[str, ...] = ()) -> Sweep:
    """One entry, by its index or model_name, under flags of the classification."""
    # The device is the job's; to look for a GPU takes seconds.
    config = sweep_settings(content, path, which, [*flags, "--device=cpu"])
    if not config.model_name:
        raise UserError(f"{path}: sweep {which} has no model_name")
    return Sweep(config)


def main() -> int:
    parser = script_parser(__doc__, prog="sweep_tasks.py")
    parser.add_argument("what", choices=["last", "todo"], help="index of the last entry; is one to be done")
    parser.add_argument("file", help="the sweep file, as alignment/evaluation/sweep_configs.yaml")
    parser.add_argument("which", nargs="?", help="for todo: an index from 0, or a model_name")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="for todo: flags of the classification")
    arguments = parser.parse_args()
    content = read_yaml_mapping(arguments.file)
    if arguments.what == "last":
        print(len(sweeps_of(content, arguments.file)) - 1)
        return 0
    if arguments.which is None:
        raise UserError("todo needs to know which entry: an index from 0, or a model_name")
    sweep = find_sweep(content, arguments.file, arguments.which, tuple(arguments.flags))
    if os.environ.get("FORCE") == "1":
        sweep.begin_anew(os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0"))
    told = f"sweep {arguments.which} ({sweep.name})"
    if sweep.is_done():
        print(f"{told} is done: {sweep.summary}; FORCE=1 classifies it again")
        return DONE
    if other := sweep.other_answers():
        print(f"{told} is not done, and its saved answers are moved to replaced/: {other}")
        sweep.set_aside()
    elif sweep.summary.exists():
        print(f"{told} is not done: {sweep.other_results()}")
    return 0


if __name__ == "__main__":
    run_main(main)
