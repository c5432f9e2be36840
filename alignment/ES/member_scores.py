"""One process's scores of an iteration's members: asked for in threads while the next members generate, kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress

import numpy as np
from tqdm import tqdm

from alignment.errors import UserError
from alignment.ES.journal import MembersFile
from alignment.ES.step import UNPERTURBED
from alignment.generation import Generation
from alignment.records import finite_or_none
from alignment.scoring.scores import Scorer

LOOK_EVERY = 0.2  # seconds between two looks whether the run is to stop


class MemberScores:
    """`rows` are the members that are scored, as the members file has them; `pool` is whose threads ask the scorer."""

    def __init__(
        self,
        scorer: Scorer,
        pool: Executor,
        file: MembersFile,
        iteration: int,
        prompts: list[str],
        verbose: bool = False,
    ):
        self.rows: dict[int, dict] = {}
        self._scorer, self._pool, self._file = scorer, pool, file
        self._iteration, self._prompts, self._verbose = iteration, prompts, verbose
        self._asked: list[tuple[int, Future]] = []

    def ask(self, member: int, answers: Sequence[Generation]) -> None:
        """Hands over a member's answers, and keeps what is scored by now. What failed is raised by `keep`, not here."""
        self._asked.append((member, self._pool.submit(self._score, member, answers)))
        while self._asked and self._asked[0][1].done() and self._asked[0][1].exception() is None:
            self._keep_first()

    def keep(self) -> None:
        """Keeps what is scored by now. Raises what the first of them failed with."""
        while self._asked and self._asked[0][1].done():
            self._keep_first()

    def keep_all(self, stopping: Callable[[], bool]) -> None:
        """Waits for the scores. Once `stopping`, only for those that a thread has begun with: a queue may take longer than a
        job that is to end has left."""
        while self._asked:
            if stopping():
                self.cancel_queued()
            if not self._asked or wait([self._asked[0][1]], LOOK_EVERY).done:
                self.keep()

    def keep_begun(self) -> None:
        """After a failure: waits for what a thread has begun with, and keeps what did not fail."""
        self.cancel_queued()
        wait([future for _, future in self._asked])
        self._asked = [one for one in self._asked if one[1].exception() is None]
        with suppress(UserError):  # the first failure is the one to tell
            self.keep()

    def cancel_queued(self) -> None:
        """Gives up what no thread has begun with."""
        self._asked = [(member, future) for member, future in self._asked if not future.cancel()]

    def _keep_first(self) -> None:
        member, future = self._asked.pop(0)
        row = future.result()
        self._file.add(row)
        self.rows[member] = row
        if self._verbose and member != UNPERTURBED:
            rewards, costs = np.array(row["rewards"], float), np.array(row["costs"], float)
            tqdm.write(f"  member {member}: R {np.nanmean(rewards):.3f} C {np.nanmean(costs):.3f}")

    def _score(self, member: int, answers: Sequence[Generation]) -> dict:
        """In a thread; the row is what the members file keeps."""
        responses, finished = [answer.response for answer in answers], [answer.finished for answer in answers]
        scores = self._scorer.score(self._prompts, responses, finished)
        return {
            "iteration": self._iteration,
            "member": member,
            "rewards": [finite_or_none(value) for value in scores.rewards],
            "costs": [finite_or_none(value) for value in scores.costs],
            "errors": sorted({error for error in scores.errors if error}),
            "tokens": sum(answer.num_tokens for answer in answers),
            "unfinished": finished.count(False),
            "cut": sum(answer.cut for answer in answers),
            "truncated": sum(scores.truncated),
            "distinct": len(set(responses)),
        }
