"""What judging costs: prices, the estimate before, the count during, and the budget that ends a run in time.

Amounts are US dollars. Tokens are counted by the endpoint (`usage`); where it does not say, and before a call, they are
estimated from the UTF-8 length. A budget covers everything that the judgments file records, former runs included; each reply has
its own judge's price, and --price_in and --price_out are the price of the judge that is asked now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alignment.errors import UserError

# list prices per million tokens (prompt, completion), OpenAI, middle of 2025; --price_in and --price_out win over them
PRICES = {
    "gpt-4.1": (2.00, 8.00),
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
}
BYTES_PER_TOKEN = 4.0  # English prose; what is expected
BYTES_PER_TOKEN_AT_WORST = 2.0  # no text of a written language needs more tokens than this
EXPECTED_REPLY_TOKENS = 350  # the published judgments average 1,420 characters


@dataclass(frozen=True)
class Price:
    """Dollars per token."""

    prompt: float
    completion: float

    def of(self, usage: dict) -> float:
        return usage["prompt_tokens"] * self.prompt + usage["completion_tokens"] * self.completion


def find_price(judge: str, price_in: float | None, price_out: float | None) -> Price | None:
    """Price from the two settings (per million tokens) or the table; None when neither knows the judge."""
    if (price_in is None) != (price_out is None):
        raise UserError("--price_in and --price_out belong together: give both, in dollars per million tokens")
    per_million = (price_in, price_out) if price_in is not None and price_out is not None else PRICES.get(judge)
    return Price(per_million[0] / 1e6, per_million[1] / 1e6) if per_million else None


def count_bytes(messages: Iterable[dict]) -> int:
    return sum(len(message["content"].encode("utf-8")) for message in messages)


def expected_usage(message_bytes: int, reply_tokens: float = EXPECTED_REPLY_TOKENS) -> dict:
    return {"prompt_tokens": round(message_bytes / BYTES_PER_TOKEN), "completion_tokens": round(reply_tokens)}


def worst_usage(message_bytes: int, max_output_tokens: int) -> dict:
    return {"prompt_tokens": round(message_bytes / BYTES_PER_TOKEN_AT_WORST), "completion_tokens": max_output_tokens}


def total_usage(records: Iterable[dict], judge: str, price: Price | None) -> dict:
    """Charged replies, their tokens, and their dollars, where `price` is that of `judge`.

    `without_price` counts the replies of each judge whose price is not known: `dollars` is without them, and absent when
    it would be of none.
    """
    total: dict[str, Any] = {"replies": 0, "prompt_tokens": 0, "completion_tokens": 0}
    dollars, without = 0.0, Counter[str]()
    for record in records:
        usage, own_judge = record.get("usage"), str(record.get("judge"))
        if not usage:
            continue
        total["replies"] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            total[name] += usage[name]
        own = price if own_judge == judge else find_price(own_judge, None, None)
        if own is None:
            without[own_judge] += 1
        else:
            dollars += own.of(usage)
    if total["replies"] > without.total() or price:
        total["dollars"] = round(dollars, 6)
    return total | ({"without_price": dict(without)} if without else {})


def mean_reply_tokens(records: Iterable[dict], judge: str) -> float:
    """What a reply of the judge takes: from the file once it holds 20 of them, else a guess."""
    found = [row["usage"]["completion_tokens"] for row in records if row.get("usage") and row.get("judge") == judge]
    return sum(found) / len(found) if len(found) >= 20 else EXPECTED_REPLY_TOKENS


def name_unpriced(total: dict) -> str:
    """For example "40 replies of my-judge, whose price is not known"; "" when every price is."""
    without = total.get("without_price", {})
    listed = " and ".join(f"{count} replies of {judge}" for judge, count in without.items())
    return f"{listed}, whose price is not known" if listed else ""


class Budget:
    """Money spent and promised. Without a price everything costs nothing and no limit can be kept.

    A call is reserved at its worst case before it starts; the reply then replaces that by what it cost. A call that got no
    reply (timeout, dropped connection) may have been charged, so it stays counted against the limit, in this run only.
    """

    def __init__(self, limit: float | None, price: Price | None, before: dict):
        """`before` is the `total_usage` of what was judged already."""
        if limit is not None and price is None:
            raise UserError("--budget needs a price: this judge is not in the table, give --price_in and --price_out")
        if limit is not None and "without_price" in before:
            raise UserError(
                f"--budget: the judgments file holds {name_unpriced(before)}, so what was spent is not known; give this judge "
                "a file of its own with --judgments_out, or leave --budget out"
            )
        self.limit, self.price = limit, price
        self.spent = before.get("dollars", 0.0)
        self.unanswered = 0.0
        self._reserved = 0.0
        self.open_calls = 0

    def cost(self, usage: dict) -> float:
        return self.price.of(usage) if self.price else 0.0

    def reserve(self, usage: dict) -> float | None:
        """Sets the worst case of a call aside; None when that could exceed the limit: for good when no call is open."""
        amount = self.cost(usage)
        if self.limit is not None and self.spent + self.unanswered + self._reserved + amount > self.limit:
            return None
        self._reserved += amount
        self.open_calls += 1
        return amount

    def settle(self, reserved: float, usage: dict | None, charged: bool) -> None:
        """Ends a reservation: with the reply's usage, or without a reply that was `charged` or was certainly not."""
        self._reserved -= reserved
        self.open_calls -= 1
        if usage is not None:
            self.spent += self.cost(usage)
        elif charged:
            self.unanswered += reserved
