"""Runs an entry script in this process, as `python SCRIPT ...` does: libraries load once for all of them."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from conftest import REPO

ES = "alignment/ES/es-fine-tuning_alignment_accl_api.py"
REBUILD = "alignment/ES/rebuild_checkpoint.py"
GRPO = "alignment/GRPO/train_grpo_alignment.py"
CLASSIFY = "alignment/evaluation/classify_reward_cost_unified.py"
COMPARE = "alignment/evaluation/compare_models.py"
RATE = "alignment/evaluation/gpt_elo_eval.py"
SERVICE = "alignment/scoring/scorer_service.py"
FIXED = "alignment/scoring/test_score_fixed_prompt.py"
REPORT = "alignment/visualization/make_report.py"
FIGURE = "alignment/visualization/plot_gpt_elo_figure.py"
PARETO = "alignment/visualization/plot_pareto.py"
GRID = "alignment/visualization/plot_reward_cost_grid.py"
RATIOS = "alignment/visualization/plot_safety_ratios.py"
CURVES = "alignment/visualization/plot_training_curves.py"


@dataclass(frozen=True)
class Done:
    """How a script ended: exit code, and what it wrote."""

    code: int
    out: str
    err: str


def run_script(script: str, *arguments: object) -> Done:
    """The real script with its real `main`. An exception that leaves it is raised here: the traceback is the test's."""
    out, err = io.StringIO(), io.StringIO()
    former, leave = (sys.argv, sys.path), os._exit
    os._exit = sys.exit  # how one of several processes ends
    sys.argv = [script, *map(str, arguments)]
    sys.path = [str((REPO / script).parent), *sys.path]
    try:
        with contextlib.chdir(REPO), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 0 if stopped.code is None else 1
    finally:
        (sys.argv, sys.path), os._exit = former, leave
    return Done(code, out.getvalue(), err.getvalue())


def refused(script: str, *arguments: object) -> str:
    """The one line with which the script refused its input, without "error: "."""
    done = run_script(script, *arguments)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2, f"exit code {done.code}\n{done.out}\n{done.err}"
    assert len(errors) == 1, done.err
    assert done.err.splitlines()[-1] == errors[0], f"something follows the error: {done.err}"
    assert "Traceback" not in done.err
    return errors[0].removeprefix("error: ")


def bad_file(folder: Path, name: str, content: bytes | None) -> Path:
    """A file with that content; a folder of that name where it is None."""
    path = folder / name
    if content is None:
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path
