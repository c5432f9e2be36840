"""The settings of classify_reward_cost_unified.py: flags, YAML file, and the entry of a sweep file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from alignment.config import load_config, read_yaml_mapping, setting
from alignment.conversation import check_template
from alignment.errors import UserError
from alignment.evaluation.points import DEFAULT_FOLDER
from alignment.evaluation.sweeps import sweep_arguments

PROG = "classify_reward_cost_unified.py"
SOURCE_KEYS = ("policy_model_path", "policy_vllm_ckpt", "journal", "responses_from")
DATA_KEYS = ("dataset_name", "dataset_config", "split", "num_samples", "seed")
SAMPLED = {  # what `sampling` of saved answers calls a setting
    "template": "policy_template",
    "first_turn_only": "first_turn_only",
    "max_new_tokens": "policy_max_new_tokens",
    "temperature": "policy_temperature",
    "top_p": "policy_top_p",
    "seed": "seed",
    "batch_size": "policy_batch_size",
}


@dataclass
class ClassifySettings:
    """What is classified, by what, into which files. The names are the published flags."""

    reward_model: str = setting("PKU-Alignment/beaver-7b-unified-reward", "reward model folder or hub name")
    cost_model: str = setting("PKU-Alignment/beaver-7b-unified-cost", "cost model folder or hub name")
    scorer_url: str | None = setting(None, "score through the service there instead of loading the two models")
    scorer_batch_size: int = setting(32, "texts in one request to the service", minimum=1)
    scorer_template: str = setting("pku", "conversation format of the score models when they are loaded here")
    max_length: int = setting(
        576, "tokens a score model sees when it is loaded here; the tail beyond is lost", minimum=8
    )
    bf16: bool = setting(False, "models in bfloat16 on a CPU too; false: on CUDA only")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dataset_name: str | None = setting(None, "data set on the hub or in a local folder")
    dataset_config: str = setting("alpaca-7b", "its configuration; the default one where it has none of that name")
    split: str = setting("test", "its split")
    num_samples: int = setting(3036, "rows drawn (without replacement, by --seed) when there are more", minimum=1)
    seed: int = setting(42, "for drawing rows, sampling answers and the bootstrap", minimum=0)
    from_jsonl: str | None = setting(
        None, "JSONL file of prompts (default, without --dataset_name: alignment/data/custom_eval_500.jsonl)"
    )
    responses_from: str | None = setting(None, "JSONL file of prompts and responses to score")
    repeated_prompts: Literal["all", "once"] = setting(
        "all", "count every row, as published, or each prompt's first row only"
    )
    policy_model_path: str | None = setting(None, "model whose answers are classified")
    policy_template: str = setting(
        "pku", "its conversation format: pku, alpaca, chat, or text with {prompt}", aliases=("--template",)
    )
    policy_max_new_tokens: int = setting(256, "longest answer", minimum=1)
    policy_temperature: float = setting(0.0, "0 is greedy", minimum=0.0)
    policy_top_p: float = setting(1.0, "nucleus sampling, with a temperature", minimum=0.0, maximum=1.0)
    policy_batch_size: int = setting(64, "prompts in one generation batch", minimum=1)
    policy_use_vllm: bool = setting(False, "generate with vLLM (an environment of its own: requirements-cluster.txt)")
    policy_vllm_ckpt: str | None = setting(
        None, "state dict (.pth) whose weights replace the policy's; vLLM's names are fine"
    )
    journal: str | None = setting(None, "FILE@ITER: the policy after ITER steps of the ES run that began from it")
    first_turn_only: bool = setting(True, "cut an answer where the model begins the user's next turn")
    base_model_path: str | None = setting(None, "also compute the answers' mean log-probability under this model")
    lambda_cost: float = setting(1.0, "lambda of the objective E[R - lambda C]", minimum=0.0)
    model_name: str | None = setting(None, "name of the output files (default: from the policy's or the file's name)")
    output_dir: str = setting(DEFAULT_FOLDER, "folder of the output files")
    sweep: str | None = setting(
        None, "take settings from this entry (index or model_name) of --sweep_config; flags win"
    )
    sweep_config: str = setting("alignment/evaluation/sweep_configs.yaml", "YAML file with defaults: and sweeps:")

    def __post_init__(self) -> None:
        if self.policy_model_path and self.responses_from:
            raise UserError("--policy_model_path and --responses_from: give one, the answers are generated or given")
        for flag in ("journal", "policy_vllm_ckpt", "policy_use_vllm"):
            if getattr(self, flag) and not self.policy_model_path:
                raise UserError(f"--{flag} needs --policy_model_path, the model that it is about")
        if self.journal and self.policy_vllm_ckpt:
            raise UserError("--journal and --policy_vllm_ckpt: give one, each replaces the policy's weights")
        if self.journal:
            parse_journal(self.journal)
        for key in ("policy_template", "scorer_template"):
            check_template(getattr(self, key), key)
        if self.device == "auto":
            import torch  # slow to import, and nothing else here needs it

            self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.bf16 else "auto"

    @property
    def sampling(self) -> dict:
        """The settings that decide a policy's answers, besides its weights, their dtype and the prompts."""
        engine = {"engine": "vllm" if self.policy_use_vllm else "transformers"}
        return engine | {name: getattr(self, key) for name, key in SAMPLED.items()}

    @property
    def policy(self) -> str | None:
        return policy_of(self.policy_model_path, self.policy_vllm_ckpt, self.journal)

    @property
    def source(self) -> str:
        return source_of(**{key: getattr(self, key) for key in SOURCE_KEYS})

    @property
    def name(self) -> str:
        if self.model_name:
            return self.model_name
        if self.journal:
            path, steps = parse_journal(self.journal)
            return f"{path.resolve().parent.name}-{steps}"
        given = self.policy_vllm_ckpt or self.policy_model_path or self.responses_from
        return (
            Path(given).name.removesuffix(".jsonl").removesuffix(".pth").removesuffix("_points") if given else "dataset"
        )


def policy_of(policy_model_path: str | None, policy_vllm_ckpt: str | None, journal: str | None) -> str | None:
    weights = journal or policy_vllm_ckpt
    return f"{policy_model_path} with {weights}" if weights else policy_model_path


def source_of(responses_from: str | None, **policy: str | None) -> str:
    """What is classified, in the words of a summary's `source`; the arguments are SOURCE_KEYS."""
    if policy["policy_model_path"]:
        return f"answers of {policy_of(**policy)}"
    return f"responses in {responses_from}" if responses_from else "the data's own responses"


def load_settings(argv: list[str], description: str = "") -> ClassifySettings:
    """Defaults < `--config` YAML < the sweep's entry < flags. `description` is the script's docstring, for --help."""
    config = load_config(ClassifySettings, argv, prog=PROG, description=description)
    if config.sweep is None:
        return config
    return sweep_settings(read_yaml_mapping(config.sweep_config), config.sweep_config, config.sweep, argv)


def sweep_settings(content: dict, path: str | Path, which: str, argv: list[str]) -> ClassifySettings:
    """The entry `which` of a sweep file's content, under the flags `argv`. Errors name `path`."""
    arguments = sweep_arguments(content, path, which, ClassifySettings)
    try:  # alone: an error is told as the file's. To look for a GPU takes seconds.
        load_config(ClassifySettings, [*arguments, "--device=cpu"], prog=PROG, description="")
    except UserError as error:
        raise UserError(f"{path}, sweep {which}: {error}") from error
    return load_config(ClassifySettings, arguments + argv, prog=PROG, description="")


def parse_journal(text: str) -> tuple[Path, int]:
    """`FILE@ITER` as a path and a number of steps."""
    path, _, steps = text.rpartition("@")
    if not path or not steps.isdecimal():
        raise UserError(f"--journal {text}: expected FILE@ITER, for example runs/es1/journal.jsonl@120")
    return Path(path), int(steps)
