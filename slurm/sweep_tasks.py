"""Array tasks of the classification: one an entry of a sweep file, and which of them are done.

    python slurm/sweep_tasks.py last alignment/evaluation/sweep_configs.yaml           # index of the last entry
    python slurm/sweep_tasks.py todo alignment/evaluation/sweep_configs.yaml 2         # exit code 3: entry 2 is done
    python slurm/sweep_tasks.py remove alignment/evaluation/sweep_configs.yaml 2       # takes its results away

An entry is done when its summary is there, is about the same answers (policy, checkpoint, journal and step, or file), and is
newer than the files of policy and answers. A journal is only added to: what it says up to a step stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignment.config import read_yaml_mapping, script_parser
from alignment.errors import UserError, run_main
from alignment.evaluation.classify_settings import SOURCE_KEYS, source_of
from alignment.evaluation.points import DEFAULT_FOLDER, model_file
from alignment.evaluation.sweeps import defaults_and_sweeps
from alignment.records import read_object

DONE = 3
RESULTS = ("generations.jsonl", "scores.jsonl", "Rs.npy", "Cs.npy", "labels.npy", "points.jsonl", "scatter.png")


@dataclass(frozen=True)
class Sweep:
    """One entry of a sweep file, its defaults filled in."""

    index: int
    name: str
    policy: str | None
    folder: Path
    source: str  # what is classified, in the summary's words
    files: tuple[str | None, ...]  # what the answers come from, besides a journal

    @property
    def summary(self) -> Path:
        return model_file(self.folder, self.name, "summary.json")

    def is_done(self) -> bool:
        return self.summary.exists() and self._same_source() and self.summary.stat().st_mtime >= self._changed()

    def is_outdated(self) -> bool:
        """Whether there are results of this policy as it was before it was trained further."""
        return self.summary.exists() and self._same_source() and not self.is_done()

    def remove(self) -> None:
        """The summary goes first: it says that the rest is whole."""
        for ending in ("summary.json", *RESULTS):
            model_file(self.folder, self.name, ending).unlink(missing_ok=True)

    def _same_source(self) -> bool:
        return read_object(self.summary).get("source", self.source) == self.source

    def _changed(self) -> float:
        return max(newest(file) for file in self.files)


def newest(path: str | None) -> float:
    """When a file, or the files of a local model, were last written (seconds since 1970); 0 for a hub name."""
    place = Path(path) if path else None
    if place is None or not place.exists():
        return 0.0
    files = [place] if place.is_file() else [file for file in place.iterdir() if file.is_file()]
    return max((file.stat().st_mtime for file in files), default=0.0)


def read_sweeps(path: str | Path) -> list[Sweep]:
    """The entries in order. Raises UserError when the file has none, or one without a name."""
    return sweeps_of(read_yaml_mapping(path), path)


def sweeps_of(content: dict, path: str | Path) -> list[Sweep]:
    """The same from the content of a file, whose name errors tell."""
    defaults, entries = defaults_and_sweeps(content, path)
    sweeps = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.get("model_name"):
            raise UserError(f"{path}: sweep {index} has no model_name")
        settings = {**defaults, **entry}
        given = {key: str(settings[key]) if settings.get(key) else None for key in SOURCE_KEYS}
        policy = given["policy_model_path"]
        folder = Path(settings.get("output_dir") or DEFAULT_FOLDER)
        files = (policy, given["policy_vllm_ckpt"], given["responses_from"])
        sweeps.append(Sweep(index, str(settings["model_name"]), policy, folder, source_of(**given), files))
    return sweeps


def find_sweep(path: str | Path, which: str) -> Sweep:
    sweeps = read_sweeps(path)
    found = [sweep for sweep in sweeps if which in (str(sweep.index), sweep.name)]
    if not found:
        listed = ", ".join(f"{sweep.index} {sweep.name}" for sweep in sweeps)
        raise UserError(f"{path} has no sweep {which}; it has {listed}")
    return found[0]


def main() -> int:
    parser = script_parser(__doc__, prog="sweep_tasks.py")
    parser.add_argument(
        "what", choices=["last", "todo", "remove"], help="index of the last entry; is one done; undo it"
    )
    parser.add_argument("file", help="the sweep file, as alignment/evaluation/sweep_configs.yaml")
    parser.add_argument("which", nargs="?", help="for todo and remove: an index from 0, or a model_name")
    arguments = parser.parse_args()
    if arguments.what == "last":
        print(len(read_sweeps(arguments.file)) - 1)
        return 0
    if arguments.which is None:
        raise UserError(f"{arguments.what} needs to know which entry: an index from 0, or a model_name")
    sweep = find_sweep(arguments.file, arguments.which)
    if arguments.what == "remove":
        sweep.remove()
    elif sweep.is_done():
        print(f"sweep {sweep.index} ({sweep.name}) is done: {sweep.summary}; FORCE=1 classifies it again")
        return DONE
    return 0


if __name__ == "__main__":
    run_main(main)
