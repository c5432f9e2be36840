"""Files in RUN by which a launch is told to stop, and says that it did: launchers keep signals and exit codes to themselves.

`stop` stops whoever is at work in RUN; it is for people. `stop.LAUNCH_ID` stops that launch alone: a job that is refused, because
another one has the run, must not stop that one. LAUNCH_ID is in the environment where a job script has started this.
"""

from __future__ import annotations

import os
from pathlib import Path

from alignment.records import write_json

_LAUNCH = "LAUNCH_ID"


def stop_asked(folder: Path) -> bool:
    launch = os.environ.get(_LAUNCH)
    return (folder / "stop").exists() or (launch is not None and (folder / f"stop.{launch}").exists())


def forget_earlier(folder: Path) -> None:
    """Takes away what earlier launches left; only who has the run's lock may. This launch's own may have come already."""
    mine = f"stop.{os.environ.get(_LAUNCH)}"
    for path in [folder / "stop", folder / "stopped.json", *folder.glob("stop.*")]:
        if path.name != mine:
            path.unlink(missing_ok=True)


def tell_stopped(folder: Path, iteration: int, **why: str | int | None) -> None:
    """RUN/stopped.json: after which step, why, and by which launch."""
    launch = {"launch": os.environ[_LAUNCH]} if _LAUNCH in os.environ else {}
    write_json(folder / "stopped.json", {"iteration": iteration, **why, **launch})
