"""Aligns a policy with GRPO through the scorer service.

    python alignment/GRPO/train_grpo_alignment.py --config alignment/GRPO/grpo_alignment.yaml --beta 0.01 \\
        --model_name MODEL --scorer_url http://HOST:8000 --output_dir RUN
    accelerate launch --config_file alignment/GRPO/accelerate_4gpu_zero2.yaml alignment/GRPO/train_grpo_alignment.py ...

Stop it with Ctrl-C, SIGTERM, SIGUSR1 or `touch RUN/stop` (the way for several processes, whose launcher keeps signals to
itself), or let it be killed: the same command goes on where it was. What RUN holds:
config.yaml and manifest.json (of the first start), starts.jsonl (the later ones), metrics.jsonl, tensorboard/, eval/ (held-out
answers with scores), checkpoints/ (to resume from), best/ (by the held-out objective) and final/, these two in Hugging Face
layout. stopped.json is there while a stopped run
waits to be gone on with; launchers lose the exit code, so job scripts look at that file.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.config import as_yaml
from alignment.errors import PassingError, UserError, run_main
from alignment.GRPO.checkpoints import check_weights, check_whole, deciding_of, is_finished, newest_checkpoint, step_of
from alignment.GRPO.settings import GRPOSettings, load_settings
from alignment.GRPO.stop_files import forget_earlier, stop_asked, tell_stopped
from alignment.prompts import draw_rows, text_hash
from alignment.records import check_writable_folder, load_prompts
from alignment.run_lock import RunLock
from alignment.runs import StopSignal, check_same_run, record_start, write_run_files

if TYPE_CHECKING:
    from trl import GRPOConfig

LOOKS, LOOK_EVERY = 30, 2.0  # at a run's folder until all processes see the same; seconds
EXIT_STOPPED = 128  # plus the signal's number, as shells do


def main() -> int:
    settings = load_settings(description=__doc__)
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"srun has started {tasks} tasks, and each would be a run of its own in {settings.output_dir}: GRPO's processes "
            f"are started by `accelerate launch --num_processes {tasks} ...` in one task, or by "
            "sbatch alignment/GRPO/run_grpo_alignment.sh"
        )
    with RunLock(Path(settings.output_dir)) as lock:
        return train_policy(settings, lock)


def train_policy(settings: GRPOSettings, lock: RunLock) -> int:
    """The run, as one of its processes; returns the exit code."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    expected = int(os.environ.get("EXPECTED_PROCESSES") or processes)  # the job script says it
    if processes != expected:
        raise UserError(
            f"the launcher made a group of {processes} processes where the job has {expected}: several runs "
            "in one folder; ACCELERATE_CONFIG needs a distributed_type of several processes, or take --nodes=1"
        )
    settings.accumulation(processes)
    train_rows = load_prompts(settings.train_jsonl, settings.prompt_key)
    held_out_rows = load_prompts(settings.eval_jsonl, settings.prompt_key)
    folder = Path(settings.output_dir)
    *_, finished = what_began(folder, settings, processes)  # a mistake is told at once
    args = None
    if processes > 1:
        args, finished = meet(settings, folder)
    if not finished:  # one that is may lie where nothing can be written
        take(lock, processes)
    look = what_began if processes == 1 else seen_by_all
    begun_with, checkpoint, finished = look(folder, settings, processes)  # now nobody else writes there
    if finished:
        print(f"{folder} is finished; a larger --max_steps would go on with it")
        return 0
    begun = bool(begun_with)
    first = int(os.environ.get("RANK", 0)) == 0
    names = ["checkpoints"] * (checkpoint is not None) + ["metrics.jsonl", "eval", "best", "final"]
    if not begun and (found := [name for name in names if (folder / name).exists()]):
        raise UserError(
            f"{folder} holds {', '.join(found)} but no manifest.json: what run is that? Give another --output_dir, or remove them"
        )
    if checkpoint is not None:
        check_whole(checkpoint, processes, os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
    drawn = [row[settings.prompt_key] for row in draw_rows(train_rows, settings.max_samples)]
    held_out = [row[settings.prompt_key] for row in draw_rows(held_out_rows, settings.eval_samples)]
    settings.check_enough(drawn)

    # torch and the models only now, so that a mistake in the settings is told at once.
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="transformers"
    )  # renamed in some supported versions
    from alignment.generation import TransformersEngine
    from alignment.GRPO.data import prompts_that_fit, run_order
    from alignment.GRPO.ranks import Stopped
    from alignment.GRPO.reward import ConstrainedReward
    from alignment.GRPO.run import Run
    from alignment.GRPO.trainer import ConstrainedGRPOTrainer
    from alignment.GRPO.trl_config import adapter_config, trl_config, weights_dtype
    from alignment.lagrangian import LagrangeMultiplier
    from alignment.progress import watched
    from alignment.scoring.client import SAY_EVERY, ScorerClient
    from alignment.scoring.scores import asked_of
    from alignment.scoring.scores import deciding as deciding_part

    told = 0.0

    def show_waiting(seconds: float) -> None:
        """Ends the waiting once a stop came. On a terminal, without a bar yet, a line a minute; else the client says it."""
        nonlocal told
        if stop_asked(folder):
            raise Stopped
        if watched() and seconds - told >= SAY_EVERY:
            told = seconds
            print(f"waiting for the scorer, {seconds / 60:.0f} min", file=sys.stderr, flush=True)

    with StopSignal() as stop, telling_what_passes(folder):
        args = args or trl_config(settings, folder)
        scorer = ScorerClient(
            settings.scorer_url,
            batch_size=settings.scorer_batch_size,
            max_wait=settings.scorer_max_wait,
            expected_identity=begun_with.get("scorer"),  # of several, "auto" then takes the one that the run began with
            on_wait=show_waiting,
        )
        try:
            scorer.wait_until_ready()
        except Stopped:
            return stopped(folder, step_of(checkpoint), stop.received, first)
        engine = TransformersEngine(
            settings.model_name,
            template=settings.policy_template,
            dtype=weights_dtype(settings),
            first_turn_only=settings.first_turn_only,
            batch_size=settings.eval_batch_size,
        )
        prompts = prompts_that_fit(engine, drawn, settings.max_prompt_length)
        settings.check_enough(prompts, "training prompts (of at most max_prompt_length tokens)")
        engine.check_room(prompts, settings.max_completion_length, settings.train_jsonl)
        engine.check_room(held_out, settings.max_completion_length, settings.eval_jsonl)
        deciding = settings.deciding() | {
            "processes": args.world_size,
            "device": args.device.type,
            "base_weights": engine.weights_hash(),
            "train_prompts": text_hash(prompts),
            "scorer": deciding_part(scorer.identity()),
        }
        if begun:
            check_same_run(begun_with, asked_of(begun_with, deciding), folder, "--output_dir")
        multiplier = LagrangeMultiplier.from_settings(settings)
        trainer = ConstrainedGRPOTrainer(
            args,
            engine,
            scorer,
            ConstrainedReward(multiplier, settings.num_generations, settings.reward_aggregation),
            run_order(prompts, settings.prompts_per_step, settings.max_steps, settings.seed),
            peft_config=adapter_config(settings),
        )
        if checkpoint is not None:
            check_weights(checkpoint, trainer.accelerator.unwrap_model(trainer.model))
        main_process = trainer.accelerator.is_main_process
        trainer.accelerator.wait_for_everyone()  # all have seen whether the run was there
        if main_process:
            if begun:
                record_start(folder, as_yaml(settings))
            else:
                files = {"train_jsonl": text_hash(drawn), "eval_jsonl": text_hash(held_out)}
                write_run_files(folder, as_yaml(settings), {"deciding": deciding, "prompts": files})
            if len(prompts) < len(drawn):
                print(
                    f"{len(drawn) - len(prompts)} of {len(drawn)} training prompts are longer than max_prompt_length and left out"
                )
        finished = Run(settings, trainer, held_out, folder, stop).train()
        step = trainer.state.global_step
        code = 0 if finished else stopped(folder, step, stop.received, main_process)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    if finished and main_process:
        print(f"finished: the aligned policy is in {folder / 'final'}, the best held-out one in {folder / 'best'}")
    return code


@contextlib.contextmanager
def telling_what_passes(folder: Path) -> Iterator[None]:
    """Launchers lose the exit code 75 too: any process tells it, because the first that ends may be any."""
    try:
        yield
    except PassingError as error:
        with contextlib.suppress(UserError):
            step = step_of(newest_checkpoint(folder))
            tell_stopped(folder, step, signal=None, exit_code=error.exit_code)
        raise


def stopped(folder: Path, step: int, received: signal.Signals | None, main_process: bool) -> int:
    """Says that the run stopped after `step`, for job scripts in a file; returns the exit code."""
    if main_process:
        tell_stopped(folder, step, signal=received and received.name)
        print(f"stopped after step {step}; go on with: {shlex.join([sys.executable, *sys.argv])}", flush=True)
    return EXIT_STOPPED + (received or signal.SIGTERM)


def what_began(folder: Path, settings: GRPOSettings, processes: int) -> tuple[dict, Path | None, bool]:
    """What the run in `folder` was begun with ({}: there is none), its newest checkpoint, and whether it is finished.

    Raises UserError when this is not that run.
    """
    checkpoint = newest_checkpoint(folder)
    if not os.path.exists(folder / "manifest.json"):  # no error where one may not look: the folder's check says it
        return {}, checkpoint, False
    if not settings.resume:
        raise UserError(f"{folder} holds a run already: give another --output_dir, or leave out --resume false")
    begun_with = deciding_of(folder)
    check_same_run(begun_with, settings.deciding(), folder, "--output_dir")
    finished = is_finished(folder, settings.max_steps)
    if checkpoint is not None and not finished:
        # Each process has random numbers of its own there.
        check_same_run(begun_with, {"processes": processes}, folder, "--output_dir")
    return begun_with, checkpoint, finished


def meet(settings: GRPOSettings, folder: Path) -> tuple[GRPOConfig, bool]:
    """Several processes come together; returns the trainer's settings, whose making is that, and whether the run is finished."""
    from alignment.GRPO.trl_config import trl_config

    args = trl_config(settings, folder)
    *_, finished = seen_by_all(folder, settings, args.world_size)
    return args, finished


def take(lock: RunLock, processes: int) -> None:
    """The first process takes the lock; where it is refused, all end."""

    def take_it() -> None:
        for place in (lock.folder, lock.folder / "checkpoints"):
            check_writable_folder(place)
        lock.take()
        forget_earlier(lock.folder)

    if processes == 1:
        take_it()
        return
    from accelerate import PartialState

    from alignment.GRPO.ranks import failing_together

    with failing_together(PartialState()):
        if PartialState().is_main_process:
            take_it()


def seen_by_all(folder: Path, settings: GRPOSettings, processes: int) -> tuple[dict, Path | None, bool]:
    """`what_began`, once all processes see the same: on other nodes files may show seconds after they were written.

    Otherwise some would go on from an older checkpoint, and nothing would tell.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from alignment.GRPO.ranks import failing_together

    views: list[tuple] = []
    for attempt in range(LOOKS):
        time.sleep(LOOK_EVERY * bool(attempt))
        with failing_together(PartialState()):
            seen = what_began(folder, settings, processes)
        begun_with, checkpoint, finished = seen
        views = gather_object([(bool(begun_with), step_of(checkpoint), finished)])
        if len(set(views)) == 1:
            return seen
    raise UserError(
        f"the processes see different things in {folder}, as newest checkpoints those of the steps "
        f"{', '.join(str(step) for _, step, _ in views)}: its file system shows files late or not on all nodes. Give the same "
        "command again, or another --output_dir"
    )


if __name__ == "__main__":
    run_main(main)
