"""The run around the trainer: metrics, held-out evaluation, checkpoints, signals, and going on where a run was.

What happens after a step, in this order: its row in metrics.jsonl; the held-out evaluation when one is due; a checkpoint when
one is due or the run stops. Before and after each of these, and between the batches of an evaluation, it looks whether it is
to stop: all that is left then is a checkpoint of that step. A run that goes on does the evaluation that its checkpoint's step
still lacks, and drops the rows of later steps, so that the files are those of a run that was never stopped.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.models import unwrap_model_for_generation

from alignment.errors import UserError
from alignment.evaluation.held_out import is_best, samples, score_held_out, summary_line
from alignment.generation import Generation
from alignment.GRPO.checkpoints import checkpoints_of, newest_checkpoint, step_of
from alignment.GRPO.ranks import Stopped, failing_together, on_any
from alignment.GRPO.settings import GRPOSettings
from alignment.GRPO.stop_files import stop_asked
from alignment.GRPO.trainer import BrokenStep, ConstrainedGRPOTrainer
from alignment.progress import progress_bar, step_text, watched
from alignment.prompts import text_hash
from alignment.records import finite_or_none, read_json, read_jsonl, write_json, write_jsonl
from alignment.runs import MetricsLog, StopSignal, atomic_directory

# TRL's and transformers' numbers that a step's row has as well, where there are any.
_TRAINER_NUMBERS = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "clip_ratio/region_mean": "clipped_share",
}


class Run(TrainerCallback):
    """Owns the run folder. All methods are called on all processes; the first one alone writes."""

    def __init__(
        self,
        settings: GRPOSettings,
        trainer: ConstrainedGRPOTrainer,
        held_out: list[str],
        folder: Path,
        stop: StopSignal,
    ):
        self.settings, self.trainer, self.held_out, self.folder, self.stop = settings, trainer, held_out, folder, stop
        self.main = trainer.accelerator.is_main_process
        self.metrics: MetricsLog | None = None
        trainer.add_callback(self)
        trainer.phase = self._show_phase
        trainer.scorer.on_wait = self._show_waiting

    def train(self) -> bool:
        """Trains to the end, or until it is told to stop; returns whether the run is finished: its last policy evaluated too.

        A failure (UserError) that any process meets is raised on all of them, after the state of the last whole step has
        been saved (not after a BrokenStep: with DeepSpeed the weights have taken it already).
        """
        checkpoint = newest_checkpoint(self.folder)
        first = self.saved = step_of(checkpoint)
        if checkpoint is not None:
            self.trainer.constraint.multiplier.load_state_dict(read_json(checkpoint / "constraint.json"))
            if self.main:
                print(f"going on after step {first}", flush=True)
        # What is evaluated and saved is told by the main process, or remembered: on another node a file may show seconds
        # after it was written, and then some processes would evaluate or save, and wait for ever for those that do not.
        rows: list[dict] = []
        with failing_together(self.trainer.accelerator):
            if self.main:
                self.metrics = self._open_metrics(first)
                rows = read_jsonl(self.folder / "metrics.jsonl")  # whole now, and without rows of later steps
        self.evaluated = set(gather_object([row["iteration"] for row in rows if row["kind"] == "eval"]))
        watching = self.main and watched()
        try:
            with progress_bar(self.settings.max_steps, "GRPO", "step", initial=first, disable=not watching) as self.bar:
                self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if self._at_end and self._step in self.evaluated:
                with failing_together(self.trainer.accelerator):
                    if self.main:
                        self._save_model(self.folder / "final")
                return True
        except Stopped:
            self._save_checkpoint()
        except BrokenStep:
            raise
        except UserError:
            self._save_checkpoint()
            raise
        finally:
            if self.metrics is not None:
                self.metrics.close()
        return False

    def _stopping(self) -> bool:
        """A signal came, or a file in its place."""
        return bool(self.stop) or stop_asked(self.folder)

    def _stop_if_told(self) -> None:
        """Raises Stopped on all processes when one of them is told to stop, unless nothing but final/ is left to do.

        `train` then saves this step, where that is not done yet.
        """
        if self._at_end and not self._evaluation_is_due:
            return
        if on_any(self.trainer.accelerator, self._stopping()):
            raise Stopped

    @property
    def _step(self) -> int:
        return self.trainer.state.global_step

    @property
    def _at_end(self) -> bool:
        return self._step >= self.settings.max_steps

    @property
    def _evaluation_is_due(self) -> bool:
        return (self._step % self.settings.eval_every == 0 or self._at_end) and self._step not in self.evaluated

    # -- transformers' events -------------------------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_if_told()
        if self._evaluation_is_due:
            self._evaluate()
        self._stop_if_told()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # the summary at the end of training
            return
        self.trainer.step_metrics |= self.trainer.mean_kl_and_entropy()
        with failing_together(self.trainer.accelerator):
            if self.metrics is not None:  # on the main process
                self._write_step(logs, self.metrics)
        self._stop_if_told()
        if self._evaluation_is_due:
            self._evaluate()
        if self._step % self.settings.save_steps == 0 or self._at_end:
            self._save_checkpoint()
        self._stop_if_told()

    # -- what is written ------------------------------------------------------------------------------------------

    def _open_metrics(self, first: int) -> MetricsLog:
        return MetricsLog(
            self.folder,
            keep=lambda row: row["iteration"] < first or (row["kind"] == "eval" and row["iteration"] == first),
            wandb_project=self.settings.wandb_project,
            wandb_run_name=self.settings.wandb_run_name,
        )

    def _write_step(self, logs: dict, metrics: MetricsLog) -> None:
        row = self.trainer.step_metrics
        for theirs, ours in _TRAINER_NUMBERS.items():
            if logs.get(theirs) is not None:
                row[ours] = finite_or_none(logs[theirs])
        total = time.perf_counter() - self.began
        seconds = row["seconds"] | {"train": total - sum(row["seconds"].values()), "total": total}
        row["seconds"] = {name: round(value, 4) for name, value in seconds.items()}
        metrics.log(row, row["iteration"])
        if watched():
            self.bar.set_postfix_str(step_text(row), refresh=False)
            self.bar.update()
        elif self._step % self.settings.logging_steps == 0:
            left = tqdm.format_interval(total * (self.settings.max_steps - self._step))
            print(
                f"step {self._step}/{self.settings.max_steps} {step_text(row)} ({total:.1f} s, {left} left)", flush=True
            )

    def _evaluate(self) -> None:
        """Scored greedy answers to the held-out prompts. Raises Stopped, on all processes, when one is told to stop between
        two batches or while the scorer is away."""
        self._show_phase("is evaluated on held-out prompts")
        generations = self._generate_held_out()
        with failing_together(self.trainer.accelerator):
            if self.metrics is not None:  # on the main process
                self._write_evaluation(generations, self.metrics)
        self.evaluated.add(self._step)

    def _write_evaluation(self, generations: list[Generation], metrics: MetricsLog) -> None:
        step = self._step
        points, measures = score_held_out(self.held_out, generations, self.trainer.scorer, self.settings.lambda_cost)
        row = {"kind": "eval", "iteration": step, "lambda": self.trainer.constraint.multiplier.value, **measures}
        write_jsonl(self.folder / "eval" / f"iteration_{step:05d}_points.jsonl", points)
        # The best model first: metrics.jsonl says that an evaluation is done, and a kill must not fall between the two.
        standing = {"objective": row["objective"], "held_out": text_hash(self.held_out)}
        if is_best(self.folder / "best", **standing):
            self._save_model(self.folder / "best", **standing)
        metrics.log(row, step)
        tqdm.write(summary_line(step, row))
        if self.settings.verbose:
            tqdm.write(samples(points))

    def _generate_held_out(self) -> list[Generation]:
        """In the prompts' order, with the policy as it is now."""
        trainer, engine = self.trainer, self.trainer.engine
        processes, mine = trainer.accelerator.num_processes, trainer.accelerator.process_index
        length = self.settings.max_completion_length
        with (
            unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model,
            failing_together(trainer.accelerator),
        ):
            model.eval()
            own = engine.generate_share(self.held_out, length, mine, processes, self._stop_generating)
            model.train()
        answers = dict(gather_object(list(own.items())))
        return [answers[row] for row in range(len(self.held_out))]

    def _stop_generating(self) -> None:
        if self._stopping():  # no question to the others: they have other numbers of batches
            raise Stopped

    def _save_checkpoint(self) -> None:
        if self._step in (0, self.saved):  # 0 also while a checkpoint is still being read
            return
        self.trainer.save_whole(self.folder / "checkpoints" / f"iteration_{self._step:05d}")
        self.saved = self._step
        if self.main:
            for old in checkpoints_of(self.folder)[: -self.settings.keep_last]:
                shutil.rmtree(old)

    def _save_model(self, final: Path, **state: float | str) -> None:
        """The policy in Hugging Face layout, adapters merged, with the run's state beside it; by the main process alone."""
        engine = self.trainer.engine
        bytes_each = next(iter(engine.parameters().values())).element_size()  # with adapters: theirs, float32
        with atomic_directory(final, needed=bytes_each * engine.num_parameters) as folder:
            engine.save_pretrained(folder)
            lambda_state = self.trainer.constraint.multiplier.state_dict()
            write_json(folder / "trainer_state.json", {"iteration": self._step, "lambda_state": lambda_state, **state})

    def _show_phase(self, text: str) -> None:
        self.bar.set_description(f"GRPO policy {text}")

    def _show_waiting(self, seconds: float) -> None:
        if self._stopping():
            raise Stopped
        self.bar.set_description(f"waiting for the scorer, {seconds / 60:.0f} min")
