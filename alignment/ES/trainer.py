"""Evolution Strategies for max E[R] - lambda E[C] subject to E[C] + d <= 0, on the weights of a language model.

One iteration (Salimans et al. 2017, arXiv 1703.03864, with the z-scored fitness of the published alignment scripts):

    draw B prompts and N seeds; member i is theta + sigma eps(seed_i), eps ~ N(0, I) over all parameters
    every member answers the B prompts greedily; the scorer gives R and C; f_i = mean(R - lambda C)
    theta <- theta + (alpha / N) sum_i z(f)_i eps(seed_i)
    lambda <- its update from the costs of the unperturbed policy on the same prompts

Where this departs from the published scripts: noise is independent between parameters; a member is computed from an
untouched float32 master (weights.py), so nothing drifts; a prompt whose score is missing for any member is left out for all
(published: zeros); every step is in a journal (journal.py) before the run goes on, so a killed run resumes to the same
weights, and a member that was scored is never scored again. Scoring of a member runs while the next one generates.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from alignment.errors import UserError
from alignment.ES.fitness import FitnessRule, z_scores
from alignment.ES.journal import Journal
from alignment.ES.noise import member_seed
from alignment.ES.prompts import iteration_prompts
from alignment.ES.settings import ESSettings
from alignment.ES.weights import MasterWeights
from alignment.evaluation.measures import measure
from alignment.generation import Generation, TransformersEngine
from alignment.lagrangian import LagrangeMultiplier
from alignment.objective import quadrant_labels
from alignment.progress import progress_bar, watched
from alignment.records import finite_or_none, read_json, read_jsonl, write_json, write_jsonl
from alignment.runs import MetricsLog, StopSignal, atomic_directory
from alignment.scoring.client import ScorerClient, Scores

UNPERTURBED = -1  # the member number of theta itself, which lambda and the training curve are taken from
MAX_MISSING_SHARE = 0.05


class _StoppedWaiting(Exception):
    """A signal came while a scoring thread waited for a scorer that is away."""


class ESTrainer:
    """Owns a run folder. `train` and `held_out` are rows with the prompt under `settings.prompt_key`."""

    def __init__(
        self,
        settings: ESSettings,
        engine: TransformersEngine,
        scorer: ScorerClient,
        train: list[dict],
        held_out: list[dict],
        folder: Path,
    ):
        self.settings, self.engine, self.scorer, self.folder = settings, engine, scorer, folder
        self.train_prompts = [row[settings.prompt_key] for row in train]
        self.held_out = held_out
        self.weights = MasterWeights(engine.weights())
        self.base_hash = self.weights.hash()
        self.rule = FitnessRule(
            standardize=settings.standardize if settings.standardize_within_batch else "none",
            safe_first=settings.safe_first,
            safe_first_factor=settings.safe_first_factor,
        )
        self.multiplier = LagrangeMultiplier(
            value=settings.lambda_cost,
            adapt=settings.lambda_adapt,
            learning_rate=settings.lambda_lr,
            minimum=settings.lambda_min,
            maximum=settings.lambda_max,
            positive_part=settings.lambda_pos_cost_only,
            ema_beta=settings.jc_ema_beta,
            threshold_d=settings.cost_threshold_d,
        )

    def run(self, stop: StopSignal) -> bool:
        """Trains to the end, or until a signal came; returns whether the run is finished. State is on disk either way."""
        self.stop = stop
        deciding = {
            **self.settings.deciding(),
            "device": self.engine.device.type,
            "train_prompts": _text_hash(self.train_prompts),
            "scorer": self.scorer.identity(),
        }
        self.journal = Journal(self.folder, self.base_hash, deciding)
        if self.journal.dropped_tail:
            print("the journal's last row was not written to its end and is dropped: that step is done again")
        self._restore()
        first = self.journal.iteration
        self.metrics = MetricsLog(
            self.folder,
            keep=lambda row: row["iteration"] < first or (row["kind"] == "eval" and row["iteration"] == first),
            wandb_project=self.settings.wandb_project,
            wandb_run_name=self.settings.wandb_run_name,
        )
        self._complete_metrics()
        try:
            with (
                ThreadPoolExecutor(max_workers=2, thread_name_prefix="scoring") as self.pool,
                progress_bar(
                    self.settings.num_iterations, "ES", "step", initial=first, disable=not watched()
                ) as self.bar,
            ):
                self.scorer.on_wait = self._show_waiting
                return self._loop()
        finally:
            self.weights.restore()
            self.metrics.close()
            self.journal.close()

    def _loop(self) -> bool:
        s = self.settings
        while True:
            t = self.journal.iteration
            last = t >= s.num_iterations
            if (t % s.eval_every == 0 or last) and t not in self.evaluated:
                try:
                    self._evaluate(t)
                except _StoppedWaiting:
                    return False
            if t > 0 and (t % s.save_every == 0 or last):
                self._save_checkpoint(t)
            if last:
                self._save_model(self.folder / "final", t)
                return True
            if not self._iterate(t):
                return False

    def _iterate(self, t: int) -> bool:
        """Iteration t: scores of theta and of all members, then the step. False when a signal came before the step."""
        s = self.settings
        started = time.perf_counter()
        rows = iteration_prompts(len(self.train_prompts), s.batch_size, s.global_seed, t)
        prompts = [self.train_prompts[row] for row in rows]
        seeds = [member_seed(s.global_seed, t, member) for member in range(s.population_size)]
        done = self.journal.finished_members()
        seconds = {"generate": 0.0, "perturb": 0.0}

        pending: list[tuple[int, Future]] = []
        for member in (UNPERTURBED, *range(s.population_size)):
            if member in done:
                continue
            if self.stop:
                break
            self.bar.set_description(f"ES member {member + 1}/{s.population_size}")
            before = time.perf_counter()
            if member == UNPERTURBED:
                self.weights.restore()
            else:
                self.weights.perturb(seeds[member], s.sigma)
            between = time.perf_counter()
            generations = self.engine.generate(prompts, s.max_new_tokens)
            seconds["perturb"] += between - before
            seconds["generate"] += time.perf_counter() - between
            pending.append((member, self.pool.submit(self._score_member, t, member, prompts, generations)))
            while pending and pending[0][1].done() and not self.stop:
                self._keep(done, *pending.pop(0))
        waiting = time.perf_counter()
        try:
            for member, future in pending:
                self._keep(done, member, future)
        except _StoppedWaiting:
            return False
        seconds["wait_for_scores"] = time.perf_counter() - waiting
        self.weights.restore()
        if len(done) <= s.population_size:  # a signal: theta and all members would be one more
            return False

        before = time.perf_counter()
        row = self._step(t, seeds, done)
        seconds["step"] = time.perf_counter() - before
        seconds["total"] = time.perf_counter() - started
        row["metrics"]["seconds"] = {name: round(value, 4) for name, value in seconds.items()}
        self.journal.add_step(row)
        self.weights.restore()
        self.metrics.log(row["metrics"], t)
        self._show(row["metrics"])
        return True

    def _score_member(self, t: int, member: int, prompts: list[str], generations: list[Generation]) -> dict:
        """Runs in a scoring thread; the row is what members.jsonl keeps."""
        scores = self._score(prompts, generations)
        return {
            "iteration": t,
            "member": member,
            "rewards": [finite_or_none(value) for value in scores.rewards],
            "costs": [finite_or_none(value) for value in scores.costs],
            "errors": {str(i): error for i, error in enumerate(scores.errors) if error},
            "tokens": sum(g.num_tokens for g in generations),
            "unfinished": sum(not g.finished for g in generations),
            "cut": sum(g.cut for g in generations),
            "truncated": sum(scores.truncated),
        }

    def _score(self, prompts: list[str], generations: list[Generation]) -> Scores:
        return self.scorer.score(prompts, [g.response for g in generations], [g.finished for g in generations])

    def _keep(self, done: dict[int, dict], member: int, future: Future) -> None:
        row = future.result()
        self.journal.add_member(row)
        done[member] = row
        if self.settings.verbose and member != UNPERTURBED:
            rewards, costs = np.array(row["rewards"], float), np.array(row["costs"], float)
            tqdm.write(f"  member {member}: R {np.nanmean(rewards):.3f} C {np.nanmean(costs):.3f}")

    def _step(self, t: int, seeds: list[int], done: dict[int, dict]) -> dict:
        """Moves the master; returns the journal's row with the metrics in it."""
        s = self.settings
        order = (UNPERTURBED, *range(s.population_size))
        rewards = np.array([done[member]["rewards"] for member in order], dtype=np.float64)  # (1 + N, B), None -> NaN
        costs = np.array([done[member]["costs"] for member in order], dtype=np.float64)
        missing = ~(np.isfinite(rewards) & np.isfinite(costs))
        usable = ~missing.any(axis=0)  # (B,): prompts that every member has scores for
        if missing.mean() > MAX_MISSING_SHARE or not usable.any():
            reasons = sorted({reason for member in order for reason in done[member]["errors"].values()})
            raise UserError(
                f"iteration {t}: {missing.sum()} of {missing.size} scores are missing, more than {MAX_MISSING_SHARE:.0%} "
                f"({'; '.join(reasons) or 'no reason given'}): the run stops before it learns from the rest. "
                "Mend the scorer, then start the same command again"
            )
        rewards, costs = rewards[:, usable], costs[:, usable]
        lam = self.multiplier.value
        fitness = self.rule.member_fitness(rewards[1:], costs[1:], lam)
        ranked = fitness
        if s.shuffle_fitness:
            ranked = np.random.default_rng([s.global_seed, t, 1]).permutation(fitness)
        coefficients = (s.alpha / s.population_size * z_scores(ranked)).tolist()
        self.weights.step(seeds, coefficients)
        constraint = self.multiplier.update(costs[0])
        metrics = {
            "kind": "train",
            "iteration": t,
            "reward_mean": float(rewards[0].mean()),
            "cost_mean": float(costs[0].mean()),
            "objective": float((rewards[0] - lam * costs[0]).mean()),
            "safe_ratio": 100.0 * float((costs[0] <= 0).mean()),
            "fitness_mean": float(fitness.mean()),
            "fitness_std": float(fitness.std()),
            "fitness_max": float(fitness.max()),
            "lambda_used": lam,
            **constraint,
            "prompts_left_out": int((~usable).sum()),
            "scores_missing": int(missing.sum()),
            "unfinished_share": sum(done[m]["unfinished"] for m in order) / missing.size,
            "cut_share": sum(done[m]["cut"] for m in order) / missing.size,
            "truncated_share": sum(done[m]["truncated"] for m in order) / missing.size,
            "tokens": sum(done[m]["tokens"] for m in order),
        }
        return {
            "iteration": t,
            "seeds": seeds,
            "fitness": fitness.tolist(),
            "coefficients": coefficients,
            "lambda_state": self.multiplier.state_dict(),
            "metrics": metrics,
        }

    def _evaluate(self, t: int) -> None:
        """Held-out evaluation of theta after t steps. The objective is taken at lambda_cost, so that iterations compare."""
        s = self.settings
        self.bar.set_description("ES held-out evaluation")
        prompts = [row[s.prompt_key] for row in self.held_out]
        self.weights.restore()
        generations = self.engine.generate(prompts, s.max_new_tokens)
        scores = self._score(prompts, generations)
        missing = int((~np.isfinite(scores.rewards) | ~np.isfinite(scores.costs)).sum())
        if missing > MAX_MISSING_SHARE * len(prompts):
            raise UserError(
                f"held-out evaluation: {missing} of {len(prompts)} scores are missing ({_first_error(scores)})"
            )
        labels = quadrant_labels(scores.rewards, scores.costs)
        points = [
            {
                "prompt": prompt,
                "response": generation.response,
                "reward": finite_or_none(scores.rewards[i]),
                "cost": finite_or_none(scores.costs[i]),
                "label": str(labels[i]),
                "id": i,
                "finished": generation.finished,
                "cut": generation.cut,
                "num_tokens": generation.num_tokens,
            }
            for i, (prompt, generation) in enumerate(zip(prompts, generations, strict=True))
        ]
        write_jsonl(self.folder / "eval" / f"iteration_{t:05d}_points.jsonl", points)
        row = {"kind": "eval", "iteration": t, "lambda": self.multiplier.value, "scores_missing": missing}
        for name, estimate in measure(points, s.lambda_cost).items():
            if estimate is not None:
                row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        self.metrics.log(row, t)
        self.evaluated.add(t)
        low, high = row["objective_low"], row["objective_high"]
        tqdm.write(
            f"held-out after {t} steps: objective {row['objective']:.3f} [{low:.3f}, {high:.3f}]  R {row['reward_mean']:.3f}"
            f"  C {row['cost_mean']:.3f}  safe {row['safe_ratio']:.1f} %  safe and helpful {row['SH']:.1f} %"
        )
        if s.verbose:
            for point in points[:3]:
                tqdm.write(f"  {point['label']}  {point['prompt'][:80]!r} -> {point['response'][:120]!r}")
        best_file = self.folder / "best" / "trainer_state.json"
        best = read_json(best_file)["objective"] if best_file.exists() else -np.inf
        if row["objective"] > best:
            self._save_model(self.folder / "best", t, objective=row["objective"])

    def _save_model(self, final: Path, t: int, **state: float) -> None:
        """theta in Hugging Face layout, float32, with the trainer's state beside it."""
        with atomic_directory(final) as folder:
            self.engine.save_pretrained(folder, self.weights.master)
            write_json(
                folder / "trainer_state.json", {"iteration": t, "lambda_state": self.multiplier.state_dict(), **state}
            )

    def _save_checkpoint(self, t: int) -> None:
        folder = self.folder / "checkpoints"
        self._save_model(folder / f"iteration_{t:05d}", t)
        for old in sorted(folder.glob("iteration_*"))[: -self.settings.keep_last]:
            shutil.rmtree(old)

    def _restore(self) -> None:
        """theta and lambda of the journal's last step: from the newest checkpoint that is not ahead of it, then by replay."""
        steps = self.journal.steps
        if not steps:
            return
        begin = 0
        for checkpoint in sorted((self.folder / "checkpoints").glob("iteration_*"), reverse=True):
            saved = read_json(checkpoint / "trainer_state.json")["iteration"]
            if saved <= len(steps):
                self.weights.load(checkpoint)
                begin = saved
                break
        for step in steps[begin:]:
            self.weights.step(step["seeds"], step["coefficients"])
        self.multiplier.load_state_dict(steps[-1]["lambda_state"])
        print(
            f"going on after step {len(steps)} (checkpoint {begin}, {len(steps) - begin} steps replayed from the journal)"
        )

    def _complete_metrics(self) -> None:
        """Rows that a kill kept from metrics.jsonl are in the journal; `evaluated` is what need not be done again."""
        rows = read_jsonl(self.folder / "metrics.jsonl")
        self.evaluated = {row["iteration"] for row in rows if row["kind"] == "eval"}
        logged = {row["iteration"] for row in rows if row["kind"] == "train"}
        for step in self.journal.steps:
            if step["iteration"] not in logged:
                self.metrics.log(step["metrics"], step["iteration"])

    def _show(self, row: dict) -> None:
        text = (
            f"objective {row['objective']:.3f} R {row['reward_mean']:.3f} C {row['cost_mean']:.3f} "
            f"safe {row['safe_ratio']:.0f} % lambda {row['lambda']:.3f}"
        )
        if watched():
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        else:  # a job's log: a line a step
            seconds = row["seconds"]["total"]
            done, total = row["iteration"] + 1, self.settings.num_iterations
            left = tqdm.format_interval(seconds * (total - done))
            print(f"step {done}/{total} {text} ({seconds:.1f} s, {left} left)", flush=True)

    def _show_waiting(self, seconds: float) -> None:
        if self.stop:
            raise _StoppedWaiting
        self.bar.set_description(f"waiting for the scorer, {seconds / 60:.0f} min")


def _first_error(scores: Scores) -> str:
    return next((error for error in scores.errors if error), "no reason given")


def _text_hash(texts: list[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
