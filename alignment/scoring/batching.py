"""Scores token ids in batches, and in deterministic mode with the same bits whatever else is in the batch.

    scorer = BatchScorer(model, deterministic=True)
    scores = scorer.score([(1, 383, 2), (1, 383, 373, 2)])  # (N,) float32, in order; identical texts are scored once

Why a score can depend on its batch mates at all: kernels treat the last rows of a matrix differently from those before,
so that the same row rounds differently at another place or beside another number of rows (measured on the golden models:
a third of texts, up to 5e-7 in float32, far more in half precision).
Deterministic mode takes that away and still batches:
- a text is padded to a multiple of 16 tokens, a width that follows from its own length only;
- a width is run with 1, 2, 4, 8 or 16 rows and nothing else;
- before a width is used, one text is put in every row of each of these sizes: a size is kept only if all rows, at all
  positions, have the bits of the same reference row. Rows do not mix in a forward pass, so place and number of rows are
  all that could matter. Where nothing passes, and for models of other classes, every text has a forward of its own.
Otherwise batches are sorted by length and filled up to a number of tokens, or, with a PackedForward, hold no padding at all.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch

from alignment.scoring.packed import PackedForward, to_device
from alignment.scoring.score_model import SafeRlhfScore, ScoreModel, SequenceClassifier, longest_text

WIDTH_STEP = 16
ROWS = (16, 8, 4, 2, 1)  # largest first
# A forward pass of a tiny model costs as much as four more rows: a batch is filled up rather than split for less.
ROWS_TO_FILL = 3
TOKENS_PER_BATCH = 16384
# A larger model keeps every core of a CPU busy with one text: batches would gain nothing, the check would cost minutes.
LARGE_ON_CPU = 50_000_000


class BatchScorer:
    """One score model and how its batches are formed; `packed` is its forward without padding, which then does all of it.

    Not thread-safe: one thread owns it.
    """

    def __init__(
        self,
        model: ScoreModel | SequenceClassifier | SafeRlhfScore,
        deterministic: bool,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        packed: PackedForward | None = None,
    ) -> None:
        self.model = model
        self.deterministic = deterministic
        self.packed = packed
        self.tokens_per_batch = tokens_per_batch
        self.device = next(model.parameters()).device
        self.max_width = longest_text(model) or sys.maxsize
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.large = self.device.type == "cpu" and parameters > LARGE_ON_CPU
        self.can_batch = isinstance(model, ScoreModel) and not self.large
        self._rows: dict[int, tuple[int, ...]] = {}
        if deterministic and self.device.type == "cpu":
            # Setting the number of threads, even to itself, forbids MKL to choose another one from call to call.
            torch.set_num_threads(torch.get_num_threads())

    @torch.inference_mode()
    def score(self, texts: list[tuple[int, ...]]) -> torch.Tensor:
        """End scores (N,) float32 of N texts given as token ids, in their order, on the model's device.

        On a GPU they may still be under way: another model's work can be queued behind before they are asked for. A score may
        be NaN or infinite: that is for the caller.
        """
        if not texts:
            return torch.empty(0, device=self.device)
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        different = list(places)
        if self.packed is not None:
            scores = self.packed.score(different)
        else:
            scores = torch.empty(len(different), device=self.device)
            batches = self._fixed_batches if self.deterministic else self._full_batches
            for batch, width, rows in batches(different):
                scores[[places[text] for text in batch]] = self._forward(batch, width, rows)
        return scores.index_select(0, to_device(torch.tensor([places[text] for text in texts]), self.device))

    def rows_for(self, width: int) -> tuple[int, ...]:
        """The numbers of rows, largest first, with which a batch of this width gives every text the same bits."""
        if width not in self._rows:
            self._rows[width] = self._check_rows(width) if self.can_batch else (1,)
        return self._rows[width]

    def _full_batches(self, texts: list[tuple[int, ...]]) -> Iterator[tuple[list[tuple[int, ...]], int, int]]:
        ordered = sorted(texts, key=len, reverse=True)
        while ordered:
            width = len(ordered[0])
            count = max(1, self.tokens_per_batch // width)
            batch, ordered = ordered[:count], ordered[count:]
            yield batch, width, len(batch)

    def _fixed_batches(self, texts: list[tuple[int, ...]]) -> Iterator[tuple[list[tuple[int, ...]], int, int]]:
        by_width: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for text in texts:
            width = math.ceil(len(text) / WIDTH_STEP) * WIDTH_STEP
            by_width[max(len(text), min(width, self.max_width))].append(text)
        for width, group in by_width.items():
            sizes = self.rows_for(width)
            while group:
                rows = rows_to_run(len(group), sizes)
                batch, group = group[:rows], group[rows:]
                yield batch, width, rows

    def _forward(self, batch: list[tuple[int, ...]], width: int, rows: int) -> torch.Tensor:
        """Scores of a batch, run as (rows, width); rows left over repeat the last text."""
        filled = batch + [batch[-1]] * (rows - len(batch))
        ids = torch.tensor([text + (0,) * (width - len(text)) for text in filled], device=self.device)  # (rows, width)
        lengths = torch.tensor([len(text) for text in filled], device=self.device)  # (rows,)
        return self.model(ids, lengths)[: len(batch)]

    @torch.inference_mode()
    def _check_rows(self, width: int) -> tuple[int, ...]:
        assert isinstance(self.model, ScoreModel)  # can_batch
        generator = torch.Generator().manual_seed(width)
        text = torch.randint(self.model.config.vocab_size, (1, width), generator=generator).to(self.device)
        states = {rows: self.model.hidden(text.repeat(rows, 1)) for rows in ROWS}  # (rows, width, H)
        scores = {rows: self.model.end_scores(state[:, -1]) for rows, state in states.items()}  # (rows,)
        first_state, first_score = states[ROWS[0]][:1], scores[ROWS[0]][:1]
        kept = tuple(
            rows
            for rows in ROWS
            if torch.equal(states[rows], first_state.expand_as(states[rows]))
            and torch.equal(scores[rows], first_score.expand_as(scores[rows]))
        )
        # Not even the largest batch agrees with itself: only a forward of its own is safe.
        return kept if ROWS[0] in kept else (1,)


def rows_to_run(waiting: int, sizes: tuple[int, ...]) -> int:
    """Which of `sizes` (largest first) to run next for `waiting` texts: one to fill up, or the largest one they fill."""
    fillable = [size for size in sizes if waiting <= size <= waiting + ROWS_TO_FILL]
    return fillable[-1] if fillable else next((size for size in sizes if size <= waiting), sizes[-1])
