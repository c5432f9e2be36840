"""What is written and said about the ratings: the details file and the table on the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from alignment.evaluation.judging.ratings import Ratings, rating_warnings
from alignment.evaluation.judging.verdict import TIE, Verdict
from alignment.evaluation.measures import as_record, estimate_means, interval_text
from alignment.records import finite_or_none


def position_bias(verdicts: Sequence[Verdict]) -> dict | None:
    """Whether the answer that is shown first wins for that alone; None without verdicts that a judge was asked for.

    first_wins: percent of the comparisons that the first answer wins, ties half, 50 for a judge without bias (with one order a
    pair, only if the order was drawn at random). score_difference: first minus second, in points of the 1-10 scale.
    both_orders: pairs judged both ways; `same` names the same winner (or a tie) twice, `first` and `second` follow the
    position, `one_tie` is a tie one way only. not_asked: ties of equal answers, which say nothing of the judge and are left out.
    """
    not_asked = sum(not one.asked for one in verdicts)
    if not_asked == len(verdicts):
        return None
    verdicts = sorted(
        (one for one in verdicts if one.asked), key=lambda one: one.prompt
    )  # so that the bootstrap does not depend on the order
    groups: dict[str, int] = {}
    rows = np.array([groups.setdefault(verdict.prompt, len(groups)) for verdict in verdicts], dtype=np.int64)
    values = [
        [100.0 * one.result, one.scores[0] - one.scores[1] if one.scores else np.nan] for one in verdicts
    ]  # (N, 2)
    first_wins, difference = estimate_means(np.array(values, dtype=np.float64), rows)

    shown: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for one in verdicts:
        shown[(one.prompt, *sorted((one.first, one.second)))][one.first] = one.result
    counts = {"pairs": 0, "same": 0, "first": 0, "second": 0, "one_tie": 0}
    for results in shown.values():
        if len(results) < 2:
            continue
        result, other = results.values()  # each from the view of the answer shown first
        counts["pairs"] += 1
        if result + other == 1.0:
            counts["same"] += 1
        elif TIE in (result, other):
            counts["one_tie"] += 1
        else:
            counts["first" if result == 1.0 else "second"] += 1
    return {
        "first_wins": as_record(first_wins),
        "score_difference": as_record(difference),
        "both_orders": counts if counts["pairs"] else None,
        "not_asked": not_asked,
    }


def temperature_notes(found: Iterable[dict], temperature: float) -> list[str]:
    """What `options_found` differs in from the temperature that was asked for."""
    notes = []
    for one in found:
        options, count = one["options"], f"{one['judgments']} judgments"
        if options is None:
            notes.append(f"{count} do not say at which temperature they were asked for")
        elif "temperature" not in options:
            notes.append(
                f"{count} were asked for without a temperature, so at the endpoint's own, not at {temperature:g}"
            )
        elif options["temperature"] != temperature:
            notes.append(f"{count} were asked for at temperature {options['temperature']}, not at {temperature:g}")
    return notes


def describe_ratings(rated: Ratings) -> dict:
    """Ratings with intervals, win rates of row against column in percent, and the share of draws with the row ahead."""
    models, wins, games = rated.models, rated.wins, rated.games
    ratings, rates, ahead = {}, {}, {}
    for i, model in enumerate(models):
        ratings[model] = {
            "rating": float(rated.ratings[i]),
            "low": finite_or_none(rated.low[i]),
            "high": finite_or_none(rated.high[i]),
            "wins_ties_half": float(wins[i].sum()),
            "comparisons": int(games[i].sum()),
        }
        others = [j for j in range(len(models)) if j != i]
        rates[model] = {
            models[j]: {
                "percent": 100.0 * wins[i, j] / games[i, j] if games[i, j] else None,
                "low": finite_or_none(rated.rate_low[i, j]),
                "high": finite_or_none(rated.rate_high[i, j]),
                "comparisons": int(games[i, j]),
            }
            for j in others
        }
        ahead[model] = {models[j]: float(rated.ahead[i, j]) for j in others}
    return {
        "prompts": rated.prompts,
        "ratings": ratings,
        "win_rates": rates,
        "share_of_draws_ahead": ahead,
        "warnings": rating_warnings(rated),
    }


def print_ratings(details: dict) -> None:
    """One line a model and dimension, best first, then the warnings."""
    for dimension, part in details["dimensions"].items():
        print(f"{dimension} ({part['prompts']} prompts)")
        width = max(map(len, part["ratings"]))
        for model, one in sorted(part["ratings"].items(), key=lambda item: -item[1]["rating"]):
            interval = f"[{one['low']:.0f}, {one['high']:.0f}]" if one["low"] is not None else ""
            print(f"  {model:<{width}}  {one['rating']:7.1f}  {interval}")
        bias, agreement = part.get("position_bias"), part.get("agreement_with_scorer")
        if bias:
            first = bias["first_wins"]
            interval = interval_text(first["low"], first["high"], ".1f")
            print(f"  shown first wins {first['value']:.1f} % {interval}", end="")
            both = bias["both_orders"]
            print(f"; same verdict in both orders {100 * both['same'] / both['pairs']:.1f} %" if both else "", end="")
            print(f"; {bias['not_asked']} ties of equal answers, not asked" if bias["not_asked"] else "")
        if agreement and agreement["share"]:
            share = agreement["share"]
            interval = interval_text(share["low"], share["high"], ".1f")
            print(
                f"  judge and scorer prefer the same answer in {share['value']:.1f} % {interval} of {share['rows']} pairs"
            )
        for warning in part["warnings"]:
            print(f"  note: {warning}")
