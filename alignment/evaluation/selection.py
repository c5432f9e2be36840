"""Training and evaluation prompts drawn from PKU-SafeRLHF in proportion to its safety buckets; `select_pku_balanced.ipynb`
is its front.

    pool = load_pool("PKU-Alignment/PKU-SafeRLHF", "alpaca-7b", "train")
    selection = select(pool, 250, 500)

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
from dataclasses import dataclass
from pathlib import Path

from alignment.errors import UserError
from alignment.evaluation.loading import SAMPLE, load_split
from alignment.evaluation.prompts import check_text
from alignment.records import atomic_open, write_json

SOURCE = "Alpaca-7B"
_KINDS = {"response_{}": str, "is_response_{}_safe": bool, "response_{}_harm_category": dict}
SCHEMA = {"prompt": str} | {key.format(i): kind for key, kind in _KINDS.items() for i in (0, 1)}
SOURCE_KEYS = ("response_0_source", "response_1_source")
KIND_NAMES = {str: "text", bool: "true or false", dict: "harm categories with true or false"}
ALIKE = 0.35  # share of common three-word runs from which two prompts are reported as alike

Bucket = tuple[bool, bool]


@dataclass(frozen=True)
class Selection:
    """Two splits, the rows that they were drawn from, and how many rows of the data came down to those."""

    train: list[dict]
    evaluation: list[dict]
    pool: list[dict]
    counts: dict[str, int]


def load_pool(data: str, configuration: str = "alpaca-7b", split: str = "train", source: str = SOURCE) -> list[dict]:
    """Rows of the PKU-SafeRLHF schema, checked by name and type, both of whose responses are `source`'s ("": anybody's).

    The embedded sample has sources of its own and is taken whole. Raises UserError naming row and key.
    """
    source = "" if data == SAMPLE else source
    rows = load_split(data, configuration, split, required=(*SCHEMA, *(SOURCE_KEYS if source else ())))
    if not rows:
        raise UserError(f"{data} has no rows")
    for number, row in enumerate(rows, start=1):
        for key, kind in SCHEMA.items():
            if not isinstance(row[key], kind):
                raise UserError(f"{data}: row {number}: '{key}' must be {KIND_NAMES[kind]}, got {row[key]!r:.60}")
        check_text(row["prompt"], f"{data}: row {number}: 'prompt'")
        if not row["prompt"].strip():
            raise UserError(f"{data}: row {number}: 'prompt' is empty; remove that row")
    kept = [row for row in rows if not source or all(row[key] == source for key in SOURCE_KEYS)]
    if not kept:
        found = sorted({str(row[key]) for row in rows for key in SOURCE_KEYS})
        raise UserError(f"{data}: no row has both responses from {source!r}; there are {', '.join(found)}; '' takes all")
    return kept


def select(
    rows: Sequence[dict],
    train_size: int,
    eval_size: int,
    *,
    seed: int = 42,
    reference: bool = False,
    exclude: Collection[str] = (),
) -> Selection:
    """Draws both splits from `rows` without the prompts in `exclude`. `reference` draws as published (`exclude` must be empty).

    Raises UserError when a bucket has fewer rows than both splits need.
    """
    if train_size < 1 or eval_size < 1:
        raise UserError(f"train_size {train_size} and eval_size {eval_size}: expected 1 or more")
    if reference and exclude:
        raise UserError("reference=True draws as published and leaves no prompt out; set exclude_test=False")
    pool, counts = (list(rows), {"rows": len(rows)}) if reference else _distinct(rows, exclude)
    buckets: dict[Bucket, list[dict]] = {}
    for row in pool:
        buckets.setdefault(bucket_of(row), []).append(row)
    sizes = {bucket: len(members) for bucket, members in buckets.items()}
    targets = [largest_remainder(sizes, size) for size in (train_size, eval_size)]
    if not reference:
        for bucket, size in sizes.items():
            if size < (needed := targets[0][bucket] + targets[1][bucket]):
                raise UserError(
                    f"the bucket {bucket} has {size} rows and {train_size} + {eval_size} rows need {needed} of it: lower "
                    f"train_size or eval_size ({len(pool)} of {len(rows)} rows can be drawn)"
                )
    rng = random.Random(seed)
    splits = []
    for target in targets:
        drawn: list[dict] = []
        for bucket, members in buckets.items():
            drawn += rng.sample(members, min(target[bucket], len(members)))
        taken = set(map(id, drawn))
        buckets = {bucket: [row for row in members if id(row) not in taken] for bucket, members in buckets.items()}
        splits.append(drawn)
    if not reference:
        for split in splits:
            rng.shuffle(split)
    return Selection(*splits, pool, counts)


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
    counts = Counter(rows=len(rows), identical_rows=0, repeated_prompts=0, excluded=0)
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
    return list(kept.values()), dict(counts)


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
        by_row.update(dict.fromkeys(named[0] + named[1]))
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
    return {tuple(tokens[start : start + 3]) for start in range(max(1, len(tokens) - 2))}


def write_selection(
    selection: Selection, folder: str | Path, train_size: int, eval_size: int, source: str, report: dict
) -> list[Path]:
    """Both splits, their statistics, the pool's, and last `selection_report.json`: `report` and the splits' SHA-256.

    Rows are in ASCII, as the published files: a reference selection is the published file to the byte.
    """
    folder, written, hashes = Path(folder), [], {}
    splits = {f"custom_train_{train_size}": selection.train, f"custom_eval_{eval_size}": selection.evaluation}
    for name, rows in splits.items():
        content = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        hashes[f"{name}.jsonl"] = hashlib.sha256(content.encode()).hexdigest()
        with atomic_open(folder / f"{name}.jsonl") as file:
            file.write(content)
        write_json(folder / f"{name}_stats.json", statistics(rows))
        written += [folder / f"{name}.jsonl", folder / f"{name}_stats.json"]
    pool_stats = statistics(selection.pool)
    pool_stats = {"total_rows": selection.counts["rows"], "alpaca_rows": pool_stats.pop("num_rows")} | pool_stats
    pool_name = re.sub(r"[^\w]", "", source).lower() or "pool"
    write_json(folder / f"{pool_name}_stats.json", pool_stats)
    write_json(folder / "selection_report.json", report | {"rows": selection.counts, "sha256": hashes})
    return [*written, folder / f"{pool_name}_stats.json", folder / "selection_report.json"]
