"""Progress of long work: a live bar on a terminal, a line every half minute in a job's log."""

from __future__ import annotations

import sys

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between lines where nobody watches


def progress_bar(total: int, desc: str, unit: str, *, initial: int = 0, disable: bool = False) -> tqdm:
    """A tqdm bar on stderr with rate and time left; in a file or a pipe it is written rarely."""
    interval = 0.2 if watched() else LOG_INTERVAL
    return tqdm(
        total=total, desc=desc, unit=unit, initial=initial, disable=disable, mininterval=interval, dynamic_ncols=True
    )


def watched() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


def step_text(row: dict) -> str:
    """The measures of a trainer's step, a train row of metrics.jsonl, for its bar or a line of its log."""
    return (
        f"objective {row['objective']:.3f} R {row['reward_mean']:.3f} C {row['cost_mean']:.3f} "
        f"safe {row['safe_ratio']:.0f} % lambda {row['lambda']:.3f}"
    )
