"""What the figures read: the scores of those models that are there, with a word about those that are not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from alignment.evaluation.points import ModelScores, load_scores, model_file, models_in


def load_models(folder: str, names: Sequence[str]) -> list[ModelScores]:
    """The scores of `names`, in that order, or of all models in `folder` when none is named.

    A model without files is passed over and named on stderr. Raises UserError when no model is there, or a file is broken.
    """
    found: list[str] = []
    missing: list[str] = []
    for name in dict.fromkeys(names or models_in(folder)):
        (found if has_scores(folder, name) else missing).append(name)
    if not found:
        load_scores(folder, missing[0])  # its error says which file is missing, and which models are there
    if missing:
        print(f"not drawn, {folder} has no scores of: {', '.join(missing)}", file=sys.stderr)
    return [load_scores(folder, name) for name in found]


def has_scores(folder: str, name: str) -> bool:
    """Whether there are arrays or a points file of this model."""
    arrays = (model_file(folder, name, ending).exists() for ending in ("Rs.npy", "Cs.npy"))
    return all(arrays) or model_file(folder, name, "points.jsonl").exists()
