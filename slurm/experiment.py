"""What an experiment is: the file that submit_pipeline.sh reads, the stages it asks for, and which of them are done.

    experiment = Experiment("slurm/pipeline.yaml")      # UserError for a mistake in it, before anything is queued
    experiment.stages["es"].todo()                      # tasks without a result

slurm/pipeline.example.yaml describes the file. Results lie in OUTPUT_DIR/NAME:
    es/  grpo/beta_<value>/              run folders                model_comparisons/   classified models
    ratings/ratings.json                                            figures/ report.html
    sweep_configs.yaml  jobs.json        what was classified; which job does what
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from recorded import Run, final_step, naming, scorer_asked
from sweep_tasks import Sweep, part_of, sweeps_of

from alignment.config import load_config, nearest, read_yaml_mapping
from alignment.errors import UserError
from alignment.ES.settings import ESSettings
from alignment.evaluation.points import file_stem
from alignment.GRPO.settings import load_settings as load_grpo_settings
from alignment.records import atomic_open, read_object
from alignment.scoring.service_settings import DEFAULT_COST, DEFAULT_REWARD

ES_SCRIPT = "slurm/train_accl_alignment_api.sh"
GRPO_SCRIPT = "alignment/GRPO/run_grpo_alignment.sh"
CLASSIFY_SCRIPT = "alignment/evaluation/classify_reward_cost_unified.sh"
RATINGS_SCRIPT = "alignment/evaluation/run_gpt_elo_eval.sh"
STAGES = ("scorer", "es", "grpo", "classify", "ratings", "report")  # in the order in which they run

MODEL_KEYS = ("reward_model", "cost_model")
PROMPT_KEYS = ("train_jsonl", "eval_jsonl")
KEYS = {"name", "output_dir", "policy", "base_name", "seed", "scorer_url", *MODEL_KEYS, *PROMPT_KEYS, *STAGES}
STAGE_KEYS = {
    "scorer": {"sbatch", "environment"},
    "es": {"sbatch", "config", "arguments"},
    "grpo": {"sbatch", "config", "arguments", "betas", "accelerate_config", "processes"},
    "classify": {"sbatch", "settings", "sweeps"},
    "ratings": {"sbatch", "arguments"},
    "report": {"sbatch"},
}


@dataclass
class Stage:
    """One job, or one job array, of an experiment."""

    name: str
    script: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: str = ""  # further options of sbatch
    tasks: list[str] = field(default_factory=lambda: [""])  # a label for each array task; one without for a single job
    is_done: Callable[[int], bool] = lambda task: False  # whether the result of a task is there
    asks_scorer: bool = False

    @property
    def is_array(self) -> bool:
        return self.tasks != [""]

    def todo(self) -> list[int]:
        return [task for task in range(len(self.tasks)) if not self.is_done(task)]


class Experiment:
    """Read from a YAML file and checked. `stages` has the ones that it asks for, in the order in which they run."""

    def __init__(self, path: str | Path) -> None:
        self.path, content = Path(path), read_yaml_mapping(path)
        self._refuse_unknown(content, KEYS, "key")
        for key in ("name", "output_dir", "policy", "base_name", *MODEL_KEYS, *PROMPT_KEYS, "scorer_url"):
            self._check_text(content, key, key)
        self.name = content.get("name") or self.path.stem
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(f"{path}: name {self.name!r}: expected letters, digits and . _ -")
        self.folder = Path(content.get("output_dir") or "alignment/outputs/experiments") / self.name
        self.policy = str(content.get("policy") or "")
        if not self.policy:
            raise UserError(f"{path}: policy is missing: the model to align, a folder or a name on the hub")
        self.base_name = content.get("base_name") or Path(self.policy).name
        self.models = {
            "policy": self.policy,
            "reward_model": content.get("reward_model") or DEFAULT_REWARD,
            "cost_model": content.get("cost_model") or DEFAULT_COST,
        }
        self.seed = content.get("seed", 42)
        if type(self.seed) is not int or self.seed < 0:
            raise UserError(f"{path}: seed: expected a whole number from 0, got {self.seed!r:.40}")
        self.prompts = {
            "train_jsonl": str(content.get("train_jsonl") or "alignment/data/custom_train_250.jsonl"),
            "eval_jsonl": str(content.get("eval_jsonl") or "alignment/data/custom_eval_500.jsonl"),
        }
        self.scorer_url = content.get("scorer_url")
        for key, file in self.prompts.items():
            if not Path(file).is_file():
                raise UserError(f"{path}: {key}: {file} is not there (select_pku_balanced.ipynb writes it)")
        for key, model in self.models.items():
            if looks_like_path(model) and not Path(model).is_dir():
                raise UserError(f"{path}: {key}: the folder {model} is not there")
        self._sections = {name: self._section(content, name) for name in STAGES}
        self.left_out = [name for name, section in self._sections.items() if section is None]
        if self._sections["scorer"] is None and not self.scorer_url:
            raise UserError(f"{path}: without the stage scorer, scorer_url must say where a scorer is")
        builders = (self._scorer, self._es, self._grpo, self._classify, self._ratings, self._report)
        self.stages: dict[str, Stage] = {}
        self.jobs_file = self.folder / "jobs.json"
        self.runs: list[Run] = []
        self.sweeps: list[Sweep] = []
        self.trained: list[tuple[str, int, str, str]] = []  # stage, task, name in comparisons, policy
        for name, build in zip(STAGES, builders, strict=True):
            section = self._sections[name]
            if section is not None:
                self.stages[name] = build(section)
                self.stages[name].sbatch = str(section.get("sbatch") or "")

    # ---- the stages ----

    def _scorer(self, section: dict) -> Stage:
        environment = {"REWARD_MODEL": self.models["reward_model"], "COST_MODEL": self.models["cost_model"]}
        environment |= {
            str(key): flag_text(value) for key, value in self._mapping(section, "scorer", "environment").items()
        }
        return Stage("scorer", "slurm/run_scorer_service.sh", [], environment)

    def _es(self, section: dict) -> Stage:
        self._check_text(section, "config", "es: config")
        config = section.get("config") or "alignment/ES/es_alignment.yaml"
        run = self.folder / "es"
        arguments = ["--policy_model_path", self.policy, "--experiment_dir", str(run), "--global_seed", str(self.seed)]
        arguments += self._training_arguments(section, "es")
        with naming(f"{self.path}: es"):
            settings = load_config(ESSettings, ["--config", config, *arguments], prog="es", description="")
        self.es_steps = settings.num_iterations
        self.runs.append(Run("es", run, settings))
        self.trained.append(("es", 0, "ES", str(run / "best")))
        environment = {"CONFIG_FILE": config}
        stage = Stage("es", ES_SCRIPT, arguments, environment, asks_scorer=True)
        stage.is_done = lambda _: is_finished(run, self.es_steps)
        return stage

    def _grpo(self, section: dict) -> Stage:
        self._check_text(section, "config", "grpo: config")
        config = section.get("config") or "alignment/GRPO/grpo_alignment.yaml"
        betas = section.get("betas", [0.01, 0.1])
        if not isinstance(betas, list) or not betas:
            raise UserError(f"{self.path}: grpo: betas: expected a list of numbers, got {betas!r:.40}")
        betas = [str(beta) for beta in betas]
        arguments = ["--model_name", self.policy, *self._training_arguments(section, "grpo")]
        runs = [self.folder / "grpo" / f"beta_{beta}" for beta in betas]
        with naming(f"{self.path}: grpo"):
            for beta, run in zip(betas, runs, strict=True):
                own = ["--config", config, "--beta", beta, "--seed", str(self.seed), "--output_dir", str(run)]
                settings = load_grpo_settings([*own, *arguments])
                self.runs.append(Run("grpo", run, settings))
        self.grpo_steps = settings.max_steps
        for task, (beta, run) in enumerate(zip(betas, runs, strict=True)):
            self.trained.append(("grpo", task, f"GRPO-{beta}", str(run / "best")))
        environment = {
            "CONFIG_FILE": config,
            "BETAS": " ".join(betas),
            "BETA": "",
            "OUTPUT_DIR": str(self.folder / "grpo"),
            "SEED": str(self.seed),
        }
        for key in ("accelerate_config", "processes"):
            if section.get(key):
                environment[key.upper()] = str(section[key])
        stage = Stage("grpo", GRPO_SCRIPT, arguments, environment, tasks=betas, asks_scorer=True)
        stage.is_done = lambda task: is_finished(runs[task], self.grpo_steps)
        return stage

    def _classify(self, section: dict) -> Stage:
        settings = dict(self._mapping(section, "classify", "settings"))
        if not isinstance(section.get("sweeps") or [], list):
            raise UserError(f"{self.path}: classify: sweeps: expected a list of runs, got {section['sweeps']!r:.40}")
        if not settings.keys() & {"from_jsonl", "dataset_name"}:
            settings["from_jsonl"] = self.prompts["eval_jsonl"]
        defaults = {"scorer_url": self.scorer_url or "auto", "output_dir": str(self.folder / "model_comparisons")}
        sweeps = [{"model_name": self.base_name, "policy_model_path": self.policy}]
        sweeps += [{"model_name": name, "policy_model_path": policy} for _, _, name, policy in self.trained]
        sweeps += section.get("sweeps") or []
        self.sweep_content = {"defaults": settings | defaults, "sweeps": sweeps}
        self.sweep_file = self.folder / "sweep_configs.yaml"
        names = [str(sweep["model_name"]) for sweep in sweeps if isinstance(sweep, dict) and sweep.get("model_name")]
        if len({file_stem(name) for name in names}) < len(names):
            raise UserError(
                f"{self.path}: two models of one name among {', '.join(names)} (base_name, classify: sweeps)"
            )
        self.sweeps = sweeps_of(self.sweep_content, f"{self.path}: classify")
        environment = {"CONFIG_FILE": str(self.sweep_file), "SWEEP": ""}
        stage = Stage("classify", CLASSIFY_SCRIPT, [], environment, tasks=names, asks_scorer=True)
        stage.is_done = lambda task: self.sweeps[task].is_done()
        return stage

    def _ratings(self, section: dict) -> Stage:
        self._need_classify("ratings")
        given, out = self._mapping(section, "ratings", "arguments"), self.folder / "ratings"
        models = [sweep.name for sweep in self.sweeps]
        self.judge = given.get("judge", "gpt")
        arguments = ["--data-dir", str(self.folder / "model_comparisons"), "--models", *models]
        arguments += ["--normalize-to", self.base_name, "--judgments-out", str(out / "judgments.jsonl")]
        arguments += ["--ratings-out", str(out / "ratings.json"), "--plot-out", str(out / "ratings.png"), *flags(given)]
        stage = Stage("ratings", RATINGS_SCRIPT, arguments)
        stage.is_done = lambda _: (
            is_newer(out / "ratings.json", self._summaries()) and was_asked(out / "ratings_details.json", arguments)
        )
        return stage

    def _report(self, section: dict) -> Stage:
        self._need_classify("report")
        stage = Stage("report", "slurm/report.sh", [str(self.folder), *(sweep.name for sweep in self.sweeps)])
        ratings = [self.folder / "ratings" / "ratings.json"] if "ratings" in self.stages else []
        stage.is_done = lambda _: is_newer(self.folder / "report.html", [*self._summaries(), *ratings])
        return stage

    # ---- parts of them ----

    def write_sweeps(self, path: Path) -> None:
        """The sweep file of the classification array."""
        with atomic_open(path) as file:
            file.write("# written by submit_pipeline.sh\n" + yaml.safe_dump(self.sweep_content, sort_keys=False))

    def environment(self, stage: Stage) -> dict[str, str]:
        """What the stage's job gets besides the environment: trainers find this experiment's scorer by its name."""
        return {
            **stage.environment,
            "EXPERIMENT_ID": self.name,
            "SCORER_JOB_ID": "",
            "SCORER_HOST": "",
            "SCORER_URL": "",
        }

    def asked(self, name: str) -> dict[str, Any]:
        """What decides the results of scorer, es or grpo, for jobs.json; of other stages nothing is recorded there."""
        if name == "scorer":
            return scorer_asked(os.environ | self.environment(self.stages[name]))
        runs = [run for run in self.runs if run.stage == name]
        if not runs:
            return {}
        betas = {"beta": self.stages[name].tasks} if name == "grpo" else {}  # by their number in the array
        return runs[0].asked() | betas

    def _training_arguments(self, section: dict, stage: str) -> list[str]:
        given = self._mapping(section, stage, "arguments")
        folder = {"es": "experiment_dir", "grpo": "output_dir"}[stage]
        if folder in given:
            raise UserError(
                f"{self.path}: {stage}: arguments: {folder} is the experiment's to choose (output_dir, name)"
            )
        if stage == "grpo" and "beta" in given:
            raise UserError(f"{self.path}: grpo: arguments: beta: give betas instead, a list")
        files = ["--train_jsonl", self.prompts["train_jsonl"], "--eval_jsonl", self.prompts["eval_jsonl"]]
        return [*files, "--scorer_url", self.scorer_url or "auto", *flags(given)]

    def _summaries(self) -> list[Path]:
        return [sweep.summary for sweep in self.sweeps]

    def _section(self, content: dict, name: str) -> dict | None:
        """The section of a stage: absent or false leaves it out; empty takes it with its defaults."""
        if name not in content or content[name] is False:
            return None
        section = content[name] or {}
        if not isinstance(section, dict):
            raise UserError(f"{self.path}: {name}: expected 'key: value' lines, or false to leave it out")
        self._refuse_unknown(section, STAGE_KEYS[name], f"{name}: key")
        return section

    def _mapping(self, section: dict, stage: str, key: str) -> dict:
        found = section.get(key) or {}
        if not isinstance(found, dict):
            raise UserError(f"{self.path}: {stage}: {key}: expected 'key: value' lines, got {found!r:.40}")
        return found

    def _check_text(self, content: dict, key: str, where: str) -> None:
        """An absent or empty value means the default."""
        if not isinstance(content.get(key) or "", str):
            raise UserError(f"{self.path}: {where}: expected text, got {content[key]!r:.40}")

    def _refuse_unknown(self, content: dict, known: set[str], what: str) -> None:
        for key in content:
            if key not in known:
                raise UserError(f"{self.path}: unknown {what} '{key}'{nearest(str(key), sorted(known))}")

    def _need_classify(self, name: str) -> None:
        if "classify" not in self.stages:
            raise UserError(f"{self.path}: the stage {name} needs the stage classify")


def flags(arguments: dict[str, Any]) -> list[str]:
    """`--key value ...` from a YAML mapping."""
    words = []
    for key, value in arguments.items():
        words += [f"--{key}", *(map(flag_text, value) if isinstance(value, list) else [flag_text(value)])]
    return words


def flag_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


def looks_like_path(model: str) -> bool:
    """A name on the hub is OWNER/NAME; anything else is a folder here."""
    return model.startswith((".", "/", "~", "models/")) or model.count("/") != 1 or Path(model).exists()


def is_finished(run: Path, steps: int) -> bool:
    """Whether a training run has taken its last step and saved the result."""
    return final_step(run) >= steps


def is_newer(result: Path, inputs: list[Path]) -> bool:
    if not result.exists() or not all(path.exists() for path in inputs):
        return False
    return all(result.stat().st_mtime >= path.stat().st_mtime for path in inputs)


def was_asked(details: Path, arguments: list[str]) -> bool:
    """Whether ratings were made with these arguments, which the job script puts behind its own."""
    recorded = part_of(read_object(details), "source").get("arguments") if details.exists() else None
    return not isinstance(recorded, list) or recorded[-len(arguments) :] == arguments
