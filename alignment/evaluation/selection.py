"""Training and evaluation prompts drawn from PKU-SafeRLHF in proportion to its safety buckets; `select_pku_balanced.ipynb`
is its front.

    settings = SelectionSettings(data="PKU-Alignment/PKU-SafeRLHF", train_size=250, eval_size=500)
    selection = select(load_rows(settings), settings)

A bucket is (is response 0 safe, is response 1 safe). How many rows each gives is the largest-remainder rounding of its share
of the pool; which ones is drawn by `random.Random(42)`.

Departures from the published notebook, all undone by `reference=True`: each prompt is drawn from one row only, so that none
stands in both splits or twice in one (published: five training rows ask what nine evaluation rows ask); the order is shuffled
(published: grouped by bucket, so the first rows of a file are all alike); a bucket that is too small for what is asked of it
is an error (published: it is taken whole). Two prompts are the same when their words are: case, punctuation and spaces do not
count. Prompts that are merely alike stay and are reported.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from alignment.errors import UserError
from alignment.evaluation.loading import SAMPLE, load_split
from alignment.records import atomic_open, check_text, write_json

_KINDS = {"response_{}": str, "is_response_{}_safe": bool, "response_{}_harm_category": dict}
SCHEMA = {"prompt": str} | {key.format(i): kind for key, kind in _KINDS.items() for i in (0, 1)}
SOURCE_KEYS = ("response_0_source", "response_1_source")
KIND_NAMES = {str: "text", bool: "true or false", dict: "harm categories with true or false"}
ALIKE = 0.35  # share of common three-word runs from which two prompts are reported as alike

Bucket = tuple[bool, bool]


@dataclass(frozen=True)
class SelectionSettings:
    """The notebook's parameters. `data`: hub name, local folder, Parquet or JSONL file, or "sample"."""

    data: str = "PKU-Alignment/PKU-SafeRLHF"
    config: str = "alpaca-7b"
    split: str = "train"
    source: str = "Alpaca-7B"  # both responses of a row come from this model; "" takes all
    train_size: int = 250
    eval_size: int = 500
    seed: int = 42
    reference: bool = False
    test_data: str = ""  # prompts that evaluation will use; "" means `data`
    test_split: str = "test"  # "" with test_data "" means that there are none
    exclude_test: bool = False

    def __post_init__(self) -> None:
        for name in ("train_size", "eval_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.reference and self.exclude_test:
            raise UserError("reference=True draws as published and leaves no prompt out; set exclude_test=False")


@dataclass(frozen=True)
class Selection:
    """Two splits, all rows of the source, and how many rows there were and why some could not be drawn."""

    train: list[dict]
    evaluation: list[dict]
    pool: list[dict]
    counts: dict[str, int]


def load_rows(settings: SelectionSettings) -> list[dict]:
    """Rows of the PKU-SafeRLHF schema, checked by name and type. Raises UserError naming row and key."""
    data = settings.data
    rows = load_split(data, settings.config, settings.split, required=(*SCHEMA, *SOURCE_KEYS))
    if not rows:
        raise UserError(f"{data} has no rows")
    for number, row in enumerate(rows, start=1):
        for key, kind in SCHEMA.items():
            if not isinstance(row[key], kind):
                raise UserError(f"{data}: row {number}: '{key}' must be {KIND_NAMES[kind]}, got {row[key]!r:.60}")
        check_text(row["prompt"], f"{data}: row {number}: 'prompt'")
        if not row["prompt"].strip():
            raise UserError(f"{data}: row {number}: 'prompt' is empty; remove that row")
    return rows


def load_test_prompts(settings: SelectionSettings) -> list[str] | None:
    """Prompts of the test split, repetitions included; None where there is none (a single file without test_data)."""
    single_file = Path(settings.data).suffix in (".jsonl", ".json", ".parquet")
    if not settings.test_data and (single_file or not settings.test_split):
        return None
    data = settings.test_data or settings.data
    return [row["prompt"] for row in load_split(data, settings.config, settings.test_split, required=("prompt",))]


def select(rows: Sequence[dict], settings: SelectionSettings, test_prompts: Sequence[str] | None = None) -> Selection:
    """Draws both splits.

    Raises UserError when no row is of the source or, but for `reference`, when a bucket is too small for both splits.
    """
    pool = _of_source(rows, settings)
    if settings.reference:
        usable, left_out = pool, dict[str, int]()
    else:
        usable, left_out = _distinct(pool, (test_prompts or ()) if settings.exclude_test else ())
    buckets: dict[Bucket, list[dict]] = {}
    for row in usable:
        buckets.setdefault(bucket_of(row), []).append(row)
    sizes = {bucket: len(members) for bucket, members in buckets.items()}
    targets = [largest_remainder(sizes, size) for size in (settings.train_size, settings.eval_size)]
    for bucket, size in sizes.items() if not settings.reference else ():
        if size < (needed := targets[0][bucket] + targets[1][bucket]):
            raise UserError(
                f"the bucket {bucket} has {size} rows and both splits need {needed} of it: lower train_size or eval_size "
                f"(of {len(rows)} rows {len(usable)} can be drawn)"
            )
    rng = random.Random(settings.seed)
    splits = []
    for target in targets:
        drawn: list[dict] = []
        for bucket, members in buckets.items():
            drawn += rng.sample(members, target[bucket]) if target[bucket] < len(members) else members
        taken = set(map(id, drawn))
        buckets = {bucket: [row for row in members if id(row) not in taken] for bucket, members in buckets.items()}
        splits.append(drawn)
    for split in splits if not settings.reference else ():
        rng.shuffle(split)
    counts = {"total": len(rows), "of_source": len(pool), **left_out, "can_be_drawn": len(usable)}
    return Selection(splits[0], splits[1], pool, counts)


def _of_source(rows: Sequence[dict], settings: SelectionSettings) -> list[dict]:
    if not settings.source or settings.data == SAMPLE:  # the sample's sources are its own
        return list(rows)
    kept = [row for row in rows if all(row[key] == settings.source for key in SOURCE_KEYS)]
    if not kept:
        found = sorted({str(row[key]) for row in rows for key in SOURCE_KEYS})
        raise UserError(
            f"{settings.data}: no row has both responses from source {settings.source!r}; there are {', '.join(found)} "
            "('' takes all)"
        )
    return kept


def bucket_of(row: dict) -> Bucket:
    return row["is_response_0_safe"], row["is_response_1_safe"]


def largest_remainder(sizes: dict[Bucket, int], total: int) -> dict[Bucket, int]:
    """Whole numbers that sum to `total`, in proportion to `sizes`: what rounding down leaves goes to the largest fractions."""
    everything = sum(sizes.values())
    exact = {bucket: total * (size / everything) for bucket, size in sizes.items()}
    targets = {bucket: int(value) for bucket, value in exact.items()}
    order = sorted(sizes, key=lambda bucket: (exact[bucket] - targets[bucket], bucket), reverse=True)
    for bucket in order[: total - sum(targets.values())]:
        targets[bucket] += 1
    return targets


def _distinct(rows: Sequence[dict], exclude: Collection[str]) -> tuple[list[dict], dict[str, int]]:
    """The first row of each prompt, and how many rows went for which reason."""
    excluded = {same_words(prompt) for prompt in exclude}
    seen_rows: set[tuple[str, str, str]] = set()
    kept: dict[str, dict] = {}
    counts = {"identical_rows": 0, "repeated_prompts": 0, "excluded": 0}
    for row in rows:
        whole, key = (row["prompt"], row["response_0"], row["response_1"]), same_words(row["prompt"])
        if whole in seen_rows:
            counts["identical_rows"] += 1
        elif key in kept:
            counts["repeated_prompts"] += 1
        elif key in excluded:
            counts["excluded"] += 1
        else:
            kept[key] = row
        seen_rows.add(whole)
    if not kept:
        raise UserError("no row is left to draw from: all prompts are excluded")
    return list(kept.values()), counts


def words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())


def same_words(prompt: str) -> str:
    """Equal for prompts that differ in case, punctuation or spaces only; a prompt without any word stands for itself."""
    return " ".join(words(prompt)) or prompt.strip()


def statistics(rows: Sequence[dict]) -> dict:
    """The published statistics of a split: buckets, their shares, harm categories by response and by row, number of rows."""
    buckets = Counter(str(bucket_of(row)) for row in rows)
    by_response: Counter[str] = Counter()
    by_row: Counter[str] = Counter()
    for row in rows:
        named = [harm_categories(row, i) for i in (0, 1)]
        by_response.update(named[0] + named[1])
        by_row.update(list(dict.fromkeys(named[0] + named[1])))
    return {
        "bucket_counts": dict(buckets),
        "bucket_proportions": {bucket: count / len(rows) for bucket, count in buckets.items()},
        "harm_counts_per_response": dict(by_response),
        "harm_counts_per_pair": dict(by_row),
        "num_rows": len(rows),
    }


def harm_categories(row: dict, response: int) -> list[str]:
    return [name for name, present in row[f"response_{response}_harm_category"].items() if present]


def leakage(prompts_a: Sequence[str], prompts_b: Sequence[str]) -> dict:
    """What two sets of prompts share. Rows count repetitions, prompts do not; `alike` lists pairs with other words."""
    set_a, set_b = set(prompts_a), set(prompts_b)
    shared = set_a & set_b
    return {
        "prompts": len(shared),
        "rows_a": sum(prompt in shared for prompt in prompts_a),
        "rows_b": sum(prompt in shared for prompt in prompts_b),
        "same_words": len(set(map(same_words, set_a)) & set(map(same_words, set_b))),
        "alike": near_duplicates(prompts_a, prompts_b),
    }


def near_duplicates(prompts_a: Sequence[str], prompts_b: Sequence[str] | None = None) -> list[dict]:
    """Pairs of alike prompts with different words (within `prompts_a` when `prompts_b` is None), the most alike first.

    Similarity is the Jaccard index of their three-word runs: common ones / all. Reported from 0.35 on.
    """
    first = {same_words(prompt): prompt for prompt in reversed(prompts_a)}
    second = first if prompts_b is None else {same_words(prompt): prompt for prompt in reversed(prompts_b)}
    runs = {key: _runs(prompt) for key, prompt in (first | second).items()}
    holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key in second:
        for run in runs[key]:
            holders[run].append(key)
    pairs = []
    for a in first:
        common = Counter(b for run in runs[a] for b in holders.get(run, ()))
        for b, count in common.items():
            similarity = count / (len(runs[a]) + len(runs[b]) - count)
            if similarity >= ALIKE and (a < b if prompts_b is None else a != b):
                pairs.append({"similarity": round(similarity, 3), "a": first[a], "b": second[b]})
    return sorted(pairs, key=lambda pair: (-pair["similarity"], pair["a"], pair["b"]))


def _runs(prompt: str) -> set[tuple[str, ...]]:
    tokens = words(prompt)
    return {tuple(tokens[start : start + 3]) for start in range(max(1, len(tokens) - 2))} if tokens else set()


def leakage_report(selection: Selection, test_prompts: Sequence[str] | None) -> dict[str, dict]:
    """`leakage` between the splits, and of each with the test prompts where there are any."""
    train, evaluation = ([row["prompt"] for row in split] for split in (selection.train, selection.evaluation))
    report = {"train and eval": leakage(train, evaluation)}
    if test_prompts is not None:
        report |= {"train and test": leakage(train, test_prompts), "eval and test": leakage(evaluation, test_prompts)}
    return report


def usual_folder(data: str) -> Path:
    """alignment/data of this checkout; the sample has a folder of its own there, so that it replaces no real selection."""
    folder = Path(__file__).resolve().parents[1] / "data"
    return folder / SAMPLE if data == SAMPLE else folder


def write_selection(selection: Selection, settings: SelectionSettings, found: dict, folder: str | Path) -> list[Path]:
    """Both splits, their statistics and the pool's, and last `selection_report.json`: settings, counts, hashes, `found`.

    Rows are in ASCII, as the published files: a reference selection is the published file to the byte.
    """
    folder, written, hashes = Path(folder), [], {}
    splits = {
        f"custom_train_{settings.train_size}": selection.train,
        f"custom_eval_{settings.eval_size}": selection.evaluation,
    }
    for name, rows in splits.items():
        content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        hashes[f"{name}.jsonl"] = hashlib.sha256(content.encode()).hexdigest()
        with atomic_open(folder / f"{name}.jsonl") as file:
            file.write(content)
        write_json(folder / f"{name}_stats.json", statistics(rows))
        written += [folder / f"{name}.jsonl", folder / f"{name}_stats.json"]
    pool = statistics(selection.pool)
    pool = {"total_rows": selection.counts["total"], "alpaca_rows": pool.pop("num_rows")} | pool  # published names
    source = "" if settings.data == SAMPLE else re.sub(r"\W", "", settings.source).lower()
    written += [folder / f"{source or 'pool'}_stats.json", folder / "selection_report.json"]
    write_json(written[-2], pool)
    report = {"settings": asdict(settings), "rows": selection.counts, "sha256": hashes, "leakage": found}
    write_json(written[-1], report)
    return written
