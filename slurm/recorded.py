"""Whether the results of an experiment are those that its file asks for now: what it asks is compared with what they record.

    check_results(experiment)      # UserError for a result of other settings, before anything is queued

Training runs say in their journal or manifest.json what they were begun with, summaries what scored them; jobs.json has what
the scorer, and the jobs of a training, were asked for (`asked`). More steps than a run has taken are no other settings.
Classified answers of other settings are no error: sweep_tasks.py has them made anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweep_tasks import part_of

from alignment.config import read_yaml_mapping
from alignment.conversation import get_template
from alignment.errors import UserError
from alignment.ES.journal import begun_with, check_settings
from alignment.ES.settings import ESSettings
from alignment.GRPO.checkpoints import deciding_of, newest_checkpoint, step_of
from alignment.GRPO.settings import GRPOSettings
from alignment.model_folder import config_hash, known_as, weights_hash
from alignment.prompts import draw_rows, text_hash
from alignment.records import load_prompts, read_object, write_json
from alignment.runs import check_same_run
from alignment.scoring.service_settings import read_settings

if TYPE_CHECKING:
    from experiment import Experiment

OPTION = "name, for another experiment"
MODELS = ("reward_model", "cost_model")
SCORER_VARIABLES = ["REWARD_MODEL", "COST_MODEL", "MAX_LENGTH", "USE_BF16"]
SCORER_VARIABLES += [f"SCORER_{name}" for name in ("DTYPE", "TEMPLATE", "DETERMINISTIC", "REFERENCE", "FP8")]


@dataclass(frozen=True)
class Run:
    """A training run of an experiment, as its file asks for it."""

    stage: str
    folder: Path
    settings: ESSettings | GRPOSettings

    @property
    def policy(self) -> dict[str, str]:
        key = "model_name" if isinstance(self.settings, GRPOSettings) else "policy_model_path"
        return {key: getattr(self.settings, key)}

    @property
    def steps(self) -> dict[str, int]:
        key = "max_steps" if isinstance(self.settings, GRPOSettings) else "num_iterations"
        return {key: getattr(self.settings, key)}

    @property
    def files(self) -> dict[str, str]:
        return {key: getattr(self.settings, key) for key in ("train_jsonl", "eval_jsonl")}

    def asked(self) -> dict[str, Any]:
        held_out = {"eval_samples": self.settings.eval_samples, "prompt_key": self.settings.prompt_key}
        return {**self.settings.deciding(), **self.policy, **self.files, **held_out}

    def prompts(self) -> dict[str, list[str]]:
        s = self.settings
        samples = s.max_samples if isinstance(s, GRPOSettings) else s.train_samples
        counts = {"train_jsonl": samples, "eval_jsonl": s.eval_samples}
        key = s.prompt_key
        return {
            name: [row[key] for row in draw_rows(load_prompts(file, key), counts[name])]
            for name, file in self.files.items()
        }

    def begun(self) -> dict[str, Any]:
        """What decides the weights of the run in the folder; empty when none was begun."""
        if isinstance(self.settings, ESSettings):
            return begun_with(self.folder / "journal.jsonl") or {}
        return deciding_of(self.folder) if (self.folder / "manifest.json").exists() else {}

    def check(self) -> dict[str, Any]:
        """Raises UserError when the run in the folder is not the one that is asked for; returns what it was begun with."""
        known = self.begun()
        if not known:
            return {}
        prompts = self.prompts()
        if isinstance(self.settings, ESSettings):
            check_settings(known, self.settings, prompts["train_jsonl"], self.folder, OPTION)
        else:
            check_same_run(known, self.settings.deciding(), self.folder, OPTION)
        # The trainers take other held-out prompts; here best/, and what is said of it, would be of the former.
        config, manifest = self.folder / "config.yaml", self.folder / "manifest.json"
        then = read_yaml_mapping(config) if config.exists() else {}
        hashes = (read_object(manifest) if manifest.exists() else {}).get("prompts") or {}
        now: dict[str, Any] = {}
        for key, place in (self.policy | {key: file for key, file in self.files.items() if key not in hashes}).items():
            if key in then and Path(str(then[key])).resolve() != Path(place).resolve():
                now[key] = place
        for key, former in hashes.items():
            if (given := text_hash(prompts[key])) != former:
                then[key] = f"{then.get(key)}, prompts {former[:8]}"
                now[key] = f"{self.files[key]}, prompts {given[:8]}"
        taken = steps_taken(self.folder)
        for key, steps in self.steps.items():
            if steps < taken:
                then[key], now[key] = taken, steps
        check_same_run(then, now, self.folder, OPTION)
        return known


def steps_taken(run: Path) -> int:
    """The step of a run's newest checkpoint, or of its final result."""
    return max(final_step(run), step_of(newest_checkpoint(run)))


def final_step(run: Path) -> int:
    """The step of a run's final result; 0 without one."""
    state = run / "final" / "trainer_state.json"
    return read_object(state, iteration=int)["iteration"] if state.exists() else 0


def scorer_asked(environment: Mapping[str, str]) -> dict[str, Any]:
    """What decides scores, of the settings that a scorer reads from its environment."""
    scorer = read_settings({name: environment[name] for name in SCORER_VARIABLES if name in environment}).scorer
    return {key: value for key, value in scorer.items() if key != "calibration"}


def check_scorer(asked: dict[str, Any], identity: dict, former: dict[str, Any], place: Path) -> None:
    """Raises UserError when `place` was scored otherwise: as far as settings tell, which leave some to the device.

    Of weights, which take minutes to read, only those are looked at whose folder is not that of the `former` scorer.
    """
    now = {key: asked[key] for key in ("max_length", "reference", "fp8")}
    now |= {key: asked[key] for key in ("dtype", "deterministic") if asked[key] not in ("auto", None)}
    if asked["template"] != "chat":  # which is the models' own
        now["template"] = get_template(asked["template"], reference=asked["reference"]).name
    then = {"fp8": False, **identity}
    for key in MODELS:
        model, folder = identity.get(key), Path(asked[key]).expanduser()
        if not isinstance(model, dict):
            continue
        then[key], now[key] = model.get("name"), known_as(asked[key])
        hashes = {"config": config_hash} if (folder / "config.json").is_file() else {}
        if folder.is_dir() and former.get(key, asked[key]) != asked[key]:
            hashes["weights"] = weights_hash
        for name in hashes.keys() & model.keys():
            then[f"{key}: {name}"], now[f"{key}: {name}"] = model[name], hashes[name](folder)
    check_same_run(then, {key: value for key, value in now.items() if key in then}, place, OPTION)


def check_results(experiment: Experiment) -> None:
    """Raises UserError, which names the experiment's file, the key and both values, for a result that is of other settings."""
    scored: dict[Path, dict] = {}
    for run in experiment.runs:
        with naming(f"{experiment.path}: {run.stage}"):
            scored[run.folder] = run.check().get("scorer") or {}
    for sweep in experiment.sweeps:
        summary = read_object(sweep.summary) if sweep.summary.exists() else {}
        source = sweep.config.source
        if summary.get("source", source) != source:
            raise UserError(
                f"{experiment.path}: classify: {sweep.summary} holds the {summary['source']}; remove it, or give another "
                f"model_name, or another name to the experiment, for the {source}"
            )
        scored[sweep.summary] = part_of(summary, "scorer")
    if "scorer" not in experiment.stages:
        return
    former = read_jobs_file(experiment.jobs_file)["asked"].get("scorer", {})
    with naming(f"{experiment.path}: scorer"):
        asked = experiment.asked("scorer")
        for place, identity in scored.items():
            if identity:
                check_scorer(asked, identity, former, place)
        if former and any(scored.values()):
            others = {key: value for key, value in asked.items() if key not in MODELS}
            check_same_run(former, others, experiment.folder, OPTION)


def record_asked(experiment: Experiment, jobs: dict[str, list[str]], asked: dict[str, dict]) -> None:
    write_json(experiment.jobs_file, {"experiment": experiment.name, "jobs": jobs, "asked": asked})


def read_jobs_file(path: Path) -> dict[str, Any]:
    """{"jobs": stage -> its jobs, oldest first, "asked": stage -> what they were asked for}; both empty without a file."""
    if not path.exists():
        return {"jobs": {}, "asked": {}}
    content = read_object(path, jobs=dict)
    for stage, numbers in content["jobs"].items():
        if not isinstance(numbers, list) or not all(isinstance(number, str) for number in numbers):
            raise UserError(
                f"{path}: '{stage}' is {numbers!r:.40}, expected a list of job numbers; was it edited by hand?"
            )
    if not isinstance(content.setdefault("asked", {}), dict):
        raise UserError(f"{path}: 'asked' is {content['asked']!r:.40}, expected an object; was it edited by hand?")
    return content


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Puts the place before a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
