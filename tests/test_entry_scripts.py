"""`--help` of every script: it needs no GPU and no model, explains every setting, and shows a command to begin with."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from alignment.scoring.service_settings import Limits, read_settings


def entry_scripts() -> list[str]:
    """Every Python file that users start, relative to the repository."""
    files = (path for folder in ("alignment", "bench", "slurm") for path in sorted((REPO / folder).rglob("*.py")))
    return [str(path.relative_to(REPO)) for path in files if 'if __name__ == "__main__":' in path.read_text()]


def help_of(script: str, monkeypatch, capsys) -> str:
    """What `python SCRIPT --help` prints, run in this process: libraries load once for all scripts."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((REPO / script).parent), *sys.path])
    monkeypatch.chdir(REPO)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("script", entry_scripts())
def test_help(script, monkeypatch, capsys):
    text = help_of(script, monkeypatch, capsys)
    settings, _, example = text.partition("\nexample:\n")
    command = Path(script).name if not script.startswith("slurm/") else "slurm/"
    assert command in example, "the docstring's first indented lines are to be a command that runs the script"
    entries = re.split(r"\n  (?=\S)", settings.split("options:\n")[-1])
    assert len(entries) > 0
    for entry in entries:
        assert len(re.split(r"\s{2,}|\n", entry.strip())) > 1, f"{entry.strip()} has no help text"


def test_help_of_the_scorer_service_describes_its_whole_environment(monkeypatch, capsys):
    class Asked(dict):
        """Remembers what was looked for."""

        def get(self, key, default=None):
            self[key] = ""
            return default

    asked = Asked()
    read_settings(asked)
    text = help_of("alignment/scoring/scorer_service.py", monkeypatch, capsys)
    shown = re.sub(
        r"SCORER_MAX_BODY, _TEXTS, _CHARACTERS", "SCORER_MAX_BODY SCORER_MAX_TEXTS SCORER_MAX_CHARACTERS", text
    )
    assert len(asked) > len(vars(Limits()))
    assert not [name for name in asked if name not in shown]


@pytest.mark.parametrize("script", ["alignment/demo/run.py", "slurm/sweep_tasks.py"])
def test_help_as_a_process_of_its_own(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "example:" in done.stdout
