"""What the figures read: the scores of those models that are there, with a word about those that are not, and whether models and
runs may stand in one figure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.config import read_yaml_mapping
from alignment.errors import UserError
from alignment.evaluation.compare_models import require_same_scorer, scorer_of
from alignment.evaluation.points import (
    ModelScores,
    held_out_prompts,
    load_scores,
    model_file,
    models_in,
    read_summary,
)
from alignment.records import read_jsonl, read_object
from alignment.scoring.scores import deciding, difference, same_scorer
from alignment.visualization.training_runs import Run


def load_models(folder: str, names: Sequence[str]) -> list[ModelScores]:
    """The scores of `names`, in that order, or of all models in `folder` when none is named.

    A model without files is passed over and named on stderr. Raises UserError when no model is there, when a file is broken, or
    when two models were scored differently: their scores do not compare, in a figure no more than in a table.
    """
    found: list[str] = []
    missing: list[str] = []
    for name in dict.fromkeys(names or models_in(folder)):
        (found if has_scores(folder, name) else missing).append(name)
    if not found:
        load_scores(folder, missing[0])  # its error says which file is missing, and which models are there
    if missing:
        print(f"not drawn, {folder} has no scores of: {', '.join(missing)}", file=sys.stderr)
    if len(found) > 1:
        require_same_scorer([model_file(folder, name, "points.jsonl") for name in found])
    return [load_scores(folder, name) for name in found]


def has_scores(folder: str, name: str) -> bool:
    """Whether there are arrays or a points file of this model."""
    arrays = (model_file(folder, name, ending).exists() for ending in ("Rs.npy", "Cs.npy"))
    return all(arrays) or model_file(folder, name, "points.jsonl").exists()


def require_runs_scored_alike(runs: Sequence[Run], folder: str = "", models: Sequence[ModelScores] = ()) -> None:
    """Raises UserError, which names both, when a run was scored otherwise than the models in `folder` or another run.

    A run says what scores it in its manifest.json; one that does not is taken as it is.
    """
    paths = [model_file(folder, one.name, "points.jsonl") for one in models]
    scorers = [(path, scorer_of(path)) for path in paths]
    scorers += [(run.folder, _run_scorer(run.folder / "manifest.json")) for run in runs]
    known = [(name, scorer) for name, scorer in scorers if scorer]
    for name, scorer in known[1:]:
        if not same_scorer(known[0][1], scorer):
            raise UserError(
                f"{known[0][0]} and {name} were scored differently and do not compare: {difference(known[0][1], scorer)}. "
                "Draw them apart"
            )


def _run_scorer(manifest: Path) -> dict | None:
    found = read_object(manifest) if manifest.exists() else {}
    part = found.get("deciding")  # GRPO's scorer stands there
    scorer = found.get("scorer") or (part.get("scorer") if isinstance(part, dict) else None)
    return deciding(scorer) if isinstance(scorer, dict) else None


@dataclass(frozen=True)
class Asked:
    """What was answered: the distinct prompts, the most tokens an answer could have, the temperature. None: not known."""

    prompts: frozenset[str] | None
    max_tokens: int | None
    temperature: float | None

    def fits(self, other: Asked) -> bool:
        """Whether the two may be the same, as far as both are known."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(one is None or two is None or one == two for one, two in pairs)


def asked_of_model(folder: str, model: ModelScores) -> Asked:
    path = model_file(folder, model.name, "points.jsonl")
    rows = read_jsonl(path) if path.exists() else []
    whole = len(rows) == len(model.rewards)  # the published file of ES-500 is shorter than its scores
    sampling = (read_summary(path) or {}).get("sampling")
    sampling = sampling if isinstance(sampling, dict) else {}
    prompts = frozenset(row["prompt"] for row in rows) if whole else None
    return Asked(prompts, sampling.get("max_new_tokens"), sampling.get("temperature"))


def asked_of_run(run: Run) -> Asked:
    """Of its held-out evaluations, which are greedy."""
    prompts = held_out_prompts(run.folder)
    path = run.folder / "config.yaml"
    config = read_yaml_mapping(path) if path.exists() else {}
    longest = config.get("max_new_tokens", config.get("max_completion_length"))
    return Asked(None if prompts is None else frozenset(prompts), longest, 0.0)
