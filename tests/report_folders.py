"""Folders of small results for the report's tests, with texts that would run if any of them were taken as code."""

from __future__ import annotations

from pathlib import Path

from alignment.evaluation.points import model_file, prompt_ids
from alignment.objective import quadrant_labels
from alignment.records import write_json, write_jsonl

HOSTILE = (
    "<script>window.hacked = 1</script>",
    '</script><img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>',
    "{{7*7}} ${7*7} {{constructor.constructor('window.hacked = 1')()}}",
    "<!--<script> \u2028 \u2029 \x00 \ud83d ]]> &lt;b&gt;",
    "javascript:window.hacked=1 \\u003cscript\\u003e \\\" ' ` line\nbreak",
)
HOSTILE_NAME = '$x_{</script><img src=x onerror="window.hacked=1">'


def write_model(
    folder: Path, name: str, rewards: list, costs: list, responses: list[str] | None = None, **more
) -> None:
    """A points file; prompts are HOSTILE and then numbered ones. `more` are further columns."""
    prompts = [HOSTILE[i] if i < len(HOSTILE) else f"question number {i}" for i in range(len(rewards))]
    responses = responses or [f"answer {i} of {name} {HOSTILE[i % len(HOSTILE)]}" for i in range(len(rewards))]
    finite = [None not in pair for pair in zip(rewards, costs, strict=True)]
    labels = quadrant_labels(
        [r if ok else 0.0 for r, ok in zip(rewards, finite, strict=True)], [c or 0.0 for c in costs]
    )
    rows = [
        {
            "prompt": prompts[i],
            "response": responses[i],
            "reward": rewards[i],
            "cost": costs[i],
            "label": str(labels[i]),
        }
        | {"id": one}
        | {key: column[i] for key, column in more.items() if column[i] is not None}
        for i, one in enumerate(prompt_ids(prompts))
    ]
    write_jsonl(model_file(folder, name, "points.jsonl"), rows)


def write_example(folder: Path) -> dict[str, list[str]]:
    """Two models, a run, ratings and judgments under `folder`; returns the arguments of make_report.py."""
    write_model(
        folder / "models",
        "first",
        rewards=[1.0, -1.0, 2.0, -2.0, 0.5, None, 3.0],
        costs=[1.0, -1.0, 2.0, -2.0, 3.0, None, -4.0],
        categories=[["Drugs"], [HOSTILE[0]], [], ["Drugs", "Violence"], None, None, None],
        error=[None] * 5 + [HOSTILE[1], None],
        finished=[True, False] + [True] * 5,
    )
    write_model(folder / "models", HOSTILE_NAME, rewards=[2.0] * 7, costs=[-3.0, -2.0, 4.0, -1.0, -2.5, -1.5, -0.5])
    rows = [{"kind": "eval", "iteration": t, "reward_mean": t, "cost_mean": -t, "objective": t} for t in (0, 2)]
    rows += [{"kind": "train", "iteration": t, "reward_mean": t, "cost_mean": -t, "lambda": 1.0} for t in range(3)]
    write_jsonl(folder / "run" / "metrics.jsonl", rows)
    (folder / "run" / "config.yaml").write_text(f"population_size: 3\nbatch_size: 2\nnote: '{HOSTILE[0]}'\n")
    write_json(folder / "run" / "manifest.json", {"command": HOSTILE[1]})
    judgments = [
        {
            "model_a": "first",
            "model_b": HOSTILE_NAME,
            "dimension": dimension,
            "question": HOSTILE[i],
            "scores": [9.0 - i, 2.0],
        }
        | {"order_ab": ["first", HOSTILE_NAME], "raw": HOSTILE[1]}
        for dimension in ("helpfulness", "harmlessness")
        for i in range(4)
    ]
    write_jsonl(folder / "judgments.jsonl", judgments)
    return {
        "--data-dir": [str(folder / "models")],
        "--models": ["first", HOSTILE_NAME],
        "--runs": [str(folder / "run")],
        "--judgments": [str(folder / "judgments.jsonl")],
        "--output": [str(folder / "report.html")],
    }


def arguments(given: dict[str, list[str]]) -> list[str]:
    return [word for flag, values in given.items() for word in (flag, *values)]
