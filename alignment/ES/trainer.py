"""Evolution Strategies for max E[R] - lambda E[C] subject to E[C] + d <= 0, on the weights of a language model.

One iteration (Salimans et al. 2017, arXiv 1703.03864, with the z-scored fitness of the published alignment scripts):

    draw B prompts and N seeds; member i is theta + sigma eps(seed_i), eps ~ N(0, I) over all parameters
    every member answers the B prompts greedily; the scorer gives R and C; f_i = mean(R - lambda C)
    theta <- theta + (alpha / N) sum_i u(f)_i eps(seed_i)          fitness.py has u
    lambda <- its update from the costs of the unperturbed policy on the same prompts

Where this departs from the published scripts: noise is independent between parameters; a member is computed from an
untouched float32 master (weights.py), so nothing drifts; a prompt whose score is missing for any member is left out for all
(published: zeros); every step is in a journal (journal.py) before the run goes on, so a killed run resumes to the same
weights, and a member that was scored is never scored again. Scoring of a member runs while the next one generates.

With `perturbation: low_rank` (low_rank.py) eps is low-rank, and members are generated in groups that share batches. Which
members a group has depends on their numbers alone, and a group is always generated whole, members that were scored before a
kill as well: an answer has the same batch mates, and the same rounding, however the run was stopped or dealt out.

With several processes each has a policy and evaluates its share of the groups (with full rank: of the members); scores are
exchanged, and all take the same step from them, so no weight travels. The main process writes the files.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignment.distributed import Processes
from alignment.errors import UserError
from alignment.ES import advice
from alignment.ES.checkpoints import restore, save_model
from alignment.ES.fitness import FitnessRule
from alignment.ES.journal import Journal, MembersFile, finished_members, forget_missing
from alignment.ES.low_rank import LowRankWeights
from alignment.ES.member_scores import MemberScores
from alignment.ES.model_card import model_card
from alignment.ES.policy_weights import open_weights
from alignment.ES.settings import ESSettings
from alignment.ES.step import UNPERTURBED, direction, population_step
from alignment.evaluation.held_out import is_best, measures_row, samples, score_answers, summary_line, with_ids
from alignment.generation import Engine, Generation
from alignment.lagrangian import LagrangeMultiplier
from alignment.progress import progress_bar, watched
from alignment.prompts import iteration_prompts, text_hash
from alignment.records import read_jsonl, write_jsonl
from alignment.runs import MetricsLog, StopSignal
from alignment.scoring.scores import WaitingScorer
from alignment.scoring.scores import deciding as deciding_part


class _Stopped(Exception):
    """A signal came between two batches of an evaluation, or while a scoring thread waited for a scorer that is away."""


class ESTrainer:
    """Owns a run folder. `train` and `held_out` are rows with the prompt under `settings.prompt_key`."""

    def __init__(
        self,
        settings: ESSettings,
        engine: Engine,
        scorer: WaitingScorer,
        train: list[dict],
        held_out: list[dict],
        folder: Path,
        processes: Processes,
    ):
        self.settings, self.engine, self.scorer, self.folder = settings, engine, scorer, folder
        self.processes = processes
        self.train_prompts = [row[settings.prompt_key] for row in train]
        self.held_out_prompts = [row[settings.prompt_key] for row in held_out]
        self.weights = open_weights(engine, vars(settings))
        self.base_hash = self.weights.hash()
        self.rule = FitnessRule(
            standardize=settings.standardize if settings.standardize_within_batch else "none",
            safe_first=settings.safe_first,
            safe_first_factor=settings.safe_first_factor,
        )
        self.multiplier = LagrangeMultiplier.from_settings(settings)
        self.low_rank = settings.perturbation == "low_rank"
        self.at_once = (settings.members_at_once or engine.members_at_once) if self.low_rank else 1
        members = (UNPERTURBED, *range(settings.population_size))
        self.groups = [members[begin : begin + self.at_once] for begin in range(0, len(members), self.at_once)]

    # ---- the run ----

    def run(self, stop: StopSignal, on_restored: Callable[[], None] = lambda: None) -> bool:
        """Trains to the end, or until a signal came; returns whether the run is finished. State is on disk either way.

        The main process calls `on_restored` when nothing has been found against going on with the run.
        """
        self.stop = stop
        if len(set(self.processes.gather(self.base_hash))) > 1:
            raise UserError(
                "the processes loaded different base weights: the same --policy_model_path must mean the same files"
            )
        self.steps = self.processes.on_main(self._open_files)
        if len(self.groups) < self.processes.world_size and self.is_main:
            print(
                f"warning: {self.processes.world_size} processes share {len(self.groups)} groups of {self.at_once} members: "
                "some have nothing to do; give a smaller --members_at_once"
            )
        self.members_file = MembersFile(self.folder, self.processes.rank)
        self._restore()
        self.processes.on_main(on_restored)
        bar = progress_bar(
            self.settings.num_iterations,
            "ES",
            "step",
            initial=len(self.steps),
            disable=not (watched() and self.is_main),
        )
        try:
            with ThreadPoolExecutor(max_workers=2, thread_name_prefix="scoring") as self.pool, bar as self.bar:
                self.scorer.on_wait = self._show_waiting
                return self._loop()
        finally:
            self.members_file.close()
            if self.is_main:
                self.metrics.close()
                self.journal.close()

    @property
    def is_main(self) -> bool:
        return self.processes.is_main

    def _open_files(self) -> list[dict]:
        """On the main process: journal and metrics; returns the steps taken so far."""
        deciding = {
            **self.settings.deciding(),
            "device": self.engine.device.type,
            "train_prompts": text_hash(self.train_prompts),
            "scorer": deciding_part(self.scorer.identity()),
        }
        if self.low_rank:
            deciding["members_at_once"] = self.at_once
        if self.settings.lora_rank is not None:
            deciding["base_dtype"] = str(self.engine.dtype).removeprefix("torch.")
        self.journal = Journal(self.folder, self.base_hash, deciding)
        if self.journal.dropped_tail:
            print("the journal's last row was not written to its end and is dropped: that step is done again")
        first = len(self.journal.steps)
        self.metrics = MetricsLog(
            self.folder,
            keep=lambda row: row["iteration"] < first or (row["kind"] == "eval" and row["iteration"] == first),
            wandb_project=self.settings.wandb_project,
            wandb_run_name=self.settings.wandb_run_name,
        )
        # Rows that a kill kept from metrics.jsonl are in the journal.
        logged = {row["iteration"] for row in read_jsonl(self.folder / "metrics.jsonl") if row["kind"] == "train"}
        for step in self.journal.steps:
            if step["iteration"] not in logged:
                self.metrics.log(step["metrics"], step["iteration"])
        return list(self.journal.steps)

    def _restore(self) -> None:
        """theta and lambda of the last step."""
        if not self.steps:
            return
        begin = restore(self.weights, self.folder, self.steps)
        self.multiplier.load_state_dict(self.steps[-1]["lambda_state"])
        if self.is_main:
            replayed = len(self.steps) - begin
            print(
                f"going on after step {len(self.steps)} (checkpoint {begin}, {replayed} steps replayed from the journal)"
            )

    def _loop(self) -> bool:
        s = self.settings
        evaluated = self.processes.on_main(
            lambda: {row["iteration"] for row in read_jsonl(self.folder / "metrics.jsonl") if row["kind"] == "eval"}
        )
        while True:
            t = len(self.steps)
            last = t >= s.num_iterations
            if (t % s.eval_every == 0 or last) and t not in evaluated and not self._evaluate(t):
                return False
            if t > 0 and (t % s.save_every == 0 or last):
                self._check_equal_weights(t)
                self.processes.on_main(partial(self._save_checkpoint, t))
            if last:
                self.processes.on_main(partial(self._save_model, self.folder / "final", t))
                self.members_file.begin(t)
                return True
            if not self._iterate(t):
                return False

    # ---- one iteration ----

    def _iterate(self, t: int) -> bool:
        """Iteration t: scores of theta and of all members, then the step. False when a signal came before the step."""
        s = self.settings
        started = time.perf_counter()
        rows = iteration_prompts(len(self.train_prompts), s.batch_size, s.global_seed, t)
        prompts = [self.train_prompts[row] for row in rows]
        done = self.processes.on_main(lambda: finished_members(self.folder, t))
        self.members_file.begin(t)  # the main process, which has answered, has the last step in its journal
        todo = [group for group in self.groups if not done.keys() >= set(group)]
        own, seconds, stopped, error = self._evaluate_members(
            t, todo[self.processes.rank :: self.processes.world_size], prompts, done.keys()
        )
        everyones = self.processes.gather((own, seconds, stopped, error))
        for rows, _, _, _ in everyones:
            done |= rows
        if error := next((error for _, _, _, error in everyones if error), None):
            raise error
        if any(stopped for _, _, stopped, _ in everyones):
            return False

        before = time.perf_counter()
        row = self._step(t, done)
        slowest = {name: max(times[name] for _, times, _, _ in everyones) for name in seconds}
        slowest |= {"step": time.perf_counter() - before, "total": time.perf_counter() - started}
        row["metrics"]["seconds"] = {name: round(value, 4) for name, value in slowest.items()}
        if self.is_main:
            self.journal.add_step(row)
            self.metrics.log(row["metrics"], t)
            self._show(row["metrics"])
        self.steps.append(row)
        return True

    def _evaluate_members(
        self, t: int, groups: list[tuple[int, ...]], prompts: list[str], finished: Set[int]
    ) -> tuple[dict[int, dict], dict[str, float], bool, UserError | None]:
        """This process's share but what is `finished`: scored rows by member, seconds, whether a signal ended it early, an
        error.
        """
        seconds = {"perturb": 0.0, "generate": 0.0, "wait_for_scores": 0.0}
        scores = MemberScores(self.scorer, self.pool, self.members_file, t, prompts, self.settings.verbose)

        def score(member: int, answers: list[Generation]) -> None:
            if member not in finished:
                scores.ask(member, answers)

        try:
            for group in groups:
                if self._stopping():
                    break
                self._generate(t, group, prompts, score, seconds)
                scores.keep()  # not in `score`: what failed is raised once the engine has ended the group
            waiting = time.perf_counter()
            scores.keep_all(self._stopping)
            seconds["wait_for_scores"] = time.perf_counter() - waiting
        except _Stopped:
            scores.keep_begun()
        except UserError as error:  # all processes end together, each with its finished members saved
            scores.keep_begun()
            return scores.rows, seconds, False, error
        finally:
            scores.cancel_queued()
        wanted = {member for group in groups for member in group} - finished
        return scores.rows, seconds, scores.rows.keys() < wanted, None

    def _generate(
        self,
        t: int,
        group: tuple[int, ...],
        prompts: list[str],
        on_answers: Callable[[int, list[Generation]], None],
        seconds: dict[str, float],
    ) -> None:
        """The answers of each member of `group`, handed to `on_answers(member, answers)`; adds to `seconds`."""
        s = self.settings
        last = "" if len(group) == 1 else f"-{group[-1] + 1}"
        self.bar.set_description(f"ES member {group[0] + 1}{last}/{s.population_size}")
        before = time.perf_counter()
        if isinstance(self.weights, LowRankWeights):  # the engine holds theta: the step and _restore put it there
            members = [{} if m == UNPERTURBED else self.weights.member(*direction(s, t, m)) for m in group]
        elif group[0] == UNPERTURBED:
            self.weights.restore()
        else:
            self.weights.perturb(*direction(s, t, group[0]))
        between = time.perf_counter()
        if self.low_rank:
            self.engine.generate_members(
                prompts, s.max_new_tokens, members, lambda number, answers: on_answers(group[number], answers)
            )
        else:
            on_answers(group[0], self.engine.generate(prompts, s.max_new_tokens))
        seconds["perturb"] += between - before
        seconds["generate"] += time.perf_counter() - between

    def _step(self, t: int, done: dict[int, dict]) -> dict:
        """Moves theta and lambda; returns the journal's row with the metrics in it. The same on every process."""
        try:
            step = population_step(self.settings, self.rule, t, done, self.multiplier.value)
        except UserError:  # too many scores are missing, which the same command asks for again
            self.processes.on_main(partial(forget_missing, self.folder))
            raise
        self.weights.step(step.seeds, step.coefficients)
        constraint = self.multiplier.update(step.costs)
        return {
            "iteration": t,
            "seeds": step.seeds,
            "fitness": step.fitness,
            "coefficients": step.coefficients,
            "lambda_state": self.multiplier.state_dict(),
            "metrics": step.metrics | constraint,
        }

    # ---- evaluation and checkpoints ----

    def _evaluate(self, t: int) -> bool:
        """Held-out evaluation of theta after t steps; False when a signal came."""
        s = self.settings
        self.bar.set_description("ES held-out evaluation")
        self.weights.restore()
        points: dict[int, dict] = {}
        stopped, error = False, None
        try:
            answers = self.engine.generate_share(
                self.held_out_prompts,
                s.max_new_tokens,
                self.processes.rank,
                self.processes.world_size,
                self._stop_if_told,
            )
            own = score_answers([self.held_out_prompts[i] for i in answers], list(answers.values()), self.scorer)
            points = dict(zip(answers, own, strict=True))
        except _Stopped:
            stopped = True
        except UserError as failure:
            error = failure
        merged: dict[int, dict] = {}
        for others_points, others_stopped, others_error in self.processes.gather((points, stopped, error)):
            if others_error:
                raise others_error
            stopped |= others_stopped
            merged |= others_points
        if stopped:
            return False
        ordered = with_ids([merged[index] for index in sorted(merged)])
        self.processes.on_main(partial(self._log_evaluation, t, ordered))
        # Saving takes minutes at 7B, which the time left may not have; the journal has all that is needed.
        return not any(self.processes.gather(self._stopping()))

    def _log_evaluation(self, t: int, points: list[dict]) -> None:
        write_jsonl(self.folder / "eval" / f"iteration_{t:05d}_points.jsonl", points)
        row: dict[str, Any] = {"kind": "eval", "iteration": t, "lambda": self.multiplier.value}
        row |= measures_row(points, self.settings.lambda_cost)
        # The best model first: metrics.jsonl says that an evaluation is done, and a kill must not fall between the two.
        standing = {"objective": row["objective"], "held_out": text_hash(self.held_out_prompts)}
        if is_best(self.folder / "best", **standing):
            self._save_model(self.folder / "best", t, **standing)
        self.metrics.log(row, t)
        tqdm.write(summary_line(t, row))
        if self.settings.verbose:
            tqdm.write(samples(points))

    def _save_model(self, final: Path, t: int, **more: float | str) -> None:
        """theta in Hugging Face layout, float32, with the trainer's state beside it."""
        card = model_card(self.settings, t, self.base_hash, self.multiplier.value, self.scorer.identity())
        state = {"iteration": t, "lambda_state": self.multiplier.state_dict(), **more}
        save_model(final, self.engine, self.weights, self.settings.lora_rank is not None, card, state)

    def _save_checkpoint(self, t: int) -> None:
        folder = self.folder / "checkpoints"
        if not (folder / f"iteration_{t:05d}").exists():
            self._save_model(folder / f"iteration_{t:05d}", t)
        for old in sorted(folder.glob("iteration_*"))[: -self.settings.keep_last]:
            shutil.rmtree(old)

    def _check_equal_weights(self, t: int) -> None:
        prints = self.processes.gather(self.weights.fingerprint())
        if len(set(prints)) > 1:
            raise UserError(
                f"after step {t} the processes' weights differ (fingerprints {prints}): a device computed wrongly. "
                "The journal is right; the same command goes on from the last checkpoint"
            )

    # ---- what a user sees ----

    def _stopping(self) -> bool:
        if self.stop:
            self.processes.request_stop()
        return bool(self.stop) or self.processes.stop_requested()

    def _show(self, row: dict) -> None:
        if watched():
            self.bar.set_postfix_str(advice.summary(row), refresh=False)
            self.bar.update()
        else:  # a job's log: a line a step
            print(advice.log_line(row, self.settings.num_iterations), flush=True)
        for warning in advice.warnings(row, self.steps[-1]["metrics"] if self.steps else None):
            tqdm.write(f"warning: {warning}")

    def _stop_if_told(self) -> None:
        if self._stopping():
            raise _Stopped

    def _show_waiting(self, seconds: float) -> None:
        self._stop_if_told()
        self.bar.set_description(f"waiting for the scorer, {seconds / 60:.0f} min")
